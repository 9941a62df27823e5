"""One or several runs as one self-contained HTML page: what their folders say, thinned out for drawing."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.plain_yaml import read_leaves
from moe_trainer.observe.page import MARK, page
from moe_trainer.observe.sinks import finite_json, read_metrics

REPORT = "report.html"
MAX_POINTS = 1000
"""Of a curve; more steps are drawn as the mean of neighbours, with their range behind it."""
MAX_TABLES = 100
MAX_CELLS = 600_000
"""Tables of expert load, and cells of all of them together, that a run brings to the page."""

Series = dict[str, Any]


def write_report(folders: list[Path], out: Path) -> None:
    """Draw the runs in these folders as one page; it replaces an older one at once or, on an error, not at all.

    Raises:
        ConfigError: a folder holds no steps of a run, or a file of it cannot be read; `out` is something else.
    """
    runs = [load_run(folder) for folder in folders]
    names = [run["name"] for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run["name"]) > 1:
            run["name"] = str(folder)
    if out.is_dir():
        raise ConfigError(f"out={out} is not a file; name the page to write")
    if out.exists() and f'data-kind="{MARK}"' not in _beginning(out):
        raise ConfigError(f"out={out} is not a report; name a file that does not exist, or an older report")
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.write_text(page(runs), encoding="utf-8")
        partial.replace(out)
    except (OSError, ValueError) as error:  # ValueError: a text that is not Unicode
        with suppress(OSError):
            partial.unlink()
        raise ConfigError(f"out={out} cannot be written: {error}") from error


def load_run(folder: Path) -> dict[str, Any]:
    """What the page knows of a run: `name summary series load config environment`, for JSON.

    Raises:
        ConfigError: no `metrics.jsonl` with a step in it, or a file that cannot be read.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigError(f"{folder}: there is no metrics.jsonl; give the folder of a run")
    if metrics.stat().st_size == 0:
        raise ConfigError(f"{metrics} holds no steps yet")
    config, environment = folder / "config.yaml", folder / "environment.jsonl"
    settings = _read(config, lambda path: read_leaves(path.read_text(encoding="utf-8"))) if config.is_file() else {}
    run = {
        "name": str(settings.get("run_name", folder.resolve().name)),
        "config": settings,
        "environment": _read(environment, _read_lines) if environment.is_file() else [],
        **_read(metrics, lambda path: _curves(read_metrics(path), settings)),
    }
    return _read(folder, lambda _: finite_json(run))  # what is nested too deeply


def thin_out(steps: np.ndarray, values: np.ndarray, max_points: int = MAX_POINTS) -> Series:
    """A curve of at most `max_points` points.

    Args:
        steps: [n], ascending.
        values: [n]; NaN where a step has none, which leaves a gap.

    Returns:
        `x` and `y` as lists, and `low` and `high` where points stand for several steps.
    """
    if len(steps) <= max_points:
        return {"x": steps.tolist(), "y": _short(values)}
    starts = np.linspace(0, len(steps), max_points, endpoint=False).astype(int)
    known = np.isfinite(values)
    counts = np.add.reduceat(known, starts, dtype=float)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    ends = np.append(starts[1:], len(steps)) - 1
    return {
        "x": steps[ends].tolist(),
        "y": _short(np.divide(sums, counts, out=np.full(max_points, np.nan), where=counts > 0)),
        "low": _short(np.fmin.reduceat(values, starts)),
        "high": _short(np.fmax.reduceat(values, starts)),
    }


def _curves(records: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    if not records:
        raise ValueError("no line is complete")
    steps = [record for record in records if "val_loss" not in record]
    evaluations = [record for record in records if "val_loss" in record]
    return {
        "summary": _summary(steps, evaluations),
        "series": _series(steps) | _series(evaluations),
        "load": _load_tables(steps, config),
    }


def _series(records: list[dict[str, Any]]) -> dict[str, Series]:
    """A curve for each name, over the steps that have it."""
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and not isinstance(value, list):
                steps, values = columns.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(math.nan if value is None else value)
    return {name: thin_out(np.array(steps), np.array(values, float)) for name, (steps, values) in columns.items()}


def _load_tables(steps: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any] | None:
    """Tokens of each expert as a percentage of its layer's mean, at up to `MAX_TABLES` steps; zero is none at all."""
    rows = [record for record in steps if record.get("expert_load")]
    if not rows:
        return None
    dense = set(config.get("model.dense_layers") or [])
    shape = np.shape(rows[-1]["expert_load"])  # [sparse layers, num_experts]
    rows = [row for row in rows if np.shape(row["expert_load"]) == shape]
    count = min(len(rows), MAX_TABLES, max(2, MAX_CELLS // (shape[0] * shape[1])))
    chosen = [rows[index] for index in np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int))]
    counts = np.array([row["expert_load"] for row in chosen], float)  # [tables, sparse layers, num_experts]
    percent = 100 * counts / np.maximum(counts.mean(-1, keepdims=True), 1e-9)
    percent = np.where(counts > 0, np.maximum(1, percent.round()), 0).astype(int)
    layers = [layer for layer in range(shape[0] + len(dense)) if layer not in dense]
    return {"steps": [row["step"] for row in chosen], "layers": layers, "tables": percent.tolist()}


def _summary(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> dict[str, float | None]:
    """The figures at the top: at the end of the run, and medians of speeds."""
    last = steps[-1] if steps else {}
    losses = [record["val_loss"] for record in evaluations if record["val_loss"] is not None]
    return {
        "step": (steps or evaluations)[-1]["step"],
        "tokens": last.get("tokens"),
        "loss": last.get("loss"),
        "val_loss": losses[-1] if losses else None,
        "best_val_loss": min(losses) if losses else None,
        "tokens_per_second_per_gpu": _median(steps, "tokens_per_second_per_gpu"),
        "mfu": _median(steps, "mfu"),
        "memory_gib": last.get("memory_gib"),
        "expert_load_max_over_mean": last.get("expert_load_max_over_mean"),
        "dead_experts": last.get("dead_experts"),
        "skipped_steps": last.get("skipped_steps"),
        "seconds": sum(record.get("seconds") or 0.0 for record in steps),
    }


def _median(records: list[dict[str, Any]], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return float(np.median(values)) if values else None


def _short(values: np.ndarray) -> list[float | None]:
    """Five digits are more than a screen shows; JSON has no NaN."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]


def _read(path: Path, reader: Any) -> Any:
    try:
        return reader(path)
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} cannot be read: {first_line}") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    finished = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in finished]


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(512).decode(errors="replace")
