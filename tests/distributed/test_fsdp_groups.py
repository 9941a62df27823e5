"""Which layers FSDP gathers and reduces together changes no bit."""

from dataclasses import replace

import pytest
import torch

from moe_trainer.config.choices import Recompute
from moe_trainer.parallel import fsdp as module
from moe_trainer.parallel.fsdp import layer_groups
from moe_trainer.testing.pool import run_distributed
from tests.distributed.reference import MODEL, Case, Outcome, check, mesh, plain_model, train_all
from tests.distributed.test_recompute import same_bits

DEEP = replace(MODEL, num_layers=5)
BYTES_OF_A_LAYER = 8 * (2 * 32 * 64 + 2 * 32 * 32)  # q, o, k and v


def train_in_groups(limits: list[int], case: Case) -> list[Outcome]:
    """The same steps with groups of at most each number of bytes."""
    outcomes, usual = [], module._GROUP_BYTES
    try:
        for limit in limits:
            module._GROUP_BYTES = limit
            outcomes += train_all([case])
    finally:
        module._GROUP_BYTES = usual
    return outcomes


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.full])
def test_one_by_one_in_pairs_and_all_together(recompute: Recompute, reshard: bool) -> None:
    """Two ranks: a sum of two numbers has one order."""
    parallel = replace(mesh("sp_ep", fsdp=2, ep=2), reshard_after_forward=reshard)
    case = Case.accumulating(parallel, torch.float64, DEEP, steps=3)
    limits = [BYTES_OF_A_LAYER * layers for layers in (1, 2, 4)]
    single, *others = run_distributed(train_in_groups, 2, limits, replace(case, recompute=recompute))[0]
    assert [same_bits(other, single) for other in others] == [[], []]


def test_groups_of_layers_give_what_one_process_gives() -> None:
    kept = mesh("sp_ep", fsdp=2, ep=2)
    resharding = replace(kept, reshard_after_forward=True)
    check([Case.accumulating(parallel, torch.float64, DEEP) for parallel in (kept, resharding)], 2)
    check([Case.accumulating(mesh("sp_ep", fsdp=2, tp=2), torch.float64, DEEP)], 4)


def test_the_first_layer_is_alone_and_the_rest_are_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_model(Case(mesh("tp"), torch.float64, DEEP))
    layers = list(model.model.layers)
    for limit, sizes in ((1, [1] * 5), (2, [1, 2, 2]), (3, [1, 3, 1]), (4, [1, 4])):
        monkeypatch.setattr(module, "_GROUP_BYTES", BYTES_OF_A_LAYER * limit)
        groups = layer_groups(layers, 8)
        assert [len(group) for group in groups] == sizes and sum(groups, []) == layers
        assert all(len(group) == 1 for group in layer_groups(layers, 8 * 5))
