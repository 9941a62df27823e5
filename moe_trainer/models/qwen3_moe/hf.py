"""Qwen3-MoE on the Hugging Face hub: its config.json and the names and layouts of its tensors.

There `intermediate_size` is the width of a dense layer's MLP and `moe_intermediate_size` that of one expert.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from moe_trainer.config.choices import Family
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ModelConfig
from moe_trainer.models import hub
from moe_trainer.models.keymap import KeyMap

_ARCHITECTURE = "Qwen3MoeForCausalLM"
# What config.json may say, because the model here does just that; absent means the first value.
_BUILT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "quantization_config": (None,),
}
_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "moe_intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
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
    hub.check_architecture(config, Family.qwen3_moe, _ARCHITECTURE)
    hub.check_built(config, _BUILT)
    renamed = {"num_experts": "num_local_experts"} if config.given("num_local_experts") else {}  # by transformers 5
    sizes = hub.sizes_from(config, _NAMES | renamed)
    dense_layers = _dense_layers(config, sizes["num_layers"])
    slides = config.flag("use_sliding_window", False) and config.given("sliding_window")
    return ModelConfig(
        family=Family.qwen3_moe,
        **sizes,
        head_dim=config.size("head_dim", sizes["hidden_size"] // sizes["num_heads"]),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=hub.rope_from(config, 1e4, sizes["max_position_embeddings"]),
        initializer_range=config.number("initializer_range", 0.02),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        norm_topk_prob=config.flag("norm_topk_prob", False),
        attention_bias=config.flag("attention_bias", False),
        sliding_window=config.size("sliding_window") if slides else None,
        dense_layers=dense_layers,
        dense_intermediate_size=config.size("intermediate_size") if dense_layers else None,
    )


def _dense_layers(config: hub.HubConfig, num_layers: int) -> list[int]:
    """Of every `decoder_sparse_step` layers only the last is sparse, and none of `mlp_only_layers`."""
    named = config.values.get("mlp_only_layers") or []
    if not isinstance(named, list) or not all(type(layer) is int for layer in named):
        raise ConfigError(f"{config.path}: mlp_only_layers={named} must be a list of layers")
    step = config.size("decoder_sparse_step", 1)
    return [layer for layer in range(num_layers) if layer in named or (layer + 1) % step]


def hf_config(model: ModelConfig, dtype: str, eos_token_id: int | None) -> dict[str, Any]:
    """What config.json says of this model, in a form that transformers 4 and 5 read; see `hub.common_config`."""
    return hub.common_config(model, _ARCHITECTURE, _NAMES, dtype, eos_token_id) | {
        "head_dim": model.head_dim,
        "intermediate_size": model.dense_intermediate_size or model.intermediate_size,
        "mlp_only_layers": list(model.dense_layers),
        "decoder_sparse_step": 1,
        "norm_topk_prob": model.norm_topk_prob,
        "attention_bias": model.attention_bias,
        "use_sliding_window": model.sliding_window is not None,
        "sliding_window": model.sliding_window,
        "max_window_layers": 0,
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
        is_dense = layer in model.dense_layers
        pieces |= hub.dense_pieces(prefix) if is_dense else hub.expert_pieces(prefix, model, keys)
    return pieces
