"""Leaves with a weight: `forward` calls `compute` with the module's own weights.

A parallel style replaces `forward` of one instance by a function that passes the rank's local weights to the same
`compute`, so the mathematics stands once and the leaf does not know that it is sharded.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """`x @ weight.T + bias`; weight [out_features, in_features].

    `heads` says that out_features are so many heads, which must stay whole.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, heads: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None
        self.lora_scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.compute(x, self.weight, self.bias)
        return out if self.lora_a is None else out + self.adapt(x, self.lora_a, self.lora_b)

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return F.linear(x, weight, bias)

    def adapt(self, x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
        """What the adapters add to the output: see `models.lora`."""
        return F.linear(F.linear(x, lora_a), lora_b) * self.lora_scale


class Embedding(nn.Module):
    """A row of weight [vocab, hidden] for each token id."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.compute(input_ids, self.weight)

    def compute(self, input_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[batch, seq] -> [batch, seq, hidden]."""
        return F.embedding(input_ids, weight)
