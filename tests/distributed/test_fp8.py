"""Training with products in fp8: what rounding does to gradients, and that meshes add little to it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_trainer.config.choices import Compute, DeviceName, Recompute
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config, DataConfig, ModelConfig, ParallelConfig
from moe_trainer.config.validate import resolve_parallel, world_size_of
from moe_trainer.testing.compare import full_tensors, relative_error
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.trainer import Trainer

BOTH = {"sequence_parallel": True, "expert_parallel": True}
MESHES = {
    "one": ParallelConfig(fsdp=1),
    "fsdp=2": ParallelConfig(fsdp=2),
    "tp=2": ParallelConfig(fsdp=1, tp=2),
    "sp_ep": ParallelConfig(fsdp=1, tp=2, **BOTH),
}


def config(folder: Path, mesh: str, compute: Compute) -> Config:
    return Config(
        run_dir=str(folder),
        steps=1,
        device=DeviceName.cpu,
        compute=compute,
        model=ModelConfig(
            hidden_size=64,
            intermediate_size=64,
            num_layers=2,
            head_dim=16,
            num_experts=4,
            top_k=4,  # all of them: rounding then changes no choice
            initializer_range=0.2,
        ),
        parallel=resolve_parallel(MESHES[mesh], None),
        data=DataConfig(text="one for the kettle, two for the long road home", seq_len=16, global_batch_size=4),
    )


def gradients(cfg: Config) -> dict[str, torch.Tensor]:
    """Of the first step; on the first rank."""
    trainer = Trainer(cfg, torch.device("cpu"))
    trainer.start()
    trainer.train_step(trainer.loader.batch(0))
    moments = {name: value for name, value in trainer._tensors().items() if name.startswith("optim.exp_avg.")}
    return full_tensors(moments)  # the mean after one step is a tenth of the gradient


Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gradients, Gradients]:
    """Of exact products, and of those in fp8."""
    kinds = (Compute.dtype, Compute.fp8)
    configs = [config(tmp_path_factory.mktemp(compute.value), "one", compute) for compute in kinds]
    return tuple(run_distributed(gradients, 1, cfg)[0] for cfg in configs)


def test_products_of_layers_are_rounded(one_process: tuple[Gradients, Gradients]) -> None:
    """Gradients move by a part of themselves, in this small model by up to a third, and not elsewhere."""
    exact, rounded = one_process
    for name, gradient in exact.items():
        assert 0.05 < relative_error(rounded[name], gradient) < 0.5, name
        assert torch.cosine_similarity(rounded[name].flatten(), gradient.flatten(), 0) > 0.9, name


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh != "one"])
def test_meshes(mesh: str, one_process: tuple[Gradients, Gradients], tmp_path: Path) -> None:
    """Whole rows and columns are rounded as in one process; parts of them have finer scales, which changes a gradient
    by less than the rounding does."""
    exact, rounded = one_process
    cfg = replace(config(tmp_path, mesh, Compute.fp8), recompute=Recompute.selective)
    ours = run_distributed(gradients, world_size_of(cfg.parallel), cfg)[0]
    assert ours.keys() == exact.keys()
    for name, gradient in ours.items():
        limit = 1e-4 if mesh == "fsdp=2" else relative_error(rounded[name], exact[name])
        assert relative_error(gradient, rounded[name]) < limit, name


def refused(cfg: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        Trainer(cfg, torch.device("cpu"))
    return str(caught.value)


def test_a_linear_layer_that_fp8_products_do_not_take_is_refused(tmp_path: Path) -> None:
    """On a GPU it would be multiplied in float32, which is many times slower."""
    narrow = config(tmp_path, "tp=2", Compute.fp8)
    narrow.model = replace(narrow.model, head_dim=12)
    for said in run_distributed(refused, 2, narrow):
        assert said.startswith("compute=fp8: model.layers.0.self_attn.q_proj has a weight of 24 x 64 on a rank, and")
