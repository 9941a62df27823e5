"""AdamW in one pass over weight, gradient and moments."""

import math

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def adamw_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    factor: torch.Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    number: int = 0,
) -> None:
    """As `optim.adamw.AdamW.step` for one tensor; all four contiguous, of one shape.

    Args:
        exp_avg, exp_avg_sq: float32, or bfloat16, to which they are rounded at random (`stochastic_rounding`).
        step: scalar, the steps taken with this one.
        factor: scalar that multiplies the gradient as it is read; where it is not finite nothing changes.
        number: of the tensor among others; the random bits are a function of it and of the step.
    """
    size = weight.numel()
    if size:
        grid = (triton.cdiv(size, _BLOCK),)
        logs = (math.log(beta) if beta else -math.inf for beta in betas)
        _adamw[grid](
            weight,
            grad,
            exp_avg,
            exp_avg_sq,
            step,
            factor,
            lr,
            *betas,
            *logs,
            eps,
            weight_decay,
            number,
            size,
            exp_avg.dtype is torch.bfloat16,
            _BLOCK,
            num_warps=4,
        )


@triton.jit
def _adamw(
    weight,
    grad,
    exp_avg,
    exp_avg_sq,
    step,
    factor,
    lr,
    beta1,
    beta2,
    log_beta1,
    log_beta2,
    eps,
    decay,
    number,
    size,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = tl.load(factor)
    if (scale == scale) & (tl.abs(scale) != float("inf")):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        count = tl.load(step)
        g = tl.load(grad + at, mask=inside).to(tl.float32) * scale
        m = tl.load(exp_avg + at, mask=inside).to(tl.float32)
        v = tl.load(exp_avg_sq + at, mask=inside).to(tl.float32)
        m += (g - m) * (1 - beta1)
        v = beta2 * v + (1 - beta2) * g * g
        # In float64: one minus nearly one.
        correction1 = (1 - tl.exp(count.to(tl.float64) * log_beta1)).to(tl.float32)
        correction2 = (1 - tl.exp(count.to(tl.float64) * log_beta2)).to(tl.float32)
        w = tl.load(weight + at, mask=inside)
        w -= lr * decay * w
        w -= lr / correction1 * m / (tl.sqrt(v / correction2) + eps)
        tl.store(weight + at, w, mask=inside)
        if ROUND:
            bits = tl.randint(count.to(tl.int32) * 65521 + number, at).to(tl.int32)  # each half is noise for one
            m, v = _round(m, bits), _round(v, bits >> 16)
        tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=inside)
        tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=inside)


@triton.jit
def _round(x, noise):
    """As `stochastic_rounding.round_stochastically`, still float32; 16 bits of the noise count."""
    return ((x.to(tl.int32, bitcast=True) + (noise & 0xFFFF)) & -65536).to(tl.float32, bitcast=True)
