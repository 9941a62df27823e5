"""Named tensors into a folder and back into any other mesh, by torch.distributed.checkpoint (DCP).

DCP moves the bytes. What it leaves out is done here: it casts dtypes and ignores extra names without a word, it
unpickles `.metadata` as it comes, and one strided layout loads with wrong rows.
"""

import math
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from moe_trainer.checkpoint.agreement import agreed, is_distributed
from moe_trainer.config.errors import ConfigError
from moe_trainer.kernels.local_part import local_part
from moe_trainer.observe.log import get_logger
from moe_trainer.parallel.shards import Box, local_box

_logger = get_logger(__name__)

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
        blocks = blocks_to_write(tensors)
    save_blocks(folder, blocks)


class Block(NamedTuple):
    """A block of a tensor, as this rank has it."""

    values: torch.Tensor
    """Of the block's shape."""
    box: Box
    """Where it lies in the whole."""
    shape: torch.Size
    """Of the whole."""


def blocks_to_write(tensors: Mapping[str, torch.Tensor]) -> dict[str, Block]:
    """What this rank writes of the tensors: of a block that several ranks hold, one of them, spread by name.

    Raises:
        ConfigError: a layout that a checkpoint cannot hold.
    """
    blocks = {}
    for name, tensor in tensors.items():
        refuse_interleaved(name, tensor)
        block = Block(local_part(tensor), local_box(tensor), tensor.shape)
        if _is_writer(name, tensor) and (block.values.numel() or not tensor.numel()):
            blocks[name] = block
    return blocks


def save_blocks(folder: Path, blocks: Mapping[str, Block], group: dist.ProcessGroup | None = None) -> None:
    """As `save_tensors`, for blocks of this rank that all together cover their tensors. Collective over `group`."""
    with agreed(f"saving {folder}", group):
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty")
    with agreed(f"saving {folder}", group), _quiet():
        dcp.save(
            dict(blocks),
            # The caller syncs: DCP syncs a file before Python has written out its buffer.
            storage_writer=dcp.FileSystemWriter(folder, sync_files=False, overwrite=False),
            planner=_BlockPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=not is_distributed(),
        )


def load_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], strict: bool = True, casts: bool = False) -> None:
    """Fill the tensors in place, whatever mesh they lie on and whatever mesh the folder was saved from. Collective.

    Args:
        tensors: DTensors or plain tensors; their placements say which part this rank reads.
        strict: also refuse names that the folder holds and `tensors` does not.
        casts: also take float32 for bfloat16, rounded to nearest, and bfloat16 for float32; it is logged.

    Raises:
        ConfigError: names every missing, unexpected, wrongly shaped or wrongly typed tensor; nothing is read then.
        RuntimeError: a file that is missing or damaged.
    """
    with agreed(f"loading {folder}"):
        metadata = read_metadata(folder)
        _compare(metadata, tensors, strict, casts)
    with agreed(f"loading {folder}"), _quiet():
        dcp.load(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_reader=_CheckedReader(folder, metadata),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=not is_distributed(),
        )
    if changed := _describe_casts(metadata, tensors):
        _logger.info("%s: %s", folder, changed)


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
        _check_metadata(metadata, folder.resolve())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: not a complete checkpoint") from None
    except Exception as error:  # a damaged pickle raises almost anything, and gives objects of almost any content
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return metadata


def _check_metadata(metadata: object, root: Path) -> None:
    """Raises ValueError, or whatever its objects raise that are not what they should be."""
    if not isinstance(metadata, Metadata) or not metadata.storage_data:
        raise ValueError("it does not describe a checkpoint")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or not isinstance(entry.properties.dtype, torch.dtype):
            raise ValueError(f"{name} is not a tensor")
        for chunk in entry.chunks:
            if MetadataIndex(name, chunk.offsets) not in metadata.storage_data:
                raise ValueError(f"{name} has a part in no file")
            bounds = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            if not all(0 <= offset <= offset + size <= full for offset, size, full in bounds):
                raise ValueError(f"{name} has a part outside of it")
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise ValueError(f"{name} is not covered by its parts")
    for file in {info.relative_path for info in metadata.storage_data.values()}:
        if (root / file).resolve().parent != root:
            raise ValueError(f"it names a file outside its folder: {file}")


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


def _compare(metadata: Metadata, tensors: Mapping[str, torch.Tensor], strict: bool, casts: bool) -> None:
    stored = metadata.state_dict_metadata
    problems = [f"missing in the checkpoint: {name}" for name in tensors if name not in stored]
    if strict:
        problems += [f"unexpected in the checkpoint: {name}" for name in stored if name not in tensors]
    for name in tensors.keys() & stored.keys():
        entry, tensor = stored[name], tensors[name]
        if entry.size != tensor.shape:
            problems.append(f"{name}: shape {list(entry.size)} in the checkpoint, {list(tensor.shape)} here")
        elif entry.properties.dtype != tensor.dtype and not (
            casts and {entry.properties.dtype, tensor.dtype} == {torch.float32, torch.bfloat16}
        ):
            problems.append(f"{name}: {entry.properties.dtype} in the checkpoint, {tensor.dtype} here")
    for name, tensor in tensors.items():
        refuse_interleaved(name, tensor)
    if problems:
        raise ConfigError("tensors do not match: " + "; ".join(sorted(problems)))


def _describe_casts(metadata: Metadata, tensors: Mapping[str, torch.Tensor]) -> str:
    """What was cast, in a line; empty if nothing was."""
    stored = metadata.state_dict_metadata
    casts = Counter((stored[name].properties.dtype, tensor.dtype) for name, tensor in tensors.items())
    texts = [
        f"{number} tensors were {'rounded to the nearest' if new.itemsize < old.itemsize else 'widened to'} {new}"
        for (old, new), number in casts.items()
        if old != new
    ]
    return ", ".join(texts).replace("torch.", "")


def _is_writer(name: str, tensor: torch.Tensor) -> bool:
    """Whether this rank, of those that hold the same block, is the one that writes it."""
    if not is_distributed():
        return True
    number, copies = dist.get_rank(), dist.get_world_size()  # a plain tensor is on every rank
    if isinstance(tensor, DTensor):
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None, "this rank is not on the tensor's mesh"
        number, copies = 0, 1
        for axis, placement in enumerate(tensor.placements):
            if isinstance(placement, Replicate):
                size = tensor.device_mesh.size(axis)
                number, copies = number * size + coordinate[axis], copies * size
    return number == crc32(name.encode()) % copies


class _BlockPlanner(DefaultSavePlanner):
    """Plans from blocks, so that nothing of a DTensor or its mesh is touched by the thread that saves."""

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(name, block) for name, block in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].values.contiguous()  # so `blocks` finds rows in one piece


def _write_item(name: str, block: Block) -> WriteItem:
    offsets = torch.Size(part.start for part in block.box)
    chunk = ChunkStorageMetadata(offsets, block.values.shape)
    properties = TensorProperties.create_from_tensor(block.values)
    data = TensorWriteData(chunk, properties, block.shape)
    return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)


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
