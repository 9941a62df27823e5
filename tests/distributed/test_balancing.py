"""Each way of balancing brings the busiest expert's load down, where without it some experts take most tokens."""

import statistics
from pathlib import Path
from typing import Any

import pytest

from moe_trainer.config.choices import AuxScope, DeviceName, Family, ScheduleName
from moe_trainer.config.schema import Config, DataConfig, ModelConfig, OptimConfig, ParallelConfig
from moe_trainer.config.validate import resolve_parallel
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.testing.pool import run_distributed
from tests.distributed.runs import train

STEPS, LAST, SEEDS = 100, 20, (0, 1, 2)
WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "expert_bias": {"expert_bias_rate": 0.02},
    "aux_loss": {"aux_coef": 0.1},
    "aux_loss_of_each_sequence": {"aux_coef": 0.1, "aux_scope": AuxScope.sequence},
}
MODEL = ModelConfig(
    family=Family.deepseek_v3,  # the family with all three
    hidden_size=32,
    intermediate_size=16,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    num_experts=16,
    top_k=2,
    num_layers=2,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    initializer_range=0.1,
)


def loads(folder: Path, seed: int) -> dict[str, float]:
    """For each way, the busiest expert's load over the mean, of the worst layer, averaged over the last steps."""
    found = {}
    for way, options in WAYS.items():
        optim = {"expert_bias_rate": 0.0, **options}
        cfg = Config(
            run_name=f"{way}-{seed}",
            run_dir=str(folder),
            steps=STEPS,
            seed=seed,
            device=DeviceName.cpu,
            model=MODEL,
            parallel=resolve_parallel(ParallelConfig(fsdp=1), None),
            optim=OptimConfig(lr=1e-2, schedule=ScheduleName.constant, weight_decay=0.0, **optim),
            data=DataConfig(
                text=" ".join(str(number**2) for number in range(400)),
                seq_len=32,
                global_batch_size=8,
                micro_batch_size=8,
            ),
        )
        train(cfg)
        lines = read_metrics(folder / cfg.run_name / "metrics.jsonl")[-LAST:]
        found[way] = statistics.mean(line["expert_load_max_over_mean"] for line in lines)
    return found


@pytest.mark.grid
@pytest.mark.parametrize("seed", SEEDS)
def test_balancing_takes_the_load_to_three_fifths_or_less(seed: int, tmp_path: Path) -> None:
    (found,) = run_distributed(loads, 1, tmp_path, seed, timeout=300)
    print({way: round(load, 2) for way, load in found.items()})
    assert found["none"] > 3, "the run must be uneven without balancing"
    for way, load in found.items():
        assert way == "none" or load <= 0.6 * found["none"], f"{way}: {load:.2f}, {found['none']:.2f} without"
