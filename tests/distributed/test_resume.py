"""Training goes on from a checkpoint: on the same mesh bit for bit, on any other within rounding."""

import hashlib
import json
import logging
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_trainer.checkpoint.manager import read_document
from moe_trainer.config.choices import Change, DType, ScheduleName
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import CheckpointConfig, Config, DataConfig, OptimConfig
from moe_trainer.config.validate import world_size_of
from moe_trainer.data.tokenizer import load_tokenizer
from moe_trainer.observe.sinks import read_metrics
from moe_trainer.testing.compare import full_tensors
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.trainer import Trainer
from tests.distributed.runs import figures, fit, run_config

# float32 adds rounding to what float64 proves; two meshes show that it stays within bounds.
USED = {
    DType.float64: ("one", "fsdp2", "tp2", "fsdp2_tp2", "tp4", "hsdp2x2"),
    DType.float32: ("one", "fsdp2_tp2"),
}
GRID = [(dtype, mesh) for dtype, meshes in USED.items() for mesh in meshes]
HALF, WHOLE = 5, 10
TEXT = "\n".join(
    json.dumps({"text": text})
    for text in ("one for the kettle", "two for the long road home", "three", "and four for whoever asks last")
)


def config(folder: Path, mesh: str, dtype: DType, **checkpoint: object) -> Config:
    """A small run on uneven documents, with a schedule that has not ended by the last step."""
    return run_config(
        folder,
        mesh,
        mesh,
        WHOLE,
        dtype=dtype,
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
    fit(trainer)
    return before, digest(trainer)


def train_all(cfgs: list[tuple[Config, int]]) -> list[tuple[str, str]]:
    return [train(cfg, steps) for cfg, steps in cfgs]


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

    expected = figures(folder / "whole")
    tolerance = 1e-9 if dtype is DType.float64 else 1e-5
    for (cfg, _), (loaded, _), source in zip(cfgs, results, USED[dtype], strict=True):
        assert loaded == digests[source], f"{cfg.run_name}: weights or moments changed on the way"
        resumed = figures(Path(cfg.run_dir) / cfg.run_name)
        assert resumed == pytest.approx(expected[HALF:], rel=tolerance), cfg.run_name
    assert figures(folder / target) == pytest.approx(expected[:HALF], rel=tolerance)


@pytest.mark.parametrize("mesh", ["one", "fsdp2_tp2"])
def test_on_the_same_mesh_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(trained, mesh):
    dtype = DType.float32
    folder, _ = trained(dtype)
    resume = str(folder / mesh / "checkpoints" / f"step-{HALF:08d}")
    whole = replace(config(folder, mesh, dtype), run_name=f"{mesh}-whole")
    halves = replace(config(folder, mesh, dtype, resume=resume), run_name=f"{mesh}-halves")
    results = run_distributed(train_all, world_size_of(whole.parallel), [(whole, WHOLE), (halves, WHOLE)])[0]
    assert results[0][1] == results[1][1]
    assert figures(folder / whole.run_name)[HALF:] == figures(folder / halves.run_name)


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
    for shard in (folder / "auto" / "checkpoints").rglob("*.distcp"):
        shard.write_bytes(b"")
    assert "holds no undamaged checkpoint (2 damaged)" in run_distributed(refuse, 2, cfg)[0]


def refuse(cfg: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        Trainer(cfg, torch.device("cpu")).start()
    dist.barrier()
    return str(caught.value)


def test_what_changes_the_meaning_is_refused_by_name_unless_allowed(trained, tmp_path):
    dtype = DType.float64
    folder, _ = trained(dtype)
    checkpoint = str(folder / "one" / "checkpoints" / f"step-{HALF:08d}")
    cfg = replace(config(folder, "fsdp2", dtype, resume=checkpoint), run_dir=str(tmp_path))
    wider = replace(cfg, model=replace(cfg.model, intermediate_size=64), seed=1)
    other = replace(cfg, data=DataConfig(text="something else, and long enough", global_batch_size=4))
    tokenizer = load_tokenizer("byte")
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = replace(cfg, data=replace(cfg.data, tokenizer=str(tmp_path / "tokenizer.json")))
    (tmp_path / "data.jsonl").write_text(TEXT.replace("three", "3"))
    moved = replace(cfg, data=replace(cfg.data, path=str(tmp_path / "data.jsonl"), micro_batch_size=2))
    texts = run_distributed(refuse_each, 2, [wider, other, words, moved])[0]
    assert "another model: model.intermediate_size=64 (there 32); another seed: seed=1 (there 0)" in texts[0]
    assert "checkpoint.allow_changes=[model,seed]" in texts[0]
    assert "another data: data.text=something else" in texts[1] and "model.init_from" in texts[1]
    assert "another tokenizer: data.tokenizer" in texts[2]
    assert "another data: data.path=" in texts[3] and "), or the files' content; go back" in texts[3]
    assert "micro_batch_size" not in texts[3]
    allowed = {"seed": Change.seed, "data": Change.data, "tokenizer": Change.tokenizer}
    fine = [replace(cfg, seed=1), other, words]
    for run, change in zip(fine, allowed.values(), strict=True):
        run.checkpoint = replace(cfg.checkpoint, allow_changes=[change])
    steps = run_distributed(start_each, 2, fine)[0]
    assert steps == [(HALF, 1), (HALF, 0), (HALF, 0)]


def refuse_each(cfgs: list[Config]) -> list[str]:
    return [refuse(cfg) for cfg in cfgs]


def start_each(cfgs: list[Config]) -> list[tuple[int, int]]:
    trainers = [Trainer(cfg, torch.device("cpu")) for cfg in cfgs]
    for trainer in trainers:
        trainer.start()
    return [(trainer.state.step, trainer.state.seed) for trainer in trainers]


def say_what_changed(cfg: Config) -> list[str]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("moe_trainer").addHandler(handler)
    logging.getLogger("moe_trainer").setLevel(logging.INFO)
    Trainer(cfg, torch.device("cpu")).start()
    return records


def test_what_may_change_is_said_in_one_line(trained, tmp_path):
    folder, _ = trained(DType.float64)
    cfg = config(folder, "fsdp2_tp2", DType.float64, resume=str(folder / "one"))
    cfg = replace(cfg, run_dir=str(tmp_path), optim=replace(cfg.optim, lr=1e-3))
    line = run_distributed(say_what_changed, 4, cfg)[0][-1]
    assert line.startswith("resumed from ") and "\n" not in line
    for change in ("parallel.fsdp 1 -> 2", "parallel.tp 1 -> 2", "optim.lr 0.003 -> 0.001"):
        assert change in line
    assert "run_name" not in line and "steps" not in line
