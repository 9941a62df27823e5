"""Rules of the model's shape, and which meshes can split it.

Nothing here imports torch.
"""

from pathlib import Path

from moe_trainer.config.checks import at_least, at_most, divides, positive
from moe_trainer.config.choices import Family
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ModelConfig, ParallelConfig, RopeConfig

_FAMILIES_WITH = {
    "dense_layers": (Family.qwen3_moe, Family.deepseek_v3),
    "dense_intermediate_size": (Family.qwen3_moe, Family.deepseek_v3),
    "norm_topk_prob": (Family.qwen3_moe, Family.olmoe, Family.deepseek_v3),
    "attention_bias": (Family.qwen3_moe, Family.olmoe, Family.deepseek_v3, Family.gpt_oss),
    "sliding_window": (Family.mixtral, Family.qwen3_moe, Family.gpt_oss),
    "sliding_layers": (Family.gpt_oss,),
    "swiglu_alpha": (Family.gpt_oss,),
    "swiglu_limit": (Family.gpt_oss,),
    "clip_qkv": (Family.olmoe,),
    **dict.fromkeys(
        (
            *("num_shared_experts", "num_expert_groups", "top_k_groups", "routed_scaling_factor", "q_lora_rank"),
            *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave"),
        ),
        (Family.deepseek_v3,),
    ),
}
"""Keys that some families know nothing of, and which do."""
_MOST = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "dense_intermediate_size"), 2**22),
    **dict.fromkeys(("num_heads", "num_kv_heads", "head_dim", "num_experts", "num_shared_experts"), 2**14),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 2**14),
    "num_layers": 2**12,
    "capacity_factor": 2**20,
}
"""Beyond the largest models by far; products of larger sizes are no sizes of tensors any more."""


def check_model(model: ModelConfig) -> None:
    """The shape alone: sizes, and what the family knows.

    Raises:
        ConfigError: the first rule that is broken.
    """
    for name in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
        *("num_experts", "top_k", "max_position_embeddings"),
    ):
        at_least(f"model.{name}", getattr(model, name), 1)
    for name, most in _MOST.items():
        at_most(f"model.{name}", getattr(model, name) or 0, most)
    for name in ("rms_norm_eps", "initializer_range"):
        positive(f"model.{name}", getattr(model, name))
    if model.capacity_factor is not None:
        positive("model.capacity_factor", model.capacity_factor)
    _check_family_keys(model)
    _check_rope(model.rope)
    if model.family is Family.deepseek_v3:
        _check_deepseek(model)
    else:
        divides("model.num_kv_heads", model.num_kv_heads, "num_heads", model.num_heads)
    if model.top_k > model.num_experts:
        raise ConfigError(f"model.top_k={model.top_k} must be at most num_experts({model.num_experts})")
    rotated = "qk_rope_head_dim" if model.family is Family.deepseek_v3 else "head_dim"
    if getattr(model, rotated) % 2:
        raise ConfigError(f"model.{rotated}={getattr(model, rotated)} must be even: rotary embeddings turn pairs")
    if model.family is Family.olmoe and model.num_heads * model.head_dim != model.hidden_size:
        raise ConfigError(
            f"model.head_dim={model.head_dim} x num_heads({model.num_heads}) must be "
            f"hidden_size({model.hidden_size}) in olmoe"
        )
    _check_layers(model)
    if model.init_from is not None:
        check_init_from(model.init_from)


def _check_family_keys(model: ModelConfig) -> None:
    plain = ModelConfig()
    for name, families in _FAMILIES_WITH.items():
        value = getattr(model, name)
        if value != getattr(plain, name) and model.family not in families:
            known = " and ".join(family.value for family in families)
            raise ConfigError(f"model.{name}={value} is a key of {known}, not of {model.family.value}")


def _check_layers(model: ModelConfig) -> None:
    """Which layers are dense, which look through a window, and the sizes that belong to them."""
    for name, layers in (("dense_layers", model.dense_layers), ("sliding_layers", model.sliding_layers or [])):
        if any(not 0 <= layer < model.num_layers for layer in layers) or len(set(layers)) < len(layers):
            raise ConfigError(f"model.{name}={layers} must be different layers from 0 to {model.num_layers - 1}")
    if len(model.dense_layers) == model.num_layers:
        raise ConfigError(f"model.dense_layers={model.dense_layers} leaves no layer with experts")
    if model.dense_layers and model.dense_intermediate_size is None:
        raise ConfigError(
            "model.dense_intermediate_size must be given with model.dense_layers: the width of their MLP"
        )
    if model.sliding_layers is not None and model.sliding_window is None:
        raise ConfigError("model.sliding_layers needs model.sliding_window")
    for name in ("dense_intermediate_size", "sliding_window"):
        if getattr(model, name) is not None:
            at_least(f"model.{name}", getattr(model, name), 1)
    if model.clip_qkv is not None:
        positive("model.clip_qkv", model.clip_qkv)


def _check_rope(rope: RopeConfig) -> None:
    for name in ("theta", "beta_fast", "beta_slow"):
        positive(f"model.rope.{name}", getattr(rope, name))
    at_least("model.rope.factor", rope.factor, 1)
    at_least("model.rope.original_max_position_embeddings", rope.original_max_position_embeddings, 1)
    for name in ("mscale", "mscale_all_dim", "attention_factor"):
        if getattr(rope, name) is not None:
            positive(f"model.rope.{name}", getattr(rope, name))


def _check_deepseek(model: ModelConfig) -> None:
    for name in ("num_expert_groups", "top_k_groups", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"):
        at_least(f"model.{name}", getattr(model, name), 1)
    at_least("model.v_head_dim", model.v_head_dim, 1)
    at_least("model.num_shared_experts", model.num_shared_experts, 0)
    if model.q_lora_rank is not None:
        at_least("model.q_lora_rank", model.q_lora_rank, 1)
    positive("model.routed_scaling_factor", model.routed_scaling_factor)
    groups = model.num_expert_groups
    divides("model.num_expert_groups", groups, "num_experts", model.num_experts)
    if model.top_k_groups > groups:
        raise ConfigError(f"model.top_k_groups={model.top_k_groups} must be at most num_expert_groups({groups})")
    reachable = model.top_k_groups * (model.num_experts // groups)
    if model.top_k > reachable:
        raise ConfigError(f"model.top_k={model.top_k} must be at most the {reachable} experts of top_k_groups groups")


def check_init_from(init_from: str) -> Path:
    """The Hugging Face folder to start from, which holds a config.json."""
    folder = Path(init_from).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"model.init_from={init_from}: there is no such folder")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.init_from={init_from}: no config.json in it, so it is no Hugging Face folder")
    return folder


def check_divisions(model: ModelConfig, parallel: ParallelConfig) -> None:
    """A resolved mesh must divide what it splits: heads, vocabulary, experts or their insides, dense MLPs, hidden.

    Raises:
        ConfigError: with the two numbers.
    """
    tp, ep = parallel.tp, parallel.ep
    for name in ("num_heads", "vocab_size"):
        divides("parallel.tp", tp, f"model.{name}", getattr(model, name))
    _check_key_heads(model, tp)
    if model.dense_layers:
        divides("parallel.tp", tp, "model.dense_intermediate_size", model.dense_intermediate_size)
    shared = model.num_shared_experts * model.intermediate_size
    divides("parallel.tp", tp, "model.num_shared_experts x intermediate_size", shared)
    if parallel.expert_parallel:
        divides("parallel.ep", ep, "model.num_experts", model.num_experts)
    else:
        divides("parallel.tp", tp, "model.intermediate_size", model.intermediate_size)
    _check_expert_shards(model, parallel)


def _check_key_heads(model: ModelConfig, tp: int) -> None:
    """Split between ranks, or each shared by as many; olmoe's norm over all of them needs the first."""
    heads = model.num_kv_heads
    if model.family is Family.deepseek_v3:
        return  # keys come from the latent, for as many heads as queries
    if model.family is Family.olmoe:
        divides("parallel.tp", tp, "model.num_kv_heads", heads)
    elif heads % tp and tp % heads:
        raise ConfigError(f"parallel.tp={tp} must divide model.num_kv_heads({heads}) or be a multiple of it")


def _check_expert_shards(model: ModelConfig, parallel: ParallelConfig) -> None:
    """FSDP shards experts by number while each shard gets one, and otherwise along their widest dims, evenly."""
    tp, ep, fsdp = parallel.tp, parallel.ep, parallel.fsdp
    shards, name = (fsdp * tp // ep, "fsdp x tp / ep") if parallel.expert_parallel else (fsdp, "fsdp")
    if shards * ep <= model.num_experts:
        return
    widths = {"model.hidden_size": model.hidden_size}
    if model.family is Family.gpt_oss:  # the bias of gate and up has no hidden dim
        split = 1 if parallel.expert_parallel else tp
        widths[f"model.intermediate_size / {split}" if split > 1 else "model.intermediate_size"] = (
            model.intermediate_size // split
        )
    for what, width in widths.items():
        if width % shards:
            raise ConfigError(
                f"parallel.fsdp={fsdp}: with more shards than experts, {name} ({shards}) must divide {what}({width})"
            )
