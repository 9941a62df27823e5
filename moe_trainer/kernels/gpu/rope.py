"""Rotary position embedding in one pass."""

import torch
import triton
import triton.language as tl

from moe_trainer.kernels.gpu.sizes import ceil_div, next_power_of_2


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    """x [batch, heads, seq, width], last dim contiguous, cos and sin [seq, width] contiguous -> the same shape.

    The result lies in memory as [batch, seq, heads, width]. `inverse` turns back, which is the gradient's way.
    """
    batch, heads, seq, width = x.shape
    out = x.new_empty(batch, seq, heads, width)
    if out.numel():
        half = next_power_of_2(width // 2)
        height = next_power_of_2(heads)
        while height * half > 4096:
            height //= 2
        grid = (batch * seq, ceil_div(heads, height))
        strides = x.stride()[:3]
        _rotate[grid](x, cos, sin, out, *strides, heads, seq, width, inverse, height, half, num_warps=4)
    return out.transpose(1, 2)


@triton.jit
def _rotate(
    x, cos, sin, out, stride_batch, stride_head, stride_seq, heads, seq, width,
    INVERSE: tl.constexpr, HEIGHT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = token % seq
    head = (tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)
    pair = tl.arange(0, HALF)
    is_pair = pair < width // 2
    inside = (head < heads)[:, None] & is_pair[None, :]
    turn = position * width + pair
    c1 = tl.load(cos + turn, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + turn, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        s1 = -s1
    at = token // seq * stride_batch + position * stride_seq + head[:, None] * stride_head + pair[None, :]
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + width // 2, mask=inside, other=0.0).to(tl.float32)
    to = (token * heads + head[:, None]) * width + pair[None, :]
    kind = out.dtype.element_ty
    tl.store(out + to, (first * c1 - second * s1).to(kind), mask=inside)
    tl.store(out + to + width // 2, (second * c1 + first * s1).to(kind), mask=inside)
