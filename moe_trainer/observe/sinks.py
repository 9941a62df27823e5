"""Where metrics go: the console, `metrics.jsonl` and wandb."""

import dataclasses
import json
import math
import secrets
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_trainer.config.schema import Config
from moe_trainer.observe.log import get_logger

_logger = get_logger(__name__)

_COLUMNS = (
    ("loss", "loss {:8.4f}"),
    ("val_loss", "val_loss {:8.4f}"),
    ("aux_loss", "aux {:7.4f}"),
    ("z_loss", "z {:7.4f}"),
    ("grad_norm", "grad_norm {:8.3f}"),
    ("lr", "lr {:.2e}"),
    ("tokens_per_second", "tok/s {:9,.0f}"),
    ("mfu", "mfu {:6.1%}"),
    ("memory_gib", "mem {:6.2f} GiB"),
    ("expert_load_max_over_mean", "load {:5.2f}"),
)


class Sink(Protocol):
    """Takes the metrics of each step; `step` is the number of steps taken."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class ConsoleSink:
    """One aligned line a step on stdout and, on a terminal only, a progress bar below.

    Of the training steps it prints the first, each `every`-th and the last; a validation line is always printed.
    """

    def __init__(self, total_steps: int, start_step: int, every: int, console: Console | None = None) -> None:
        self._console = console or Console()
        self._total, self._start, self._every = total_steps, start_step, max(1, every)
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("training", total=total_steps, completed=start_step)
            self._progress.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        due = step % self._every == 0 or step in (self._start + 1, self._total)
        if due or "val_loss" in metrics:
            width = len(str(self._total))
            parts = [layout.format(metrics[key]) for key, layout in _COLUMNS if key in metrics]
            line = "  ".join([f"step {step:{width}}/{self._total}", *parts])
            if self._progress is None:
                print(line, file=self._console.file, flush=True)
            else:
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class JsonlSink:
    """Appends one JSON object a line, flushed. JSON has no NaN or infinity: they are written as null."""

    def __init__(self, path: Path) -> None:
        _drop_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class WandbSink:
    """Sends metrics to wandb, imported only here. Whatever it raises is warned about once and ends only wandb.

    The run's id is kept in `wandb_id.txt`, so a resumed run goes on in the same wandb run. `step` is an ordinary
    metric there, the x axis of the others: wandb's own counter would refuse the repeated steps of a resume.
    """

    def __init__(self, run_folder: Path, cfg: Config) -> None:
        self._run: Any = None
        try:
            import wandb

            self._run = wandb.init(
                project=cfg.logging.wandb_project,
                name=cfg.run_name,
                id=_wandb_id(run_folder / "wandb_id.txt"),
                resume="allow",
                dir=str(run_folder),
                mode=cfg.logging.wandb.value,
                config=_plain(dataclasses.asdict(cfg)),
                # Without a login it must give up, not wait at a prompt for ever.
                settings=wandb.Settings(silent=True, console="off", login_timeout=30),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except ImportError:
            self._give_up("it is not installed (pip install wandb)")
        except Exception as error:
            self._give_up(str(error))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._run is None:
            return
        try:
            self._run.log({"step": step, **metrics})
        except Exception as error:
            self._give_up(str(error))

    def close(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(str(error))

    def _give_up(self, reason: str) -> None:
        self._run = None
        first_line = (reason.strip() or "no reason given").splitlines()[0]
        _logger.warning("wandb is off for the rest of this run, training goes on: %s", first_line[:200])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, ordered by step, a validation line after the training line of its step.

    Of a repeated step (a run that was resumed) the later line of either kind counts. An unfinished last line is left
    out. Values that were not finite are None.

    Raises:
        ValueError: a line other than the last is not JSON.
    """
    latest: dict[tuple[int, bool], dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end is empty or unfinished
    for line in lines:
        record = json.loads(line)
        latest[record["step"], "val_loss" in record] = record
    return [latest[key] for key in sorted(latest)]


def _drop_torn_line(path: Path) -> None:
    # A line cut short by a crash would swallow the first line of the resumed run.
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _wandb_id(path: Path) -> str:
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def _plain(value: Any) -> Any:
    """Enums by value, at any depth."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.value if isinstance(value, Enum) else value
