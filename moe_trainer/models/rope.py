"""Rotary position embedding (Su et al., 2021), in the half-split layout of the Hugging Face checkpoints."""

from typing import NamedTuple

import torch


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, each [seq, head_dim]."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotation(positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Angles `position / theta**(2i / head_dim)` of each pair i, computed in float32.

    Args:
        positions: [seq] integers.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float().outer(1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: torch.Tensor, rope: Rotation) -> torch.Tensor:
    """Turn each pair (i, i + head_dim / 2) of x [batch, heads, seq, head_dim] by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * rope.cos + torch.cat((-second, first), dim=-1) * rope.sin
