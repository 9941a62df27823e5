"""What happens to training runs, and that nothing is lost by it: losses, step by step, as if nothing had been."""

import itertools
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_trainer.checkpoint import manager as manager_module
from moe_trainer.checkpoint import sharded as sharded_module
from moe_trainer.checkpoint.manager import CheckpointManager, find_latest
from moe_trainer.config.choices import DType, OnFailure, ScheduleName
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import (
    CheckpointConfig,
    ChecksConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
)
from moe_trainer.config.validate import resolve_parallel, world_size_of
from moe_trainer.kernels.local_part import local_part
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.loss import LossFn
from moe_trainer.train.trainer import Trainer
from tests.distributed.runs import figures, fit, run_config, train

MESHES = ("one", "fsdp2", "tp2", "fsdp2_tp2")
STEPS = 8
TEXT = "one for the kettle, two for the long road home, three, and four for whoever asks last"


def config(folder: Path, name: str, mesh: str, steps: int = STEPS, **checkpoint: object) -> Config:
    return run_config(
        folder,
        name,
        mesh,
        steps,
        model=ModelConfig(
            hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8
        ),
        optim=OptimConfig(lr=3e-3, schedule=ScheduleName.constant),
        data=DataConfig(text=TEXT, seq_len=16, global_batch_size=4),
        checkpoint=CheckpointConfig(**{"every": 2, "resume": "auto", **checkpoint}),
    )


def go(cfg: Config) -> int:
    return train(cfg).state.step


def losses(folder: Path, name: str) -> list[float]:
    found = figures(folder / name)
    assert figures(folder / name, "step") == list(range(1, len(found) + 1))
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_distributed(go, 1, config(folder, "whole", "one"))
    return losses(folder, "whole")


def die_while_saving(cfg: Config, victim: int, phase: str, save: int) -> None:
    """Kill one rank in a phase of the save of this number."""
    module, name, witness = {
        "before": (CheckpointManager, "start_save", victim),
        "writing": (sharded_module.dcp.FileSystemWriter, "write_data", victim),
        "hashing": (manager_module, "_own_files", victim),
        "published": (CheckpointManager, "_tidy", 0),  # who alone knows of this phase
    }[phase]
    real, calls = getattr(module, name), itertools.count(1)
    processes = [0] * dist.get_world_size()
    dist.all_gather_object(processes, os.getpid())

    def wrapped(*arguments: object, **named: object) -> object:
        if dist.get_rank() == witness and next(calls) == save:
            os.kill(processes[victim], signal.SIGKILL)
        return real(*arguments, **named)

    setattr(module, name, wrapped)
    train(cfg)


@pytest.mark.parametrize(
    ("victim", "phase"),
    [
        (1, "before"),
        (0, "writing"),
        (0, "published"),
        (1, "hashing"),
        pytest.param(0, "before", marks=pytest.mark.grid),
        pytest.param(1, "writing", marks=pytest.mark.grid),
        pytest.param(0, "hashing", marks=pytest.mark.grid),
        pytest.param(1, "published", marks=pytest.mark.grid),
    ],
)
def test_killed_in_each_phase_of_saving(tmp_path: Path, undisturbed: list[float], victim: int, phase: str) -> None:
    cfg = config(tmp_path, "killed", "fsdp2")
    with pytest.raises(RuntimeError, match=f"rank {victim}: died with exit code -9"):
        run_distributed(die_while_saving, 2, cfg, victim, phase, 2, timeout=20)
    newest = find_latest(tmp_path / "killed" / "checkpoints")
    assert newest is not None and newest.name == ("step-00000004" if phase == "published" else "step-00000002")
    run_distributed(go, 2, cfg)
    assert losses(tmp_path, "killed") == pytest.approx(undisturbed, rel=1e-9)


def sleep_too_long(cfg: Config) -> None:
    """Rank 1 sleeps in step 6, for longer than a collective may wait."""
    real = Trainer.train_step

    def step(trainer: Trainer, batch: object) -> object:
        if trainer.state.step == 5 and dist.get_rank() == 1:
            time.sleep(6)
        return real(trainer, batch)

    Trainer.train_step = step
    train(cfg)


def test_after_a_rank_that_slept_too_long_nothing_is_lost(tmp_path: Path, undisturbed: list[float]) -> None:
    cfg = config(tmp_path, "slept", "fsdp2")
    with pytest.raises(RuntimeError, match="(?i)timed out|time-?out"):
        run_distributed(sleep_too_long, 2, cfg, timeout=4)
    run_distributed(go, 2, cfg)
    assert losses(tmp_path, "slept") == pytest.approx(undisturbed, rel=1e-9)


def refuse_writes(cfg: Config) -> str:
    """The disk is full at the save of step 4, on the last rank only."""
    real, calls = sharded_module.dcp.FileSystemWriter.write_data, [0]

    def write(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == 2 and dist.get_rank() == dist.get_world_size() - 1:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    sharded_module.dcp.FileSystemWriter.write_data = write
    try:
        return f"took {go(cfg)} steps"
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_full_disk_is_survived_or_stops_the_run(tmp_path: Path, undisturbed: list[float], asynchronous: bool) -> None:
    cfg = config(tmp_path, "full", "fsdp2", asynchronous=asynchronous)
    assert run_distributed(refuse_writes, 2, cfg) == [f"took {STEPS} steps"] * 2
    assert losses(tmp_path, "full") == pytest.approx(undisturbed, rel=1e-9)
    assert sorted(path.name[-1] for path in (tmp_path / "full" / "checkpoints").glob("step-*")) == ["2", "6", "8"]

    cfg = config(tmp_path, "stopped", "fsdp2", asynchronous=asynchronous, on_failure=OnFailure.stop)
    said = run_distributed(refuse_writes, 2, cfg)
    assert said[0] == said[1] and "step-00000004" in said[0] and "No space left on device" in said[0]
    assert 4 <= len(losses(tmp_path, "stopped")) < STEPS
    assert run_distributed(go, 2, cfg) == [STEPS] * 2
    assert losses(tmp_path, "stopped") == pytest.approx(undisturbed, rel=1e-9)


def poison_one_rank(cfg: Config) -> tuple[int, list[bool]]:
    """One rank's gradient is not a number in step 3; whether each step moved this rank's weights."""
    trainer = Trainer(cfg, torch.device("cpu"))
    trainer.start()
    real_loss = LossFn.__call__

    def poisoned(loss_fn: LossFn, *arguments: object) -> tuple[torch.Tensor, object]:
        loss, losses = real_loss(loss_fn, *arguments)
        return loss * (torch.nan if trainer.state.step == 2 and dist.get_rank() == 1 else 1), losses

    LossFn.__call__ = poisoned
    moved, real = [], trainer.train_step

    def step(batch: object) -> object:
        before = [local_part(tensor).clone() for tensor in trainer._tensors().values()]
        metrics = real(batch)
        after = map(local_part, trainer._tensors().values())
        moved.append(any(not torch.equal(*pair) for pair in zip(before, after, strict=True)))
        return metrics

    trainer.train_step = step
    fit(trainer)
    return trainer.state.skipped_steps, moved


def test_a_gradient_that_is_not_finite_on_one_rank_moves_nobody(tmp_path: Path) -> None:
    skipped = run_distributed(poison_one_rank, 2, config(tmp_path, "nan", "fsdp2", 5))
    assert skipped == [(1, [True, True, False, True, True])] * 2
    assert run_distributed(go, 2, config(tmp_path, "nan", "fsdp2")) == [STEPS] * 2


def flip_one_bit(cfg: Config) -> str:
    trainer = Trainer(cfg, torch.device("cpu"))
    trainer.start()
    real = trainer.train_step

    def step(batch: object) -> object:
        metrics = real(batch)
        if trainer.state.step == 3 and dist.get_rank() == 2:
            weight = local_part(trainer.model.get_parameter("model.norm.weight"))
            weight.view(torch.int64)[0] ^= 1
        return metrics

    trainer.train_step = step
    try:
        fit(trainer)
    except RuntimeError as error:
        return str(error)
    return "nobody noticed"


def test_a_flipped_bit_of_one_replica_is_found(tmp_path: Path) -> None:
    cfg = config(tmp_path, "flipped", "fsdp2_tp2")
    cfg.checks = ChecksConfig(replicas_every=1)
    cfg.parallel = resolve_parallel(ParallelConfig(dp_replicate=4, fsdp=1), None)
    said = set(run_distributed(flip_one_bit, 4, cfg))
    assert len(said) == 1
    assert "step 3: ranks that must hold the same bits do not (1 tensors)" in next(iter(said))
    assert "model.model.norm.weight on rank 2 of ranks 0, 1, 2, 3" in next(iter(said))
    sound = config(tmp_path, "sound", "fsdp2_tp2", 3)
    sound.checks = ChecksConfig(replicas_every=1)
    assert run_distributed(go, 4, sound) == [3] * 4


def run_deterministically(cfgs: list[Config]) -> list[list[torch.Tensor]]:
    torch.use_deterministic_algorithms(True)
    return [[local_part(tensor) for tensor in train(cfg)._tensors().values()] for cfg in cfgs]


def test_two_deterministic_runs_are_equal_bit_for_bit(tmp_path: Path) -> None:
    cfgs = [replace(config(tmp_path, name, "tp2", 4), dtype=DType.float32) for name in ("first", "second")]
    for first, second in run_distributed(run_deterministically, 2, cfgs):
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert losses(tmp_path, "first") == losses(tmp_path, "second")


def run_out_of_memory(cfg: Config) -> str:
    trainer = Trainer(cfg, torch.device("cpu"))
    trainer.start()
    real = trainer.train_step

    def step(batch: object) -> object:
        if trainer.state.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return real(batch)

    trainer.train_step = step
    try:
        fit(trainer)
    except ConfigError as error:
        return str(error)
    return "no error"


def test_out_of_memory_names_what_to_change(tmp_path: Path) -> None:
    cfg = config(tmp_path, "memory", "one")
    cfg.data.micro_batch_size = 2
    said = run_distributed(run_out_of_memory, 1, cfg)[0]
    for part in (
        "rank 0 ran out of memory in step 3",
        "data.micro_batch_size=2 sequences of 16 tokens",
        "x the mean",
    ):
        assert part in said
    assert "data.micro_batch_size=1 (now 2; the global batch stays)" in said and "Tried to allocate 2 GiB" in said


def damage(checkpoint: Path, source: random.Random) -> None:
    """One file of it: a bit, the end, or all of it."""
    path = source.choice([path for path in sorted(checkpoint.rglob("*")) if path.is_file()])
    raw = bytearray(path.read_bytes())
    how = source.choice(["flip", "cut", "remove"])
    if how == "remove":
        path.unlink()
    elif how == "cut":
        path.write_bytes(raw[: source.randrange(len(raw))])
    else:
        raw[source.randrange(len(raw))] ^= 1 << source.randrange(8)
        path.write_bytes(raw)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.grid) for seed in range(1, 8))])
def test_random_saves_crashes_damage_and_meshes_lose_nothing(
    tmp_path: Path, undisturbed: list[float], seed: int
) -> None:
    """Whatever happens in whatever order, the losses are those of the undisturbed run."""
    source, run = random.Random(seed), tmp_path / "any"
    for number in range(5):
        mesh, until = source.choice(MESHES), source.randint(1, STEPS)
        ranks = world_size_of(config(tmp_path, "any", mesh).parallel)
        cfg = config(tmp_path, "any", mesh, until, every=source.randint(1, 3), asynchronous=source.random() < 0.7)
        event = source.choice(["train", "crash", "damage"])
        if event == "crash" and ranks > 1:
            phase = source.choice(["before", "writing", "hashing", "published"])
            try:
                run_distributed(die_while_saving, ranks, cfg, source.randrange(ranks), phase, 1, timeout=20)
            except RuntimeError as error:
                assert "died with exit code -9" in str(error), error
        else:
            run_distributed(go, ranks, cfg)
        newest = find_latest(run / "checkpoints")
        if event == "damage" and newest is not None:
            damage(newest, source)
            if find_latest(run / "checkpoints") is None:  # which is refused until they are moved away
                (run / "checkpoints").rename(run / f"damaged{number}")
    mesh = source.choice(MESHES)
    last = config(tmp_path, "any", mesh)
    run_distributed(go, world_size_of(last.parallel), last)
    assert losses(tmp_path, "any") == pytest.approx(undisturbed, rel=1e-9)
