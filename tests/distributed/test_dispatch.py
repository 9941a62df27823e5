"""Dispatch loses no pair, survives ranks without tokens, and keeps the sequence split outside attention."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_trainer.config.choices import Dispatch
from moe_trainer.config.schema import ParallelConfig
from moe_trainer.kernels.experts import Exchange, exchanged
from moe_trainer.kernels.permute import Routes
from moe_trainer.models.attention import Attention
from moe_trainer.models.decoder import DecoderLayer
from moe_trainer.models.moe import Experts, SparseMoeBlock
from moe_trainer.models.norm import RMSNorm
from moe_trainer.models.router import Router
from moe_trainer.parallel.dispatch import exchanged_experts, gathered_experts
from moe_trainer.testing.pool import run_distributed
from tests.distributed.reference import MODEL, SEQ, Case, batches, sharded_model

HIDDEN = 3
# Of each rank: the experts (two on a rank) that its tokens go to.
CHOSEN = {
    "usual": [[[0, 3], [5, 1], [2, 4]], [[4, 0]], [[3, 2], [1, 5]]],
    "a rank without tokens, a rank without pairs": [[[0, 4], [5, 1]], [[1, 0]], []],
    "one rank gets everything": [[[4, 5]], [[5, 4], [4, 5]], [[4, 5]]],
    "no token anywhere": [[], [], []],
}


def check_round_trip(chosen: list[list[list[int]]], gather: bool) -> int:
    """Expert e multiplies by e + 1: the result and both gradients are known."""
    rank, group = dist.get_rank(), dist.group.WORLD
    index = torch.tensor(chosen[rank], dtype=torch.int64).view(-1, 2)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(len(index), HIDDEN, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.rand(len(index), 2, dtype=torch.float64, generator=generator).requires_grad_()
    grad = torch.randn(len(index), HIDDEN, dtype=torch.float64, generator=generator)

    seen = []

    def compute(x: torch.Tensor, local: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        here = local < 2
        seen.append(int(here.sum()))
        counts = [sum(row.count(2 * rank + e) for tokens in chosen for row in tokens) for e in range(2)]
        assert [int((local == e).sum()) for e in range(2)] == counts
        return x * (weights * here * (2 * rank + local + 1)).sum(1, keepdim=True)

    def compute_all(x: torch.Tensor, routes: Routes, weights: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        rows = torch.arange(len(routes.order))
        assert len(rows) == routes.offsets[-1]  # no memory for pairs of other ranks
        local = torch.full((len(routes.inverse),), 2)
        local[routes.order] = torch.bucketize(rows, routes.offsets, right=True)
        return compute(exchanged(x, exchange), local.view(-1, 2), weights)

    if gather:
        sizes = [len(tokens) for tokens in chosen]
        out = gathered_experts(compute_all, x, index, weights, 6, sizes, group)
    else:
        out = exchanged_experts(compute, x, index, weights, 6, group)
    out.backward(grad)

    scale = (weights.detach() * (index + 1)).sum(1, keepdim=True)
    torch.testing.assert_close(out, x.detach() * scale)
    torch.testing.assert_close(x.grad, grad * scale)
    torch.testing.assert_close(weights.grad, (grad * x.detach()).sum(1, keepdim=True) * (index + 1))
    return seen[0]


@pytest.mark.parametrize("gather", (False, True), ids=("all_to_all", "all_gather"))
@pytest.mark.parametrize("name", CHOSEN)
def test_round_trip(name: str, gather: bool) -> None:
    received = run_distributed(check_round_trip, 3, CHOSEN[name], gather)
    assert sum(received) == sum(len(row) for tokens in CHOSEN[name] for row in tokens)


MESHES = [
    ParallelConfig(fsdp=1, tp=4, ep=4, sequence_parallel=True, expert_parallel=True, dispatch=dispatch)
    for dispatch in (Dispatch.all_to_all, Dispatch.all_gather)
] + [
    ParallelConfig(fsdp=2, tp=2, ep=4, sequence_parallel=True, expert_parallel=True, dispatch=dispatch)
    for dispatch in (Dispatch.all_to_all, Dispatch.all_gather)
]


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for the device: scalars read, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        blocking = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2")
        self.count += func._schema.name in blocking
        return func(*args, **(kwargs or {}))


def watch(model: nn.Module, rows: list[int], tokens: list[int]) -> None:
    """Note the rows that enter the experts, and how many hidden states each module outside attention takes and gives.

    A module's forward is watched from outside: what a style gathers for attention stays inside it.
    """

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [tensor for tensor in (*inputs, *outputs) if isinstance(tensor, torch.Tensor)]
        hidden = [tensor for tensor in tensors if tensor.shape[-1:] == (MODEL.hidden_size,)]
        assert hidden
        tokens.extend(t.numel() // MODEL.hidden_size for t in hidden)

    for module in model.modules():
        if isinstance(module, (Attention, DecoderLayer, Experts, Router, RMSNorm, SparseMoeBlock)):
            module.register_forward_hook(note)
        if isinstance(module, Experts):
            compute = module.compute_routes
            module.compute_routes = lambda x, routes, *rest, compute=compute, **weights: (
                rows.append(len(routes.order)),
                compute(x, routes, *rest, **weights),
            )[1]


def count_in_a_step(parallel: ParallelConfig) -> tuple[list[int], int, int, int]:
    """Rows of each layer's experts, most tokens of a module outside attention, host reads forward and backward."""
    case = Case(parallel, torch.float32)
    model, loss_fn, meshes = sharded_model(case)
    ids, labels = (tensor[2 * meshes.data_rank : 2 * meshes.data_rank + 2] for tensor in batches(MODEL, SEQ)[0])
    model(ids)  # FSDP prepares itself in its first forward
    rows: list[int] = []
    tokens: list[int] = []
    watch(model, rows, tokens)
    lists: list[int] = []
    tolist = torch.Tensor.tolist
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda self: (lists.append(1), tolist(self))[1])
        with HostReads() as forward:
            output = model(ids)
        forward_reads = forward.count + len(lists)
        lists.clear()
        with HostReads() as backward:
            loss_fn(output, labels, 18)[0].backward()
        return rows, max(tokens), forward_reads, backward.count + len(lists)


@pytest.mark.parametrize("parallel", MESHES, ids=lambda p: f"fsdp{p.fsdp}-tp{p.tp}-ep{p.ep}-{p.dispatch.value}")
def test_counts_in_a_step(parallel: ParallelConfig) -> None:
    results = run_distributed(count_in_a_step, 4, parallel)
    pairs = 2 * SEQ * parallel.fsdp * MODEL.top_k
    for layer in range(MODEL.num_layers):
        assert sum(rows[layer] for rows, *_ in results) == pairs  # none lost, none doubled
    assert min(rows[0] for rows, *_ in results) == 0 or parallel.fsdp > 1  # a rank whose experts nobody chose
    for rows, most_tokens, forward_reads, backward_reads in results:
        assert len(rows) == MODEL.num_layers
        assert most_tokens <= 2 * -(-SEQ // parallel.tp)
        assert forward_reads == MODEL.num_layers  # the split sizes, or how many pairs are ours
        assert backward_reads == 0
