"""Rules of evaluation, optimizer and adapters that no single field can state.

Nothing here imports torch.
"""

from pathlib import Path

from moe_trainer.config.checks import at_least, positive
from moe_trainer.config.choices import Compute, DType
from moe_trainer.config.commands import UpcycleConfig
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config, EvalConfig, LoraConfig, ModelConfig, OptimConfig, ParallelConfig


def check_training(cfg: Config, parallel: ParallelConfig) -> None:
    """`parallel`: the resolved mesh. Raises `ConfigError` for the first rule that is broken."""
    _check_compute(cfg, parallel)
    check_eval(cfg.eval)
    check_spikes(cfg.optim)
    check_lora(cfg.lora, cfg.model, parallel)


def _check_compute(cfg: Config, parallel: ParallelConfig) -> None:
    """What row-wise scaled products take."""
    if cfg.compute is not Compute.fp8:
        return
    if cfg.dtype not in (DType.auto, DType.bfloat16):
        raise ConfigError(f"compute=fp8 goes with dtype=bfloat16, not dtype={cfg.dtype.value}")
    split = 1 if parallel.expert_parallel else parallel.tp
    for name, width in (("hidden_size", cfg.model.hidden_size), ("intermediate_size", cfg.model.intermediate_size)):
        ranks = split if name == "intermediate_size" else 1
        if width // ranks % 16:
            share = f"model.{name}={width}" + (f" over parallel.tp={ranks}" if ranks > 1 else "")
            raise ConfigError(f"compute=fp8: {share} must give each rank a multiple of 16; use compute=dtype")


def check_eval(evaluation: EvalConfig) -> None:
    """Sizes alone; whether there is held-out data is the loader's to say."""
    for name in ("every", "batches"):
        if getattr(evaluation, name) is not None:
            at_least(f"eval.{name}", getattr(evaluation, name), 1)


def check_spikes(optim: OptimConfig) -> None:
    """Bounds of what a run takes as usual."""
    if optim.max_grad_zscore is not None:
        positive("optim.max_grad_zscore", optim.max_grad_zscore)
    if optim.max_skipped_steps is not None:
        at_least("optim.max_skipped_steps", optim.max_skipped_steps, 1)


def check_lora(lora: LoraConfig, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Sizes; whether the targets are there, the model knows."""
    if lora.rank is None:
        return
    at_least("lora.rank", lora.rank, 1)
    positive("lora.alpha", lora.alpha)
    if not lora.targets:
        raise ConfigError("lora.targets is empty; name the layers that get adapters")
    shards, split = parallel.fsdp, parallel.tp
    if parallel.expert_parallel:
        shards, split = parallel.fsdp * parallel.tp // parallel.ep, 1
    if shards * parallel.ep > model.num_experts and model.intermediate_size // split % shards:
        raise ConfigError(
            f"parallel.fsdp={parallel.fsdp}: with adapters and more shards than experts, their number ({shards}) "
            f"must divide model.intermediate_size({model.intermediate_size // split})"
        )


def check_upcycle(cfg: UpcycleConfig) -> None:
    """Folders and numbers of `moe-checkpoint upcycle`."""
    if not cfg.model:
        raise ConfigError("model=DIR must be given: the Hugging Face folder of a dense model")
    if not (Path(cfg.model) / "config.json").is_file():
        raise ConfigError(f"model={cfg.model}: no config.json in it, so it is no Hugging Face folder")
    if not cfg.out:
        raise ConfigError("out=DIR must be given: the folder to write")
    if Path(cfg.out).exists():
        raise ConfigError(f"out={cfg.out} exists already; name a folder that does not")
    for name, least in (("num_experts", 1), ("top_k", 1), ("seed", 0), ("noise", 0), ("workers", 1)):
        if getattr(cfg, name) is not None:
            at_least(name, getattr(cfg, name), least)
    if cfg.top_k > cfg.num_experts:
        raise ConfigError(f"top_k={cfg.top_k} must be at most num_experts({cfg.num_experts})")
    if not 0 <= cfg.drop < 1:
        raise ConfigError(f"drop={cfg.drop} must be at least 0 and below 1")
