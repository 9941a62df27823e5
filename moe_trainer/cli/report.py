"""`moe-report RUN... [out=FILE]`: one or several runs as one HTML page that needs no network."""

import sys
from pathlib import Path

from moe_trainer.cli.command import run_command
from moe_trainer.config.errors import ConfigError

_USAGE = """usage: moe-report RUN... [out=FILE]

RUN is the folder of a run, such as runs/mixtral_tiny; several are drawn over each other. FILE is the page to write:
report.html, in the folder of the run or, for several, here."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `moe-report`; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command("moe-report", lambda: _report(arguments))


def _report(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(_USAGE)
        return 0
    outs = [argument.removeprefix("out=") for argument in argv if argument.startswith("out=")]
    folders = [Path(argument) for argument in argv if not argument.startswith("out=")]
    if not folders:
        raise ConfigError("RUN must be given: the folder of a run, or several")
    if len(outs) > 1 or "" in outs:
        raise ConfigError("out=FILE names one file, the page to write")
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: there is no such folder; usage: moe-report RUN... [out=FILE]")
    from moe_trainer.observe.report import REPORT, write_report

    out = Path(outs[0]) if outs else (folders[0] if len(folders) == 1 else Path()) / REPORT
    write_report(folders, out)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
