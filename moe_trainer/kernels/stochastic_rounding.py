"""Rounding to bfloat16 up or down at random, so that what is too small for one step is kept on average.

A running mean in bfloat16, which has 8 bits, would otherwise forget every change below 0.4% (Gupta et al., 2015).
"""

import torch


def round_stochastically(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32, finite -> bfloat16: one of the two neighbours, the nearer one more often; the mean is `x`."""
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    # The lower half of a float32 is what bfloat16 has not; the noise carries into the upper half as often as it says.
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
