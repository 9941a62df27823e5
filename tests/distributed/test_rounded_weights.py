"""Weights and moments in bfloat16, rounded at random: the same on every mesh and copy, and kept by a checkpoint."""

import io
import logging
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from moe_trainer.checkpoint.export import export_checkpoint
from moe_trainer.config.choices import DeviceName, DType, Family
from moe_trainer.config.schema import (
    CheckpointConfig,
    ChecksConfig,
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
)
from moe_trainer.config.validate import resolve_parallel, world_size_of
from moe_trainer.models.lora import is_adapter
from moe_trainer.parallel.compute_copy import widen_gradients
from moe_trainer.testing.compare import full_tensors, relative_error
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.trainer import Trainer

BOTH = {"sequence_parallel": True, "expert_parallel": True}
MESHES = {
    "one": ParallelConfig(fsdp=1),
    "replicate2": ParallelConfig(dp_replicate=2, fsdp=1),
    "tp2": ParallelConfig(fsdp=1, tp=2, sequence_parallel=True),
    "ep2": ParallelConfig(fsdp=2, ep=2, **BOTH),
    "fsdp2 x tp2": ParallelConfig(fsdp=2, tp=2),
}
ROUNDED = {"weights_dtype": DType.bfloat16, "moments_dtype": DType.bfloat16}


def config(folder: Path, mesh: str, steps: int, run: str = "run", micro: int = 2, **optim: Any) -> Config:
    return Config(
        run_name=run,
        run_dir=str(folder),
        steps=steps,
        device=DeviceName.cpu,
        dtype=DType.float32,
        model=ModelConfig(
            family=Family.deepseek_v3, hidden_size=32, intermediate_size=32, num_layers=2, num_heads=4, num_experts=4,
            initializer_range=0.2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        ),
        parallel=resolve_parallel(MESHES[mesh], None),
        optim=OptimConfig(lr=1e-2, schedule_steps=10, eps=1e-4, **optim),
        data=DataConfig(
            text="one for the kettle, two for the road home", seq_len=9, micro_batch_size=micro, global_batch_size=4
        ),
        checkpoint=CheckpointConfig(resume="auto"),
        checks=ChecksConfig(replicas_every=1),
    )  # fmt: skip


def train(cfg: Config) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.dtype], str]:
    """All weights and moments after the start and at the end, whole; the types of the last step's gradients; the log.
    Of the first rank."""
    lines, seen = io.StringIO(), {}
    handler = logging.StreamHandler(lines)
    logging.getLogger("moe_trainer").addHandler(handler)
    logging.getLogger("moe_trainer").setLevel(logging.INFO)
    try:
        trainer = Trainer(cfg, torch.device("cpu"))
        trainer.start()
        before = full_tensors(trainer._tensors())
        step = trainer.optimizer.step

        def watched_step(factor: torch.Tensor) -> None:
            seen.update({name: p.grad.dtype for name, p in trainer.model.named_parameters() if p.grad is not None})
            step(factor)

        trainer.optimizer.step = watched_step
        with redirect_stdout(io.StringIO()):
            trainer.fit()
        return before, full_tensors(trainer._tensors()), seen, lines.getvalue()
    finally:
        logging.getLogger("moe_trainer").removeHandler(handler)


def is_precise(name: str) -> bool:
    return "norm" in name or ".gate." in name


@pytest.fixture(scope="module")
def of_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run_distributed(train, 1, config(tmp_path_factory.mktemp("one"), "one", 1, **ROUNDED))[0][1]


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
def test_a_mesh_rounds_as_one_process_does(mesh: str, of_one: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Sums in another order move a gradient a little, which now and then decides a rounding: of 3% of the weights
    here; other random bits decide 16% to 34%. Copies of a shard are compared bit for bit by the run itself."""
    cfg = config(tmp_path, mesh, 1, micro=1, **ROUNDED)
    before, after, gradients, _ = run_distributed(train, world_size_of(cfg.parallel), cfg)[0]
    for name, value in after.items():
        precise = is_precise(name) and not name.startswith("optim.")
        assert value.dtype is (torch.float32 if precise else torch.bfloat16), name
        if value.dtype is torch.bfloat16 and not name.startswith("optim."):
            assert (value != of_one[name]).double().mean() < 0.06, name
        assert relative_error(value, of_one[name]) < 0.01, name
        assert not torch.equal(value, before[name]) or name.endswith("expert_bias"), name
    is_summed = cfg.data.global_batch_size > cfg.parallel.fsdp * cfg.parallel.dp_replicate
    for name, dtype in gradients.items():
        assert dtype is (torch.float32 if is_summed or is_precise(name) else torch.bfloat16), name


def sums_of_micro_batches(scales: tuple[float, ...]) -> torch.Tensor:
    """The gradient of a bfloat16 weight under FSDP."""
    layer = nn.Linear(4, 4, bias=False).bfloat16()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    layer.set_gradient_divide_factor(1.0)
    layer.set_force_sum_reduction_for_comms(True)
    for scale in scales:
        layer(torch.full((1, 4), scale, dtype=torch.bfloat16)).sum().backward()
        widen_gradients(layer.parameters())
    return layer.weight.grad.to_local()


def test_fsdp_sums_gradients_of_micro_batches_in_float32() -> None:
    for found in run_distributed(sums_of_micro_batches, 2, (128.0, 0.5, 0.5)):  # of two ranks each; 256 + 1 is 256
        assert found.dtype is torch.float32 and found.unique().tolist() == [258.0]


def test_a_resumed_run_is_the_uninterrupted_one_and_goes_on_anywhere(tmp_path: Path) -> None:
    whole = run_distributed(train, 2, config(tmp_path, "ep2", 4, "whole", **ROUNDED))[0][1]
    half = run_distributed(train, 2, config(tmp_path, "ep2", 2, "halves", **ROUNDED))[0][1]
    resumed = run_distributed(train, 2, config(tmp_path, "ep2", 4, "halves", **ROUNDED))[0][1]
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    elsewhere, _, _, log = run_distributed(train, 2, config(tmp_path, "tp2", 5, "halves", **ROUNDED))[0]
    assert all(torch.equal(value, resumed[name]) for name, value in elsewhere.items())
    assert "rounded" not in log and "widened" not in log
    assert not torch.equal(half["model.lm_head.weight"], resumed["model.lm_head.weight"])


def test_float32_and_bfloat16_runs_go_on_from_each_other(tmp_path: Path) -> None:
    wide = run_distributed(train, 1, config(tmp_path, "one", 1))[0][1]
    start, rounded, _, log = run_distributed(train, 2, config(tmp_path, "ep2", 2, **ROUNDED))[0]
    assert all(torch.equal(value, wide[name].to(value.dtype)) for name, value in start.items())
    number = sum(value.dtype is torch.bfloat16 for value in start.values())
    assert f"{number} tensors were rounded to the nearest bfloat16" in log
    assert "optim.weights_dtype auto -> bfloat16, optim.moments_dtype auto -> bfloat16" in log
    start, _, _, log = run_distributed(train, 2, config(tmp_path, "tp2", 3))[0]
    assert all(value.dtype is torch.float32 for value in start.values())
    assert all(torch.equal(value, rounded[name].float()) for name, value in start.items())
    assert f"{number} tensors were widened to float32" in log

    export_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000002", tmp_path / "out", 2**40, DType.auto)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(exported[name], rounded[f"model.{name}"].float())


def test_adapters_stay_float32_on_frozen_bfloat16_weights(tmp_path: Path) -> None:
    cfg = config(tmp_path, "ep2", 2, **ROUNDED)
    cfg.lora = LoraConfig(rank=2, targets=["model.layers.*.self_attn.o_proj", "model.layers.*.mlp.experts"])
    before, after, gradients, _ = run_distributed(train, 2, cfg)[0]
    assert gradients and set(gradients.values()) == {torch.float32} and all(map(is_adapter, gradients))
    for name, value in after.items():
        if name.startswith("model."):
            precise = is_precise(name) or is_adapter(name)
            assert value.dtype is (torch.float32 if precise else torch.bfloat16), name
            assert torch.equal(value, before[name]) != is_adapter(name), name
