"""Tiles of rows that end with their expert.

The tensor memory accelerator (TMA) has no masks, only bounds, and the last tile of an expert reaches into the rows of
the next. So rows are described as [FAR + 1, rows + 1, FAR, width], where place (FAR, last, FAR - here) is the row
`here` rows before row `last`: the second and third index both count rows, and the first takes FAR of them away, by a
stride that overflows. A tile with `here` rows of its expert from row r on starts at (FAR, r + here, FAR - here); its
rows from `here` on lie past the third bound: they read as zero and are not written. (Triton's own kernels describe
ragged tensors so.)
"""

import torch
import triton
import triton.language as tl

from moe_trainer.kernels.gpu.sizes import ceil_div, next_power_of_2

FAR = tl.constexpr(2**30)


def ragged(x: torch.Tensor, height: int, width: int, parts: int = 1) -> tuple[list[int], list[int], list[int]]:
    """(shape, strides, block) by which `x` [rows, columns] is copied in tiles of `height` rows of one expert and
    `width` columns; of one of several parts of the columns, [rows, parts * columns], where there are some."""
    far, stride = FAR.value, x.stride(0)
    shape, strides, block = [far + 1, len(x) + 1, far], [2**34 - stride, stride, stride], [1, 1, height]
    columns = x.shape[1] // parts
    if parts > 1:
        shape, strides, block = [*shape, parts], [*strides, columns], [*block, 1]
    return [*shape, columns], [*strides, 1], [*block, width]


def placed(offsets: torch.Tensor, num_rows: int, height: int) -> torch.Tensor:
    """(expert, first row, rows, number of tiles) of each tile of so many rows, int32 [tiles at most, 4]."""
    most = ceil_div(num_rows, height) + len(offsets)
    tiles = torch.empty(most, 4, dtype=torch.int32, device=offsets.device)
    experts = next_power_of_2(len(offsets))
    _place[(ceil_div(most, 32),)](offsets, tiles, len(offsets), most, experts, 32, height)
    return tiles


@triton.jit
def _place(offsets, tiles, num_experts, most, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, HEIGHT: tl.constexpr):
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
def tile_at(number, high, wide, GROUP: tl.constexpr):
    """(along M, along N) of a tile's number, of `high` x `wide` tiles: down `GROUP` of them, then to the right."""
    first = number // (GROUP * wide) * GROUP
    size = tl.minimum(high - first, GROUP)
    within = number % (GROUP * wide)
    return first + within % size, within // size
