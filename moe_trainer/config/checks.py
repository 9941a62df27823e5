"""The rules that most numbers obey."""

import math

from moe_trainer.config.errors import ConfigError

_MOST_PROCESSES = 1024


def at_least(key: str, value: int | float, least: int) -> None:
    """Refuse a value below `least`, infinity, NaN, and what 64 bits cannot count."""
    if not least <= value < 2**63:
        raise ConfigError(f"{key}={str(value)[:40]} must be at least {least}{' and below 2^63' * (value > least)}")


def at_most(key: str, value: int | float, most: int) -> None:
    """Refuse what no machine computes, before memory or a library's own arithmetic gives way."""
    if value > most:
        raise ConfigError(f"{key}={str(value)[:40]} must be at most {most}")


def positive(key: str, value: float) -> None:
    """Refuse zero, what is below, infinity and NaN."""
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{key}={value} must be above 0")


def divides(key: str, divisor: int, name: str, number: int) -> None:
    """Refuse a divisor of `key` that leaves a remainder of the number called `name`."""
    if number % divisor:
        raise ConfigError(f"{key}={divisor} must divide {name}({number})")


def fits_one_machine(ranks: int) -> None:
    """Refuse to start more processes than any machine takes."""
    if ranks > _MOST_PROCESSES:
        raise ConfigError(
            f"parallel: {ranks} ranks are more than one machine starts ({_MOST_PROCESSES}); give smaller sizes, or "
            "start the ranks of several machines by torchrun"
        )
