"""Which tensors our own kernels take."""

import os

import torch


def has_kernel(x: torch.Tensor) -> bool:
    """Whether a kernel of ours computes for this tensor: on CUDA, in bfloat16 or float32, unless the environment has
    MOE_TRAINER_KERNELS=reference; then PyTorch computes the same formulas."""
    is_taken = x.is_cuda and x.dtype in (torch.bfloat16, torch.float32)
    return is_taken and os.environ.get("MOE_TRAINER_KERNELS") != "reference"
