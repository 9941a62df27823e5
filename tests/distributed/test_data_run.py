"""A run on prepared, packed, mixed data is the same on every mesh, and goes on on another where it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moe_trainer.config.schema import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, PrepareConfig
from moe_trainer.config.validate import world_size_of
from moe_trainer.data.prepare import prepare
from moe_trainer.testing.pool import run_distributed
from tests.distributed.runs import figures, run_config, train_each

MESHES = ("one", "sp2", "fsdp2_tp2")
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
    return run_config(
        folder,
        mesh,
        mesh,
        WHOLE,
        model=ModelConfig(hidden_size=32, intermediate_size=16, num_layers=1, head_dim=8, sliding_window=9),
        optim=OptimConfig(lr=3e-3, aux_coef=0.05, schedule_steps=WHOLE),
        data=DataConfig(mixture={str(folder / "a"): 2, str(folder / "b"): 1}, seq_len=19, global_batch_size=4),
        checkpoint=CheckpointConfig(**checkpoint),
    )


def test_losses_and_samples_do_not_depend_on_the_mesh(folder: Path) -> None:
    for mesh in MESHES:
        cfg = config(folder, mesh)
        resumed = replace(config(folder, mesh, resume=str(folder / "half")), run_name=f"half-{mesh}")
        first = [replace(cfg, run_name="half", steps=HALF)] if mesh == "one" else []
        run_distributed(train_each, world_size_of(cfg.parallel), [*first, cfg, resumed], timeout=120)
    expected = {name: figures(folder / "one", name) for name in ("loss", "val_loss", "tokens")}
    assert len(expected["loss"]) == WHOLE and expected["val_loss"]
    for mesh in MESHES:
        whole, resumed = folder / mesh, folder / f"half-{mesh}"
        assert figures(whole) == pytest.approx(expected["loss"], rel=1e-9), mesh
        assert figures(resumed) == pytest.approx(expected["loss"][HALF:], rel=1e-9), mesh
        for run in (whole, resumed):
            assert figures(run, "val_loss")[-1] == pytest.approx(expected["val_loss"][-1], rel=1e-9), run
            assert figures(run, "tokens")[-1] == expected["tokens"][-1], run
