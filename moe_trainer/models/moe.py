"""The sparse feed-forward layer: a router chooses `top_k` of `num_experts` experts for each token."""

import torch
from torch import nn

from moe_trainer.kernels.experts import swiglu_experts
from moe_trainer.kernels.grouped_gemm import grouped_linear
from moe_trainer.kernels.permute import Routes, combine, permute, sort_by_expert
from moe_trainer.models.router import Router, Routing


class Experts(nn.Module):
    """SwiGLU experts (Shazeer, 2020) with fused weights, run as grouped matrix products over sorted rows.

    Weights: `gate_up_proj` [experts, 2, intermediate, hidden] and `down_proj` [experts, hidden, intermediate].
    Gate and up are a dim of their own: a slice of `intermediate` is then a plain shard of both.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return self.compute(x, top_k_index, top_k_weights, dict(self.named_parameters(recurse=False)))

    def compute(
        self,
        x: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        weights: dict[str, torch.Tensor],
        trim: bool = False,
    ) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden], the weighted sum over each token's experts among those given.

        Args:
            x: [tokens, hidden].
            top_k_index: [tokens, top_k] into the given weights; their number stands for an expert that is elsewhere.
            top_k_weights: [tokens, top_k].
            weights: the experts' parameters by name, of all experts or of those of this rank.
            trim: hold no memory for pairs whose expert is elsewhere, for one read on the host.
        """
        routes = sort_by_expert(top_k_index, len(weights["down_proj"]))
        return self.compute_routes(x, routes.trimmed() if trim else routes, top_k_weights, **weights)

    def compute_routes(
        self,
        x: torch.Tensor,
        routes: Routes,
        top_k_weights: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
    ) -> torch.Tensor:
        """As `compute`, with the pairs sorted."""
        return swiglu_experts(x, top_k_weights, routes, gate_up_proj, down_proj, self.product)

    def product(self, rows: torch.Tensor, name: str, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Sorted rows [rows, in] times the weight of this name, gate before up: [rows, out]."""
        return grouped_linear(rows, weight.flatten(1, -2), offsets)


class ClampedExperts(Experts):
    """Experts with biases and `(up + 1) * gate * sigmoid(alpha * gate)`, both sides clamped (gpt-oss)."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, alpha: float, limit: float
    ) -> None:
        super().__init__(hidden_size, intermediate_size, num_experts)
        self.alpha = alpha
        self.limit = limit
        self.gate_up_bias = nn.Parameter(torch.empty(num_experts, 2, intermediate_size))
        self.down_bias = nn.Parameter(torch.empty(num_experts, hidden_size))

    def compute_routes(
        self,
        x: torch.Tensor,
        routes: Routes,
        top_k_weights: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        gate_up_bias: torch.Tensor,
        down_bias: torch.Tensor,
    ) -> torch.Tensor:
        """As `compute`, with the pairs sorted."""
        rows = permute(x, routes)
        experts = torch.bucketize(torch.arange(len(rows), device=rows.device), routes.offsets, right=True)
        gate_up = self.product(rows, "gate_up_proj", gate_up_proj, routes.offsets)
        gate, up = (gate_up + _of_rows(gate_up_bias.flatten(1), experts)).chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        activated = (up + 1) * gate * torch.sigmoid(gate * self.alpha)
        out = self.product(activated, "down_proj", down_proj, routes.offsets) + _of_rows(down_bias, experts)
        weights = permute(top_k_weights.view(-1, 1), routes._replace(top_k=1))  # [rows, 1]
        return combine((out * weights).to(x.dtype), routes)


def _of_rows(bias: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """[num_experts, width] -> [rows, width]; rows of no expert take a zero that passes no gradient on."""
    return torch.cat((bias, bias.new_zeros(1, bias.shape[1])))[experts]


class SparseMoeBlock(nn.Module):
    """Router and experts in place of a dense MLP; a shared expert, if any, sees every token (DeepSeekMoE, 2024)."""

    def __init__(self, gate: Router, experts: Experts, shared_experts: nn.Module | None = None) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.shared_experts = shared_experts

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """[batch, seq, hidden] -> the same, and the routing of its batch * seq tokens."""
        tokens = x.flatten(0, 1)
        routing = self.gate(tokens)
        out = self.experts(tokens, routing.top_k_index, routing.top_k_weights).view_as(x)
        return (out if self.shared_experts is None else out + self.shared_experts(x)), routing
