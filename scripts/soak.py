"""A run that is killed again and again, and what is left of it.

    python scripts/soak.py --steps 300 --kills 6 --ranks 2

Trains a tiny Mixtral with `launch.max_restarts`, kills a rank of it at random moments (SIGKILL; every third time the
whole command, which is then started again, and a file of the newest checkpoint is damaged). At the end every step's
loss is compared with that of the same run undisturbed, and every checkpoint that is left is verified. Exit code 0:
nothing was lost.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moe_trainer.checkpoint.manager import find_latest
from moe_trainer.checkpoint.manifest import verify
from moe_trainer.observe.sinks import read_metrics

_RECIPE = ["+recipe=mixtral_sp_ep", "device=cpu", "logging.every=50", "optim.schedule_steps=100", "dtype=float64"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Train under random kills and damage; compare with a quiet run.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    source = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        folder = Path(name)
        mesh = [f"parallel.tp={given.ranks}", "parallel.fsdp=1", f"steps={given.steps}", f"run_dir={folder}"]
        quiet = _start(*_RECIPE, *mesh, "run_name=quiet")
        if quiet.wait() != 0:
            return 1
        moments = sorted(source.randrange(1, given.steps) for _ in range(given.kills))
        killed = _disturb(folder, mesh, moments, source)
        return _compare(folder, given.steps, killed)


def _disturb(folder: Path, mesh: list[str], moments: list[int], source: random.Random) -> list[str]:
    """Run to the end in spite of everything; what was done to it. `moments`: the steps after which it is killed."""
    settings = ["run_name=soak", "checkpoint.every=5", "checkpoint.keep_last=3", "checkpoint.resume=auto"]
    arguments = [*_RECIPE, *mesh, *settings, "launch.max_restarts=1000"]
    command, done = _start(*arguments), []
    failures = 0  # in a row, after the last kill
    while command.poll() is None or command.returncode != 0:
        if command.poll() is not None:
            failures += len(done) == len(moments)
            if failures > 3:
                raise RuntimeError(f"the run does not come to its end after {', '.join(done)}")
            command = _start(*arguments)
        if len(done) == len(moments):
            command.wait()
            continue
        time.sleep(source.uniform(0.02, 0.2))  # somewhere in a step, or in a save
        ranks = _ranks(folder)
        if not ranks or _steps(folder) < moments[len(done)]:
            continue
        if len(done) % 3 == 2:
            os.kill(command.pid, signal.SIGKILL)
            command.wait()
            time.sleep(2)  # its ranks notice, and go
            done.append("the command")
            newest = find_latest(folder / "soak" / "checkpoints")
            if newest is not None and len(list(newest.parent.glob("step-*"))) > 1:  # one whole one is left
                done[-1] += f" and a byte of {newest.name}/{_damage(newest, source)}"
        else:
            rank = source.choice(sorted(ranks))
            os.kill(ranks[rank], signal.SIGKILL)
            done.append(f"rank {rank}")
            while ranks[rank] in _ranks(folder).values():
                time.sleep(0.05)
        print(f"killed {done[-1]} after step {_steps(folder)}", flush=True)
    return done


def _compare(folder: Path, steps: int, killed: list[str]) -> int:
    quiet, soaked = (read_metrics(folder / name / "metrics.jsonl") for name in ("quiet", "soak"))
    assert [line["step"] for line in soaked] == list(range(1, steps + 1)), "a step is missing"
    worst = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(quiet, soaked, strict=True))
    checkpoints = sorted((folder / "soak" / "checkpoints").glob("step-????????"))
    for checkpoint in checkpoints:
        verify(checkpoint)
    exact = sum(a["loss"] == b["loss"] for a, b in zip(quiet, soaked, strict=True))
    print(
        f"{steps} steps, killed {len(killed)} times ({', '.join(killed)}): {exact} losses equal bit for bit, "
        f"largest relative difference {worst:.1e}; {len(checkpoints)} checkpoints, all whole"
    )
    return int(worst > 1e-9)


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "moe_trainer.cli.train", *arguments], env=env)


def _ranks(folder: Path) -> dict[int, int]:
    """Rank -> process id, of the run below `folder`."""
    ranks = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            entries = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        environment = dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
        if f"run_dir={folder}".encode() in arguments and b"LOCAL_RANK" in environment:
            ranks[int(environment[b"RANK"])] = int(process.name)
    return ranks


def _steps(folder: Path) -> int:
    metrics = folder / "soak" / "metrics.jsonl"
    return len(read_metrics(metrics)) if metrics.exists() else 0


def _damage(checkpoint: Path, source: random.Random) -> str:
    """Flip a bit; the file's name. Not of COMMIT.json, in which a flipped letter of torch's version harms nobody."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "COMMIT.json"]
    path = source.choice(sorted(files))
    raw = bytearray(path.read_bytes())
    raw[source.randrange(len(raw))] ^= 1
    path.write_bytes(raw)
    return path.name


if __name__ == "__main__":
    sys.exit(main())
