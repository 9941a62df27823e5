"""Every family under every plan gives the losses, gradients and weights of one plain process.

The meshes of `test_parity` are for Mixtral; here are those on which the families differ: heads and key heads that are
split, shared or normed together, dense layers and shared experts beside sparse ones, tied embeddings, biases.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from moe_trainer.config.schema import Family, ModelConfig, ParallelConfig, RopeConfig, RopeType
from moe_trainer.config.shape import check_divisions
from moe_trainer.testing.pool import run_distributed
from tests.distributed.reference import (
    GLOBAL_BATCH,
    MODEL,
    STEPS,
    Case,
    Outcome,
    assert_same,
    batches,
    train_parallel,
    train_plain,
)
from tests.distributed.test_parity import PLANS, describe, mesh

TOLERANCE = 1e-9
MODELS = {
    "mixtral": replace(
        MODEL,
        num_kv_heads=2,
        sliding_window=4,
        tie_word_embeddings=True,
        rope=RopeConfig(1e4, RopeType.yarn, 4.0, 16),
    ),
    "qwen3_moe": replace(
        MODEL,
        family=Family.qwen3_moe,
        num_layers=3,
        num_kv_heads=2,
        dense_layers=[1],
        dense_intermediate_size=24,
        norm_topk_prob=False,
        attention_bias=True,
    ),
    "qwen3_moe tied": replace(
        MODEL, family=Family.qwen3_moe, num_kv_heads=1, tie_word_embeddings=True, sliding_window=4
    ),
    "olmoe": replace(MODEL, family=Family.olmoe, head_dim=4, norm_topk_prob=False, clip_qkv=0.8, attention_bias=True),
    "olmoe tied": replace(MODEL, family=Family.olmoe, head_dim=4, tie_word_embeddings=True),
}

MESHES = {
    2: [mesh(plan, tp=2) for plan in PLANS] + [mesh("sp_ep", fsdp=2, ep=2)],
    4: [mesh(plan, tp=4) for plan in PLANS]
    + [mesh(plan, fsdp=2, tp=2) for plan in PLANS]
    + [mesh("sp_ep", fsdp=2, tp=2, ep=4), mesh("sp_ep", fsdp=4, ep=2), mesh("tp", dp_replicate=2, fsdp=2)],
}


def case(model: ModelConfig, parallel: ParallelConfig) -> Case:
    check_divisions(model, parallel)
    return Case(parallel, torch.float64, model, micro_batch_size=micro_batch_size(parallel))


def micro_batch_size(parallel: ParallelConfig) -> int:
    """Two micro-batches a step on every rank."""
    return GLOBAL_BATCH // 2 // (parallel.dp_replicate * parallel.fsdp)


@cache
def plain_outcome(name: str, size: int) -> Outcome:
    return train_plain(Case(mesh("tp"), torch.float64, MODELS[name], micro_batch_size=size))


def train_all(cases: list[Case]) -> list[Outcome | None]:
    return [train_parallel(one) for one in cases]


@pytest.mark.parametrize("world", [pytest.param(w, marks=pytest.mark.grid) if w > 2 else w for w in MESHES])
@pytest.mark.parametrize("name", MODELS)
def test_every_plan_in_float64(name: str, world: int) -> None:
    cases = [case(MODELS[name], parallel) for parallel in MESHES[world]]
    outcomes = run_distributed(train_all, world, cases, timeout=200)[0]
    failures = []
    for one, outcome in zip(cases, outcomes, strict=True):
        try:
            assert_same(outcome, plain_outcome(name, one.micro_batch_size), TOLERANCE)
        except AssertionError as error:
            parallel = one.parallel
            flags = f"sp={parallel.sequence_parallel} ep={parallel.expert_parallel}"
            failures.append(f"{describe(parallel)} {flags}: {error}")
    assert not failures, "\n".join(failures)


def test_the_models_have_what_they_are_for() -> None:
    """Each parameter gets a gradient in the reference, so that a missing one shows; windows and clips take effect."""
    for name, model in MODELS.items():
        outcome = plain_outcome(name, 4)
        assert len(outcome.loss) == STEPS
        zero = [parameter for parameter, gradient in outcome.gradients.items() if not gradient.any()]
        assert not zero, f"{name}: {zero}"
        assert outcome.expert_counts.shape == (model.num_layers - len(model.dense_layers), model.num_experts)
        assert ("lm_head.weight" in outcome.weights) is not model.tie_word_embeddings
    ids, _ = batches(MODEL, 9)[0]
    assert ids.shape[1] > MODELS["mixtral"].sliding_window
