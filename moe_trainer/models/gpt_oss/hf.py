"""gpt-oss on the Hugging Face hub: its config.json, and its transposed, interleaved and quantised expert weights.

In the file `gate_up_proj` is [num_experts, hidden, 2 * intermediate] with gate and up side by side, and `down_proj`
[num_experts, intermediate, hidden]; quantised to MXFP4 (as published) both are the other way round, like ours.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from moe_trainer.config.choices import Family
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ModelConfig
from moe_trainer.models.hub import (
    HubConfig,
    check_architecture,
    check_built,
    common_config,
    layer_pieces,
    outer_pieces,
    read_config,
    rope_from,
    sizes_from,
)
from moe_trainer.models.keymap import Encoding, KeyMap, Piece

_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_local_experts",  # the hub means all experts by it
    "top_k": "num_experts_per_tok",
    "max_position_embeddings": "max_position_embeddings",
}
_RENAMED = {
    "self_attn.sinks.weight": "self_attn.sinks",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.experts.down_bias": "mlp.experts.down_proj_bias",
}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def model_config_from_hf(folder: Path) -> ModelConfig:
    """The model's shape from `folder/config.json`, as written by transformers 4 or 5.

    Raises:
        ConfigError: no readable config.json, another family, or a feature that is not built here.
    """
    config = read_config(folder)
    check_architecture(config, Family.gpt_oss, "GptOssForCausalLM")
    check_built(config, {"hidden_act": ("silu",), "attention_dropout": (0.0,)})
    method = config.part("quantization_config").values.get("quant_method", "mxfp4")
    if method != "mxfp4":
        raise ConfigError(f"{config.path}: quantization {method} is not supported, only mxfp4")
    sizes = sizes_from(config, _NAMES)
    return ModelConfig(
        family=Family.gpt_oss,
        **sizes,
        sliding_window=config.size("sliding_window") if config.given("sliding_window") else None,
        sliding_layers=_sliding_layers(config, sizes["num_layers"]),
        attention_bias=config.flag("attention_bias", True),
        swiglu_alpha=config.number("swiglu_alpha", 1.702),
        swiglu_limit=config.number("swiglu_limit", 7.0),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        rms_norm_eps=config.number("rms_norm_eps", 1e-5),
        rope=rope_from(config, 150000.0, sizes["max_position_embeddings"]),
        initializer_range=config.number("initializer_range", 0.02),
    )


def hf_config(model: ModelConfig, dtype: str, eos_token_id: int | None) -> dict[str, Any]:
    """What config.json says of this model, in a form that transformers 4 and 5 read.

    Args:
        dtype: of the weights, by torch's name, such as `bfloat16`.
    """
    layers = range(model.num_layers)
    slides = model.sliding_layers if model.sliding_layers is not None else layers
    config = common_config(model, "GptOssForCausalLM", _NAMES, dtype, eos_token_id)
    return config | {
        "experts_per_token": model.top_k,
        "sliding_window": model.sliding_window,
        "layer_types": [_SLIDING if model.sliding_window and layer in slides else _FULL for layer in layers],
        "swiglu_alpha": model.swiglu_alpha,
        "swiglu_limit": model.swiglu_limit,
        "attention_bias": model.attention_bias,
    }


def key_map(model: ModelConfig, keys: Collection[str] = ()) -> KeyMap:
    """Which tensors of the hub fill which block of which parameter.

    Args:
        keys: the names that a folder holds; they say whether the experts are quantised. Without them, they are not.
    """
    is_quantised = any(key.endswith(".experts.gate_up_proj_blocks") for key in keys)
    pieces = outer_pieces(model, keys)
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        pieces |= layer_pieces(prefix, model)
        pieces |= {f"{prefix}{ours}": [Piece(f"{prefix}{theirs}")] for ours, theirs in _RENAMED.items()}
        pieces |= _experts(f"{prefix}mlp.experts.", model, is_quantised)
    return pieces


def _experts(prefix: str, model: ModelConfig, is_quantised: bool) -> dict[str, list[Piece]]:
    """An expert at a time, so that no more than one is in memory on the way."""
    width = 2 * model.intermediate_size
    form = {"encoding": Encoding.mxfp4} if is_quantised else {"transposed": True}
    halves = [
        (slice(expert, expert + 1), half, slice(half, width, 2))
        for expert in range(model.num_experts)
        for half in range(2)
    ]
    return {
        f"{prefix}gate_up_proj": [
            Piece(f"{prefix}gate_up_proj", (expert, half), (expert, rows), **form) for expert, half, rows in halves
        ],
        f"{prefix}gate_up_bias": [
            Piece(f"{prefix}gate_up_proj_bias", (expert, half), (expert, rows)) for expert, half, rows in halves
        ],
        f"{prefix}down_proj": [
            Piece(f"{prefix}down_proj", (expert,), (expert,), **form) for expert, half, _ in halves if half == 0
        ],
    }


def _sliding_layers(config: HubConfig, num_layers: int) -> list[int]:
    """The layers with a window: as listed, else every other one from the first on."""
    types = config.values.get("layer_types") or [_FULL if layer % 2 else _SLIDING for layer in range(num_layers)]
    if len(types) != num_layers or not set(types) <= {_SLIDING, _FULL}:
        raise ConfigError(f"{config.path}: layer_types must name {_SLIDING} or {_FULL} for each layer")
    return [layer for layer, kind in enumerate(types) if kind == _SLIDING]
