"""Which floating-point types a run uses."""

import torch

from moe_trainer.config.schema import DType
from moe_trainer.parallel.fsdp import Precision


def compute_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """The configured type; `auto` is bfloat16 on CUDA and float32 on CPU."""
    if dtype is DType.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, dtype.value)


def resolve_precision(dtype: DType, reduce_dtype: DType, device: torch.device) -> Precision:
    """float32 master weights and reductions under bfloat16 compute; everything in float64 where that is asked for."""
    compute = compute_dtype(dtype, device)
    master = torch.promote_types(compute, torch.float32)
    reduce = master if reduce_dtype is DType.auto else getattr(torch, reduce_dtype.value)
    return Precision(compute, master, reduce)
