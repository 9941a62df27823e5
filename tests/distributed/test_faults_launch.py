"""Real launches that lose a rank: who is told of, how fast the others end, and how the run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe_trainer.checkpoint.manager import find_latest, read_document
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.state import TrainState
from moe_trainer.train.trainer import Trainer
from tests.distributed.runs import wait_for_steps
from tests.processes import environment

STEPS = 14


def train(folder: Path, *more: str) -> subprocess.Popen[str]:
    arguments = ["+recipe=mixtral_sp_ep", "device=cpu", "run_name=lost", f"run_dir={folder}", *more]
    env = environment() | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "moe_trainer.cli.train", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ranks_of(folder: Path) -> dict[int, int]:
    """Rank -> process id, of the processes that run for `folder`."""
    ranks = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            environment = dict(
                entry.split(b"=", 1) for entry in (process / "environ").read_bytes().split(b"\0") if b"=" in entry
            )
        except OSError:
            continue
        if f"run_dir={folder}".encode() in arguments and b"LOCAL_RANK" in environment:
            ranks[int(environment[b"RANK"])] = int(process.name)
    return ranks


def undisturbed(folder: Path, steps: int) -> None:
    """The same run as one process."""
    overrides = ["+recipe=mixtral_sp_ep", "device=cpu", "run_name=whole", f"run_dir={folder}", f"steps={steps}"]
    cfg = validate(compose("train", [*overrides, "parallel.fsdp=1", "parallel.tp=1"]), 1, 0)
    trainer = Trainer(cfg, torch.device("cpu"))
    trainer.start()
    trainer.fit()


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.grid
def test_one_of_four_is_killed_two_go_on_and_four_take_over(tmp_path: Path) -> None:
    elastic = ["parallel.mesh=auto", "checkpoint.every=2", "launch.max_restarts=1", "launch.shrink=true"]
    command = train(tmp_path, *elastic, f"steps={STEPS}")
    wait_for_steps(command, tmp_path / "lost", 5)
    ranks = ranks_of(tmp_path)
    assert set(ranks) == {0, 1, 2, 3}
    os.kill(ranks[2], signal.SIGKILL)
    killed = time.monotonic()
    while any(pid in ranks_of(tmp_path).values() for pid in ranks.values()):
        assert time.monotonic() - killed < 10, "the other ranks did not end"
        time.sleep(0.1)
    _, err = command.communicate(timeout=300)
    assert command.returncode == 0, err
    told, restarted = err.index("rank 2 was killed by SIGKILL"), err.index("starting again on 2 ranks")
    assert told < restarted and "Traceback" not in err
    newest = find_latest(tmp_path / "lost" / "checkpoints")
    assert newest is not None and '"world_size": 2' in read_document(newest, "state.json")

    grown = train(tmp_path, *elastic, f"steps={STEPS + 2}", "checkpoint.resume=auto")
    _, err = grown.communicate(timeout=300)
    assert grown.returncode == 0, err
    newest = find_latest(tmp_path / "lost" / "checkpoints")
    assert newest is not None and '"world_size": 4' in read_document(newest, "state.json")
    assert TrainState.from_json(read_document(newest, "state.json")).step == STEPS + 2
    run_distributed(undisturbed, 1, tmp_path, STEPS + 2)
    assert losses(tmp_path / "lost") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_step_and_collective(tmp_path: Path) -> None:
    command = train(tmp_path, "parallel.fsdp=1", "launch.timeout_seconds=8", "steps=1000")
    wait_for_steps(command, tmp_path / "lost", 3)
    ranks = ranks_of(tmp_path)
    os.kill(ranks[1], signal.SIGSTOP)
    time.sleep(9)
    os.kill(ranks[1], signal.SIGCONT)
    _, err = command.communicate(timeout=120)
    assert command.returncode == 1, err
    assert "where the ranks were:" in err
    for rank in (0, 1):
        line = next(line for line in err.splitlines() if line.startswith(f"  rank {rank}: step "))
        assert int(line.split("step ")[1].split(",")[0]) >= 3
        assert "last collective gloo:" in line and ".py:" in line
