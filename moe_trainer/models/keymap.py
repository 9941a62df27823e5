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

Index = tuple[int | slice, ...]
"""An int or a slice with explicit bounds for each leading dim; the dims after it are whole."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`parameter[target] == file[key][source]`, of equal shapes."""

    key: str
    target: Index = ()
    source: tuple[slice, ...] = ()


KeyMap = Mapping[str, Sequence[Piece]]
"""Parameter name -> the pieces that cover it, without overlap."""


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
    """The block of the file's tensor that a piece reads, for a parameter of this shape."""
    box, kept = target_box(piece, shape)
    whole = tuple(slice(0, box[dim].stop - box[dim].start) for dim in kept)
    return piece.source + whole[len(piece.source) :]


def file_shapes(key_map: KeyMap, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the file: the smallest that holds all its pieces.

    Args:
        shapes: parameter name -> global shape.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, pieces in key_map.items():
        for piece in pieces:
            stops = tuple(part.stop for part in source_box(piece, shapes[name]))
            found[piece.key] = tuple(map(max, stops, found.get(piece.key, stops)))
    return found


def volume(box: Sequence[slice]) -> int:
    """Elements of a block."""
    return math.prod(part.stop - part.start for part in box)
