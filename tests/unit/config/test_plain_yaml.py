"""Saved configs that anybody may have written: read, or refused with a ValueError."""

import pytest

from moe_trainer.config.plain_yaml import read_leaves


def test_a_mapping_becomes_dotted_keys() -> None:
    assert read_leaves("a: 1\nb:\n  c: [x]\n  d: {e: null}\n") == {"a": 1, "b.c": ["x"], "b.d.e": None}
    assert read_leaves("") == {} and read_leaves("\ufeffa: 1") == {"a": 1}


@pytest.mark.parametrize(
    "text",
    [
        "a: !!bool maybe", "a: !!int ''", "a: !!int x", "a: !!timestamp x", "a: 2020-13-45", "a: !!binary é",
        "a: 2020-01-01T00:00:00+99:99", "<<: 5", "{[1]: 2}", "!!set {a}", "- a", "text", "a:\tb\n\tc: d", "a: \x07",
        "a: &x 1\nb: *x", "a: !!python/object:os.system x", "[" * 10**4, "{a: " * 5000, f"a: {'9' * 5000}",
    ],
)  # fmt: skip
def test_what_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        read_leaves(text)
