"""Hugging Face safetensors folders, out: several files at a time, each a header and then one tensor after the other.

safetensors' own writer wants all tensors of a file at once; its format does not.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

import torch

from moe_trainer.checkpoint.hf import INDEX, SINGLE
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.files import sync
from moe_trainer.models.keymap import volume

_CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
_MOST_WORKERS = 4
"""Unless asked for: disks gain little from more."""


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is made when its turn to be written comes, in whichever thread writes it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return volume([slice(0, size) for size in self.shape]) * self.dtype.itemsize


def write_hf(
    out: Path,
    tensors: Iterable[LazyTensor],
    documents: Mapping[str, str],
    max_shard_bytes: int,
    workers: int | None = None,
    single: str = SINGLE,
) -> None:
    """Write a Hugging Face folder: all of it or nothing. For one process; each worker holds one tensor at a time.

    Args:
        out: must not exist; written as `out.tmp` first.
        tensors: written in this order; which goes into which file depends on nothing but sizes and order.
        documents: file name -> text.
        max_shard_bytes: most bytes of tensors in a file, save for a single larger tensor.
        workers: threads, each at a file of its own; None for as many as processors, at most 4. (The work is copies
            and writes, which hold no lock of Python's.) The bytes written are the same for any number.
        single: name of the file, if all fits into one.

    Raises:
        ConfigError: `out` or `out.tmp` exists, or the disk refused.
    """
    temporary = out.with_name(out.name + ".tmp")
    for path in (out, temporary):
        if path.exists() or path.is_symlink():
            raise ConfigError(f"{path} exists already; remove it or choose another out")
    files = _split(list(tensors), max_shard_bytes, single)
    if len(files) > 1:
        documents = {**documents, INDEX: _index(files)}
    try:
        temporary.mkdir(parents=True)
        try:
            _check_space(temporary, files)
            _write_files(temporary, files, workers or min(_MOST_WORKERS, os.cpu_count() or 1))
            for name, text in documents.items():
                with (temporary / name).open("wb") as file:
                    file.write(text.encode())
                    _sync(file)
            sync(temporary)
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync(out.parent)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}") from error


def _split(tensors: list[LazyTensor], max_shard_bytes: int, single: str) -> dict[str, list[LazyTensor]]:
    """File name -> its tensors."""
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    for shard in shards:
        shard.sort(key=lambda tensor: -tensor.dtype.itemsize)  # so that each lies at a multiple of its width
    if len(shards) == 1:
        return {single: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, start=1)
    }


def _index(files: Mapping[str, list[LazyTensor]]) -> str:
    weight_map = {tensor.key: name for name, shard in files.items() for tensor in shard}
    index = {"metadata": {"total_size": _num_bytes(files)}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def _num_bytes(files: Mapping[str, list[LazyTensor]]) -> int:
    return sum(tensor.num_bytes for shard in files.values() for tensor in shard)


def _check_space(folder: Path, files: Mapping[str, list[LazyTensor]]) -> None:
    need, free = _num_bytes(files), shutil.disk_usage(folder).free
    if free < need:
        raise ConfigError(f"{folder}: disk full: the export needs {need:,} bytes, {free:,} are free")


def _write_files(folder: Path, files: Mapping[str, list[LazyTensor]], workers: int) -> None:
    stop = Event()
    with ThreadPoolExecutor(min(workers, len(files))) as pool:
        futures = [pool.submit(_write_file, folder / name, shard, stop) for name, shard in files.items()]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # Ctrl-C too
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_file(path: Path, tensors: list[LazyTensor], stop: Event) -> None:
    """Format: 8 bytes length of the header, the header in JSON, then the tensors' bytes, little-endian.

    Args:
        stop: once set, the file is left unfinished.
    """
    assert sys.byteorder == "little"
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.num_bytes]
        header[tensor.key] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in tensors:
            if stop.is_set():
                return
            _write_tensor(file, tensor)
        _sync(file)


def _write_tensor(file: BinaryIO, tensor: LazyTensor) -> None:
    value = tensor.load().detach()
    assert tuple(value.shape) == tensor.shape and value.dtype == tensor.dtype, tensor.key
    raw = value.cpu().contiguous().reshape(-1).view(torch.uint8)
    file.write(memoryview(raw.numpy()))


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
