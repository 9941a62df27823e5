"""SwiGLU of expert rows with the weight of the combination, and its backward, each in one pass."""

import torch
import triton
import triton.language as tl

from moe_trainer.kernels.gpu.sizes import ceil_div, next_power_of_2


def swiglu(
    gate_up: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    end: torch.Tensor,
    bias: torch.Tensor | None = None,
    experts: torch.Tensor | None = None,
    clamp: tuple[float, float] | None = None,
) -> torch.Tensor:
    """As `kernels.experts.swiglu`; rows at or past `end` are left as they are.

    Args:
        experts: [rows] of each row, for `bias`.
    """
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if out.numel():
        block = min(next_power_of_2(width), 1024)
        grid = (rows, ceil_div(width, block))
        settings = width, *_alpha_and_limit(clamp), block
        _forward[grid](gate_up, weights, order, end, bias, experts, out, *settings, num_warps=4)
    return out


def swiglu_backward(
    gate_up: torch.Tensor,
    grad: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    end: torch.Tensor,
    bias: torch.Tensor | None = None,
    experts: torch.Tensor | None = None,
    clamp: tuple[float, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `kernels.experts.swiglu_backward`; `experts` as for `swiglu`."""
    rows, width = grad.shape
    grad_gate_up, activated = torch.empty_like(gate_up), torch.empty_like(grad)
    grad_weights = weights.new_zeros(weights.numel())
    if grad.numel():
        block = min(next_power_of_2(width), 1024)
        given, made = (gate_up, grad, weights, order, end, bias, experts), (grad_gate_up, activated, grad_weights)
        _backward[(rows,)](*given, *made, width, *_alpha_and_limit(clamp), block, num_warps=4)
    return grad_gate_up, activated, grad_weights


def _alpha_and_limit(clamp: tuple[float, float] | None) -> tuple[float, float | None]:
    return (1.0, None) if clamp is None else tuple(map(float, clamp))


@triton.jit
def _load(gate_up, bias, experts, row, columns, width: tl.constexpr):
    """Gate and up of a row, with their bias."""
    inside = columns < width
    at = gate_up + row * 2 * width + columns
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        at = bias + tl.load(experts + row) * 2 * width + columns
        gate += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _clamped(gate, up, LIMIT: tl.constexpr):
    """The gate and one more than up; what is no number stays so, and a step of it is skipped."""
    gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate, tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL) + 1


@triton.jit
def _forward(
    gate_up,
    weights,
    order,
    end,
    bias,
    experts,
    out,
    width: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(end):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        weight = tl.load(weights + tl.load(order + row)).to(tl.float32)
        gate, up = _load(gate_up, bias, experts, row, columns, width)
        if LIMIT is not None:
            gate, up = _clamped(gate, up, LIMIT)
        value = gate * tl.sigmoid(ALPHA * gate) * up * weight
        tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=columns < width)


@triton.jit
def _backward(
    gate_up,
    grad,
    weights,
    order,
    end,
    bias,
    experts,
    grad_gate_up,
    activated,
    grad_weights,
    width: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(end):
        pair = tl.load(order + row)
        weight = tl.load(weights + pair).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            gate, up = _load(gate_up, bias, experts, row, columns, width)
            upstream = tl.load(grad + row * width + columns, mask=inside, other=0.0).to(tl.float32)
            if LIMIT is not None:
                gate_is_cut, up_is_cut = gate > LIMIT, tl.abs(up) > LIMIT
                gate, up = _clamped(gate, up, LIMIT)
            sigmoid = tl.sigmoid(ALPHA * gate)
            silu = gate * sigmoid
            plain = silu * up
            total += upstream * plain
            upstream *= weight
            grad_gate = upstream * up * sigmoid * (1 + ALPHA * gate * (1 - sigmoid))
            grad_up = upstream * silu
            if LIMIT is not None:
                grad_gate, grad_up = tl.where(gate_is_cut, 0.0, grad_gate), tl.where(up_is_cut, 0.0, grad_up)
            kind = grad_gate_up.dtype.element_ty
            at = grad_gate_up + row * 2 * width + columns
            tl.store(at, grad_gate.to(kind), mask=inside)
            tl.store(at + width, grad_up.to(kind), mask=inside)
            tl.store(activated + row * width + columns, (plain * weight).to(kind), mask=inside)
        tl.store(grad_weights + pair, tl.sum(total, 0))
