"""A run on prepared, packed, mixed data is the same on every mesh, and goes on on another where it was."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_trainer.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DeviceName,
    DType,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrepareConfig,
)
from moe_trainer.config.validate import resolve_parallel, world_size_of
from moe_trainer.data.prepare import prepare
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.trainer import Trainer

BOTH = {"sequence_parallel": True, "expert_parallel": True}
MESHES = {
    "one": ParallelConfig(fsdp=1),
    "sp2": ParallelConfig(fsdp=1, tp=2, sequence_parallel=True),
    "fsdp2_sp_ep2": ParallelConfig(fsdp=2, tp=2, **BOTH),
}
HALF, WHOLE = 3, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prepared folders of short documents, the first with some held out."""
    made = tmp_path_factory.mktemp("data")
    for name, words in (("a", "one for the kettle"), ("b", "three for whoever asks last")):
        lines = [json.dumps({"text": f"{words} {number}"[: 5 + number]}) for number in range(30)]
        (made / f"{name}.jsonl").write_text("\n".join(lines))
        share = 0.2 if name == "a" else 0.0
        prepare(PrepareConfig([str(made / f"{name}.jsonl")], validation_share=share, shard_tokens=200), made / name)
    return made


def config(folder: Path, mesh: str, **checkpoint: object) -> Config:
    return Config(
        run_name=mesh,
        run_dir=str(folder),
        steps=WHOLE,
        device=DeviceName.cpu,
        dtype=DType.float64,
        model=ModelConfig(hidden_size=32, intermediate_size=16, num_layers=1, head_dim=8, sliding_window=9),
        parallel=resolve_parallel(MESHES[mesh], None),
        optim=OptimConfig(lr=3e-3, aux_coef=0.05, schedule_steps=WHOLE),
        data=DataConfig(mixture={str(folder / "a"): 2, str(folder / "b"): 1}, seq_len=19, global_batch_size=4),
        checkpoint=CheckpointConfig(**checkpoint),
    )


def train(cfgs: list[Config]) -> None:
    for cfg in cfgs:
        trainer = Trainer(cfg, torch.device("cpu"))
        trainer.start()
        with redirect_stdout(io.StringIO()):
            trainer.fit()


def figures(cfg: Config, name: str) -> list[float]:
    lines = read_metrics(Path(cfg.run_dir) / cfg.run_name / "metrics.jsonl")
    return [line[name] for line in lines if name in line]


def test_losses_and_samples_do_not_depend_on_the_mesh(folder: Path) -> None:
    runs = {}
    for mesh in MESHES:
        cfg = config(folder, mesh)
        resumed = replace(config(folder, mesh, resume=str(folder / "half")), run_name=f"half-{mesh}")
        if mesh == "one":
            half = replace(cfg, run_name="half", steps=HALF)
            run_distributed(train, 1, [half])
        run_distributed(train, world_size_of(cfg.parallel), [cfg, resumed], timeout=120)
        runs[mesh] = cfg, resumed
    whole = runs["one"][0]
    expected = figures(whole, "loss")
    assert len(expected) == WHOLE and figures(whole, "val_loss")
    for cfg, resumed in runs.values():
        assert figures(cfg, "loss") == pytest.approx(expected, rel=1e-9), cfg.run_name
        assert figures(resumed, "loss") == pytest.approx(expected[HALF:], rel=1e-9), resumed.run_name
        for one in (cfg, resumed):
            assert figures(one, "val_loss")[-1] == pytest.approx(figures(whole, "val_loss")[-1], rel=1e-9)
            assert figures(one, "tokens")[-1] == figures(whole, "tokens")[-1]
