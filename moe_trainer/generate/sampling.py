"""Which token comes next."""

import torch


class Sampler:
    """Greedy for temperature 0; otherwise draws after `temperature`, `top_k` and `top_p`, in this order.

    top_p is nucleus sampling (Holtzman et al., 2020): among the fewest likeliest tokens that together have at least
    this probability. Random numbers come from a generator on the CPU, the same for every device.
    """

    def __init__(self, temperature: float = 0.0, top_k: int | None = None, top_p: float = 1.0, seed: int = 0) -> None:
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """[batch, vocab] -> token ids [batch], on the CPU."""
        if self.temperature == 0:
            return logits.argmax(-1).cpu()
        probabilities = self.probabilities(logits.cpu())
        return torch.multinomial(probabilities, 1, generator=self._generator).squeeze(-1)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What a token is drawn from: [batch, vocab], rows summing to one; for a temperature above 0."""
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
