"""A weight in the type that it is computed with, and its gradient's way back to the master weight."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moe_trainer.kernels.backend import has_kernel
from moe_trainer.parallel.shards import local_part


def compute_copy(master: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
    """The rank's part of a master weight (a DTensor) in `dtype`; its own values where that is the master's type.

    Its gradient becomes the master's as the matrix products gave it, in `dtype`: widened, it would say no more and
    take two more passes over memory. From the second micro-batch on gradients are summed in float32 at least.
    """
    local = local_part(master)
    if not (master.requires_grad and torch.is_grad_enabled()):
        return local.to(dtype)
    master.grad_dtype = None  # any
    # Something that wants a gradient, so that autograd comes by; the master would want one of its own type.
    anchor = torch.empty(0, device=local.device, requires_grad=True)
    return _ComputeCopy.apply(anchor, master, dtype)


class _ComputeCopy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, master: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
        ctx.master = [master]  # in a list: no input of this function
        return local_part(master).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None]:
        _deliver(grad, ctx.master[0])
        return None, None, None


def _deliver(grad: torch.Tensor, master: nn.Parameter) -> None:
    if master.grad is not None:
        widen_gradients([master])
        local_part(master.grad).add_(grad)
        return
    # Only our own kernels take a gradient of another type than the weight's.
    total = (grad if has_kernel(grad) else grad.to(master.dtype)).contiguous()  # fused AdamW reads it as such
    master.grad = DTensor.from_local(total, master.device_mesh, master.placements, run_check=False)


def widen_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients to float32 at least, whatever the parameters' type, so that those of more micro-batches are summed in
    it: FSDP, too, adds to what is there."""
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None and grad.dtype is torch.bfloat16:
            parameter.grad_dtype = None  # any
            parameter.grad = grad.float()
