"""Weights in 8 bits for inference, with one scale for each output channel.

`int8` keeps activations as they are (weight-only). `fp8` (e4m3) rounds activations too, with one scale for each row,
and multiplies in fp8 through PyTorch's scaled matrix products where the GPU has them; elsewhere the same rounding is
followed by an exact product, so results agree up to the order of summation.
"""

from typing import NamedTuple

import torch

from moe_trainer.kernels.grouped_gemm import grouped_linear

_FP8 = torch.float8_e4m3fn


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
    largest = 127.0 if dtype is torch.int8 else torch.finfo(dtype).max
    wide = weight.float()
    scale = wide.abs().amax(-1).clamp(min=1e-12) / largest
    scaled = wide / scale.unsqueeze(-1)
    return Quantized(scaled.round().to(dtype) if dtype is torch.int8 else scaled.to(dtype), scale)


def quantized_linear(x: torch.Tensor, weight: Quantized) -> torch.Tensor:
    """[..., in] x [out, in] -> [..., out], in x's type."""
    if weight.values.dtype is torch.int8:
        return torch.nn.functional.linear(x, weight.values.to(x.dtype)) * weight.scale.to(x.dtype)
    rows = quantize(x.flatten(0, -2), _FP8)
    if _has_fp8(x, weight):
        out = torch._scaled_mm(
            rows.values,
            weight.values.t(),
            scale_a=rows.scale.unsqueeze(1),
            scale_b=weight.scale.unsqueeze(0),
            out_dtype=x.dtype,
        )
    else:
        out = torch.nn.functional.linear(rows.dequantize(torch.float32), weight.dequantize(torch.float32)).to(x.dtype)
    return out.unflatten(0, x.shape[:-1])


def quantized_grouped_linear(rows: torch.Tensor, weight: Quantized, offsets: torch.Tensor) -> torch.Tensor:
    """As `grouped_linear`: rows [rows, in] sorted by expert, weight [num_experts, out, in] -> [rows, out]."""
    if weight.values.dtype is torch.int8:
        return grouped_linear(rows, weight.dequantize(rows.dtype), offsets)
    rounded = quantize(rows, _FP8)
    if _has_fp8(rows, weight) and len(rows):
        return torch._scaled_grouped_mm(
            rounded.values,
            weight.values.transpose(-2, -1),
            scale_a=rounded.scale,
            scale_b=weight.scale,
            offs=offsets,
            out_dtype=rows.dtype,
        )
    exact = grouped_linear(rounded.dequantize(torch.float32), weight.dequantize(torch.float32), offsets)
    return exact.to(rows.dtype)


def _has_fp8(x: torch.Tensor, weight: Quantized) -> bool:
    """Row-wise scaled products exist from Hopper on, for bfloat16 results and widths of whole 16 bytes."""
    return (
        x.device.type == "cuda"
        and x.dtype is torch.bfloat16
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
        and all(width % 16 == 0 for width in weight.values.shape[-2:])
    )
