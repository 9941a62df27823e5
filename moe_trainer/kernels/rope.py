"""Rotary position embedding, in the half-split layout."""

from typing import Any

import torch

from moe_trainer.kernels.backend import has_kernel


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + width / 2) of x [batch, heads, seq, width] by its angle.

    Args:
        cos: [seq, width], both halves alike; [batch * seq, width] where the rows' tokens have positions of their own;
            or anything of more dims that broadcasts to x. Likewise sin.
    """
    batch, _, seq, _ = x.shape
    if batch == 1 or cos.ndim != 2 or len(cos) == seq:
        return _Rotate.apply(x, cos, sin)
    in_one_row = x.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0)  # [1, heads, batch * seq, width]
    return _Rotate.apply(in_one_row, cos, sin).squeeze(0).transpose(0, 1).unflatten(0, (batch, seq)).transpose(1, 2)


class _Rotate(torch.autograd.Function):
    """Backward turns the gradient the other way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.turn = cos, sin  # all layers' the same: nothing that activation checkpointing would have to forget
        return _turn(x, cos, sin, inverse=False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _turn(grad, *ctx.turn, inverse=True), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    if has_kernel(x) and cos.ndim == 2:
        from moe_trainer.kernels.gpu import rope as gpu

        return gpu.rotate(x if x.stride(-1) == 1 else x.contiguous(), cos, sin, inverse)
    half, sign = x.shape[-1] // 2, -1 if inverse else 1
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out
