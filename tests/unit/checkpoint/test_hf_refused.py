"""What is wrong with a Hugging Face folder is said by name, before any parameter changes."""

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moe_trainer.checkpoint.hf import HubFiles, load_hf
from moe_trainer.checkpoint.hf_write import LazyTensor, write_hf
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ModelConfig
from moe_trainer.models.keymap import Piece
from moe_trainer.models.mixtral import hf as mixtral

KEY_MAP = {"a": [Piece("file.a")], "b": [Piece(f"file.b.{i}", target=(i,)) for i in range(2)]}


def parameters() -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(3, 2), "b": torch.zeros(2, 4)}


def content() -> dict[str, torch.Tensor]:
    return {"file.a": torch.ones(3, 2), "file.b.0": torch.ones(4), "file.b.1": torch.ones(4)}


def refused(folder: Path, match: str) -> None:
    ours = parameters()
    with pytest.raises(ConfigError, match=match) as caught:
        load_hf(folder, ours, lambda keys: KEY_MAP)
    assert "\n" not in str(caught.value)
    assert not any(value.any() for value in ours.values())


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_right_folder_loads(tmp_path: Path) -> None:
    save_file(content() | {"model.layers.0.rotary_emb.inv_freq": torch.ones(2)}, tmp_path / "model.safetensors")
    ours = parameters()
    load_hf(tmp_path, ours, lambda keys: KEY_MAP)
    assert all(bool((value == 1).all()) for value in ours.values())


def test_missing_unexpected_and_wrong_are_all_named(tmp_path: Path) -> None:
    wrong = content() | {"file.a": torch.ones(2, 3), "file.c": torch.ones(1)}
    wrong["file.b.1"] = torch.ones(4, dtype=torch.int32)
    del wrong["file.b.0"]
    save_file(wrong, tmp_path / "model.safetensors")
    refused(
        tmp_path,
        r"missing: file\.b\.0; unexpected: file\.c; file\.a: shape \[2, 3\] in the file, \[3, 2\] here; "
        r"file\.b\.1: I32 is not one of",
    )


def test_parameter_without_a_place(tmp_path: Path) -> None:
    save_file(content(), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="no place in the file layout for parameter c"):
        load_hf(tmp_path, parameters() | {"c": torch.zeros(1)}, lambda keys: KEY_MAP)


def test_empty_and_pickled_folders(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "is not a folder")
    refused(tmp_path, "holds neither model.safetensors nor")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused(tmp_path, r"only \.bin files")


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(content(), path)
    good = path.read_bytes()
    path.write_bytes(good[:-4])
    refused(tmp_path, r"model\.safetensors is missing, truncated or damaged")
    path.write_bytes((1 << 40).to_bytes(8, "little") + good[8:])
    refused(tmp_path, r"model\.safetensors is missing, truncated or damaged")
    path.write_bytes(b"")
    refused(tmp_path, r"model\.safetensors is missing, truncated or damaged")


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    """Mapped into memory, this would end the process with SIGBUS."""
    save_file({"a": torch.ones(300, 400)}, tmp_path / "model.safetensors")
    with ExitStack() as stack:
        files = HubFiles(tmp_path, stack)
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(ConfigError, match=r"model\.safetensors is shorter than it was"):
            files.read("a", (slice(0, 300), slice(0, 400)))


@pytest.mark.parametrize("file", ["../model-1.safetensors", "/etc/model-1.safetensors", "x/../../y.safetensors"])
def test_index_cannot_lead_outside(tmp_path: Path, file: str) -> None:
    write_index(tmp_path, {"file.a": file})
    refused(tmp_path, "names a file outside its folder")


def test_index_that_lies(tmp_path: Path) -> None:
    save_file(content(), tmp_path / "model-1.safetensors")
    write_index(tmp_path, dict.fromkeys(content(), "model-2.safetensors"))
    refused(tmp_path, r"model-2\.safetensors is missing")
    write_index(tmp_path, dict.fromkeys([*content(), "file.d"], "model-1.safetensors"))
    refused(tmp_path, r"not in the file that it names: file\.d")
    write_index(tmp_path, ["file.a"])
    refused(tmp_path, r"index\.json cannot be read")
    write_index(tmp_path, dict.fromkeys(content(), "model-1.safetensors"))
    save_file(content(), tmp_path / "model.safetensors")
    refused(tmp_path, "holds both")


def test_same_name_in_two_files(tmp_path: Path) -> None:
    save_file(content(), tmp_path / "model-1.safetensors")
    save_file({"file.a": torch.ones(3, 2)}, tmp_path / "model-2.safetensors")
    write_index(tmp_path, dict.fromkeys(content(), "model-1.safetensors") | {"file.a": "model-2.safetensors"})
    refused(tmp_path, "two files hold a tensor of the same name")


def test_pieces_with_source_blocks(tmp_path: Path) -> None:
    """Two halves of one file tensor fill two slabs of a parameter."""
    packed = torch.arange(24.0).reshape(2, 6, 2)  # [experts, 2 * intermediate, hidden]
    save_file({"packed": packed}, tmp_path / "model.safetensors")
    whole = slice(0, 2)
    halves = [Piece("packed", (whole, half), (whole, slice(half * 3, half * 3 + 3))) for half in range(2)]
    ours = {"p": torch.zeros(2, 2, 3, 2, dtype=torch.bfloat16)}
    load_hf(tmp_path, ours, lambda keys: {"p": halves})
    assert torch.equal(ours["p"].float(), packed.reshape(2, 2, 3, 2))


def test_pieces_with_target_blocks(tmp_path: Path) -> None:
    """Rows of a parameter that lie in different file tensors, or in blocks of one."""
    save_file({"top": torch.ones(2, 3), "rest": torch.arange(12.0).reshape(4, 3)}, tmp_path / "model.safetensors")
    pieces = [
        Piece("top", (slice(0, 2),)),
        Piece("rest", (slice(2, 3),), (slice(3, 4),)),
        Piece("rest", (slice(3, 6),), (slice(0, 3),)),
    ]
    ours = {"p": torch.zeros(6, 3)}
    load_hf(tmp_path, ours, lambda keys: {"p": pieces})
    assert ours["p"].tolist() == [[1, 1, 1], [1, 1, 1], [9, 10, 11], [0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_writer_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []

    def load(name: str) -> torch.Tensor:
        order.append(f"load {name} {sorted(path.name for path in tmp_path.rglob('*.safetensors'))[-1:]}")
        return torch.full((4,), float(len(order)))

    tensors = [LazyTensor(name, (4,), torch.float32, partial(load, name)) for name in "abc"]
    write_hf(tmp_path / "out", tensors, {"note.txt": "x"}, max_shard_bytes=32, workers=1)
    # c belongs to the second file, and is made only when that one is open.
    assert order == [
        f"load {name} ['model-0000{shard}-of-00002.safetensors']" for name, shard in (("a", 1), ("b", 1), ("c", 2))
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 48
    ours = {name: torch.zeros(4) for name in "abc"}
    load_hf(tmp_path / "out", ours, lambda keys: {name: [Piece(name)] for name in "abc"})
    assert [value[0].item() for value in ours.values()] == [1, 2, 3]


GOOD = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


def config_of(folder: Path, **changes: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(GOOD | changes))
    return mixtral.model_config_from_hf(folder)


def test_config_of_mixtral_8x7b(tmp_path: Path) -> None:
    """The hub's file as transformers 4 wrote it, and the same in the words of transformers 5."""
    config = config_of(tmp_path)
    assert (config.num_experts, config.top_k, config.head_dim, config.num_kv_heads) == (8, 2, 128, 8)
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    assert config_of(tmp_path, rope_theta=None, rope_parameters=rope).rope.theta == 5e5
    assert config_of(tmp_path, head_dim=64).head_dim == 64


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "llama"}, "is not MixtralForCausalLM"),
        ({"architectures": ["MixtralForTokenClassification"]}, "is not MixtralForCausalLM"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "rope_type=llama3"),
        ({"rope_scaling": {"type": "linear"}}, "factor=None"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "factor=4"),
        ({"rope_scaling": 2.0}, "rope_scaling=2.0 must be a mapping"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings=yes"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size=None"),
        ({"num_local_experts": "8"}, "num_local_experts=8"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps=small"),
    ],
)
def test_config_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        config_of(tmp_path, **changes)


def test_config_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        mixtral.model_config_from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        mixtral.model_config_from_hf(tmp_path)
