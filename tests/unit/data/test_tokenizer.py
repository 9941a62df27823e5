from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from moe_trainer.config.errors import ConfigError
from moe_trainer.data.tokenizer import digest, encode_texts, end_of_text_id, load_tokenizer, train_tokenizer

TEXTS = [
    "Plain words, it's so . ",
    " leading and  double spaces\t\r\n\n",
    "Grüße 漢字 🐉 é \u200b",
    "\x00\x7f",
    "spelled out: <|endoftext|>!",
    "".join(chr(code) for code in range(0x250)),
]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_tokens_are_the_bytes_and_decode_to_the_text(text):
    tokenizer = load_tokenizer("byte")
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text


def test_every_byte_value_has_its_id():
    tokenizer = load_tokenizer("byte")
    assert tokenizer.get_vocab_size() == 257
    assert end_of_text_id(tokenizer) == 256
    # 0xff never occurs in UTF-8, so no text reaches these ids; the decoder still has to know them.
    assert "\ufffd" in tokenizer.decode([0xFF, 0xFE])


def test_the_byte_tokenizer_is_itself_when_read_from_a_file(tmp_path):
    path = str(tmp_path / "caf\udce9.json")  # a name that is no UTF-8, which the library cannot open
    Path(path).write_text(load_tokenizer("byte").to_str())
    assert load_tokenizer(path).encode("a<|endoftext|>").ids == list(b"a<|endoftext|>")


@pytest.mark.parametrize("text", TEXTS[:4])
def test_saved_tokenizer_loads_here_and_in_transformers(tmp_path, text):
    path = str(tmp_path / "tokenizer.json")
    load_tokenizer("byte").save(path)
    ids = list(text.encode("utf-8"))
    assert load_tokenizer(path).encode(text).ids == ids
    theirs = PreTrainedTokenizerFast(tokenizer_file=path)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    tokenizer = load_tokenizer("byte")
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(str(tmp_path / "tokenizer.json")).encode("four").ids) == 4


@pytest.mark.parametrize("name", ["</s>", "<|end_of_text|>", "<eos>", "<|im_end|>"])
def test_end_of_text_goes_by_many_names(name):
    assert end_of_text_id(Tokenizer(models.WordLevel({"a": 0, name: 7}, unk_token="a"))) == 7


def test_a_tokenizer_without_an_end():
    assert end_of_text_id(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))) is None


def test_unreadable_files_are_the_users_mistake(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_tokenizer(str(tmp_path / "missing.json"))
    bad = tmp_path / "tokenizer.json"
    bad.write_text("{}")
    with pytest.raises(ConfigError, match="data.tokenizer=.*tokenizer.json"):
        load_tokenizer(str(bad))


def test_each_document_ends_with_the_end_of_text():
    one, two = encode_texts(["ab", "é"], load_tokenizer("byte"))
    assert one.tolist() == [97, 98, 256]
    assert two.tolist() == [0xC3, 0xA9, 256]


def test_an_end_of_text_that_the_tokenizer_appends_is_not_doubled():
    tokenizer = load_tokenizer("byte")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 256)]
    )
    assert encode_texts(["a"], tokenizer)[0].tolist() == [97, 256]


def test_a_tokenizer_without_end_adds_nothing():
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    assert encode_texts(["a"], tokenizer)[0].tolist() == [0]


def test_many_documents_keep_their_order():
    texts = [str(number) for number in range(2500)]
    tokenizer = load_tokenizer("byte")
    assert [tokenizer.decode(ids[:-1].tolist()) for ids in encode_texts(texts, tokenizer)] == texts


def test_a_trained_tokenizer_knows_its_words_and_every_byte(tmp_path):
    tokenizer = train_tokenizer(["a patient river, a patient river"] * 9, 290)
    assert end_of_text_id(tokenizer) == 0
    assert len(tokenizer.encode(" patient").ids) < 4
    for text in TEXTS[:4]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert digest(train_tokenizer(["a patient river, a patient river"] * 9, 290)) == digest(tokenizer)


def test_the_digest_is_of_the_tokenizer_and_not_of_its_file(tmp_path):
    tokenizer = train_tokenizer(["some words"], 270)
    for pretty in (True, False):
        tokenizer.save(str(tmp_path / "tokenizer.json"), pretty=pretty)
        assert digest(load_tokenizer(str(tmp_path / "tokenizer.json"))) == digest(tokenizer)
    assert digest(train_tokenizer(["other words"], 270)) != digest(tokenizer)
