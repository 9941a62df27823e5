"""Stable counting sort of pairs by expert (Knuth, vol. 3, 5.2): few keys, so no comparison and no radix passes."""

import torch
import triton
import triton.language as tl

from moe_trainer.kernels.gpu.sizes import ceil_div, next_power_of_2

_BLOCK, _PART = 512, 32


def sort(experts: torch.Tensor, num_experts: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The expert of each pair [pairs] -> order, inverse and offsets of `permute.Routes`.

    Experts before `first` and from `first + num_experts` on come last, in the pairs' order.
    """
    pairs, bins = len(experts), next_power_of_2(num_experts + 1)
    order, inverse = (torch.empty(pairs, dtype=torch.int64, device=experts.device) for _ in range(2))
    blocks = ceil_div(pairs, _BLOCK)
    make = torch.empty if pairs else torch.zeros
    counts = make(bins, max(blocks, 1), dtype=torch.int32, device=experts.device)
    if pairs:
        _count[(blocks,)](experts, counts, pairs, num_experts, first, bins, _BLOCK)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)  # by expert, then by block: the order of the result
    if pairs:
        _place[(blocks,)](
            experts, counts, ends, order, inverse, pairs, num_experts, first, _BLOCK, _PART, num_warps=8
        )
    return order, inverse, ends.view_as(counts)[:num_experts, -1].contiguous()


@triton.jit
def _local_expert(experts, at, pairs, num_experts, first):
    """The experts at these pairs, counted from the first that is here; `num_experts` for any elsewhere."""
    expert = tl.load(experts + at, mask=at < pairs, other=-1).to(tl.int32) - first
    return tl.where((expert >= 0) & (expert < num_experts), expert, num_experts)


@triton.jit
def _count(experts, counts, pairs, num_experts, first, bins: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    count = tl.histogram(_local_expert(experts, at, pairs, num_experts, first), bins)
    number = tl.arange(0, bins)
    # The last block's places past the end would count as elsewhere.
    past = tl.maximum((block + 1) * BLOCK - pairs, 0)
    count -= tl.where(number == num_experts, past, 0)
    tl.store(counts + number * tl.num_programs(0) + block, count)


@triton.jit
def _place(experts, counts, ends, order, inverse, pairs, num_experts, first, BLOCK: tl.constexpr, PART: tl.constexpr):
    block = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    at = block * BLOCK + place
    inside = at < pairs
    expert = _local_expert(experts, at, pairs, num_experts, first)
    before = tl.zeros((BLOCK,), tl.int32)  # pairs of the same expert in this block
    for start in range(0, BLOCK, PART):
        other_place = start + tl.arange(0, PART)
        other = _local_expert(experts, block * BLOCK + other_place, pairs, num_experts, first)
        same = other[:, None] == expert[None, :]
        before += tl.sum((same & (other_place[:, None] < place[None, :])).to(tl.int32), 0)
    cell = expert * tl.num_programs(0) + block
    start = tl.load(ends + cell, mask=inside, other=0) - tl.load(counts + cell, mask=inside, other=0)
    row = (start + before).to(tl.int64)
    tl.store(inverse + at, row, mask=inside)
    tl.store(order + row, at.to(tl.int64), mask=inside)
