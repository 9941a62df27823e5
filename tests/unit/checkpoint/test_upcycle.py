"""A dense model of transformers, upcycled: the same logits while its experts are equal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moe_trainer.cli.checkpoint import main
from moe_trainer.testing.compare import relative_error
from tests.unit.models.against_transformers import from_folder, randomize

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 5,
}
DENSE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, head_dim=8, sliding_window=6)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True)),
    "qwen3 bias": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16, attention_bias=True)),
}


def dense(kind: str, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = randomize(DENSE[kind]())
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"kept": true}')
    return model


def upcycled(tmp_path: Path, *options: str, out: str = "sparse") -> dict[str, torch.Tensor]:
    assert main(["upcycle", f"model={tmp_path / 'dense'}", f"out={tmp_path / out}", *options]) == 0
    return load_file(tmp_path / out / "model.safetensors")


@pytest.mark.parametrize("kind", DENSE)
def test_equal_experts_give_the_dense_models_logits(kind: str, tmp_path: Path) -> None:
    model = dense(kind, tmp_path / "dense")
    upcycled(tmp_path, "num_experts=4", "top_k=3")
    sparse, info = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not any(info.values()), info
    cfg, ours = from_folder(tmp_path / "sparse")
    ids = torch.randint(0, 64, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
        assert relative_error(sparse(ids).logits, expected) < 1e-5
        output = ours(ids)
        assert relative_error(output.logits, expected) < 1e-5
    assert (cfg.num_experts, cfg.top_k) == (4, 3)
    assert len(output.routings[0].top_k_index.unique()) == 4, "the router draws no distinction"
    assert (tmp_path / "sparse" / "tokenizer.json").read_text() == '{"kept": true}'
    assert json.loads((tmp_path / "sparse" / "config.json").read_text())["eos_token_id"] == 5


def test_noise_and_drop_tell_the_experts_apart(tmp_path: Path) -> None:
    dense("llama", tmp_path / "dense")
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    noisy, again = (upcycled(tmp_path, "noise=0.1", out=out) for out in ("a", "b"))
    assert all(torch.equal(noisy[name], again[name]) for name in noisy)
    other = upcycled(tmp_path, "noise=0.1", "seed=1", out="c")
    gate = weights["model.layers.1.mlp.gate_proj.weight"]
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    assert not torch.equal(noisy[name.format(0)], other[name.format(0)])
    added = [noisy[name.format(expert)] - gate for expert in range(8)]
    assert all(change.std() == pytest.approx(0.1 * gate.std().item(), rel=0.1) for change in added)
    assert not torch.equal(added[0], added[1])

    dropped = upcycled(tmp_path, "drop=0.25", out="d")
    experts = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    chosen = []
    for expert in range(8):
        rows = {
            matrix: (dropped[experts.format(expert, matrix)] != weights[f"model.layers.1.mlp.{theirs}_proj.weight"])
            for matrix, theirs in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
        }
        found = [rows["w1"].any(1), rows["w3"].any(1), rows["w2"].any(0)]
        assert found[0].sum() == 12 and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        chosen.append(found[0])
    assert not torch.equal(chosen[0], chosen[1])


def test_the_type_can_be_chosen_and_shards_are_written(tmp_path: Path) -> None:
    dense("llama", tmp_path / "dense")
    options = [f"model={tmp_path / 'dense'}", f"out={tmp_path / 'out'}", "dtype=bfloat16", "max_shard_size=30KB"]
    assert main(["upcycle", *options, "workers=2"]) == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sparse.dtype is torch.bfloat16


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["model=none"], "moe-checkpoint: model=none: no config.json in it"),
        (["model="], "moe-checkpoint: model=DIR must be given"),
        (["out=dense"], "moe-checkpoint: out=dense exists already"),
        (["out="], "moe-checkpoint: out=DIR must be given"),
        (["top_k=9"], "moe-checkpoint: top_k=9 must be at most num_experts(8)"),
        (["drop=1"], "moe-checkpoint: drop=1.0 must be at least 0 and below 1"),
        (["noise=-1"], "moe-checkpoint: noise=-1.0 must be at least 0"),
        (["max_shard_size=big"], "moe-checkpoint: max_shard_size=big must be"),
    ],
)
def test_mistakes_of_the_command(
    options: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    dense("llama", tmp_path / "dense")
    capsys.readouterr()  # of transformers
    assert main(["upcycle", "model=dense", "out=out", *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"model_type": "gpt2"}, "model_type=gpt2 cannot be upcycled, only llama, mistral, qwen3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias=true is not supported in mixtral"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported, only silu"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type=llama3 is not supported"),
        ({"intermediate_size": 40}, "gate_proj.weight: shape [48, 32] in the file, [40, 32] by config.json"),
        ({"num_hidden_layers": 1}, "unexpected: model.layers.1."),
        ({"num_hidden_layers": 3}, "missing: model.layers.2."),
    ],
)
def test_folders_that_cannot_be_upcycled(
    values: dict[str, Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense("llama", tmp_path / "dense")
    change_config(tmp_path / "dense", **values)
    capsys.readouterr()  # of transformers
    assert main(["upcycle", f"model={tmp_path / 'dense'}", f"out={tmp_path / 'out'}"]) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_kept_document_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense("llama", tmp_path / "dense")
    (tmp_path / "dense" / "chat_template.jinja").write_bytes(b"\xff\xfe")
    capsys.readouterr()  # of transformers
    assert main(["upcycle", f"model={tmp_path / 'dense'}", f"out={tmp_path / 'out'}"]) == 2
    err = capsys.readouterr().err
    assert "chat_template.jinja cannot be read: 'utf-8' codec" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_integers_are_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense("llama", tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"].int()
    save_file(weights, path, {"format": "pt"})
    assert main(["upcycle", f"model={tmp_path / 'dense'}", f"out={tmp_path / 'out'}"]) == 2
    assert "model.norm.weight: I32 is not one of BF16, F16, F32, F64" in capsys.readouterr().err
