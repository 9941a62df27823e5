"""`moe-eval checkpoint=DIR data.path=FILE [key=value ...]`: a checkpoint's loss on held-out data, on any mesh."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_trainer.cli.command import (
    count_gpus,
    is_first_rank,
    local_world_size_from_env,
    run_command,
    world_size_from_env,
)
from moe_trainer.cli.launch import launch
from moe_trainer.config.commands import EvaluateConfig
from moe_trainer.config.data import check_data
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.keys import keys_help
from moe_trainer.config.schema import Config
from moe_trainer.config.shape import check_divisions
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate_evaluate, world_size_of

if TYPE_CHECKING:
    import torch


_OF_TRAINING = ("data.text", "data.validation_path", "data.prepare", "data.tokenizer")
"""Keys that `moe-eval` shares with training's schema, and refuses or does not read."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `moe-eval`; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command("moe-eval", lambda: _eval(arguments))


def _eval(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        keys = keys_help(EvaluateConfig(), _OF_TRAINING)
        print(f"usage: moe-eval checkpoint=DIR data.path=FILE [key=value ...]\n\n{keys}")
        return 0
    cfg = compose("eval", argv)
    world_size = world_size_from_env()
    # Twice: what needs no torch costs no import of it.
    validate_evaluate(cfg, world_size, num_gpus=None)
    resolved = validate_evaluate(cfg, world_size, count_gpus(cfg.device), local_world_size_from_env())
    if world_size is None and world_size_of(resolved.parallel) > 1:
        return launch("moe_trainer.cli.eval", argv, world_size_of(resolved.parallel))
    from moe_trainer.observe.log import setup_logging
    from moe_trainer.parallel.process_group import process_group

    with process_group(resolved.device) as device:
        setup_logging(0 if is_first_rank() else 1)
        metrics = evaluate_checkpoint(resolved, device)
    if is_first_rank():
        print("  ".join(f"{name} {value:.6g}" for name, value in metrics.items()))
    return 0


def evaluate_checkpoint(cfg: EvaluateConfig, device: "torch.device") -> dict[str, float]:
    """The figures of `train.evaluate` for a validated config. Collective: a process group is up.

    Raises:
        ConfigError: a checkpoint or data that cannot be read, or a mesh that does not fit the model.
    """
    from moe_trainer.generate.source import load_weights, open_source
    from moe_trainer.parallel.apply import build_model
    from moe_trainer.parallel.fsdp import shard_over_data
    from moe_trainer.parallel.mesh import build_meshes
    from moe_trainer.parallel.precision import resolve_precision
    from moe_trainer.train.evaluate import build_held_out, evaluate

    source = open_source(Path(cfg.checkpoint))
    check_divisions(source.model, cfg.parallel)
    check_data(cfg.data, source.model)
    meshes = build_meshes(cfg.parallel, device.type)
    data = replace(
        cfg.data, validation_path=cfg.data.path, path=None, tokenizer=str(source.folder / "tokenizer.json")
    )
    run = Config(model=source.model, data=data, device=cfg.device)
    try:
        held_out = build_held_out(run, meshes.data_rank, meshes.data_size)
    except ConfigError as error:  # by the key that was given here
        raise ConfigError(str(error).replace("data.validation_path", "data.path")) from error
    if held_out is None:
        raise ConfigError(
            "data.mixture: its folders hold nothing out; prepare them with validation_share, or give data.path=FILE"
        )
    precision = resolve_precision(cfg.dtype, run.reduce_dtype, device)
    model, _ = build_model(source.model, cfg.parallel, meshes, precision.master)
    shard_over_data(model, meshes, precision)
    model.to_empty(device=device).requires_grad_(False)
    load_weights(source, dict(model.named_parameters()) | dict(model.named_buffers()))
    vocab_group = None if meshes.tp is None else meshes.tp.get_group()
    return evaluate(model, held_out, cfg.batches, vocab_group, device)


if __name__ == "__main__":
    sys.exit(main())
