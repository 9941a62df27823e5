import numpy as np
import pytest

from moe_trainer.data.order import Order, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100, 4097])
def test_a_permutation_has_every_index_once_and_depends_on_the_key(size: int) -> None:
    places = np.arange(size)
    results = [permuted(places, size, key).tolist() for key in ("a", "b")]
    assert all(sorted(result) == list(range(size)) for result in results)
    if size > 7:
        assert results[0] != results[1]
    assert [int(permuted(places[i : i + 1], size, "a")[0]) for i in range(min(size, 50))] == results[0][:50]


def test_every_index_comes_to_every_place_equally_often() -> None:
    counts = np.zeros((6, 6))
    for epoch in range(3000):
        counts[np.arange(6), permuted(np.arange(6), 6, str(epoch))] += 1
    # 500 expected with a deviation of 20: five of them.
    assert counts.min() > 400 and counts.max() < 600


def test_billions_of_samples_cost_no_memory() -> None:
    size = 3 * 10**11
    sources, indices = Order([size], [1.0], 0).samples(size // 3, 64)
    assert set(sources) == {0} and len(set(indices.tolist())) == 64
    assert 0 <= indices.min() and indices.max() < size


def test_the_order_stays_as_it_was() -> None:
    """A changed order would silently repeat and skip samples in every run that is resumed."""
    order = Order([8], [1.0], 0)
    assert order.samples(0, 16)[1].tolist() == [7, 2, 5, 4, 6, 3, 1, 0, 3, 7, 6, 4, 0, 2, 1, 5]
    assert Order([8, 5], [3, 1], 0).samples(0, 12)[0].tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("sizes", [(10, 3), (7, 900, 41)])
def test_a_mixture_has_its_shares_and_each_source_its_own_epochs(sizes: tuple[int, ...]) -> None:
    shares = [0.5, 0.25, 0.25][: len(sizes)]
    order = Order(sizes, shares, 3)
    sources, indices = order.samples(0, 3 * 4096)
    for source, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        own = indices[sources == source]
        assert len(own) == pytest.approx(3 * 4096 * share / sum(shares), abs=3)
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
    # Also within a part of a block: neither source waits for the other.
    part = (sources[:512] == 0).mean()
    assert part == pytest.approx(shares[0] / sum(shares), abs=0.1)


def test_any_stretch_of_the_order_is_the_same_stretch_of_a_longer_one() -> None:
    order = Order([10, 3], [2.0, 1.0], 1)
    sources, indices = order.samples(0, 9000)
    for start, count in ((0, 5), (4090, 20), (8191, 3)):
        some = order.samples(start, count)
        assert some[0].tolist() == sources[start : start + count].tolist()
        assert some[1].tolist() == indices[start : start + count].tolist()


def test_the_smallest_share_is_not_lost() -> None:
    sources, _ = Order([5, 5], [1.0, 1e-9], 0).samples(0, 4097)
    assert (sources == 1).sum() == 1
