"""What the families' `hf.py` share: reading and writing config.json, and the pieces that most layouts are made of.

Nothing here imports torch: the command line reads a folder's config.json before any rank starts.
"""

import importlib
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_trainer.config.choices import Family, RopeType
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.files import read_object
from moe_trainer.config.schema import ModelConfig, RopeConfig
from moe_trainer.models.keymap import Piece

Pieces = dict[str, list[Piece]]

_YARN_NUMBERS = ("mscale", "mscale_all_dim", "attention_factor")


@dataclass(frozen=True, slots=True)
class HubConfig:
    """config.json of a folder, read with checks: each wrong value is a `ConfigError` with the file and the key."""

    path: Path
    values: Mapping[str, Any]

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number; a missing or null key takes the default, if there is one."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise ConfigError(f"{self.path}: {key}={value} must be a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; a missing or null key takes the default, if there is one."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise ConfigError(f"{self.path}: {key}={value} must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; a missing or null key takes the default."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise ConfigError(f"{self.path}: {key}={value} must be true or false")
        return value

    def given(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def part(self, key: str) -> "HubConfig":
        """A mapping inside; empty where it is missing or null."""
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise ConfigError(f"{self.path}: {key}={value} must be a mapping")
        return HubConfig(self.path, value)


def read_config(folder: Path) -> HubConfig:
    """`folder/config.json`.

    Raises:
        ConfigError: it is missing, or no JSON object.
    """
    path = folder / "config.json"
    return HubConfig(path, read_object(path))


def family_of(folder: Path) -> Family:
    """The family that config.json's `model_type` names.

    Raises:
        ConfigError: no readable config.json, or a family that is not built here.
    """
    config = read_config(folder)
    kind = config.values.get("model_type")
    known = [family.value for family in Family]
    if kind not in known:
        raise ConfigError(f"{config.path}: model_type={kind} is not one of {', '.join(known)}")
    return Family(kind)


def model_config_from_hf(folder: Path) -> ModelConfig:
    """The model's shape from a Hugging Face folder of any family, by that family's `hf.py`; see there."""
    return importlib.import_module(f"moe_trainer.models.{family_of(folder).value}.hf").model_config_from_hf(folder)


def check_architecture(config: HubConfig, family: Family, architecture: str) -> None:
    """Refuse another family, or a model of this one that is no language model."""
    kind, found = config.values.get("model_type"), config.values.get("architectures") or [architecture]
    if kind != family.value or found != [architecture]:
        raise ConfigError(f"{config.path}: {kind} {found} is not {architecture}")


def check_built(config: HubConfig, built: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse features that are not built here.

    Args:
        built: key -> the values that it may have, the first of them where it is absent.
    """
    for key, allowed in built.items():
        if config.values.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"{config.path}: {key}={config.values[key]} is not supported, only {allowed[0]}")


def sizes_from(config: HubConfig, names: Mapping[str, str]) -> dict[str, int]:
    """Our field -> its value, for `names` from our fields to the hub's keys."""
    return {ours: config.size(theirs) for ours, theirs in names.items()}


def rope_from(config: HubConfig, default_theta: float, max_position_embeddings: int) -> RopeConfig:
    """Rotary embedding as transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`) wrote it.

    Args:
        default_theta: where config.json names none.
        max_position_embeddings: yarn's length of pretraining, where config.json does not say it.
    """
    rope = config.part("rope_scaling" if config.given("rope_scaling") else "rope_parameters")
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in [known.value for known in RopeType]:
        raise ConfigError(f"{config.path}: rope_type={kind} is not supported, only default, linear and yarn")
    if rope.values.get("partial_rotary_factor", config.values.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ConfigError(f"{config.path}: partial_rotary_factor is not supported, only 1")
    theta = _rope_theta(config, rope, default_theta)
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, RopeType.linear, rope.number("factor"))
    original = rope.size("original_max_position_embeddings", max_position_embeddings)
    return RopeConfig(
        theta,
        RopeType.yarn,
        rope.number("factor", max_position_embeddings / original),
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        **{name: rope.number(name) for name in _YARN_NUMBERS if rope.given(name)},
    )


def _rope_theta(config: HubConfig, rope: HubConfig, default: float) -> float:
    for place in (rope, config.part("rope_parameters"), config):
        if place.given("rope_theta"):
            return place.number("rope_theta")
    return default


def rope_to(rope: RopeConfig) -> dict[str, Any]:
    """The keys of `rope_from`, in the words of transformers 4 and 5 both."""
    parameters: dict[str, Any] = {"rope_type": rope.type.value}
    if rope.type is not RopeType.default:
        parameters["factor"] = rope.factor
    if rope.type is RopeType.yarn:
        names = ("original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", *_YARN_NUMBERS)
        parameters |= {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
    scaling = {} if rope.type is RopeType.default else {"rope_scaling": parameters}
    return {"rope_theta": rope.theta, "rope_parameters": {"rope_theta": rope.theta, **parameters}, **scaling}


def common_config(
    model: ModelConfig, architecture: str, names: Mapping[str, str], dtype: str, eos_token_id: int | None
) -> dict[str, Any]:
    """What config.json says of every family, in a form that transformers 4 and 5 read.

    Args:
        names: from our fields to the hub's keys.
        dtype: of the weights, by torch's name, such as `bfloat16`.
    """
    return {
        "architectures": [architecture],
        "model_type": model.family.value,
        **{theirs: getattr(model, ours) for ours, theirs in names.items()},
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_eps,
        **rope_to(model.rope),
        "initializer_range": model.initializer_range,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def same(names: Iterable[str]) -> Pieces:
    """Tensors that the hub has under the same name and in the same layout."""
    return {name: [Piece(name)] for name in names}


def outer_pieces(model: ModelConfig, keys: Collection[str] = ()) -> Pieces:
    """Embedding, final norm and head; a tied head is no tensor of its own, but a folder may repeat it."""
    embedding, norm, head = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
    if not model.tie_word_embeddings:
        return same((embedding, norm, head))
    return {embedding: [Piece(embedding, twin=head if head in keys else "")], norm: [Piece(norm)]}


def layer_pieces(prefix: str, model: ModelConfig, norms: Collection[str] = ()) -> Pieces:
    """A layer's norms and its q, k, v and output projections.

    Args:
        prefix: `model.layers.N.`.
        norms: of the attention, beside the layer's two.
    """
    leaves = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{norm}" for norm in norms)]
    projections = [f"self_attn.{part}_proj" for part in "qkvo"]
    biases = [f"{prefix}{name}.bias" for name in projections] if model.attention_bias else []
    return same([f"{prefix}{name}.weight" for name in leaves + projections] + biases)


def dense_pieces(prefix: str, ours: str = "dense_mlp", theirs: str = "mlp") -> Pieces:
    """A dense MLP, under the layer's `prefix`."""
    parts = ("gate_proj", "up_proj", "down_proj")
    return {f"{prefix}{ours}.{part}.weight": [Piece(f"{prefix}{theirs}.{part}.weight")] for part in parts}


def expert_pieces(
    prefix: str,
    model: ModelConfig,
    keys: Collection[str],
    theirs: str = "mlp",
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Pieces:
    """Router and experts in whichever layout a folder with these keys has; without keys, one tensor a matrix.

    Args:
        theirs: the hub's name of the block.
        parts: the hub's names of gate, up and down.
    """
    if f"{prefix}mlp.experts.gate_up_proj" in keys:
        return _fused(prefix, model)
    gate, up, down = parts
    hub, experts = f"{prefix}{theirs}.", range(model.num_experts)
    return {
        f"{prefix}mlp.gate.weight": [Piece(f"{hub}gate.weight")],
        f"{prefix}mlp.experts.gate_up_proj": [
            Piece(f"{hub}experts.{expert}.{matrix}.weight", target=(expert, half))
            for expert in experts
            for half, matrix in enumerate((gate, up))
        ],
        f"{prefix}mlp.experts.down_proj": [
            Piece(f"{hub}experts.{expert}.{down}.weight", target=(expert,)) for expert in experts
        ],
    }


def _fused(prefix: str, model: ModelConfig) -> Pieces:
    """`gate_up_proj` is [num_experts, 2 * intermediate, hidden] there, gate above up."""
    experts, rows = slice(0, model.num_experts), model.intermediate_size
    gate_up = f"{prefix}mlp.experts.gate_up_proj"
    halves = [
        Piece(gate_up, target=(experts, half), source=(experts, slice(half * rows, (half + 1) * rows)))
        for half in range(2)
    ]
    return same((f"{prefix}mlp.gate.weight", f"{prefix}mlp.experts.down_proj")) | {gate_up: halves}
