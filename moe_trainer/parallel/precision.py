"""Which floating-point types a run uses."""

from dataclasses import dataclass

import torch

from moe_trainer.config.choices import DType


@dataclass(frozen=True, slots=True)
class Precision:
    """Types of a run."""

    compute: torch.dtype
    """Of activations and of the weights they meet."""
    master: torch.dtype
    """Of the stored weights, but for those of norms, routers and adapters."""
    reduce: torch.dtype
    """In which gradients are summed."""

    @property
    def precise(self) -> torch.dtype:
        """In which norms and routers are stored and computed: float32 at least."""
        return torch.promote_types(self.compute, torch.float32)


def compute_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """The configured type; `auto` is bfloat16 on CUDA and float32 on CPU."""
    if dtype is DType.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, dtype.value)


def resolve_precision(
    dtype: DType, reduce_dtype: DType, device: torch.device, weights_dtype: DType = DType.auto
) -> Precision:
    """float32 master weights and reductions under bfloat16 compute; everything in float64 where that is asked for."""
    compute = compute_dtype(dtype, device)
    wide = torch.promote_types(compute, torch.float32)
    master, reduce = (
        wide if chosen is DType.auto else getattr(torch, chosen.value) for chosen in (weights_dtype, reduce_dtype)
    )
    return Precision(compute, master, reduce)
