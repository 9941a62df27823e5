"""A user's own plan on real meshes."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ParallelConfig
from moe_trainer.models.mixtral.plan import PLANS
from moe_trainer.parallel.apply import build_model
from moe_trainer.parallel.mesh import build_meshes
from moe_trainer.testing.pool import run_distributed
from tests.distributed.reference import MODEL

TP = ParallelConfig(fsdp=1, tp=2, ep=1)


def build(plan: dict[str, str]) -> tuple[str, list[str]]:
    """What the user is told, or the parameters that the plan split."""
    try:
        model, _ = build_model(MODEL, replace(TP, plan=plan), build_meshes(TP, "cpu"), torch.float32)
    except ConfigError as error:
        return str(error), []
    split = [name for name, p in model.named_parameters() if isinstance(p, DTensor) and p.placements == (Shard(2),)]
    return "", split


def test_it_replaces_the_models_plan_whole() -> None:
    """Attention, which it does not name, is not taken from the model's."""
    plan = {name: style for name, style in PLANS.tp.items() if "self_attn" not in name}
    assert run_distributed(build, 2, plan)[0] == (
        "",
        [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.7.mlp": "replicate_input"}, "model.layers.7.mlp matches no module or parameter"),
        ({"lm_head": "vocab_head"}, "parallel.plan: lm_head names style vocab_head"),
        ({"model.layers.*.mlp.experts": None}, "no rule for model.layers.0.mlp.experts:"),
        ({"model.layers.*.mlp.experts.down_proj": None}, "no rule for model.layers.0.mlp.experts.down_proj:"),
        ({"model.layers.*.mlp.experts": "moe_dispatch"}, "needs parallel.expert_parallel=true"),
    ],
)
def test_mistakes_are_named(change: dict[str, str | None], message: str) -> None:
    plan = {name: style for name, style in (PLANS.tp | change).items() if style is not None}
    for text, _ in run_distributed(build, 2, plan):
        assert message in text
