"""`print_plan=true` of every recipe, on this machine alone: no GPUs, no ranks, no memory for the weights."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_trainer.cli import train
from moe_trainer.config.store import compose, recipe_dir, recipes
from moe_trainer.data.tokenizer import load_tokenizer
from moe_trainer.models.registry import FAMILIES
from moe_trainer.observe.flops import num_parameters


def given(recipe: str, folder: Path) -> list[str]:
    """What the recipe asks of the user: a folder with the shape that it names, and a text."""
    if "???" not in (recipe_dir() / f"{recipe}.yaml").read_text(encoding="utf-8"):
        return []
    arguments = [f"model.init_from={folder}", f"data.path={folder}/text.txt"]
    cfg = compose("train", [f"+recipe={recipe}", *arguments])
    model = replace(cfg.model, max_position_embeddings=cfg.data.seq_len)
    (folder / "config.json").write_text(json.dumps(FAMILIES[model.family].config_to_hf(model, "bfloat16", None)))
    (folder / "text.txt").write_text("Some text.")
    load_tokenizer("byte").save(str(folder / "tokenizer.json"))
    return arguments


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_prints_its_plan(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "launch", lambda *_: pytest.fail("ranks were started"))
    arguments = [f"+recipe={recipe}", *given(recipe, tmp_path), f"run_dir={tmp_path}/runs"]
    assert train.main([*arguments, "print_plan=true", "device=cpu"]) == 0
    assert not dist.is_initialized() and not (tmp_path / "runs").exists()
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert " ranks: dp_replicate=" in first
    shapes = [row.split()[1] for row in rows]
    sizes = [math.prod(map(int, shape.split("x"))) for shape in shapes]
    assert sum(sizes) == num_parameters(compose("train", arguments).model)[0]
    weights = [row.split()[2] for row in rows if ".experts." in row]
    assert weights and "-" not in weights, "an expert weight without a style"
