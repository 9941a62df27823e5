"""Sums of squares at the speed of the memory, for which PyTorch's norms of many tensors take twice as long."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from moe_trainer.kernels.gpu.sizes import ceil_div

_BLOCK = 8192


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """As `kernels.sum_of_squares.sum_of_squares`, of contiguous tensors."""
    blocks = [ceil_div(tensor.numel(), _BLOCK) for tensor in tensors]
    sums = tensors[0].new_empty(sum(blocks), dtype=torch.float32)
    for tensor, own in zip(tensors, sums.split(blocks), strict=True):
        if len(own):
            _sum_block[(len(own),)](tensor, own, tensor.numel(), _BLOCK, num_warps=8)
    return sums.sum()


@triton.jit
def _sum_block(x, sums, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(value * value, 0))
