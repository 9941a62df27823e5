"""Hugging Face safetensors folders, in: each rank reads only the slices that it keeps, a tensor at a time.

Names and layouts are the family's business (`models/keymap.py`).
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

import torch

from moe_trainer.checkpoint.agreement import agreed
from moe_trainer.checkpoint.decode import read_decoded, stored_as
from moe_trainer.checkpoint.sharded import refuse_interleaved
from moe_trainer.checkpoint.stored import SafetensorsFile, read_block
from moe_trainer.config.errors import ConfigError
from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.keymap import (
    UNREAD,
    Encoding,
    KeyMap,
    Piece,
    file_order,
    file_shapes,
    source_box,
    target_box,
    volume,
)
from moe_trainer.parallel.shards import Box, local_box

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_TWIN_ROWS = 1024
"""Compared at a time."""


def load_hf(
    folder: Path, parameters: Mapping[str, torch.Tensor], key_map: Callable[[Collection[str]], KeyMap]
) -> None:
    """Fill this rank's shard of each parameter, in place, casting to the parameter's dtype. Collective.

    Args:
        folder: holds model.safetensors, or shards and model.safetensors.index.json.
        parameters: name -> parameter, all of the model's, and its buffers.
        key_map: from the names in the folder to the family's layout.

    Raises:
        ConfigError: a file that is missing, damaged or outside the folder; or every tensor that is missing,
            unexpected, of the wrong shape or of an unreadable dtype, and every parameter not covered; or a tied
            tensor that was stored twice with different values. No parameter has been changed then. Or values that
            are not finite, which only show while they are read.
    """
    with ExitStack() as stack:
        with agreed("reading Hugging Face weights"):
            files = HubFiles(folder, stack)
            pieces = key_map(files.keys())
            _check(folder, files, pieces, parameters)
            for name, parameter in parameters.items():
                for piece in pieces[name]:
                    _check_twin(folder, files, piece, local_box(parameter))
        with agreed("reading Hugging Face weights"):
            for name, parameter in parameters.items():
                box, local = local_box(parameter), local_part(parameter)
                assert list(local.shape) == [part.stop - part.start for part in box], name
                for piece in pieces[name]:
                    _fill(local, box, piece, parameter.shape, files)
                if local.numel() and not torch.stack(local.detach().aminmax()).isfinite().all():
                    raise ConfigError(f"{folder}: {name} holds NaN or infinity, or more than {local.dtype} can hold")


def _fill(local: torch.Tensor, box: Box, piece: Piece, shape: Sequence[int], files: "HubFiles") -> None:
    """Copy what a piece and a rank's block have in common."""
    target, kept = target_box(piece, shape)
    source = source_box(piece, shape)
    common = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, target, strict=True))
    if any(part.stop <= part.start for part in common):
        return
    wanted = tuple(
        _part(source[position], common[dim].start - target[dim].start, common[dim].stop - target[dim].start)
        for position, dim in enumerate(kept)
    )
    place: list[int | slice] = [
        slice(part.start - own.start, part.stop - own.start) for part, own in zip(common, box, strict=True)
    ]
    for dim in set(range(len(place))) - set(kept):
        place[dim] = common[dim].start - box[dim].start
    here = local[tuple(place)]
    with torch.no_grad():
        if piece.encoding is Encoding.plain and all(part.step in (None, 1) for part in wanted):
            files.read_into(piece.key, file_order(piece, wanted), here.mT if piece.transposed else here)
        else:
            here.copy_(_read(piece, wanted, files))  # casts


def _part(source: slice, start: int, stop: int) -> slice:
    """Of a slice with a step, the elements from number `start` to `stop`."""
    step = source.step or 1
    return slice(source.start + start * step, source.start + (stop - 1) * step + 1, step)


def _read(piece: Piece, wanted: Box, files: "HubFiles") -> torch.Tensor:
    """Steps are not read: what lies between is read too, and left out here."""
    whole = tuple(slice(part.start, part.stop) for part in wanted)
    value = read_decoded(files.read, piece.key, piece.encoding, file_order(piece, whole))
    if piece.transposed:
        value = value.mT
    return value[tuple(slice(None, None, part.step) for part in wanted)]


def _check(folder: Path, files: "HubFiles", pieces: KeyMap, parameters: Mapping[str, torch.Tensor]) -> None:
    """Everything in the folder is used, everything in the model is filled."""
    problems = [f"no place in the file layout for parameter {name}" for name in parameters if name not in pieces]
    known = {name: pieces[name] for name in pieces if name in parameters}
    shapes = {name: tuple(parameters[name].shape) for name in known}
    encodings = {piece.key: piece.encoding for parts in known.values() for piece in parts}
    expected = {
        stored: form
        for key, shape in file_shapes(known, shapes).items()
        for stored, form in stored_as(key, encodings[key], shape).items()
    }
    expected |= {piece.twin: expected[piece.key] for parts in known.values() for piece in parts if piece.twin}
    found, unread = files.keys(), {piece.key: piece for piece in pieces.get(UNREAD, ())}
    problems += [f"missing: {key}" for key in expected if key not in found]
    problems += [f"unexpected: {key}" for key in found if key not in expected and key not in unread]
    for key in sorted(unread.keys() & found):
        shape, expected_shape = files.describe(key)[0], tuple(part.stop for part in unread[key].source)
        if unread[key].source and shape != expected_shape:
            problems.append(f"{key}: shape {list(shape)} in the file, {list(expected_shape)} here")
    for key in sorted(expected.keys() & found):
        shape, dtype = files.describe(key)
        expected_shape, dtypes = expected[key]
        if shape != expected_shape:
            problems.append(f"{key}: shape {list(shape)} in the file, {list(expected_shape)} here")
        if dtype not in dtypes:
            problems.append(f"{key}: {dtype} is not one of {', '.join(dtypes)}")
    for name, parameter in parameters.items():
        refuse_interleaved(name, parameter)
    if problems:
        raise ConfigError(f"{folder} does not fit the model: {'; '.join(problems)}")
    for name, parts in known.items():
        covered = sum(volume(target_box(piece, shapes[name])[0]) for piece in parts)
        assert covered == parameters[name].numel(), f"the key map covers {covered} elements of {name}"


def _check_twin(folder: Path, files: "HubFiles", piece: Piece, box: Box) -> None:
    """Refuse another value in the twin of what this rank keeps; all ranks together see all of it."""
    if not piece.twin or not volume(box):
        return
    for start in range(box[0].start, box[0].stop, _TWIN_ROWS):
        rows = (slice(start, min(start + _TWIN_ROWS, box[0].stop)), *box[1:])
        if not (files.read(piece.key, rows) == files.read(piece.twin, rows)).all():
            raise ConfigError(
                f"{folder}: {piece.twin} is not equal to {piece.key}, though config.json ties them; "
                "set tie_word_embeddings to false there, or remove it"
            )


class HubFiles:
    """The tensors of a folder, by name."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._files = {path: SafetensorsFile(path, stack) for path in _paths(folder)}
        self._where = {key: path for path, file in self._files.items() for key in file.keys()}
        counted = sum(len(file.keys()) for file in self._files.values())
        if counted != len(self._where):
            raise ConfigError(f"{folder}: two files hold a tensor of the same name")
        if (folder / INDEX).exists():
            self._compare_index(folder, _weight_map(folder))
        for key in [key for key in self._where if key.endswith("rotary_emb.inv_freq")]:
            del self._where[key]  # a constant that old files carry

    def keys(self) -> Set[str]:
        return self._where.keys()

    def describe(self, key: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors dtype."""
        return self._files[self._where[key]].describe(key)

    def read(self, key: str, box: Box) -> torch.Tensor:
        """One block of a tensor, in its own type."""
        stored = self._files[self._where[key]].block(key)
        out = torch.empty([part.stop - part.start for part in box], dtype=stored.dtype)
        read_block(stored, box, out)
        return out

    def read_into(self, key: str, box: Box, out: torch.Tensor) -> None:
        """Copy one block of a tensor into `out`, of its shape and any type."""
        read_block(self._files[self._where[key]].block(key), box, out)

    def _compare_index(self, folder: Path, weight_map: Mapping[str, str]) -> None:
        wrong = [key for key, file in weight_map.items() if self._where.get(key) != folder / file]
        if wrong:
            raise ConfigError(f"{folder / INDEX}: not in the file that it names: {', '.join(sorted(wrong))}")


def _paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    single, index = (folder / SINGLE).exists(), (folder / INDEX).exists()
    if single and index:
        raise ConfigError(f"{folder} holds both {SINGLE} and {INDEX}; keep the one that is meant")
    if single:
        return [folder / SINGLE]
    if index:
        return [folder / file for file in sorted(set(_weight_map(folder).values()))]
    if any(folder.glob("*.bin")):
        raise ConfigError(f"{folder} holds only .bin files, which can run code when read; convert it to safetensors")
    raise ConfigError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = [PurePosixPath(file) for file in weight_map.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    for file in files:
        # By name only: the hub's own cache is made of links that lead elsewhere.
        if file.is_absolute() or ".." in file.parts:
            raise ConfigError(f"{path} names a file outside its folder: {file}")
    return weight_map
