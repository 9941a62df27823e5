"""The pool of ranks for tests leaves nothing behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

from moe_trainer.testing.pool import run_distributed
from tests.processes import environment, ranks_of, wait_until_gone

CALL = (
    "import sys; from pathlib import Path; from moe_trainer.testing.pool import run_distributed; "
    "from tests.distributed.test_pool import stay; run_distributed(stay, 2, Path(sys.argv[1]))"
)


def stay(folder: Path) -> None:
    (folder / f"rank{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(60)


def test_ranks_go_when_the_caller_is_killed(tmp_path: Path) -> None:
    caller = subprocess.Popen([sys.executable, "-c", CALL, str(tmp_path)], env=environment())
    try:
        ranks = ranks_of(tmp_path)
    finally:
        caller.kill()
        caller.wait()
    assert wait_until_gone(ranks, 10)


def test_ranks_are_processes_of_their_own() -> None:
    ranks = run_distributed(os.getpid, 2)
    assert len({os.getpid(), *ranks}) == 3
