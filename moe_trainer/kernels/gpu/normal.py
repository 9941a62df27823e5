"""Normal random numbers that depend on the seed and the place alone, not on the GPU's size as PyTorch's do."""

import torch
import triton
import triton.language as tl

from moe_trainer.kernels.gpu.sizes import ceil_div

_BLOCK = 1024


def normal_(out: torch.Tensor, seed: int, std: float) -> torch.Tensor:
    """Fill a contiguous float32 tensor: element `i` is a function of (seed, i), by a counter-based generator (Salmon
    et al., 2011), never farther than 5.7 standard deviations from zero. `seed`: below 2**63."""
    if out.numel():
        _normal[(ceil_div(out.numel(), _BLOCK),)](out, seed, std, out.numel(), _BLOCK)
    return out


@triton.jit(do_not_specialize=["seed"])
def _normal(out, seed, std, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.randn(seed, at) * std, mask=at < size)
