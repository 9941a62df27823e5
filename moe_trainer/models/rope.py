"""Rotary position embedding (Su et al., 2021), in the half-split layout of the Hugging Face checkpoints."""

import math
from typing import NamedTuple

import torch

from moe_trainer.config.choices import RopeType
from moe_trainer.config.schema import RopeConfig


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, each [seq, width]; [batch * seq, width] where the rows' tokens have
    positions of their own."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotation(positions: torch.Tensor, width: int, rope: RopeConfig, dtype: torch.dtype) -> Rotation:
    """Angles of each position and pair, computed in float32.

    Args:
        positions: [seq] integers.
        width: rotated dims of a head.
    """
    frequencies, scale = _frequencies(width, rope, positions.device)
    angles = positions.float().outer(frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return Rotation((angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype))


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's scale of attention for a stretch (Peng et al., 2023, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _frequencies(width: int, rope: RopeConfig, device: torch.device) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair [width / 2], and the scale of cosine and sine."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequencies = 1.0 / rope.theta**exponents
    if rope.type is RopeType.default:
        return frequencies, 1.0
    if rope.type is RopeType.linear:
        return frequencies / rope.factor, 1.0
    kept = 1 - _yarn_ramp(width, rope, device)
    stretched = frequencies / rope.factor * (1 - kept) + frequencies * kept
    if rope.attention_factor is not None:
        return stretched, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return stretched, yarn_scale(rope.factor, rope.mscale) / yarn_scale(rope.factor, rope.mscale_all_dim)
    return stretched, yarn_scale(rope.factor)


def _yarn_ramp(width: int, rope: RopeConfig, device: torch.device) -> torch.Tensor:
    """How far each pair is stretched, from 0 (fast) to 1 (slow): YaRN, section 3.2 (Peng et al., 2023)."""

    def pair_with(rotations: float) -> float:
        length = rope.original_max_position_embeddings
        return width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float32, device=device)
    return ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
