"""`moe-checkpoint export|inspect|verify|upcycle`: what to do with saved weights besides training them."""

import sys
from pathlib import Path

from moe_trainer.cli.command import run_command
from moe_trainer.config.choices import LoraExport
from moe_trainer.config.commands import ExportConfig, InspectConfig, UpcycleConfig
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.keys import keys_help
from moe_trainer.config.store import compose
from moe_trainer.config.training import check_upcycle
from moe_trainer.config.validate import parse_size, validate_export, validate_inspect

_USAGE = """usage: moe-checkpoint export checkpoint=DIR out=DIR [key=value ...]   write a Hugging Face folder
       moe-checkpoint inspect checkpoint=DIR                         show what is in a checkpoint
       moe-checkpoint verify checkpoint=DIR                          compare its files with their checksums
       moe-checkpoint upcycle model=DIR out=DIR [key=value ...]      a mixture of experts from a dense model"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `moe-checkpoint`; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command("moe-checkpoint", lambda: _dispatch(arguments))


def _dispatch(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        configs = {"export": ExportConfig(), "inspect, verify": InspectConfig(), "upcycle": UpcycleConfig()}
        print("\n\n".join([_USAGE, *(f"{name}:\n{keys_help(cfg)}" for name, cfg in configs.items())]))
        return 0
    actions = {"export": _export, "inspect": _inspect, "verify": _verify, "upcycle": _upcycle}
    if not argv or argv[0] not in actions:
        given = f"not {argv[0]!r}" if argv else "none is given"
        raise ConfigError(f"the first argument is one of {', '.join(actions)}; {given}")
    actions[argv[0]](argv[1:])
    return 0


def _export(overrides: list[str]) -> None:
    cfg: ExportConfig = compose("export", overrides)
    validate_export(cfg)
    from moe_trainer.checkpoint.export import export_checkpoint
    from moe_trainer.checkpoint.lora import export_adapter
    from moe_trainer.checkpoint.manager import resolve_checkpoint

    checkpoint = resolve_checkpoint(Path(cfg.checkpoint))
    if cfg.lora is LoraExport.adapter:
        export_adapter(checkpoint, Path(cfg.out), cfg.dtype)
    else:
        export_checkpoint(checkpoint, Path(cfg.out), parse_size(cfg.max_shard_size), cfg.dtype, cfg.workers)
    print(f"wrote {cfg.out}")


def _upcycle(overrides: list[str]) -> None:
    cfg: UpcycleConfig = compose("upcycle", overrides)
    check_upcycle(cfg)
    max_shard_bytes = parse_size(cfg.max_shard_size)
    from moe_trainer.checkpoint.upcycle import upcycle

    model = upcycle(cfg, max_shard_bytes)
    print(f"wrote {cfg.out}: {model.family.value}, {model.num_experts} experts in each of {model.num_layers} layers")


def _inspect(overrides: list[str]) -> None:
    checkpoint = _chosen(overrides)
    from moe_trainer.checkpoint.inspect import describe

    print(describe(checkpoint))


def _verify(overrides: list[str]) -> None:
    checkpoint = _chosen(overrides)
    from moe_trainer.checkpoint.manifest import verify

    verify(checkpoint)
    print(f"{checkpoint}: every file is as it was written")


def _chosen(overrides: list[str]) -> Path:
    """The checkpoint itself, or the newest undamaged one of a run."""
    cfg: InspectConfig = compose("inspect", overrides)
    validate_inspect(cfg)
    folder = Path(cfg.checkpoint)
    from moe_trainer.checkpoint.manager import resolve_checkpoint
    from moe_trainer.checkpoint.manifest import COMMIT

    return folder if (folder / COMMIT).exists() else resolve_checkpoint(folder)


if __name__ == "__main__":
    sys.exit(main())
