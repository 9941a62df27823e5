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
) -> None:
    """As `optim.adamw.AdamW.step` for one tensor; all four contiguous, of one shape.

    Args:
        step: scalar, the steps taken with this one.
        factor: scalar that multiplies the gradient as it is read; where it is not finite nothing changes.
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
            size,
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
    size,
    BLOCK: tl.constexpr,
):
    scale = tl.load(factor)
    if (scale == scale) & (tl.abs(scale) != float("inf")):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        count = tl.load(step)
        g = tl.load(grad + at, mask=inside).to(tl.float32) * scale
        m = tl.load(exp_avg + at, mask=inside)
        v = tl.load(exp_avg_sq + at, mask=inside)
        m += (g - m) * (1 - beta1)
        v = beta2 * v + (1 - beta2) * g * g
        # In float64: one minus nearly one.
        correction1 = (1 - tl.exp(count.to(tl.float64) * log_beta1)).to(tl.float32)
        correction2 = (1 - tl.exp(count.to(tl.float64) * log_beta2)).to(tl.float32)
        w = tl.load(weight + at, mask=inside)
        w -= lr * decay * w
        w -= lr / correction1 * m / (tl.sqrt(v / correction2) + eps)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
        tl.store(weight + at, w, mask=inside)
