"""Matrix products in fp8 (e4m3) for training: both factors rounded as they come, the result in their own type.

Each row of the left factor and each column of the right one has a scale of its own, so a large value costs its own
row or column precision and no other (the row-wise scaling of PyTorch's float8 training). The products
with the weight, forward and backward, are taken so; the weight's own gradient, which an optimizer sums up over many
steps, stays an exact product.
"""

from typing import Any

import torch

from moe_trainer.kernels.backend import has_kernel
from moe_trainer.kernels.quantize import FP8, Quantized, quantize, scaled_grouped_product, scaled_product


def multiply_fp8(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """As `grouped_gemm.multiply`, [rows, a] x [num_experts, a, b] -> [rows, b], in fp8."""
    return scaled_grouped_product(quantize(rows, FP8), quantize_columns(weight), offsets, rows.dtype)


def linear_fp8(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[..., in] x [out, in] -> [..., out] in fp8, differentiable."""
    return _Linear.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        rows, weight = ctx.saved_tensors
        grad_rows = _product(grad, weight) if ctx.needs_input_grad[0] else None
        return grad_rows, grad.t() @ rows if ctx.needs_input_grad[1] else None


def _product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[rows, a] x [a, b] -> [rows, b]."""
    return scaled_product(quantize(rows, FP8), quantize_columns(weight), rows.dtype)


def quantize_columns(weight: torch.Tensor) -> Quantized:
    """[..., a, b] -> fp8 with a scale for each column, transposed: values [..., b, a], scale [..., b]."""
    if has_kernel(weight) and weight.is_contiguous():
        from moe_trainer.kernels.gpu import fp8 as gpu

        values, scale = gpu.quantize_columns(weight.view(-1, *weight.shape[-2:]))
        return Quantized(values.view(*weight.shape[:-2], *values.shape[1:]), scale.view(*weight.shape[:-2], -1))
    return quantize(weight.mT, FP8)
