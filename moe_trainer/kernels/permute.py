"""From tokens to rows sorted by expert, and back as a weighted sum.

A *pair* is one (token, chosen expert); pair `p` belongs to token `p // top_k`. Both directions are gathers, forward
and backward, through the sort and its inverse: no scatter-add, so no order of execution can change the result.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import FunctionCtx


class Routes(NamedTuple):
    """The sort of the pairs by expert."""

    order: torch.Tensor
    """[pairs] the pair at each row."""
    inverse: torch.Tensor
    """[pairs] the row of each pair."""
    offsets: torch.Tensor
    """[num_experts] int32, the end of each expert's rows."""
    top_k: int
    """Pairs of each token."""


def tokens_per_expert(index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert is named, [num_experts] int64; a number past the last expert counts nowhere."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=index.device)
    flat = index.flatten()
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]


def sort_by_expert(top_k_index: torch.Tensor, num_experts: int) -> Routes:
    """Stable sort of the pairs by expert.

    Args:
        top_k_index: [tokens, top_k]; `num_experts` stands for an expert that is not here, whose pairs come last.
    """
    experts = top_k_index.flatten()
    order = experts.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    offsets = tokens_per_expert(experts, num_experts).cumsum(0).int()
    return Routes(order, inverse, offsets, top_k_index.shape[1])


def permute(tokens: torch.Tensor, routes: Routes) -> torch.Tensor:
    """[tokens, hidden] -> [pairs, hidden], a copy of its token for each pair, sorted by expert."""
    return _Permute.apply(tokens, routes)


def unpermute(rows: torch.Tensor, top_k_weights: torch.Tensor, routes: Routes) -> torch.Tensor:
    """[pairs, hidden] in sorted order -> [tokens, hidden], each token's rows summed with weights [tokens, top_k].

    The products and the sum are in the weights' precision (float32 at least).
    """
    return _Unpermute.apply(rows, top_k_weights, routes)


def unsort(rows: torch.Tensor, routes: Routes) -> torch.Tensor:
    """[pairs, hidden] in sorted order -> in the order of the pairs."""
    return _Permute.apply(rows, Routes(routes.inverse, routes.order, routes.offsets, 1))


def _pairs(rows: torch.Tensor, routes: Routes) -> torch.Tensor:
    """[pairs, hidden] sorted -> [tokens, top_k, hidden]; zero where the pair's expert is not here.

    Rows without an expert hold whatever the memory held, so they are selected away, not multiplied by zero.
    """
    here = (routes.inverse < routes.offsets[-1]).unsqueeze(-1)
    pairs = torch.where(here, rows[routes.inverse], rows.new_zeros(()))
    return pairs.unflatten(0, (-1, routes.top_k))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tokens: torch.Tensor, routes: Routes) -> torch.Tensor:
        ctx.routes = routes
        return tokens[routes.order // routes.top_k]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        dtype = torch.promote_types(grad.dtype, torch.float32)
        return _pairs(grad, ctx.routes).sum(1, dtype=dtype).to(grad.dtype), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: torch.Tensor, top_k_weights: torch.Tensor, routes: Routes) -> torch.Tensor:
        ctx.routes = routes
        ctx.save_for_backward(rows, top_k_weights)
        return (_pairs(rows, routes) * top_k_weights.unsqueeze(-1)).sum(1).to(rows.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows, weights = ctx.saved_tensors
        routes: Routes = ctx.routes
        sorted_weights = weights.flatten()[routes.order].unsqueeze(-1)
        grad_rows = (grad[routes.order // routes.top_k] * sorted_weights).to(rows.dtype)
        grad_weights = (_pairs(rows, routes) * grad.unsqueeze(1).to(weights.dtype)).sum(-1)
        return grad_rows, grad_weights, None
