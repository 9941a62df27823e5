"""Freezing, groups, offload and the guard against spikes: the same on every mesh, and kept by a checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_trainer.config.choices import OnSpike, Recompute
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import CheckpointConfig, Config, GroupConfig, ModelConfig, OptimConfig
from moe_trainer.config.validate import world_size_of
from moe_trainer.kernels.local_part import local_part
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.testing.compare import assert_close_by_part, full_tensors
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train import trainer as module
from moe_trainer.train.trainer import Trainer
from tests.distributed.runs import fit, run_config

FROZEN = ["model.layers.*.mlp.gate", "model.layers.*.mlp.experts", "model.norm"]
GROUPS = [GroupConfig("model.layers.*.self_attn", 0.1, 0.5)]


def config(folder: Path, mesh: str, steps: int, run: str = "run", **optim: Any) -> Config:
    return run_config(
        folder,
        run,
        mesh,
        steps,
        model=ModelConfig(
            hidden_size=32, intermediate_size=32, num_layers=2, head_dim=8, num_experts=4, initializer_range=0.2
        ),
        optim=OptimConfig(lr=1e-2, schedule_steps=10, eps=1e-4, **optim),
        checkpoint=CheckpointConfig(resume="auto"),
    )


def train(cfg: Config) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All weights and moments after the start and at the end, whole, on the first rank."""
    trainer = Trainer(cfg, torch.device("cpu"))
    trainer.start()
    before = full_tensors(trainer._tensors())
    fit(trainer)
    return before, full_tensors(trainer._tensors())


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return run_distributed(train, 1, config(tmp_path_factory.mktemp("one"), "one", 3, freeze=FROZEN, groups=GROUPS))[
        0
    ]


def is_frozen(name: str) -> bool:
    return ".mlp." in name or name.endswith("model.norm.weight")


@pytest.mark.parametrize("mesh", ["fsdp2", "tp2", "sp2"])
def test_freezing_and_groups_on_every_mesh(mesh: str, expected: Any, tmp_path: Path) -> None:
    cfg = replace(config(tmp_path, mesh, 3, freeze=FROZEN, groups=GROUPS), recompute=Recompute.selective)
    before, after = run_distributed(train, 2, cfg)[0]
    for name, value in after.items():
        assert not (is_frozen(name) and name.startswith("optim.")), name
        assert torch.equal(value, before[name]) == is_frozen(name), name
    assert_close_by_part(after, expected[1], 1e-9)


def test_the_group_moves_less(expected: Any, tmp_path: Path) -> None:
    _, free = run_distributed(train, 1, config(tmp_path, "one", 3, freeze=FROZEN))[0]
    before, grouped = expected
    name = "model.model.layers.0.self_attn.q_proj.weight"
    assert (grouped[name] - before[name]).norm() < 0.3 * (free[name] - before[name]).norm()


def test_a_checkpoint_goes_on_frozen_and_thawed_again(tmp_path: Path) -> None:
    whole = run_distributed(train, 1, config(tmp_path, "one", 2))[0][1]
    before, after = run_distributed(train, 2, config(tmp_path, "tp2", 4, freeze=FROZEN))[0]
    assert all(torch.equal(before[name], whole[name]) for name in before)
    assert {name for name in whole if name not in before} == {
        name for name in whole if name.startswith("optim.") and is_frozen(name)
    }
    thawed, moved = run_distributed(train, 2, config(tmp_path, "fsdp2", 6))[0]
    for name, value in thawed.items():
        if name in after:
            assert torch.equal(value, after[name]), name
        else:
            assert not value.any() and moved[name].any(), name
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_what_was_thawed_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Its moments are younger than those of the rest, and bias correction knows by how much."""
    run_distributed(train, 1, config(tmp_path, "one", 3, "frozen", freeze=FROZEN))
    frozen = CheckpointConfig(resume=str(tmp_path / "frozen"))
    whole = run_distributed(train, 1, replace(config(tmp_path, "one", 7, "whole"), checkpoint=frozen))[0][1]
    run_distributed(train, 1, replace(config(tmp_path, "one", 5, "halves"), checkpoint=frozen))
    halves = run_distributed(train, 1, config(tmp_path, "one", 7, "halves"))[0][1]
    assert [name for name, value in whole.items() if not torch.equal(value, halves[name])] == []
    assert {line["skipped_steps"] for line in read_metrics(tmp_path / "halves" / "metrics.jsonl")} == {0}


@pytest.mark.parametrize("mesh", ["fsdp2", "tp2"])
def test_offloaded_moments_train_and_resume_bit_for_bit(mesh: str, tmp_path: Path) -> None:
    plain = run_distributed(train, 2, config(tmp_path, mesh, 4, "plain"))[0][1]
    run_distributed(train, 2, config(tmp_path, mesh, 2, "offloaded", offload=True))
    resumed = run_distributed(train, 2, config(tmp_path, mesh, 4, "offloaded", offload=True))[0][1]
    assert plain.keys() == resumed.keys() and all(torch.equal(plain[name], resumed[name]) for name in plain)


def jumpy(cfg: Config, jumps: dict[int, float]) -> list[torch.Tensor]:
    """This rank's parts at the end, where the gradients of some steps are far larger than they are."""
    trainer = Trainer(cfg, torch.device("cpu"))
    trainer.start()
    real = module.grad_norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "grad_norm", lambda parameters: real(parameters) * jumps.get(trainer.state.step, 1.0))
        patch.setattr("moe_trainer.optim.spikes._WARMUP", 4)
        fit(trainer)
    return [local_part(tensor).clone() for tensor in trainer._tensors().values()]


@pytest.mark.parametrize("action", OnSpike)
def test_spikes_are_counted_and_a_resumed_run_is_the_uninterrupted_one(action: OnSpike, tmp_path: Path) -> None:
    jumps = {5: 100.0, 8: 50.0}
    optim = {"max_grad_zscore": 6.0, "on_spike": action}
    whole = run_distributed(jumpy, 2, config(tmp_path, "tp2", 10, "whole", **optim), jumps)
    run_distributed(jumpy, 2, config(tmp_path, "tp2", 7, "halves", **optim), jumps)
    halves = run_distributed(jumpy, 2, config(tmp_path, "tp2", 10, "halves", **optim), jumps)
    for ours, theirs in zip(whole, halves, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    lines = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "halves")]
    for name in ("loss", "grad_norm", "skipped_steps", "grad_spikes"):
        assert [line[name] for line in lines[0]] == [line[name] for line in lines[1]]
    counted = [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert [line["grad_spikes"] for line in lines[0]] == counted
    assert [line["skipped_steps"] for line in lines[0]] == (counted if action is OnSpike.skip else [0] * 10)


def hopeless(cfg: Config) -> str:
    try:
        jumpy(cfg, dict.fromkeys(range(2, 100), float("nan")))
    except ConfigError as error:
        return str(error)
    return "no error"


def test_a_run_that_no_longer_learns_ends(tmp_path: Path) -> None:
    cfg = config(tmp_path, "tp2", 100, max_skipped_steps=3)
    for said in run_distributed(hopeless, 2, cfg):
        assert said.startswith(
            "optim.max_skipped_steps=3: by step 5, 3 steps in a row had gradients that are not fin"
        )
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert world_size_of(cfg.parallel) == 2
