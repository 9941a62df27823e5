"""Which signals ask a run to end. Nothing here imports torch."""

import signal


def end_signals() -> list[signal.Signals]:
    """Ctrl-C, a batch queue's word, and a terminal that hangs up, unless `nohup` said that this is no matter."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]
