"""A step taken twice: the same weights and samples must give the same bits.

If they do not, a machine computes wrongly now and then, which no error reports (Dixit et al., "Silent Data
Corruptions at Scale", 2021; Hochschild et al., "Cores that don't count", 2021).
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.decoder import CausalLM
from moe_trainer.observe.metrics import RouterEntropy
from moe_trainer.parallel.replicas import digest
from moe_trainer.train.loss import Losses
from moe_trainer.train.watch import watching

_GRADIENT = "gradient of "
Take = Callable[[RouterEntropy | None], Losses]
"""Forward and backward passes of one step, which add to the gradients; this rank's shares of the losses."""


def take_twice(model: CausalLM, take: Take, entropy: RouterEntropy | None, step: int) -> Losses:
    """Take the step, compare, and leave the second time's gradients; nothing is counted twice. Collective.

    Args:
        entropy: counts in one of the two.
        step: its number, for the message.

    Raises:
        RuntimeError: on every rank, where some rank's bits differ: it names the rank where a difference came first,
            in the order of the computation, and the parameters whose gradients differ.
    """
    first = _digests(model, lambda: take(None))[0]
    model.zero_grad()
    second, shares = _digests(model, lambda: take(entropy))
    found = [(number, name) for number, name in enumerate(second) if first[name] != second[name]]
    ranks: list[list[tuple[int, str]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    if any(ranks):
        raise RuntimeError(f"step {step}, taken twice, gave other bits: {_blame(ranks)}")
    return shares


def _digests(model: CausalLM, take: Callable[[], Losses]) -> tuple[dict[str, tuple[int, ...]], Losses]:
    """Of all that `watching` shows, the losses, and the gradients, in the order in which they are made."""
    found: dict[str, torch.Tensor] = {}
    with watching(model, lambda name, value: found.update({name: digest(value)})):
        shares = take()
    found["losses"] = digest(shares.flatten())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[_GRADIENT + name] = digest(local_part(parameter.grad))
    read = torch.stack(list(found.values())).tolist()  # one read of the device
    return dict(zip(found, map(tuple, read), strict=True)), shares


def _blame(ranks: list[list[tuple[int, str]]]) -> str:
    """`ranks`: what differed on each, numbered in the order in which it was computed."""
    earliest, name = min(found[0] for found in ranks if found)
    first = [rank for rank, found in enumerate(ranks) if found and found[0][0] == earliest]
    later = [rank for rank, found in enumerate(ranks) if found and rank not in first]
    gradients = sorted({other for found in ranks for _, other in found if other.startswith(_GRADIENT)})
    text = f"first on rank {', '.join(map(str, first))} in {name}"
    text += f", then on rank {', '.join(map(str, later))}" if later else ""
    text += f"; {', '.join(gradients[:4])}" if gradients else ""
    text += f" and {len(gradients) - 4} more" if len(gradients) > 4 else ""
    # Of a sum nobody knows which rank gave the wrong term.
    summed = " (or of one that it shares a sum with)" if name.startswith(_GRADIENT) else ""
    return f"{text}; a fault of that rank's machine{summed}, or of the program"
