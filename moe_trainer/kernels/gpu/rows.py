"""Tokens copied to their rows, and rows summed to tokens, at the speed of the memory."""

import torch
import triton
import triton.language as tl

from moe_trainer.kernels.gpu.sizes import ceil_div, next_power_of_2


def spread(tokens: torch.Tensor, inverse: torch.Tensor, end: torch.Tensor, rows: int, top_k: int) -> torch.Tensor:
    """[tokens, width], the row of each pair [pairs] -> [rows, width]: a copy for each pair's row before `end`.

    By tokens, each of which is read once; by rows each would be read `top_k` times, too far apart for the cache.
    """
    width = tokens.shape[1]
    out = tokens.new_empty(rows, width)
    if out.numel() and tokens.numel():
        block = min(next_power_of_2(width), 2048)
        grid = (len(tokens), ceil_div(width, block))
        _spread[grid](tokens, inverse, end, out, width, top_k, block, num_warps=4)
    return out


def sum_pairs(rows: torch.Tensor, inverse: torch.Tensor, end: torch.Tensor, top_k: int) -> torch.Tensor:
    """Rows [rows, width], the row of each pair [pairs] -> [tokens, width], summed in float32; none past `end`."""
    tokens, width = len(inverse) // top_k, rows.shape[1]
    out = rows.new_empty(tokens, width)
    if out.numel():
        block = min(next_power_of_2(width), 2048)
        grid = (tokens, ceil_div(width, block))
        _sum_pairs[grid](rows, inverse, end, out, width, top_k, block, num_warps=4)
    return out


@triton.jit
def _spread(tokens, inverse, end, out, width: tl.constexpr, top_k: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    stop = tl.load(end).to(tl.int64)
    value = tl.load(tokens + token * width + columns, mask=inside)
    for pair in tl.static_range(top_k):
        row = tl.load(inverse + token * top_k + pair).to(tl.int64)
        tl.store(out + row * width + columns, value, mask=inside & (row < stop))


@triton.jit
def _sum_pairs(rows, inverse, end, out, width, top_k: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    stop = tl.load(end).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for pair in tl.static_range(top_k):
        row = tl.load(inverse + token * top_k + pair).to(tl.int64)
        value = tl.load(rows + row * width + columns, mask=inside & (row < stop), other=0.0)
        total += value.to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)
