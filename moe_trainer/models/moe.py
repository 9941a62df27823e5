"""The sparse feed-forward layer: a router chooses `top_k` of `num_experts` experts for each token."""

import torch
from torch import nn

from moe_trainer.kernels.experts import Clamp, Exchange, Product, activate, combine_bias, exchanged, swiglu_experts
from moe_trainer.kernels.grouped_gemm import Multiply, grouped_linear, multiply
from moe_trainer.kernels.keepable import keepable
from moe_trainer.kernels.permute import Routes, combine, permute, sort_by_expert
from moe_trainer.models.capacity import within_capacity
from moe_trainer.models.router import Router, Routing


class Experts(nn.Module):
    """SwiGLU experts (Shazeer, 2020) with fused weights, run as grouped matrix products over sorted rows.

    Weights: `gate_up_proj` [experts, 2, intermediate, hidden] and `down_proj` [experts, hidden, intermediate].
    Gate and up are a dim of their own: a slice of `intermediate` is then a plain shard of both.
    """

    clamp: Clamp | None = None

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.lora_scale = 1.0
        self.multiply: Multiply = multiply
        self.product: Product | None = None
        """In place of `multiply` where the weights are not what it takes."""
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return self.compute(x, top_k_index, top_k_weights, self.weights())

    def weights(self) -> dict[str, torch.Tensor]:
        """The parameters by name, as `compute` wants them."""
        return dict(self.named_parameters(recurse=False))

    def compute(
        self,
        x: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        weights: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden], the weighted sum over each token's experts among those given.

        Args:
            x: [tokens, hidden].
            top_k_index: [tokens, top_k] into the given weights; numbers past them are experts elsewhere.
            top_k_weights: [tokens, top_k].
            weights: the experts' parameters by name, of all experts or of those of this rank.
        """
        return self.compute_routes(x, sort_by_expert(top_k_index, len(weights["down_proj"])), top_k_weights, weights)

    def compute_routes(
        self,
        x: torch.Tensor,
        routes: Routes,
        top_k_weights: torch.Tensor,
        weights: dict[str, torch.Tensor],
        exchange: Exchange | None = None,
    ) -> torch.Tensor:
        """As `compute`, with the pairs sorted. With an exchange, which has begun with `x`, routes and result are
        about the tokens of all ranks."""
        if any("_lora_" in name for name in weights):
            x = x if exchange is None else exchanged(x, exchange)
            out = self.compute_by_products(x, routes, top_k_weights, weights)
        else:
            factors = weights["gate_up_proj"], weights["down_proj"], self.multiply, self.product
            gate_up_bias = weights.get("gate_up_bias")
            out = swiglu_experts(x, top_k_weights, routes, *factors, exchange, gate_up_bias, self.clamp)
        if "down_bias" not in weights:
            return out
        return (out + combine_bias(weights["down_bias"], top_k_weights, routes)).to(out.dtype)

    def compute_by_products(
        self, x: torch.Tensor, routes: Routes, top_k_weights: torch.Tensor, weights: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """`swiglu_experts` in several operations, which differentiate whatever a product is made of."""
        bias = weights["gate_up_bias"].flatten(1) if "gate_up_bias" in weights else None
        rows = permute(x, routes)
        with keepable():
            gate_up = self.times(rows, "gate_up_proj", weights["gate_up_proj"], routes.offsets)
        gate_up = self.adapted(gate_up, rows, "gate_up_proj", weights, routes.offsets)
        activated = activate(gate_up, top_k_weights, routes, bias, self.clamp)
        out = self.times(activated, "down_proj", weights["down_proj"], routes.offsets)
        return combine(self.adapted(out, activated, "down_proj", weights, routes.offsets), routes)

    def times(self, rows: torch.Tensor, name: str, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Sorted rows [rows, in] times the weight of this name, gate before up: [rows, out]."""
        if self.product is not None:
            return self.product(rows, name, weight, offsets)
        return grouped_linear(rows, weight.flatten(1, -2), offsets, self.multiply)

    def adapted(
        self,
        out: torch.Tensor,
        rows: torch.Tensor,
        name: str,
        weights: dict[str, torch.Tensor],
        offsets: torch.Tensor,
    ) -> torch.Tensor:
        """The product of the rows, and what the experts' adapters, if any, add: see `models.lora`."""
        a, b = (weights.get(f"{name.removesuffix('_proj')}_lora_{half}") for half in "ab")
        if a is None:
            return out
        return out + self.lora_scale * grouped_linear(grouped_linear(rows, a, offsets), b.flatten(1, -2), offsets)


class ClampedExperts(Experts):
    """Experts with biases after both products, and a clamped SwiGLU between them (gpt-oss)."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, clamp: Clamp) -> None:
        super().__init__(hidden_size, intermediate_size, num_experts)
        self.clamp = clamp
        self.gate_up_bias = nn.Parameter(torch.empty(num_experts, 2, intermediate_size))
        self.down_bias = nn.Parameter(torch.empty(num_experts, hidden_size))


class SparseMoeBlock(nn.Module):
    """Router and experts in place of a dense MLP; a shared expert, if any, sees every token (DeepSeekMoE, 2024)."""

    def __init__(
        self,
        gate: Router,
        experts: Experts,
        shared_experts: nn.Module | None = None,
        capacity_factor: float | None = None,
    ) -> None:
        """`capacity_factor`: see `within_capacity`; None: no expert turns a token away."""
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.shared_experts = shared_experts
        self.capacity_factor = capacity_factor

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """[batch, seq, hidden] -> the same, and the routing of its batch * seq tokens."""
        tokens = x.flatten(0, 1)
        routing = self.gate(tokens)
        index = routing.top_k_index
        if self.capacity_factor is not None and torch.is_grad_enabled():  # in training alone
            index = self.limit(index.view(*x.shape[:2], index.shape[1])).flatten(0, 1)
        out = self.experts(tokens, index, routing.top_k_weights).view_as(x)
        return (out if self.shared_experts is None else out + self.shared_experts(x)), routing

    def limit(self, top_k_index: torch.Tensor) -> torch.Tensor:
        """The choices [batch, seq, top_k] of all positions, without those beyond an expert's capacity."""
        return within_capacity(top_k_index, self.experts.num_experts, self.capacity_factor)
