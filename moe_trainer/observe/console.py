"""The run on the console: a live block on a terminal, plain lines in a file or a pipe."""

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from moe_trainer.observe.sinks import Metrics

_COLUMNS = (
    ("loss", "loss {:8.4f}"),
    ("val_loss", "val_loss {:8.4f}"),
    ("val_perplexity", "perplexity {:9.2f}"),
    ("aux_loss", "aux {:7.4f}"),
    ("z_loss", "z {:7.4f}"),
    ("grad_norm", "grad_norm {:8.3f}"),
    ("lr", "lr {:.2e}"),
    ("tokens_per_second_per_gpu", "tok/s/GPU {:9,.0f}"),
    ("tflops_per_gpu", "TFLOP/s {:8.3g}"),
    ("mfu", "MFU {:6.1%}"),
    ("memory_gib", "mem {:6.2f} GiB"),
    ("expert_load_max_over_mean", "load {:5.2f}"),
    ("dead_experts", "dead {:3.0f}"),
)
_VISIBLE_WAIT = 0.02
"""Share of a step from which the wait for data is shown."""
_VISIBLE_LATENESS = 1.2
"""How much longer than the rank in the middle the slowest is busy, from which it is shown."""


class ConsoleSink:
    """What a person watches, on stdout.

    On a terminal, a progress bar with the time left above the last step's metrics; validation lines stay above it.
    Elsewhere one aligned line a step: of the training steps the first, each `every`-th and the last; a validation
    line always. The wait for data and the counts of skipped steps and of spikes show where there are any,
    and so does a rank that the others wait for.
    """

    def __init__(self, total_steps: int, start_step: int, every: int, console: Console | None = None) -> None:
        self._console = console or Console()
        self._total, self._start, self._every = total_steps, start_step, max(1, every)
        self._screen = _Screen(self._console, total_steps, start_step) if self._console.is_terminal else None

    def log(self, step: int, metrics: Metrics) -> None:
        parts = _parts(metrics)
        line = "  ".join([f"step {step:{len(str(self._total))}}/{self._total}", *parts])
        is_validation = "val_loss" in metrics
        if self._screen is not None:
            if is_validation:
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                self._screen.show(step, parts)
        elif is_validation or step % self._every == 0 or step in (self._start + 1, self._total):
            print(line, file=self._console.file, flush=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._screen is not None:
            self._screen.close()


class _Screen:
    """A bar and, below, metrics that wrap between one and the next on a narrow terminal."""

    def __init__(self, console: Console, total_steps: int, start_step: int) -> None:
        columns = (
            MofNCompleteColumn(),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        # A step may take minutes; the estimate of the time left looks back far enough to see a few.
        self._bar = Progress(*columns, console=console, expand=True, speed_estimate_period=600)
        self._task = self._bar.add_task("", total=total_steps, completed=start_step)
        self._live = Live(self._bar, console=console, refresh_per_second=4)
        self._live.start()

    def show(self, step: int, parts: list[str]) -> None:
        self._bar.update(self._task, completed=step)
        cells = [Text(" ".join(part.split())) for part in parts]
        self._live.update(Group(self._bar, Columns(cells, padding=(0, 2))))

    def close(self) -> None:
        self._live.stop()


def _parts(metrics: Metrics) -> list[str]:
    parts = [layout.format(metrics[key]) for key, layout in _COLUMNS if key in metrics]
    if metrics.get("data_seconds", 0) > _VISIBLE_WAIT * metrics.get("seconds", 0):
        parts.append(f"data {metrics['data_seconds'] / metrics['seconds']:4.0%}")
    for name, label in (("skipped_steps", "skipped"), ("grad_spikes", "spikes")):
        if metrics.get(name, 0) > 0:
            parts.append(f"{label} {metrics[name]:.0f}")
    if metrics.get("slowest_over_median", 0) > _VISIBLE_LATENESS:
        for_data = f", {metrics['slowest_data_share']:.0%} of it for data" * (metrics["slowest_data_share"] > 0.5)
        parts.append(f"rank {metrics['slowest_rank']:.0f} takes {metrics['slowest_over_median']:.1f} x{for_data}")
    return parts
