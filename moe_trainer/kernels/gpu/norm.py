"""Root mean square norm of rows, forward and backward, and with it the turn of heads by their positions' angles."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moe_trainer.kernels.gpu.sizes import ceil_div, multiprocessors, next_power_of_2

_TILE = 4096
"""Values of one tile: narrow rows (heads) share a program."""


class Turn(NamedTuple):
    """By which angle each pair (i, i + width / 2) of a normed row turns. Each position has `heads` rows."""

    cos: torch.Tensor
    """[positions, width] contiguous, after the last of which the first comes again; both halves alike."""
    sin: torch.Tensor
    """Likewise."""
    heads: int


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, turn: Turn | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, width] contiguous -> the norm, turned if asked, and 1 / rms of each row [rows] float32."""
    rows, width = x.shape
    out, inverse_rms = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    if rows:
        block = next_power_of_2(width)
        height = max(1, _TILE // block)
        settings = eps, height, block
        _forward[(ceil_div(rows, height),)](
            x, weight, out, inverse_rms, rows, width, *_angles(turn), *settings, num_warps=_warps(block)
        )
    return out, inverse_rms


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse_rms: torch.Tensor, turn: Turn | None = None
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
        given, made = (grad, x, weight, inverse_rms), (grad_x, parts)
        _backward[(programs,)](*given, *made, rows, width, *_angles(turn), height, block, num_warps=_warps(block))
    return grad_x, parts.sum(0)


def _angles(turn: Turn | None) -> tuple[torch.Tensor | None, torch.Tensor | None, int, int]:
    return (None, None, 1, 1) if turn is None else (turn.cos, turn.sin, turn.heads, len(turn.cos))


def _warps(block: int) -> int:
    return 8 if block >= 4096 else 4


@triton.jit
def _turned(value, other, cos, sin, at, columns, half, INVERSE: tl.constexpr):
    """Each value's pair turned by its angle, given the pair's `other` value."""
    c, s = tl.load(cos + at).to(tl.float32), tl.load(sin + at).to(tl.float32)
    if INVERSE:
        s = -s
    return value * c + other * tl.where((columns < half)[None, :], -s, s)


@triton.jit
def _forward(
    x, weight, out, inverse_rms, rows, width, cos, sin, heads, positions, eps,
    HEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    columns = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (columns < width)[None, :]
    at = row[:, None] * width + columns[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    factor = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    value = value * scale[:, None] * factor[None, :]
    if cos is not None:
        pair = (columns + width // 2) % width
        other = tl.load(x + row[:, None] * width + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        other = other * scale[:, None] * tl.load(weight + pair).to(tl.float32)[None, :]
        angle = (row // heads % positions)[:, None] * width + (columns % width)[None, :]
        value = _turned(value, other, cos, sin, angle, columns, width // 2, False)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
    tl.store(inverse_rms + row, scale, mask=row < rows)


@triton.jit
def _backward(
    grad, x, weight, inverse_rms, grad_x, parts, rows, width, cos, sin, heads, positions,
    HEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
        if cos is not None:
            pair = (columns + width // 2) % width
            other = tl.load(grad + row[:, None] * width + pair[None, :], mask=inside, other=0.0).to(tl.float32)
            angle = (row // heads % positions)[:, None] * width + (columns % width)[None, :]
            upstream = _turned(upstream, other, cos, sin, angle, columns, width // 2, True)
        total += tl.sum(upstream * normed, 0)
        upstream *= factor[None, :]
        mean = tl.sum(upstream * normed, 1)[:, None] / width
        value = (upstream - normed * mean) * scale
        tl.store(grad_x + at, value.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(parts + program * width + columns, total, mask=columns < width)
