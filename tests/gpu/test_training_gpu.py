"""On a GPU: activation checkpointing with fused attention and our kernels, and moments in host memory."""

import pytest
import torch

from moe_trainer.config.schema import LoraConfig, ModelConfig, OptimConfig, Recompute
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.lora import add_adapters
from moe_trainer.models.registry import FAMILIES
from moe_trainer.optim.adamw import build_adamw, optimizer_tensors
from moe_trainer.parallel.initialize import initialize
from moe_trainer.testing.compare import relative_error
from moe_trainer.train.recompute import recompute_layers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE = ModelConfig(
    vocab_size=264, hidden_size=256, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=64, num_experts=8
)


def model_on_gpu(lora: LoraConfig | None = None) -> CausalLM:
    model = FAMILIES[SHAPE.family].build(SHAPE)
    if lora is not None:
        add_adapters(model, lora)
    initialize(model, 0, 0.05)
    return model.to("cuda", torch.bfloat16)


def loss_of(model: CausalLM) -> torch.Tensor:
    ids = torch.randint(0, 264, (2, 512), generator=torch.Generator().manual_seed(1)).cuda()
    return model(ids).logits.float().square().mean()


def gradients(kind: Recompute) -> tuple[dict[str, torch.Tensor], int]:
    """And the bytes that the forward pass left behind."""
    model = model_on_gpu()
    recompute_layers(model, kind)
    before = torch.cuda.memory_allocated()
    loss = loss_of(model)
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, kept


def test_recomputation_changes_no_gradient_and_keeps_less() -> None:
    """Not to the bit: fused attention sums its gradients in any order."""
    expected, most = gradients(Recompute.none)
    kept = {}
    for kind in (Recompute.selective, Recompute.full):
        found, kept[kind] = gradients(kind)
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        assert max(errors.values()) < 1e-2, (kind, errors)
    assert kept[Recompute.full] < kept[Recompute.selective] < most


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
