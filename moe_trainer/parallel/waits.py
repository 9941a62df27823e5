"""How long a rank waits for the others.

Collectives make every rank's step take equally long; what tells ranks apart is how much of it they wait. The one that
the others wait for comes last to the collectives, and waits least.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from moe_trainer.parallel import collectives
from moe_trainer.parallel.clock import Mark

_FUNCTIONS = (
    (dist, "all_reduce"),
    (dist, "all_to_all_single"),
    (dist, "all_gather_into_tensor"),
    (dist, "reduce_scatter_tensor"),
    (dist, "all_gather_single"),  # this and the next: of torch 2.13
    (dist, "reduce_scatter_single"),
    (collectives, "_all_gather_single"),
    (collectives, "_reduce_scatter_single"),
)
"""What FSDP calls, and what our own collectives do."""


class CollectiveWaits:
    """The time that passes in a `with` block, and the part of it in collectives.

    PyTorch has no hook around collectives that both NCCL and gloo call, so the functions are replaced while the block
    is open: it is for a step now and then. On a GPU events mark when the stream of a collective reaches it and passes
    it; nothing waits for them. Collectives beside other work (`async_op`) are not counted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread = threading.get_ident()  # others, which save a checkpoint, may be in collectives too
        self._spans: list[tuple[Mark, Mark]] = []
        self._replaced = ExitStack()

    def __enter__(self) -> "CollectiveWaits":
        for module, name in _FUNCTIONS:
            real = getattr(module, name, None)
            if real is not None:
                setattr(module, name, self._timed(real))
                self._replaced.callback(setattr, module, name, real)
        self._begin = Mark(self._device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._replaced.close()
        self._end = Mark(self._device)

    def seconds(self) -> tuple[float, float]:
        """Of the block, and of its collectives; those on streams of their own may pass beside computation. On a GPU
        the host waits until the block's end has passed."""
        return self._end.seconds_since(self._begin), sum(end.seconds_since(begin) for begin, end in self._spans)

    def _timed(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._counts((*args, *kwargs.values())):
                return real(*args, **kwargs)
            begin = Mark(self._device)
            work = real(*args, **kwargs)
            if work is None:
                self._spans.append((begin, Mark(self._device)))
            return work

        return call

    def _counts(self, values: tuple[Any, ...]) -> bool:
        kind = next((value.device.type for value in values if isinstance(value, torch.Tensor)), None)
        return kind == self._device.type and (kind == "cuda" or threading.get_ident() == self._thread)
