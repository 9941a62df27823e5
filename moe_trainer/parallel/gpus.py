"""Which GPU a rank computes on: one of its own, or by MOE_TRAINER_RANKS_PER_GPU=N one that N ranks share.

Sharing tries a mesh over NCCL on a machine with too few GPUs: its values are right and its speed says nothing. NCCL
refuses two ranks of one host on one GPU, so each rank names a host of its own, and they meet over sockets.
"""

import os
import socket

import torch

from moe_trainer.config.errors import ConfigError

_NAME = "MOE_TRAINER_RANKS_PER_GPU"


def count_places() -> int:
    """Ranks that the GPUs of this machine take.

    Raises:
        ConfigError: MOE_TRAINER_RANKS_PER_GPU is no number of ranks.
    """
    return torch.cuda.device_count() * ranks_per_gpu()


def take_gpu() -> torch.device:
    """This rank's GPU, by LOCAL_RANK, made the current one; called before NCCL is."""
    rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    device = torch.device("cuda", rank)
    if ranks_per_gpu() > 1 and gpus:
        device = torch.device("cuda", rank % gpus)
        os.environ["NCCL_HOSTID"] = f"{socket.gethostname()}-{os.environ.get('RANK', rank)}"
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    torch.cuda.set_device(device)
    return device


def ranks_per_gpu() -> int:
    """1, or as the environment says.

    Raises:
        ConfigError: it is no number of ranks.
    """
    text = os.environ.get(_NAME, "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"the environment variable {_NAME}={text} must be a number of ranks, at least 1")
    return int(text)
