"""The model's shape as JSON, as it lies beside the tensors of a checkpoint."""

import json
from dataclasses import asdict, fields

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Family, ModelConfig, RopeConfig, RopeType


def model_config_to_json(config: ModelConfig) -> str:
    """One key for each field; an enum is its value."""
    return json.dumps(asdict(config), indent=1, default=lambda value: value.value) + "\n"


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
        rope = dict(values.pop("rope", {}))
        if "type" in rope:
            rope["type"] = RopeType(rope["type"])
        return ModelConfig(**{**values, "family": Family(values["family"]), "rope": RopeConfig(**rope)})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"model.json cannot be read: {error}") from error
