"""A weight in the type that it is computed with."""

from typing import Any

import torch

from moe_trainer.kernels.backend import has_kernel


def cast_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `weight.to(dtype)`; on a GPU its gradient is widened at the speed of the memory, which `to` is not."""
    return weight if weight.dtype is dtype else _CastWeight.apply(weight, dtype)


class _CastWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.dtype = weight.dtype
        return weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        if not has_kernel(grad):
            return grad.to(ctx.dtype), None
        from moe_trainer.kernels.gpu import cast as gpu

        return gpu.widen(grad.contiguous(), ctx.dtype), None
