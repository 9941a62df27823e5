"""Blocks of a checkpoint's tensors, read by one process without the rest of them.

DCP reads whatever one rank saved of a tensor whole, even for a few rows of it. Here the files are mapped into memory
and only the wanted rows are copied, so an export needs no more than the tensor it is writing.
"""

import math
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.utils import _create_file_view

from moe_trainer.checkpoint.sharded import read_metadata
from moe_trainer.config.errors import ConfigError
from moe_trainer.parallel.shards import Box

_BUFFER_BYTES = 8 << 20
"""Copied at a time, on the way from the file's pages and dtype to the caller's."""


class StoredBlocks:
    """The named tensors of a folder that `save_tensors` wrote. Several threads may read."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        """Find where everything lies: here, because fake tensors are not for several threads.

        Raises:
            ConfigError: as `read_metadata`; or a file that is missing or damaged.
        """
        self._folder = folder
        self._metadata = read_metadata(folder)
        self._maps: dict[str, mmap.mmap] = {}
        self._chunks: dict[MetadataIndex, np.ndarray] = {}
        for name in names:
            entry = self._metadata.state_dict_metadata[name]
            for chunk in entry.chunks:
                index = MetadataIndex(name, chunk.offsets)
                path = folder / self._metadata.storage_data[index].relative_path
                try:
                    self._chunks[index] = self._locate(index, chunk.sizes, entry.properties.dtype)
                except Exception as error:  # a damaged file raises almost anything
                    raise ConfigError(f"{path} cannot be read: {error}") from error

    def read(self, name: str, box: Box, out: torch.Tensor) -> None:
        """Copy one block of a tensor into `out`, of the block's shape, casting to its dtype."""
        entry = self._metadata.state_dict_metadata[name]
        for chunk in entry.chunks:
            starts = [max(part.start, offset) for part, offset in zip(box, chunk.offsets, strict=True)]
            ends = zip(box, chunk.offsets, chunk.sizes, strict=True)
            stops = [min(part.stop, offset + size) for part, offset, size in ends]
            if any(stop <= start for start, stop in zip(starts, stops, strict=True)):
                continue
            source = self._chunks[MetadataIndex(name, chunk.offsets)][_shifted(starts, stops, chunk.offsets)]
            place = out[_shifted(starts, stops, [part.start for part in box])]
            _copy(source, entry.properties.dtype, place)

    def _locate(self, index: MetadataIndex, sizes: torch.Size, dtype: torch.dtype) -> np.ndarray:
        """What one rank saved of a tensor, still in the file, as integers of the dtype's width.

        DCP writes one after the other what `torch.save` makes of each tensor.
        """
        info = self._metadata.storage_data[index]
        path = self._folder / info.relative_path
        with path.open("rb") as file:
            if info.relative_path not in self._maps:
                self._maps[info.relative_path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # Fake tensors carry strides and the place of their bytes, which stay unread.
            with FakeTensorMode():
                saved = torch.load(_create_file_view(file, info.offset, info.length), weights_only=True)
        if saved.shape != sizes or saved.dtype != dtype:
            raise ValueError(f"{index.fqn}: {saved.dtype} {list(saved.shape)} is not {dtype} {list(sizes)}")
        width = dtype.itemsize
        return np.ndarray(  # refuses what would lie outside the file
            tuple(sizes),
            f"i{width}",
            buffer=self._maps[info.relative_path],
            offset=info.offset + saved.untyped_storage()._checkpoint_offset + saved.storage_offset() * width,
            strides=[stride * width for stride in saved.stride()],
        )


def _shifted(starts: Sequence[int], stops: Sequence[int], origin: Sequence[int]) -> Box:
    return tuple(slice(start - zero, stop - zero) for start, stop, zero in zip(starts, stops, origin, strict=True))


def _copy(source: np.ndarray, dtype: torch.dtype, place: torch.Tensor) -> None:
    """A buffer at a time."""
    rows = _BUFFER_BYTES // (math.prod(source.shape[1:]) * dtype.itemsize)
    if rows == 0 and source.ndim > 1:
        for row in range(len(source)):
            _copy(source[row], dtype, place[row])
        return
    for start in range(0, len(source), max(1, rows)):
        # A copy, because the bytes in the file need not be aligned.
        place[start : start + rows].copy_(torch.from_numpy(source[start : start + rows].copy()).view(dtype))
