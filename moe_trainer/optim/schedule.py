"""The learning rate of a step: a pure function, so resuming needs no state."""

import math

import torch

from moe_trainer.config.choices import ScheduleName
from moe_trainer.config.schema import OptimConfig


def learning_rate(step: int, optim: OptimConfig, schedule_steps: int) -> float:
    """The rate of a step.

    Linear warm-up: step 0 takes lr / warmup_steps and step warmup_steps - 1 is the first to take lr. From step
    warmup_steps the rate falls from lr to min_lr_ratio * lr, which step `schedule_steps` would be the first to take,
    and stays there: along a line, or half a cosine (Loshchilov and Hutter, 2017). `constant` stays at lr; `wsd` does
    until `decay_steps` before the horizon, and falls along a line from then on (MiniCPM, Hu et al., 2024).

    Args:
        step: 0-based step about to be taken.
        schedule_steps: horizon of the decay, counted from the start of training, warm-up included.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = min(1.0, (step - optim.warmup_steps) / max(1, schedule_steps - optim.warmup_steps))
    match optim.schedule:
        case ScheduleName.constant:
            fallen = 0.0
        case ScheduleName.linear:
            fallen = progress
        case ScheduleName.wsd:
            decay_steps = optim.decay_steps or max(1, schedule_steps // 10)
            fallen = min(1.0, max(0.0, 1 - (schedule_steps - step) / decay_steps))
        case ScheduleName.cosine:
            fallen = 0.5 * (1.0 - math.cos(math.pi * progress))
    return optim.lr * (1.0 - (1.0 - optim.min_lr_ratio) * fallen)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group this rate, times its own `lr_scale` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
