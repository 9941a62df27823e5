"""OLMoE on the Hugging Face hub: its config.json and the names and layouts of its tensors."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from moe_trainer.config.choices import Family
from moe_trainer.config.schema import ModelConfig
from moe_trainer.models import hub
from moe_trainer.models.keymap import KeyMap

_ARCHITECTURE = "OlmoeForCausalLM"
# What config.json may say, because the model here does just that; absent means the first value.
_BUILT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "max_position_embeddings": "max_position_embeddings",
}


def model_config_from_hf(folder: Path) -> ModelConfig:
    """The model's shape from `folder/config.json`, as written by transformers 4 or 5.

    Raises:
        ConfigError: no readable config.json, another family, or a feature that is not built here.
    """
    config = hub.read_config(folder)
    hub.check_architecture(config, Family.olmoe, _ARCHITECTURE)
    hub.check_built(config, _BUILT)
    sizes = hub.sizes_from(config, _NAMES)
    head_dim = sizes["hidden_size"] // sizes["num_heads"]
    hub.check_built(config, {"head_dim": (head_dim, None)})  # its norms span `hidden_size`, whatever the heads
    return ModelConfig(
        family=Family.olmoe,
        **sizes,
        num_kv_heads=config.size("num_key_value_heads", sizes["num_heads"]),
        head_dim=head_dim,
        rms_norm_eps=config.number("rms_norm_eps", 1e-5),
        rope=hub.rope_from(config, 1e4, sizes["max_position_embeddings"]),
        initializer_range=config.number("initializer_range", 0.02),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        norm_topk_prob=config.flag("norm_topk_prob", False),
        attention_bias=config.flag("attention_bias", False),
        clip_qkv=config.number("clip_qkv") if config.given("clip_qkv") else None,
    )


def hf_config(model: ModelConfig, dtype: str, eos_token_id: int | None) -> dict[str, Any]:
    """What config.json says of this model, in a form that transformers 4 and 5 read; see `hub.common_config`."""
    return hub.common_config(model, _ARCHITECTURE, _NAMES, dtype, eos_token_id) | {
        "num_key_value_heads": model.num_kv_heads,
        "norm_topk_prob": model.norm_topk_prob,
        "attention_bias": model.attention_bias,
        "clip_qkv": model.clip_qkv,
    }


def key_map(model: ModelConfig, keys: Collection[str] = ()) -> KeyMap:
    """Which tensors of the hub fill which block of which parameter.

    Args:
        keys: the names that a folder holds; they decide between the layouts. Without them, the one written on export.
    """
    pieces = hub.outer_pieces(model, keys)
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        pieces |= hub.layer_pieces(prefix, model, ("q_norm", "k_norm"))
        pieces |= hub.expert_pieces(prefix, model, keys)
    return pieces
