"""Adapters out: added to the weights, or alone in the layout of PEFT."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_trainer.checkpoint.documents import model_config_to_json
from moe_trainer.checkpoint.export import export_checkpoint
from moe_trainer.checkpoint.lora import LORA, export_adapter, lora_to_json
from moe_trainer.checkpoint.manager import CheckpointManager
from moe_trainer.config.choices import DType, Family
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import LoraConfig, ModelConfig
from moe_trainer.data.tokenizer import load_tokenizer
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.lora import add_adapters, is_adapter
from moe_trainer.models.registry import FAMILIES
from moe_trainer.parallel.initialize import initialize

SMALL = ModelConfig(
    vocab_size=264, hidden_size=32, intermediate_size=16, num_layers=2, head_dim=8, num_kv_heads=2, num_experts=4
)
LORA_CONFIG = LoraConfig(rank=3, alpha=6.0, targets=["model.layers.*.self_attn.*_proj", "model.layers.*.mlp.experts"])
SHAPES = {
    "mixtral": SMALL,
    "qwen3_moe": replace(SMALL, family=Family.qwen3_moe),
    "gpt_oss": replace(SMALL, family=Family.gpt_oss, attention_bias=True, sliding_window=4),
}


def adapted(cfg: ModelConfig, lora: LoraConfig = LORA_CONFIG) -> CausalLM:
    model = FAMILIES[cfg.family].build(cfg)
    if lora.rank is not None:
        add_adapters(model, lora)
    initialize(model, 0, 0.1)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(std=0.2, generator=generator)
    return model


def save(model: CausalLM, cfg: ModelConfig, root: Path, **documents: str) -> Path:
    documents = {
        "model.json": model_config_to_json(cfg),
        "tokenizer.json": load_tokenizer("byte").to_str(),
        "state.json": "{}",
        **documents,
    }
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    return CheckpointManager(root, keep_last=None).save(1, tensors, documents)


@pytest.fixture
def folders(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path, CausalLM]:
    """The checkpoint with adapters, the folder of its base and the model."""
    cfg = SHAPES[request.param]
    model = adapted(cfg)
    checkpoint = save(model, cfg, tmp_path / "adapted", **{LORA: lora_to_json(LORA_CONFIG)})
    export_checkpoint(save(adapted(cfg, LoraConfig()), cfg, tmp_path / "plain"), tmp_path / "base", 10**9, DType.auto)
    return checkpoint, tmp_path / "base", model


@pytest.mark.parametrize("folders", SHAPES, indirect=True)
def test_the_merged_weights_are_those_of_the_formula(folders: tuple[Path, Path, CausalLM], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint, _, model = folders
    export_checkpoint(checkpoint, tmp_path / "merged", 10**9, DType.auto)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(20).view(2, 10) * 7
    with torch.no_grad():
        expected = model(ids).logits
        assert (theirs(ids).logits - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("folders", ["mixtral", "qwen3_moe"], indirect=True)
def test_the_adapter_alone_adds_what_merging_adds(folders: tuple[Path, Path, CausalLM], tmp_path: Path) -> None:
    """By PEFT's formulas, written here once more: B A for a matrix, and for experts an einsum of reshaped halves."""
    checkpoint, _, model = folders
    export_adapter(checkpoint, tmp_path / "adapter", DType.auto)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (3, 6.0, "LORA")
    halves = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(halves) == sum(is_adapter(name) for name, _ in model.named_parameters())
    layer, prefix = model.model.layers[1], "base_model.model.model.layers.1."
    a, b = (halves[f"{prefix}self_attn.k_proj.lora_{half}.weight"] for half in "AB")
    torch.testing.assert_close(b @ a, layer.self_attn.k_proj.lora_b @ layer.self_attn.k_proj.lora_a)
    for name, infix in (("gate_up", "base_layer."), ("down", "")):
        a, b = (halves[f"{prefix}mlp.experts.{infix}lora_{half}.weight"] for half in "AB")
        found = torch.einsum("ore,eri->eoi", b.reshape(len(b), -1, 4), a.reshape(4, -1, a.shape[1]))
        ours, theirs = (getattr(layer.mlp.experts, f"{name}_lora_{half}") for half in "ab")
        torch.testing.assert_close(found, theirs.flatten(1, -2) @ ours)
    assert f"model.layers.1.mlp.experts.{name}_proj" in settings["target_parameters"]
    assert "model.layers.0.self_attn.o_proj" in settings["target_modules"]


@pytest.mark.parametrize("folders", ["mixtral", "qwen3_moe"], indirect=True)
def test_peft_reads_the_adapter(folders: tuple[Path, Path, CausalLM], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    checkpoint, base, model = folders
    export_adapter(checkpoint, tmp_path / "adapter", DType.auto)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    ids = torch.arange(20).view(2, 10) * 7
    with torch.no_grad():
        expected = model(ids).logits
        assert (theirs(ids).logits - expected).norm() < 1e-5 * expected.norm()


def test_what_cannot_be_exported_alone(tmp_path: Path) -> None:
    cfg = SHAPES["gpt_oss"]
    checkpoint = save(adapted(cfg), cfg, tmp_path / "a", **{LORA: lora_to_json(LORA_CONFIG)})
    with pytest.raises(ConfigError, match=r"experts.down_proj lies differently on the hub: .* lora=merged"):
        export_adapter(checkpoint, tmp_path / "out", DType.auto)
    plain = save(adapted(SMALL, LoraConfig()), SMALL, tmp_path / "b")
    with pytest.raises(ConfigError, match="has no adapters; leave lora=adapter out"):
        export_adapter(plain, tmp_path / "out", DType.auto)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"rank": 0, "alpha": 1}', '{"rank": 2, "alpha": NaN}', '{"rank": true}'])
def test_a_damaged_document(text: str, tmp_path: Path) -> None:
    checkpoint = save(adapted(SMALL), SMALL, tmp_path / "a", **{LORA: text})
    with pytest.raises(ConfigError, match="lora.json cannot be read"):
        export_checkpoint(checkpoint, tmp_path / "out", 10**9, DType.auto)
