"""The loss-free expert bias of DeepSeek-V3 in training: the same on every mesh and rank, kept, and of use."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_trainer.config.choices import DeviceName, DType, Family
from moe_trainer.config.schema import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, ParallelConfig
from moe_trainer.config.validate import resolve_parallel, world_size_of
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.trainer import Trainer
from tests.distributed import runs

RATE = 0.01
MODEL = ModelConfig(
    family=Family.deepseek_v3,
    hidden_size=32,
    intermediate_size=16,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    num_experts=8,
    dense_layers=[0],
    dense_intermediate_size=16,
    num_layers=3,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    initializer_range=0.3,
)
MESHES = {
    "fsdp2_ep2": ParallelConfig(fsdp=2, ep=2, sequence_parallel=True, expert_parallel=True),
    "tp2": ParallelConfig(fsdp=1, tp=2, expert_parallel=True),
}


def config(folder: Path, parallel: ParallelConfig, lr: float = 1e-3) -> Config:
    return Config(
        run_dir=str(folder),
        steps=4,
        device=DeviceName.cpu,
        dtype=DType.float64,
        model=MODEL,
        parallel=resolve_parallel(parallel, None),
        optim=OptimConfig(lr=lr, weight_decay=0.0, expert_bias_rate=RATE, schedule_steps=4),
        data=DataConfig(text="and four for whoever asks last", seq_len=8, global_batch_size=4),
        checkpoint=CheckpointConfig(resume="auto"),
    )


def biases(trainer: Trainer) -> torch.Tensor:
    return torch.stack([router.expert_bias for router in trainer.biased_routers]).clone()


def train(cfg: Config, *stops: int) -> list[torch.Tensor]:
    """The biases [sparse layers, num_experts] at each stop, each reached by a trainer of its own."""
    found = []
    for steps in stops:
        found.append(biases(runs.train(replace(cfg, steps=steps))))
    return found


def spread(cfg: Config, steps: int) -> list[float]:
    """Largest load over mean load of the worst layer, after each step."""
    trainer = Trainer(cfg, torch.device("cpu"))
    trainer.start()
    found = []
    for _ in range(steps):
        metrics = trainer.train_step(trainer.loader.batch(trainer.state.samples))
        counts = metrics.losses.expert_counts
        found.append((counts.max(1).values / counts.mean(1)).max().item())
    return found


@pytest.mark.parametrize("mesh", MESHES)
def test_the_same_on_every_mesh_and_kept_when_resumed(mesh: str, tmp_path: Path) -> None:
    one = config(tmp_path / "one", ParallelConfig(fsdp=1))
    (whole,) = run_distributed(train, 1, one, 4)[0]
    assert len(whole) == 2 and whole.unique().numel() > 3
    cfg = config(tmp_path / "many", MESHES[mesh])
    ranks = run_distributed(train, world_size_of(cfg.parallel), cfg, 2, 4)
    for half, resumed in ranks:
        assert half.any() and not torch.equal(half, whole)
        torch.testing.assert_close(resumed, whole, rtol=0, atol=1e-12)
        assert torch.equal(resumed, ranks[0][1])


def test_the_load_gets_even(tmp_path: Path) -> None:
    """The weights hardly move: what changes the choice is the bias alone."""
    cfg = config(tmp_path, ParallelConfig(fsdp=1), lr=1e-12)
    found = run_distributed(spread, 1, cfg, 60)[0]
    assert found[0] > 2
    assert sum(found[-10:]) / 10 < 0.75 * found[0]
    still = replace(cfg, optim=replace(cfg.optim, expert_bias_rate=0.0))
    unmoved = run_distributed(spread, 1, still, 20)[0]
    assert sum(unmoved[-10:]) / 10 > 0.9 * sum(unmoved[:10]) / 10
