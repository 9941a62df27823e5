"""Rotary position embedding, in the half-split layout."""

from typing import Any

import torch

from moe_trainer.kernels.backend import has_kernel


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + width / 2) of x [batch, heads, seq, width] by its angle.

    Args:
        cos: [seq, width], or anything that broadcasts to x; likewise sin.
    """
    if has_kernel(x) and cos.ndim == 2 and x.stride(-1) == 1:
        return _Rotate.apply(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        from moe_trainer.kernels.gpu import rope as gpu

        ctx.save_for_backward(cos, sin)
        return gpu.rotate(x, cos, sin, inverse=False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        from moe_trainer.kernels.gpu import rope as gpu

        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        return gpu.rotate(grad, *ctx.saved_tensors, inverse=True), None, None
