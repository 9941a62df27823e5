"""Time as the device passes it."""

import time

import torch


class Mark:
    """A moment in the device's work."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()
        self._at = time.perf_counter()

    def seconds_since(self, earlier: "Mark") -> float:
        """Seconds between two marks; on CUDA it waits for this one to pass."""
        if self._event is None:
            return self._at - earlier._at
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000
