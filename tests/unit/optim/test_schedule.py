import pytest
import torch
from torch.optim import lr_scheduler

from moe_trainer.config.choices import ScheduleName
from moe_trainer.config.schema import OptimConfig
from moe_trainer.optim.schedule import learning_rate, set_learning_rate

LR = 3e-3


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)]}, {"params": []}], lr=LR)


def rates_of(make_scheduler, steps: int) -> list[float]:
    chain = optimizer()
    scheduler = make_scheduler(chain)
    rates = []
    for _ in range(steps):
        rates.append(chain.param_groups[0]["lr"])
        chain.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", list(ScheduleName))
def test_warm_up_is_linear_and_full_on_its_last_step(schedule):
    optim = OptimConfig(lr=LR, schedule=schedule, warmup_steps=5)
    expected = rates_of(lambda chain: lr_scheduler.LinearLR(chain, start_factor=1 / 5, total_iters=4), 5)
    ours = [learning_rate(step, optim, 20) for step in range(5)]
    assert ours == pytest.approx(expected, rel=1e-12)
    assert ours[4] == LR


@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_cosine_falls_like_torch(warmup_steps):
    optim = OptimConfig(lr=LR, schedule=ScheduleName.cosine, warmup_steps=warmup_steps, min_lr_ratio=0.2)
    horizon = 20 - warmup_steps
    expected = rates_of(lambda chain: lr_scheduler.CosineAnnealingLR(chain, horizon, eta_min=0.2 * LR), horizon + 1)
    assert [learning_rate(step, optim, 20) for step in range(warmup_steps, 21)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_linear_falls_like_torch(warmup_steps):
    optim = OptimConfig(lr=LR, schedule=ScheduleName.linear, warmup_steps=warmup_steps, min_lr_ratio=0.2)
    horizon = 20 - warmup_steps
    expected = rates_of(
        lambda chain: lr_scheduler.LinearLR(chain, start_factor=1.0, end_factor=0.2, total_iters=horizon), horizon + 5
    )
    assert [learning_rate(step, optim, 20) for step in range(warmup_steps, 25)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("decay_steps", "begins"), [(8, 12), (None, 18)])
def test_warm_up_stable_decay(decay_steps, begins):
    optim = OptimConfig(lr=LR, schedule=ScheduleName.wsd, warmup_steps=5, min_lr_ratio=0.2, decay_steps=decay_steps)
    rates = [learning_rate(step, optim, 20) for step in range(25)]
    assert set(rates[5 : begins + 1]) == {LR}
    fall = 20 - begins
    line = lambda chain: lr_scheduler.LinearLR(chain, start_factor=1.0, end_factor=0.2, total_iters=fall)  # noqa: E731
    assert rates[begins:] == pytest.approx(rates_of(line, 25 - begins), rel=1e-9)


def test_constant_is_exactly_the_rate():
    optim = OptimConfig(lr=LR, schedule=ScheduleName.constant, min_lr_ratio=0.1)
    assert {learning_rate(step, optim, 10) for step in range(30)} == {LR}


@pytest.mark.parametrize("schedule", [ScheduleName.linear, ScheduleName.cosine])
def test_the_floor_holds_after_the_horizon_and_with_a_warm_up_as_long_as_it(schedule):
    optim = OptimConfig(lr=LR, schedule=schedule, min_lr_ratio=0.1)
    assert learning_rate(10, optim, 10) == learning_rate(1000, optim, 10) == pytest.approx(0.1 * LR)
    optim.warmup_steps = 10
    assert learning_rate(9, optim, 10) == LR
    assert learning_rate(11, optim, 10) == pytest.approx(0.1 * LR)


def test_every_group_gets_the_rate():
    chain = optimizer()
    set_learning_rate(chain, 0.5)
    assert [group["lr"] for group in chain.param_groups] == [0.5, 0.5]
