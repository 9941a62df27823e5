"""One piece of work at a time on a thread of its own, and the host memory that it works from."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from moe_trainer.checkpoint.sharded import Block


class Background:
    """Runs one piece of work while training goes on; the next one waits for it.

    A thread, not a process: it shares the host copy without passing it on, needs no second import of torch, and
    Python gives its lock away while bytes are copied, hashed, written and waited for. It is a daemon, so a rank that
    ends by an error does not wait in it for ranks that are gone.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.failure: Exception | None = None
        """What the work before raised, once it has ended."""

    def start(self, work: Callable[[], object], device: torch.device) -> None:
        """Wait for the work before, then begin this. `device`: whose memory it may ask for."""
        self.wait()
        self.failure = None

        def run() -> None:
            try:
                if device.type == "cuda":  # each thread has a current device of its own, the first unless it is set
                    torch.cuda.set_device(device)
                work()
            except Exception as error:
                self.failure = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> float:
        """Return when no work is under way; the seconds that took."""
        began = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return time.perf_counter() - began


class HostCopy:
    """Copies of blocks in host memory, page-locked where they come from a GPU; kept and filled again."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def fits(self, blocks: Mapping[str, Block], processes: int) -> bool:
        """Whether this machine has the memory for `processes` such copies; True where it does not tell."""
        if self._buffers:
            return True
        need = processes * sum(block.values.numel() * block.values.element_size() for block in blocks.values())
        return need <= _available_bytes()

    def take(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """The same blocks as they are now, in memory that stays so until the next call."""
        copies = {name: block._replace(values=self._copy(name, block.values)) for name, block in blocks.items()}
        if any(block.values.is_cuda for block in blocks.values()):
            torch.cuda.current_stream().synchronize()
        return copies

    def drop(self) -> None:
        """Give the memory back."""
        self._buffers.clear()

    def _copy(self, name: str, values: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
            buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(values, non_blocking=True)


def _available_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Of the machine, or of the container where that has a lower limit."""
    return min(_available_on_machine(), _available_in(cgroup))


def _available_in(cgroup: Path) -> float:
    """What its limit leaves; file pages that nothing has touched lately are given up when memory is asked for."""
    try:
        limit = int((cgroup / "memory.max").read_text())  # `max` where there is none
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return limit - used + int(stat["inactive_file"])
    except (OSError, KeyError, ValueError):
        return float("inf")


def _available_on_machine() -> float:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return float("inf")
