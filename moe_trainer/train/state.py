"""Where a run stands: a few integers, from which data order and learning rate follow."""

import json
import math
from dataclasses import asdict, dataclass, field, replace

from moe_trainer.config.errors import ConfigError

FORMAT = 1


@dataclass(slots=True)
class TrainState:
    """Counts since the start of training, and what a resumed run must keep."""

    seed: int
    """Of the order of samples."""
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
    """Steps that moved nothing, because the gradients were not finite or spiked; known when a checkpoint is saved."""
    grad_norms: list[float] = field(default_factory=list)
    """What `SpikeGuard` knows; empty before it knows anything."""
    moments_since: dict[str, int] = field(default_factory=dict)
    """Of parameters that were frozen before: the steps that had moved others when their moments began."""

    def advance(self, samples: int, tokens: int) -> None:
        """Count one step."""
        self.step += 1
        self.samples += samples
        self.tokens += tokens

    def before(self, samples: int, tokens: int) -> "TrainState":
        """As it was before the last `advance` with these."""
        return replace(self, step=self.step - 1, samples=self.samples - samples, tokens=self.tokens - tokens)

    def to_json(self, **facts: object) -> str:
        """The state, and facts about the run that wrote it, for people; an enum is its value."""
        return json.dumps({"format": FORMAT, **asdict(self), **facts}, indent=1, default=lambda e: e.value) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "TrainState":
        """The inverse of `to_json`.

        Raises:
            ConfigError: another format, a missing entry, or one that is no count.
        """
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise ConfigError(f"state.json has format {values['format']}, this version reads {FORMAT}")
            values = {"skipped_steps": 0, "grad_norms": [], "moments_since": {}, **values}  # older ones lack them
            no_counts = ("data_fingerprint", "grad_norms", "moments_since")
            counts = [values[name] for name in cls.__slots__ if name not in no_counts]
            values["moments_since"] = dict(values["moments_since"])
            began = values["moments_since"].values()
            counts += began
            if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
                raise ValueError(f"counts are whole numbers from 0 to 2^63, not {counts}")
            if values["schedule_steps"] < 1 or values["skipped_steps"] > values["step"]:
                raise ValueError("schedule_steps is 0, or skipped_steps is above step")
            if max(began, default=0) > values["step"]:
                raise ValueError("moments_since is above step")
            norms = values["grad_norms"]
            if len(norms) not in (0, 5) or not all(type(norm) is float and math.isfinite(norm) for norm in norms):
                raise ValueError(f"grad_norms are none or five finite numbers, not {norms}")
            return cls(**{name: values[name] for name in cls.__slots__})
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"state.json cannot be read: {error!r}") from error
