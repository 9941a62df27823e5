"""The model's shape as JSON, as it lies beside the tensors of a checkpoint."""

import json
from dataclasses import asdict, fields
from enum import Enum

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Family, ModelConfig


def model_config_to_json(config: ModelConfig) -> str:
    """One key for each field; an enum is its value."""
    values = {name: value.value if isinstance(value, Enum) else value for name, value in asdict(config).items()}
    return json.dumps(values, indent=1) + "\n"


def model_config_from_json(text: str) -> ModelConfig:
    """The inverse of `model_config_to_json`. A field that the text lacks keeps its default.

    Raises:
        ConfigError: not JSON, an unknown key or an unknown value.
    """
    try:
        values = json.loads(text)
        unknown = sorted(values.keys() - {field.name for field in fields(ModelConfig)})
        if unknown:
            raise ConfigError(f"model.json: unknown {', '.join(unknown)}; it was saved by a newer version")
        return ModelConfig(**{**values, "family": Family(values["family"])})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"model.json cannot be read: {error}") from error
