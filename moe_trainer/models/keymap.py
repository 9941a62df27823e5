"""How parameters are laid out in a Hugging Face folder: the language in which each family's `hf.py` says it.

A family's `hf.py` offers
    model_config_from_hf(folder) -> ModelConfig
    hf_config(model, dtype, eos_token_id) -> dict     what config.json holds on export
    key_map(model, keys) -> KeyMap                    for the layout that a folder with these keys has;
                                                      without keys, for the layout that is written
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

Index = tuple[int | slice, ...]
"""An int or a slice with explicit bounds for each leading dim; the dims after it are whole."""


class Encoding(Enum):
    """How a tensor of the file is stored."""

    plain = "plain"
    """As it is, in some floating-point type."""
    mxfp4 = "mxfp4"
    """`<key>_blocks` and `<key>_scales`: 32 values of the last dim share an exponent (OCP MX formats, 2023)."""
    fp8_blocks = "fp8_blocks"
    """A matrix in float8 and `<key>_scale_inv`: blocks of 128 x 128 share a factor (DeepSeek-V3, 2024)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`parameter[target] == file[key][source]`, of equal shapes; `file[key].mT[source]` where it is transposed."""

    key: str
    target: Index = ()
    source: tuple[slice, ...] = ()
    """With explicit start and stop, and a step where rows are interleaved."""
    transposed: bool = False
    encoding: Encoding = Encoding.plain
    keeps_dtype: bool = False
    """Written on export in the checkpoint's own type, whatever the others' is."""
    twin: str = ""
    """Another tensor of the file, which must be equal: a tied head that was stored all the same."""


KeyMap = Mapping[str, Sequence[Piece]]
"""Parameter or buffer name -> the pieces that cover it, without overlap."""

UNREAD = ""
"""The name in a key map under which a family lists tensors of the file that the model has no use for. Those with a
`source` are written on export, as zeros of that shape, because other programs expect them."""


def target_box(piece: Piece, shape: Sequence[int]) -> tuple[tuple[slice, ...], tuple[int, ...]]:
    """The block of a parameter of this shape that a piece fills: a slice for each dim, and the dims that stay."""
    index = piece.target + (slice(None),) * (len(shape) - len(piece.target))
    box = tuple(
        slice(part, part + 1) if isinstance(part, int) else slice(*part.indices(size)[:2])
        for part, size in zip(index, shape, strict=True)
    )
    kept = tuple(dim for dim, part in enumerate(index) if not isinstance(part, int))
    return box, kept


def source_box(piece: Piece, shape: Sequence[int]) -> tuple[slice, ...]:
    """What a piece reads of the file's tensor (of its transpose), for a parameter of this shape."""
    box, kept = target_box(piece, shape)
    whole = tuple(slice(0, box[dim].stop - box[dim].start) for dim in kept)
    return piece.source + whole[len(piece.source) :]


def file_shapes(key_map: KeyMap, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the file, decoded: the smallest that holds all its pieces.

    Args:
        shapes: parameter name -> global shape.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, pieces in key_map.items():
        for piece in pieces:
            stops = file_order(piece, tuple(part.stop for part in source_box(piece, shapes[name])))
            found[piece.key] = tuple(map(max, stops, found.get(piece.key, stops)))
    return found


def file_order(piece: Piece, dims: tuple[Any, ...]) -> tuple[Any, ...]:
    """From the parameter's order of dims to the file's, and back."""
    return (*dims[:-2], dims[-1], dims[-2]) if piece.transposed else dims


def volume(box: Sequence[slice]) -> int:
    """Elements of a block."""
    return math.prod(part.stop - part.start for part in box)
