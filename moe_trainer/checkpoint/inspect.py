"""What a checkpoint holds, as text."""

import json
import math
import re
from pathlib import Path

import torch

from moe_trainer.checkpoint.manager import TENSORS, inside, read_document
from moe_trainer.checkpoint.manifest import read_commit
from moe_trainer.checkpoint.sharded import stored_tensors
from moe_trainer.config.errors import ConfigError, printable


def describe(checkpoint: Path) -> str:
    """What state.json and model.json say, sizes, then a table: parameter, shape, dtype, bytes. Reads no tensor.

    Raises:
        ConfigError: not a checkpoint.
    """
    commit = read_commit(checkpoint)
    state = _json(checkpoint, "state.json")
    model = _json(checkpoint, "model.json")
    stored = stored_tensors(inside(checkpoint, f"{TENSORS}/.metadata").parent)
    weights = {name.removeprefix("model."): entry for name, entry in stored.items() if name.startswith("model.")}
    others = {name: entry for name, entry in stored.items() if not name.startswith("model.")}
    on_disk = sum(record["size"] for record in commit["files"].values())
    head = {
        "checkpoint": str(checkpoint),
        "step": commit["step"],
        **{name: _pairs(value) for name, value in state.items() if name != "step"},
        "model": _pairs(model),
        "torch": commit["torch"],
        "parameters": f"{sum(math.prod(shape) for shape, _ in weights.values()):,}",
        "weights": _bytes(weights),
        "optimizer": f"{_bytes(others)} in {len(others)} tensors",
        "on disk": f"{on_disk:,} bytes in {len(commit['files'])} files",
    }
    shown = {name: value for name, value in head.items() if value not in (None, "")}
    width = max(map(len, shown)) + 2
    lines = [f"{name:<{width}}{value}" for name, value in shown.items()]
    return "\n".join(map(printable, [*lines, "", *_table(weights)])) + "\n"


def _table(weights: dict[str, tuple[torch.Size, torch.dtype]]) -> list[str]:
    rows = [("parameter", "shape", "dtype", "bytes")]
    for name in sorted(weights, key=_natural):
        shape, dtype = weights[name]
        size = math.prod(shape) * dtype.itemsize
        rows.append((name, " x ".join(map(str, shape)), str(dtype).removeprefix("torch."), f"{size:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype:<{widths[2]}}  {size:>{widths[3]}}"
        for name, shape, dtype, size in rows
    ]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """layers.2 before layers.10."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def _bytes(tensors: dict[str, tuple[torch.Size, torch.dtype]]) -> str:
    return f"{sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values()):,} bytes"


def _pairs(value: object, depth: int = 2) -> str:
    """`fsdp=2 tp=2`; nothing for a list or a deeper structure, which no one reads here."""
    if isinstance(value, dict):
        parts = {name: _pairs(entry, depth - 1) for name, entry in value.items()} if depth else {}
        return " ".join(f"{name}={part}" for name, part in parts.items() if part)
    return "" if value is None or isinstance(value, list) else str(value)


def _json(checkpoint: Path, name: str) -> dict[str, object]:
    if not (checkpoint / name).exists():
        return {}
    try:
        content = json.loads(read_document(checkpoint, name))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{checkpoint / name} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}
