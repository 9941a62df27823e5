"""The feed-forward part of SwiGLU experts as one differentiable function that keeps little for its backward pass.

Kept are the tokens, the routes and the pre-activation; the gathered rows and the activation are made again, which
costs passes over memory but no matrix product. The weight of the combination is applied to the activation, so its
gradient is a row's inner product there and the experts' outputs need not be kept (SonicMoE, Guo et al., 2025).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from moe_trainer.kernels import grouped_gemm
from moe_trainer.kernels.backend import has_kernel
from moe_trainer.kernels.grouped_gemm import Multiply, expert_of_rows, outer, sum_rows
from moe_trainer.kernels.keepable import is_watched, keepable
from moe_trainer.kernels.permute import Routes, gather_rows, sum_pairs

Product = Callable[[torch.Tensor, str, torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows, name of the weight, weight [num_experts, ..., out, in], offsets) -> [rows, out]."""


class Clamp(NamedTuple):
    """gpt-oss's SwiGLU: `gate * sigmoid(alpha * gate) * (up + 1)`, gate at most `limit`, up at most that far from
    zero."""

    alpha: float
    limit: float


class Exchange(Protocol):
    """Gives each rank the tokens of all, and each rank the sum of its tokens' gradients, while other work goes on."""

    def start(self, x: torch.Tensor) -> None:
        """Begin with this rank's tokens [tokens, hidden]."""

    def tokens(self) -> torch.Tensor:
        """Those of all ranks; waits for what was begun last."""

    def start_sum(self, grad: torch.Tensor) -> None:
        """Begin to sum the gradients of all ranks' tokens."""

    def sum(self) -> torch.Tensor:
        """The sum for this rank's tokens; waits."""


def swiglu_experts(
    x: torch.Tensor,
    top_k_weights: torch.Tensor,
    routes: Routes,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    multiply: Multiply,
    product: Product | None = None,
    exchange: Exchange | None = None,
    gate_up_bias: torch.Tensor | None = None,
    clamp: Clamp | None = None,
) -> torch.Tensor:
    """`sum_k weight_k * down(silu(gate(x)) * up(x))` over each token's experts: [tokens, hidden] -> the same.

    Args:
        x: [tokens, hidden].
        top_k_weights: [tokens, top_k], float32 at least.
        routes: of the tokens to the experts given; pairs of other experts add nothing.
        gate_up_proj: [experts, 2, intermediate, hidden].
        down_proj: [experts, hidden, intermediate].
        multiply: multiplies with the weights, forward and backward.
        product: in its place in the forward pass, for weights that it does not take.
        exchange: begun with `x`: all but `x` and its gradient are then about the tokens of all ranks. The backward
            pass gathers them again beside its first product, and sums their gradients beside its last.
        gate_up_bias: [experts, 2, intermediate].
        clamp: in place of silu(gate) * up.
    """
    settings = multiply, product, exchange, clamp
    return _SwigluExperts.apply(x, top_k_weights, routes, gate_up_proj, gate_up_bias, down_proj, *settings)


class _SwigluExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        top_k_weights: torch.Tensor,
        routes: Routes,
        gate_up_proj: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_proj: torch.Tensor,
        multiply: Multiply,
        product: Product | None,
        exchange: Exchange | None,
        clamp: Clamp | None,
    ) -> torch.Tensor:
        tokens = x if exchange is None else exchange.tokens()
        rows, offsets, activated = gather_rows(tokens, routes), routes.offsets, None
        top_k_weights = top_k_weights.contiguous()
        bias = None if gate_up_bias is None else gate_up_bias.flatten(1)
        with keepable():
            if product is not None:
                gate_up = product(rows, "gate_up_proj", gate_up_proj, offsets)
            elif _is_one_kernel(rows, gate_up_proj, multiply, bias, clamp) and not is_watched():
                from moe_trainer.kernels.gpu import ping_pong as gpu

                gate_up, activated = gpu.swiglu(rows, gate_up_proj, offsets, top_k_weights, routes.order)
            else:
                gate_up = multiply(rows, gate_up_proj.flatten(1, 2).mT, offsets)
        del rows
        ctx.save_for_backward(x, top_k_weights, gate_up, gate_up_proj, bias, down_proj)
        ctx.routes, ctx.multiply, ctx.exchange, ctx.clamp = routes, multiply, exchange, clamp
        if activated is None:
            activated = swiglu(gate_up, top_k_weights, routes, bias, clamp)
        if product is not None:
            return sum_pairs(product(activated, "down_proj", down_proj, offsets), routes)
        return sum_pairs(multiply(activated, down_proj.mT, offsets), routes)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, top_k_weights, gate_up, gate_up_proj, bias, down_proj = ctx.saved_tensors
        routes: Routes = ctx.routes
        exchange: Exchange | None = ctx.exchange
        offsets = routes.offsets
        needs_gate_up, needs_bias, needs_down = ctx.needs_input_grad[3:6]  # a frozen weight needs no gradient
        if exchange is not None and needs_gate_up:
            exchange.start(x)
        grad_out = gather_rows(grad, routes)  # [rows, hidden]
        if _is_one_kernel(grad_out, down_proj, ctx.multiply, bias, ctx.clamp):
            from moe_trainer.kernels.gpu import ping_pong as gpu

            grad_gate_up, activated, grad_weights = gpu.swiglu_backward(
                grad_out, down_proj, offsets, top_k_weights, routes.order, gate_up
            )
            grad_weights = grad_weights.view_as(top_k_weights)
        else:
            grad_gate_up, activated, grad_weights = swiglu_backward(
                gate_up, ctx.multiply(grad_out, down_proj, offsets), top_k_weights, routes, bias, ctx.clamp
            )
        grad_down = outer(grad_out, activated, offsets) if needs_down else None
        del grad_out, activated
        grad_rows = ctx.multiply(grad_gate_up, gate_up_proj.flatten(1, 2), offsets)
        grad_x = sum_pairs(grad_rows, routes)
        del grad_rows
        grad_gate_up_proj = None
        if exchange is not None:
            exchange.start_sum(grad_x)
        grad_bias = sum_rows(grad_gate_up, offsets).unflatten(1, (2, -1)) if needs_bias else None
        if needs_gate_up:
            tokens = x if exchange is None else exchange.tokens()
            grad_gate_up_proj = outer(grad_gate_up, gather_rows(tokens, routes), offsets).view_as(gate_up_proj)
        if exchange is not None:
            grad_x = exchange.sum()
        return grad_x, grad_weights, None, grad_gate_up_proj, grad_bias, grad_down, None, None, None, None


def _is_one_kernel(
    rows: torch.Tensor, weight: torch.Tensor, multiply: Multiply, bias: torch.Tensor | None, clamp: Clamp | None
) -> bool:
    """Whether a kernel of ours multiplies with the weight and has SwiGLU, or its backward pass, at the end of each
    tile."""
    is_plain = bias is None and clamp is None and multiply is grouped_gemm.multiply
    is_taken = rows.dtype is torch.bfloat16 and grouped_gemm.grouped_gemm_supported(rows.dtype, *weight.shape[-2:])
    return is_plain and is_taken and weight.is_contiguous() and grouped_gemm.is_for_kernel(rows, *weight.shape[-2:])


def exchanged(x: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """This rank's tokens [tokens, hidden], with which the exchange has begun -> those of all ranks."""
    return _Exchanged.apply(x, exchange)


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.tokens()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.exchange.start_sum(grad)
        return ctx.exchange.sum(), None


def activate(
    gate_up: torch.Tensor,
    top_k_weights: torch.Tensor,
    routes: Routes,
    bias: torch.Tensor | None = None,
    clamp: Clamp | None = None,
) -> torch.Tensor:
    """As `swiglu`, differentiable; it keeps the pre-activation."""
    return _Activate.apply(gate_up, top_k_weights.contiguous(), routes, bias, clamp)


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate_up: torch.Tensor,
        top_k_weights: torch.Tensor,
        routes: Routes,
        bias: torch.Tensor | None,
        clamp: Clamp | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(gate_up, top_k_weights, bias)
        ctx.routes, ctx.clamp = routes, clamp
        return swiglu(gate_up, top_k_weights, routes, bias, clamp)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate_up, top_k_weights, bias = ctx.saved_tensors
        routes: Routes = ctx.routes
        grad_gate_up, _, grad_weights = swiglu_backward(
            gate_up, grad.contiguous(), top_k_weights, routes, bias, ctx.clamp
        )
        grad_bias = sum_rows(grad_gate_up, routes.offsets) if ctx.needs_input_grad[3] else None
        return grad_gate_up, grad_weights, None, grad_bias, None


def combine_bias(bias: torch.Tensor, top_k_weights: torch.Tensor, routes: Routes) -> torch.Tensor:
    """`sum_k weight_k * bias[expert_k]` [tokens, width] for bias [experts, width], which follows `down_proj`."""
    experts = torch.bucketize(routes.inverse, routes.offsets, right=True).view_as(top_k_weights)
    shares = top_k_weights.new_zeros(len(top_k_weights), len(bias) + 1)  # the last: of experts elsewhere
    return shares.scatter_add(1, experts, top_k_weights)[:, :-1] @ bias.to(shares.dtype)


def gated(gate: torch.Tensor, up: torch.Tensor, clamp: Clamp | None = None) -> torch.Tensor:
    """`silu(gate) * up`, or as `clamp` has it."""
    if clamp is None:
        return F.silu(gate) * up
    gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
    return gate * torch.sigmoid(clamp.alpha * gate) * (up + 1)


def swiglu(
    gate_up: torch.Tensor,
    top_k_weights: torch.Tensor,
    routes: Routes,
    bias: torch.Tensor | None = None,
    clamp: Clamp | None = None,
) -> torch.Tensor:
    """[rows, 2 * intermediate], gate before up -> `gated(gate, up, clamp) * weight` [rows, intermediate].

    Rows of no expert are undefined.

    Args:
        bias: [experts, 2 * intermediate], added first.
    """
    experts = None if bias is None else expert_of_rows(len(gate_up), routes.offsets)
    if has_kernel(gate_up):
        from moe_trainer.kernels.gpu import swiglu as gpu

        return gpu.swiglu(gate_up, top_k_weights, routes.order, routes.offsets[-1:], bias, experts, clamp)
    weights = _of_rows(top_k_weights, routes)
    gate, up = _widened(gate_up, weights.dtype, bias, experts).chunk(2, dim=-1)
    return (gated(gate, up, clamp) * weights).to(gate_up.dtype)


def swiglu_backward(
    gate_up: torch.Tensor,
    grad: torch.Tensor,
    top_k_weights: torch.Tensor,
    routes: Routes,
    bias: torch.Tensor | None = None,
    clamp: Clamp | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `gate_up` and `top_k_weights` for that of the result, and the result again."""
    experts = None if bias is None else expert_of_rows(len(gate_up), routes.offsets)
    if has_kernel(gate_up):
        from moe_trainer.kernels.gpu import swiglu as gpu

        end = routes.offsets[-1:]
        grad_gate_up, activated, grad_weights = gpu.swiglu_backward(
            gate_up, grad, top_k_weights, routes.order, end, bias, experts, clamp
        )
        return grad_gate_up, activated, grad_weights.view_as(top_k_weights)
    weights = _of_rows(top_k_weights, routes)
    wide = _widened(gate_up, weights.dtype, bias, experts)
    gate, up = wide.chunk(2, dim=-1)
    if clamp is not None:
        is_cut = torch.cat((gate > clamp.limit, up.abs() > clamp.limit), dim=-1)
        gate = clamp.alpha * gate.clamp(max=clamp.limit)  # gate * sigmoid(alpha * gate) is silu(alpha * gate) / alpha
        up = up.clamp(-clamp.limit, clamp.limit) + 1
    silu, upstream = F.silu(gate), grad.to(weights.dtype)
    if clamp is not None:
        silu /= clamp.alpha
    activated = silu * up
    here = torch.arange(len(grad), device=grad.device) < routes.offsets[-1]
    grad_weights = torch.zeros_like(top_k_weights).flatten()
    grad_weights[routes.order] = (upstream * activated).sum(-1).masked_fill_(~here, 0)
    upstream = upstream * weights
    grad_gate_up = torch.empty_like(wide)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    torch.ops.aten.silu_backward(upstream * up, gate, grad_input=grad_gate)
    torch.mul(upstream, silu, out=grad_up)
    if clamp is not None:
        grad_gate_up.masked_fill_(is_cut, 0)
    activated = (activated * weights).to(gate_up.dtype)
    return grad_gate_up.to(gate_up.dtype), activated, grad_weights.view_as(top_k_weights)


def _widened(
    gate_up: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None, experts: torch.Tensor | None
) -> torch.Tensor:
    wide = gate_up.to(dtype)
    return wide if bias is None else wide + bias.to(dtype).index_select(0, experts)


def _of_rows(top_k_weights: torch.Tensor, routes: Routes) -> torch.Tensor:
    """[tokens, top_k] -> [rows, 1]."""
    return top_k_weights.flatten().index_select(0, routes.order).unsqueeze(-1)
