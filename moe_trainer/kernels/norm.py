"""Root mean square norm with its own backward, which keeps the input and one number a row."""

from typing import Any

import torch

from moe_trainer.kernels.backend import has_kernel
from moe_trainer.kernels.rope import rotate


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / rms(x) * weight` over the last dim (Zhang and Sennrich, 2019), computed in float32 at least.

    Args:
        x: [..., width].
        weight: [width].
    """
    if has_kernel(x):
        return _RMSNorm.apply(x, weight, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rms_norm_rotated(
    x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The norm of each head, turned by its position's angles: one pass instead of two.

    Args:
        x: [batch, seq, heads, width].
        weight: [width].
        cos: as for `rope.rotate`; likewise sin.

    Returns:
        [batch, heads, seq, width]; with our kernel it lies in memory as [batch, seq, heads, width].
    """
    if has_kernel(x) and cos.ndim == 2:
        return _RMSNorm.apply(x, weight, eps, cos, sin).transpose(1, 2)
    return rotate(rms_norm(x, weight, eps).transpose(1, 2), cos, sin)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
    ) -> torch.Tensor:
        from moe_trainer.kernels.gpu import norm as gpu

        turn = None if cos is None else gpu.Turn(cos, sin, x.shape[-2])
        out, inverse_rms = gpu.rms_norm(_rows(x), weight, eps, turn)
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.turn = turn  # all layers' the same: nothing that activation checkpointing would have to forget
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from moe_trainer.kernels.gpu import norm as gpu

        x, weight, inverse_rms = ctx.saved_tensors
        grad_x, grad_weight = gpu.rms_norm_backward(_rows(grad), _rows(x), weight, inverse_rms, ctx.turn)
        return grad_x.view(x.shape), grad_weight.to(weight.dtype), None, None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., width] -> [rows, width], one row after the other in memory: part of a wider tensor is copied."""
    return x.contiguous().view(-1, x.shape[-1])
