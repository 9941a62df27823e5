"""A weight in the type that it is computed with, and its gradient's way back to the master weight."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moe_trainer.kernels.accumulate import accumulate
from moe_trainer.kernels.backend import has_kernel
from moe_trainer.kernels.kept_copy import kept_copy
from moe_trainer.kernels.local_part import local_part


def compute_with_copies(module: nn.Module, dtype: torch.dtype, keep: bool) -> None:
    """Let the module's forward pass find copies of its own weights in `dtype` where it looks for the weights."""
    forward = module.forward

    def on_copies(*args: Any, **kwargs: Any) -> Any:
        masters = dict(module._parameters)
        present = {name: master for name, master in masters.items() if master is not None}
        module._parameters.update({name: compute_copy(master, dtype, keep) for name, master in present.items()})
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(masters)

    module.forward = on_copies


def compute_copy(master: nn.Parameter, dtype: torch.dtype, keep: bool = False) -> torch.Tensor:
    """The rank's part of a master weight in `dtype`; its own values where that is the master's type.

    Its gradient becomes the master's as the matrix products gave it, in `dtype`: widened, it would say no more and
    take two more passes over memory. From the second micro-batch on gradients are summed in float32 at least.

    Args:
        keep: the copy from step to step, which takes memory and no time: `kernels.kept_copy`.
    """
    if not (master.requires_grad and torch.is_grad_enabled()):
        return _copy(master, dtype, keep)
    master.grad_dtype = None  # any
    # Something that wants a gradient, so that autograd comes by; the master would want one of its own type.
    anchor = torch.empty(0, device=master.device, requires_grad=True)
    return _ComputeCopy.apply(anchor, master, dtype, keep)


def _copy(master: nn.Parameter, dtype: torch.dtype, keep: bool) -> torch.Tensor:
    return kept_copy(master, dtype) if keep else local_part(master).to(dtype)


class _ComputeCopy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, master: nn.Parameter, dtype: torch.dtype, keep: bool) -> torch.Tensor:
        ctx.master = [master]  # in a list: no input of this function
        return _copy(master, dtype, keep)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None, None]:
        _deliver(grad, ctx.master[0])
        return None, None, None, None


def _deliver(grad: torch.Tensor, master: nn.Parameter) -> None:
    grad = grad.contiguous()  # fused AdamW reads it as such
    if master.grad is not None:
        total = accumulate(local_part(master.grad), grad)
    else:  # only our own kernels take a gradient of another type than the weight's
        total = grad if has_kernel(grad) else grad.to(master.dtype)
    if isinstance(master, DTensor):
        # With the whole's shape and stride, which the host would otherwise work out anew.
        whole = {"shape": master.shape, "stride": master.stride()}
        total = DTensor.from_local(total, master.device_mesh, master.placements, run_check=False, **whole)
    master.grad = total


def widen_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients to float32 at least, whatever the parameters' type, so that FSDP, which adds to what is there, sums
    those of more micro-batches in it."""
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None and grad.dtype is torch.bfloat16:
            parameter.grad_dtype = None  # any
            parameter.grad = grad.float()
