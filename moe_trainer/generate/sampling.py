"""Which token comes next, where it is drawn."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Sampling(NamedTuple):
    """How tokens are chosen."""

    temperature: float
    """0 is greedy, and the rest then means nothing."""
    top_k: int | None = None
    """None: among all."""
    top_p: float = 1.0

    def __str__(self) -> str:
        if self.temperature == 0:
            return "greedy"
        top_k = "all" if self.top_k is None else self.top_k
        return f"temperature={self.temperature:g} top_k={top_k} top_p={self.top_p:g}"


GREEDY = Sampling(0.0)


class Sampler:
    """Draws after `temperature` (above 0), `top_k` and `top_p`, in this order, on the logits' device.

    top_p is nucleus sampling (Holtzman et al., 2020): among the fewest likeliest tokens that together have at least
    this probability. Each sequence has random numbers of its own, drawn beforehand from a generator on the CPU: they
    are the same on every device and in every batch, and a draw needs nothing from the host.
    """

    def __init__(
        self, sampling: Sampling, seeds: Sequence[int], draws: int, device: torch.device | str = "cpu"
    ) -> None:
        """`seeds`: of each sequence; `draws`: tokens to be drawn at most for each."""
        self.temperature, self.top_k, self.top_p = sampling
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        columns = [torch.rand(draws, generator=generator, dtype=torch.float64) for generator in generators]
        # A little below one, so that no rounding takes a product with a total up to the total.
        self._uniform = torch.stack(columns, dim=1).mul(1 - 1e-12).to(device)  # [draws, batch]
        self._draw = torch.zeros(1, dtype=torch.int64, device=device)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """[batch, vocab] -> token ids [batch]: where the sum of probabilities passes the sequence's next number."""
        sums = self.probabilities(logits).cumsum(-1)
        number = self._uniform.index_select(0, self._draw).squeeze(0).unsqueeze(1)  # [batch, 1]
        self._draw += 1
        return torch.searchsorted(sums, number * sums[:, -1:], right=True).squeeze(1)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What a token is drawn from: [batch, vocab], rows summing to one."""
        wide = logits.to(torch.float64)
        # The largest is subtracted first: a tiny temperature would overflow.
        scaled = (wide - wide.amax(-1, keepdim=True)) / self.temperature
        ordered, index = scaled.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ordered[:, self.top_k :] = -torch.inf
        kept = ordered.softmax(-1)
        before = kept.cumsum(-1) - kept  # the probability of all likelier tokens
        too_late = before >= self.top_p
        too_late[:, 0] = False
        kept = kept.masked_fill(too_late, 0.0)
        return torch.zeros_like(kept).scatter(-1, index, kept / kept.sum(-1, keepdim=True))
