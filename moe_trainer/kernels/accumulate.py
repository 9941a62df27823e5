"""Gradients of several micro-batches, summed in float32."""

import torch

from moe_trainer.kernels.backend import has_kernel


def accumulate(total: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """`total + grad` in float32 at least; in the memory of `total` where that is of this type.

    Both contiguous and of one shape; PyTorch takes twice as long for two types at once.
    """
    wide = torch.promote_types(total.dtype, torch.float32)
    out = total if total.dtype is wide else torch.empty_like(total, dtype=wide)
    if has_kernel(total) and has_kernel(grad):
        from moe_trainer.kernels.gpu import accumulate as gpu

        gpu.add(total, grad, out)
        return out
    return torch.add(total.to(wide), grad, out=out)
