"""AdamW in one pass over weight, gradient and moments."""

import math

import torch
import triton
import triton.language as tl

from moe_trainer.kernels import stochastic_rounding
from moe_trainer.kernels.gpu.sizes import ceil_div
from moe_trainer.kernels.stochastic_rounding import RandomBits

_BLOCK = 1024
_GAMMA = tl.constexpr(stochastic_rounding.GAMMA)
_MIX1 = tl.constexpr(stochastic_rounding.MIX1)
_MIX2 = tl.constexpr(stochastic_rounding.MIX2)
_EXP_AVG_BITS = tl.constexpr(stochastic_rounding.EXP_AVG_BITS)
_EXP_AVG_SQ_BITS = tl.constexpr(stochastic_rounding.EXP_AVG_SQ_BITS)


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
    random_bits: RandomBits,
    copy: torch.Tensor | None = None,
) -> None:
    """As `optim.adamw.AdamW.step` for one tensor; all four contiguous, of one shape, each float32 or bfloat16. What
    is stored in bfloat16 is rounded to it at random.

    Args:
        step: scalar, the steps taken with this one.
        factor: scalar that multiplies the gradient as it is read; where it is not finite nothing changes.
        random_bits: of these elements.
        copy: contiguous; becomes the weight, rounded to its type.
    """
    size = weight.numel()
    if size:
        grid = (ceil_div(size, _BLOCK),)
        logs = (math.log(beta) if beta else -math.inf for beta in betas)
        _adamw[grid](
            weight,
            grad,
            exp_avg,
            exp_avg_sq,
            copy,
            step,
            factor,
            lr,
            *betas,
            *logs,
            eps,
            weight_decay,
            random_bits.tag,
            random_bits.start,
            *random_bits.sizes[1:],
            *random_bits.strides[:2],
            size,
            random_bits.is_in_one_piece,
            _BLOCK,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["tag", "start"])
def _adamw(
    weight,
    grad,
    exp_avg,
    exp_avg_sq,
    copy,
    step,
    factor,
    lr,
    beta1,
    beta2,
    log_beta1,
    log_beta2,
    eps,
    decay,
    tag,
    start,
    rows,
    run,
    outer_stride,
    row_stride,
    size,
    IN_ONE_PIECE: tl.constexpr,
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
        w = tl.load(weight + at, mask=inside).to(tl.float32)
        w -= lr * decay * w
        w -= lr / correction1 * m / (tl.sqrt(v / correction2) + eps)
        place = at
        if not IN_ONE_PIECE:
            row = at // run
            place = row // rows * outer_stride + row % rows * row_stride + at % run
        bits = _mix((place + start) * _GAMMA + _mix(count.to(tl.int64) * 4294967296 + tag))
        _store(weight + at, w, bits, inside)
        if copy is not None:
            tl.store(copy + at, w.to(copy.dtype.element_ty), mask=inside)
        _store(exp_avg + at, m, bits >> _EXP_AVG_BITS, inside)
        _store(exp_avg_sq + at, v, bits >> _EXP_AVG_SQ_BITS, inside)


@triton.jit
def _mix(x):
    """As in `stochastic_rounding`."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _store(pointers, x, bits, inside):
    """Bfloat16 as `stochastic_rounding.round_stochastically` has it."""
    if pointers.dtype.element_ty == tl.bfloat16:
        noise = (bits & 0xFFFF).to(tl.int32)
        x = ((x.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=inside)
