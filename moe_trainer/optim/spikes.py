"""Steps whose gradients are not finite, or far larger than those before: decided and counted on the device."""

from collections.abc import Callable, Sequence

import torch

from moe_trainer.config.choices import OnSpike
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import OptimConfig

_MEMORY = 0.97
"""Decay of the running mean and variance."""
_WARMUP = 25
"""Steps that only teach what is usual."""


class SpikeGuard:
    """Bounds a step's gradient norm by what norms have been, after ZClip (Kumar et al., 2025).

    A norm more than `optim.max_grad_zscore` standard deviations above the running mean is a spike: it is clipped to
    that bound, or the step skipped. The statistics learn the bound in its place, so a lasting rise becomes usual
    after some steps. All ranks see the same norm, and so decide alike; the host reads nothing.
    """

    def __init__(self, optim: OptimConfig, device: torch.device) -> None:
        self.max_norm = optim.max_grad_norm
        self.zscore = optim.max_grad_zscore
        self.skips = optim.on_spike is OnSpike.skip
        self.mean, self.variance, self.seen, self.spikes, self.skipped_in_a_row = torch.zeros(
            5, dtype=torch.float64, device=device
        ).unbind()

    @torch.no_grad()
    def limit(self, norm: torch.Tensor) -> torch.Tensor:
        """The norm to clip this step's gradients to; not a number where the step is to be skipped. A scalar."""
        limit = torch.full_like(norm, self.max_norm)
        skipped = ~norm.isfinite()
        if self.zscore is not None:
            bound = self.mean + self.zscore * self.variance.sqrt()
            is_spike = ~skipped & (self.seen >= _WARMUP) & (norm > bound)
            self._learn(torch.where(is_spike, bound, norm.double()), ~skipped)
            self.spikes += is_spike
            limit = torch.where(is_spike, bound.to(limit).clamp(max=self.max_norm), limit)
            skipped = skipped | is_spike if self.skips else skipped
        self.skipped_in_a_row.add_(1).mul_(skipped)
        return limit.masked_fill(skipped, torch.nan)

    def _learn(self, norm: torch.Tensor, counts: torch.Tensor) -> None:
        """Exponentially weighted mean and variance (Finch, 2009), plain ones until `_MEMORY` remembers less."""
        weight = torch.clamp(1 / (self.seen + 1), min=1 - _MEMORY)
        difference = torch.where(counts, norm - self.mean, 0.0)
        variance = (1 - weight) * (self.variance + weight * difference.square())
        self.variance.copy_(torch.where(counts, variance, self.variance))
        self.mean.add_(weight * difference)
        self.seen.add_(counts)

    def to_list(self) -> list[float]:
        """What a checkpoint keeps; read from the device."""
        return torch.stack(self._state()).tolist()

    def load(self, values: Sequence[float]) -> None:
        """The inverse of `to_list`; an empty list starts anew."""
        for tensor, value in zip(self._state(), values or [0.0] * 5, strict=True):
            tensor.fill_(value)

    def _state(self) -> tuple[torch.Tensor, ...]:
        return self.mean, self.variance, self.seen, self.spikes, self.skipped_in_a_row


class SkipLimit:
    """Ends a run that no longer learns. On a GPU it reads a copy that was begun a log line earlier."""

    def __init__(self, most: int | None, every: int) -> None:
        """`most`: steps in a row that may be skipped, None for any number; `every`: steps between two readings."""
        self._most, self._every = most, every
        self._copy: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    def check(self, step: int, skipped_in_a_row: torch.Tensor, dump: Callable[[], str]) -> None:
        """After each step, on every rank alike.

        Args:
            dump: called once the run is to end, after a step that was skipped; its result ends the message.

        Raises:
            ConfigError: more steps in a row were skipped than may be.
        """
        if self._most is None or step % self._every:
            return
        before, self._copy = self._copy, _begin_copy(skipped_in_a_row)
        values, passed = self._copy if self._copy[1] is None else before or (None, None)
        if passed is not None:
            passed.synchronize()
        if values is None or values.item() < self._most:
            return
        now = skipped_in_a_row.item()  # since the copy began steps were taken, and may have moved something
        if now < self._most:
            return
        raise ConfigError(
            f"optim.max_skipped_steps={self._most}: by step {step}, {now:.0f} steps in a row had gradients that are "
            "not finite or spike, and moved nothing; go on from an earlier checkpoint with a lower optim.lr, and "
            f"look at the data of these steps; {dump()}"
        )


def _begin_copy(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    if not tensor.is_cuda:
        return tensor, None
    copy, passed = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    passed.record()
    return copy, passed
