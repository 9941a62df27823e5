"""Root mean square norm of rows, forward and backward."""

import torch
import triton
import triton.language as tl

from moe_trainer.kernels.gpu.sizes import ceil_div, multiprocessors, next_power_of_2

_TILE = 4096
"""Values of one tile: narrow rows (heads) share a program."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, width] contiguous -> the norm, and 1 / rms of each row [rows] float32."""
    rows, width = x.shape
    out, inverse_rms = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    if rows:
        block = next_power_of_2(width)
        height = max(1, _TILE // block)
        grid = (ceil_div(rows, height),)
        _forward[grid](x, weight, out, inverse_rms, rows, width, eps, height, block, num_warps=_warps(block))
    return out, inverse_rms


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse_rms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x [rows, width] and of the weight [width] float32; the latter's sum has a fixed order."""
    rows, width = x.shape
    grad_x = torch.empty_like(x)
    block = next_power_of_2(width)
    height = max(1, _TILE // block)
    programs = min(ceil_div(rows, height), 4 * multiprocessors(x.device))
    make = x.new_empty if rows else x.new_zeros
    parts = make(max(programs, 1), width, dtype=torch.float32)
    if rows:
        _backward[(programs,)](
            grad, x, weight, inverse_rms, grad_x, parts, rows, width, height, block, num_warps=_warps(block)
        )
    return grad_x, parts.sum(0)


def _warps(block: int) -> int:
    return 8 if block >= 4096 else 4


@triton.jit
def _forward(x, weight, out, inverse_rms, rows, width, eps, HEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    columns = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (columns < width)[None, :]
    at = row[:, None] * width + columns[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    factor = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(out + at, (value * scale[:, None] * factor[None, :]).to(out.dtype.element_ty), mask=inside)
    tl.store(inverse_rms + row, scale, mask=row < rows)


@triton.jit
def _backward(grad, x, weight, inverse_rms, grad_x, parts, rows, width, HEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    factor = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(program, tl.cdiv(rows, HEIGHT), tl.num_programs(0)):
        row = tile * HEIGHT + tl.arange(0, HEIGHT).to(tl.int64)
        inside = (row < rows)[:, None] & (columns < width)[None, :]
        at = row[:, None] * width + columns[None, :]
        scale = tl.load(inverse_rms + row, mask=row < rows, other=0.0)[:, None]
        normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale
        upstream = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(upstream * normed, 0)
        upstream *= factor[None, :]
        mean = tl.sum(upstream * normed, 1)[:, None] / width
        value = (upstream - normed * mean) * scale
        tl.store(grad_x + at, value.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(parts + program * width + columns, total, mask=columns < width)
