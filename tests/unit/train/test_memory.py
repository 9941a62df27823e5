"""What the plan says that a rank keeps of each parameter."""

import math
from pathlib import Path

import pytest

from moe_trainer.config.schema import Config
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate
from moe_trainer.train.plan_report import plan_report, plan_table

ALONE = ["parallel=sp_ep", "parallel.fsdp=2", "parallel.tp=1", "parallel.ep=2", "data.global_batch_size=4"]
WEIGHTS, MOMENTS = "optim.weights_dtype=bfloat16", "optim.moments_dtype=bfloat16"


def config(folder: Path, *overrides: str) -> Config:
    arguments = ["+recipe=qwen3_moe_tiny", "device=cuda", "data.micro_batch_size=2", f"run_dir={folder}", *overrides]
    return validate(compose("train", arguments), None, num_gpus=4)


@pytest.mark.parametrize(
    ("overrides", "of_experts", "of_others", "of_norms_and_routers"),
    [
        ([], (4, 2, 2, 8), (4, 0, 4, 8), (4, 0, 4, 8)),
        (["recompute=full"], (4, 0, 2, 8), (4, 0, 4, 8), (4, 0, 4, 8)),
        ([MOMENTS], (4, 2, 2, 4), (4, 0, 4, 4), (4, 0, 4, 4)),
        ([WEIGHTS], (2, 0, 2, 8), (2, 0, 2, 8), (4, 0, 4, 8)),
        ([WEIGHTS, MOMENTS], (2, 0, 2, 4), (2, 0, 2, 4), (4, 0, 4, 4)),
        ([WEIGHTS, MOMENTS, "data.global_batch_size=8"], (2, 0, 4, 4), (2, 0, 4, 4), (4, 0, 4, 4)),
        ([WEIGHTS, MOMENTS, "parallel.ep=1"], (2, 0, 2, 4), (2, 0, 2, 4), (4, 0, 4, 4)),
        (["parallel.ep=1"], (4, 0, 4, 8), (4, 0, 4, 8), (4, 0, 4, 8)),
        (["parallel.ep=1", "parallel.fsdp=1"], (4, 2, 4, 8), (4, 2, 4, 8), (4, 0, 4, 8)),
        (["parallel.ep=1", "parallel.fsdp=1", "data.global_batch_size=2"], (4, 2, 2, 8), (4, 2, 2, 8), (4, 0, 4, 8)),
        (
            [WEIGHTS, "parallel.dp_replicate=2", "parallel.fsdp=1", "parallel.ep=1"],
            (2, 0, 6, 8),
            (2, 0, 6, 8),
            (4, 0, 4, 8),
        ),
        ([WEIGHTS, "optim.freeze=[model.layers.*.mlp.experts]"], (2, 0, 0, 0), (2, 0, 2, 8), (4, 0, 4, 8)),
    ],
)
def test_bytes_of_a_parameter(
    overrides: list[str],
    of_experts: tuple[int, ...],
    of_others: tuple[int, ...],
    of_norms_and_routers: tuple[int, ...],
    tmp_path: Path,
) -> None:
    """Weights, copies, gradients, moments; of what no other rank holds, gradients are what bfloat16 products give."""
    report = plan_report(config(tmp_path, *ALONE, *overrides))
    expected = [0, 0, 0, 0]
    for name, *_, shape in report.rows:
        is_precise = "norm" in name or ".gate." in name
        each = of_norms_and_routers if is_precise else of_experts if ".experts." in name else of_others
        for number, size in enumerate(each):
            expected[number] += size * math.prod(map(int, shape.split("x")))
    states = report.states
    assert [states.weights, states.copies, states.gradients, states.moments] == expected
    assert f" of states, {sum(expected) / states.parameters:.3g} bytes a parameter" in str(states)


def test_moments_in_host_memory_are_not_on_the_device(tmp_path: Path) -> None:
    line = plan_table(config(tmp_path, *ALONE, "parallel.ep=1", "optim.offload=true")).splitlines()[0]
    assert line.endswith(" of states, 8 bytes a parameter (weights 4, gradients 4, moments 8 in host memory)")
