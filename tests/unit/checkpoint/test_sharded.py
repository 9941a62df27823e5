"""What DCP would let pass: other names, shapes and dtypes, and metadata made to do harm."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from moe_trainer.checkpoint.sharded import load_tensors, read_metadata, save_tensors, stored_tensors
from moe_trainer.config.errors import ConfigError


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "step": torch.tensor(7)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "tensors", tensors())
    return tmp_path / "tensors"


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_round_trip_into_parameters(folder: Path) -> None:
    loaded = {name: torch.nn.Parameter(torch.zeros_like(t), requires_grad=False) for name, t in tensors().items()}
    loaded["a"].requires_grad_(True)
    load_tensors(folder, loaded)
    assert all(torch.equal(loaded[name], value) for name, value in tensors().items())
    assert stored_tensors(folder)["b"] == (torch.Size([4]), torch.bfloat16)


def test_every_mismatch_is_named_and_nothing_read(folder: Path) -> None:
    asked = {"a": torch.zeros(3, 2), "b": torch.zeros(4), "c": torch.zeros(1)}
    with pytest.raises(ConfigError) as caught:
        load_tensors(folder, asked)
    for part in (
        "a: shape [2, 3] in the checkpoint, [3, 2] here",
        "b: torch.bfloat16 in the checkpoint, torch.float32 here",
        "missing in the checkpoint: c",
        "unexpected in the checkpoint: step",
    ):
        assert part in str(caught.value)
    assert not any(value.any() for value in asked.values())


def test_not_strict_allows_more_but_not_less(folder: Path) -> None:
    asked = {"a": torch.zeros(2, 3)}
    with pytest.raises(ConfigError, match="unexpected in the checkpoint: b"):
        load_tensors(folder, asked)
    load_tensors(folder, asked, strict=False)
    assert torch.equal(asked["a"], tensors()["a"])
    with pytest.raises(ConfigError, match="missing in the checkpoint: z"):
        load_tensors(folder, {"z": torch.zeros(1)}, strict=False)


def test_folder_with_something_in_it_is_refused(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="not empty"):
        save_tensors(folder, {"a": torch.zeros(1)})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("where", ["whole", "inside"])
def test_metadata_runs_no_command(folder: Path, tmp_path: Path, where: str) -> None:
    metadata: Any = Evil(tmp_path / "owned")
    if where == "inside":
        metadata = read_metadata(folder)
        metadata.planner_data = Evil(tmp_path / "owned")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match="mkdir is not allowed here"):
        load_tensors(folder, {name: torch.zeros_like(value) for name, value in tensors().items()})
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("path", ["../other/__0_0.distcp", "{absolute}"])
def test_metadata_cannot_lead_outside(folder: Path, tmp_path: Path, path: str) -> None:
    save_tensors(tmp_path / "other", tensors())
    metadata = read_metadata(folder)
    for info in metadata.storage_data.values():
        info.relative_path = path.format(absolute=tmp_path / "other" / "__0_0.distcp")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match="outside its folder"):
        load_tensors(folder, tensors())


def test_metadata_that_is_not_metadata(folder: Path) -> None:
    path = folder / ".metadata"
    good = path.read_bytes()
    for raw in (good[:200], b"", b"not a pickle", pickle.dumps({"state": 1})):
        path.write_bytes(raw)
        with pytest.raises(ConfigError, match=r"\.metadata (cannot be read|does not describe)"):
            load_tensors(folder, tensors())
    path.unlink()
    with pytest.raises(ConfigError, match=r"\.metadata is missing"):
        load_tensors(folder, tensors())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m, a: setattr(a.chunks[0], "sizes", torch.Size([1, 3])), "a is not covered"),
        (lambda m, a: setattr(a.chunks[0], "sizes", torch.Size([12])), "cannot be read"),
        (lambda m, a: _move(m, a, [7, 7]), "a has a part outside of it"),  # nothing of it would be loaded
        (lambda m, a: setattr(a.chunks[0], "offsets", torch.Size([7, 7])), "a has a part in no file"),
        (lambda m, a: setattr(a, "chunks", 5), "cannot be read"),
        (lambda m, a: setattr(a, "size", "wide"), "cannot be read"),
        (lambda m, a: setattr(a, "properties", None), "cannot be read"),
        (lambda m, a: setattr(a.properties, "dtype", 3), "a is not a tensor"),
        (lambda m, a: setattr(m, "state_dict_metadata", [1]), "cannot be read"),
        (lambda m, a: setattr(m, "storage_data", {1: 2}), "in no file"),
        (lambda m, a: setattr(next(iter(m.storage_data.values())), "relative_path", 7), "cannot be read"),
        (lambda m, a: setattr(next(iter(m.storage_data.values())), "relative_path", "\0"), "cannot be read"),
    ],
)
def test_metadata_of_strange_content(folder: Path, change: Callable[..., object], problem: str) -> None:
    metadata = read_metadata(folder)
    change(metadata, metadata.state_dict_metadata["a"])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match=problem):
        load_tensors(folder, tensors())


def _move(metadata: Metadata, entry: TensorStorageMetadata, to: list[int]) -> None:
    """A part of the tensor to another place, in the list of files too."""
    index = MetadataIndex("a", entry.chunks[0].offsets)
    entry.chunks[0].offsets = torch.Size(to)
    metadata.storage_data[MetadataIndex("a", torch.Size(to))] = metadata.storage_data.pop(index)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_objects_are_refused(tmp_path: Path) -> None:
    """DCP would unpickle them with anything allowed."""
    import torch.distributed.checkpoint as dcp

    dcp.save({"a": torch.zeros(1), "note": "text"}, checkpoint_id=tmp_path / "x", no_dist=True)
    with pytest.raises(ConfigError, match="note is not a tensor"):
        load_tensors(tmp_path / "x", {"a": torch.zeros(1)}, strict=False)


def test_damaged_shard_is_an_error(folder: Path) -> None:
    shard = next(folder.glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(RuntimeError, match="loading"):
        load_tensors(folder, tensors())
