import numpy as np
import pytest

from moe_trainer.config.choices import Packing
from moe_trainer.config.errors import ConfigError
from moe_trainer.data.packing import Samples
from moe_trainer.data.shards import Encoded, Shard
from tests.unit.data.corpora import counting, rows

N = -100


def test_without_seq_len_each_document_is_padded_to_the_longest() -> None:
    inputs, labels, documents = rows(Samples([counting(3, 5), counting(2)], None, Packing.documents))
    assert inputs == [[0, 1, 0, 0], [3, 4, 5, 6], [0, 0, 0, 0]]
    assert labels == [[1, 2, N, N], [4, 5, 6, 7], [1, N, N, N]]
    assert documents == [[0] * 4] * 3


def test_documents_that_share_a_sample_are_numbered_and_their_first_tokens_are_no_labels() -> None:
    inputs, labels, documents = rows(Samples([counting(5, 2, 6)], 4, Packing.documents))
    assert inputs == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert labels == [[1, 2, 3, 4], [N, 6, N, 8], [9, 10, 11, 12]]
    assert documents == [[0, 0, 0, 0], [0, 1, 1, 2], [0, 0, 0, 0]]


def test_concatenated_documents_are_one() -> None:
    _, labels, documents = rows(Samples([counting(5, 2, 6)], 4, Packing.concatenate))
    assert labels == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert documents == [[0] * 4] * 3


def test_padding_belongs_to_the_last_document() -> None:
    _, labels, documents = rows(Samples([counting(2, 4)], 8, Packing.documents))
    assert labels == [[1, N, 3, 4, 5, N, N, N]]
    assert documents == [[0, 0, 1, 1, 1, 1, 1, 1]]


def test_a_sample_can_be_found_in_its_shard() -> None:
    samples = Samples([counting(2, 4), counting(5, 2, 6)], 4, Packing.documents)
    assert [samples.place(index) for index in range(len(samples))] == [
        {"shard": 0, "documents": [0, 1], "tokens": [0, 5]},
        {"shard": 0, "documents": [1, 1], "tokens": [4, 6]},
        {"shard": 1, "documents": [0, 0], "tokens": [0, 5]},
        {"shard": 1, "documents": [0, 2], "tokens": [4, 9]},
        {"shard": 1, "documents": [2, 2], "tokens": [8, 13]},
    ]


@pytest.mark.parametrize("total", [2, 4, 5, 6, 7, 8, 9, 23])
@pytest.mark.parametrize("packing", Packing)
def test_every_token_but_the_first_of_a_document_is_a_label_once(total: int, packing: Packing) -> None:
    inputs, labels, _ = rows(Samples([counting(1, total - 1), counting(3)], 4, packing))
    learned = [label for row in labels for label in row if label != N]
    first = {Packing.documents: 2, Packing.concatenate: 1}[packing]
    assert learned == [*range(first, total), 1, 2]
    assert all(len(row) == 4 for row in inputs)


def test_only_targets_are_learned() -> None:
    ids = np.arange(6)
    chat = Encoded(ids, np.array([0, 0, 1, 1, 0, 1], dtype=bool))
    samples = Samples([Shard.of([chat, Encoded(ids[:3])])], None, Packing.documents)
    assert rows(samples)[1] == [[N, 2, 3, N, 5], [1, 2, N, N, N]]
    assert [samples.num_labels(index) for index in range(2)] == [3, 2]


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("seq_len", [1, 3, 7, 50, None])
def test_labels_are_counted_without_the_tokens(seq_len: int | None, packing: Packing) -> None:
    generator = np.random.default_rng(0)
    documents = [
        Encoded(generator.integers(0, 9, length), generator.random(length) < 0.5) for length in (2, 9, 4, 3, 30, 2)
    ]
    samples = Samples([Shard.of(documents[:4]), Shard.of(documents[4:])], seq_len, packing)
    for index in range(len(samples)):
        assert samples.num_labels(index) == (samples[index].labels != N).sum()


def test_the_fingerprint_knows_the_data_and_how_it_is_cut() -> None:
    shard, same = counting(3, 5), counting(3, 5)
    prints = {
        Samples(shards, seq_len, packing).fingerprint()
        for shards in ([shard], [counting(8)], [counting(3), counting(5)])
        for seq_len in (None, 2, 3)
        for packing in Packing
    }
    assert len(prints) == 18
    assert Samples([same], 2, Packing.documents).fingerprint() in prints
    shard.tokens[3] += 1
    assert Samples([Shard.of([Encoded(shard.tokens)])], 2, Packing.documents).fingerprint() not in prints


def test_a_token_above_the_highest_is_refused() -> None:
    """A damaged file, whose token the embedding may have no row for."""
    shard = counting(4, 4)
    shard.highest_token = 6
    samples = Samples([shard], 4, Packing.documents)
    assert samples[0].inputs.tolist() == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="token id 7 where 6 is the highest: .*moe-data verify"):
        samples[1]


@pytest.mark.parametrize(("lengths", "seq_len"), [((3, 1), None), ((1,), 4), ((3, 0), None)])
def test_a_sample_needs_a_label(lengths: tuple[int, ...], seq_len: int | None) -> None:
    with pytest.raises(ConfigError, match="at least 2 are needed"):
        Samples([counting(*lengths)], seq_len, Packing.documents)
