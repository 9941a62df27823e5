"""Mixtral on the Hugging Face hub: its config.json and the names and layouts of its tensors.

Two layouts exist: one tensor for each expert's matrix (the hub's, and what transformers saves), and one for all
experts (what transformers holds in memory).
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Family, ModelConfig
from moe_trainer.models.keymap import KeyMap, Piece

# What config.json may say, because the model here does just that; absent means the first value.
_BUILT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "sliding_window": (None,),
    "tie_word_embeddings": (False,),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0,),
    "router_jitter_noise": (0.0,),
    "quantization_config": (None,),
}
_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "num_experts": "num_local_experts",  # the hub means all experts by it
    "top_k": "num_experts_per_tok",
    "max_position_embeddings": "max_position_embeddings",
}


def model_config_from_hf(folder: Path) -> ModelConfig:
    """The model's shape from `folder/config.json`, as written by transformers 4 or 5.

    Raises:
        ConfigError: no readable config.json, another family, or a feature that is not built here.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    architectures = config.get("architectures") or ["MixtralForCausalLM"]
    if config.get("model_type") != "mixtral" or architectures != ["MixtralForCausalLM"]:
        raise ConfigError(f"{path}: {config.get('model_type')} {architectures} is not MixtralForCausalLM")
    for key, allowed in _BUILT.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"{path}: {key}={config[key]} is not supported, only {allowed[0]}")
    sizes = {ours: _size(path, config, theirs) for ours, theirs in _NAMES.items()}
    head_dim = config.get("head_dim")
    return ModelConfig(
        family=Family.mixtral,
        **sizes,
        head_dim=sizes["hidden_size"] // sizes["num_heads"] if head_dim is None else _size(path, config, "head_dim"),
        rms_norm_eps=_number(path, config, "rms_norm_eps", 1e-5),
        rope_theta=_rope_theta(path, config),
        initializer_range=_number(path, config, "initializer_range", 0.02),
    )


def hf_config(model: ModelConfig, dtype: str, eos_token_id: int | None) -> dict[str, Any]:
    """What config.json says of this model, in a form that transformers 4 and 5 read.

    Args:
        dtype: of the weights, by torch's name, such as `bfloat16`.
    """
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **{theirs: getattr(model, ours) for ours, theirs in _NAMES.items()},
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"},
        "initializer_range": model.initializer_range,
        "attention_dropout": 0.0,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def key_map(model: ModelConfig, keys: Collection[str] = ()) -> KeyMap:
    """Which tensors of the hub fill which block of which parameter.

    Args:
        keys: the names that a folder holds; they decide between the layouts. Without them, the one written on export.
    """
    is_fused = any(key.endswith(".mlp.experts.gate_up_proj") for key in keys)
    pieces = {name: [Piece(name)] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        plain = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{part}_proj" for part in "qkvo")]
        pieces |= {f"{prefix}{name}.weight": [Piece(f"{prefix}{name}.weight")] for name in plain}
        pieces |= _fused(prefix, model) if is_fused else _per_expert(prefix, model)
    return pieces


def _per_expert(prefix: str, model: ModelConfig) -> dict[str, list[Piece]]:
    hub = f"{prefix}block_sparse_moe."
    experts = range(model.num_experts)
    return {
        f"{prefix}mlp.gate.weight": [Piece(f"{hub}gate.weight")],
        f"{prefix}mlp.experts.gate_up_proj": [
            Piece(f"{hub}experts.{expert}.{matrix}.weight", target=(expert, half))
            for expert in experts
            for half, matrix in enumerate(("w1", "w3"))
        ],
        f"{prefix}mlp.experts.down_proj": [
            Piece(f"{hub}experts.{expert}.w2.weight", target=(expert,)) for expert in experts
        ],
    }


def _fused(prefix: str, model: ModelConfig) -> dict[str, list[Piece]]:
    """`gate_up_proj` is [num_experts, 2 * intermediate, hidden] there, gate above up."""
    experts, rows = slice(0, model.num_experts), model.intermediate_size
    names = (f"{prefix}mlp.gate.weight", f"{prefix}mlp.experts.down_proj")
    gate_up = f"{prefix}mlp.experts.gate_up_proj"
    halves = [
        Piece(gate_up, target=(experts, half), source=(experts, slice(half * rows, (half + 1) * rows)))
        for half in range(2)
    ]
    return {name: [Piece(name)] for name in names} | {gate_up: halves}


def _rope_theta(path: Path, config: dict[str, Any]) -> float:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{path}: rope_type={kind} is not supported, only default")
    return _number(path, rope if "rope_theta" in rope else config, "rope_theta", 1e6)


def _size(path: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{path}: {key}={value} must be a positive whole number")
    return value


def _number(path: Path, config: dict[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if type(value) not in (int, float) or value <= 0:
        raise ConfigError(f"{path}: {key}={value} must be a positive number")
    return float(value)
