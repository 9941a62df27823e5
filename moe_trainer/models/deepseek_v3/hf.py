"""DeepSeek-V3 on the Hugging Face hub (and Moonlight, which is of the same type): config.json, names and layouts."""

import re
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
    outer_pieces,
    read_config,
    rope_from,
    sizes_from,
)
from moe_trainer.models.keymap import UNREAD, Encoding, KeyMap, Piece

# What config.json may say, because the model here does just that; absent means the first value.
_BUILT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
}
_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "moe_intermediate_size",
    "dense_intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "max_position_embeddings": "max_position_embeddings",
}


def model_config_from_hf(folder: Path) -> ModelConfig:
    """The model's shape from `folder/config.json`, as written by transformers 4 or 5.

    Raises:
        ConfigError: no readable config.json, another family, or a feature that is not built here.
    """
    config = read_config(folder)
    check_architecture(config, Family.deepseek_v3, "DeepseekV3ForCausalLM")
    check_built(config, _BUILT)
    _check_quantization(config)
    sizes = sizes_from(config, _NAMES)
    if config.size("num_key_value_heads", sizes["num_heads"]) != sizes["num_heads"]:
        raise ConfigError(f"{config.path}: num_key_value_heads must equal num_attention_heads({sizes['num_heads']})")
    return ModelConfig(
        family=Family.deepseek_v3,
        **sizes,
        num_kv_heads=sizes["num_heads"],
        head_dim=sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"],
        q_lora_rank=config.size("q_lora_rank") if config.given("q_lora_rank") else None,
        num_shared_experts=_count(config, "n_shared_experts"),
        dense_layers=list(range(_count(config, "first_k_dense_replace"))),
        num_expert_groups=config.size("n_group", 1),
        top_k_groups=config.size("topk_group", 1),
        norm_topk_prob=config.flag("norm_topk_prob", True),
        routed_scaling_factor=config.number("routed_scaling_factor", 1.0),
        rope_interleave=config.flag("rope_interleave", True),
        attention_bias=config.flag("attention_bias", False),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=rope_from(config, 10000.0, sizes["max_position_embeddings"]),
        initializer_range=config.number("initializer_range", 0.02),
    )


def hf_config(model: ModelConfig, dtype: str, eos_token_id: int | None) -> dict[str, Any]:
    """What config.json says of this model, in a form that transformers 4 and 5 read.

    Args:
        dtype: of the weights, by torch's name, such as `bfloat16`.

    Raises:
        ConfigError: dense layers that do not come first, which the format cannot say.
    """
    num_dense = len(model.dense_layers)
    if sorted(model.dense_layers) != list(range(num_dense)):
        raise ConfigError(f"model.dense_layers={model.dense_layers}: in deepseek_v3 they must be the first layers")
    config = common_config(model, "DeepseekV3ForCausalLM", _NAMES, dtype, eos_token_id)
    return config | {
        "intermediate_size": model.dense_intermediate_size or model.intermediate_size,  # without dense layers, unused
        "num_key_value_heads": model.num_heads,
        "q_lora_rank": model.q_lora_rank,
        "n_shared_experts": model.num_shared_experts,
        "first_k_dense_replace": num_dense,
        "n_group": model.num_expert_groups,
        "topk_group": model.top_k_groups,
        "norm_topk_prob": model.norm_topk_prob,
        "routed_scaling_factor": model.routed_scaling_factor,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "rope_interleave": model.rope_interleave,
        "attention_bias": model.attention_bias,
    }


def key_map(model: ModelConfig, keys: Collection[str] = ()) -> KeyMap:
    """Which tensors of the hub fill which block of which parameter.

    Layers after the last, which predict more than one token ahead, are left unread.

    Args:
        keys: the names that a folder holds; they say which matrices are quantised. Without them, none is.
    """
    names: dict[str, str] = {}
    pieces = outer_pieces(model, keys)
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        names |= {f"{prefix}{ours}": f"{prefix}{theirs}" for ours, theirs in _layer_names(model, layer).items()}
        if layer not in model.dense_layers:
            pieces |= _experts(f"{prefix}mlp.", model, keys)
    pieces |= {ours: [_piece(theirs, keys)] for ours, theirs in names.items()}
    unread = [Piece(key) for key in keys if _layer_of(key) >= model.num_layers]
    if not model.num_shared_experts:
        unread += _no_shared_experts(model)
    return pieces | ({UNREAD: unread} if unread else {})


def _layer_of(key: str) -> int:
    match = re.match(r"model\.layers\.(\d+)\.", key)
    return int(match[1]) if match else -1


def _layer_names(model: ModelConfig, layer: int) -> dict[str, str]:
    """Ours -> theirs, of the tensors that have one name each."""
    query = ["q_proj"] if model.q_lora_rank is None else ["q_a_proj", "q_a_layernorm", "q_b_proj"]
    attention = [*query, "kv_a_layernorm", "kv_b_proj", "o_proj"]
    names = {f"self_attn.{name}.weight": f"self_attn.{name}.weight" for name in attention}
    names |= {f"{name}.weight": f"{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")}
    names["self_attn.kv_a_proj.weight"] = "self_attn.kv_a_proj_with_mqa.weight"
    if model.attention_bias:
        names |= {"self_attn.o_proj.bias": "self_attn.o_proj.bias"}
        names |= {"self_attn.kv_a_proj.bias": "self_attn.kv_a_proj_with_mqa.bias"}
        names |= {} if model.q_lora_rank is None else {"self_attn.q_a_proj.bias": "self_attn.q_a_proj.bias"}
    matrices = ("gate_proj", "up_proj", "down_proj")
    if layer in model.dense_layers:
        return names | {f"dense_mlp.{name}.weight": f"mlp.{name}.weight" for name in matrices}
    names |= {"mlp.gate.weight": "mlp.gate.weight", "mlp.gate.expert_bias": "mlp.gate.e_score_correction_bias"}
    if model.num_shared_experts:
        names |= {f"mlp.shared_experts.{name}.weight": f"mlp.shared_experts.{name}.weight" for name in matrices}
    return names


def _experts(prefix: str, model: ModelConfig, keys: Collection[str]) -> dict[str, list[Piece]]:
    experts = range(model.num_experts)
    return {
        f"{prefix}experts.gate_up_proj": [
            _piece(f"{prefix}experts.{expert}.{matrix}.weight", keys, (expert, half))
            for expert in experts
            for half, matrix in enumerate(("gate_proj", "up_proj"))
        ],
        f"{prefix}experts.down_proj": [
            _piece(f"{prefix}experts.{expert}.down_proj.weight", keys, (expert,)) for expert in experts
        ],
    }


def _no_shared_experts(model: ModelConfig) -> list[Piece]:
    """transformers makes and stores the matrices of no shared experts, of width zero."""
    none, hidden = slice(0, 0), slice(0, model.hidden_size)
    shapes = {"gate_proj": (none, hidden), "up_proj": (none, hidden), "down_proj": (hidden, none)}
    return [
        Piece(f"model.layers.{layer}.mlp.shared_experts.{name}.weight", source=shape)
        for layer in range(model.num_layers)
        if layer not in model.dense_layers
        for name, shape in shapes.items()
    ]


def _piece(key: str, keys: Collection[str], target: tuple[int, ...] = ()) -> Piece:
    encoding = Encoding.fp8_blocks if f"{key}_scale_inv" in keys else Encoding.plain
    # In bfloat16 the bias would lose the small steps that it is made of.
    return Piece(key, target, encoding=encoding, keeps_dtype=key.endswith(".e_score_correction_bias"))


def _count(config: HubConfig, key: str) -> int:
    """A whole number, zero where the key is missing or null."""
    return 0 if config.values.get(key) in (None, 0) else config.size(key)


def _check_quantization(config: HubConfig) -> None:
    if config.given("quantization_config"):
        quantization = config.part("quantization_config").values
        method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
        if (method, block) != ("fp8", [128, 128]):
            raise ConfigError(f"{config.path}: quantization {method} {block} is not supported, only fp8 [128, 128]")
