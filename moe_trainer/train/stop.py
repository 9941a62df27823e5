"""A request to stop after the step at hand: a signal, the launcher's word, or the clock."""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from moe_trainer.observe.log import get_logger
from moe_trainer.train.signals import end_signals

_logger = get_logger(__name__)


class StopRequest:
    """Listens while the context is open; `agreed` says when all ranks stop, at the same step.

    Under a launcher that tells by a file, signals keep their usual effect, so that a rank that hangs in a collective
    can be ended. Elsewhere the first SIGINT, SIGTERM or SIGHUP is a request, and a second one ends the process.
    torchrun kills its ranks 30 s after a signal: where a step and a save take longer, `max_minutes` is the way.
    """

    def __init__(self, file: Path | None = None, max_minutes: float | None = None) -> None:
        """`file`: exists once the launcher wants an end; `max_minutes`: from now."""
        self.reason: str | None = None
        """Why this rank wants to stop."""
        self._file = file
        self._max_minutes = max_minutes
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._votes: torch.Tensor | None = None
        self._work: dist.Work | None = None
        self._before: dict[int, signal.Handlers] = {}

    def __enter__(self) -> "StopRequest":
        if self._file is None and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in end_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._work is not None and kind is None:
            self._work.wait()

    def agreed(self) -> bool:
        """Whether some rank wanted to stop at its last call. Collective, over gloo.

        The votes of one call are counted at the next, so the host does not wait for the other ranks' step.
        """
        self._look()
        is_agreed = False
        if self._work is not None:
            self._work.wait()
            is_agreed = bool(self._votes.item())
        self._votes = torch.tensor(0.0 if self.reason is None else 1.0)
        self._work = dist.all_reduce(self._votes, dist.ReduceOp.MAX, async_op=True)
        return is_agreed

    def _look(self) -> None:
        if self.reason is not None:
            return
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = f"max_minutes={self._max_minutes:g} are over"
        elif self._file is not None and self._file.exists():
            self.reason = "asked to stop"
        if self.reason is not None:
            _logger.info("%s: one more step, then saving", self.reason)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.reason = signal.Signals(number).name
        _logger.info("%s: one more step, then saving; a second signal ends at once", self.reason)
