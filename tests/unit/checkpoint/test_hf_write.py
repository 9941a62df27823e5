"""The writer of Hugging Face folders: the same bytes from any number of workers, all of the folder or nothing."""

import json
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moe_trainer.checkpoint.hf_write import LazyTensor, write_hf
from moe_trainer.config.errors import ConfigError


def values() -> dict[str, torch.Tensor]:
    """Of all widths, and of odd sizes, so that a wide one would follow at an odd place."""
    torch.manual_seed(0)
    found = {f"t{i}.bf16": torch.randn(3, 2 * i + 1).bfloat16() for i in range(6)}
    found |= {f"t{i}.f32": torch.randn(i + 1, 5) for i in range(6)}
    found |= {f"t{i}.f64": torch.randn(2, 3, dtype=torch.float64) for i in range(3)}
    found |= {"empty": torch.zeros(0, 4), "f16": torch.randn(7).half()}
    return {key: found[key] for key in sorted(found)}


def lazy(tensors: dict[str, torch.Tensor], load: Callable[[str], torch.Tensor] | None = None) -> list[LazyTensor]:
    return [
        LazyTensor(key, tuple(value.shape), value.dtype, partial(load or tensors.__getitem__, key))
        for key, value in tensors.items()
    ]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_bytes_from_any_number_of_workers(tmp_path: Path) -> None:
    for workers in (1, 2, 7, None):
        write_hf(tmp_path / str(workers), lazy(values()), {"note.txt": "ä"}, 200, workers)
    expected = content(tmp_path / "1")
    assert sum(name.endswith(".safetensors") for name in expected) > 3
    assert all(content(tmp_path / name) == expected for name in ("2", "7", "None"))
    assert expected["note.txt"] == "ä".encode()


@pytest.mark.parametrize("max_shard_bytes", [10**6, 150])
def test_safetensors_reads_them(tmp_path: Path, max_shard_bytes: int) -> None:
    write_hf(tmp_path / "out", lazy(values()), {}, max_shard_bytes, 2)
    paths = list((tmp_path / "out").glob("*.safetensors"))
    found: dict[str, torch.Tensor] = {}
    for path in paths:
        found |= load_file(path)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for key in file.keys():
                stored = file.get_slice(key)
                assert torch.equal(stored[:], values()[key]), key
        length = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + length])
        assert length % 8 == 0
        starts = {key: header[key]["data_offsets"][0] for key in header if key != "__metadata__"}
        assert not any(start % values()[key].itemsize for key, start in starts.items()), "out of alignment"
    assert (len(paths) == 1) == (max_shard_bytes == 10**6)
    assert found.keys() == values().keys()
    for key, value in values().items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def test_workers_write_at_the_same_time_and_hold_a_tensor_each(tmp_path: Path) -> None:
    together = threading.Barrier(2, timeout=20)
    lock, alive, most = threading.Lock(), [], []

    def load(key: str) -> torch.Tensor:
        if key in ("t0", "t6"):  # the first of each file
            together.wait()
        with lock:
            value = torch.full((4,), float(key[1:]))
            alive.append(weakref.ref(value))
            most.append(sum(ref() is not None for ref in alive))
        return value

    tensors = {f"t{i}": torch.full((4,), float(i)) for i in range(12)}
    write_hf(tmp_path / "out", lazy(tensors, load), {}, 6 * 16, workers=2)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert 1 <= max(most) <= 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("odd"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    done: list[str] = []
    failed = threading.Event()

    def load(key: str) -> torch.Tensor:
        if key == "t0":
            failed.set()
            raise error
        failed.wait(20)
        done.append(key)
        time.sleep(0.002)
        return torch.zeros(4)

    tensors = {f"t{i}": torch.zeros(4) for i in range(600)}
    with pytest.raises(ConfigError if isinstance(error, OSError) else type(error)):
        write_hf(tmp_path / "out", lazy(tensors, load), {}, 300 * 16, workers=2)
    assert not list(tmp_path.iterdir())
    assert len(done) < 150, "the other worker went on"


def test_a_folder_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    def load(key: str) -> torch.Tensor:
        assert not (tmp_path / "out").exists()  # nothing that looks finished
        with pytest.raises(ConfigError, match=r"out\.tmp exists already"):
            write_hf(tmp_path / "out", lazy(values()), {}, 200)
        return torch.zeros(4)

    write_hf(tmp_path / "out", lazy({"t": torch.zeros(4)}, load), {}, 200)
    assert set(content(tmp_path / "out")) == {"model.safetensors"}
    with pytest.raises(ConfigError, match="out exists already"):
        write_hf(tmp_path / "out", lazy(values()), {}, 200)


def test_a_full_disk_is_seen_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(key: str) -> torch.Tensor:
        raise AssertionError("read")

    usage = shutil.disk_usage(tmp_path)._replace(free=15)
    monkeypatch.setattr("moe_trainer.checkpoint.hf_write.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"disk full: the export needs 16 bytes, 15 are free"):
        write_hf(tmp_path / "out", lazy({"t": torch.zeros(4)}, load), {}, 200)
    assert not list(tmp_path.iterdir())
