"""Training goes on from a checkpoint: on the same mesh bit for bit, on any other within rounding."""

import hashlib
import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_trainer.checkpoint.manager import read_document
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DeviceName,
    DType,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ScheduleName,
)
from moe_trainer.config.validate import resolve_parallel, world_size_of
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.testing.compare import full_tensors
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.trainer import Trainer

BOTH = {"sequence_parallel": True, "expert_parallel": True}
MESHES = {
    "one": ParallelConfig(fsdp=1),
    "fsdp2": ParallelConfig(fsdp=2),
    "tp2": ParallelConfig(fsdp=1, tp=2, **BOTH),
    "fsdp2_tp2": ParallelConfig(fsdp=2, tp=2, **BOTH),
    "tp4": ParallelConfig(fsdp=1, tp=4, **BOTH),
    "hsdp2x2": ParallelConfig(dp_replicate=2, fsdp=2),
}
# float32 adds rounding to what float64 proves; two meshes show that it stays within bounds.
USED = {DType.float64: tuple(MESHES), DType.float32: ("one", "fsdp2_tp2")}
GRID = [(dtype, mesh) for dtype, meshes in USED.items() for mesh in meshes]
HALF, WHOLE = 5, 10
TEXT = "\n".join(
    json.dumps({"text": text})
    for text in ("one for the kettle", "two for the long road home", "three", "and four for whoever asks last")
)


def config(folder: Path, mesh: str, dtype: DType, **checkpoint: object) -> Config:
    """A small run on uneven documents, with a schedule that has not ended by the last step."""
    return Config(
        run_name=mesh,
        run_dir=str(folder),
        steps=WHOLE,
        device=DeviceName.cpu,
        dtype=dtype,
        model=ModelConfig(hidden_size=32, intermediate_size=32, num_layers=1, head_dim=8, num_experts=4),
        parallel=resolve_parallel(MESHES[mesh], None),
        optim=OptimConfig(
            lr=3e-3,
            aux_coef=0.05,
            schedule=ScheduleName.cosine,
            warmup_steps=3,
            schedule_steps=WHOLE,
            max_grad_norm=0.8,
        ),
        data=DataConfig(path=str(folder / "data.jsonl"), global_batch_size=4),
        checkpoint=CheckpointConfig(**checkpoint),
    )


def digest(trainer: Trainer) -> str:
    """Of all weights and both moments, whatever the mesh; the first rank's counts."""
    sha = hashlib.sha256()
    for name, tensor in sorted(full_tensors(trainer._tensors()).items()):
        sha.update(name.encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def train(cfg: Config, steps: int) -> tuple[str, str]:
    """Start, train until `steps`; digests before and after."""
    trainer = Trainer(replace(cfg, steps=steps), torch.device("cpu"))
    trainer.start()
    before = digest(trainer)
    with redirect_stdout(io.StringIO()):
        trainer.fit()
    return before, digest(trainer)


def train_all(cfgs: list[tuple[Config, int]]) -> list[tuple[str, str]]:
    return [train(cfg, steps) for cfg, steps in cfgs]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """For a type: each mesh's run saved at half way and its digest, and the uninterrupted run of one process."""

    @cache
    def train_meshes(dtype: DType) -> tuple[Path, dict[str, str]]:
        folder = tmp_path_factory.mktemp(dtype.value)
        (folder / "data.jsonl").write_text(TEXT)
        digests = {}
        for mesh in USED[dtype]:
            cfg = config(folder, mesh, dtype)
            digests[mesh] = run_distributed(train, world_size_of(cfg.parallel), cfg, HALF)[0][1]
        run_distributed(train, 1, replace(config(folder, "one", dtype), run_name="whole"), WHOLE)
        return folder, digests

    return train_meshes


@pytest.mark.parametrize(("dtype", "target"), GRID)
def test_every_mesh_goes_on_from_every_other(trained, dtype, target):
    folder, digests = trained(dtype)
    cfgs = []
    for source in USED[dtype]:
        cfg = config(folder, target, dtype, resume=str(folder / source / "checkpoints" / f"step-{HALF:08d}"))
        cfgs.append((replace(cfg, run_name=f"{source}-to-{target}"), WHOLE))
    results = run_distributed(train_all, world_size_of(cfgs[0][0].parallel), cfgs, timeout=120)[0]

    expected = losses(folder / "whole")
    tolerance = 1e-9 if dtype is DType.float64 else 1e-5
    for (cfg, _), (loaded, _), source in zip(cfgs, results, USED[dtype], strict=True):
        assert loaded == digests[source], f"{cfg.run_name}: weights or moments changed on the way"
        resumed = losses(Path(cfg.run_dir) / cfg.run_name)
        assert resumed == pytest.approx(expected[HALF:], rel=tolerance), cfg.run_name
    assert losses(folder / target) == pytest.approx(expected[:HALF], rel=tolerance)


@pytest.mark.parametrize("mesh", ["one", "fsdp2_tp2"])
def test_on_the_same_mesh_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(trained, mesh):
    dtype = DType.float32
    folder, _ = trained(dtype)
    resume = str(folder / mesh / "checkpoints" / f"step-{HALF:08d}")
    whole = replace(config(folder, mesh, dtype), run_name=f"{mesh}-whole")
    halves = replace(config(folder, mesh, dtype, resume=resume), run_name=f"{mesh}-halves")
    results = run_distributed(train_all, world_size_of(whole.parallel), [(whole, WHOLE), (halves, WHOLE)])[0]
    assert results[0][1] == results[1][1]
    assert losses(folder / whole.run_name)[HALF:] == losses(folder / halves.run_name)


def test_auto_goes_on_with_the_same_folder_and_keeps_the_horizon(trained):
    dtype = DType.float64
    folder, _ = trained(dtype)
    cfg = replace(config(folder, "fsdp2", dtype, resume="auto"), run_name="auto")
    cfg.optim = replace(cfg.optim, schedule_steps=None)
    run_distributed(train, 2, cfg, HALF)
    run_distributed(train, 2, cfg, WHOLE)
    state = json.loads(read_document(folder / "auto" / "checkpoints" / f"step-{WHOLE:08d}", "state.json"))
    assert (state["step"], state["samples"], state["schedule_steps"]) == (WHOLE, 4 * WHOLE, HALF)
    assert [line["step"] for line in read_metrics(folder / "auto" / "metrics.jsonl")] == list(range(1, WHOLE + 1))
    assert state["tokens"] == read_metrics(folder / "auto" / "metrics.jsonl")[-1]["tokens"]


def refuse(cfg: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        Trainer(cfg, torch.device("cpu")).start()
    dist.barrier()
    return str(caught.value)


def test_another_model_or_other_data_are_refused_by_name(trained):
    dtype = DType.float64
    folder, _ = trained(dtype)
    checkpoint = str(folder / "one" / "checkpoints" / f"step-{HALF:08d}")
    cfg = config(folder, "fsdp2", dtype, resume=checkpoint)
    wider = replace(cfg, model=replace(cfg.model, intermediate_size=64))
    for text in run_distributed(refuse, 2, wider):
        assert "model.intermediate_size=64 (there 32)" in text
    other = replace(cfg, data=DataConfig(text="something else, and long enough", global_batch_size=4))
    for text in run_distributed(refuse, 2, other):
        assert "data.path" in text and "model.init_from" in text
