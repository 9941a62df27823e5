"""Hugging Face folders in and out, against transformers itself."""

import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from moe_trainer.checkpoint.documents import model_config_from_json, model_config_to_json
from moe_trainer.checkpoint.export import export_checkpoint
from moe_trainer.checkpoint.hf import load_hf
from moe_trainer.checkpoint.inspect import describe
from moe_trainer.checkpoint.manager import CheckpointManager
from moe_trainer.config.choices import DType
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ModelConfig
from moe_trainer.data.tokenizer import load_tokenizer
from moe_trainer.models.mixtral import hf as mixtral

SHAPE = ModelConfig(
    vocab_size=264, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)


def theirs(dtype: torch.dtype = torch.float32) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        max_position_embeddings=4096,
    )
    return MixtralForCausalLM(config).to(dtype)


def empty_parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Ours, by the shapes that transformers holds in memory."""
    shapes = {name: list(value.shape) for name, value in theirs().state_dict().items()}
    for name, shape in shapes.items():
        if name.endswith("gate_up_proj"):
            shapes[name] = [shape[0], 2, shape[1] // 2, shape[2]]
    return {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in shapes.items()}


def assert_equal_to_theirs(ours: dict[str, torch.Tensor], model: MixtralForCausalLM) -> None:
    state = model.state_dict()
    assert ours.keys() == state.keys()
    for name, value in ours.items():
        assert torch.equal(value.reshape(state[name].shape), state[name].to(value.dtype)), name


def export(tmp_path: Path, parameters: dict[str, torch.Tensor], out: str, max_shard_bytes: int = 10**9, **kw) -> Path:
    manager = CheckpointManager(tmp_path / f"{out}-checkpoints", keep_last=None)
    checkpoint = manager.save(
        3,
        {f"model.{name}": value for name, value in parameters.items()}
        | {f"optim.exp_avg.{name}": value * 0.5 for name, value in parameters.items()},
        {
            "model.json": model_config_to_json(SHAPE),
            "tokenizer.json": load_tokenizer("byte").to_str(),
            "state.json": json.dumps({"step": 3, "tokens": 1234, "mesh": {"fsdp": 2, "tp": 2}}),
        },
    )
    export_checkpoint(checkpoint, tmp_path / out, max_shard_bytes, **{"dtype": DType.auto, **kw})
    return tmp_path / out


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_import_equals_transformers(tmp_path: Path, max_shard_size: str, dtype: torch.dtype) -> None:
    model = theirs(dtype)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    config = mixtral.model_config_from_hf(tmp_path)
    assert config == SHAPE
    parameters = empty_parameters()
    load_hf(tmp_path, parameters, partial(mixtral.key_map, config))
    assert_equal_to_theirs(parameters, model)


def test_import_of_the_fused_layout(tmp_path: Path) -> None:
    model = theirs()
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    parameters = empty_parameters()
    load_hf(tmp_path, parameters, partial(mixtral.key_map, SHAPE))
    assert_equal_to_theirs(parameters, model)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_transformers_loads_the_export(
    tmp_path: Path, max_shard_bytes: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = theirs()
    model.save_pretrained(tmp_path / "hub")
    parameters = empty_parameters()
    load_hf(tmp_path / "hub", parameters, partial(mixtral.key_map, SHAPE))
    out = export(tmp_path, parameters, "out", max_shard_bytes)
    shards = sorted(out.glob("*.safetensors"))
    assert (len(shards) == 1) == (max_shard_bytes == 10**9)
    assert all(path.stat().st_size < 21_000 + 3000 for path in shards) or len(shards) == 1
    again, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert again.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    tokens = torch.arange(9)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert mixtral.model_config_from_hf(out) == SHAPE
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("Zoë", add_special_tokens=False)["input_ids"] == list("Zoë".encode())
    assert tokenizer.eos_token_id == again.config.eos_token_id == again.generation_config.eos_token_id == 256


def test_export_writes_the_asked_dtype(tmp_path: Path) -> None:
    parameters = {name: torch.randn(value.shape) for name, value in empty_parameters().items()}
    out = export(tmp_path, parameters, "out", dtype=DType.bfloat16)
    stored = load_file(out / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    expected = parameters["model.layers.1.mlp.experts.gate_up_proj"][3, 1].bfloat16()
    assert torch.equal(stored[name], expected)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_export_never_overwrites_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {name: torch.zeros(value.shape) for name, value in empty_parameters().items()}
    out = export(tmp_path, parameters, "out")
    checkpoint = next((tmp_path / "out-checkpoints").glob("step-*"))
    with pytest.raises(ConfigError, match="out exists already"):
        export_checkpoint(checkpoint, out, 10**9, DType.float32)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_trainer.checkpoint.hf_write._write_tensor", full)
    with pytest.raises(ConfigError, match="No space left"):
        export_checkpoint(checkpoint, tmp_path / "other", 10**9, DType.float32)
    assert not list(tmp_path.glob("other*"))


def test_export_refuses_weights_that_do_not_fit(tmp_path: Path) -> None:
    parameters = {name: torch.zeros(value.shape) for name, value in empty_parameters().items()}
    del parameters["model.norm.weight"]
    parameters["model.extra"] = torch.zeros(2)
    with pytest.raises(ConfigError, match=r"model\.extra, model\.norm\.weight"):
        export(tmp_path, parameters, "out")
    assert not (tmp_path / "out").exists()


def test_model_json_round_trip() -> None:
    assert model_config_from_json(model_config_to_json(SHAPE)) == SHAPE
    with pytest.raises(ConfigError, match="unknown wings"):
        model_config_from_json('{"family": "mixtral", "wings": 2}')
    with pytest.raises(ConfigError, match=r"model\.json"):
        model_config_from_json('{"family": "camel"}')


def test_describe(tmp_path: Path) -> None:
    parameters = {name: torch.zeros(value.shape) for name, value in empty_parameters().items()}
    export(tmp_path, parameters, "out")
    text = describe(next((tmp_path / "out-checkpoints").glob("step-*")))
    count = sum(value.numel() for value in parameters.values())
    head = dict(line.split(maxsplit=1) for line in text.split("\n\n")[0].splitlines())
    assert (head["step"], head["tokens"], head["mesh"]) == ("3", "1234", "fsdp=2 tp=2")
    assert (head["parameters"], head["weights"]) == (f"{count:,}", f"{count * 4:,} bytes")
    assert head["optimizer"] == f"{count * 4:,} bytes in {len(parameters)} tensors"
    row = next(line for line in text.splitlines() if "layers.0.mlp.experts.gate_up_proj" in line)
    assert "4 x 2 x 24 x 16" in row and row.endswith(f"{4 * 2 * 24 * 16 * 4:,}")
