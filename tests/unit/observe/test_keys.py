"""Keys that say what is seen of a run: what is refused, and that the command line takes them."""

import pytest

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate


def composed(tmp_path, *overrides: str) -> Config:
    return compose("train", ["+recipe=mixtral_tiny", f"run_dir={tmp_path}", "device=cpu", "steps=10", *overrides])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["logging.every=0"], "logging.every=0 must be at least 1"),
        (["logging.load_every=0"], "logging.load_every=0 must be at least 1"),
        (["logging.tensorboard=true"], "logging.tensorboard=true needs tensorboard: pip install"),
        (
            ["profile=true", "profiler.steps=[9,11]"],
            r"profiler.steps=\[9, 11\]: 11 is not between 1 and 10 \(steps=10",
        ),
        (["profile=true", "profiler.steps=[0]"], r"profiler.steps=\[0\]: 0 is not between 1 and 10"),
        (["profile=true", "profiler.ranks=[9]"], r"profiler.ranks=\[9\]: 9 is not between 0 and \d \(\d ranks\)"),
        (["profile=true", "profiler.ranks=[]"], r"profiler.ranks=\[\] names nothing"),
        (["profile=1.5"], "profile"),
        (["profiler.steps=all"], "profiler.steps"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path, monkeypatch, overrides, line):
    monkeypatch.setattr("moe_trainer.config.observe.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=line) as refused:
        validate(composed(tmp_path, *overrides), None, 0)
    assert "\n" not in str(refused.value)


def test_what_is_legal_is_taken(tmp_path):
    chosen = ["profile=true", "profiler.steps=[2,3]", "profiler.ranks=[0]", "logging.load_every=5"]
    cfg = validate(composed(tmp_path, *chosen), None, 0)
    assert (cfg.profile, cfg.profiler.steps, cfg.profiler.ranks, cfg.logging.load_every) == (True, [2, 3], [0], 5)


def test_steps_of_a_profile_that_is_off_are_no_mistake(tmp_path):
    assert not validate(composed(tmp_path, "profiler.steps=[99]"), None, 0).profile
