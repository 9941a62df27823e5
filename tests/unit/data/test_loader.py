import pytest
import torch

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config, DataConfig, ModelConfig
from moe_trainer.data.loader import Loader, build_loader


def numbered(count):
    """Samples `[count, 3]` whose first input is their number."""
    return torch.arange(count, dtype=torch.int32)[:, None] * torch.tensor([1, 1, 1], dtype=torch.int32)


def loaders(count, data_size, global_batch=12, micro_batch=2, seed=5):
    return [Loader(numbered(count), global_batch, micro_batch, seed, rank, data_size) for rank in range(data_size)]


def micro_batches(ranks, step):
    """The global batch of a step as the list of its micro-batches, undoing the deal."""
    batches = [rank.batch(step * rank.global_batch_size).split(rank.grad_accum_steps) for rank in ranks]
    parts = [[part.input_ids[:, 0].tolist() for part in batch] for batch in batches]
    return [part for parts_of_a_step in zip(*parts, strict=True) for part in parts_of_a_step]


@pytest.mark.parametrize("count", [1, 5, 12, 40])
@pytest.mark.parametrize("data_size", [2, 3, 6])
def test_the_order_does_not_depend_on_the_number_of_ranks(count, data_size):
    for step in (0, 1, 7):
        assert micro_batches(loaders(count, data_size), step) == micro_batches(loaders(count, 1), step)


@pytest.mark.parametrize("data_sizes", [(1, 1, 1), (2, 6, 3)])
def test_each_epoch_has_every_sample_once_whatever_mesh_goes_on(data_sizes):
    steps = [step for step in range(15)]  # 180 samples are 9 epochs of 20
    seen = []
    for step in steps:
        ranks = loaders(20, data_sizes[step * len(data_sizes) // len(steps)])
        seen += sum(micro_batches(ranks, step), [])
    epochs = [seen[start : start + 20] for start in range(0, 180, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 9


def test_a_batch_is_a_pure_function_of_seed_and_position():
    loader, again = loaders(20, 1)[0], loaders(20, 1)[0]
    later = loader.batch(9).input_ids
    loader.batch(0)
    torch.manual_seed(3)
    assert torch.equal(again.batch(9).input_ids, later)
    assert torch.equal(loader.batch(9).input_ids, later)
    assert not torch.equal(loaders(20, 1, seed=6)[0].batch(9).input_ids, later)


def test_the_order_stays_as_it_was():
    """A changed order would silently repeat and skip samples in every run that is resumed."""
    loader = Loader(numbered(8), 8, 1, 0, 0, 1)
    assert [loader.batch(position).input_ids[:, 0].tolist() for position in (0, 8)] == [
        [0, 3, 1, 7, 6, 2, 5, 4],
        [7, 6, 3, 0, 4, 2, 5, 1],
    ]


def test_inputs_labels_and_padding():
    rows = torch.tensor([[7, 8, -100, -100]], dtype=torch.int32)
    batch = Loader(rows, 2, 1, 0, 0, 1).batch(0)
    assert batch.input_ids.tolist() == [[7, 0, 0]] * 2
    assert batch.labels.tolist() == [[8, -100, -100]] * 2
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.to("cpu").split(2)[1].labels.shape == (1, 3)


def test_another_batch_size_goes_on_from_the_same_position():
    small, large = loaders(20, 1, global_batch=4)[0], loaders(20, 1, global_batch=12)[0]
    rows = torch.cat([small.batch(position).input_ids for position in (8, 12, 16)])
    assert torch.equal(rows, large.batch(8).input_ids)


def test_every_rank_knows_the_labels_of_the_whole_batch():
    rows = torch.tensor([[7, 8, -100, -100], [1, 2, 3, 4], [1, 2, 3, -100]], dtype=torch.int32)
    ranks = [Loader(rows, 4, 1, 0, rank, 2) for rank in range(2)]
    for position in (0, 4, 8):
        counted = sum(int((rank.batch(position).labels != -100).sum()) for rank in ranks)
        assert [rank.num_tokens(position) for rank in ranks] == [counted, counted]


@pytest.mark.parametrize("sizes", [(8, 3, 1), (8, 2, 3), (0, 1, 1), (4, 0, 1)])
def test_sizes_that_do_not_divide(sizes):
    global_batch, micro_batch, data_size = sizes
    with pytest.raises(ConfigError, match="data.global_batch_size"):
        Loader(numbered(4), global_batch, micro_batch, 0, 0, data_size)


def test_the_fingerprint_knows_the_data_and_nothing_else():
    prints = {loader.fingerprint() for size in (1, 2) for loader in loaders(20, size, seed=size)}
    assert len(prints) == 1
    changed = numbered(20)
    changed[3, 1] += 1
    for samples in (changed, numbered(20).view(30, 2), numbered(21)):
        assert Loader(samples, 8, 1, 0, 0, 1).fingerprint() not in prints


def test_one_sentence_repeated_over_the_batch():
    sentence = "x" * 199
    cfg = Config(data=DataConfig(text=sentence))
    loader, tokenizer = build_loader(cfg, 264, data_rank=1, data_size=2)
    batch = loader.batch(3)
    assert batch.input_ids.shape == (4, 199)
    assert loader.grad_accum_steps == 4
    assert loader.seq_len == 199
    assert tokenizer.decode(batch.input_ids[0].tolist()) == sentence
    assert (batch.labels[:, -1] == 256).all()


def test_a_text_longer_than_the_model_is_cut_to_its_context():
    cfg = Config(data=DataConfig(text="x" * 99), model=ModelConfig(max_position_embeddings=50))
    assert build_loader(cfg, 264, 0, 1)[0].samples.shape == (2, 51)
    cfg.data.seq_len = 33
    assert build_loader(cfg, 264, 0, 1)[0].samples.shape == (3, 34)
