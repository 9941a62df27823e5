"""Root mean square norm with its own backward, which keeps the input and one number a row."""

from typing import Any

import torch

from moe_trainer.kernels.backend import has_kernel


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


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        from moe_trainer.kernels.gpu import norm as gpu

        out, inverse_rms = gpu.rms_norm(_rows(x), weight, eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        from moe_trainer.kernels.gpu import norm as gpu

        x, weight, inverse_rms = ctx.saved_tensors
        grad_x, grad_weight = gpu.rms_norm_backward(_rows(grad), _rows(x), weight, inverse_rms)
        return grad_x.view(x.shape), grad_weight.to(weight.dtype), None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., width] -> [rows, width], one row after the other in memory: part of a wider tensor is copied."""
    return x.contiguous().view(-1, x.shape[-1])
