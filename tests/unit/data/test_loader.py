import random

import pytest
import torch

from moe_trainer.config.choices import Packing
from moe_trainer.config.errors import ConfigError
from moe_trainer.data.loader import Loader
from moe_trainer.data.packing import Samples
from tests.unit.data.corpora import counting, numbered


def loaders(count, data_size, global_batch=12, micro_batch=2, seed=5):
    return [Loader([numbered(count)], global_batch, micro_batch, seed, rank, data_size) for rank in range(data_size)]


def micro_batches(ranks, position):
    """The global batch from a position on as the list of its micro-batches, undoing the deal."""
    batches = [rank.batch(position).split(rank.grad_accum_steps) for rank in ranks]
    parts = [[part.input_ids[:, 0].tolist() for part in batch] for batch in batches]
    return [part for parts_of_a_step in zip(*parts, strict=True) for part in parts_of_a_step]


@pytest.mark.parametrize("count", [1, 5, 12, 40])
@pytest.mark.parametrize("data_size", [2, 3, 6])
def test_the_order_does_not_depend_on_the_number_of_ranks(count, data_size):
    for position in (0, 12, 84):
        assert micro_batches(loaders(count, data_size), position) == micro_batches(loaders(count, 1), position)


@pytest.mark.parametrize("trial", range(20))
def test_each_sample_comes_once_an_epoch_over_any_meshes_and_resumes(trial):
    """A run that changes its mesh, its micro-batch and its global batch, and starts anew between any two steps."""
    dice = random.Random(trial)
    count = dice.choice([1, 7, 20, 33])
    seen, position, ranks = [], 0, []
    while position < 5 * count:
        if not ranks or dice.random() < 0.5:
            data_size, micro_batch, steps = dice.choice([1, 2, 3]), dice.choice([1, 2]), dice.choice([1, 2])
            ranks = loaders(count, data_size, data_size * micro_batch * steps, micro_batch, seed=trial)
        seen += sum(micro_batches(ranks, position), [])
        position += ranks[0].global_batch_size
    epochs = [seen[start : start + count] for start in range(0, 5 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 1:
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_is_a_pure_function_of_seed_and_position():
    loader, again = loaders(20, 1)[0], loaders(20, 1)[0]
    later = loader.batch(9).input_ids
    loader.batch(0)
    torch.manual_seed(3)
    assert torch.equal(again.batch(9).input_ids, later)
    assert torch.equal(loader.batch(9).input_ids, later)
    assert not torch.equal(loaders(20, 1, seed=6)[0].batch(9).input_ids, later)
    again.batch(0)  # what was made ahead of time with the old seed is not dealt
    again.seed = 6
    assert torch.equal(again.batch(12).input_ids, loaders(20, 1, seed=6)[0].batch(12).input_ids)


def test_the_next_batch_is_made_while_this_one_is_used(monkeypatch):
    loader = loaders(20, 1)[0]
    made = []
    deal = loader._deal
    monkeypatch.setattr(loader, "_deal", lambda position: made.append(position) or deal(position))
    loader.batch(0)
    loader._ahead[1].result()
    assert made == [0, 12]
    following = loader.batch(12)
    loader._ahead[1].result()
    assert made == [0, 12, 24]
    assert torch.equal(following.input_ids, loaders(20, 1)[0].batch(12).input_ids)
    assert loader.data_seconds < 1


def test_a_mistake_in_the_thread_reaches_the_caller(monkeypatch):
    loader = loaders(20, 1)[0]
    loader.batch(0)
    loader._ahead[1].result()
    monkeypatch.setattr(Samples, "__getitem__", lambda self, index: 1 / 0)
    loader.batch(12)
    with pytest.raises(ZeroDivisionError):
        loader.batch(24)


def test_packed_documents_travel_with_their_batch():
    samples = Samples([counting(5, 2, 6, 4, 4, 4)], 4, Packing.documents)
    batch = Loader([samples], 6, 1, 0, 0, 1, shuffles=False).batch(0)
    assert batch.documents.numbers.tolist() == [
        [0, 0, 0, 0],
        [0, 1, 1, 2],
        [0, 0, 0, 0],
        [0, 1, 1, 1],
        [0, 1, 1, 1],
        [0, 1, 1, 1],
    ]
    assert batch.documents.per_row == 4
    parts = batch.to("cpu").split(3)
    assert parts[1].documents.numbers.tolist() == batch.documents.numbers[2:4].tolist()
    whole = Samples([counting(9)], 4, Packing.documents)
    assert Loader([whole], 2, 1, 0, 0, 1).batch(0).documents is None


def test_another_batch_size_goes_on_from_the_same_position():
    small, large = loaders(20, 1, global_batch=4)[0], loaders(20, 1, global_batch=12)[0]
    rows = torch.cat([small.batch(position).input_ids for position in (8, 12, 16)])
    assert torch.equal(rows, large.batch(8).input_ids)


def test_every_rank_knows_the_labels_of_the_whole_batch():
    samples = Samples([counting(5, 2, 6, 3)], 4, Packing.documents)
    ranks = [Loader([samples], 4, 1, 0, rank, 2) for rank in range(2)]
    for position in (0, 4, 8):
        before = [rank.num_tokens(position) for rank in ranks]
        counted = sum(int((rank.batch(position).labels != -100).sum()) for rank in ranks)
        assert [*before, *(rank.num_tokens(position) for rank in ranks)] == [counted] * 4


def test_a_mixture_takes_from_each_source_by_its_share():
    few, many = numbered(3), numbered(50, first=1000)
    batch = Loader([few, many], 4096, 1, 0, 0, 1, shares=[1, 3]).batch(0)
    assert (batch.input_ids[:, 0] < 1000).sum() == 1024
    assert batch.input_ids[:, 0].unique().tolist() == [0, 1, 2, *range(1000, 1050)]


@pytest.mark.parametrize("data_size", [1, 2])
def test_without_shuffling_every_sample_comes_once_and_then_nothing(data_size):
    sources = [numbered(3), numbered(4, first=10)]
    ranks = [Loader(sources, 4, 1, 0, rank, data_size, shuffles=False) for rank in range(data_size)]
    assert ranks[0].num_batches == 2
    labels = []
    for position in (0, 4):
        batches = [rank.batch(position) for rank in ranks]
        rows = [batch.labels[j, 0].item() for j in range(4 // data_size) for batch in batches]
        assert {rank.num_tokens(position) for rank in ranks} == {2 * sum(label != -100 for label in rows)}
        labels += rows
    assert labels == [0, 1, 2, 10, 11, 12, 13, -100]


@pytest.mark.parametrize("sizes", [(8, 3, 1), (8, 2, 3), (0, 1, 1), (4, 0, 1)])
def test_sizes_that_do_not_divide(sizes):
    global_batch, micro_batch, data_size = sizes
    with pytest.raises(ConfigError, match="data.global_batch_size"):
        Loader([numbered(4)], global_batch, micro_batch, 0, 0, data_size)


def test_the_fingerprint_knows_the_data_and_nothing_else():
    prints = {loader.fingerprint() for size in (1, 2) for loader in loaders(20, size, seed=size)}
    assert len(prints) == 1
    others = [([numbered(21)], None), ([numbered(20, first=1)], None), ([numbered(20)] * 2, [1, 1])]
    others.append(([numbered(20)] * 2, [1, 2]))
    prints |= {Loader(sources, 8, 1, 0, 0, 1, shares=shares).fingerprint() for sources, shares in others}
    assert len(prints) == 5
