"""`moe-train +recipe=NAME [key=value ...]`: checks the run, then trains it on as many ranks as its mesh has."""

import shlex
import sys
from dataclasses import replace

from moe_trainer.cli.command import (
    count_gpus,
    is_first_rank,
    local_world_size_from_env,
    run_command,
    world_size_from_env,
)
from moe_trainer.cli.launch import launch, stop_file
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
    if not has_recipe and cfg.data.text is None and cfg.data.path is None:
        if is_first_rank():
            print(f"moe-train: name a recipe, or give data.path=FILE\n{_recipe_list()}", file=sys.stderr)
        return 2

    if cfg.model.init_from is not None:
        cfg = replace(cfg, model=_shape_of(cfg.model.init_from))
    world_size = world_size_from_env()
    # Twice: what needs no torch costs no import of it.
    validate(cfg, world_size, num_gpus=None)
    resolved = validate(cfg, world_size, count_gpus(cfg.device), local_world_size_from_env())

    if cfg.print_plan:
        if is_first_rank():
            from moe_trainer.train.plan_report import print_plan

            print_plan(resolved)
        return 0
    if world_size is None and world_size_of(resolved.parallel) > 1:
        return launch("moe_trainer.cli.train", argv, world_size_of(resolved.parallel), lets_finish=True)
    from moe_trainer.train.main import run_training

    if not run_training(resolved, stop_file()) and is_first_rank():
        others = [argument for argument in argv if not argument.startswith("checkpoint.resume=")]
        print(f"moe-train: saved and stopped; go on with: moe-train {shlex.join(others)} checkpoint.resume=auto")
    return 0


def _shape_of(init_from: str) -> ModelConfig:
    return replace(model_config_from_hf(check_init_from(init_from)), init_from=init_from)


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
