"""Rounding to bfloat16 up or down at random, so that what is too small for one step is kept on average.

A weight or a running mean in bfloat16, which has 8 bits, would otherwise forget every change below 0.4% (Gupta et
al., 2015). The random bits are a function of the tensor's name, the step and an element's place in the whole tensor:
all ranks that hold an element, whatever the mesh, and a GPU and a CPU alike, round it the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import torch

# SplitMix64 (Steele et al., 2014), in the signed integers that PyTorch and Triton have.
GAMMA, MIX1, MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
WEIGHT_BITS, EXP_AVG_BITS, EXP_AVG_SQ_BITS = 0, 16, 32
"""Of the 64 random bits of an element, the first of the 16 that round each of what AdamW stores of it."""

_LEVELS = 3


@dataclass(frozen=True, slots=True)
class RandomBits:
    """The source of 64 random bits for each element of a block of a tensor."""

    tag: int
    """Of the tensor's name, 31 bits."""
    start: int
    """The place of the block's first element in the whole tensor."""
    sizes: tuple[int, ...]
    """The block as three nested loops, the innermost last, over elements that follow one another ..."""
    strides: tuple[int, ...]
    """... so many places apart in the whole tensor."""

    @classmethod
    def of(cls, name: str, shape: Sequence[int], box: Sequence[slice]) -> "RandomBits":
        """`box`: the block's part of each dim of a tensor of this shape; of at most two it may be a proper part."""
        sizes, strides, start, stride = [1], [1], 0, 1
        for part, size in zip(reversed(box), reversed(shape), strict=True):
            length = part.stop - part.start
            if sizes[-1] * strides[-1] == stride:  # nothing lies between
                sizes[-1] *= length
            elif length != 1:
                sizes.append(length)
                strides.append(stride)
            start += part.start * stride
            stride *= size
        assert len(sizes) <= _LEVELS, f"{name}: {box} of {tuple(shape)}"
        sizes += [1] * (_LEVELS - len(sizes))
        strides += [0] * (_LEVELS - len(strides))
        return cls(crc32(name.encode()) >> 1, start, tuple(reversed(sizes)), tuple(reversed(strides)))

    @property
    def is_in_one_piece(self) -> bool:
        """Whether the block's elements follow one another in the whole tensor too."""
        return self.sizes[:2] == (1, 1)

    def draw(self, step: int, device: torch.device) -> torch.Tensor:
        """The bits at a step: int64, one element after the other."""
        places = torch.full((1,), self.start, dtype=torch.int64, device=device)
        for size, stride in zip(self.sizes, self.strides, strict=True):
            places = (places.unsqueeze(1) + torch.arange(size, device=device) * stride).flatten()
        key = _mix(torch.tensor(step << 32 | self.tag, device=device))
        return _mix(places.mul_(GAMMA).add_(key))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """In place. The masks make PyTorch's shifts, which keep the sign, logical ones."""
    x.bitwise_xor_((x >> 30).bitwise_and_((1 << 34) - 1)).mul_(MIX1)
    x.bitwise_xor_((x >> 27).bitwise_and_((1 << 37) - 1)).mul_(MIX2)
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


def round_stochastically(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """float32, finite -> bfloat16: one of the two neighbours, the nearer one more often; the mean is `x`.

    Args:
        bits: random integers of x's shape, of which the lowest 16 bits count.
    """
    noise = (bits & 0xFFFF).to(torch.int32)
    # The lower half of a float32 is what bfloat16 has not; the noise carries into the upper half as often as it says.
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
