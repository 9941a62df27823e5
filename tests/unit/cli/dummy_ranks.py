"""What the ranks of `test_launch` run: `python -m dummy_ranks FOLDER MODE`; each leaves a file with its id.

No part begins before both ranks have left theirs: a rank that fails at once would have the launcher end the other,
on a loaded machine still importing, before the test could know which process must be gone.
"""

import os
import signal
import sys
import time
from pathlib import Path

from moe_trainer.cli.command import run_command
from moe_trainer.config.errors import ConfigError


def crash_in_a_group(folder: Path, rank: str, error: Exception) -> None:
    """Rank 1 raises while rank 0 waits for it in a collective, on two groups."""
    import torch
    import torch.distributed as dist

    from moe_trainer.config.choices import DeviceName
    from moe_trainer.parallel.process_group import process_group

    with process_group(DeviceName.cpu):
        other = dist.new_group(backend="gloo")
        works = [dist.all_reduce(torch.ones(1), group=group, async_op=True) for group in (None, other)]
        for work in works:
            work.wait()
        waiting = dist.all_reduce(torch.ones(1), group=other, async_op=True)
        if rank == "1":
            (folder / "boom").touch()
            print("the last words of stdout", end="")
            raise error
        dist.all_reduce(torch.ones(1))
        waiting.wait()


def die_once_in_a_group(folder: Path, rank: str) -> None:
    """Rank 1 is killed in the first start after the ranks have met."""
    import torch
    import torch.distributed as dist

    from moe_trainer.config.choices import DeviceName
    from moe_trainer.parallel.process_group import process_group

    with process_group(DeviceName.cpu, 20):
        dist.all_reduce(torch.ones(1))
        if rank == "1" and not (folder / "boom").exists():
            (folder / "boom").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))


class AbortsAtTheEnd:
    """When Python takes its modules apart, as PyTorch's threads now and then do."""

    def __del__(self) -> None:
        os.abort()


def meet(folder: Path, rank: str) -> None:
    """Leave this rank's id and wait for the other's."""
    written = folder / f".rank{rank}"
    written.write_text(str(os.getpid()))
    written.rename(folder / f"rank{rank}")
    while len(list(folder.glob("rank*"))) < 2:
        time.sleep(0.02)


def behave(folder: Path, mode: str, rank: str) -> int:
    """Play one part: ends well (or nearly), sleeps, ignores signals, makes a mistake, crashes or is killed."""
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    meet(folder, rank)
    if mode == "mistake":
        raise ConfigError("data.path=x: no\nsuch file")
    if mode == "crash" and rank == "1":
        raise RuntimeError("boom")
    if mode == "crash_in_a_group":
        crash_in_a_group(folder, rank, RuntimeError("boom"))
    if mode == "mistake_in_a_group":
        crash_in_a_group(folder, rank, ConfigError("data.path=x: no\nsuch file"))
    if mode == "killed_once":
        die_once_in_a_group(folder, rank)
        return 0
    if mode == "killed" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "well_but_for_the_end":
        sys.modules["aborts_at_the_end"] = AbortsAtTheEnd()
        print("done" if rank == "1" else "", end="")
        return 0
    if mode != "well":
        time.sleep(60)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("moe-dummy", lambda: behave(Path(sys.argv[1]), sys.argv[2], os.environ["RANK"])))
