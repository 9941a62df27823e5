"""`moe-train +recipe=NAME [key=value ...]`: checks the run, then trains it on as many ranks as its mesh has."""

import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from moe_trainer.cli.command import (
    count_gpus,
    is_first_rank,
    local_world_size_from_env,
    run_command,
    world_size_from_env,
)
from moe_trainer.cli.data import prepare_with_progress
from moe_trainer.cli.launch import Start, launch, launch_again, launch_folder, stop_file, was_launched
from moe_trainer.cli.restart import is_restart, next_start, resume_after_loss
from moe_trainer.config.keys import keys_help
from moe_trainer.config.schema import ModelConfig
from moe_trainer.config.shape import check_init_from
from moe_trainer.config.store import compose, config_groups, recipes
from moe_trainer.config.validate import validate, world_size_of
from moe_trainer.models.hub import model_config_from_hf


def main(argv: list[str] | None = None) -> int:
    """Entry point of `moe-train`; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command("moe-train", lambda: _train(arguments))


def _train(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(_help())
        return 0
    cfg = compose("train", argv)
    has_recipe = any(argument.startswith("+recipe=") for argument in argv)
    if not has_recipe and cfg.data.text is None and cfg.data.path is None and not cfg.data.mixture:
        if is_first_rank():
            print(f"moe-train: name a recipe, or give data.path=FILE\n{_recipe_list()}", file=sys.stderr)
        return 2

    if cfg.model.init_from is not None:
        cfg = replace(cfg, model=_shape_of(cfg.model.init_from, cfg.model.capacity_factor))
    if is_restart():
        cfg.checkpoint.resume = resume_after_loss(cfg)
    world_size = world_size_from_env()
    # Twice: what needs no torch costs no import of it.
    validate(cfg, world_size, num_gpus=None)
    num_gpus = count_gpus(cfg.device)
    resolved = validate(cfg, world_size, num_gpus, local_world_size_from_env())

    if cfg.print_plan:
        if is_first_rank():
            from moe_trainer.train.plan_report import print_plan

            print_plan(resolved)
        return 0
    if resolved.data.prepare.inputs and not was_launched():
        # A folder that is there may have been made for something else.
        prepare_with_progress(resolved.data.prepare, Path(resolved.data.path), of_run=True)
    nproc, max_restarts = world_size_of(resolved.parallel), resolved.launch.max_restarts
    if world_size is None and max_restarts:
        again = partial(next_start, resolved, num_gpus)
        return launch_again("moe_trainer.cli.train", Start(argv, nproc), max_restarts, again)
    if world_size is None and nproc > 1:
        return launch("moe_trainer.cli.train", argv, nproc, lets_finish=True)
    from moe_trainer.train.main import run_training

    if not run_training(resolved, stop_file(), launch_folder()) and is_first_rank():
        others = [argument for argument in argv if not argument.startswith("checkpoint.resume=")]
        print(f"moe-train: saved and stopped; go on with: moe-train {shlex.join(others)} checkpoint.resume=auto")
    return 0


def _shape_of(init_from: str, capacity_factor: float | None) -> ModelConfig:
    """The folder's; what a token is turned away for is a matter of training, of which no folder says anything."""
    folder = check_init_from(init_from)
    return replace(model_config_from_hf(folder), init_from=str(folder), capacity_factor=capacity_factor)


def _recipe_list() -> str:
    width = max(map(len, recipes()))
    return "\n".join(f"  +recipe={name:{width}}  {purpose}" for name, purpose in recipes().items())


def _help() -> str:
    groups = "\n".join(f"  {name}={'|'.join(choices)}" for name, choices in config_groups().items())
    return (
        f"usage: moe-train +recipe=NAME [key=value ...]\n\nRecipes:\n{_recipe_list()}\n\n"
        f"Ready-made nodes (a recipe chooses them, NODE=CHOICE replaces its choice):\n{groups}\n\n"
        f"Keys, with their values where no recipe is chosen:\n{keys_help(compose('train', []))}"
    )


if __name__ == "__main__":
    sys.exit(main())
