"""What each recipe comes to: a change of a default or of a node shows here. `make golden` rewrites the files."""

import os
from pathlib import Path

import pytest

from moe_trainer.config.store import compose, recipe_dir, recipes, to_yaml

FOLDER = Path(__file__).parent / "recipes"
FROM_THE_USER = ["model.init_from=HF_FOLDER", "data.path=FILE.jsonl"]
"""What a recipe with `???` leaves open."""


@pytest.mark.parametrize("recipe", recipes())
def test_recipe_is_as_recorded(recipe: str) -> None:
    has_blanks = "???" in (recipe_dir() / f"{recipe}.yaml").read_text(encoding="utf-8")
    composed = to_yaml(compose("train", [f"+recipe={recipe}", *(FROM_THE_USER if has_blanks else [])]))
    golden = FOLDER / f"{recipe}.yaml"
    if "UPDATE_GOLDEN" in os.environ:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(composed, encoding="utf-8")
    assert composed == golden.read_text(encoding="utf-8")


def test_no_golden_file_without_a_recipe() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(recipes())
