"""Traces of chosen steps on chosen ranks, for chrome://tracing or Perfetto, and of the GPU's memory."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from moe_trainer.config.schema import ProfileConfig
from moe_trainer.observe.log import get_logger

_logger = get_logger(__name__)
_MAX_MEMORY_EVENTS = 200_000


class StepProfiler:
    """Records each stretch of neighbouring steps; call `before` ahead of each step, within the context.

    Files in `folder`: `rank0-step00000004-00000006.trace.json` and, on a GPU, `.memory.pickle` beside it. Whatever
    fails in it is warned about, and ends the recording, not the run.

    Args:
        cfg: None records nothing.
        start_step: steps taken before this command.
    """

    def __init__(
        self, cfg: ProfileConfig | None, folder: Path, rank: int, device: torch.device, start_step: int
    ) -> None:
        steps = [start_step + n for n in (4, 5, 6)] if cfg is None or cfg.steps is None else cfg.steps
        self._steps = set(steps) if cfg is not None and rank in cfg.ranks else set()
        self._folder, self._rank, self._device = folder, rank, device
        self._with_memory = cfg is not None and cfg.memory and device.type == "cuda"
        self._recording: profile | None = None
        self._first = self._last = 0

    def before(self, step: int) -> None:
        """Start or end a recording ahead of the step of this number."""
        if self._recording is not None and step not in self._steps:
            self._attempt(self._finish)
        if self._recording is None and step in self._steps:
            self._first = step
            self._attempt(self._begin)
        self._last = step

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._recording is not None:
            self._attempt(self._finish)

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        recording = profile(activities=activities, record_shapes=True, profile_memory=True)
        recording.start()
        self._recording = recording
        if self._with_memory:
            torch.cuda.memory._record_memory_history(max_entries=_MAX_MEMORY_EVENTS)

    def _finish(self) -> None:
        recording, self._recording = self._recording, None
        assert recording is not None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the last step's kernels belong to the trace
        recording.stop()
        path = self._folder / f"rank{self._rank}-step{self._first:08}-{self._last:08}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            recording.export_chrome_trace(f"{path}.trace.json")
            if self._with_memory:
                torch.cuda.memory._dump_snapshot(f"{path}.memory.pickle")
        finally:
            if self._with_memory:
                torch.cuda.memory._record_memory_history(enabled=None)
        _logger.info("profile of steps %d to %d: %s.trace.json", self._first, self._last, path)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._steps = set()
            _logger.warning("no more profiles, training goes on: %s", error)
