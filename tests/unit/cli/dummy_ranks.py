"""What the ranks of `test_launch` run: `python -m dummy_ranks FOLDER MODE`; each leaves a file with its id."""

import os
import signal
import sys
import time
from pathlib import Path

from moe_trainer.cli.command import run_command
from moe_trainer.config.errors import ConfigError


def behave(folder: Path, mode: str, rank: str) -> int:
    """Play one part: ends well, sleeps, ignores signals, makes a mistake, crashes or is killed."""
    (folder / f"rank{rank}").write_text(str(os.getpid()))
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == "mistake" or (mode == "mistake_of_one" and rank == "1"):
        raise ConfigError("data.path=x: no\nsuch file")
    if mode == "crash" and rank == "1":
        raise RuntimeError("boom")
    if mode == "killed" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode != "well":
        time.sleep(60)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("moe-dummy", lambda: behave(Path(sys.argv[1]), sys.argv[2], os.environ["RANK"])))
