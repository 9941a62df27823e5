"""Dense models on the Hugging Face hub that can be upcycled: what their config.json says, and their tensors' names.

Nothing here imports torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_trainer.config.choices import Family
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ModelConfig
from moe_trainer.models import hub

_BUILT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0,),
    "quantization_config": (None,),
}
"""What config.json may say, because the sparse model does just that; absent means the first value."""
_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
}


@dataclass(frozen=True, slots=True)
class _Dense:
    """A dense kind of model, and the family whose experts its MLP becomes."""

    architecture: str
    family: Family
    head_dim: int | None
    """Where config.json names none; None: hidden over heads."""


_KINDS = {
    "llama": _Dense("LlamaForCausalLM", Family.mixtral, None),
    "mistral": _Dense("MistralForCausalLM", Family.mixtral, None),
    "qwen3": _Dense("Qwen3ForCausalLM", Family.qwen3_moe, 128),
}


def sparse_config_of(folder: Path, num_experts: int, top_k: int) -> tuple[ModelConfig, Any]:
    """The shape of a dense model with `num_experts` copies of its MLP, and its end-of-text id or ids.

    The weights of the chosen experts sum to one in it, so equal experts act as one.

    Raises:
        ConfigError: no readable config.json, another kind of model, or a feature that the sparse one lacks.
    """
    config = hub.read_config(folder)
    kind = config.values.get("model_type")
    if kind not in _KINDS:
        raise ConfigError(f"{config.path}: model_type={kind} cannot be upcycled, only {', '.join(_KINDS)}")
    dense = _KINDS[kind]
    found = config.values.get("architectures") or [dense.architecture]
    if found != [dense.architecture]:
        raise ConfigError(f"{config.path}: {kind} {found} is not {dense.architecture}")
    hub.check_built(config, _BUILT)
    attention_bias = config.flag("attention_bias", False)
    if attention_bias and dense.family is Family.mixtral:
        raise ConfigError(f"{config.path}: attention_bias=true is not supported in mixtral, only false")
    sizes = hub.sizes_from(config, _NAMES)
    slides = config.given("sliding_window") and config.flag("use_sliding_window", kind == "mistral")
    model = ModelConfig(
        family=dense.family,
        **sizes,
        num_kv_heads=config.size("num_key_value_heads", sizes["num_heads"]),
        head_dim=config.size("head_dim", dense.head_dim or sizes["hidden_size"] // sizes["num_heads"]),
        num_experts=num_experts,
        top_k=top_k,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=hub.rope_from(config, 1e4, sizes["max_position_embeddings"]),
        initializer_range=config.number("initializer_range", 0.02),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        attention_bias=attention_bias,
        sliding_window=config.size("sliding_window") if slides else None,
    )
    if slides and kind == "qwen3" and config.size("max_window_layers", model.num_layers) > 0:
        raise ConfigError(f"{config.path}: max_window_layers must be 0 where sliding windows are used")
    return model, config.values.get("eos_token_id")
