"""Rules of saving, restarting and checking that no single field can state.

Nothing here imports torch.
"""

from moe_trainer.config.checks import at_least, at_most, positive
from moe_trainer.config.choices import MeshChoice
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config


def check_faults(cfg: Config) -> None:
    """Raises `ConfigError` for the first rule that is broken."""
    at_least("launch.max_restarts", cfg.launch.max_restarts, 0)
    positive("launch.timeout_seconds", cfg.launch.timeout_seconds)
    at_most("launch.timeout_seconds", cfg.launch.timeout_seconds, 2**31)
    if cfg.launch.shrink and cfg.parallel.mesh is not MeshChoice.auto:
        raise ConfigError("launch.shrink=true needs parallel.mesh=auto, which finds a mesh for fewer ranks")
    if cfg.launch.shrink and not cfg.launch.max_restarts:
        raise ConfigError("launch.shrink=true needs launch.max_restarts of at least 1: it restarts on fewer ranks")
    if cfg.launch.max_restarts and cfg.checkpoint.every is None:
        raise ConfigError(
            f"launch.max_restarts={cfg.launch.max_restarts} needs checkpoint.every: without checkpoints on the way "
            "every restart begins from the start"
        )
    if cfg.checks.replicas_every is not None:
        at_least("checks.replicas_every", cfg.checks.replicas_every, 1)
    if cfg.checks.replay_every is not None:
        at_least("checks.replay_every", cfg.checks.replay_every, 1)
        if not cfg.deterministic:
            raise ConfigError(
                f"checks.replay_every={cfg.checks.replay_every} needs deterministic=true: without it the same step "
                "may give other bits on sound machines"
            )
