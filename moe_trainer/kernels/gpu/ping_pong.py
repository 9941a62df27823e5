"""Grouped matrix products for Hopper of which one group of warps writes a tile while another multiplies the next.

Two groups of four warps have the tensor cores by turns (the "ping-pong" schedule of CUTLASS), and a warp of its own
reads ahead of both with the tensor memory accelerator (TMA). So the end of a tile costs nothing, which in
`grouped_gemm` it does; where sums are as short as those of many small experts, that is a good part of a tile. There
is even time for SwiGLU and its backward pass, which then need no pass over memory. Written in Gluon, because Triton
itself gives no warp a part of its own. How a tile ends with its expert: see `tiles`.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe_trainer.kernels.gpu.sizes import ceil_div, programs
from moe_trainer.kernels.gpu.tiles import FAR, placed, ragged, tile_at

_TILE = gl.constexpr(128)
"""Rows and columns of a tile."""
_DEPTH_BYTES = 128
"""Of a row of a factor, in one step."""
_PIECES = gl.constexpr(4)
"""Parts of a tile, side by side, in which the backward pass of SwiGLU is computed."""
_GROUP = 8
"""Tiles along M that run beside each other share their part of the other factor in the cache."""
_LOG2_E = gl.constexpr(1.4426950408889634)
_TYPES = {torch.bfloat16: gl.bfloat16, torch.float8_e4m3fn: gl.float8e4nv}


def multiply(
    rows: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    row_scale: torch.Tensor | None = None,
    column_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """[rows, a] x [experts, a, b] -> bfloat16 [rows, b], times the scales [rows] and [experts, b] if given; the
    weight in either memory order."""
    tile, depth = _TILE.value, _DEPTH_BYTES // rows.itemsize
    out = rows.new_empty(len(rows), weight.shape[2], dtype=torch.bfloat16)
    if weight.stride(1) == 1:
        right = _tiled(weight.mT.unsqueeze(1), (1, 1, tile, depth))
    else:
        right = _tiled(weight, (1, depth, tile))
    sizes = len(offsets), rows.shape[1], *out.shape
    scales = {"row_scale": row_scale, "column_scale": column_scale}
    factors, target = (_tiled(rows, (tile, depth)), right), _ragged(out, tile, tile)
    _launch("product", *factors, target, placed(offsets, len(rows), tile), sizes, tile, **scales)
    return out


def outer(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """bfloat16 [rows, a], [rows, b] -> [experts, a, b]."""
    tile, depth = _TILE.value, _DEPTH_BYTES // left.itemsize
    out = left.new_empty(len(offsets), left.shape[1], right.shape[1])
    factors, target = (_ragged(left, depth, tile), _ragged(right, depth, tile)), _tiled(out, (1, tile, tile))
    _launch("outer", *factors, target, offsets, (len(offsets), 0, *out.shape[1:]), tile)
    return out


def swiglu(
    rows: torch.Tensor, gate_up_proj: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up [rows, 2 * intermediate], and silu(gate) * up * weight [rows, intermediate].

    Args:
        rows: bfloat16 [rows, hidden].
        gate_up_proj: [experts, 2, intermediate, hidden].
        weights: float32 [pairs].
        order: [rows], the pair of each.
    """
    experts, _, width, inner = gate_up_proj.shape
    tile, half, depth = _TILE.value, _TILE.value // 2, _DEPTH_BYTES // rows.itemsize
    gate_up, activated = rows.new_empty(len(rows), 2 * width), rows.new_empty(len(rows), width)
    factors, target = (_tiled(rows, (tile, depth)), _tiled(gate_up_proj, (1, 2, half, depth))), (tile, half)
    given = {"activated": _ragged(activated, *target), "weights": weights, "order": order}
    spans, sizes = placed(offsets, len(rows), tile), (experts, inner, len(rows), width)
    _launch("swiglu", *factors, _ragged(gate_up, *target, parts=2), spans, sizes, half, stages=4, **given)
    return gate_up, activated


def swiglu_backward(
    grad: torch.Tensor,
    down_proj: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    gate_up: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of gate and up [rows, 2 * intermediate], silu(gate) * up * weight again [rows, intermediate], and
    the gradient of the weights [pairs], zero for pairs of experts elsewhere.

    Args:
        grad: bfloat16 [rows, hidden], of the experts' outputs.
        down_proj: [experts, hidden, intermediate].
        weights, order: as for `swiglu`.
        gate_up: as it was.
    """
    experts, inner, width = down_proj.shape
    tile, piece, depth = _TILE.value, _TILE.value // _PIECES.value, _DEPTH_BYTES // grad.itemsize
    grad_gate_up, activated = torch.empty_like(gate_up), grad.new_empty(len(grad), width)
    parts = grad.new_empty(ceil_div(width, tile), len(grad), dtype=torch.float32)
    factors, target = (_tiled(grad, (tile, depth)), _tiled(down_proj, (1, depth, tile))), (tile, piece)
    given = {"activated": _ragged(activated, *target), "weights": weights, "order": order, "parts": parts}
    given["gate_up"] = _ragged(gate_up, *target, parts=2)
    spans, sizes = placed(offsets, len(grad), tile), (experts, inner, len(grad), width)
    _launch("backward", *factors, _ragged(grad_gate_up, *target, parts=2), spans, sizes, tile, stages=4, **given)
    grad_weights = weights.new_zeros(weights.numel())
    _sum_parts[(ceil_div(len(grad), 256),)](parts, order, offsets[-1:], grad_weights, len(parts), len(grad), 256)
    return grad_gate_up, activated, grad_weights


def _launch(
    kind: str,
    left: TensorDescriptor,
    right: TensorDescriptor,
    out: TensorDescriptor,
    spans: torch.Tensor,
    sizes: tuple[int, ...],
    step: int,
    stages: int = 5,
    **given: torch.Tensor | TensorDescriptor | None,
) -> None:
    """`stages`: as many as there is memory for."""
    grid = (programs(spans.device),)
    _products[grid](left, right, out, spans, *sizes, step, stages, _GROUP, kind, **given, num_warps=4)


def _tiled(x: torch.Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """`x`, copied in tiles of this shape."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block), _layout(x.dtype, block))


def _ragged(x: torch.Tensor, height: int, width: int, parts: int = 1) -> TensorDescriptor:
    shape, strides, block = ragged(x, height, width, parts)
    return TensorDescriptor(x, shape, strides, block, _layout(x.dtype, tuple(block)))


@functools.cache
def _layout(dtype: torch.dtype, block: tuple[int, ...]) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _TYPES[dtype])


@triton.jit
def _sum_parts(parts, order, end, out, num_parts, num_rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < tl.load(end)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(num_parts):
        total += tl.load(parts + part.to(tl.int64) * num_rows + row, mask=inside, other=0.0)
    tl.store(out + tl.load(order + row, mask=inside, other=0), total, mask=inside)


@gluon.jit
def _tile(number, spans, high, wide, GROUP: gl.constexpr, KIND: gl.constexpr):
    """(expert, its first row here, rows, tile along M, along N)."""
    if KIND == "outer":
        expert = number // (high * wide)
        down, across = tile_at(number % (high * wide), high, wide, GROUP)
        first = gl.load(spans + expert - 1, mask=expert > 0, other=0)
        return expert, first, gl.load(spans + expert) - first, down, across
    else:
        down, across = tile_at(number, high, wide, GROUP)
        at = spans + down * 4
        return gl.load(at), gl.load(at + 1), gl.load(at + 2), down, across


@gluon.jit
def _steps(rows, inner, DEPTH: gl.constexpr, KIND: gl.constexpr):
    if KIND == "outer":
        return gl.maximum(gl.cdiv(rows, DEPTH), 1)  # an expert without rows takes one step over none
    else:
        return gl.cdiv(inner, DEPTH)


@gluon.jit
def _read(
    left, right, ring, spans, sizes, DEPTH: gl.constexpr, STEP: gl.constexpr, GROUP: gl.constexpr, KIND: gl.constexpr
):
    """Both factors of each step of each tile, as far ahead as there is room."""
    lefts, rights, ready, empty = ring
    inner, count, high, wide = sizes
    slot, phase = 0, 1
    stages: gl.constexpr = lefts.shape[0]
    for number in range(gl.program_id(0), count, gl.num_programs(0)):
        expert, first, rows, down, across = _tile(number, spans, high, wide, GROUP, KIND)
        for step in range(_steps(rows, inner, DEPTH, KIND)):
            mbarrier.wait(empty.index(slot), phase)
            arrived = ready.index(slot)
            mbarrier.expect(arrived, left.block_type.nbytes + right.block_type.nbytes)
            if KIND == "outer":
                here = gl.minimum(rows - step * DEPTH, DEPTH)
                last = first + step * DEPTH + here
                left_at = [FAR, last, FAR - here, down * _TILE]
                right_at = [FAR, last, FAR - here, across * STEP]
            else:
                left_at = [first, step * DEPTH]
                if len(right.block_shape) == 4:
                    right_at = [expert, 0, across * STEP, step * DEPTH]
                else:
                    right_at = [expert, step * DEPTH, across * STEP]
            tma.async_copy_global_to_shared(left, left_at, arrived, lefts.index(slot))
            tma.async_copy_global_to_shared(right, right_at, arrived, rights.index(slot))
            slot = gl.where(slot == stages - 1, 0, slot + 1)
            phase = gl.where(slot == 0, phase ^ 1, phase)


@gluon.jit
def _read_gate_up(gate_up, places, spans, sizes, STEP: gl.constexpr, GROUP: gl.constexpr):
    """Gate and up of each tile, each piece as soon as that of the tile before is written."""
    gates, ups, activations, loaded, free = places
    inner, count, high, wide = sizes
    phase, group = 1, 0
    for number in range(gl.program_id(0), count, gl.num_programs(0)):
        expert, first, rows, down, across = _tile(number, spans, high, wide, GROUP, "backward")
        for piece in gl.static_range(_PIECES):
            mbarrier.wait(free.index(piece), phase)
            arrived = loaded.index(group * _PIECES + piece)
            mbarrier.expect(arrived, 2 * gate_up.block_type.nbytes)
            column = across * STEP + piece * gate_up.block_shape[-1]
            at_gate = [FAR, first + rows, FAR - rows, 0, column]
            at_up = [FAR, first + rows, FAR - rows, 1, column]
            tma.async_copy_global_to_shared(gate_up, at_gate, arrived, gates.index(piece))
            tma.async_copy_global_to_shared(gate_up, at_up, arrived, ups.index(piece))
        phase, group = phase ^ 1, group ^ 1


@gluon.jit
def _multiply(
    work, DEPTH: gl.constexpr, STEP: gl.constexpr, GROUP: gl.constexpr, KIND: gl.constexpr, WHICH: gl.constexpr
):
    """Every second tile: its sum when it is this group's turn, and its end while it is the other's."""
    target, places, ring, turns, spans, sizes, num_rows, width = work
    out, activated, row_scale, column_scale, weights, order, parts = target
    lefts, rights, ready, empty = ring
    inner, count, high, wide = sizes
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, _TILE, 256 // lefts.dtype.primitive_bitwidth]
    )
    stages: gl.constexpr = lefts.shape[0]
    done, phase, is_mine = 0, 0, WHICH == 0
    for number in range(gl.program_id(0), count, gl.num_programs(0)):
        expert, first, rows, down, across = _tile(number, spans, high, wide, GROUP, KIND)
        steps = _steps(rows, inner, DEPTH, KIND)
        if is_mine:
            row = first + gl.minimum(gl.arange(0, _TILE, gl.SliceLayout(1, layout)), rows - 1)
            if weights is not None:
                weight = gl.load(weights + gl.load(order + row))
            mbarrier.wait(turns.index(WHICH), phase)
            total = warpgroup_mma_init(gl.zeros((_TILE, _TILE), gl.float32, layout))
            for step in range(done, done + steps):
                slot = step % stages
                mbarrier.wait(ready.index(slot), step // stages & 1)
                if KIND == "outer":
                    a = lefts.index(slot).reshape([DEPTH, _TILE]).permute((1, 0))
                    b = rights.index(slot).reshape([DEPTH, _TILE])
                else:
                    a = lefts.index(slot)
                    if len(rights.shape) == 5:
                        b = rights.index(slot).reshape([_TILE, DEPTH]).permute((1, 0))
                    else:
                        b = rights.index(slot).reshape([DEPTH, _TILE])
                total = warpgroup_mma(a, b, total, use_acc=step > done, is_async=True)
                total = warpgroup_mma_init(warpgroup_mma_wait(1, [total]))
                mbarrier.arrive(empty.index((step + stages - 1) % stages), pred=step > done)
            mbarrier.arrive(turns.index(1 - WHICH))
            total = warpgroup_mma_wait(0, [total])
            mbarrier.arrive(empty.index((done + steps - 1) % stages))
            if KIND == "swiglu":
                _activate(total, weight, out, activated, places, first + rows, rows, across * STEP, WHICH)
            elif KIND == "backward":
                part = parts + across.to(gl.int64) * num_rows
                ends = (out, activated, part)
                _differentiate(total, weight, ends, places, first + rows, rows, across * STEP, phase, WHICH)
            else:
                if row_scale is not None:
                    column = gl.minimum(across * STEP + gl.arange(0, _TILE, gl.SliceLayout(0, layout)), width - 1)
                    total *= gl.expand_dims(gl.load(row_scale + row), 1)
                    total *= gl.expand_dims(gl.load(column_scale + expert * width + column), 0)
                mine = places.index(WHICH)
                tma.store_wait(0)
                mine.reshape([_TILE, _TILE]).store(total.to(out.dtype))
                fence_async_shared()
                if KIND == "outer":
                    tma.async_copy_shared_to_global(out, [expert, down * _TILE, across * STEP], mine)
                else:
                    tma.async_copy_shared_to_global(out, [FAR, first + rows, FAR - rows, across * STEP], mine)
            phase ^= 1
        done += steps
        is_mine = is_mine == False  # noqa: E712
    tma.store_wait(0)


@gluon.jit
def _activate(total, weight, gate_up, activated, places, last, rows, column, WHICH: gl.constexpr):
    """The sum is gate beside up; what is activated is what they are rounded to, as the backward pass finds them."""
    gates, ups, activations = places
    gate, up = _halves(total)
    shape: gl.constexpr = gate.shape
    weight = gl.expand_dims(gl.convert_layout(weight, gl.SliceLayout(1, gate.type.layout)), 1)
    gate, up = gate.to(gl.bfloat16), up.to(gl.bfloat16)
    tma.store_wait(0)
    gates.index(WHICH).reshape(shape).store(gate)
    ups.index(WHICH).reshape(shape).store(up)
    gate, up = gate.to(gl.float32), up.to(gl.float32)
    activations.index(WHICH).reshape(shape).store((gate * _sigmoid(gate) * up * weight).to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(gate_up, [FAR, last, FAR - rows, 0, column], gates.index(WHICH))
    tma.async_copy_shared_to_global(gate_up, [FAR, last, FAR - rows, 1, column], ups.index(WHICH))
    tma.async_copy_shared_to_global(activated, [FAR, last, FAR - rows, column], activations.index(WHICH))


@gluon.jit
def _differentiate(total, weight, ends, places, last, rows, column, phase, WHICH: gl.constexpr):
    """The sum is the gradient of what was activated, before the weight; gradients take the place of gate and up."""
    grad_gate_up, activated, parts = ends
    gates, ups, activations, loaded, free = places
    left, right = _halves(total)
    grads = _halves(left) + _halves(right)
    shape: gl.constexpr = grads[0].shape
    layout: gl.constexpr = grads[0].type.layout
    place: gl.constexpr = gl.SliceLayout(1, layout)
    weight = gl.expand_dims(gl.convert_layout(weight, place), 1)
    of_weight = gl.zeros(shape, gl.float32, layout)
    for piece in gl.static_range(_PIECES):
        to_gate, to_up = gates.index(piece), ups.index(piece)
        mbarrier.wait(loaded.index(WHICH * _PIECES + piece), phase)
        gate = to_gate.reshape(shape).load(layout).to(gl.float32)
        up = to_up.reshape(shape).load(layout).to(gl.float32)
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        plain = silu * up
        of_weight = gl.fma(grads[piece], plain, of_weight)
        grad = grads[piece] * weight
        slope = gl.fma(-silu, sigmoid, sigmoid + silu)  # of silu
        to_gate.reshape(shape).store((grad * up * slope).to(gl.bfloat16))
        to_up.reshape(shape).store((grad * silu).to(gl.bfloat16))
        activations.index(piece).reshape(shape).store((plain * weight).to(gl.bfloat16))
        fence_async_shared()
        at = column + piece * shape[1]
        tma.async_copy_shared_to_global(grad_gate_up, [FAR, last, FAR - rows, 0, at], to_gate)
        tma.async_copy_shared_to_global(grad_gate_up, [FAR, last, FAR - rows, 1, at], to_up)
        tma.async_copy_shared_to_global(activated, [FAR, last, FAR - rows, at], activations.index(piece))
        if piece > 0:
            tma.store_wait(3)  # the piece before is written
            mbarrier.arrive(free.index(piece - 1))
    tma.store_wait(0)
    mbarrier.arrive(free.index(_PIECES - 1))
    row = gl.arange(0, shape[0], place)
    gl.store(parts + last - rows + row, gl.sum(of_weight, 1), mask=row < rows)


@gluon.jit
def _halves(x):
    """[M, 2 * W] -> the left and the right [M, W]."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute([0, 2, 1]).split()


@gluon.jit
def _sigmoid(x):
    """To the last few bits, in 4 instructions instead of 12: what each tile executes once has to stay in the
    instruction cache, where the exact one's backward pass took 23 cycles an instruction."""
    power = gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x * -_LOG2_E], gl.float32, True, 1)
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [1 + power], gl.float32, True, 1)


@gluon.jit
def _products(
    left,
    right,
    out,
    spans,
    experts,
    inner,
    height,
    width,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    KIND: gl.constexpr,
    activated=None,
    gate_up=None,
    row_scale=None,
    column_scale=None,
    weights=None,
    order=None,
    parts=None,
):
    """`spans`: the experts' ends for an outer product, else the tiles of the rows; `STEP`: columns of the result from
    one tile to the next."""
    DEPTH: gl.constexpr = left.block_shape[-2] if KIND == "outer" else left.block_shape[-1]
    COPIES: gl.constexpr = _PIECES if KIND == "backward" else 2
    ring = (
        gl.allocate_shared_memory(left.dtype, [STAGES] + left.block_shape, left.layout),
        gl.allocate_shared_memory(right.dtype, [STAGES] + right.block_shape, right.layout),
        _barriers(STAGES),
        _barriers(STAGES),
    )
    turns = _barriers(2)
    places = gl.allocate_shared_memory(out.dtype, [COPIES] + out.block_shape, out.layout)
    if activated is not None:
        ups = gl.allocate_shared_memory(out.dtype, [COPIES] + out.block_shape, out.layout)
        activations = gl.allocate_shared_memory(out.dtype, [COPIES] + activated.block_shape, activated.layout)
        if KIND == "backward":
            places = (places, ups, activations, _barriers(2 * COPIES), _barriers(COPIES))
        else:
            places = (places, ups, activations)
    fence_async_shared()
    mbarrier.arrive(turns.index(0))
    wide = gl.cdiv(width, STEP)
    if KIND == "outer":
        high = gl.cdiv(height, _TILE)
        count = experts * high * wide
    else:
        high = gl.load(spans + 3)
        count = high * wide
    sizes = (inner, count, high, wide)
    target = (out, activated, row_scale, column_scale, weights, order, parts)
    work = (target, places, ring, turns, spans, sizes, height, width)
    if KIND == "backward":
        gl.warp_specialize(
            [
                (_multiply, (work, DEPTH, STEP, GROUP, KIND, 0)),
                (_multiply, (work, DEPTH, STEP, GROUP, KIND, 1)),
                (_read, (left, right, ring, spans, sizes, DEPTH, STEP, GROUP, KIND)),
                (_read_gate_up, (gate_up, places, spans, sizes, STEP, GROUP)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (work, DEPTH, STEP, GROUP, KIND, 0)),
                (_multiply, (work, DEPTH, STEP, GROUP, KIND, 1)),
                (_read, (left, right, ring, spans, sizes, DEPTH, STEP, GROUP, KIND)),
            ],
            [4, 1],
            [240, 24],
        )


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(COUNT):
        mbarrier.init(barriers.index(number), count=1)
    return barriers
