"""Starts one process for each rank through torchrun, quietly, and ends them all when it is told to.

Three generations: the command (`launch`), an agent in a session of its own (`python -m moe_trainer.cli.launch`:
torchrun without its banners and tables) and the ranks. Each watches its parent and goes when the parent is gone, so
nothing outlives the command, whatever killed it.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

_MARK = "MOE_TRAINER_LAUNCHED"
_STOP_FILE = "MOE_TRAINER_STOP_FILE"
_SECONDS_TO_END = 3.0


def launch(module: str, argv: list[str], nproc: int, lets_finish: bool = False) -> int:
    """Run `python -m module argv` on `nproc` ranks of this machine.

    Args:
        lets_finish: the first Ctrl-C or SIGTERM only makes `stop_file`, which the ranks look for; they end by
            themselves. The second ends them.

    Returns:
        2 if a rank left with 2 (the user's mistake), 0 if all did with 0, otherwise 1; 130 after Ctrl-C and 143 after
        SIGTERM where that ended the ranks, which takes 10 s at most.
    """
    with TemporaryDirectory(prefix="moe_trainer_") as folder:
        return _launch(module, argv, nproc, Path(folder) / "stop", lets_finish)


def _launch(module: str, argv: list[str], nproc: int, stop: Path, lets_finish: bool) -> int:
    arguments = ["--standalone", f"--nproc-per-node={nproc}", "-m", module, *argv]
    env = dict(os.environ, **{_MARK: "1", _STOP_FILE: str(stop)})
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    agent = subprocess.Popen(
        [sys.executable, "-m", __name__, *arguments], env=env, stdin=subprocess.DEVNULL, start_new_session=True
    )
    kill_late = threading.Timer(_SECONDS_TO_END, agent.kill)
    kill_late.daemon = True
    received: list[int] = []

    def end_ranks(signum: int, frame: FrameType | None) -> None:
        if lets_finish and not stop.exists():
            stop.touch()
            print("stopping after the step at hand; once more to end at once", file=sys.stderr)
            return
        if received:
            agent.kill()
            return
        received.append(signum)
        agent.terminate()
        kill_late.start()

    before = {signum: signal.signal(signum, end_ranks) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = agent.wait()
    finally:
        kill_late.cancel()
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 1


def stop_file() -> Path | None:
    """In a rank that `launch` started: the file that it makes when the ranks are to save and stop."""
    path = os.environ.get(_STOP_FILE)
    return Path(path) if path else None


def was_launched() -> bool:
    """Whether this process is a rank that `launch` started."""
    return _MARK in os.environ


def report_to_launcher(message: str) -> None:
    """Hands the launcher the one line that it prints for all ranks."""
    error = {"message": message, "timestamp": int(time.time())}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(error), encoding="utf-8")


def end_with_parent() -> None:
    """From now on this process ends within a second of its parent, even while it is stuck in a collective."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def _run_agent(argv: list[str]) -> int:
    end_with_parent()
    logging.disable(logging.CRITICAL)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(argv))
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        mistakes = [failure for failure in error.failures.values() if failure.exitcode == 2]
        if mistakes:
            if mistakes[0].error_file_data.get("message"):
                print(mistakes[0].error_file_data["message"], file=sys.stderr)
            return 2
        how = f"was killed by {first.signal_name()}" if first.exitcode < 0 else f"left with code {first.exitcode}"
        print(f"rank {rank} {how}; the other ranks were ended", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_run_agent(sys.argv[1:]))
