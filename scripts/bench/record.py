"""One measurement: a Markdown row for docs/benchmarks.md, and a line of JSON with everything needed to repeat it."""

import json
import platform
import sys
import time
from pathlib import Path

import torch

from moe_trainer.config.choices import DeviceName


def record(bench: str, row: dict[str, object], heading: bool = True) -> None:
    """Print the row, under its heading if asked, and append it to bench_results/<bench>.jsonl.

    Args:
        row: column -> value; floats are printed with four digits.
    """
    if heading:
        print(f"| {' | '.join(row)} |")
        print("|" + "---|" * len(row))
    print(f"| {' | '.join(map(_text, row.values()))} |", flush=True)
    facts = {
        "bench": bench,
        "device": device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
    }
    folder = Path("bench_results")
    folder.mkdir(exist_ok=True)
    with (folder / f"{bench}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts | row, default=str) + "\n")


def device_name() -> str:
    """What computes."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"


def device() -> DeviceName:
    """Where a benchmark computes."""
    return DeviceName.cuda if torch.cuda.is_available() else DeviceName.cpu


def option(name: str, default: str) -> str:
    """The value of --name=VALUE on the command line."""
    given = (argument.removeprefix(f"--{name}=") for argument in sys.argv[1:] if argument.startswith(f"--{name}="))
    return next(given, default)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
