"""Grouped matrix products for Hopper: programs that stay, each with a share of the tiles, fed by the tensor memory
accelerator (TMA), so that the next tile is read while the last one is written.

TMA has no masks, only bounds, and the last tile of an expert reaches into the rows of the next. So rows are described
as [FAR + 1, rows + 1, FAR, width], where place (FAR, last, FAR - here) is the row `here` rows before row `last`: the
second and third index both count rows, and the first takes FAR of them away, by a stride that overflows. A tile with
`here` rows of its expert from row r on starts at (FAR, r + here, FAR - here); its rows from `here` on lie past the
third bound: they read as zero and are not written. (Triton's own kernels describe ragged tensors so.)
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import _get_current_dispatch_mode
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_trainer.kernels.gpu.sizes import ceil_div, multiprocessors, next_power_of_2

_M, _N, _K_BYTES = 128, 256, 128
_GROUP = 8
"""Tiles along M that run beside each other share their part of the other factor in the cache."""
_SHARES = 4
"""Programs for each multiprocessor, one after the other: those that a collective occupies take fewer."""
_OPTIONS = {"num_warps": 8, "num_stages": 3}


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
    out = rows.new_empty(num_rows, width, dtype=torch.bfloat16)
    transposed = weight.stride(1) == 1
    depth = _K_BYTES // rows.itemsize
    factor = [1, _N, depth] if transposed else [1, depth, _N]
    most = ceil_div(num_rows, _M) + len(offsets)
    tiles = torch.empty(most, 4, dtype=torch.int32, device=rows.device)
    experts = next_power_of_2(len(offsets))
    _place_tiles[(ceil_div(most, 32),)](offsets, tiles, len(offsets), most, experts, 32, _M)
    _multiply[_programs(rows)](
        TensorDescriptor.from_tensor(rows, [_M, depth]),
        TensorDescriptor.from_tensor(weight.mT if transposed else weight, factor),
        _ragged(out, _M, _N),
        row_scale,
        column_scale,
        tiles,
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
    """The operator where a dispatch mode looks at operators; elsewhere the host is spared the dispatcher."""
    return _grouped_mm if _get_current_dispatch_mode() is None else torch.ops.moe_trainer.grouped_mm


def outer(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """As `grouped_gemm.outer`: [rows, a], [rows, b] -> [experts, a, b]."""
    out = left.new_empty(len(offsets), left.shape[1], right.shape[1])
    depth = _K_BYTES // left.itemsize
    _outer[_programs(left)](
        _ragged(left, depth, _M),
        _ragged(right, depth, _N),
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


def _programs(x: torch.Tensor) -> tuple[int]:
    return (_SHARES * multiprocessors(x.device),)


_FAR = tl.constexpr(2**30)


def _ragged(x: torch.Tensor, height: int, width: int) -> TensorDescriptor:
    """`x` [rows, columns], copied in tiles of `height` rows of one expert and `width` columns."""
    far, stride = _FAR.value, x.stride(0)
    shape, strides = [far + 1, len(x) + 1, far, x.shape[1]], [2**34 - stride, stride, stride, 1]
    return TensorDescriptor(x, shape, strides, [1, 1, height, width])


@triton.jit
def _place_tiles(offsets, tiles, num_experts, most, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, HEIGHT: tl.constexpr):
    """(expert, first row, rows, number of tiles) of each tile."""
    expert = tl.arange(0, EXPERTS)
    inside = expert < num_experts
    start = tl.load(offsets + expert - 1, mask=inside & (expert > 0), other=0)
    count = tl.cdiv(tl.load(offsets + expert, mask=inside, other=0) - start, HEIGHT)
    count = tl.where(inside, count, 0)
    end = tl.cumsum(count, 0)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    earlier = end[None, :] <= number[:, None]
    of = tl.sum((earlier & inside[None, :]).to(tl.int32), 1)
    before = tl.sum(tl.where(earlier, count[None, :], 0), 1)
    here = of < num_experts
    first = tl.load(offsets + of - 1, mask=here & (of > 0), other=0) + (number - before) * HEIGHT
    last = tl.load(offsets + of, mask=here, other=0)
    written = number < most
    tl.store(tiles + number * 4, of, mask=written)
    tl.store(tiles + number * 4 + 1, first, mask=written)
    tl.store(tiles + number * 4 + 2, tl.minimum(last - first, HEIGHT), mask=written)
    tl.store(tiles + number * 4 + 3, tl.sum(count, 0), mask=written)


@triton.jit
def _tile_at(number, high, wide, GROUP: tl.constexpr):
    """(along M, along N) of a tile's number, of `high` x `wide` tiles: down `GROUP` of them, then to the right."""
    first = number // (GROUP * wide) * GROUP
    size = tl.minimum(high - first, GROUP)
    within = number % (GROUP * wide)
    return first + within % size, within // size


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
        down, across = _tile_at(number, high, wide, GROUP)
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
        out.store([_FAR, first + here, _FAR - here, column], total.to(out.dtype).reshape(1, 1, M, N))


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
        down, across = _tile_at(number % (high * wide), high, wide, GROUP)
        start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
        end = tl.load(offsets + expert)
        steps = tl.maximum(tl.cdiv(end - start, K), 1)  # an expert without rows takes one step over none
        tl.assume(steps > 0)
        total = tl.zeros((M, N), dtype=tl.float32)
        for step in range(0, steps):
            row = start + step * K
            here = tl.minimum(end - row, K)
            a = left.load([_FAR, row + here, _FAR - here, down * M]).reshape(K, M)
            b = right.load([_FAR, row + here, _FAR - here, across * N]).reshape(K, N)
            total = tl.dot(a.T, b, total)
        out.store([expert, down * M, across * N], total.to(out.dtype).reshape(1, M, N))
