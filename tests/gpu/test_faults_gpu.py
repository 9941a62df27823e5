"""Faults over NCCL on two GPUs: a rank that dies or hangs, one that is slow or computes other bits, checkpoints."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_trainer.config.schema import Config
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate
from moe_trainer.kernels.local_part import local_part
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.parallel.gpus import count_places, ranks_per_gpu
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.trainer import Trainer
from tests.distributed.runs import fit
from tests.processes import environment

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(count_places() < 2, reason="needs two GPUs")

LAUNCH = (
    "import sys; from moe_trainer.cli.launch import launch; "
    "sys.exit(launch('faulty_ranks', sys.argv[1:], 2, lets_finish=True))"
)
TWO = ["parallel.fsdp=1", "parallel.tp=2", f"device={DEVICE}"]


def launched(folder: Path, fault: str, *overrides: str) -> tuple[int, str, float]:
    """Exit code, stderr, and the seconds from the fault to the end."""
    mark, env = folder / "failed", environment(Path(__file__).parent)
    run = ["+recipe=mixtral_sp_ep", f"run_dir={folder}", "steps=100", *TWO, *overrides]
    command = [sys.executable, "-c", LAUNCH, fault, str(mark), *run]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert mark.exists(), f"ended with {done.returncode} before the fault: {done.stderr}"
    return done.returncode, done.stderr, time.time() - mark.stat().st_mtime


def test_a_rank_that_is_killed_takes_the_other_down(tmp_path: Path) -> None:
    code, err, seconds = launched(tmp_path, "killed")
    assert code == 1 and seconds < 10, err
    assert "rank 1 was killed by SIGKILL; the other ranks were ended" in err and "Traceback" not in err
    [written] = tmp_path.rglob("environment.jsonl")
    assert json.loads(written.read_text())["ranks_per_gpu"] == ranks_per_gpu()


def test_a_rank_that_hangs_is_named_with_its_step_and_collective(tmp_path: Path) -> None:
    code, err, seconds = launched(tmp_path, "hangs", "launch.timeout_seconds=8")
    assert code == 1 and seconds < 8 + 15, err
    assert "where the ranks were:" in err, err
    lines = [next(line for line in err.splitlines() if line.startswith(f"  rank {rank}: step 5")) for rank in (0, 1)]
    assert all("last collective " in line and ".py:" in line for line in lines), err
    assert "faulty_ranks" not in lines[0] and "sleep" not in lines[0]


def config(folder: Path, name: str, *overrides: str) -> Config:
    run = [f"run_dir={folder}", f"run_name={name}", "steps=6", "data.global_batch_size=4", *TWO]
    return validate(compose("train", ["+recipe=mixtral_sp_ep", *run, *overrides]), 2, 2)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if DEVICE == "cuda" else torch.device("cpu")


def trained(cfg: Config) -> Trainer:
    trainer = Trainer(cfg, device())
    trainer.start()
    fit(trainer)
    return trainer


def parts(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: local_part(tensor).cpu().clone() for name, tensor in trainer._tensors().items()}


def train_twice(cfgs: list[Config]) -> bool:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    first, second = (parts(trained(cfg)) for cfg in cfgs)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_deterministic_runs_are_equal_and_so_is_a_step_taken_twice(tmp_path: Path) -> None:
    """bfloat16, with our kernels and fused attention; the second run takes each step twice."""
    cfgs = [
        config(tmp_path, "first", "deterministic=true", "checkpoint.every=null"),
        config(tmp_path, "second", "deterministic=true", "checkpoint.every=null", "checks.replay_every=1"),
    ]
    assert run_distributed(train_twice, 2, cfgs, device=DEVICE, timeout=120) == [True, True]
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("first", "second")]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]


def save_beside_training(cfg: Config) -> tuple[bool, bool, bool]:
    """Whether the copy is page-locked, training went on meanwhile, and what is loaded is what was saved."""
    trainer = trained(cfg)
    saved = parts(trainer)
    trainer.checkpoints.start_save(trainer.state.step + 100, trainer._tensors(), trainer._documents())
    buffers = trainer.checkpoints._host._buffers
    is_pinned = bool(buffers) and all(buffer.is_pinned() for buffer in buffers.values())
    for _ in range(3):
        trainer.train_step(trainer.loader.batch(trainer.state.samples).to(device()))
    went_on = any(not torch.equal(saved[name], part) for name, part in parts(trainer).items())
    trainer.checkpoints.wait()
    assert trainer.checkpoints.failure is None
    trainer.load(trainer.checkpoints.root / f"step-{trainer.state.step - 3 + 100:08d}")
    loaded = parts(trainer)
    return is_pinned, went_on, all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_an_asynchronous_save_holds_the_moment_it_was_begun(tmp_path: Path) -> None:
    cfg = config(tmp_path, "saved", "checkpoint.every=2", "checkpoint.asynchronous=true")
    said = run_distributed(save_beside_training, 2, cfg, device=DEVICE, timeout=120)
    assert said == [(DEVICE == "cuda", True, True)] * 2


def train_with_a_slow_gpu(cfg: Config) -> None:
    trainer = Trainer(cfg, device())
    trainer.start()
    if dist.get_rank() == 1:
        nap = (lambda *_: torch.cuda._sleep(200_000_000)) if DEVICE == "cuda" else lambda *_: time.sleep(0.1)
        trainer.model.model.layers[0].register_forward_hook(nap)  # on the device alone: the host runs ahead
    fit(trainer)


def test_a_gpu_that_is_slow_is_named(tmp_path: Path) -> None:
    cfg = config(tmp_path, "slow", "logging.load_every=1", "checkpoint.every=null")
    run_distributed(train_with_a_slow_gpu, 2, cfg, device=DEVICE, timeout=120)
    told = [line for line in read_metrics(tmp_path / "slow" / "metrics.jsonl") if "slowest_rank" in line]
    assert [(line["step"], line["slowest_rank"]) for line in told] == [(4, 1), (5, 1), (6, 1)]
    assert all(line["slowest_over_median"] > 1.2 and line["slowest_data_share"] < 0.5 for line in told)
