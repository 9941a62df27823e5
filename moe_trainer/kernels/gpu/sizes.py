"""Sizes of grids and blocks, which the host works out a hundred times a layer.

Triton's own `cdiv` and `next_power_of_2` see on every call whether they run on the device: 4 us instead of 0.1.
"""

import functools

import torch
import torch.distributed as dist


def ceil_div(size: int, block: int) -> int:
    """Blocks that hold `size`."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The least power of 2 that is at least `size`, which is at least 1."""
    return 1 << (size - 1).bit_length()


def programs(device: torch.device) -> int:
    """Of a kernel whose programs share all tiles and fill a multiprocessor each: one for each of those. Where there
    are collectives, which occupy some, four, one after the other, so that the others take over."""
    return (4 if dist.is_initialized() and dist.get_world_size() > 1 else 1) * multiprocessors(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 2 elsewhere, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
