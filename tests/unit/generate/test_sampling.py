"""What the sampler draws from, and that it draws the same again."""

import pytest
import torch

from moe_trainer.generate.sampling import Sampler

LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()  # likeliest first: 1, 3, 2, 0


def test_zero_temperature_is_greedy() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, -1.0, 4.9]])
    assert Sampler(temperature=0.0, top_k=2, top_p=0.1)(logits).tolist() == [1, 0]


def test_temperature_one_keeps_the_model_s_probabilities() -> None:
    assert torch.allclose(Sampler(1.0).probabilities(LOGITS).float(), LOGITS.exp())


def test_temperature_sharpens_and_flattens() -> None:
    cold, warm = Sampler(0.5).probabilities(LOGITS), Sampler(2.0).probabilities(LOGITS)
    assert torch.allclose(cold.float(), LOGITS.exp() ** 2 / (LOGITS.exp() ** 2).sum())
    assert warm.max() < LOGITS.exp().max() < cold.max()


def test_tiny_temperature_is_finite_and_greedy() -> None:
    assert Sampler(1e-300).probabilities(torch.tensor([[1e3, -1e3, 0.0]])).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-9, [0.0, 1.0, 0.0, 0.0]),  # one token always remains
        (0.39, [0.0, 1.0, 0.0, 0.0]),
        (0.41, [0.0, 4 / 7, 0.0, 3 / 7]),  # the token that crosses the line is kept
        (0.75, [0.0, 4 / 9, 2 / 9, 3 / 9]),
        (1.0, [0.1, 0.4, 0.2, 0.3]),
    ],
)
def test_top_p_keeps_the_fewest_likeliest(top_p: float, expected: list[float]) -> None:
    probabilities = Sampler(1.0, top_p=top_p).probabilities(LOGITS)
    assert torch.allclose(probabilities, torch.tensor([expected], dtype=torch.float64), atol=1e-7)


@pytest.mark.parametrize(("top_k", "kept"), [(1, [1]), (2, [1, 3]), (4, [0, 1, 2, 3]), (100, [0, 1, 2, 3])])
def test_top_k_keeps_the_likeliest(top_k: int, kept: list[int]) -> None:
    probabilities = Sampler(1.0, top_k=top_k).probabilities(LOGITS)
    assert probabilities[0].nonzero().flatten().tolist() == kept
    assert probabilities.sum().item() == pytest.approx(1.0)


def test_top_p_counts_among_the_top_k() -> None:
    # Of the two likeliest the first has 4/7, so it alone reaches 0.5.
    assert Sampler(1.0, top_k=2, top_p=0.5).probabilities(LOGITS)[0].nonzero().flatten().tolist() == [1]


def test_top_k_keeps_one_of_equal_tokens() -> None:
    assert (Sampler(1.0, top_k=1).probabilities(torch.zeros(1, 5)) > 0).sum() == 1


def draws(seed: int, count: int = 200) -> list[int]:
    sampler = Sampler(1.0, seed=seed)
    return [int(sampler(LOGITS)) for _ in range(count)]


def test_the_seed_decides() -> None:
    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    frequencies = torch.tensor(draws(3, 4000)).bincount(minlength=4) / 4000
    assert torch.allclose(frequencies, LOGITS.exp()[0], atol=0.04)
