"""Whole training runs, small and quiet: the meshes that they are taken on, their config, and what comes of them."""

import io
import subprocess
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_trainer.config.choices import DeviceName, DType
from moe_trainer.config.schema import Config, DataConfig, ModelConfig
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.train.trainer import Trainer
from tests.distributed.reference import mesh

MESHES = {
    "one": mesh("tp"),
    "fsdp2": mesh("tp", fsdp=2),
    "sp2": mesh("sp", tp=2),
    "tp2": mesh("sp_ep", tp=2),
    "fsdp2_tp2": mesh("sp_ep", fsdp=2, tp=2),
    "tp4": mesh("sp_ep", tp=4),
    "hsdp2x2": mesh("tp", dp_replicate=2, fsdp=2),
}


def run_config(folder: Path, name: str, mesh: str, steps: int, **nodes: Any) -> Config:
    """The run `folder/name` on one of `MESHES`: in float64, which shows what a mesh changes, where `nodes`, the
    config's own by name, do not say otherwise."""
    cfg = Config(
        run_name=name,
        run_dir=str(folder),
        steps=steps,
        device=DeviceName.cpu,
        dtype=DType.float64,
        model=ModelConfig(hidden_size=32, intermediate_size=32, num_layers=1, head_dim=8, num_experts=4),
        parallel=replace(MESHES[mesh]),
        data=DataConfig(text="one for the kettle, two for the long road home", seq_len=9, global_batch_size=4),
    )
    return replace(cfg, **nodes)


def fit(trainer: Trainer) -> None:
    """Train to the end with nothing on the console."""
    with redirect_stdout(io.StringIO()):
        trainer.fit()


def train(cfg: Config) -> Trainer:
    """A run from its start, or from where it goes on, to its end."""
    trainer = Trainer(cfg, torch.device("cpu"))
    trainer.start()
    fit(trainer)
    return trainer


def train_each(cfgs: list[Config]) -> None:
    """One after the other in one start of the ranks."""
    for cfg in cfgs:
        train(cfg)


def figures(run: Path, name: str = "loss") -> list[float]:
    """One figure of the metrics of a run's folder, in the order of its lines."""
    return [line[name] for line in read_metrics(run / "metrics.jsonl") if name in line]


def wait_for_steps(command: subprocess.Popen[str], run: Path, steps: int) -> None:
    """Until the run that a command has begun has taken so many."""
    deadline = time.monotonic() + 300
    while True:
        has_ended = command.poll() is not None
        if (run / "metrics.jsonl").exists() and len(figures(run)) >= steps:
            return
        assert not has_ended, command.communicate()
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.05)
