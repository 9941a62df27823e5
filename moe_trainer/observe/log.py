"""Messages of the run: the standard library's logging, with rank 0 speaking for all."""

import logging
import sys

_PACKAGE = "moe_trainer"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module (pass `__name__`)."""
    return logging.getLogger(name if name.split(".")[0] == _PACKAGE else f"{_PACKAGE}.{name}")


def setup_logging(rank: int) -> None:
    """Send the package's messages to stderr: from info on rank 0; from warning, with the rank, on the others.

    Other libraries' loggers are left alone. Calling it again replaces what it set up before.
    """
    logger = logging.getLogger(_PACKAGE)
    handler = _CurrentStderr()
    layout = "%(message)s" if rank == 0 else f"[rank {rank}] %(levelname)s: %(message)s"
    handler.setFormatter(logging.Formatter(layout))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False


class _CurrentStderr(logging.Handler):
    """Writes to whatever stderr is at the time: a progress bar replaces it while it is on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)
