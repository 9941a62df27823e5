"""Which tensors our own kernels take."""

import torch


def has_kernel(x: torch.Tensor) -> bool:
    """Whether a Triton kernel computes for this tensor: on CUDA, in bfloat16 or float32."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float32)
