"""SwiGLU of expert rows with the weight of the combination, and its backward, each in one pass."""

import torch
import triton
import triton.language as tl


def swiglu(gate_up: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """As `kernels.experts.swiglu`; rows at or past `end` are left as they are."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if out.numel():
        block = min(triton.next_power_of_2(width), 1024)
        grid = (rows, triton.cdiv(width, block))
        _forward[grid](gate_up, weights, order, end, out, width, block, num_warps=4)
    return out


def swiglu_backward(
    gate_up: torch.Tensor, grad: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, end: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `kernels.experts.swiglu_backward`."""
    rows, width = grad.shape
    grad_gate_up, activated = torch.empty_like(gate_up), torch.empty_like(grad)
    grad_weights = weights.new_zeros(weights.numel())
    if grad.numel():
        block = min(triton.next_power_of_2(width), 1024)
        _backward[(rows,)](
            gate_up, grad, weights, order, end, grad_gate_up, activated, grad_weights, width, block, num_warps=4
        )
    return grad_gate_up, activated, grad_weights


@triton.jit
def _forward(gate_up, weights, order, end, out, width: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(end):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        weight = tl.load(weights + tl.load(order + row)).to(tl.float32)
        at = gate_up + row * 2 * width + columns
        gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
        value = gate * tl.sigmoid(gate) * up * weight
        tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gate_up,
    grad,
    weights,
    order,
    end,
    grad_gate_up,
    activated,
    grad_weights,
    width: tl.constexpr,
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
            at = row * 2 * width + columns
            gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
            upstream = tl.load(grad + row * width + columns, mask=inside, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            plain = silu * up
            total += upstream * plain
            upstream *= weight
            grad_gate = upstream * up * sigmoid * (1 + gate * (1 - sigmoid))
            kind = grad_gate_up.dtype.element_ty
            tl.store(grad_gate_up + at, grad_gate.to(kind), mask=inside)
            tl.store(grad_gate_up + at + width, (upstream * silu).to(kind), mask=inside)
            tl.store(activated + row * width + columns, (plain * weight).to(kind), mask=inside)
        tl.store(grad_weights + pair, tl.sum(total, 0))
