"""The sparse feed-forward layer: a router chooses `top_k` of `num_experts` experts for each token."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from moe_trainer.kernels.grouped_gemm import grouped_linear
from moe_trainer.kernels.permute import permute, sort_by_expert, unpermute


class Routing(NamedTuple):
    """What the router decided for the tokens it saw."""

    logits: torch.Tensor
    """[tokens, num_experts], float32 at least."""
    top_k_weights: torch.Tensor
    """[tokens, top_k], in the logits' type."""
    top_k_index: torch.Tensor
    """[tokens, top_k] experts, by their global number."""


class Router(nn.Module):
    """Softmax over all experts, then the `top_k` likeliest, their weights rescaled to sum to one (Mixtral).

    Rescaling makes it equal to a softmax over the chosen logits alone. Computed in float32 at least: in bfloat16 near
    ties are decided by rounding, and the weights of the combination lose bits.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x: torch.Tensor) -> Routing:
        return self.compute(x, self.weight)

    def compute(self, x: torch.Tensor, weight: torch.Tensor) -> Routing:
        """x: [tokens, hidden]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), weight.to(wide))  # [tokens, num_experts]
        weights, index = logits.softmax(dim=-1).topk(self.top_k)  # [tokens, top_k]
        return Routing(logits, weights / weights.sum(-1, keepdim=True), index)


class Experts(nn.Module):
    """SwiGLU experts (Shazeer, 2020) with fused weights, run as grouped matrix products over sorted rows."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        # Gate and up are a dim of their own: a slice of `intermediate` is then a plain shard of both.
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return self.compute(x, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)

    def compute(
        self,
        x: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
    ) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden], the weighted sum over each token's experts among those given.

        Args:
            x: [tokens, hidden].
            top_k_index: [tokens, top_k] into the given weights; their number stands for an expert that is elsewhere.
            top_k_weights: [tokens, top_k].
            gate_up_proj: [num_local_experts, 2, intermediate, hidden].
            down_proj: [num_local_experts, hidden, intermediate].
        """
        routes = sort_by_expert(top_k_index, len(gate_up_proj))
        rows = self.compute_rows(permute(x, routes), routes.offsets, gate_up_proj, down_proj)
        return unpermute(rows, top_k_weights, routes)

    def compute_rows(
        self, rows: torch.Tensor, offsets: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor
    ) -> torch.Tensor:
        """[rows, hidden] sorted by expert, ends at `offsets` [num_local_experts] -> [rows, hidden]."""
        gate, up = grouped_linear(rows, gate_up_proj.flatten(1, 2), offsets).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, down_proj, offsets)


class SparseMoeBlock(nn.Module):
    """Router and experts in place of a dense MLP."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.gate = Router(hidden_size, num_experts, top_k)
        self.experts = Experts(hidden_size, intermediate_size, num_experts)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """[batch, seq, hidden] -> the same, and the routing of its batch * seq tokens."""
        tokens = x.flatten(0, 1)
        routing = self.gate(tokens)
        out = self.experts(tokens, routing.top_k_index, routing.top_k_weights)
        return out.view_as(x), routing
