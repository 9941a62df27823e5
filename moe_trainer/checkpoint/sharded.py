"""Named tensors into a folder and back into any other mesh, by torch.distributed.checkpoint (DCP).

DCP moves the bytes. What it leaves out is done here: it casts dtypes and ignores extra names without a word, it
unpickles `.metadata` as it comes, and one strided layout loads with wrong rows.
"""

import math
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from moe_trainer.checkpoint.agreement import agreed, is_distributed
from moe_trainer.config.errors import ConfigError

_METADATA = ".metadata"
_METADATA_GLOBALS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath"},
    "pathlib._local": {"Path", "PosixPath"},
}


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors into a new folder. Collective: every rank passes the same names.

    Args:
        folder: must not exist or be empty; every rank sees it.
        tensors: DTensors, each on a mesh of its own choice, or plain tensors that are equal on all ranks.

    Raises:
        ConfigError: a layout that DCP cannot represent; a folder with something in it; the disk's own errors.
        RuntimeError: anything else that failed on some rank.
    """
    with agreed(f"saving {folder}"):
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty")
        for name, tensor in tensors.items():
            refuse_interleaved(name, tensor)
    with agreed(f"saving {folder}"), _quiet():
        dcp.save(
            {name: tensor.detach() for name, tensor in tensors.items()},
            # The caller syncs: DCP syncs a file before Python has written out its buffer.
            storage_writer=dcp.FileSystemWriter(folder, sync_files=False, overwrite=False),
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=not is_distributed(),
        )


def load_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], strict: bool = True, alone: bool = False) -> None:
    """Fill the tensors in place, whatever mesh they lie on and whatever mesh the folder was saved from.

    Collective, unless `alone`.

    Args:
        tensors: DTensors or plain tensors; their placements say which part this rank reads.
        strict: also refuse names that the folder holds and `tensors` does not.
        alone: this process loads by itself, even while a process group lives. For plain tensors.

    Raises:
        ConfigError: names every missing, unexpected, wrongly shaped or wrongly typed tensor; nothing is read then.
        RuntimeError: a file that is missing or damaged.
    """
    if alone:
        _load(folder, tensors, strict, no_dist=True)
        return
    with agreed(f"loading {folder}"):
        metadata = read_metadata(folder)
        _compare(metadata, tensors, strict)
    with agreed(f"loading {folder}"):
        _load(folder, tensors, strict, no_dist=not is_distributed())


def _load(folder: Path, tensors: Mapping[str, torch.Tensor], strict: bool, no_dist: bool) -> None:
    metadata = read_metadata(folder)
    _compare(metadata, tensors, strict)
    with _quiet():
        dcp.load(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_reader=_CheckedReader(folder, metadata),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=no_dist,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def stored_tensors(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Global shape and dtype of each tensor in the folder.

    Raises:
        ConfigError: no metadata, or metadata that is damaged or not ours.
    """
    entries = read_metadata(folder).state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}


def read_metadata(folder: Path) -> Metadata:
    """DCP's `.metadata`, unpickled with nothing allowed but the classes that DCP writes for tensors.

    Raises:
        ConfigError: it is missing, damaged, asks for another class, holds something that is not a tensor, does not
            cover a tensor, or names a file outside the folder.
    """
    path = folder / _METADATA
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: not a complete checkpoint") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(metadata, Metadata) or not metadata.storage_data:
        raise ConfigError(f"{path} does not describe a checkpoint")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ConfigError(f"{path}: {name} is not a tensor")
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise ConfigError(f"{path}: {name} is not covered by its parts")
    root = folder.resolve()
    for file in {str(info.relative_path) for info in metadata.storage_data.values()}:
        if (root / file).resolve().parent != root:
            raise ConfigError(f"{path} names a file outside its folder: {file}")
    return metadata


def refuse_interleaved(name: str, tensor: torch.Tensor) -> None:
    """Refuse a DTensor whose local shard is not the one block that `local_box` says.

    Strided shards are fine as FSDP makes them over tensor or expert parallelism: the outer axis splits what the
    inner axes left. Any other split factor (packed gate and up rows), or two plain shards of one dim, is not.

    Raises:
        ConfigError: names the tensor and its placements.
    """
    if not isinstance(tensor, DTensor):
        return
    mesh, placements = tensor.device_mesh, tensor.placements
    for axis, placement in enumerate(placements):
        if not isinstance(placement, (Shard, _StridedShard)):
            continue
        inner = [
            mesh.size(other)
            for other in range(axis + 1, mesh.ndim)
            if getattr(placements[other], "dim", None) == placement.dim
        ]
        factor = placement.split_factor if isinstance(placement, _StridedShard) else 1
        if factor != math.prod(inner):
            raise ConfigError(
                f"{name}: placements {placements} interleave rows, which a checkpoint cannot hold; "
                "split gate_up_proj as [num_experts, 2, intermediate, hidden] on dim 2"
            )


def _compare(metadata: Metadata, tensors: Mapping[str, torch.Tensor], strict: bool) -> None:
    stored = metadata.state_dict_metadata
    problems = [f"missing in the checkpoint: {name}" for name in tensors if name not in stored]
    if strict:
        problems += [f"unexpected in the checkpoint: {name}" for name in stored if name not in tensors]
    for name in tensors.keys() & stored.keys():
        entry, tensor = stored[name], tensors[name]
        if entry.size != tensor.shape:
            problems.append(f"{name}: shape {list(entry.size)} in the checkpoint, {list(tensor.shape)} here")
        elif entry.properties.dtype != tensor.dtype:
            problems.append(f"{name}: {entry.properties.dtype} in the checkpoint, {tensor.dtype} here")
    for name, tensor in tensors.items():
        refuse_interleaved(name, tensor)
    if problems:
        raise ConfigError("tensors do not match: " + "; ".join(sorted(problems)))


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_GLOBALS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed here")


class _CheckedReader(dcp.FileSystemReader):
    """Reads with metadata that has been checked; never unpickles by itself, never falls back to a rank's own."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.checked = metadata

    def read_metadata(self) -> Metadata:
        return self.checked
