"""A step whose gradients are not finite moves nothing, and a run that had one resumes as if uninterrupted."""

from pathlib import Path

import pytest
import torch

from moe_trainer.config.schema import Config
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate
from moe_trainer.kernels.local_part import local_part
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train import trainer as module
from moe_trainer.train.trainer import Trainer


def config(folder: Path, steps: int) -> Config:
    """DeepSeek: it has an expert bias, which moves outside of the optimizer."""
    mesh = ["parallel.fsdp=1", "parallel.tp=2", "checkpoint.resume=auto"]
    overrides = ["+recipe=deepseek_v3_tiny", f"run_dir={folder}", f"steps={steps}", "device=cpu", *mesh]
    return validate(compose("train", overrides), 2, 0)


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """This rank's parts of weights, biases and moments."""
    return {name: local_part(tensor).clone() for name, tensor in trainer._tensors().items()}


def run(folder: Path) -> tuple[bool, bool, int, bool]:
    """Steps 1 to 3 with the second one bad, saved; then step 4 live and resumed."""
    trainer = Trainer(config(folder, 3), torch.device("cpu"))
    trainer.start()
    step = lambda: trainer.train_step(trainer.loader.batch(trainer.state.samples))  # noqa: E731
    step()
    before = tensors(trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "grad_norm", lambda parameters: torch.tensor(torch.inf))
        step()
    unmoved = all(torch.equal(before[name], value) for name, value in tensors(trainer).items())
    step()
    moved = any(not torch.equal(before[name], value) for name, value in tensors(trainer).items())
    trainer.save()
    skipped = trainer.state.skipped_steps
    step()
    live = tensors(trainer)

    resumed = Trainer(config(folder, 4), torch.device("cpu"))
    resumed.start()
    resumed.train_step(resumed.loader.batch(resumed.state.samples))
    again = tensors(resumed)
    return unmoved, moved, skipped, all(torch.equal(live[name], again[name]) for name in live)


def test_it_moves_nothing_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    assert run_distributed(run, 2, tmp_path) == [(True, True, 1, True)] * 2
