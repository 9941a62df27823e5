"""Files made to do harm: whatever their bytes, a ConfigError of one line, nothing run, nothing written, no crash."""

import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_trainer.checkpoint.documents import model_config_from_json, model_config_to_json
from moe_trainer.checkpoint.hf import load_hf
from moe_trainer.checkpoint.inspect import describe
from moe_trainer.checkpoint.manager import CheckpointManager, find_latest
from moe_trainer.checkpoint.manifest import damage, read_commit
from moe_trainer.checkpoint.sharded import load_tensors, read_metadata
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ModelConfig
from moe_trainer.models.keymap import Piece
from moe_trainer.train.state import TrainState

NASTY = [
    None, True, -1, 0, 2**63, 2**2000, 5.5, "5", 1e308, float("inf"), "", "x", "\0", "../../etc/passwd",
    "/etc/passwd", "a\nb", [], [[]], {}, {"a": 1}, "\ud800", "tensors", ".",
]  # fmt: skip
MODEL = ModelConfig(hidden_size=16, num_layers=1)


def mutated(raw: bytes, source: random.Random) -> bytes:
    """Some bytes flipped, cut, doubled, or replaced."""
    raw = bytearray(raw)
    for _ in range(source.randint(1, 4)):
        start = source.randrange(len(raw) + 1)
        stop = min(len(raw), start + source.randint(0, 16))
        piece = raw[start:stop]
        choices = [b"", piece * 3, source.randbytes(len(piece)), b"9" * 30, b"[" * 2000]
        raw[start:stop] = source.choice(choices)
    return bytes(raw)


def with_one_changed(value: object, source: random.Random) -> object:
    """A JSON value of which one entry, at any depth, is something else."""
    if isinstance(value, dict) and value and source.random() < 0.9:
        name = source.choice(sorted(value))
        return {**value, name: with_one_changed(value[name], source)}
    if isinstance(value, list) and value and source.random() < 0.9:
        place = source.randrange(len(value))
        return [*value[:place], with_one_changed(value[place], source), *value[place + 1 :]]
    return source.choice(NASTY)


def survives(read: Callable[[], object]) -> bool:
    """Whether it was read; if not, one line said why."""
    try:
        read()
    except ConfigError as error:
        assert "\n" not in str(error) and str(error)
        return False
    return True


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    documents = {
        "state.json": TrainState(1, 10, "f" * 64, 3, 24, 100, moments_since={"w": 2}).to_json(world_size=1),
        "model.json": model_config_to_json(MODEL),
    }
    tensors = {"model.w": torch.ones(4, 3), "optim.exp_avg.w": torch.zeros(4, 3)}
    return CheckpointManager(tmp_path_factory.mktemp("saved"), None).save(3, tensors, documents)


@pytest.mark.parametrize("how", ["bytes", "values"])
def test_manifest(saved: Path, tmp_path: Path, how: str) -> None:
    source, folder = random.Random(0), tmp_path / "step-00000003"
    shutil.copytree(saved, folder)
    good = (saved / "COMMIT.json").read_bytes()
    read = 0
    for _ in range(400):
        value = with_one_changed(json.loads(good), source) if how == "values" else None
        raw = mutated(good, source) if how == "bytes" else json.dumps(value).encode()
        (folder / "COMMIT.json").write_bytes(raw)
        read += survives(lambda: read_commit(folder))
        assert survives(lambda: describe(folder)) or not survives(lambda: read_commit(folder))
        assert damage(folder) or json.loads(raw)["files"].items() <= json.loads(good)["files"].items()
        assert find_latest(tmp_path) in (None, folder)
    assert 0 < read < 400
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000003"}


@pytest.mark.parametrize(
    ("name", "read"), [("state.json", TrainState.from_json), ("model.json", model_config_from_json)]
)
def test_documents(saved: Path, name: str, read: Callable[[str], object]) -> None:
    source, good = random.Random(1), (saved / name).read_text()
    for _ in range(400):
        survives(lambda: read(mutated(good.encode(), source).decode("utf-8", "replace")))
        survives(lambda: read(json.dumps(with_one_changed(json.loads(good), source))))
    assert read(good) == read(good)


@pytest.mark.parametrize("name", ["state.json", "model.json"])
@pytest.mark.parametrize("text", ['{"a":' * 40 + "1" + "}" * 40, '{"a":' * 900 + "1" + "}" * 900, "[" * 10**5])
def test_documents_nested_deeply_are_no_trap_for_who_shows_them(
    saved: Path, tmp_path: Path, name: str, text: str
) -> None:
    shutil.copytree(saved, tmp_path / saved.name)
    (tmp_path / saved.name / name).write_text(text)
    survives(lambda: describe(tmp_path / saved.name))


def test_what_is_shown_moves_no_cursor(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / saved.name)
    (tmp_path / saved.name / "state.json").write_text(json.dumps({"a": "\x1b[2J", "b": "\ud800", "c": "x\ny"}))
    lines = describe(tmp_path / saved.name).splitlines()
    assert all(line.isprintable() for line in lines)
    assert r"\x1b[2J" in lines[2] and r"\ud800" in lines[3] and r"x\ny" in lines[4]


def test_model_of_impossible_shape() -> None:
    for change in ({"hidden_size": -1}, {"num_experts": 0}, {"top_k": 9}, {"head_dim": 3}):
        with pytest.raises(ConfigError, match="model."):
            model_config_from_json(model_config_to_json(replace(MODEL, **change)))
    with pytest.raises(ConfigError, match="model.hidden_size is 'wide', which is no int"):
        model_config_from_json(json.dumps({"family": "mixtral", "hidden_size": "wide"}))


def test_metadata_of_dcp(saved: Path, tmp_path: Path) -> None:
    source, folder = random.Random(2), tmp_path / "tensors"
    shutil.copytree(saved / "tensors", folder)
    good = (folder / ".metadata").read_bytes()
    wanted = {"model.w": torch.zeros(4, 3), "optim.exp_avg.w": torch.zeros(4, 3)}
    for _ in range(300):
        (folder / ".metadata").write_bytes(mutated(good, source))
        if survives(lambda: read_metadata(folder)):
            try:
                load_tensors(folder, wanted)
            except (ConfigError, RuntimeError):
                pass


def pickled(module: str, name: str, argument: str) -> bytes:
    """The opcodes of `module.name(argument)`; by hand, since pickle would import them here."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps(argument, 2)[2:-1] + b"\x85R."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "getattr"),
        ("subprocess", "Popen"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("importlib", "import_module"),
        ("pathlib", "Path.write_text"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch", "os.system"),
        ("torch.serialization", "os.system"),
    ],
)
def test_pickles_that_call_something(saved: Path, tmp_path: Path, module: str, name: str) -> None:
    folder = tmp_path / "tensors"
    shutil.copytree(saved / "tensors", folder)
    (folder / ".metadata").write_bytes(pickled(module, name, f"touch {tmp_path}/owned"))
    with pytest.raises(ConfigError, match="is not allowed here"):
        read_metadata(folder)
    assert not (tmp_path / "owned").exists()


def test_tensors_that_call_something(saved: Path, tmp_path: Path) -> None:
    """A pickle in the place of a tensor's bytes: DCP reads them with `weights_only`."""
    folder = tmp_path / "tensors"
    shutil.copytree(saved / "tensors", folder)
    metadata = read_metadata(folder)
    evil = pickled("os", "system", f"touch {tmp_path}/owned")
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, len(evil)
    (folder / "__0_0.distcp").write_bytes(evil)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(RuntimeError):
        load_tensors(folder, {"model.w": torch.zeros(4, 3), "optim.exp_avg.w": torch.zeros(4, 3)})
    assert not (tmp_path / "owned").exists()


KEY_MAP = {"a": [Piece("file.a")], "b": [Piece("file.b")]}


def parameters() -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(3, 2), "b": torch.zeros(4)}


@pytest.mark.parametrize("how", ["bytes", "header"])
def test_safetensors(tmp_path: Path, how: str) -> None:
    source, path = random.Random(3), tmp_path / "model.safetensors"
    save_file({"file.a": torch.ones(3, 2), "file.b": torch.ones(4)}, path)
    good = path.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    for _ in range(400):
        raw = mutated(good, source)
        if how == "header":
            text = json.dumps(with_one_changed(json.loads(good[8 : 8 + length]), source)).encode()
            lie = source.choice([len(text), len(text), 0, 2**40, 2**64 - 1])
            raw = struct.pack("<Q", lie) + text + good[8 + length :]
        path.write_bytes(raw)
        survives(lambda: load_hf(tmp_path, parameters(), lambda keys: KEY_MAP))


def test_index(tmp_path: Path) -> None:
    source = random.Random(4)
    save_file({"file.a": torch.ones(3, 2)}, tmp_path / "one.safetensors")
    save_file({"file.b": torch.ones(4)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    good = json.dumps({"weight_map": {"file.a": "one.safetensors", "file.b": "two.safetensors"}})
    index.write_text(good)
    assert survives(lambda: load_hf(tmp_path, parameters(), lambda keys: KEY_MAP))
    for _ in range(400):
        index.write_bytes(mutated(good.encode(), source))
        survives(lambda: load_hf(tmp_path, parameters(), lambda keys: KEY_MAP))
        index.write_text(json.dumps(with_one_changed(json.loads(good), source)))
        survives(lambda: load_hf(tmp_path, parameters(), lambda keys: KEY_MAP))
