"""`moe-data prepare|verify`: texts to token shards, which `moe-train data.path=DIR` reads."""

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from moe_trainer.cli.command import run_command
from moe_trainer.config.commands import PrepareCommandConfig, VerifyDataConfig
from moe_trainer.config.data import check_prepare, check_verify_data
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.keys import keys_help
from moe_trainer.config.schema import PrepareConfig
from moe_trainer.config.store import compose

_USAGE = """usage: moe-data prepare FILE... out=DIR [key=value ...]   write token shards
       moe-data verify path=DIR                          compare their files with their checksums

FILE may be a glob in quotes. Plain text is one document a file; each line of a .jsonl file and each row of a .parquet
file is one, with its text in `text`, or a conversation in `messages`."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `moe-data`; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command("moe-data", lambda: _dispatch(arguments))


def prepare_with_progress(cfg: PrepareConfig, out: Path, of_run: bool = False) -> None:
    """Prepare as `cfg` says, with a progress bar on stderr.

    Args:
        of_run: errors name the keys of a run, and not those of `moe-data`.
    """
    from moe_trainer.data.prepare import Keys, prepare

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None, documents=0)
        prepare(
            cfg,
            out,
            lambda what, documents, done, total: bar.update(
                task, description=what, documents=documents, completed=done, total=total
            ),
            Keys("data.prepare.", "data.path") if of_run else Keys(),
        )


def _dispatch(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        helps = keys_help(PrepareCommandConfig()), keys_help(VerifyDataConfig())
        print(f"{_USAGE}\n\nprepare:\n{helps[0]}\n\nverify:\n{helps[1]}")
        return 0
    actions = {"prepare": _prepare, "verify": _verify}
    if not argv or argv[0] not in actions:
        given = f"not {argv[0]!r}" if argv else "none is given"
        raise ConfigError(f"the first argument is one of {', '.join(actions)}; {given}")
    actions[argv[0]](argv[1:])
    return 0


def _prepare(arguments: list[str]) -> None:
    # What has no `=` is a file.
    cfg: PrepareCommandConfig = compose("prepare", [argument for argument in arguments if "=" in argument])
    cfg.inputs += [argument for argument in arguments if "=" not in argument]
    check_prepare(cfg)
    from moe_trainer.data.shards import is_prepared, read_index

    out = Path(cfg.out)
    was_there = is_prepared(out)
    prepare_with_progress(cfg, out)
    index = read_index(out)
    print(f"{out}: {index.describe()}{' (prepared before, nothing to do)' if was_there else ''}")
    print(f"unigram entropy: {index.unigram_entropy:.4f} nats")


def _verify(overrides: list[str]) -> None:
    cfg: VerifyDataConfig = compose("verify_data", overrides)
    check_verify_data(cfg)
    from moe_trainer.data.shards import verify

    index = verify(Path(cfg.path))
    print(f"{cfg.path}: every file is as it was written; {index.describe()}")


if __name__ == "__main__":
    sys.exit(main())
