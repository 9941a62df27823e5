"""The four plans on every small mesh give the losses, gradients and weights of one plain process."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moe_trainer.config.choices import AuxScope
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ParallelConfig
from moe_trainer.kernels.grouped_gemm import grouped_gemm_supported
from moe_trainer.models.router import Router, Routing
from moe_trainer.testing.pool import run_distributed
from tests.distributed.reference import (
    GLOBAL_BATCH,
    MAX_NORM,
    MODEL,
    PLANS,
    SEQ,
    SILENT_EXPERT,
    STEPS,
    TOLERANCE,
    Case,
    assert_same,
    batches,
    check,
    mesh,
    plain_outcome,
    sharded_model,
    train_plain,
)

# More FSDP ranks than experts of a rank: their hidden dim is sharded. Three experts over two ranks: uneven shards.
MODELS = {8: MODEL, 3: replace(MODEL, num_experts=3), 2: replace(MODEL, num_experts=2, top_k=1)}


def legal_meshes(plan: str, world: int) -> list[ParallelConfig]:
    """Every mesh of `world` ranks that the config allows for a plan."""
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    found = []
    for dp_replicate in sizes:
        for fsdp in sizes:
            for tp in sizes:
                for ep in sizes if PLANS[plan][1] else [None]:
                    if dp_replicate * fsdp * tp == world:
                        try:
                            found.append(mesh(plan, dp_replicate, fsdp, tp, ep))
                        except ConfigError:
                            continue
    return found


def case(parallel: ParallelConfig, dtype: torch.dtype, num_experts: int = MODEL.num_experts) -> Case:
    return Case.accumulating(parallel, dtype, MODELS[num_experts])


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("plan", PLANS)
def test_every_mesh_in_float64(plan: str, world: int) -> None:
    check([case(parallel, torch.float64) for parallel in legal_meshes(plan, world)], world)


def test_balance_of_each_sequence_in_float64() -> None:
    meshes = [mesh("sp_ep", tp=2), mesh("sp_ep", fsdp=2, ep=2), mesh("tp", dp_replicate=2)]
    check([replace(case(parallel, torch.float64), aux_scope=AuxScope.sequence) for parallel in meshes], 2)


def test_balance_of_each_sequence_does_not_depend_on_the_micro_batches() -> None:
    for scope, is_same in ((AuxScope.sequence, True), (AuxScope.micro_batch, False)):
        first, second = (
            plain_outcome(Case(mesh("tp"), torch.float64, micro_batch_size=size, aux_scope=scope)) for size in (1, 4)
        )
        assert (first.aux_loss == pytest.approx(second.aux_loss, rel=1e-9)) is is_same
        if is_same:
            assert_same(first, second, TOLERANCE[torch.float64])


EIGHT_RANKS = [
    mesh("sp_ep", fsdp=2, tp=4, ep=4),
    mesh("sp_ep", fsdp=2, tp=4, ep=8),
    mesh("sp_ep", fsdp=4, tp=2, ep=4),
    mesh("sp_ep", dp_replicate=2, fsdp=2, tp=2),
]


def test_eight_ranks_in_float64() -> None:
    check([case(parallel, torch.float64) for parallel in EIGHT_RANKS], 8)


HIDDEN_SHARDED = [
    case(mesh("tp", fsdp=4), torch.float64, num_experts=3),
    case(mesh("tp_ep", fsdp=2, tp=2), torch.float64, num_experts=2),
    case(mesh("sp_ep", fsdp=2, tp=2), torch.float64, num_experts=2),
    case(mesh("sp_ep", fsdp=4), torch.float64, num_experts=2),
]
UNEVENLY_SHARDED = [case(mesh(plan, fsdp=2, tp=2), torch.float64, num_experts=3) for plan in ("tp", "sp")]


def test_fewer_experts_than_ranks_in_float64() -> None:
    check(HIDDEN_SHARDED + UNEVENLY_SHARDED, 4)


def expert_shard_dims(cases: list[Case]) -> list[tuple[int, int]]:
    """The dims that FSDP shards of gate_up_proj and down_proj."""
    result = []
    for one in cases:
        model, _, meshes = sharded_model(one)
        experts = model.model.layers[0].mlp.experts
        axis = meshes.expert_data.ndim - 1
        result.append((experts.gate_up_proj.placements[axis].dim, experts.down_proj.placements[axis].dim))
    return result


def test_the_cases_shard_experts_as_they_say() -> None:
    dims = run_distributed(expert_shard_dims, 4, HIDDEN_SHARDED + UNEVENLY_SHARDED)[0]
    assert dims == [(3, 1)] * len(HIDDEN_SHARDED) + [(0, 0)] * len(UNEVENLY_SHARDED)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.grid)])
@pytest.mark.parametrize("plan", PLANS)
def test_float32_with_grouped_gemm(plan: str, world: int) -> None:
    meshes = legal_meshes(plan, world)
    for parallel in meshes:
        intermediate = MODEL.intermediate_size // (1 if PLANS[plan][1] else parallel.tp)
        assert grouped_gemm_supported(torch.float32, MODEL.hidden_size, intermediate)
    check([case(parallel, torch.float32) for parallel in meshes], world)


def test_float32_of_every_plan_on_four_ranks() -> None:
    """Both data axes, whole and folded experts; every other mesh of four ranks is of the grid."""
    meshes = [mesh(plan, fsdp=2, tp=2) for plan in PLANS]
    meshes += [mesh("sp_ep", tp=4), mesh("sp_ep", fsdp=2, tp=2, ep=4), mesh("tp", dp_replicate=2, fsdp=2)]
    check([case(parallel, torch.float32) for parallel in meshes], 4)


def test_float32_reference_runs_grouped_gemm_and_has_no_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Router logits of the last expert chosen and the first not are apart by far more than float32 rounds, so all
    meshes choose the same experts: the comparison needs that, since another choice is another function."""
    calls, gaps = [], []
    grouped_mm, compute = F.grouped_mm, Router.compute

    def count(*args: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return grouped_mm(*args, **options)

    def measure(self: Router, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Routing:
        routing = compute(self, x, weight, bias)
        ordered = routing.logits.sort(descending=True).values
        gaps.append((ordered[:, MODEL.top_k - 1] - ordered[:, MODEL.top_k]).min().item())
        return routing

    monkeypatch.setattr(F, "grouped_mm", count)
    monkeypatch.setattr(Router, "compute", measure)
    for micro_batch_size in (1, 2, 4):
        calls.clear()
        train_plain(Case(mesh("tp"), torch.float32, micro_batch_size=micro_batch_size))
        # Each layer of each micro-batch: two products forward, four backward.
        assert len(calls) == 6 * MODEL.num_layers * GLOBAL_BATCH // micro_batch_size * STEPS
    assert min(gaps) > 1e-4


def test_the_reference_is_uneven() -> None:
    """What makes the comparison hard: checked, not hoped for."""
    outcome = plain_outcome(Case(mesh("tp"), torch.float64))
    counts = outcome.expert_counts[0]  # [layers, num_experts]
    assert (counts.amax(1) > 2 * counts.mean(1)).all()
    assert counts[0, SILENT_EXPERT] == 0
    for name in ("gate_up_proj", "down_proj"):  # no token at all, not even one without a label
        gradient = outcome.gradients[f"model.layers.0.mlp.experts.{name}"]
        assert not gradient[SILENT_EXPERT].any() and gradient.any()
    assert SEQ % 2 and -(-SEQ // 4) * 3 >= SEQ  # over 4 ranks the last has no position
    for _, labels in batches(MODEL, SEQ):
        missing = (labels == -100).sum(1)
        assert SEQ in missing and 0 in missing and ((missing > 0) & (missing < SEQ)).any()
    assert all(norm > MAX_NORM for norm in outcome.grad_norm), "clipping must change the gradients"
    assert all(aux > 1.1 for aux in outcome.aux_loss), "1 is perfect balance"
    assert all(gradient.any() for gradient in outcome.gradients.values())
