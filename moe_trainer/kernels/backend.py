"""Which tensors our own kernels take."""

import os

import torch

uses_reference = os.environ.get("MOE_TRAINER_KERNELS") == "reference"
"""Read once: a layer asks fifty times."""


def has_kernel(x: torch.Tensor) -> bool:
    """Whether a kernel of ours computes for this tensor: on CUDA, in bfloat16 or float32, unless the environment had
    MOE_TRAINER_KERNELS=reference at the import; then PyTorch computes the same formulas."""
    return x.dtype in (torch.bfloat16, torch.float32) and _is_on(x)


def has_grouped_gemm(rows: torch.Tensor) -> bool:
    """Whether a kernel of ours multiplies these rows by their experts' weights: in bfloat16 or fp8, on Hopper."""
    is_small = rows.dtype in (torch.bfloat16, torch.float8_e4m3fn)
    return is_small and _is_on(rows) and torch.cuda.get_device_capability(rows.device) == (9, 0)


def has_sort(index: torch.Tensor) -> bool:
    """Whether a kernel of ours sorts these numbers of experts."""
    return index.dtype is torch.int64 and _is_on(index)


def _is_on(x: torch.Tensor) -> bool:
    return x.is_cuda and not uses_reference
