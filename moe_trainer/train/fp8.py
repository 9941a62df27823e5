"""Training in fp8: which products of a model are taken so."""

import torch

from moe_trainer.config.errors import ConfigError
from moe_trainer.kernels.fp8 import linear_fp8, multiply_fp8
from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.linear import Linear
from moe_trainer.models.moe import Experts


def compute_in_fp8(model: CausalLM, device: torch.device) -> None:
    """Let the linear and expert modules of the layers multiply in fp8, forward and backward (see `kernels.fp8`).

    Embedding, head, norms and routers compute as before: there small differences decide about tokens and experts.
    Without a GPU the same rounding is followed by exact products.

    Raises:
        ConfigError: a GPU that has no such products, or a linear layer whose part on a rank they do not take.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"compute=fp8: {name} has no fp8 products with a scale for each row; use compute=dtype")
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, Experts):  # whose widths the config has checked
            module.multiply = multiply_fp8
        elif isinstance(module, Linear):
            rows, columns = local_part(module.weight).shape
            if rows % 16 or columns % 16:
                raise ConfigError(
                    f"compute=fp8: {name} has a weight of {rows} x {columns} on a rank, and such products take "
                    "multiples of 16; change the model's widths or parallel.tp, or use compute=dtype"
                )
            module.compute = _compute


def _compute(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = linear_fp8(x, weight)
    return out if bias is None else out + bias
