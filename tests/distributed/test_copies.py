"""float32 weights and bfloat16 copies of them, of all weights on a rank alone: every gradient, and later steps."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from moe_trainer.config.choices import Recompute
from moe_trainer.config.schema import LoraConfig, OptimConfig, ParallelConfig
from moe_trainer.kernels.kept_copy import current_copy
from moe_trainer.kernels.local_part import local_part
from moe_trainer.optim.adamw import build_adamw
from moe_trainer.parallel.compute_copy import widen_gradients
from moe_trainer.parallel.fsdp import PRECISE, computed_with_copies
from moe_trainer.testing.compare import relative_error
from moe_trainer.testing.pool import run_distributed
from tests.distributed.reference import Case, batches, mesh, plain_model, sharded_model
from tests.distributed.test_families import MODELS

LORA = LoraConfig(rank=2, targets=["model.layers.*.self_attn.*_proj", "model.layers.*.mlp.experts"])


def case_of(name: str, lora: LoraConfig | None = None, recompute: Recompute = Recompute.none) -> Case:
    options = {"compute": torch.bfloat16, "recompute": recompute}
    return Case(mesh("tp"), torch.float32, MODELS[name], lora=lora or LoraConfig(), **options)


def add_gradients(case: Case, model: nn.Module, step: int, widens_all: bool = False) -> torch.Tensor:
    """Two micro-batches; the loss."""
    total = torch.zeros(())
    ids, labels = batches(case.model, case.seq)[step]
    for half in (slice(0, 4), slice(4, 8)):
        loss, _ = case.loss_fn()(model(ids[half]), labels[half], 100)
        loss.backward()
        widen_gradients(p for p in model.parameters() if widens_all or p not in computed_with_copies(model))
        total += loss.detach()
    return total


def gradients(case: Case, keep: bool) -> dict[str, torch.Tensor]:
    model, _, _ = sharded_model(case, keep)
    add_gradients(case, model, 0)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def reference(case: Case) -> dict[str, torch.Tensor]:
    """The same by a model that is in bfloat16 itself, but for norms and routers."""
    model = plain_model(case)
    for module in model.modules():
        if not isinstance(module, PRECISE):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()
    add_gradients(case, model, 0, widens_all=True)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient(name: str) -> None:
    case = case_of(name)
    expected = reference(case)
    for keep, recompute in ((True, Recompute.none), (False, Recompute.full)):
        found = run_distributed(gradients, 1, replace(case, recompute=recompute), keep)[0]
        assert found.keys() == expected.keys()
        for key, grad in found.items():
            # Autograd adds the two gradients of a tied weight in bfloat16.
            most = 1e-2 if case.model.tie_word_embeddings and key == "model.embed_tokens.weight" else 0
            assert grad.dtype is torch.float32 and relative_error(grad, expected[key].float()) <= most, key


def train(case: Case, keep: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    model, _, _ = sharded_model(case, keep)
    optimizer = build_adamw(model.named_parameters(), OptimConfig(lr=1e-2))
    losses = []
    for step in range(3):
        losses.append(add_gradients(case, model, step).item())
        assert keep == any(current_copy(parameter) is not None for parameter in model.parameters())
        optimizer.step(torch.ones(()))
        optimizer.zero_grad()
    return losses, {name: local_part(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("lora", (None, LORA), ids=("all", "adapters"))
@pytest.mark.parametrize("parallel", (mesh("tp"), mesh("sp_ep", fsdp=2, ep=2)), ids=("alone", "experts apart"))
def test_kept_copies_follow_the_weights(parallel: ParallelConfig, lora: LoraConfig | None) -> None:
    case = replace(case_of("mixtral", lora), parallel=parallel)
    (losses, weights), (expected_losses, expected) = (
        run_distributed(train, parallel.fsdp, case, keep)[0] for keep in (True, False)
    )
    assert losses == expected_losses and len(set(losses)) == 3
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
