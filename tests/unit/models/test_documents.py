"""Documents packed into rows come out as each of them alone."""

import pytest
import torch

from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.documents import Documents
from moe_trainer.models.registry import FAMILIES
from moe_trainer.parallel.initialize import initialize
from tests.distributed.test_families import ALL

LENGTHS = [(5, 1, 7), (13,), (2, 10)]
"""Documents of each row of 13; the last row ends in padding."""
NUMBERS = torch.tensor(
    [[0] * 5 + [1] + [2] * 7, [0] * 13, [0] * 2 + [1] * 11],
    dtype=torch.int32,
)


def model_of(name: str) -> CausalLM:
    made = FAMILIES[ALL[name].family].build(ALL[name]).double()
    initialize(made, 0, 0.3)
    return made


def test_positions_boundaries_and_mask() -> None:
    documents = Documents(NUMBERS, per_row=4)
    assert documents.positions.tolist() == [
        [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5, 6],
        list(range(13)),
        [0, 1, *range(11)],
    ]
    begins = documents.boundaries
    assert begins.dtype == torch.int32
    assert begins.tolist() == [0, 5, 6, 13, 13, 26, 26, 26, 26, 28, 39, 39, 39]
    for window in (None, 3):
        mask = documents.mask(window)
        assert mask.shape == (3, 1, 13, 13)
        for row, numbers in enumerate(NUMBERS.tolist()):
            for query in range(13):
                sees = [key for key in range(query + 1) if numbers[key] == numbers[query]]
                assert mask[row, 0, query].nonzero().flatten().tolist() == sees[-(window or 13) :]


def test_parts_and_devices() -> None:
    parts = Documents(NUMBERS, 4).to("cpu").split(3)
    assert [part.numbers.tolist() for part in parts] == [[row] for row in NUMBERS.tolist()]
    assert [part.boundaries.tolist() for part in parts] == [
        [0, 5, 6, 13, 13],
        [0, 13, 13, 13, 13],
        [0, 2, 13, 13, 13],
    ]


@pytest.mark.parametrize("name", ALL)
def test_packed_documents_are_as_each_alone(name: str) -> None:
    """Logits of every token and the gradients of every weight, with windows and sinks where the family has them."""
    packed, alone = model_of(name), model_of(name)
    ids = torch.randint(ALL[name].vocab_size, NUMBERS.shape, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(*ids.shape, ALL[name].vocab_size, generator=torch.Generator().manual_seed(1)).double()
    logits = packed(ids, documents=Documents(NUMBERS, 3)).logits
    (logits * weights)[NUMBERS >= 0].sum().backward()
    for row in range(3):
        for number in range(int(NUMBERS[row].max()) + 1):
            own = NUMBERS[row] == number
            expected = alone(ids[row, own].unsqueeze(0)).logits[0]
            torch.testing.assert_close(logits[row, own], expected, rtol=1e-9, atol=1e-10)
            (expected * weights[row, own]).sum().backward()
    for (key, ours), theirs in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-9, msg=lambda text, key=key: key + text)


@torch.no_grad()
def test_one_document_a_row_is_no_documents() -> None:
    net = model_of("mixtral")
    ids = torch.arange(26).view(2, 13)
    whole = Documents(torch.zeros(2, 13, dtype=torch.int32), 1)
    torch.testing.assert_close(net(ids, documents=whole).logits, net(ids).logits, rtol=1e-12, atol=1e-12)
