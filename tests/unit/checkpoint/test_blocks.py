"""Blocks of a checkpoint's tensors: right whatever was saved how, and no more in memory than a buffer."""

import pickle
import tracemalloc
from pathlib import Path

import pytest
import torch

from moe_trainer.checkpoint import stored as stored_module
from moe_trainer.checkpoint.blocks import StoredBlocks
from moe_trainer.checkpoint.sharded import save_tensors
from moe_trainer.config.errors import ConfigError


def whole(tensor: torch.Tensor) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in tensor.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_block_of_any_layout(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {
        "odd": torch.randn(3, dtype=dtype),
        "plain": torch.randn(5, 2, 7, 6, dtype=dtype),
        "transposed": torch.randn(6, 5, dtype=dtype).mT,
        "part of another": torch.randn(9, 8, dtype=dtype)[2:7, 1:6],
    }
    save_tensors(tmp_path, tensors)
    stored = StoredBlocks(tmp_path, tensors)
    for name, tensor in tensors.items():
        for box in (whole(tensor), tuple(slice(1, size - 1 or 1) for size in tensor.shape)):
            out = torch.full_like(tensor[box], torch.nan)
            stored.read(name, box, out)
            assert torch.equal(out, tensor[box]), name
    box = (slice(1, 4), slice(1, 2), slice(2, 5), slice(0, 6))
    out = torch.full((3, 1, 6, 3), torch.nan)
    stored.read("plain", box, out.mT)
    assert torch.equal(out.mT, tensors["plain"][box].float())


def test_no_more_than_a_buffer_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(4, 2, 256, 128)  # 1 MiB
    save_tensors(tmp_path, {"p": tensor})
    monkeypatch.setattr(stored_module, "_BUFFER_BYTES", 1 << 14)
    stored = StoredBlocks(tmp_path, ["p"])
    stored.read("p", (slice(0, 1), slice(0, 1), slice(0, 1), slice(0, 1)), torch.empty(1, 1, 1, 1))
    out = torch.empty(256, 128, dtype=torch.bfloat16)
    tracemalloc.start()
    stored.read("p", (slice(2, 3), slice(1, 2), slice(0, 256), slice(0, 128)), out[None, None])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert torch.equal(out, tensor[2, 1].bfloat16())
    assert 1 << 14 <= peak < 1 << 15


def test_damaged_files_are_named(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"p": torch.ones(300, 4)})
    (path,) = tmp_path.glob("*.distcp")
    content = path.read_bytes()
    for damage in (content[: len(content) // 2], b"", b"\0" * len(content)):
        path.write_bytes(damage)
        with pytest.raises(ConfigError, match=rf"{path.name} cannot be read"):
            StoredBlocks(tmp_path, ["p"])
    path.unlink()
    with pytest.raises(ConfigError, match=rf"{path.name} cannot be read"):
        StoredBlocks(tmp_path, ["p"])


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"p": torch.ones(3), "other": torch.ones(3)})
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    del metadata.storage_data[next(index for index in metadata.storage_data if index.fqn == "p")]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match=r"\.metadata cannot be read: p has a part in no file"):
        StoredBlocks(tmp_path, ["p"])


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    """Mapped into memory, this would end the process with SIGBUS."""
    save_tensors(tmp_path, {"p": torch.ones(300, 400)})
    stored = StoredBlocks(tmp_path, ["p"])
    (path,) = tmp_path.glob("*.distcp")
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"{path.name} is shorter than it was"):
        stored.read("p", (slice(0, 300), slice(0, 400)), torch.empty(300, 400))
