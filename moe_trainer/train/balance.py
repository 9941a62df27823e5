"""Balance without a loss: each expert's bias moves a fixed step towards the mean load (Wang et al., 2024)."""

from collections.abc import Sequence

import torch

from moe_trainer.models.router import GroupedSigmoidRouter


@torch.no_grad()
def balance_experts(
    routers: Sequence[GroupedSigmoidRouter], counts: torch.Tensor, is_finite: torch.Tensor, rate: float
) -> None:
    """Move the routers' biases, unless the step is skipped.

    Args:
        counts: [sparse layers, experts] of the global batch, equal on every rank: so the biases stay equal.
        is_finite: whether the step is taken, a scalar on the device.
        rate: of the move.
    """
    for router, load in zip(routers, counts, strict=bool(routers)):
        if router.weight.requires_grad:  # else frozen with all that decides
            move = rate * torch.sign(load.mean() - load)
            router.expert_bias += move.masked_fill(~is_finite, 0)
