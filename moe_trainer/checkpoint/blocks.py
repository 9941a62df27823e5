"""Blocks of a checkpoint's tensors, read by one process without the rest of them.

DCP reads whatever one rank saved of a tensor whole, even for a few rows of it. Here only the wanted rows are read, a
few megabytes at a time, so an export needs no more than the tensor it is writing.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.utils import _create_file_view

from moe_trainer.checkpoint.agreement import describe_error
from moe_trainer.checkpoint.sharded import read_metadata
from moe_trainer.checkpoint.stored import StoredBlock, read_block
from moe_trainer.config.errors import ConfigError
from moe_trainer.parallel.shards import Box


class StoredBlocks:
    """The named tensors of a folder that `save_tensors` wrote. Several threads may read."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        """Find where everything lies: here, because fake tensors are not for several threads.

        Raises:
            ConfigError: as `read_metadata`; or a file that is missing or damaged.
        """
        self._folder = folder
        self._metadata = read_metadata(folder)
        self._files: dict[str, BinaryIO] = {}
        self._chunks: dict[MetadataIndex, StoredBlock] = {}
        for name in names:
            entry = self._metadata.state_dict_metadata[name]
            for chunk in entry.chunks:
                index = MetadataIndex(name, chunk.offsets)
                path = folder / ".metadata"
                try:
                    path = folder / self._metadata.storage_data[index].relative_path
                    self._chunks[index] = self._locate(index, chunk.sizes, entry.properties.dtype)
                except Exception as error:  # a damaged file raises almost anything
                    raise ConfigError(f"{path} cannot be read: {describe_error(error)}") from error

    def read(self, name: str, box: Box, out: torch.Tensor) -> None:
        """Copy one block of a tensor into `out`, of the block's shape, casting to its dtype."""
        entry = self._metadata.state_dict_metadata[name]
        for chunk in entry.chunks:
            starts = [max(part.start, offset) for part, offset in zip(box, chunk.offsets, strict=True)]
            ends = zip(box, chunk.offsets, chunk.sizes, strict=True)
            stops = [min(part.stop, offset + size) for part, offset, size in ends]
            if any(stop <= start for start, stop in zip(starts, stops, strict=True)):
                continue
            stored = self._chunks[MetadataIndex(name, chunk.offsets)]
            place = out[_shifted(starts, stops, [part.start for part in box])]
            read_block(stored, _shifted(starts, stops, chunk.offsets), place)

    def _locate(self, index: MetadataIndex, sizes: torch.Size, dtype: torch.dtype) -> StoredBlock:
        """Where what one rank saved of a tensor lies in its file.

        DCP writes one after the other what `torch.save` makes of each tensor.
        """
        info = self._metadata.storage_data[index]
        path = self._folder / info.relative_path
        if info.relative_path not in self._files:
            self._files[info.relative_path] = path.open("rb", buffering=0)
        file = self._files[info.relative_path]
        # Fake tensors carry strides and the place of their bytes, which stay unread.
        with FakeTensorMode():
            saved = torch.load(_create_file_view(file, info.offset, info.length), weights_only=True)
        if saved.shape != sizes or saved.dtype != dtype:
            raise ValueError(f"{index.fqn}: {saved.dtype} {list(saved.shape)} is not {dtype} {list(sizes)}")
        if saved.numel() and not saved.is_contiguous():
            raise ValueError(f"{index.fqn} does not lie in one piece")
        start = saved.untyped_storage()._checkpoint_offset + saved.storage_offset() * dtype.itemsize
        if start < 0 or start + saved.numel() * dtype.itemsize > info.length:
            raise ValueError(f"{index.fqn} leads outside of its part of the file")
        return StoredBlock(path, file.fileno(), info.offset + start, tuple(sizes), dtype)


def _shifted(starts: Sequence[int], stops: Sequence[int], origin: Sequence[int]) -> Box:
    return tuple(slice(start - zero, stop - zero) for start, stop, zero in zip(starts, stops, origin, strict=True))
