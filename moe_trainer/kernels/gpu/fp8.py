"""Rounding to fp8 (e4m3) with a scale for each row or column."""

import torch
import triton
import triton.language as tl

from moe_trainer.kernels.gpu.sizes import ceil_div, next_power_of_2

_LARGEST = tl.constexpr(448.0)
_LEAST = tl.constexpr(1e-12)
_COLUMNS, _DEPTH = 64, 128


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., width], contiguous -> values of the same shape, scale [...] float32."""
    width = rows.shape[-1]
    values = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    scale = rows.new_empty(rows.shape[:-1], dtype=torch.float32)
    if rows.numel():
        block = min(next_power_of_2(width), 4096)
        _quantize_rows[(scale.numel(),)](rows, values, scale, width, block, num_warps=8 if block > 2048 else 4)
    return values, scale


def quantize_columns(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[experts, a, b], contiguous -> values [experts, b, a], scale [experts, b] float32."""
    experts, depth, width = weight.shape
    values = weight.new_empty(experts, width, depth, dtype=torch.float8_e4m3fn)
    scale = weight.new_empty(experts, width, dtype=torch.float32)
    if weight.numel():
        grid = (ceil_div(width, _COLUMNS), experts)
        _quantize_columns[grid](weight, values, scale, depth, width, _COLUMNS, _DEPTH, num_warps=8)
    return values, scale


@triton.jit
def _quantize_rows(rows, values, scale, width: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(rows + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    step = tl.maximum(tl.max(largest, 0), _LEAST) / _LARGEST
    tl.store(scale + row, step)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(rows + row * width + columns, mask=inside, other=0.0).to(tl.float32) / step
        tl.store(values + row * width + columns, x.to(values.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_columns(
    weight, values, scale, depth: tl.constexpr, width: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):
    expert = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    weight += expert * depth * width
    largest = tl.zeros((DEPTH, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        row = start + tl.arange(0, DEPTH)
        inside = (row < depth)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        largest = tl.maximum(largest, tl.abs(tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)))
    step = tl.maximum(tl.max(largest, 0), _LEAST) / _LARGEST
    tl.store(scale + expert * width + column, step, mask=column < width)
    values += expert * depth * width
    for start in range(0, depth, DEPTH):
        row = start + tl.arange(0, DEPTH)
        inside = (row < depth)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        x = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) / step[None, :]
        to = column.to(tl.int64)[:, None] * depth + row[None, :]
        tl.store(values + to, tl.trans(x.to(values.dtype.element_ty)), mask=tl.trans(inside))
