import pytest
import torch
from tokenizers import Tokenizer, models, processors

from moe_trainer.config.errors import ConfigError
from moe_trainer.data.packing import pack, tokenize
from moe_trainer.data.tokenizer import load_tokenizer


def tokens(*lengths):
    """Documents whose tokens count on from one to the next."""
    return list(torch.arange(sum(lengths), dtype=torch.int32).split(list(lengths)))


def test_each_document_ends_with_the_end_of_text():
    one, two = tokenize(["ab", "é"], load_tokenizer("byte"), 257, "byte")
    assert one.tolist() == [97, 98, 256]
    assert two.tolist() == [0xC3, 0xA9, 256]


def test_an_end_of_text_that_the_tokenizer_appends_is_not_doubled():
    tokenizer = load_tokenizer("byte")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 256)]
    )
    assert tokenize(["a"], tokenizer, 257, "byte")[0].tolist() == [97, 256]


def test_a_tokenizer_without_end_adds_nothing():
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    assert tokenize(["a"], tokenizer, 1, "words")[0].tolist() == [0]


def test_token_ids_beyond_the_embedding_are_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"data.tokenizer=byte gives token id 256, but model.vocab_size=256"):
        tokenize(["a"], load_tokenizer("byte"), 256, "byte")


def test_many_documents_keep_their_order():
    texts = [str(number) for number in range(2500)]
    tokenizer = load_tokenizer("byte")
    assert [tokenizer.decode(ids.tolist()) for ids in tokenize(texts, tokenizer, 257, "byte")] == texts


def test_without_seq_len_each_document_is_padded_to_the_longest():
    rows = pack(tokens(3, 5, 2), None)
    assert rows.dtype == torch.int32
    assert rows.tolist() == [[0, 1, 2, -100, -100], [3, 4, 5, 6, 7], [8, 9, -100, -100, -100]]


@pytest.mark.parametrize("total", [2, 4, 5, 6, 7, 8, 9, 23])
def test_windows_make_every_token_but_the_first_a_label_once(total):
    rows = pack(tokens(1, total - 1), 4)
    labels = rows[:, 1:]
    assert labels[labels >= 0].tolist() == list(range(1, total))
    assert (labels >= 0).any(dim=1).all()
    inputs = rows[:, :-1][labels >= 0]
    assert inputs.tolist() == list(range(total - 1))
    # A window shorter than seq_len is padded on the right only; all windows have one length.
    assert rows.shape[1] == min(4, total - 1) + 1


@pytest.mark.parametrize(("lengths", "seq_len"), [((3, 1), None), ((1,), 4), ((0, 3), None)])
def test_a_sample_needs_a_label(lengths, seq_len):
    with pytest.raises(ConfigError, match="at least 2 are needed"):
        pack(tokens(*lengths), seq_len)
