"""Which rank the others wait for, and by how much."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from moe_trainer.config.schema import Config
from moe_trainer.data.loader import Loader
from moe_trainer.observe.metrics import is_load_due
from moe_trainer.parallel.waits import CollectiveWaits

_STEPS_TO_PASS = 2
"""After so many more the GPU has surely passed what was measured: nothing waits."""


class _Measured(NamedTuple):
    step: int
    waits: CollectiveWaits
    data_seconds: float


class Stragglers:
    """Measures how long each rank is busy, which is when it does not wait in collectives, in the steps whose expert
    load is recorded, and tells in a later one of them: the host waits for nothing."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self._cfg, self._device = cfg, device
        self._measured: list[_Measured] = []
        self._is_first = True

    @contextmanager
    def measuring(self, step: int, loader: Loader) -> Iterator[None]:
        """Around the taking of a step, its wait for data included."""
        is_first, self._is_first = self._is_first, False  # which warms up
        if is_first or dist.get_world_size() == 1 or not is_load_due(step, self._cfg):
            yield
            return
        with CollectiveWaits(self._device) as waits:
            yield
        self._measured.append(_Measured(step, waits, loader.data_seconds))

    def metrics(self, step: int) -> dict[str, torch.Tensor]:
        """Of an earlier step, if one was measured: `slowest_rank`; `slowest_over_median`, how long it is busy for
        each second that the rank in the middle is; `slowest_data_share`, the part of it that it waits for data.

        Scalars on the device. Collective, over all ranks, where there is something to tell.
        """
        passed = [measured for measured in self._measured if measured.step <= step - _STEPS_TO_PASS]
        if not passed or not is_load_due(step, self._cfg):
            return {}
        self._measured = self._measured[len(passed) :]
        times = torch.zeros(dist.get_world_size(), 2, dtype=torch.float64, device=self._device)
        total, waited = passed[-1].waits.seconds()
        times[dist.get_rank(), 0] = max(0.0, total - waited)
        times[dist.get_rank(), 1] = passed[-1].data_seconds
        dist.all_reduce(times)  # a gather, whatever the device
        busy, data = times.unbind(1)
        most, rank = busy.max(0)
        return {
            "slowest_rank": rank,
            "slowest_over_median": most / busy.median().clamp(min=1e-9),
            "slowest_data_share": data.gather(0, rank.view(1)).view(()) / most.clamp(min=1e-9),
        }
