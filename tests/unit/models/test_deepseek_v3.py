"""DeepSeek-V3 against transformers: every option of the family both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moe_trainer.config.choices import Family
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ModelConfig
from moe_trainer.models.deepseek_v3.hf import hf_config, model_config_from_hf
from tests.unit.models.against_transformers import assert_same_as, from_folder, randomize

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32,
    "beta_slow": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "latent_queries_in_groups": {
        "q_lora_rank": 10,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.5,
    },
    "yarn_with_equal_mscales": {
        "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        "n_shared_experts": 2,
        "q_lora_rank": 12,
        "attention_bias": True,
    },
    "yarn_with_other_mscales": {
        "rope_parameters": _YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
        "rope_interleave": False,
        "n_group": 2,
        "topk_group": 1,
    },
    "yarn_without_mscale": {
        "rope_parameters": _YARN | {"attention_factor": None},
        "first_k_dense_replace": 2,
        "rope_interleave": False,
        "norm_topk_prob": False,
        "attention_bias": True,
    },
    "tied": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    },
}


def theirs(**changes: Any) -> DeepseekV3ForCausalLM:
    settings = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 8,
        "v_head_dim": 14,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 64,
        "num_mtp_layers": 0,
        "attn_implementation": "eager",
    }
    return randomize(DeepseekV3ForCausalLM(DeepseekV3Config(**settings | changes)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_as_transformers(variant: str, tmp_path: Path) -> None:
    assert_same_as(theirs(**VARIANTS[variant]), tmp_path)


def test_the_bias_counts_for_the_choice(tmp_path: Path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path)
    _, ours = from_folder(tmp_path)
    router = ours.model.layers[1].mlp.gate
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    chosen = router(x)
    router.expert_bias.zero_()
    without = router(x)
    assert not torch.equal(chosen.top_k_index.sort().values, without.top_k_index.sort().values)
    assert torch.equal(chosen.logits, without.logits)
    assert torch.allclose(chosen.top_k_weights.sum(1), without.top_k_weights.sum(1))


def test_layers_of_multi_token_prediction_are_left_unread(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {"model.layers.3.eh_proj.weight": torch.ones(2, 2), "model.layers.3.mlp.gate.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    from_folder(tmp_path)
    save_file(tensors | {"model.layers.2.eh_proj.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"unexpected: model\.layers\.2\.eh_proj\.weight$"):
        from_folder(tmp_path)


def test_the_config_of_transformers_4(tmp_path: Path) -> None:
    model = theirs(**VARIANTS["yarn_with_other_mscales"])
    model.save_pretrained(tmp_path)
    new = model_config_from_hf(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": rope.pop("rope_type")}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_config_from_hf(tmp_path) == new


@pytest.mark.parametrize(
    "change",
    [
        {"scoring_func": "softmax"},
        {"topk_method": "greedy"},
        {"moe_layer_freq": 2},
        {"hidden_act": "gelu"},
        {"num_key_value_heads": 2},
        {"model_type": "deepseek_v2"},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
        {"first_k_dense_replace": -1},
        {"rope_scaling": {"type": "longrope", "factor": 2.0}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_refused(change: dict[str, Any], tmp_path: Path) -> None:
    theirs().config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["DeepseekV3ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model_config_from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError) as refusal:
        model_config_from_hf(tmp_path)
    assert "config.json: " in str(refusal.value) and "\n" not in str(refusal.value)


def test_dense_layers_in_between_cannot_be_written() -> None:
    cfg = ModelConfig(family=Family.deepseek_v3, num_layers=3, dense_layers=[1], dense_intermediate_size=8)
    with pytest.raises(ConfigError, match="must be the first layers"):
        hf_config(cfg, "float32", None)
