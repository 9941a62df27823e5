"""Starts one process for each rank through torchrun, quietly, and ends them all when it is told to.

Three generations: the command (`launch`), an agent in a session of its own (`python -m moe_trainer.cli.launch`:
torchrun without its banners and tables) and the ranks. Each watches its parent and goes when the parent is gone, so
nothing outlives the command, whatever killed it. A rank that fails hands its traceback to the agent instead of
printing it: the agent shows that of the rank which failed first, and not what it did to the others.
"""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from moe_trainer.cli.whereabouts import NCCL_DUMP, describe_ranks
from moe_trainer.config.checks import fits_one_machine
from moe_trainer.train.signals import end_signals

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_MARK = "MOE_TRAINER_LAUNCHED"
_FOLDER = "MOE_TRAINER_LAUNCH_FOLDER"
_STOP, _LOST = "stop", "lost.json"
_SECONDS_TO_END = 3.0
_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
_OF_THE_GROUP = re.compile(
    r"connection (reset|closed|refused)|closed by peer|broken pipe|ncclRemoteError|ncclSystemError|timed? ?out|"
    r"DistBackendError|DistNetworkError|process group .*(abort|destroy)",
    re.IGNORECASE,
)
"""What a rank says when another one is gone or late."""


class Outcome(NamedTuple):
    """How a launch ended."""

    code: int
    lost: list[int]
    """Ranks that were killed, rather than failed."""
    stopped: bool
    """Whether it was told to end, by a signal."""


class Start(NamedTuple):
    """One start of the ranks."""

    argv: list[str]
    nproc: int
    env: Mapping[str, str] = MappingProxyType({})
    """On top of this process's."""


def launch(module: str, argv: list[str], nproc: int, lets_finish: bool = False) -> int:
    """Run `python -m module argv` on `nproc` ranks of this machine.

    Args:
        lets_finish: the first Ctrl-C or SIGTERM only makes `stop_file`, which the ranks look for; they end by
            themselves. The second ends them.

    Returns:
        2 if a rank left with 2 (the user's mistake), 0 if all did with 0, otherwise 1; 130 after Ctrl-C and 143 after
        SIGTERM where that ended the ranks, which takes 10 s at most.
    """
    return _launch(module, Start(argv, nproc), lets_finish).code


def launch_again(
    module: str, first: Start, max_restarts: int, next_start: Callable[[Start, list[int]], Start]
) -> int:
    """As `launch` with `lets_finish`, and once more, at most `max_restarts` times, after a rank failed or was killed.

    Args:
        next_start: from the last start and the ranks that were killed in it.
    """
    start = first
    for left in range(max_restarts, -1, -1):
        outcome = _launch(module, start, lets_finish=True)
        if outcome.code != 1 or outcome.stopped or not left:
            break
        start = next_start(start, outcome.lost)
        print(f"starting again on {start.nproc} ranks; {left - 1} restarts left", file=sys.stderr)
    return outcome.code


def _launch(module: str, start: Start, lets_finish: bool) -> Outcome:
    fits_one_machine(start.nproc)
    with TemporaryDirectory(prefix="moe_trainer_") as name:
        folder = Path(name)
        arguments = ["--standalone", f"--nproc-per-node={start.nproc}", "-m", module, *start.argv]
        env = dict(os.environ, **start.env, **{_MARK: "1", _FOLDER: name})
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // start.nproc)))
        env.setdefault("TORCH_FR_BUFFER_SIZE", "200")  # the flight recorder: some hundred bytes a collective
        env.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / NCCL_DUMP))
        env.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        env.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "2000")
        agent = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments], env=env, stdin=subprocess.DEVNULL, start_new_session=True
        )
        code, received = _wait(agent, folder / _STOP, lets_finish)
        lost = json.loads((folder / _LOST).read_text()) if (folder / _LOST).exists() else []
        told = bool(received) or (folder / _STOP).exists()
    if received:
        return Outcome(128 + received[0], lost, told)
    return Outcome(code if code >= 0 else 1, lost, told)


def _wait(agent: subprocess.Popen[bytes], stop: Path, lets_finish: bool) -> tuple[int, list[int]]:
    """The agent's exit code, and the signals that were passed on to it."""
    kill_late = threading.Timer(_SECONDS_TO_END, agent.kill)
    kill_late.daemon = True
    received: list[int] = []

    def end_ranks(signum: int, frame: FrameType | None) -> None:
        if lets_finish and not stop.exists():
            stop.touch()
            with suppress(OSError):  # a terminal that hung up takes no text
                print("stopping after the step at hand; once more to end at once", file=sys.stderr)
            return
        if received:
            agent.kill()
            return
        received.append(signum)
        agent.terminate()
        kill_late.start()

    before = {signum: signal.signal(signum, end_ranks) for signum in end_signals()}
    try:
        return agent.wait(), received
    finally:
        kill_late.cancel()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def launch_folder() -> Path | None:
    """In a rank that `launch` started: the folder that the two share."""
    path = os.environ.get(_FOLDER)
    return Path(path) if path else None


def stop_file() -> Path | None:
    """In a rank that `launch` started: the file that it makes when the ranks are to save and stop."""
    folder = launch_folder()
    return None if folder is None else folder / _STOP


def was_launched() -> bool:
    """Whether this process is a rank that `launch` started."""
    return _MARK in os.environ


def report_to_launcher(message: str) -> None:
    """Hands the launcher what it prints for all ranks: one line, or a traceback."""
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

    arguments = parse_args(argv)
    try:
        run(arguments)
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        return _tell(error.failures, int(arguments.nproc_per_node))
    return 0


def _tell(failures: "dict[int, ProcessFailure]", world_size: int) -> int:
    """Say which rank failed first, and why; the exit code."""
    mistakes = [_message(failure) for failure in failures.values() if failure.exitcode == 2]
    if mistakes:
        if mistakes[0]:
            print(mistakes[0], file=sys.stderr)
        return 2
    rank = min(failures, key=lambda rank: (_consequence(rank, failures[rank]), failures[rank].timestamp, rank))
    first = failures[rank]
    message = _message(first)
    if message:
        print(message.rstrip(), file=sys.stderr)
    killed = first.exitcode < 0
    how = f"was killed by {first.signal_name()}" if killed else f"left with code {first.exitcode}"
    folder = launch_folder()
    if folder is not None:
        lost = [
            rank for rank, failure in failures.items() if failure.exitcode < 0 and not _consequence(rank, failure)
        ]
        (folder / _LOST).write_text(json.dumps(lost))
        if _TIMED_OUT.search(message) or _ended_by_nccl(rank, first):
            print("\n".join(["where the ranks were:", *describe_ranks(folder, world_size)]), file=sys.stderr)
    print(f"rank {rank} {how}; the other ranks were ended", file=sys.stderr)
    return 1


def _message(failure: "ProcessFailure") -> str:
    """What the rank handed over before it left, if it could."""
    return str(failure.error_file_data.get("message") or "") if os.path.isfile(failure.error_file) else ""


def _consequence(rank: int, failure: "ProcessFailure") -> int:
    """0 for a rank that was killed or failed by itself, 1 for one that lost another rank, 2 for one told to end."""
    if failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return 2
    if _ended_by_nccl(rank, failure):
        return 1
    last_line = _message(failure).strip().rpartition("\n")[2]
    return int(failure.exitcode > 0 and bool(_OF_THE_GROUP.search(last_line)))


def _ended_by_nccl(rank: int, failure: "ProcessFailure") -> bool:
    """By its own time-out. That ends the process with other threads at work, so now and then it is a SIGSEGV."""
    folder = launch_folder()
    has_dump = folder is not None and (folder / f"{NCCL_DUMP}{rank}").exists()
    return failure.exitcode == -signal.SIGABRT or (has_dump and failure.exitcode == -signal.SIGSEGV)


if __name__ == "__main__":
    sys.exit(_run_agent(sys.argv[1:]))
