"""What the sampler draws from, and that it draws the same again."""

import pytest
import torch

from moe_trainer.generate.sampling import Sampler, Sampling

LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()  # likeliest first: 1, 3, 2, 0


def probabilities(temperature: float, top_k: int | None = None, top_p: float = 1.0) -> torch.Tensor:
    return Sampler(Sampling(temperature, top_k, top_p), [0], 1).probabilities(LOGITS)


def test_temperature_one_keeps_the_model_s_probabilities() -> None:
    assert torch.allclose(probabilities(1.0).float(), LOGITS.exp())


def test_temperature_sharpens_and_flattens() -> None:
    cold, warm = probabilities(0.5), probabilities(2.0)
    assert torch.allclose(cold.float(), LOGITS.exp() ** 2 / (LOGITS.exp() ** 2).sum())
    assert warm.max() < LOGITS.exp().max() < cold.max()


def test_tiny_temperature_is_finite_and_greedy() -> None:
    sampler = Sampler(Sampling(1e-300), [0], 1)
    assert sampler.probabilities(torch.tensor([[1e3, -1e3, 0.0]])).tolist() == [[1.0, 0.0, 0.0]]


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
    assert torch.allclose(probabilities(1.0, top_p=top_p), torch.tensor([expected], dtype=torch.float64), atol=1e-7)


@pytest.mark.parametrize(("top_k", "kept"), [(1, [1]), (2, [1, 3]), (4, [0, 1, 2, 3]), (100, [0, 1, 2, 3])])
def test_top_k_keeps_the_likeliest(top_k: int, kept: list[int]) -> None:
    drawn_from = probabilities(1.0, top_k)
    assert drawn_from[0].nonzero().flatten().tolist() == kept
    assert drawn_from.sum().item() == pytest.approx(1.0)


def test_top_p_counts_among_the_top_k() -> None:
    # Of the two likeliest the first has 4/7, so it alone reaches 0.5.
    assert probabilities(1.0, 2, 0.5)[0].nonzero().flatten().tolist() == [1]


def test_top_k_keeps_one_of_equal_tokens() -> None:
    assert (Sampler(Sampling(1.0, top_k=1), [0], 1).probabilities(torch.zeros(1, 5)) > 0).sum() == 1


def draws(seeds: list[int], count: int = 200) -> list[list[int]]:
    """What each sequence draws."""
    sampler = Sampler(Sampling(1.0), seeds, count)
    return torch.stack([sampler(LOGITS.expand(len(seeds), -1)) for _ in range(count)], dim=1).tolist()


def test_the_seed_decides() -> None:
    assert draws([3]) == draws([3])
    assert draws([3]) != draws([4])
    frequencies = torch.tensor(draws([3], 4000)[0]).bincount(minlength=4) / 4000
    assert torch.allclose(frequencies, LOGITS.exp()[0], atol=0.04)


def test_a_sequence_draws_the_same_in_every_batch_and_for_every_length() -> None:
    three, four = draws([3], 300)[0], draws([4])[0]
    assert draws([4, 3]) == [four, three[:200]]


def test_no_draw_falls_on_what_was_cut() -> None:
    sampler = Sampler(Sampling(1.0, top_k=2), [0], 3)
    for number in (0.0, 0.5, 1 - 1e-12):
        sampler._uniform.fill_(number)
        assert int(sampler(LOGITS)) in (1, 3)
