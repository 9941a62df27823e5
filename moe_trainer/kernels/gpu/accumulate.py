"""A sum of two tensors, each of its own type, at the speed of the memory."""

import torch
import triton
import triton.language as tl

from moe_trainer.kernels.gpu.sizes import ceil_div

_BLOCK = 2048


def add(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """`out` becomes `left + right`; all contiguous and of one shape, `out` may be one of them."""
    if out.numel():
        _add[(ceil_div(out.numel(), _BLOCK),)](left, right, out, out.numel(), _BLOCK, num_warps=8)


@triton.jit
def _add(left, right, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(left + at, mask=inside).to(tl.float32) + tl.load(right + at, mask=inside).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
