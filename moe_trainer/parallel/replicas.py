"""Whether ranks that hold the same part of a tensor hold the same bits.

They compute the same from the same, so a difference is a fault of a machine (or of the program): such a run goes on
learning, with weights that no checkpoint can hold. Dixit et al., "Silent Data Corruptions at Scale" (2021).
"""

from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
import torch.distributed as dist

from moe_trainer.kernels.local_part import local_part
from moe_trainer.parallel.shards import local_box

_CHUNK = 1 << 22
"""Values hashed at a time."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(tensors: Mapping[str, torch.Tensor], step: int) -> None:
    """Raises RuntimeError, on every rank, where ranks hold different bits of the same tensor. Collective."""
    differing = differing_replicas(tensors)
    if differing:
        raise RuntimeError(
            f"step {step}: ranks that must hold the same bits do not ({len(differing)} tensors): "
            f"{'; '.join(differing[:8])}; a fault of that rank's machine, or of the program"
        )


def differing_replicas(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """A line for each tensor of which ranks hold different bits, with the ranks in the minority. Collective.

    Args:
        tensors: the same names on every rank; DTensors or plain tensors, which all ranks hold whole.
    """
    names = list(tensors)
    here = local_part(tensors[names[0]]).device  # moments may lie in host memory
    digests = [digest(local_part(tensors[name])).to(here, non_blocking=True) for name in names]
    digests = torch.stack(digests).tolist()  # one read of the device
    boxes = [tuple((part.start, part.stop) for part in local_box(tensors[name])) for name in names]
    ranks: list[list[tuple[object, list[int]]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(ranks, list(zip(boxes, digests, strict=True)))
    lines = []
    for number, name in enumerate(names):
        held: dict[object, dict[int, tuple[int, ...]]] = defaultdict(dict)
        for rank, parts in enumerate(ranks):
            box, found = parts[number]
            held[box][rank] = tuple(found)
        for copies in held.values():
            usual = Counter(copies.values()).most_common(1)[0][0]
            odd = [rank for rank, found in copies.items() if found != usual]
            if odd:
                lines.append(f"{name} on rank {', '.join(map(str, odd))} of ranks {', '.join(map(str, copies))}")
    return lines


def digest(values: torch.Tensor) -> torch.Tensor:
    """Two sums over the bits as integers [2], the second one by place; whole numbers, so their order is no matter.
    On the tensor's device."""
    bits = values.contiguous().view(_BITS[values.element_size()]).flatten()
    total = torch.zeros(2, dtype=torch.int64, device=values.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        places = torch.arange(start + 1, start + 1 + len(part), device=values.device)
        total += torch.stack((part.sum(), (part * places).sum()))
    return total
