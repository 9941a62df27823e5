"""Tensors in 8 bits, with one scale for each output channel.

`int8` keeps activations as they are (weight-only). `fp8` (e4m3) rounds activations too, with one scale for each row,
and multiplies in fp8 through PyTorch's scaled matrix products where the GPU has them; elsewhere the same rounding is
followed by an exact product, so results agree up to the order of summation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from moe_trainer.kernels.backend import has_kernel
from moe_trainer.kernels.grouped_gemm import grouped_linear, is_for_kernel, multiply

FP8 = torch.float8_e4m3fn


class Quantized(NamedTuple):
    """`values * scale.unsqueeze(-1)` stands for the weight."""

    values: torch.Tensor
    """[..., out, in] int8 or float8_e4m3fn."""
    scale: torch.Tensor
    """[..., out] float32."""

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """[..., out, in]."""
        return (self.values.float() * self.scale.unsqueeze(-1)).to(dtype)


def quantize(weight: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """Round [..., out, in] to `dtype`, int8 or float8_e4m3fn: each row's largest value becomes the largest there."""
    if dtype is FP8 and has_kernel(weight):
        from moe_trainer.kernels.gpu import fp8 as gpu

        return Quantized(*gpu.quantize_rows(weight.contiguous()))
    largest = 127.0 if dtype is torch.int8 else torch.finfo(dtype).max
    wide = weight.float()
    scale = wide.abs().amax(-1).clamp(min=1e-12) / largest
    scaled = wide / scale.unsqueeze(-1)
    return Quantized(scaled.round().to(dtype) if dtype is torch.int8 else scaled.to(dtype), scale)


def quantized_linear(x: torch.Tensor, weight: Quantized) -> torch.Tensor:
    """[..., in] x [out, in] -> [..., out], in x's type."""
    if weight.values.dtype is torch.int8:
        return F.linear(x, weight.values.to(x.dtype)) * weight.scale.to(x.dtype)
    return scaled_product(quantize(x.flatten(0, -2), FP8), weight, x.dtype).unflatten(0, x.shape[:-1])


def quantized_grouped_linear(rows: torch.Tensor, weight: Quantized, offsets: torch.Tensor) -> torch.Tensor:
    """As `grouped_linear`: rows [rows, in] sorted by expert, weight [num_experts, out, in] -> [rows, out]."""
    if weight.values.dtype is torch.int8:
        return grouped_linear(rows, weight.dequantize(rows.dtype), offsets)
    return scaled_grouped_product(quantize(rows, FP8), weight, offsets, rows.dtype)


def scaled_product(rows: Quantized, weight: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """fp8 [rows, in] x [out, in] -> [rows, out] in `dtype`."""
    if _has_scaled_products(rows, weight, dtype):
        scales = {"scale_a": rows.scale.unsqueeze(1), "scale_b": weight.scale.unsqueeze(0)}
        return torch._scaled_mm(rows.values, weight.values.t(), **scales, out_dtype=dtype, use_fast_accum=True)
    return F.linear(rows.dequantize(torch.float32), weight.dequantize(torch.float32)).to(dtype)


def scaled_grouped_product(
    rows: Quantized, weight: Quantized, offsets: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """fp8 [rows, in] sorted by expert x [num_experts, out, in] -> [rows, out] in `dtype`."""
    if _has_scaled_products(rows, weight, dtype):
        if is_for_kernel(rows.values, *weight.values.shape[1:]):
            from moe_trainer.kernels.gpu import grouped_gemm as gpu

            return gpu.multiply_scaled(*rows, *weight, offsets)
        scales = {"scale_a": rows.scale, "scale_b": weight.scale}
        values = rows.values, weight.values.mT
        return torch._scaled_grouped_mm(*values, **scales, offs=offsets, out_dtype=dtype, use_fast_accum=True)
    return multiply(rows.dequantize(torch.float32), weight.dequantize(torch.float32).mT, offsets).to(dtype)


def _has_scaled_products(rows: Quantized, weight: Quantized, dtype: torch.dtype) -> bool:
    """Row-wise scaled products exist from Hopper on, for bfloat16 results and widths of whole 16 bytes."""
    return (
        rows.values.is_cuda
        and dtype is torch.bfloat16
        and len(rows.values) > 0
        and torch.cuda.get_device_capability(rows.values.device) >= (9, 0)
        and all(width % 16 == 0 for width in weight.values.shape[-2:])
    )
