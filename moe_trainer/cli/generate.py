"""`moe-generate checkpoint=DIR prompt="TEXT"|prompts=FILE [key=value ...]`: continues texts with a trained model."""

import sys

from moe_trainer.cli.command import count_gpus, run_command, world_size_from_env
from moe_trainer.cli.launch import launch
from moe_trainer.config.commands import GenerateConfig
from moe_trainer.config.keys import keys_help
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate_generate
from moe_trainer.generate.prompts import read_prompts


def main(argv: list[str] | None = None) -> int:
    """Entry point of `moe-generate`; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command("moe-generate", lambda: _generate(arguments))


def _generate(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        usage = 'usage: moe-generate checkpoint=DIR prompt="TEXT"|prompts=FILE [key=value ...]'
        print(f"{usage}\n\n{keys_help(GenerateConfig())}")
        return 0
    cfg = compose("generate", argv)
    world_size = world_size_from_env()
    # Twice: what needs no torch costs no import of it.
    validate_generate(cfg, world_size, num_gpus=None)
    read_prompts(cfg)
    resolved = validate_generate(cfg, world_size, count_gpus(cfg.device))
    if world_size is None and cfg.parallel.tp > 1:
        return launch("moe_trainer.cli.generate", argv, cfg.parallel.tp)
    from moe_trainer.generate.main import run_generation

    run_generation(resolved)
    return 0


if __name__ == "__main__":
    sys.exit(main())
