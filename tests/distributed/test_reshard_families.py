"""A training checkpoint of each family, saved on one mesh and loaded on another: weights, moments and expert bias are
the same bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_trainer.config.choices import DeviceName, DType
from moe_trainer.config.schema import CheckpointConfig, Config, DataConfig, OptimConfig
from moe_trainer.config.shape import check_divisions
from moe_trainer.config.validate import world_size_of
from moe_trainer.kernels.local_part import local_part
from moe_trainer.testing.compare import full_tensors
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.trainer import Trainer
from tests.distributed.reference import GLOBAL_BATCH, mesh
from tests.distributed.runs import train
from tests.distributed.test_families import MODELS

LAYOUTS = {
    "one": mesh("tp"),
    "tp2 sp_ep": mesh("sp_ep", tp=2),
    "fsdp2": mesh("tp", fsdp=2),
    "tp4": mesh("tp", tp=4),
    "fsdp2 tp2 ep4": mesh("sp_ep", fsdp=2, tp=2, ep=4),
    "dp2 fsdp2 ep2": mesh("sp_ep", dp_replicate=2, fsdp=2, ep=2),
    "dp2 fsdp2 tp2 ep2": mesh("sp_ep", dp_replicate=2, fsdp=2, tp=2),
    "fsdp4 tp2": mesh("sp", fsdp=4, tp=2),
    "fsdp2 tp4 ep8": mesh("sp_ep", fsdp=2, tp=4, ep=8),
}


Tensors = dict[str, torch.Tensor]
Pair = tuple[str, str]
"""The layout that saved, and the one that loads."""
Saved = dict[str, Tensors]
Loaded = dict[Pair, Tensors]


def config(folder: Path, family: str, layout: str, **checkpoint: object) -> Config:
    """One step, after which moments and expert bias are no longer zero."""
    model = replace(MODELS[family], vocab_size=264)  # the byte tokenizer's
    parallel = LAYOUTS[layout]
    check_divisions(model, parallel)
    return Config(
        run_name=layout.replace(" ", "-"),
        run_dir=str(folder),
        steps=1,
        device=DeviceName.cpu,
        dtype=DType.float32,
        model=model,
        parallel=parallel,
        optim=OptimConfig(lr=1e-2, aux_coef=0.1, expert_bias_rate=0.05),
        data=DataConfig(text="and four for whoever asks last", seq_len=8, global_batch_size=GLOBAL_BATCH),
        checkpoint=CheckpointConfig(**checkpoint),
    )


def save(cfg: Config) -> Tensors:
    """Train the step, which saves; the tensors on the first rank."""
    return full_tensors(train(cfg)._tensors())


def load(cfg: Config) -> Tensors:
    """Everything overwritten with a number that no checkpoint holds, then loaded."""
    trainer = Trainer(cfg, torch.device("cpu"))
    for tensor in trainer._tensors().values():
        local_part(tensor).fill_(-7)
    trainer.start()
    return full_tensors(trainer._tensors())


def save_and_load(saved: list[Config], loaded: list[Config]) -> tuple[list[Tensors], list[Tensors]]:
    return [save(cfg) for cfg in saved], [load(cfg) for cfg in loaded]


def run(folder: Path, family: str, world: int, sources: list[str], pairs: list[Pair]) -> tuple[Saved, Loaded]:
    """Save on the sources and then load the pairs, all of `world` ranks, in one start of the ranks."""
    cfgs = [config(folder, family, source) for source in sources]
    resumed = [
        config(folder, family, target, resume=str(folder / source.replace(" ", "-"))) for source, target in pairs
    ]
    saved, loaded = run_distributed(save_and_load, world, cfgs, resumed, timeout=400)[0]
    return dict(zip(sources, saved, strict=True)), dict(zip(pairs, loaded, strict=True))


def compare(family: str, saved: Saved, loaded: Loaded) -> None:
    """Whether every pair's tensors are those that its source saved, and are all that there should be."""
    names = next(iter(saved.values()))
    weights = [name.removeprefix("model.") for name in names if not name.startswith("optim.")]
    weights = [name for name in weights if not name.endswith("expert_bias")]
    assert {f"optim.{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in weights} < names.keys()
    assert any(name.endswith("expert_bias") for name in names) is (family == "deepseek_v3")
    wrong = []
    for (source, target), tensors in loaded.items():
        assert tensors.keys() == saved[source].keys()
        for name, tensor in tensors.items():
            assert saved[source][name].unique().numel() > 1, f"{name}: a wrong part would not show"
            if not torch.equal(tensor, saved[source][name]):
                wrong.append(f"{source} -> {target}: {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("family", MODELS)
def test_from_tensor_and_expert_parallel_to_fsdp(family: str, tmp_path: Path) -> None:
    compare(family, *run(tmp_path, family, 2, ["tp2 sp_ep"], [("tp2 sp_ep", "fsdp2")]))


@pytest.mark.grid
@pytest.mark.parametrize("family", MODELS)
def test_from_every_mesh_to_every_other(family: str, tmp_path: Path) -> None:
    worlds = sorted({world_size_of(parallel) for parallel in LAYOUTS.values()})
    of_world = {world: [name for name, p in LAYOUTS.items() if world_size_of(p) == world] for world in worlds}
    saved: Saved = {}
    for world, sources in of_world.items():
        saved |= run(tmp_path, family, world, sources, [])[0]
    loaded: Loaded = {}
    for world, targets in of_world.items():
        pairs = [(source, target) for target in targets for source in LAYOUTS if source != target]
        loaded |= run(tmp_path, family, world, [], pairs)[1]
    assert len(loaded) == len(LAYOUTS) * (len(LAYOUTS) - 1)
    compare(family, saved, loaded)
