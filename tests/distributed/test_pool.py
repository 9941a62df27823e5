"""The pool of ranks for tests leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from moe_trainer.testing.pool import run_distributed

CALLER = (
    "from pathlib import Path; from moe_trainer.testing.pool import run_distributed; "
    "from tests.distributed.test_pool import sleep; run_distributed(sleep, 2, Path({folder!r}))"
)


def sleep(folder: Path) -> None:
    """Leave the process's number behind, and stay."""
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def process_number() -> int:
    return os.getpid()


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(is_so: object, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_ranks_go_when_the_caller_is_killed(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    caller = subprocess.Popen([sys.executable, "-c", CALLER.format(folder=str(tmp_path))], cwd=root)
    assert wait_for(lambda: len(list(tmp_path.iterdir())) == 2, 60)
    ranks = [int(path.name) for path in tmp_path.iterdir()]
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert wait_for(lambda: not any(map(is_alive, ranks)), 10)


def test_ranks_are_processes_of_their_own() -> None:
    ranks = run_distributed(process_number, 2)
    assert len({os.getpid(), *ranks}) == 3
