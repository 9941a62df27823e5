"""Routers: which experts each token goes to, and with which weights.

All compute in float32 at least: in bfloat16 near ties are decided by rounding, and the weights of the combination
lose bits.
"""

from typing import NamedTuple

import torch
from torch import nn

from moe_trainer.kernels.keepable import keepable
from moe_trainer.kernels.router_gemm import router_logits


class Routing(NamedTuple):
    """What the router decided for the tokens it saw; types are float32 at least."""

    logits: torch.Tensor
    """[tokens, num_experts]."""
    probabilities: torch.Tensor
    """[tokens, num_experts], each row's sum is one; what balancing losses average."""
    top_k_weights: torch.Tensor
    """[tokens, top_k]."""
    top_k_index: torch.Tensor
    """[tokens, top_k] experts, by their global number."""


class Router(nn.Module):
    """Softmax over all experts, then the `top_k` likeliest, their weights rescaled to sum to one if asked.

    Rescaled (Mixtral) they equal a softmax over the chosen logits alone; not rescaled (OLMoE) they sum to less.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, norm_topk_prob: bool = True) -> None:
        super().__init__()
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias: nn.Parameter | None = None

    def forward(self, x: torch.Tensor) -> Routing:
        return self.compute(x, self.weight, self.bias)

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Routing:
        """x: [tokens, hidden]."""
        logits = router_logits(x, weight)
        return self.choose(logits if bias is None else logits + bias.to(logits.dtype))

    def choose(self, logits: torch.Tensor) -> Routing:
        """Logits [tokens, num_experts] -> the routing."""
        probabilities = logits.softmax(dim=-1)
        with keepable():
            weights, index = probabilities.topk(self.top_k)  # [tokens, top_k]
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(logits, probabilities, weights, index)


class BiasedRouter(Router):
    """A linear router with a bias; softmax over the chosen logits alone (gpt-oss)."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.bias = nn.Parameter(torch.empty(num_experts))

    def choose(self, logits: torch.Tensor) -> Routing:
        with keepable():
            chosen, index = logits.topk(self.top_k)
        return Routing(logits, logits.softmax(dim=-1), chosen.softmax(dim=-1), index)


class GroupedSigmoidRouter(Router):
    """Sigmoid scores; the best groups, by their two best experts, then the best experts in them (DeepSeek-V3, 2024).

    The expert bias counts for the choice alone, never in the weights: raised for experts with little load and lowered
    for those with much, it balances without a loss (Wang et al., 2024). The trainer moves it after each step.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        norm_topk_prob: bool,
        num_groups: int,
        top_k_groups: int,
        scaling_factor: float,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, norm_topk_prob)
        self.num_groups = num_groups
        self.top_k_groups = top_k_groups
        self.scaling_factor = scaling_factor
        self.register_buffer("expert_bias", torch.zeros(num_experts))

    def choose(self, logits: torch.Tensor) -> Routing:
        scores = logits.sigmoid()
        with keepable():
            index = self._choose_index(scores.detach() + self.expert_bias)
        weights = scores.gather(1, index)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        probabilities = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        return Routing(logits, probabilities, weights * self.scaling_factor, index)

    def _choose_index(self, scores: torch.Tensor) -> torch.Tensor:
        """[tokens, num_experts] -> [tokens, top_k]."""
        grouped = scores.unflatten(1, (self.num_groups, -1))  # [tokens, groups, experts of a group]
        best_two = grouped.topk(min(2, grouped.shape[2])).values.sum(-1)
        groups = best_two.topk(self.top_k_groups).indices
        closed = torch.ones_like(best_two, dtype=torch.bool).scatter_(1, groups, False)
        return grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(1).topk(self.top_k).indices
