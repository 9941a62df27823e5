"""The router's product: float32 weights and gradients on the tensor cores, without losing their bits.

A float32 number is the sum of three bfloat16 numbers, and products of bfloat16 numbers are exact in the float32 that
tensor cores sum in. With bfloat16 tokens, which routers see, `x @ w` is therefore one bfloat16 product with three
times as many columns. In float32 proper GPUs take the scalar units, which is several times slower.
"""

from typing import Any

import torch
import torch.nn.functional as F

from moe_trainer.kernels.backend import has_kernel


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` in float32 at least: [tokens, hidden] x [num_experts, hidden] -> [tokens, num_experts]."""
    if has_kernel(x) and x.dtype is torch.bfloat16 and weight.dtype is torch.float32:
        return _RouterLogits.apply(x, weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide))


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        from moe_trainer.kernels.gpu.bfloat16_terms import stacked_terms

        terms = stacked_terms(weight)  # [4, num_experts, hidden]
        ctx.save_for_backward(x, terms)
        return _mm(x, terms[1:].flatten(0, 1).t()).unflatten(1, (3, -1)).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from moe_trainer.kernels.gpu.bfloat16_terms import joined_terms

        x, terms = ctx.saved_tensors
        grads = joined_terms(grad)  # [tokens, 4 * num_experts]
        num_experts = grad.shape[1]
        grad_weight = _mm(grads[:, : 3 * num_experts].t(), x).unflatten(0, (3, -1)).sum(0)
        # The result is rounded to bfloat16. What counts are products of two first terms, and of a second and a first:
        # the second, first and first of the gradient, and the first, first and second of the weight.
        grad_x = grads[:, num_experts:] @ terms[:3].flatten(0, 1)
        return grad_x, grad_weight


def _mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """bfloat16 in, float32 out."""
    return torch.mm(left, right, out_dtype=torch.float32)
