"""Grouped matrix products for Hopper: programs that stay, each with a share of the tiles, fed by the tensor memory
accelerator (TMA), so that the next tile is read while the last one is written. Short sums are `ping_pong`'s, which
hides a tile's end as well, with smaller tiles. How a tile ends with its expert: see `tiles`.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_trainer.kernels.gpu.sizes import programs
from moe_trainer.kernels.gpu.tiles import FAR, placed, ragged, tile_at
from moe_trainer.kernels.keepable import is_watched

_M, _N, _K_BYTES = 128, 256, 128
_GROUP = 8
"""Tiles along M that run beside each other share their part of the other factor in the cache."""
_OPTIONS = {"num_warps": 8, "num_stages": 3}
_SHORT_BYTES = 4096
"""Of a row of a factor: up to here a sum is so short that the end of its tile matters."""


def multiply(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """As `grouped_gemm.multiply`: [rows, a] x [experts, a, b] -> [rows, b]; the weight in either memory order."""
    return _product()(rows, weight, offsets, None, None)


def multiply_scaled(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """fp8 [rows, in] with scales [rows] x [experts, out, in] with scales [experts, out] -> bfloat16 [rows, out]."""
    return _product()(rows, weight.mT, offsets, row_scale, weight_scale)


def _grouped_mm(
    rows: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
) -> torch.Tensor:
    (num_rows, inner), width = rows.shape, weight.shape[2]
    if _is_short(rows, inner):
        from moe_trainer.kernels.gpu import ping_pong

        return ping_pong.multiply(rows, weight, offsets, row_scale, column_scale)
    out = rows.new_empty(num_rows, width, dtype=torch.bfloat16)
    transposed = weight.stride(1) == 1
    depth = _K_BYTES // rows.itemsize
    factor = [1, _N, depth] if transposed else [1, depth, _N]
    _multiply[(programs(rows.device),)](
        TensorDescriptor.from_tensor(rows, [_M, depth]),
        TensorDescriptor.from_tensor(weight.mT if transposed else weight, factor),
        TensorDescriptor(out, *ragged(out, _M, _N)),
        row_scale,
        column_scale,
        placed(offsets, num_rows, _M),
        inner,
        width,
        transposed,
        _M,
        _N,
        depth,
        _GROUP,
        **_OPTIONS,
    )
    return out


# An operator, so that activation checkpointing can keep its result.
_OPERATORS = torch.library.Library("moe_trainer", "FRAGMENT")
_OPERATORS.define("grouped_mm(Tensor rows, Tensor weight, Tensor offsets, Tensor? rs, Tensor? cs) -> Tensor")
_OPERATORS.impl("grouped_mm", _grouped_mm, "CUDA")


def _product() -> Callable[..., torch.Tensor]:
    """The operator where it is looked for; elsewhere the host is spared the dispatcher."""
    return torch.ops.moe_trainer.grouped_mm if is_watched() else _grouped_mm


def outer(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """As `grouped_gemm.outer`: [rows, a], [rows, b] -> [experts, a, b]."""
    if _is_short(left, len(left) // len(offsets)):
        from moe_trainer.kernels.gpu import ping_pong

        return ping_pong.outer(left, right, offsets)
    out = left.new_empty(len(offsets), left.shape[1], right.shape[1])
    depth = _K_BYTES // left.itemsize
    _outer[(programs(left.device),)](
        TensorDescriptor(left, *ragged(left, depth, _M)),
        TensorDescriptor(right, *ragged(right, depth, _N)),
        TensorDescriptor.from_tensor(out, [1, _M, _N]),
        offsets,
        *out.shape,
        _M,
        _N,
        depth,
        _GROUP,
        **_OPTIONS,
    )
    return out


def _is_short(rows: torch.Tensor, inner: int) -> bool:
    """Whether `ping_pong` takes sums of so many products; Triton's interpreter knows no Gluon."""
    return inner * rows.itemsize <= _SHORT_BYTES and not triton.knobs.runtime.interpret


@triton.jit
def _multiply(
    rows,
    weight,
    out,
    row_scale,
    column_scale,
    tiles,
    inner,
    width,
    TRANSPOSED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    high, wide = tl.load(tiles + 3), tl.cdiv(width, N)
    tl.assume(inner > 0)
    for number in tl.range(tl.program_id(0), high * wide, tl.num_programs(0), flatten=True):
        down, across = tile_at(number, high, wide, GROUP)
        expert = tl.load(tiles + down * 4)
        first = tl.load(tiles + down * 4 + 1)
        here = tl.load(tiles + down * 4 + 2)
        column = across * N
        total = tl.zeros((M, N), dtype=tl.float32)
        for k in range(0, inner, K):
            left = rows.load([first, k])
            if TRANSPOSED:
                total = tl.dot(left, weight.load([expert, column, k]).reshape(N, K).T, total)
            else:
                total = tl.dot(left, weight.load([expert, k, column]).reshape(K, N), total)
        if row_scale is not None:
            of_rows = tl.load(row_scale + first + tl.minimum(tl.arange(0, M), here - 1))
            columns = tl.minimum(column + tl.arange(0, N), width - 1)
            of_columns = tl.load(column_scale + expert * width + columns)
            total = total * of_rows[:, None] * of_columns[None, :]
        out.store([FAR, first + here, FAR - here, column], total.to(out.dtype).reshape(1, 1, M, N))


@triton.jit
def _outer(
    left,
    right,
    out,
    offsets,
    num_experts,
    height,
    width,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    high, wide = tl.cdiv(height, M), tl.cdiv(width, N)
    for number in tl.range(tl.program_id(0), num_experts * high * wide, tl.num_programs(0), flatten=True):
        expert = number // (high * wide)
        down, across = tile_at(number % (high * wide), high, wide, GROUP)
        start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
        end = tl.load(offsets + expert)
        steps = tl.maximum(tl.cdiv(end - start, K), 1)  # an expert without rows takes one step over none
        tl.assume(steps > 0)
        total = tl.zeros((M, N), dtype=tl.float32)
        for step in range(0, steps):
            row = start + step * K
            here = tl.minimum(end - row, K)
            a = left.load([FAR, row + here, FAR - here, down * M]).reshape(K, M)
            b = right.load([FAR, row + here, FAR - here, across * N]).reshape(K, N)
            total = tl.dot(a.T, b, total)
        out.store([expert, down * M, across * N], total.to(out.dtype).reshape(1, M, N))
