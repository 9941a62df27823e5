"""Text comes out in pieces that add up to the whole."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moe_trainer.data.tokenizer import END_OF_TEXT, load_tokenizer
from moe_trainer.generate.text import TextStream


@pytest.mark.parametrize("text", ["plain words", "größer: 日本語 🙂 e\u0301", "a\ufffdb", " two  spaces\n\n", ""])
def test_pieces_add_up(text: str) -> None:
    tokenizer = load_tokenizer("byte")
    stream = TextStream(tokenizer, tokenizer.encode("The prompt: ").ids)
    pieces = [stream.push(token_id) for token_id in tokenizer.encode(text).ids]
    assert "".join(pieces) + stream.close() == text


def test_a_character_comes_with_its_last_byte() -> None:
    stream = TextStream(load_tokenizer("byte"), [65])
    assert [stream.push(byte) for byte in "é!".encode()] == ["", "é", "!"]


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    stream = TextStream(load_tokenizer("byte"), [65])
    assert [stream.push(byte) for byte in (66, *"é".encode()[:1])] == ["B", ""]
    assert stream.close() == "\ufffd"


def test_the_end_of_text_has_no_text() -> None:
    tokenizer = load_tokenizer("byte")
    stream = TextStream(tokenizer, [65])
    assert stream.push(tokenizer.token_to_id(END_OF_TEXT)) == ""
    assert stream.close() == ""


def test_spaces_before_words_survive() -> None:
    """A tokenizer like Mixtral's marks the start of a word and drops the mark of the first one."""
    vocab = {"▁one": 0, "▁two": 1, "▁three": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([1]) == "two"
    stream = TextStream(tokenizer, tokenizer.encode("one").ids)
    assert [stream.push(token_id) for token_id in (1, 2, 1)] == [" two", " three", " two"]
