"""Rules that no single field can state: meshes, divisibility, files, folders that already hold a run.

Nothing here imports torch: a mistake costs one line before any rank starts. What only torch can tell, the number of
GPUs, comes in as a number.
"""

import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

from moe_trainer.config.auto_mesh import largest_mesh
from moe_trainer.config.checks import at_least, fits_one_machine, positive
from moe_trainer.config.choices import DeviceName, DType, MeshChoice
from moe_trainer.config.commands import EvaluateConfig, ExportConfig, GenerateConfig, InspectConfig
from moe_trainer.config.data import check_data, check_file
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.faults import check_faults
from moe_trainer.config.observe import check_logging, check_profiler
from moe_trainer.config.schema import Config, DataConfig, ModelConfig, OptimConfig, ParallelConfig
from moe_trainer.config.shape import check_divisions, check_model
from moe_trainer.config.training import check_training

_WIDTH = {DType.bfloat16: 16, DType.float32: 32, DType.float64: 64}
_SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def validate(
    cfg: Config, world_size: int | None, num_gpus: int | None, local_world_size: int | None = None
) -> Config:
    """The run that `cfg` describes, with a concrete mesh and, once `num_gpus` is known, a concrete device.

    Args:
        world_size: WORLD_SIZE under torchrun; None elsewhere, and then `nproc` or the mesh itself says it.
        num_gpus: GPUs visible on this machine; None while torch is not imported, which leaves the device unchecked.
        local_world_size: ranks of this machine; None means all.

    Raises:
        ConfigError: the first rule that is broken.
    """
    _check_run(cfg)
    check_logging(cfg.logging)
    check_model(cfg.model)
    _check_optim(cfg.optim, cfg.steps)
    check_data(cfg.data, cfg.model)
    gpus_to_use = 0 if cfg.device is DeviceName.cpu else num_gpus or 0
    parallel = _resolve_mesh(cfg, world_size, gpus_to_use)
    check_faults(cfg)
    check_profiler(cfg, world_size_of(parallel))
    check_training(cfg, parallel)
    _check_folders(cfg)
    device = cfg.device
    if num_gpus is not None:
        device = resolve_device(cfg.device, local_world_size or world_size_of(parallel), num_gpus)
    return replace(cfg, parallel=parallel, device=device)


def _resolve_mesh(cfg: Config, world_size: int | None, num_gpus: int) -> ParallelConfig:
    """The declared mesh, or with `parallel.mesh=auto` the largest legal one of the ranks there are."""

    def check(parallel: ParallelConfig, ranks: int | None) -> ParallelConfig:
        resolved = resolve_parallel(parallel, ranks, num_gpus)
        check_divisions(cfg.model, resolved)
        _check_batch(cfg.data, resolved)
        return resolved

    given = cfg.nproc if world_size is None else world_size
    if cfg.parallel.mesh is MeshChoice.declared:
        return check(cfg.parallel, given)
    _check_sizes(cfg.parallel)
    ranks = given or num_gpus or world_size_of(replace(cfg.parallel, fsdp=max(1, cfg.parallel.fsdp)))
    if world_size is None:
        fits_one_machine(ranks)  # each number of them is tried
    return largest_mesh(cfg.parallel, ranks, lambda mesh: check(mesh, None), all_of_them=world_size is not None)


def resolve_parallel(parallel: ParallelConfig, world_size: int | None, num_gpus: int = 0) -> ParallelConfig:
    """A copy with concrete `fsdp` and `ep`.

    World = dp_replicate x fsdp x tp (dense view) = dp_replicate x efsdp x ep (expert view of the same ranks).

    Args:
        world_size: number of ranks where it is given from outside (torchrun, `nproc`); None leaves it to the sizes.
        num_gpus: what `fsdp=-1` fills when `world_size` is None.
    """
    _check_sizes(parallel)
    others = parallel.dp_replicate * parallel.tp
    fsdp = parallel.fsdp
    if fsdp == -1:
        if world_size is not None and world_size % others:
            raise ConfigError(
                f"parallel.fsdp=-1: {world_size} ranks do not divide by "
                f"dp_replicate({parallel.dp_replicate}) x tp({parallel.tp}) = {others}"
            )
        fsdp = max(1, (num_gpus if world_size is None else world_size) // others)
    if world_size is not None and others * fsdp != world_size:
        raise ConfigError(
            f"parallel: dp_replicate({parallel.dp_replicate}) x fsdp({fsdp}) x tp({parallel.tp}) = {others * fsdp} "
            f"ranks, but WORLD_SIZE or nproc says {world_size}; parallel.fsdp=-1 takes what is left"
        )
    return replace(parallel, fsdp=fsdp, ep=_resolve_ep(parallel, fsdp))


def _check_sizes(parallel: ParallelConfig) -> None:
    for name in ("dp_replicate", "tp", "ep"):
        size = getattr(parallel, name)
        if size is not None:
            at_least(f"parallel.{name}", size, 1)
    if parallel.fsdp != -1 and parallel.fsdp < 1:
        raise ConfigError(f"parallel.fsdp={parallel.fsdp} must be at least 1, or -1 for what is left of the world")


def world_size_of(parallel: ParallelConfig) -> int:
    """Ranks of a resolved mesh."""
    return parallel.dp_replicate * parallel.fsdp * parallel.tp


def resolve_device(device: DeviceName, num_ranks: int, num_gpus: int) -> DeviceName:
    """`cpu` or `cuda`: auto is CUDA where there is a GPU for each of this machine's ranks."""
    if device is DeviceName.cuda and num_gpus == 0:
        raise ConfigError("device=cuda: PyTorch finds no GPU on this machine; use device=cpu")
    if device is DeviceName.cuda and num_gpus < num_ranks:
        raise ConfigError(
            f"device=cuda: {num_ranks} ranks need a GPU each, this machine shows {num_gpus}; "
            "use fewer ranks, device=cpu or, to try the mesh at no speed, MOE_TRAINER_RANKS_PER_GPU"
        )
    if device is DeviceName.auto:
        return DeviceName.cuda if num_gpus >= num_ranks else DeviceName.cpu
    return device


def validate_evaluate(
    cfg: EvaluateConfig, world_size: int | None, num_gpus: int | None, local_world_size: int | None = None
) -> EvaluateConfig:
    """The evaluation that `cfg` describes, with a concrete mesh and, once `num_gpus` is known, a concrete device; see
    `validate`. What depends on the model's shape is checked when the checkpoint is open."""
    _check_checkpoint(cfg.checkpoint)
    if cfg.data.text is not None:
        raise ConfigError("data.text: put the text to evaluate on into a file, and give data.path=FILE")
    if cfg.data.validation_path is not None:
        raise ConfigError(f"data.validation_path={cfg.data.validation_path}: give it as data.path")
    if cfg.data.path is None and not cfg.data.mixture:
        raise ConfigError("data.path=FILE must be given: a text to evaluate on, or a folder of moe-data prepare")
    if cfg.data.tokenizer is not None:
        raise ConfigError(f"data.tokenizer={cfg.data.tokenizer}: leave it out, the checkpoint has its own")
    check_data(cfg.data, ModelConfig(max_position_embeddings=sys.maxsize))
    for name in ("batches", "nproc"):
        if getattr(cfg, name) is not None:
            at_least(name, getattr(cfg, name), 1)
    gpus_to_use = 0 if cfg.device is DeviceName.cpu else num_gpus or 0
    parallel = resolve_parallel(cfg.parallel, cfg.nproc if world_size is None else world_size, gpus_to_use)
    _check_batch(cfg.data, parallel)
    device = cfg.device
    if num_gpus is not None:
        device = resolve_device(cfg.device, local_world_size or world_size_of(parallel), num_gpus)
    return replace(cfg, parallel=parallel, device=device)


def validate_generate(cfg: GenerateConfig, world_size: int | None, num_gpus: int | None) -> GenerateConfig:
    """The generation that `cfg` describes, with a concrete device once `num_gpus` is known; see `validate`."""
    _check_checkpoint(cfg.checkpoint)
    _check_prompts(cfg)
    for key, value, least in (
        ("max_new_tokens", cfg.max_new_tokens, 1),
        ("batch_size", cfg.batch_size, 1),
        ("temperature", cfg.temperature, 0),
        ("top_k", cfg.top_k, 1),
        ("seed", cfg.seed, 0),
    ):
        if value is not None:
            at_least(key, value, least)
    if cfg.top_p is not None and not 0 < cfg.top_p <= 1:
        raise ConfigError(f"top_p={cfg.top_p} must be above 0 and at most 1")
    at_least("parallel.tp", cfg.parallel.tp, 1)
    if world_size is not None and world_size != cfg.parallel.tp:
        raise ConfigError(f"parallel.tp={cfg.parallel.tp} must be the number of ranks, WORLD_SIZE is {world_size}")
    if num_gpus is None:
        return cfg
    return replace(cfg, device=resolve_device(cfg.device, cfg.parallel.tp, num_gpus))


def _check_prompts(cfg: GenerateConfig) -> None:
    if not cfg.prompt and cfg.prompts is None:
        raise ConfigError('prompt="TEXT" must be given: the text to continue; or prompts=FILE with one on each line')
    if cfg.prompt is not None and cfg.prompts is not None:
        raise ConfigError("prompt and prompts are both given; exactly one of them says what to continue")
    if cfg.prompts is not None:
        check_file("prompts", cfg.prompts)
    if cfg.output is not None:
        out = Path(cfg.output)
        if out.suffix != ".jsonl":
            raise ConfigError(f"output={cfg.output} must be a .jsonl file")
        if out.exists():
            raise ConfigError(f"output={cfg.output} exists already; name a file that does not")
        if not out.parent.is_dir():
            raise ConfigError(f"output={cfg.output}: there is no folder {out.parent}")
        if not os.access(out.parent, os.W_OK | os.X_OK):
            raise ConfigError(f"output={cfg.output}: {out.parent} cannot be written to; name a file elsewhere")


def validate_export(cfg: ExportConfig) -> None:
    """Checks the folders, the shard size and the number of workers."""
    _check_checkpoint(cfg.checkpoint)
    if not cfg.out:
        raise ConfigError("out=DIR must be given: the folder to write")
    if Path(cfg.out).exists():
        raise ConfigError(f"out={cfg.out} exists already; name a folder that does not")
    parse_size(cfg.max_shard_size)
    if cfg.workers is not None:
        at_least("workers", cfg.workers, 1)


def validate_inspect(cfg: InspectConfig) -> None:
    """Checks that the checkpoint's folder is there."""
    _check_checkpoint(cfg.checkpoint)


def parse_size(text: str) -> int:
    """Bytes in `5GB`, `300 MB`, `1.5KB` or a plain number (decimal units)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * _SIZE_UNITS[(match[2] or "B").upper()] if match else 0
    if not 1 <= size < 2**63:
        raise ConfigError(f"max_shard_size={text} must be a size such as 5GB, 300MB or 20000")
    return int(size)


def _resolve_ep(parallel: ParallelConfig, fsdp: int) -> int:
    tp = parallel.tp
    ep = parallel.ep if parallel.ep is not None else (tp if parallel.expert_parallel else 1)
    if ep > 1 and not parallel.expert_parallel:
        raise ConfigError(f"parallel.ep={ep} needs parallel.expert_parallel=true")
    if fsdp * tp % ep:
        raise ConfigError(f"parallel.ep={ep} must divide fsdp({fsdp}) x tp({tp})")
    if parallel.expert_parallel and ep % tp:
        raise ConfigError(f"parallel.ep={ep} must be a multiple of tp({tp})")
    if parallel.expert_parallel and not parallel.sequence_parallel and ep != tp:
        raise ConfigError(
            f"parallel.ep={ep} must equal tp({tp}) unless parallel.sequence_parallel=true: "
            "without it the ranks of an expert group must share a batch"
        )
    return ep


def _check_run(cfg: Config) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", cfg.run_name) or cfg.run_name in (".", ".."):
        raise ConfigError(f"run_name={cfg.run_name!r} must be a folder name of letters, digits, '.', '_' and '-'")
    if not cfg.run_dir or "\0" in cfg.run_dir:
        raise ConfigError(f"run_dir={cfg.run_dir!r} must be the path of a folder")
    at_least("steps", cfg.steps, 1)
    at_least("seed", cfg.seed, 0)
    for key, value in (
        ("nproc", cfg.nproc),
        ("checkpoint.every", cfg.checkpoint.every),
        ("checkpoint.keep_last", cfg.checkpoint.keep_last),
        ("checkpoint.keep_every", cfg.checkpoint.keep_every),
        ("optim.decay_steps", cfg.optim.decay_steps),
    ):
        if value is not None:
            at_least(key, value, 1)
    if cfg.max_minutes is not None and not 0 < cfg.max_minutes < math.inf:
        raise ConfigError(f"max_minutes={cfg.max_minutes} must be above 0")
    for name in ("weights_dtype", "moments_dtype"):
        if cfg.dtype is DType.float64 and getattr(cfg.optim, name) is DType.bfloat16:
            raise ConfigError(f"optim.{name}=bfloat16 does not go with dtype=float64: leave it auto")
    both = cfg.dtype is not DType.auto and cfg.reduce_dtype is not DType.auto
    if both and _WIDTH[cfg.reduce_dtype] < _WIDTH[cfg.dtype]:
        raise ConfigError(f"reduce_dtype={cfg.reduce_dtype.value} must not be narrower than dtype={cfg.dtype.value}")


def _check_optim(optim: OptimConfig, steps: int) -> None:
    for name in ("lr", "eps"):
        positive(f"optim.{name}", getattr(optim, name))
    if not optim.max_grad_norm > 0:
        raise ConfigError(f"optim.max_grad_norm={optim.max_grad_norm} must be above 0 (.inf never clips)")
    for name in ("weights_dtype", "moments_dtype"):
        chosen = getattr(optim, name)
        if chosen not in (DType.auto, DType.bfloat16):
            raise ConfigError(f"optim.{name}={chosen.value} must be auto or bfloat16")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optim, name) < 1:
            raise ConfigError(f"optim.{name}={getattr(optim, name)} must be at least 0 and below 1")
    for name in ("weight_decay", "aux_coef", "z_coef", "warmup_steps", "expert_bias_rate"):
        at_least(f"optim.{name}", getattr(optim, name), 0)
    for group in optim.groups:
        at_least("optim.groups: lr_scale", group.lr_scale, 0)
        at_least("optim.groups: weight_decay", group.weight_decay or 0, 0)
    if not 0 <= optim.min_lr_ratio <= 1:
        raise ConfigError(f"optim.min_lr_ratio={optim.min_lr_ratio} must be between 0 and 1")
    if optim.schedule_steps is not None:
        at_least("optim.schedule_steps", optim.schedule_steps, 1)
    name, horizon = ("steps", steps) if optim.schedule_steps is None else ("schedule_steps", optim.schedule_steps)
    if optim.warmup_steps > horizon:
        raise ConfigError(f"optim.warmup_steps={optim.warmup_steps} must be at most {name}({horizon})")


def _check_batch(data: DataConfig, parallel: ParallelConfig) -> None:
    product = data.micro_batch_size * parallel.dp_replicate * parallel.fsdp
    if data.global_batch_size % product:
        below = data.global_batch_size // product * product
        nearest = f"{below} or {below + product}" if below else f"{product}"
        raise ConfigError(
            f"data.global_batch_size={data.global_batch_size} must be a multiple of micro_batch_size"
            f"({data.micro_batch_size}) x dp_replicate({parallel.dp_replicate}) x fsdp({parallel.fsdp}) = {product}; "
            f"nearest: {nearest}"
        )


def _check_folders(cfg: Config) -> None:
    run = Path(cfg.run_dir) / cfg.run_name
    for folder in (run, *run.parents):
        if folder.exists():
            if not folder.is_dir():
                raise ConfigError(f"run_dir={cfg.run_dir}: {folder} is a file, not a folder")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise ConfigError(f"run_dir={cfg.run_dir}: {folder} cannot be written to; name another run_dir")
            break
    resume = cfg.checkpoint.resume
    if resume == "none" and not cfg.print_plan and _holds_steps(run):
        raise ConfigError(
            f"{run} already holds steps of a run; go on with checkpoint.resume=auto, or give another run_name"
        )
    if resume not in ("none", "auto"):
        _check_our_checkpoint("checkpoint.resume", resume)


def _holds_steps(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or any(run.glob("checkpoints/step-*"))


def _check_our_checkpoint(key: str, text: str) -> None:
    folder = Path(text)
    if not folder.is_dir():
        raise ConfigError(f"{key}={text}: no such folder; give none, auto or the path of a checkpoint or run")
    if not (folder / "COMMIT.json").is_file() and not (folder / "checkpoints").is_dir():
        raise ConfigError(f"{key}={text} is no complete checkpoint (COMMIT.json) and no run (checkpoints/)")


def _check_checkpoint(checkpoint: str | None) -> None:
    if not checkpoint:
        raise ConfigError("checkpoint=DIR must be given: a checkpoint or the folder of a run")
    if not Path(checkpoint).is_dir():
        raise ConfigError(f"checkpoint={checkpoint}: there is no such folder")
