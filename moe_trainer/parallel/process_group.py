"""This process as one rank of a world."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from moe_trainer.config.schema import DeviceName


@contextmanager
def process_group(device: DeviceName) -> Iterator[torch.device]:
    """Join the world that torchrun describes, or be a world of one; leave it at the end.

    CUDA tensors travel by NCCL, CPU tensors and Python objects by gloo.

    Args:
        device: `cpu` or `cuda`, already decided.

    Yields:
        This rank's device.
    """
    if device is DeviceName.cuda:
        torch_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(torch_device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        torch_device, backend = torch.device("cpu"), "gloo"
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE") and sys.platform == "linux":
        # One machine: do not depend on what its host name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield torch_device
    finally:
        dist.destroy_process_group()
