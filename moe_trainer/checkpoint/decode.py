"""Quantised tensors of Hugging Face folders, decoded a block at a time while they are read."""

from collections.abc import Callable

import torch

from moe_trainer.models.keymap import Encoding
from moe_trainer.parallel.shards import Box

Read = Callable[[str, Box], torch.Tensor]
"""One block of a stored tensor, by its name in the file."""

_FLOATS = ("BF16", "F16", "F32", "F64")
_MXFP4_VALUES = 32
"""Values that share an exponent."""
_FP8_BLOCK = 128
"""Rows and columns that share a factor."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the low three bits of E2M1; the fourth is the sign."""


def stored_as(
    key: str, encoding: Encoding, shape: tuple[int, ...]
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """What the file holds for a tensor of this decoded shape: name -> shape, and the safetensors dtypes to expect."""
    if encoding is Encoding.plain:
        return {key: (shape, _FLOATS)}
    if encoding is Encoding.mxfp4:
        scales = (*shape[:-1], -(-shape[-1] // _MXFP4_VALUES))
        return {f"{key}_blocks": ((*scales, _MXFP4_VALUES // 2), ("U8",)), f"{key}_scales": (scales, ("U8",))}
    factors = tuple(-(-size // _FP8_BLOCK) for size in shape)
    return {key: (shape, ("F8_E4M3",)), f"{key}_scale_inv": (factors, _FLOATS)}


def read_decoded(read: Read, key: str, encoding: Encoding, box: Box) -> torch.Tensor:
    """One block of a tensor, in float32 where it is quantised; only the quantised blocks that it touches are read."""
    if encoding is Encoding.mxfp4:
        return _read_mxfp4(read, key, box)
    if encoding is Encoding.fp8_blocks:
        return _read_fp8(read, key, box)
    return read(key, box)


def _read_mxfp4(read: Read, key: str, box: Box) -> torch.Tensor:
    *rows, columns = box
    groups = _outer(columns, _MXFP4_VALUES)
    blocks = read(f"{key}_blocks", (*rows, groups, slice(0, _MXFP4_VALUES // 2)))
    exponents = read(f"{key}_scales", (*rows, groups)).to(torch.int32) - 127
    values = _pairs()[blocks.to(torch.int32)].flatten(-2)  # [..., groups, 32]
    decoded = torch.ldexp(values, exponents.unsqueeze(-1)).flatten(-2)
    start = groups.start * _MXFP4_VALUES
    return decoded[..., columns.start - start : columns.stop - start]


def _pairs() -> torch.Tensor:
    """The two values of each byte [256, 2], that of the low four bits first."""
    values = torch.tensor([*_FP4, *(-value for value in _FP4)])
    byte = torch.arange(256)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=1)


def _read_fp8(read: Read, key: str, box: Box) -> torch.Tensor:
    outer = tuple(_outer(part, _FP8_BLOCK) for part in box)
    factors = read(f"{key}_scale_inv", outer).float()
    for dim, (part, blocks) in enumerate(zip(box, outer, strict=True)):
        start = blocks.start * _FP8_BLOCK
        factors = factors.repeat_interleave(_FP8_BLOCK, dim).narrow(dim, part.start - start, part.stop - part.start)
    return read(key, box).float() * factors


def _outer(part: slice, block: int) -> slice:
    """The blocks that a slice touches."""
    return slice(part.start // block, -(-part.stop // block))
