"""One rank of `moe-train`."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from moe_trainer import __version__
from moe_trainer.checkpoint.agreement import agreed, on_rank_zero
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.plain_yaml import read_leaves
from moe_trainer.config.schema import Config
from moe_trainer.config.store import to_yaml
from moe_trainer.observe.log import get_logger, setup_logging
from moe_trainer.parallel.heartbeat import Heartbeat
from moe_trainer.parallel.process_group import process_group
from moe_trainer.train.memory import out_of_memory_is
from moe_trainer.train.trainer import Trainer

_logger = get_logger(__name__)


def run_training(cfg: Config, stop_file: Path | None = None, launch_folder: Path | None = None) -> bool:
    """Train as `cfg` says. It is validated, with a concrete mesh and device.

    Args:
        stop_file: exists once somebody wants the run to save and stop.
        launch_folder: of the launcher; the ranks leave there which step they are in.

    Returns:
        Whether `cfg.steps` are taken; otherwise the run was told to stop, and has saved.

    Raises:
        ConfigError: something that only shows with the data or the checkpoint in hand; on every rank alike.
    """
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when cuBLAS starts
    with process_group(cfg.device, cfg.launch.timeout_seconds) as device:
        setup_logging(dist.get_rank())
        if cfg.deterministic:
            torch.use_deterministic_algorithms(True)
        refuse_strangers(cfg)
        trainer = _built(cfg, device)
        _logger.info("%s", trainer.describe())
        trainer.start()
        if trainer.state.step >= cfg.steps:
            _logger.info(
                "%s has taken %d steps already; steps=%d asks for no more",
                trainer.run_folder,
                trainer.state.step,
                cfg.steps,
            )
            return True
        trainer.fit(stop_file, Heartbeat(launch_folder))
        return trainer.state.step >= cfg.steps


def refuse_strangers(cfg: Config) -> None:
    """Stop where ranks of several machines were started with different configs or programs. Collective.

    Raises:
        ConfigError: says which rank differs from the first, and in what.
    """
    ours = {**read_leaves(to_yaml(cfg)), "torch": torch.__version__, "moe_trainer": __version__}
    first = on_rank_zero("the start", lambda: ours)
    with agreed("the ranks were started differently"):
        names = sorted(name for name in ours.keys() | first.keys() if ours.get(name) != first.get(name))
        if names:
            odd = ", ".join(f"{name}={ours.get(name)} (rank 0: {first.get(name)})" for name in names)
            raise ConfigError(f"rank {dist.get_rank()} has {odd}; start all with the same command and versions")


def _built(cfg: Config, device: torch.device) -> Trainer:
    advice = "try more ranks in parallel.fsdp or parallel.tp, or optim.weights_dtype=bfloat16"
    with out_of_memory_is(lambda: f"rank {dist.get_rank()} has no memory for its share of the model; {advice}"):
        return Trainer(cfg, device)
