"""How a run starts again after it lost a rank."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moe_trainer.cli.launch import Start
from moe_trainer.config.choices import DeviceName
from moe_trainer.config.schema import Config
from moe_trainer.config.validate import validate, world_size_of

_DEVICES = "CUDA_VISIBLE_DEVICES"


def is_restart() -> bool:
    """Whether another torchrun than ours has started this rank before."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def resume_after_loss(cfg: Config) -> str:
    """`checkpoint.resume` of the next start: the run's own newest checkpoint, or while it has no undamaged one that
    which it was told to go on from."""
    if cfg.checkpoint.resume in ("none", "auto"):
        return "auto"
    from moe_trainer.checkpoint.manager import find_latest  # imports torch, which a first start does without

    own = find_latest(Path(cfg.run_dir) / cfg.run_name / "checkpoints")
    return cfg.checkpoint.resume if own is None else "auto"


def next_start(cfg: Config, num_gpus: int, last: Start, lost: Sequence[int]) -> Start:
    """The start after `last`, in which the ranks `lost` were killed.

    With `launch.shrink` it has the largest legal mesh of the ranks that are left, and none of the GPUs of the lost;
    as many ranks as before where none are left.

    Args:
        cfg: validated, of the first start.
        num_gpus: as many as ranks that the first start had GPUs for; those that ranks share are kept.
    """
    resume = resume_after_loss(cfg)
    argv = [argument for argument in last.argv if not argument.startswith("checkpoint.resume=")]
    argv.append(f"checkpoint.resume={resume}")
    if not cfg.launch.shrink or not lost or len(lost) >= last.nproc:  # of all lost there is no rest to go on with
        return last._replace(argv=argv)
    env = dict(last.env)
    if cfg.device is DeviceName.cuda and not _share_gpus():
        visible = env.get(_DEVICES, os.environ.get(_DEVICES))
        names = list(map(str, range(num_gpus))) if visible is None else visible.split(",")
        env[_DEVICES] = ",".join(name for rank, name in enumerate(names) if rank not in lost)
    left = last.nproc - len(lost)
    checkpoint = replace(cfg.checkpoint, resume=resume)
    resolved = validate(replace(cfg, nproc=left, checkpoint=checkpoint, profile=False), None, None)
    nproc = world_size_of(resolved.parallel)
    return Start([*argv, *_profiled(cfg, nproc)], nproc, env)


def _share_gpus() -> bool:
    from moe_trainer.parallel.gpus import ranks_per_gpu  # imports torch

    return ranks_per_gpu() > 1


def _profiled(cfg: Config, nproc: int) -> list[str]:
    """What to say of the profiler on fewer ranks than those that `profiler.ranks` was given for."""
    left = [rank for rank in cfg.profiler.ranks if rank < nproc]
    if not cfg.profile or left == cfg.profiler.ranks:
        return []
    return [f"profiler.ranks={left}".replace(" ", "")] if left else ["profile=false"]
