"""Low-rank adapters (LoRA, Hu et al., 2021): a frozen weight W acts as `W + alpha / rank * B A`.

The adapters of a linear layer are `lora_a` [rank, in] and `lora_b` [out, rank]; those of experts have the expert in
front: `gate_up_lora_a` [experts, rank, hidden], `gate_up_lora_b` [experts, 2, intermediate, rank], `down_lora_a`
[experts, rank, intermediate] and `down_lora_b` [experts, hidden, rank]. They are parameters of the module whose
weight they adapt, so they lie, shard and travel beside it.
"""

import torch
from torch import nn

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.patterns import matches
from moe_trainer.config.schema import LoraConfig
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.linear import Linear
from moe_trainer.models.moe import Experts


def add_adapters(model: CausalLM, lora: LoraConfig) -> None:
    """Give every module that a target names its adapters, with unset values, and freeze everything else.

    Raises:
        ConfigError: a target that names no linear layer and no experts, or a head that is the embedding.
    """
    for target in lora.targets:
        named = {name: module for name, module in model.named_modules() if matches(target, name)}
        found = {name: module for name, module in named.items() if isinstance(module, Linear | Experts)}
        if not found:
            raise ConfigError(f"lora.targets: {target} names no linear layer and no experts of the model")
        if model.is_tied and "lm_head" in found:
            raise ConfigError("lora.targets: lm_head is the embedding too (model.tie_word_embeddings); leave it out")
        for module in found.values():
            adapt(module, lora.rank, lora.alpha / lora.rank)
    freeze_base(model)


def adapt(module: Linear | Experts, rank: int, scale: float) -> None:
    """Give a module its adapters, with unset values."""
    module.lora_scale = scale
    if isinstance(module, Linear):
        out_features, in_features = module.weight.shape
        shapes = {"lora_a": (rank, in_features), "lora_b": (out_features, rank)}
    else:
        experts, hidden, intermediate = module.down_proj.shape
        shapes = {
            "gate_up_lora_a": (experts, rank, hidden),
            "gate_up_lora_b": (experts, 2, intermediate, rank),
            "down_lora_a": (experts, rank, intermediate),
            "down_lora_b": (experts, hidden, rank),
        }
    for name, shape in shapes.items():
        setattr(module, name, nn.Parameter(torch.empty(shape)))


def freeze_base(model: nn.Module) -> None:
    """Train the adapters alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def is_adapter(name: str) -> bool:
    """Whether a parameter is half of an adapter."""
    return name.endswith(("lora_a", "lora_b"))


def adapters_of(weight: str) -> tuple[str, str]:
    """The names of A and B for a weight's name, whether it has them or not."""
    stem = weight.removesuffix("_proj") + "_" if weight.endswith("_proj") else weight.removesuffix("weight")
    return f"{stem}lora_a", f"{stem}lora_b"


def product_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """B A, of the shape of the weight, for A [..., rank, in] and B [..., out, rank] or, of gate and up, [experts, 2,
    intermediate, rank]."""
    if b.ndim == 4:
        return (b.flatten(1, 2) @ a).unflatten(1, b.shape[1:3])
    return b @ a
