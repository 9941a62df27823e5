"""One collective broken by hand at a time: the comparison with one process must notice each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Replicate

from moe_trainer.config.choices import Dispatch
from moe_trainer.config.schema import ParallelConfig
from moe_trainer.models.moe import Experts
from moe_trainer.parallel import clip, collectives, styles
from moe_trainer.parallel.styles import STYLES, LeafStyle, ModuleStyle
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train import loss
from tests.distributed.reference import Case, Outcome, assert_same, train_parallel, train_plain

Patch = Callable[[pytest.MonkeyPatch], None]

TP = ParallelConfig(fsdp=1, tp=2, ep=1)
SP = ParallelConfig(fsdp=1, tp=2, ep=1, sequence_parallel=True)
TP_EP = ParallelConfig(fsdp=1, tp=2, ep=2, expert_parallel=True)
SP_EP = ParallelConfig(fsdp=1, tp=2, ep=2, sequence_parallel=True, expert_parallel=True)
ALL_TO_ALL = replace(SP_EP, dispatch=Dispatch.all_to_all)
FSDP = ParallelConfig(fsdp=2, tp=1, ep=1, sequence_parallel=True, expert_parallel=True)


@dataclass(frozen=True)
class Mutation:
    """What is broken, and the mesh on which it shows."""

    parallel: ParallelConfig
    patch: Patch


def _nothing(patch: pytest.MonkeyPatch) -> None:
    pass


def _backward(function: Any, backward: Callable[..., Any]) -> Patch:
    return lambda patch: patch.setattr(function, "backward", staticmethod(backward))


def _style(name: str, style: LeafStyle | ModuleStyle) -> Patch:
    return lambda patch: patch.setitem(STYLES, name, style)


def _own_slice(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return grad.split(ctx.sizes, ctx.dim)[ctx.group.rank()], None, None, None


def _zero_elsewhere(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    parts = [grad.new_zeros(*grad.shape[: ctx.dim], size, *grad.shape[ctx.dim + 1 :]) for size in ctx.sizes]
    parts[ctx.group.rank()] = grad
    return torch.cat(parts, ctx.dim), None, None, None


def _average_experts(patch: pytest.MonkeyPatch) -> None:
    set_factor = FSDPModule.set_gradient_divide_factor
    patch.setattr(
        FSDPModule,
        "set_gradient_divide_factor",
        lambda self, factor: set_factor(self, 2.0 if isinstance(self, Experts) else factor),
    )


def _swap_weights(function: str) -> Patch:
    run = getattr(styles, function)
    return lambda patch: patch.setattr(
        styles, function, lambda compute, x, index, weights, *rest: run(compute, x, index, weights.flip(-1), *rest)
    )


MUTATIONS = {
    "nothing": Mutation(SP_EP, _nothing),
    "nothing in all-to-all": Mutation(ALL_TO_ALL, _nothing),
    "copy_to_group does not sum gradients": Mutation(
        TP, _backward(collectives._CopyToGroup, lambda ctx, grad: (grad, None))
    ),
    "attention's input gradient is not summed": Mutation(
        TP, _style("replicate_input", ModuleStyle(lambda module, context: module.forward))
    ),
    "all_gather's backward is a slice": Mutation(SP, _backward(collectives._AllGather, _own_slice)),
    "reduce_scatter's backward stays local": Mutation(SP, _backward(collectives._ReduceScatter, _zero_elsewhere)),
    "router weights are not summed over ep": Mutation(
        TP_EP, _style("ep_router", ModuleStyle(lambda module, context: module.forward, axis="ep"))
    ),
    "router gradient is not summed over tp": Mutation(SP_EP, _style("replicated_weight", LeafStyle(Replicate()))),
    "norm gradient is not summed over tp": Mutation(SP_EP, _style("sequence_parallel", LeafStyle(Replicate()))),
    "all-gather swaps the weights": Mutation(SP_EP, _swap_weights("gathered_experts")),
    "all-to-all swaps the weights": Mutation(ALL_TO_ALL, _swap_weights("exchanged_experts")),
    "aux loss is not summed over tp": Mutation(
        SP_EP, lambda patch: patch.setattr(loss, "all_reduce", lambda x, group: x)
    ),
    "expert gradients are averaged": Mutation(FSDP, _average_experts),
    "clipping counts replicas twice": Mutation(TP, lambda patch: patch.setattr(clip, "_copies", lambda parameter: 1)),
}


def train_broken(names: list[str]) -> list[Outcome | str | None]:
    """Each mutation's outcome, or what the ranks noticed themselves."""
    outcomes: list[Outcome | str | None] = []
    for name in names:
        mutation = MUTATIONS[name]
        with pytest.MonkeyPatch.context() as patch:
            mutation.patch(patch)
            try:
                outcomes.append(train_parallel(Case(mutation.parallel, torch.float64, micro_batch_size=4)))
            except AssertionError as error:
                outcomes.append(str(error))
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome | str | None]:
    names = list(MUTATIONS)
    return dict(zip(names, run_distributed(train_broken, 2, names, timeout=120)[0], strict=True))


@pytest.fixture(scope="module")
def plain() -> Outcome:
    return train_plain(Case(TP, torch.float64, micro_batch_size=4))


@pytest.mark.parametrize("name", MUTATIONS)
def test_comparison_notices(name: str, outcomes: dict[str, Outcome | str | None], plain: Outcome) -> None:
    outcome = outcomes[name]
    if name.startswith("nothing"):
        assert_same(outcome, plain, 1e-9)
    elif isinstance(outcome, str):
        assert outcome.endswith(": ranks hold different values of the same part")
    else:
        with pytest.raises(AssertionError, match="differ"):
            assert_same(outcome, plain, 1e-9)
