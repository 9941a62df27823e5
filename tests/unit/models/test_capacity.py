import math

import pytest
import torch

from moe_trainer.models.capacity import within_capacity


def one_by_one(top_k_index: torch.Tensor, num_experts: int, factor: float) -> torch.Tensor:
    """Positions, then sequences, then choices, each taken while its expert has room."""
    batch, seq, top_k = top_k_index.shape
    room = [math.ceil(factor * top_k_index.numel() / num_experts)] * num_experts
    limited = top_k_index.clone()
    for position in range(seq):
        for row in range(batch):
            for choice in range(top_k):
                expert = int(top_k_index[row, position, choice])
                room[expert] -= 1
                if room[expert] < 0:
                    limited[row, position, choice] = num_experts
    return limited


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, 9.0])
@pytest.mark.parametrize("shape", [(3, 11, 2), (1, 1, 1), (2, 0, 2)])
def test_as_one_by_one(shape: tuple[int, int, int], factor: float) -> None:
    uneven = torch.rand(shape, generator=torch.Generator().manual_seed(0)).square() * 6
    index = uneven.long()
    limited = within_capacity(index, 6, factor)
    assert torch.equal(limited, one_by_one(index, 6, factor))
    assert (limited == 6).any() == (factor < 9 and index.numel() > 1 and not torch.equal(limited, index))
