"""A rank that is slower than the others is named, though every rank's step takes equally long."""

import io
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_trainer.config.schema import Config
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.parallel.waits import CollectiveWaits
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.trainer import Trainer

MESHES = {"fsdp2": ["parallel.fsdp=2", "parallel.tp=1"], "sp_ep": ["parallel.fsdp=1", "parallel.tp=2"]}
NAP = 0.15


def config(folder: Path, name: str, mesh: str) -> Config:
    run = [f"run_dir={folder}", f"run_name={name}", "steps=6", "device=cpu", "checkpoint.every=null"]
    seen = ["logging.load_every=1", "data.global_batch_size=4", "data.micro_batch_size=2"]
    small = ["model.num_layers=1", "model.hidden_size=16", "model.intermediate_size=16", "data.text=one two three"]
    return validate(compose("train", ["+recipe=mixtral_sp_ep", *run, *seen, *small, *MESHES[mesh]]), 2, 0)


def train(cfg: Config, slow: str) -> str:
    """Rank 1 sleeps in each step, for its data or in a layer; what the console said."""
    trainer = Trainer(cfg, torch.device("cpu"))
    trainer.start()
    if dist.get_rank() == 1 and slow == "data":
        deal = trainer.loader._deal
        trainer.loader._deal = lambda position: time.sleep(4 * NAP) or deal(position)
    if dist.get_rank() == 1 and slow == "layer":
        trainer.model.model.layers[0].register_forward_hook(lambda *_: time.sleep(NAP))
    with redirect_stdout(io.StringIO()) as console:
        trainer.fit()
    return console.getvalue()


def train_all(runs: list[tuple[Config, str]]) -> list[str]:
    return [train(*run) for run in runs]


def test_a_rank_that_sleeps_is_named(tmp_path: Path) -> None:
    kinds = [("fsdp2", "data"), ("sp_ep", "layer")]
    runs = [(config(tmp_path, f"{mesh}_{slow}", mesh), slow) for mesh, slow in kinds]
    said = run_distributed(train_all, 2, runs)
    for (cfg, slow), console, silent in zip(runs, *said, strict=True):
        lines = [line for line in read_metrics(tmp_path / cfg.run_name / "metrics.jsonl") if "slowest_rank" in line]
        assert [line["step"] for line in lines] == [4, 5, 6]  # the first step warms up; two steps later it is told
        lines = lines[1:]  # the data of the second were dealt in the long first
        assert [line["slowest_rank"] for line in lines] == [1, 1], cfg.run_name
        assert all(line["slowest_over_median"] > 1.2 for line in lines), cfg.run_name
        assert all((line["slowest_data_share"] > 0.5) == (slow == "data") for line in lines), cfg.run_name
        last = console.splitlines()[-1]
        assert " rank 1 takes " in last and (" of it for data" in last) == (slow == "data") and silent == ""


def wait_for_the_other() -> tuple[float, float, bool]:
    real = dist.all_reduce
    with CollectiveWaits(torch.device("cpu")) as waits:
        assert dist.all_reduce is not real
        for late in range(3):
            time.sleep(NAP if late == dist.get_rank() else 0)
            dist.all_reduce(torch.ones(4))
        work = dist.all_reduce(torch.ones(4), async_op=True)
    work.wait()
    return *waits.seconds(), dist.all_reduce is real


def test_what_a_rank_waits_in_collectives() -> None:
    """Of three rounds each of three ranks is late in one: busy in it, and waiting in the two others."""
    for total, waited, is_put_back in run_distributed(wait_for_the_other, 3):
        assert 3 * NAP <= total and waited == pytest.approx(2 * NAP, abs=NAP / 2) and is_put_back
