"""Initial weights that do not depend on the mesh."""

import hashlib

import torch
from torch import nn

from moe_trainer.kernels.backend import has_kernel
from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.lora import is_adapter
from moe_trainer.models.moe import Experts
from moe_trainer.models.norm import RMSNorm
from moe_trainer.parallel.shards import local_box


@torch.no_grad()
def initialize(model: nn.Module, seed: int, std: float) -> None:
    """Fill each rank's shards: norms with one, biases and buffers with zero, matrices from a normal distribution.

    Each parameter, and each expert of an expert weight, has its own random stream, seeded by (seed, name, expert) and
    drawn in float32. A rank draws one such tensor at a time and keeps its part, so it holds at most its share and one
    tensor, and every mesh starts from the same weights: on GPUs, which draw them a hundred times as fast, from others
    than on CPUs.
    """
    for buffer in model.buffers():
        buffer.zero_()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            local = local_part(parameter)
            if is_adapter(name):
                _initialize_adapter(name, parameter, seed)
            elif isinstance(module, RMSNorm):
                local.fill_(1.0)
            elif name.endswith("bias"):
                local.zero_()
            elif isinstance(module, Experts):
                experts, *rest = local_box(parameter)
                for row, expert in enumerate(range(experts.start, experts.stop)):
                    local[row] = _draw(f"{seed}:{name}:{expert}", parameter.shape[1:], std, local)[tuple(rest)]
            else:
                local.copy_(_draw(f"{seed}:{name}", parameter.shape, std, local)[local_box(parameter)])


@torch.no_grad()
def initialize_adapters(model: nn.Module, seed: int) -> None:
    """Fill the adapters alone: A from a normal distribution of variance 1 / in, B with zero, so they add nothing."""
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            _initialize_adapter(name, parameter, seed)


def _initialize_adapter(name: str, parameter: nn.Parameter, seed: int) -> None:
    local, std = local_part(parameter), parameter.shape[-1] ** -0.5
    if name.endswith("lora_b"):
        local.zero_()
    else:
        local.copy_(_draw(f"{seed}:{name}", parameter.shape, std, local)[local_box(parameter)])


def _draw(key: str, shape: torch.Size, std: float, like: torch.Tensor) -> torch.Tensor:
    """On the device of `like`."""
    digest = hashlib.sha256(key.encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    if has_kernel(like):
        from moe_trainer.kernels.gpu.normal import normal_

        return normal_(torch.empty(shape, device=like.device), seed, std)
    return torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(seed))
