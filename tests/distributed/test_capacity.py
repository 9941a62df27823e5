"""With a capacity factor every mesh drops the same choices, which then add nothing, in training alone."""

from dataclasses import replace

import pytest
import torch

from moe_trainer.config.choices import Dispatch, Recompute
from moe_trainer.config.schema import ParallelConfig
from moe_trainer.models.decoder import CausalLM
from tests.distributed.reference import MODEL, PLANS, Case, batches, check, mesh, plain_model, plain_outcome
from tests.distributed.test_families import MODELS

TIGHT = replace(MODEL, capacity_factor=0.8)


def case(parallel: ParallelConfig, family: str | None = None, **options: object) -> Case:
    model = TIGHT if family is None else replace(MODELS[family], capacity_factor=0.8)
    return Case.accumulating(parallel, torch.float64, model, steps=2, **options)


def test_every_plan_drops_the_same() -> None:
    meshes = [mesh(plan, tp=2) for plan in PLANS]
    meshes += [mesh("sp_ep", fsdp=2, ep=2), replace(mesh("sp_ep", tp=2), dispatch=Dispatch.all_to_all)]
    # Micro-batches of the same size, since a capacity is a share of one.
    cases = [replace(case(parallel), micro_batch_size=2) for parallel in meshes]
    check([*cases, replace(cases[3], recompute=Recompute.full)], 2)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_other_families(family: str) -> None:
    meshes = [mesh("sp", tp=2), replace(mesh("sp_ep", tp=2), dispatch=Dispatch.all_to_all)]
    check([replace(case(parallel, family), micro_batch_size=2) for parallel in meshes], 2)


def test_folded_experts() -> None:
    exchanged = replace(mesh("sp_ep", fsdp=2, tp=2, ep=4), dispatch=Dispatch.all_to_all)
    check([replace(case(parallel), micro_batch_size=2) for parallel in (exchanged, mesh("sp", tp=4))], 4)


def model_with(factor: float | None) -> tuple[CausalLM, torch.Tensor]:
    model = plain_model(replace(Case(mesh("tp"), torch.float64), model=replace(MODEL, capacity_factor=factor)))
    return model, batches(MODEL, 9)[0][0]


def test_it_changes_training_alone_and_nothing_where_there_is_room() -> None:
    found = {}
    for factor in (None, 0.8, 8.0):
        model, ids = model_with(factor)
        found[factor] = model(ids).logits
        with torch.no_grad():
            assert torch.equal(model(ids).logits, found[None])
    assert torch.equal(found[8.0], found[None])
    assert (found[0.8] - found[None]).norm() > 1e-2 * found[None].norm()
    assert (
        plain_outcome(replace(case(mesh("tp")), micro_batch_size=2)).loss
        != plain_outcome(
            replace(Case.accumulating(mesh("tp"), torch.float64, MODEL, steps=2), micro_batch_size=2)
        ).loss
    )
