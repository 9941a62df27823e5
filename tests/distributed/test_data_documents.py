"""Packed documents on meshes: losses and gradients of one plain process that sees each document alone."""

import pytest
import torch

from moe_trainer.config.schema import ParallelConfig
from moe_trainer.models.documents import Documents
from moe_trainer.testing.compare import assert_close_by_part, full_tensors
from moe_trainer.testing.pool import run_distributed
from tests.distributed.reference import Case, mesh, plain_model, sharded_model
from tests.distributed.test_families import MODELS

NUMBERS = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.int32)
IDS = torch.randint(48, NUMBERS.shape, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(48, NUMBERS.shape, generator=torch.Generator().manual_seed(1))
MESHES = {
    2: [mesh("tp", tp=2), mesh("sp", tp=2), mesh("sp_ep", tp=2), mesh("sp_ep", fsdp=2, ep=2)],
    4: [mesh("sp", tp=4), mesh("sp_ep", fsdp=2, tp=2)],
}
"""Nine positions do not divide by any of them."""


def case(name: str, parallel: ParallelConfig) -> Case:
    return Case(parallel, torch.float64, MODELS[name], aux_coef=0.0)  # balance is of all tokens of a batch together


def packed_gradients(cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    """Of the sum of all tokens' losses, on this rank's mesh."""
    results = []
    for one in cases:
        model, loss_fn, meshes = sharded_model(one)
        rows = slice(meshes.data_rank * 2 // meshes.data_size, (meshes.data_rank + 1) * 2 // meshes.data_size)
        output = model(IDS[rows], documents=Documents(NUMBERS[rows], 4))
        loss_fn(output, LABELS[rows], 1)[0].backward()
        results.append(full_tensors({name: weight.grad for name, weight in model.named_parameters()}))
    return results


def gradients_alone(one: Case) -> dict[str, torch.Tensor]:
    model = plain_model(one)
    for row, numbers in enumerate(NUMBERS):
        for number in numbers.unique():
            own = numbers == number
            output = model(IDS[row, own].unsqueeze(0))
            one.loss_fn()(output, LABELS[row, own].unsqueeze(0), 1)[0].backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("world", [pytest.param(n, marks=[pytest.mark.grid] * (n > 2)) for n in MESHES])
@pytest.mark.parametrize("name", MODELS)
def test_documents_see_only_themselves_on_every_mesh(name: str, world: int) -> None:
    cases = [case(name, parallel) for parallel in MESHES[world]]
    expected = gradients_alone(cases[0])
    for gradients in run_distributed(packed_gradients, world, cases, timeout=200)[0]:
        assert_close_by_part(gradients, expected, 1e-9)
