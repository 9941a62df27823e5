"""One matrix product for each expert, over rows sorted by expert."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from moe_trainer.kernels.backend import has_grouped_gemm

Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows [rows, a], weight [num_experts, a, b], offsets) -> [rows, b], without autograd; such as `multiply`."""


def grouped_gemm_supported(dtype: torch.dtype, *widths: int) -> bool:
    """Whether PyTorch's grouped GEMM takes this type and these inner widths.

    It wants rows of whole 16 bytes (8 values in bf16, 4 in fp32) and knows no float64; elsewhere the experts run one
    after the other.
    """
    return dtype in (torch.bfloat16, torch.float32) and all(width * dtype.itemsize % 16 == 0 for width in widths)


_FEW_ROWS, _NARROW = 4096, 128
"""Below these a product is no work for a whole GPU, or a tile mostly empty."""


def is_for_kernel(rows: torch.Tensor, *widths: int) -> bool:
    """Whether our own kernel multiplies these rows: has_grouped_gemm, and enough of them."""
    is_worth_it = len(rows) >= _FEW_ROWS and min(widths) >= _NARROW
    return is_worth_it and has_grouped_gemm(rows) and rows.stride(1) == 1


def grouped_linear(
    rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, product: Multiply | None = None
) -> torch.Tensor:
    """`rows @ weight[e].T` for the rows of each expert e.

    Args:
        rows: [rows, in], sorted by expert.
        weight: [num_experts, out, in].
        offsets: [num_experts] int32, the end of each expert's rows; equal ends mean an expert without rows.
        product: takes the products with the weight, forward and backward; None: `multiply`.

    Returns:
        [rows, out]. Rows at and past `offsets[-1]` belong to no expert: their values are undefined, and so are those
        of their gradient. The weight's gradient is always dense, zero for an expert without rows: a rank that
        receives no token still takes part in the gradient's reduction.
    """
    return _GroupedLinear.apply(rows, weight, offsets, product or multiply)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, product: Multiply
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight, offsets)
        ctx.product = product
        return product(rows, weight.transpose(-2, -1), offsets)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = ctx.product(grad, weight, offsets) if ctx.needs_input_grad[0] else None
        grad_weight = outer(grad, rows, offsets) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_weight, None, None


def expert_of_rows(num_rows: int, offsets: torch.Tensor) -> torch.Tensor:
    """[rows] int64, the expert of each sorted row; any for a row of none."""
    numbers = torch.arange(num_rows, device=offsets.device)
    return torch.bucketize(numbers, offsets, right=True).clamp_(max=len(offsets) - 1)


def sum_rows(rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[rows, width] -> [num_experts, width], the sum of each expert's rows, without autograd: a product with ones,
    deterministic, and not one row after the other as a sum by index is."""
    ones = rows.new_ones(len(rows), 16 // rows.itemsize)  # as wide as the grouped product wants it at least
    return outer(rows, ones, offsets)[..., 0]


def multiply(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[rows, a] x [num_experts, a, b] -> [rows, b], without autograd."""
    if grouped_gemm_supported(rows.dtype, *weight.shape[1:]) and len(rows):
        if is_for_kernel(rows, *weight.shape[1:]) and 1 in weight.stride()[1:]:
            from moe_trainer.kernels.gpu import grouped_gemm as gpu

            return gpu.multiply(rows, weight, offsets)
        return F.grouped_mm(rows, weight, offs=offsets)
    out = rows.new_zeros(len(rows), weight.shape[2])
    if not len(rows):
        return out
    for expert, (start, stop) in enumerate(_spans(offsets)):
        torch.mm(rows[start:stop], weight[expert], out=out[start:stop])
    return out


def outer(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[rows, a] and [rows, b] -> [num_experts, a, b], summed over each expert's rows, without autograd."""
    if grouped_gemm_supported(left.dtype, left.shape[1], right.shape[1]) and len(left):
        if is_for_kernel(left, left.shape[1], right.shape[1]) and right.stride(1) == 1:
            from moe_trainer.kernels.gpu import grouped_gemm as gpu

            return gpu.outer(left, right, offsets)
        return F.grouped_mm(left.transpose(0, 1), right, offs=offsets)
    out = left.new_zeros(len(offsets), left.shape[1], right.shape[1])
    if not len(left):
        return out
    for expert, (start, stop) in enumerate(_spans(offsets)):
        torch.mm(left[start:stop].transpose(0, 1), right[start:stop], out=out[expert])
    return out


def _spans(offsets: torch.Tensor) -> list[tuple[int, int]]:
    """(start, stop) of each expert's rows; reads the offsets on the host, which only the loop needs."""
    stops = offsets.tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))
