"""`silu(gate) * up` of a dense feed-forward layer, each way in one pass over memory."""

from typing import Any

import torch
import torch.nn.functional as F

from moe_trainer.kernels.backend import has_kernel


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Two tensors of one shape and type -> `silu(gate) * up`."""
    return _SiluMul.apply(gate, up) if has_kernel(gate) else F.silu(gate) * up


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        from moe_trainer.kernels.gpu import silu_mul as gpu

        ctx.save_for_backward(gate, up)
        return gpu.silu_mul(gate.contiguous(), up.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from moe_trainer.kernels.gpu import silu_mul as gpu

        return gpu.silu_mul_backward(grad.contiguous(), *(saved.contiguous() for saved in ctx.saved_tensors))
