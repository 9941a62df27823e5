"""One rank of `moe-train`."""

from pathlib import Path

import torch.distributed as dist

from moe_trainer.config.schema import Config
from moe_trainer.observe.log import get_logger, setup_logging
from moe_trainer.parallel.process_group import process_group
from moe_trainer.train.trainer import Trainer

_logger = get_logger(__name__)


def run_training(cfg: Config, stop_file: Path | None = None) -> bool:
    """Train as `cfg` says. It is validated, with a concrete mesh and device.

    Args:
        stop_file: exists once somebody wants the run to save and stop.

    Returns:
        Whether `cfg.steps` are taken; otherwise the run was told to stop, and has saved.

    Raises:
        ConfigError: something that only shows with the data or the checkpoint in hand; on every rank alike.
    """
    with process_group(cfg.device) as device:
        setup_logging(dist.get_rank())
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
        trainer.fit(stop_file)
        return trainer.state.step >= cfg.steps
