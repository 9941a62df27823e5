"""This process as one rank of a world."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_trainer.config.choices import DeviceName
from moe_trainer.config.errors import ConfigError
from moe_trainer.parallel.gpus import take_gpu
from moe_trainer.parallel.rendezvous import is_shared_store, store_of_this_start

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""mallopt(3)."""


@contextmanager
def process_group(device: DeviceName, timeout_seconds: float = 1800.0) -> Iterator[torch.device]:
    """Join the world that torchrun describes, or be a world of one; leave it at the end.

    CUDA tensors travel by NCCL, CPU tensors and Python objects by gloo.

    Args:
        device: `cpu` or `cuda`, already decided.
        timeout_seconds: how long a collective may wait for the other ranks.

    Yields:
        This rank's device.

    Raises:
        ConfigError: the address of the world, which the environment gives, is taken or out of reach.
    """
    if device is DeviceName.cuda:
        torch_device, backend = take_gpu(), "cpu:gloo,cuda:nccl"
    else:
        torch_device, backend = torch.device("cpu"), "gloo"
        _keep_freed_memory()
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE") and sys.platform == "linux":
        # One machine: do not depend on what its host name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if "WORLD_SIZE" in os.environ:
        try:
            _init(backend, timeout_seconds)
        except dist.DistNetworkError as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            said = str(error).splitlines()[0]
            raise ConfigError(f"MASTER_ADDR:MASTER_PORT={where} cannot be used, give another port: {said}") from error
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    is_whole = False
    try:
        yield torch_device
        is_whole = True
    finally:
        # After an exception other ranks may be in a collective, which leaving in good order would wait for.
        if is_whole or dist.get_world_size() == 1:
            dist.destroy_process_group()


def _keep_freed_memory() -> None:
    """Tensors of megabytes come and go hundreds of times a step: left alone, glibc gives their memory back to the
    system, which fills each page with zeros when it is taken again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, number in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 256 << 20)):
            mallopt(option, number)


def _init(backend: str, timeout_seconds: float) -> None:
    timeout = timedelta(seconds=timeout_seconds)
    if not is_shared_store():
        dist.init_process_group(backend, timeout=timeout)
        return
    store, rank, world_size = store_of_this_start(timeout_seconds), int(os.environ["RANK"]), os.environ["WORLD_SIZE"]
    dist.init_process_group(backend, store=store, rank=rank, world_size=int(world_size), timeout=timeout)
