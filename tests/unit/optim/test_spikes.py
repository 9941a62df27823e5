import math
import statistics

import pytest
import torch

from moe_trainer.config.choices import OnSpike
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import OptimConfig
from moe_trainer.optim import spikes
from moe_trainer.optim.spikes import SkipLimit, SpikeGuard


def guard(**options: object) -> SpikeGuard:
    return SpikeGuard(OptimConfig(max_grad_norm=10.0, **options), torch.device("cpu"))


def limits(guard: SpikeGuard, norms: list[float]) -> list[float]:
    return [guard.limit(torch.tensor(norm)).item() for norm in norms]


def usual(number: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return (1 + 0.1 * torch.randn(number, generator=generator)).tolist()


def test_without_a_bound_only_what_is_not_finite_is_skipped():
    found = limits(guard(), [1.0, 1e6, math.nan, math.inf, 1.0])
    assert found[:2] == [10.0, 10.0] and all(map(math.isnan, found[2:4])) and found[4] == 10.0


def test_mean_and_variance_are_plain_ones_at_first():
    one, norms = guard(max_grad_zscore=3.0), usual(20)
    limits(one, [*norms[:10], math.nan, *norms[10:]])  # what is not finite teaches nothing
    rounded = torch.tensor(norms).tolist()
    assert one.mean.item() == pytest.approx(statistics.mean(rounded), rel=1e-9)
    assert one.variance.item() == pytest.approx(statistics.pvariance(rounded), rel=1e-9)


@pytest.mark.parametrize("action", OnSpike)
def test_a_spike_is_clipped_to_the_bound_or_skipped(action: OnSpike):
    one = guard(max_grad_zscore=4.0, on_spike=action)
    assert set(limits(one, usual(30))) == {10.0} and one.spikes == 0
    bound = (one.mean + 4.0 * one.variance.sqrt()).item()
    assert 1.1 < bound < 2
    (found,) = limits(one, [5.0])
    assert math.isnan(found) if action is OnSpike.skip else found == pytest.approx(bound)
    assert one.spikes == 1 and one.mean < 1.1  # it learned the bound, not the spike
    assert limits(one, [1.0]) == [10.0] and one.spikes == 1


def test_early_steps_are_no_spikes():
    assert limits(guard(max_grad_zscore=1.0), [*usual(20), 100.0]) == [10.0] * 21


def test_a_lasting_rise_becomes_usual():
    one = guard(max_grad_zscore=4.0, on_spike=OnSpike.skip)
    limits(one, usual(40))
    found = limits(one, [5.0] * 100)
    assert math.isnan(found[0]) and found[-1] == 10.0
    assert sum(map(math.isnan, found)) < 60


def test_the_state_goes_on_after_a_round_trip():
    one, other = guard(max_grad_zscore=3.0), guard(max_grad_zscore=3.0)
    limits(one, [*usual(40), 30.0, math.nan, math.nan])
    other.load(one.to_list())
    assert one.skipped_in_a_row == 2 and other.to_list() == one.to_list()
    assert limits(one, usual(10)) == limits(other, usual(10))
    other.load([])
    assert other.to_list() == [0.0] * 5


def test_the_limit_of_steps_in_a_row():
    one, limit, dumped = guard(), SkipLimit(3, every=1), []
    dump = lambda: dumped.append(1) or "see there"  # noqa: E731
    for step, norm in enumerate([math.nan, math.nan, 1.0, math.nan, math.nan, math.nan], start=1):
        limits(one, [norm])
        if step < 6:
            limit.check(step, one.skipped_in_a_row, dump)
    assert not dumped
    with pytest.raises(ConfigError, match="optim.max_skipped_steps=3: by step 6, 3 steps in a row.*; see there$"):
        limit.check(6, one.skipped_in_a_row, dump)
    assert dumped == [1]
    SkipLimit(None, every=1).check(6, one.skipped_in_a_row, dump)
    SkipLimit(3, every=4).check(6, one.skipped_in_a_row, dump)


def test_a_late_reading_of_steps_that_recovered_since_ends_nothing(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU, where a copy is read a log line after it was begun."""

    class Passed:
        def synchronize(self) -> None: ...

    monkeypatch.setattr(spikes, "_begin_copy", lambda tensor: (tensor.clone(), Passed()))
    one, limit = guard(), SkipLimit(2, every=1)
    for step, norm in enumerate([math.nan, math.nan, 1.0, math.nan, math.nan], start=1):
        limits(one, [norm])
        limit.check(step, one.skipped_in_a_row, lambda: "ended")
    limits(one, [math.nan])
    with pytest.raises(ConfigError, match="by step 6, 3 steps in a row"):
        limit.check(6, one.skipped_in_a_row, lambda: "ended")
