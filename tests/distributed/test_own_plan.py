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


def build(plan: dict[str, str], is_tied: bool = False) -> tuple[str, list[str]]:
    """What the user is told, or the parameters that the plan split."""
    cfg = replace(MODEL, tie_word_embeddings=is_tied)
    try:
        model, _ = build_model(cfg, replace(TP, plan=plan), build_meshes(TP, "cpu"), torch.float32)
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
        (
            {
                "model.layers.*.self_attn": None,
                "model.*.0.self_attn": "gather_input",
                "*.layers.*.self_attn": "replicate_input",
            },
            "two rules claim model.layers.0.self_attn: ",
        ),
        ({"model.layers.*.mlp.experts": "moe_dispatch"}, "needs parallel.expert_parallel=true"),
    ],
)
def test_mistakes_are_named(change: dict[str, str | None], message: str) -> None:
    plan = {name: style for name, style in (PLANS.tp | change).items() if style is not None}
    for text, _ in run_distributed(build, 2, plan):
        assert message in text


def build_tied(plans: list[dict[str, str]]) -> list[str]:
    return [build(plan, is_tied=True)[0] for plan in plans]


def test_a_shared_weight_must_be_placed_alike_by_both_rules() -> None:
    split_otherwise = PLANS.tp | {"lm_head": "rowwise"}
    without_head = {name: style for name, style in PLANS.tp.items() if name != "lm_head"}
    alike, *others = run_distributed(build_tied, 2, [PLANS.tp, split_otherwise, without_head])[0]
    assert alike == ""
    for text, head in zip(others, ("Shard(dim=1)", "None"), strict=True):
        assert "two rules claim model.embed_tokens.weight" in text
        assert f"for model.embed_tokens places it as Shard(dim=0), that for lm_head as {head}" in text
