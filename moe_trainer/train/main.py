"""One rank of `moe-train`."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from moe_trainer.config.schema import Config
from moe_trainer.observe.log import get_logger, setup_logging
from moe_trainer.parallel.heartbeat import Heartbeat
from moe_trainer.parallel.process_group import process_group
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
        trainer = Trainer(cfg, device)
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
