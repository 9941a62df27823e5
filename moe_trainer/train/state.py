"""Where a run stands: a few integers, from which data order, learning rate and random streams follow."""

import json
from dataclasses import asdict, dataclass

from moe_trainer.config.errors import ConfigError

FORMAT = 1


@dataclass(slots=True)
class TrainState:
    """Counts since the start of training, and what a resumed run must keep."""

    seed: int
    """Of the order of samples and of every step's random stream."""
    schedule_steps: int
    """Horizon of the learning rate."""
    data_fingerprint: str
    """Of the tokenised samples."""
    step: int = 0
    """Steps taken."""
    samples: int = 0
    """Samples consumed: the position in the endless order."""
    tokens: int = 0
    """Labels learned from."""
    skipped_steps: int = 0
    """Steps that moved nothing, because the gradients were not finite; known when a checkpoint is saved."""

    def advance(self, samples: int, tokens: int) -> None:
        """Count one step."""
        self.step += 1
        self.samples += samples
        self.tokens += tokens

    def to_json(self, **facts: object) -> str:
        """The state, and facts about the run that wrote it, for people; an enum is its value."""
        return json.dumps({"format": FORMAT, **asdict(self), **facts}, indent=1, default=lambda e: e.value) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "TrainState":
        """The inverse of `to_json`.

        Raises:
            ConfigError: another format, or a missing entry.
        """
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise ConfigError(f"state.json has format {values['format']}, this version reads {FORMAT}")
            values.setdefault("skipped_steps", 0)  # older checkpoints
            return cls(**{name: values[name] for name in cls.__slots__})
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"state.json cannot be read: {error!r}") from error
