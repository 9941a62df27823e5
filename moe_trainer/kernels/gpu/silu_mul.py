"""SwiGLU's elementwise part, forward and backward."""

import torch
import triton
import triton.language as tl

from moe_trainer.kernels.gpu.sizes import ceil_div

_BLOCK = 2048


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As `kernels.silu_mul.silu_mul`, of contiguous tensors."""
    out = torch.empty_like(gate)
    if out.numel():
        _forward[(ceil_div(out.numel(), _BLOCK),)](gate, up, out, out.numel(), _BLOCK, num_warps=4)
    return out


def silu_mul_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up."""
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    if grad.numel():
        grid = (ceil_div(grad.numel(), _BLOCK),)
        _backward[grid](grad, gate, up, grad_gate, grad_up, grad.numel(), _BLOCK, num_warps=4)
    return grad_gate, grad_up


@triton.jit
def _forward(gate, up, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad, gate, up, grad_gate, grad_up, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    upstream = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    kind = grad_gate.dtype.element_ty
    tl.store(grad_up + at, (upstream * g * sigmoid).to(kind), mask=inside)
    tl.store(grad_gate + at, (upstream * u * sigmoid * (1 + g * (1 - sigmoid))).to(kind), mask=inside)
