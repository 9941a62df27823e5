"""Clipping by the global norm of gradients that live on different meshes."""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from moe_trainer.kernels.local_part import local_part
from moe_trainer.kernels.sum_of_squares import sum_of_squares


def grad_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Global L2 norm of all gradients, a scalar on the device, equal on every rank.

    Each rank sums the squares of its own shards, a shard that several ranks hold divided among them, and one
    all-reduce of one number over all ranks makes the global sum. Nothing is read on the host.
    """
    # Every parameter has a gradient after a backward pass, zero for an expert without tokens.
    groups: dict[tuple[torch.dtype, int], list[torch.Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            groups[parameter.grad.dtype, _copies(parameter)].append(local_part(parameter.grad))
    total = torch.stack([sum_of_squares(grads) / copies for (_, copies), grads in groups.items()]).sum()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.sqrt()


def clip_factor(norm: torch.Tensor, max_norm: float | torch.Tensor) -> torch.Tensor:
    """What gradients of this norm are multiplied by to have at most `max_norm` (Pascanu et al., 2013); not a number
    where the norm is not finite, which no factor mends, or the maximum is not a number."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return factor.masked_fill(~norm.isfinite(), torch.nan)


def _copies(parameter: nn.Parameter) -> int:
    """How many ranks of the world hold the same shard."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(parameter, DTensor):
        return world
    shards = 1
    for axis, placement in enumerate(parameter.placements):
        if not isinstance(placement, Replicate):
            shards *= parameter.device_mesh.size(axis)
    return world // shards
