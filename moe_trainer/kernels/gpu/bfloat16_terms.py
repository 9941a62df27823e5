"""Float32 numbers as sums of bfloat16 numbers, laid out for products."""

import torch
import triton
import triton.language as tl

from moe_trainer.kernels.gpu.sizes import ceil_div

_BLOCK = 1024


def stacked_terms(x: torch.Tensor) -> torch.Tensor:
    """[rows, columns] float32 -> [4, rows, columns] bfloat16: the first term, the first again, second and third.

    The three add up to the number, up to its last bit.
    """
    rows, columns = x.shape
    out = x.new_empty(4, rows, columns, dtype=torch.bfloat16)
    return _split(x, out, 0, columns, rows * columns)


def joined_terms(x: torch.Tensor) -> torch.Tensor:
    """[rows, columns] float32 -> [rows, 4 * columns] bfloat16: third and second term, the first, the first again."""
    rows, columns = x.shape
    out = x.new_empty(rows, 4 * columns, dtype=torch.bfloat16)
    return _split(x, out, 3 * columns, 4 * columns, -columns)


def _split(x: torch.Tensor, out: torch.Tensor, start: int, row_stride: int, term_stride: int) -> torch.Tensor:
    size = x.numel()
    if size:
        grid = (ceil_div(size, _BLOCK),)
        _write_terms[grid](x.contiguous(), out, size, x.shape[1], start, row_stride, term_stride, _BLOCK, num_warps=4)
    return out


@triton.jit
def _write_terms(x, out, size, columns, start, row_stride, term_stride, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + at, mask=inside, other=0.0)
    first = value.to(tl.bfloat16)
    rest = value - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    to = out + start + at // columns * row_stride + at % columns
    tl.store(to, first, mask=inside)
    tl.store(to + term_stride, first, mask=inside)
    tl.store(to + 2 * term_stride, second, mask=inside)
    tl.store(to + 3 * term_stride, third, mask=inside)
