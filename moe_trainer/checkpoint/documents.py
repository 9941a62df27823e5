"""The model's shape as JSON, as it lies beside the tensors of a checkpoint."""

import json
import types
import typing
from dataclasses import asdict, fields, is_dataclass, replace
from enum import Enum
from typing import Any

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ModelConfig
from moe_trainer.config.shape import check_model


def model_config_to_json(config: ModelConfig) -> str:
    """One key for each field; an enum is its value."""
    return json.dumps(asdict(config), indent=1, default=lambda value: value.value) + "\n"


def model_config_from_json(text: str) -> ModelConfig:
    """The inverse of `model_config_to_json`. A field that the text lacks keeps its default.

    Raises:
        ConfigError: not JSON, an unknown key, a value of the wrong type, or a shape that no model can have.
    """
    try:
        values = json.loads(text)
        unknown = sorted(values.keys() - {field.name for field in fields(ModelConfig)})
        if unknown:
            raise ConfigError(f"model.json: unknown {', '.join(unknown)}; it was saved by a newer version")
        values["family"]  # the one that has no default of its own
        config = _typed(ModelConfig, values, "model")
    except (ValueError, KeyError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"model.json cannot be read: {error}") from error
    check_model(replace(config, init_from=None))  # the folder that it came from need not be there any more
    return config


def _typed(hint: Any, value: Any, name: str) -> Any:
    """`value` as JSON has it, as the type that a field declares."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{key: _typed(hints[key], entry, f"{name}.{key}") for key, entry in value.items()})
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if typing.get_origin(hint) is list:
        return [_typed(typing.get_args(hint)[0], entry, name) for entry in _typed(list, value, name)]
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint or (hint is int and abs(value) >= 2**63):
        raise TypeError(f"{name} is {str(value)[:40]!r}, which is no {hint.__name__}")
    return value
