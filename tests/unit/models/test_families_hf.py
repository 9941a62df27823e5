"""Mixtral, Qwen3-MoE and OLMoE against transformers: every option of theirs, on and off."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_trainer.config.choices import Family, RopeType
from moe_trainer.config.errors import ConfigError
from moe_trainer.models import hub
from tests.unit.models.against_transformers import SEQ, assert_same_as, randomize

WINDOW = 5
assert WINDOW < SEQ

LINEAR = {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
FULL_YARN = YARN | {"beta_fast": 20.0, "beta_slow": 2.0, "mscale": 0.8, "mscale_all_dim": 1.2, "truncate": False}
SCALED_YARN = YARN | {"attention_factor": 1.3}

SMALL: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MIXTRAL = SMALL | {"intermediate_size": 24, "num_local_experts": 6}
QWEN3_MOE = SMALL | {"intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 6, "head_dim": 12}
OLMOE = SMALL | {"intermediate_size": 24, "num_experts": 6}

# For yarn, transformers wants Mixtral's `head_dim` said.
MIXTRALS = [
    {"sliding_window": WINDOW, "tie_word_embeddings": True},
    {"rope_parameters": LINEAR, "head_dim": 12, "num_experts_per_tok": 3},
    {"rope_parameters": YARN, "tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 8},
    {"rope_parameters": FULL_YARN, "sliding_window": WINDOW, "num_key_value_heads": 4, "head_dim": 8},
    {"rope_parameters": SCALED_YARN, "sliding_window": 64, "rms_norm_eps": 1e-3, "head_dim": 8},
]
QWEN3_MOES = [
    {"norm_topk_prob": True, "mlp_only_layers": [1]},
    {"norm_topk_prob": False, "attention_bias": True, "use_sliding_window": True, "sliding_window": WINDOW},
    {"decoder_sparse_step": 2, "tie_word_embeddings": True, "head_dim": 8, "rope_parameters": LINEAR},
    {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": True},
    {"rope_parameters": FULL_YARN, "use_sliding_window": False, "sliding_window": WINDOW, "num_key_value_heads": 4},
]
OLMOES = [
    {"clip_qkv": 0.4, "norm_topk_prob": False},
    {"norm_topk_prob": True, "attention_bias": True},
    {"clip_qkv": 0.7, "tie_word_embeddings": True, "num_key_value_heads": 4, "rope_parameters": LINEAR},
    {"rope_parameters": YARN, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
]


def check(config: Any, model: type, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = randomize(model(config))
    caplog.clear()
    assert_same_as(theirs, tmp_path)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not told, told


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers warns of reaches the test."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)


@pytest.mark.parametrize("options", MIXTRALS, ids=str)
def test_mixtral(options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(MixtralConfig(**MIXTRAL | options), MixtralForCausalLM, tmp_path, caplog)


@pytest.mark.parametrize("options", QWEN3_MOES, ids=str)
def test_qwen3_moe(options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(Qwen3MoeConfig(**QWEN3_MOE | options), Qwen3MoeForCausalLM, tmp_path, caplog)


@pytest.mark.parametrize("options", OLMOES, ids=str)
def test_olmoe(options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(OlmoeConfig(**OLMOE | options), OlmoeForCausalLM, tmp_path, caplog)


def rope_of(**values: Any) -> Any:
    return hub.rope_from(hub.HubConfig(Path("config.json"), values), 1e4, 64)


def test_rope_as_transformers_4_wrote_it() -> None:
    linear = rope_of(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2})
    assert (linear.theta, linear.type, linear.factor) == (5e5, RopeType.linear, 2.0)
    yarn = rope_of(rope_scaling={"rope_type": "yarn", "factor": 4.0, "beta_fast": 16})
    assert (yarn.theta, yarn.original_max_position_embeddings, yarn.beta_fast, yarn.beta_slow) == (1e4, 64, 16, 1)
    assert rope_of(rope_scaling=None, rope_theta=7).theta == 7
    stretched = rope_of(rope_scaling={"type": "yarn", "factor": None, "original_max_position_embeddings": 16})
    assert stretched.factor == 4.0


@pytest.mark.parametrize("parameters", [LINEAR, YARN, FULL_YARN, SCALED_YARN, {"rope_type": "default"}], ids=str)
def test_rope_there_and_back(parameters: dict[str, Any]) -> None:
    rope = rope_of(rope_parameters=parameters)
    assert rope_of(**hub.rope_to(rope)) == rope
    old = {key: value for key, value in hub.rope_to(rope).items() if key != "rope_parameters"}
    assert rope_of(**old) == rope


def test_the_family_is_read_from_config_json(tmp_path: Path) -> None:
    for text, family in (("mixtral", Family.mixtral), ("olmoe", Family.olmoe), ("gpt_oss", Family.gpt_oss)):
        (tmp_path / "config.json").write_text(f'{{"model_type": "{text}"}}')
        assert hub.family_of(tmp_path) is family
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="model_type=llama is not one of mixtral, qwen3_moe"):
        hub.model_config_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("config", "changes", "match"),
    [
        (Qwen3MoeConfig(**QWEN3_MOE), {"mlp_only_layers": 1}, "mlp_only_layers=1 must be a list"),
        (Qwen3MoeConfig(**QWEN3_MOE), {"norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false"),
        (Qwen3MoeConfig(**QWEN3_MOE), {"moe_intermediate_size": None}, "moe_intermediate_size=None"),
        (
            Qwen3MoeConfig(**QWEN3_MOE),
            {"architectures": ["Qwen3MoeForTokenClassification"]},
            "is not Qwen3MoeForCausalLM",
        ),
        (OlmoeConfig(**OLMOE), {"clip_qkv": -1}, "clip_qkv=-1 must be a positive number"),
        (OlmoeConfig(**OLMOE), {"head_dim": 16}, "head_dim=16 is not supported, only 8"),
        (OlmoeConfig(**OLMOE), {"hidden_act": "gelu"}, "hidden_act=gelu is not supported"),
    ],
)
def test_refused(config: Any, changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    hub.model_config_from_hf(tmp_path)
    values = hub.read_config(tmp_path).values | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=match):
        hub.model_config_from_hf(tmp_path)
