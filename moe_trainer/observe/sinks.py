"""Where metrics go besides the console: `metrics.jsonl`, wandb and TensorBoard, under the same names."""

import dataclasses
import json
import math
import secrets
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from moe_trainer.config.schema import Config
from moe_trainer.observe.log import get_logger

_logger = get_logger(__name__)

_WANDB_SECONDS = 60
"""For a login, for a run to begin; twice as long for the last upload."""
Metrics = Mapping[str, Any]
"""Numbers by name; `expert_load` alone is a table of counts, [sparse layers][experts]."""


class Sink(Protocol):
    """Takes the metrics of each step; `step` is the number of steps taken. What it raises ends it, not the run."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """Appends one JSON object a line, at once. JSON has no NaN or infinity: they are written as null.

    Where the disk is full the lines wait in memory, the newest `max_waiting` bytes, and are written as soon as there
    is room: the record of a run has no hole because somebody else filled the disk for an hour.
    """

    def __init__(self, path: Path, max_waiting: int = 2**26) -> None:
        drop_torn_line(path)
        # Unbuffered: `write` says how much of a line reached the file, so the rest can follow later.
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._max_waiting = max_waiting
        self._is_failing = False

    def log(self, step: int, metrics: Metrics) -> None:
        finite = {key: _finite(value) for key, value in metrics.items()}
        self._waiting += (json.dumps({"step": step, **finite}, allow_nan=False) + "\n").encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                _logger.warning("%s: %s; training goes on, the lines wait in memory", self._file.name, error)
            self._is_failing = True
            self._forget_oldest()

    def close(self) -> None:
        self._file.close()
        if self._waiting:
            _logger.warning("%s lacks its last %d line(s)", self._file.name, self._waiting.count(b"\n"))

    def _forget_oldest(self) -> None:
        """Keep the first line, which may be half written, and of the others the newest."""
        if len(self._waiting) > self._max_waiting:
            first = self._waiting.index(b"\n") + 1
            newest = self._waiting.index(b"\n", max(first, len(self._waiting) - self._max_waiting // 2)) + 1
            self._waiting = self._waiting[:first] + self._waiting[newest:]


class WandbSink:
    """Sends metrics to wandb, imported only here.

    The run's id is kept in `wandb_id.txt`, so a resumed run goes on in the same wandb run. `step` is an ordinary
    metric there, the x axis of the others: wandb's own counter would refuse the repeated steps of a resume.
    """

    def __init__(self, run_folder: Path, cfg: Config) -> None:
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError("it is not installed (pip install wandb)") from error
        # Without a login or a network it must give up, not wait at a prompt or for a server for ever.
        waits = {"login_timeout": _WANDB_SECONDS, "init_timeout": _WANDB_SECONDS}
        settings = wandb.Settings(silent=True, console="off", **waits)
        if hasattr(settings, "finish_timeout"):  # of recent versions
            settings.finish_timeout = 2 * _WANDB_SECONDS
        self._run: Any = wandb.init(
            project=cfg.logging.wandb_project,
            name=cfg.run_name,
            id=_wandb_id(run_folder / "wandb_id.txt"),
            resume="allow",
            dir=str(run_folder),
            mode=cfg.logging.wandb.value,
            config=_plain(dataclasses.asdict(cfg)),
            settings=settings,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log({"step": step, **_numbers(metrics)})

    def close(self) -> None:
        self._run.finish()


class TensorBoardSink:
    """Writes TensorBoard's event files, with the library imported only here.

    On resume, what an earlier command wrote of later steps is purged.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


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


def drop_torn_line(path: Path) -> None:
    """Cut off what follows the last line end: a line that a crash cut short would swallow a resumed run's first."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def finite_json(value: Any) -> Any:
    """The value as JSON can say it, which has neither infinity nor NaN: those become words, at any depth."""
    if isinstance(value, Mapping):
        return {key: finite_json(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite_json(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(metrics: Metrics) -> dict[str, float]:
    """Without tables, which only the file holds."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float))}


def _wandb_id(path: Path) -> str:
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def _plain(value: Any) -> Any:
    """Enums by value, at any depth."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value
