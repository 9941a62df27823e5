"""A cap on the tokens of an expert (GShard, Lepikhin et al., 2020; Switch Transformer, Fedus et al., 2021)."""

import math

import torch

from moe_trainer.kernels.permute import sort_by_expert


def within_capacity(top_k_index: torch.Tensor, num_experts: int, capacity_factor: float) -> torch.Tensor:
    """The choices, with `num_experts`, which stands for no expert, where an expert has as many tokens as it may.

    An expert takes `capacity_factor` times its even share of all choices, rounded up. Earlier positions go first, so
    what becomes of a token depends on no later one; at a position the sequences follow in their order.

    Args:
        top_k_index: [batch, seq, top_k], of the whole micro-batch.
    """
    by_position = top_k_index.transpose(0, 1)  # [seq, batch, top_k]
    choices = by_position.flatten(0, 1)
    capacity = math.ceil(capacity_factor * choices.numel() / num_experts)
    routes = sort_by_expert(choices, num_experts)
    starts = torch.nn.functional.pad(routes.offsets[:-1], (1, 0))
    place = routes.inverse - starts[choices.flatten()]  # among the choices of its expert
    limited = choices.flatten().masked_fill(place >= capacity, num_experts)
    return limited.view_as(by_position).transpose(0, 1)
