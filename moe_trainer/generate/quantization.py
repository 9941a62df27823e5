"""A loaded model with its linear and expert weights in 8 bits."""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from moe_trainer.config.choices import Quantization
from moe_trainer.kernels.local_part import local_part
from moe_trainer.kernels.quantize import Quantized, quantize, quantized_grouped_linear, quantized_linear
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.linear import Linear
from moe_trainer.models.moe import Experts

_DTYPES = {Quantization.int8: torch.int8, Quantization.fp8: torch.float8_e4m3fn}


@torch.no_grad()
def quantize_model(model: CausalLM, quantization: Quantization) -> None:
    """Replace the weights of the layers' linear and expert modules by 8-bit ones, in place, one after the other.

    Each rank rounds its own shard. A row that is split between ranks (`rowwise`) has a scale on each rank, so results
    differ from one process's by less than the rounding itself. Embedding, head, norms and routers stay as they are:
    there small differences decide about tokens and experts. So does a projection that is whole on every rank of a
    split model and used in part.
    """
    if quantization is Quantization.none:
        return
    dtype = _DTYPES[quantization]
    for module in model.modules():
        if isinstance(module, Experts):
            _quantize_experts(module, dtype)
        elif isinstance(module, Linear) and module is not model.lm_head and not _is_whole_on_each_rank(module.weight):
            weight = quantize(local_part(module.weight), dtype)
            module.weight = nn.Parameter(weight.values, requires_grad=False)
            module.compute = _linear(weight)


def _is_whole_on_each_rank(weight: torch.Tensor) -> bool:
    return isinstance(weight, DTensor) and not isinstance(weight.placements[0], Shard)


def _linear(weight: Quantized) -> Callable[..., torch.Tensor]:
    def compute(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = quantized_linear(x, weight._replace(values=values))
        return out if bias is None else out + bias

    return compute


def _quantize_experts(module: Experts, dtype: torch.dtype) -> None:
    """The products in 8 bits; activation and biases as they are."""
    scales = {}
    for name in ("gate_up_proj", "down_proj"):
        weight = quantize(local_part(getattr(module, name)), dtype)
        setattr(module, name, nn.Parameter(weight.values, requires_grad=False))
        scales[name] = weight.scale

    def product(rows: torch.Tensor, name: str, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return quantized_grouped_linear(rows, Quantized(values.flatten(1, -2), scales[name].flatten(1)), offsets)

    module.product = product
