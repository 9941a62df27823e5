"""Blocks of tensors in files, read without the rest of them, a few megabytes at a time.

They are read, not mapped into memory: a mapped file that somebody cuts short ends the whole process with SIGBUS.
"""

import json
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from moe_trainer.config.errors import ConfigError
from moe_trainer.parallel.shards import Box

_BUFFER_BYTES = 8 << 20
"""Read at a time."""
_LEAST_RUN = 64 << 10
"""Bytes in one piece that are worth a read of their own; what lies between shorter ones is read too."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}


class StoredBlock(NamedTuple):
    """A block in a file: its values one after the other, the last dim fastest."""

    path: Path
    descriptor: int
    offset: int
    sizes: tuple[int, ...]
    dtype: torch.dtype


class SafetensorsFile:
    """The tensors of one file, by name; it stays open as long as `stack`."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        """
        Raises:
            ConfigError: it is missing, truncated or damaged.
        """
        self._path = path
        try:
            with safe_open(path, framework="pt", device="cpu"):
                pass  # for its checks alone: that the header is sound, and covers the whole file without overlap
            file = stack.enter_context(path.open("rb", buffering=0))
            length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
            header = json.loads(os.pread(file.fileno(), length, 8))
            header.pop("__metadata__", None)
            self._where = {key: (8 + length + entry["data_offsets"][0]) for key, entry in header.items()}
            self._form = {key: (tuple(entry["shape"]), entry["dtype"]) for key, entry in header.items()}
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is missing, truncated or damaged: {error}") from error
        self._descriptor = file.fileno()

    def keys(self) -> list[str]:
        return list(self._where)

    def describe(self, key: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors dtype."""
        return self._form[key]

    def block(self, key: str) -> StoredBlock:
        """The whole tensor, to be read from.

        Raises:
            ConfigError: of a type that nobody reads here.
        """
        shape, dtype = self._form[key]
        if dtype not in _DTYPES:
            raise ConfigError(f"{self._path}: {key} is {dtype}, not one of {', '.join(_DTYPES)}")
        return StoredBlock(self._path, self._descriptor, self._where[key], shape, _DTYPES[dtype])


def read_block(stored: StoredBlock, part: Box, place: torch.Tensor) -> None:
    """Copy a part of a block into `place`, of the part's shape and any type and strides, a buffer at a time.

    Raises:
        ConfigError: the file has been cut short since it was opened.
    """
    if not place.numel():
        return
    if not stored.sizes:
        place.copy_(_values(stored, 0, 1).view(()))
        return
    row, (first, *others) = math.prod(stored.sizes[1:]), part
    width = stored.dtype.itemsize
    rows, wanted = _BUFFER_BYTES // (row * width), math.prod(place.shape[1:])
    if others and (rows == 0 or _LEAST_RUN <= wanted * width < row * width):
        for number in range(first.start, first.stop):
            offset = stored.offset + number * row * width
            below = stored._replace(offset=offset, sizes=stored.sizes[1:])
            read_block(below, tuple(others), place[number - first.start])
        return
    rows = max(1, rows)
    for start in range(first.start, first.stop, rows):
        stop = min(start + rows, first.stop)
        here, shape = place[start - first.start : stop - first.start], (-1, *stored.sizes[1:])
        # Not kept under a name, which would hold two buffers at a time.
        here.copy_(_values(stored, start * row, stop * row).view(shape)[(slice(None), *others)])


def _values(stored: StoredBlock, start: int, stop: int) -> torch.Tensor:
    """Values number `start` to `stop` of a block."""
    width = stored.dtype.itemsize
    values = np.empty(stop - start, f"i{width}")
    raw, done = memoryview(values).cast("B"), 0
    while done < len(raw):
        read = os.preadv(stored.descriptor, [raw[done:]], stored.offset + start * width + done)
        if not read:
            raise ConfigError(f"{stored.path} is shorter than it was: it was changed while it was read")
        done += read
    return torch.from_numpy(values).view(stored.dtype)
