"""Rules of the keys that say what is seen of a run."""

from importlib.util import find_spec

from moe_trainer.config.checks import at_least
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config, LoggingConfig


def check_logging(logging: LoggingConfig) -> None:
    """Refuses steps below one, and TensorBoard where it is not installed."""
    at_least("logging.every", logging.every, 1)
    if logging.load_every is not None:
        at_least("logging.load_every", logging.load_every, 1)
    if logging.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError("logging.tensorboard=true needs tensorboard: pip install 'moe-trainer[tensorboard]'")


def check_profiler(cfg: Config, world_size: int) -> None:
    """Refuses steps that the run does not take and ranks that it does not have."""
    for key, numbers, first, last, where in (
        ("profiler.steps", cfg.profiler.steps, 1, cfg.steps, f"steps={cfg.steps}"),
        ("profiler.ranks", cfg.profiler.ranks, 0, world_size - 1, f"{world_size} ranks"),
    ):
        if numbers is None or not cfg.profile:
            continue
        if not numbers:
            raise ConfigError(f"{key}=[] names nothing; give numbers from {first} to {last}, or profile=false")
        wrong = [number for number in numbers if not first <= number <= last]
        if wrong:
            raise ConfigError(f"{key}={numbers}: {wrong[0]} is not between {first} and {last} ({where})")
