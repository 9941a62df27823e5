"""The table of `moe-train print_plan=true` for each family and plan on 2 x 2 ranks: a change of how a plan, a style
or FSDP splits a parameter shows here. `make golden` rewrites the files."""

import os
from pathlib import Path

import pytest

from moe_trainer.config.choices import Family
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate
from moe_trainer.train.plan_report import plan_table

FOLDER = Path(__file__).parent / "plans"
PLANS = {"tp": "tp", "sp": "sp", "tp_ep": "tp_ep", "sp_ep": "sp_ep", "sp_ep over all ranks": "sp_ep parallel.ep=4"}


@pytest.mark.parametrize("family", [family.value for family in Family])
def test_plans_are_as_recorded(family: str, tmp_path: Path) -> None:
    tables = []
    for title, plan in PLANS.items():
        mesh = f"parallel={plan} parallel.fsdp=2 parallel.tp=2 data.micro_batch_size=1"
        arguments = [f"+recipe={family}_tiny", *mesh.split(), f"run_dir={tmp_path}"]
        cfg = validate(compose("train", arguments), world_size=4, num_gpus=None)
        tables.append(f"{title}\n{plan_table(cfg)}\n")
    composed = "\n".join(tables)
    golden = FOLDER / f"{family}.txt"
    if "UPDATE_GOLDEN" in os.environ:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(composed, encoding="utf-8")
    assert composed == golden.read_text(encoding="utf-8")


def test_no_golden_file_without_a_family() -> None:
    assert {path.stem for path in FOLDER.glob("*")} == {family.value for family in Family}
