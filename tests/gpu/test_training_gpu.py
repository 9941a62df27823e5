"""On a GPU: activation checkpointing with fused attention and our kernels, moments in host memory, and weights and
moments in bfloat16."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_trainer.config.choices import DType, Family, Recompute
from moe_trainer.config.schema import LoraConfig, ModelConfig, OptimConfig
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate
from moe_trainer.kernels.kept_copy import current_copy
from moe_trainer.kernels.local_part import local_part
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.lora import add_adapters
from moe_trainer.models.registry import FAMILIES
from moe_trainer.optim.adamw import build_adamw, optimizer_tensors
from moe_trainer.parallel.gpus import count_places
from moe_trainer.parallel.initialize import initialize
from moe_trainer.testing.compare import relative_error
from moe_trainer.testing.pool import run_distributed
from moe_trainer.train.memory import states_of
from moe_trainer.train.recompute import recompute_layers
from moe_trainer.train.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

SHAPE = ModelConfig(
    vocab_size=264, hidden_size=256, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=64, num_experts=8
)

WITH_SINKS = replace(
    SHAPE, family=Family.gpt_oss, attention_bias=True, sliding_window=128, sliding_layers=[0], num_layers=2
)


def model_on_gpu(lora: LoraConfig | None = None, shape: ModelConfig = SHAPE) -> CausalLM:
    model = FAMILIES[shape.family].build(shape)
    if lora is not None:
        add_adapters(model, lora)
    initialize(model, 0, 0.05)
    return model.to("cuda", torch.bfloat16)


def loss_of(model: CausalLM) -> torch.Tensor:
    ids = torch.randint(0, 264, (4, 1024), generator=torch.Generator().manual_seed(1)).cuda()
    return model(ids).logits.float().square().mean()


def gradients(kind: Recompute, shape: ModelConfig = SHAPE) -> tuple[dict[str, torch.Tensor], int]:
    """And the bytes that the forward pass left behind."""
    model = model_on_gpu(shape=shape)
    recompute_layers(model, kind)
    before = torch.cuda.memory_allocated()
    loss = loss_of(model)
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, kept


@pytest.mark.parametrize("shape", (SHAPE, WITH_SINKS), ids=("plain", "sinks"))
def test_recomputation_changes_no_gradient_and_keeps_less(shape: ModelConfig) -> None:
    """Not to the bit: fused attention sums its gradients in any order."""
    expected, most = gradients(Recompute.none, shape)
    kept = {}
    for kind in (Recompute.selective, Recompute.full):
        found, kept[kind] = gradients(kind, shape)
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        assert max(errors.values()) < 1e-2, (kind, errors)
    assert kept[Recompute.full] < kept[Recompute.selective] < most


@pytest.mark.skipif(not IS_HOPPER, reason="the kernel is for Hopper")
@pytest.mark.parametrize(("kind", "products"), [(Recompute.none, 4), (Recompute.selective, 5), (Recompute.full, 6)])
def test_recomputation_keeps_the_first_product_of_our_own_kernel(
    kind: Recompute, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two products a layer forward, two backward, and those that are made again."""
    from moe_trainer.kernels.gpu import ping_pong

    launched: list[str] = []
    launch = ping_pong._launch
    record = lambda kind, *args, **more: (launched.append(kind), launch(kind, *args, **more))[1]  # noqa: E731
    monkeypatch.setattr(ping_pong, "_launch", record)
    gradients(kind)
    assert len(launched) - launched.count("outer") == products * SHAPE.num_layers


def test_moments_in_host_memory_give_the_same_bits() -> None:
    results = []
    for offload in (False, True):
        model = model_on_gpu().float()
        optimizer = build_adamw(model.named_parameters(), OptimConfig(lr=1e-2, offload=offload))
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()
            optimizer.step(torch.tensor(float("nan") if step == 2 else 0.5, device="cuda"))
            optimizer.zero_grad()
        moments = optimizer_tensors(optimizer, model.named_parameters())
        if offload:
            assert all(moment.is_pinned() for moment in moments.values())
        results.append({**dict(model.named_parameters()), **moments})
    assert all(torch.equal(value.cpu(), results[1][name].cpu()) for name, value in results[0].items())


def test_fresh_adapters_add_nothing() -> None:
    """The experts run other kernels then, which round differently."""
    lora = LoraConfig(rank=8, targets=["model.layers.*.self_attn.*_proj", "model.layers.*.mlp.experts"])
    expected, found = loss_of(model_on_gpu()), loss_of(model_on_gpu(lora))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize("offload", [False, True])
def test_a_gpu_rounds_weights_and_moments_as_a_cpu_does(offload: bool) -> None:
    """The same random bits; the rest is float32 on both, whose last bit now and then decides a rounding."""
    found = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(70, 300).bfloat16().to(device))
        optim = OptimConfig(lr=1e-2, moments_dtype=DType.bfloat16, offload=offload)
        optimizer = build_adamw([("a.weight", weight)], optim)
        for step in range(5):
            grad = torch.randn(70, 300, generator=torch.Generator().manual_seed(step))
            weight.grad = grad.bfloat16().to(device)
            optimizer.step(torch.tensor(float("nan") if step == 2 else 0.5, device=device))
        state = optimizer.state[weight]
        found.append([tensor.detach().cpu() for tensor in (weight, state["exp_avg"], state["exp_avg_sq"])])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype is torch.bfloat16
        assert (ours != theirs).double().mean() < 0.01
        assert relative_error(ours, theirs) < 1e-3


ROUNDED = ["optim.weights_dtype=bfloat16", "optim.moments_dtype=bfloat16"]
MESHES = {1: ["parallel.tp=1"], 2: ["parallel.tp=1", "parallel.fsdp=2", "parallel.ep=2", "data.micro_batch_size=4"]}


def learn(options: list[str], folder: Path) -> tuple[list[float], float, float, set[torch.dtype]]:
    """Losses of the tiny recipe; bytes a parameter on this rank, found and as the plan says; types of gradients."""
    world = dist.get_world_size()
    given = ["+recipe=qwen3_moe_tiny", "device=cuda", f"run_dir={folder}", *MESHES[world], *options]
    cfg = validate(compose("train", given), world, count_places())
    device = torch.device("cuda", torch.cuda.current_device())
    trainer = Trainer(cfg, device)
    trainer.start()
    step, gradients = trainer.optimizer.step, {}

    def watched_step(factor: torch.Tensor) -> None:
        gradients.update({name: local_part(p.grad) for name, p in trainer.model.named_parameters()})
        step(factor)

    trainer.optimizer.step = watched_step
    batches = (trainer.loader.batch(trainer.state.samples).to(device) for _ in range(cfg.steps))
    losses = torch.stack([trainer.train_step(batch).losses.loss for batch in batches]).tolist()
    tensors = [*map(local_part, trainer._tensors().values()), *gradients.values()]
    said = states_of(trainer.model, cfg, trainer.precision, device)
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / said.parameters
    types = {tensor.dtype for name, tensor in gradients.items() if "norm" not in name and "gate.weight" not in name}
    return losses, held, (said.weights + said.gradients + said.moments) / said.parameters, types


@pytest.mark.parametrize("world", MESHES)
def test_eight_bytes_a_parameter_learn_what_sixteen_do(world: int, tmp_path: Path) -> None:
    if count_places() < world:
        pytest.skip("needs more GPUs")
    wide, rounded, summed = (
        run_distributed(learn, world, options, tmp_path, timeout=150, device="cuda")[0]
        for options in ([], ROUNDED, [*ROUNDED, "data.micro_batch_size=2", "data.global_batch_size=8", "steps=3"])
    )
    assert rounded[1] == rounded[2] < 8.1 and summed[1] == summed[2] and 10 < summed[1] < 10.1
    assert wide[1] == wide[2] <= 16
    assert rounded[3] == {torch.bfloat16} and summed[3] == {torch.float32}
    print(f"{world} GPUs: {wide[0][-1]:.4f} with {wide[1]:.1f} bytes, {rounded[0][-1]:.4f} with {rounded[1]:.1f}")
    assert rounded[0][-1] < 0.05 and abs(rounded[0][50] - wide[0][50]) < 0.1 * wide[0][0]


def copies_after_steps(folder: Path) -> list[dict[str, int]]:
    """Addresses of the copies that are kept of the weights, after each of three steps."""
    cfg = validate(compose("train", ["+recipe=qwen3_moe_tiny", "device=cuda", f"run_dir={folder}", *MESHES[1]]), 1, 1)
    trainer = Trainer(cfg, torch.device("cuda", 0))
    trainer.start()
    places = []
    for _ in range(3):
        trainer.train_step(trainer.loader.batch(trainer.state.samples).to(trainer.device))
        copies = {name: current_copy(parameter) for name, parameter in trainer.model.named_parameters()}
        copies = {name: copy for name, copy in copies.items() if copy is not None}
        weights = dict(trainer.model.named_parameters())
        assert all(torch.equal(copy, weights[name].bfloat16()) for name, copy in copies.items())
        places.append({name: copy.data_ptr() for name, copy in copies.items()})
    narrow = {n for n in weights if "norm" not in n and "gate.weight" not in n}
    assert places[0].keys() == narrow, "norms and routers have none"
    return places


def test_the_optimizer_writes_what_the_next_step_computes_with(tmp_path: Path) -> None:
    first, second, third = run_distributed(copies_after_steps, 1, tmp_path, timeout=120, device="cuda")[0]
    assert first == second == third
