"""gpt-oss against transformers: windows, sinks, biases, the clamped experts and YaRN, both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GptOssConfig, GptOssForCausalLM

from moe_trainer.config.errors import ConfigError
from moe_trainer.models.gpt_oss.hf import model_config_from_hf
from tests.unit.models.against_transformers import SEQ, assert_same_as, randomize

WINDOW = 5
assert SEQ > 2 * WINDOW
_SLIDING, _FULL = "sliding_attention", "full_attention"
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as_published": {"rope_parameters": _YARN | {"truncate": False}},
    "yarn_truncated": {"rope_parameters": _YARN | {"truncate": True, "attention_factor": 1.2}},
    "all_layers_slide": {"layer_types": [_SLIDING] * 3, "rope_parameters": _PLAIN_ROPE, "num_key_value_heads": 4},
    "no_layer_slides": {"layer_types": [_FULL] * 3, "rope_parameters": _PLAIN_ROPE, "attention_bias": False},
    "narrow_clamp": {
        "layer_types": [_FULL, _SLIDING, _SLIDING],
        "rope_parameters": _YARN | {"truncate": False},
        "swiglu_limit": 0.4,
        "swiglu_alpha": 1.1,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "num_experts_per_tok": 3,
    },
}


def theirs(**changes: Any) -> GptOssForCausalLM:
    settings = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "max_position_embeddings": 512,
        "attn_implementation": "eager",
    }
    return randomize(GptOssForCausalLM(GptOssConfig(**settings | changes)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_as_transformers(variant: str, tmp_path: Path) -> None:
    if "swiglu_alpha" in VARIANTS[variant] and not hasattr(GptOssConfig(), "swiglu_alpha"):
        pytest.skip("this transformers has no such option")
    assert_same_as(theirs(**VARIANTS[variant]), tmp_path)


def test_the_config_of_transformers_4(tmp_path: Path) -> None:
    theirs(rope_parameters=_YARN | {"truncate": False}).save_pretrained(tmp_path)
    new = model_config_from_hf(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    del config["layer_types"]  # every other layer slides, from the first on
    config.pop("swiglu_alpha", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_config_from_hf(tmp_path) == new
    assert new.sliding_layers == [0, 2] and new.rope.truncate is False and new.rope.theta == 150000.0


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"layer_types": [_FULL]},
        {"layer_types": [_FULL, _FULL, "chunked_attention"]},
        {"quantization_config": {"quant_method": "gptq"}},
        {"attention_dropout": 0.1},
        {"sliding_window": 0},
        {"head_dim": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_refused(change: dict[str, Any], tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    model_config_from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError) as refusal:
        model_config_from_hf(tmp_path)
    assert "config.json: " in str(refusal.value) and "\n" not in str(refusal.value)
