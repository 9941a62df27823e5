"""Text to token ids: the project's own byte-level tokenizer, one trained here, or any tokenizer.json."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe_trainer.config.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
_END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|endofdocument|>",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
)


def load_tokenizer(name: str, key: str | None = "data.tokenizer") -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Args:
        name: `byte` for the byte-level tokenizer (257 ids: the byte values and `<|endoftext|>` = 256), otherwise the
            path of a tokenizer.json.
        key: that names it in the config, for errors; None: the path alone says which it is.

    Raises:
        ConfigError: the file is missing or is not a tokenizer.
    """
    if name == "byte":
        return _byte_tokenizer()
    called = name if key is None else f"{key}={name}"
    if not Path(name).is_file():
        raise ConfigError(f"{called}: no such file; give `byte` or the path of a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_str(Path(name).read_text(encoding="utf-8"))  # itself it takes no odd path
    except Exception as error:  # the library raises a bare Exception
        raise ConfigError(f"{called}: not a readable tokenizer.json ({error})") from error
    # Settings of whoever saved the file: a sample is cut and padded by packing alone.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # No file says that special tokens in a text are to be encoded as bytes.
    byte_tokenizer = _byte_tokenizer()
    return byte_tokenizer if digest(tokenizer) == digest(byte_tokenizer) else tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer (Sennrich et al., 2016; Radford et al., 2019) of at most `vocab_size` ids.

    `<|endoftext|>` is id 0; a short text may have fewer pairs to merge than ids to fill.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_texts(texts: list[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Token ids of each text, int32 [tokens], ended by the end-of-text token if the tokenizer has one."""
    end = end_of_text_id(tokenizer)
    encoded = []
    with encoding_errors():
        encodings = tokenizer.encode_batch_fast(texts)
    for encoding in encodings:
        ids = encoding.ids
        if end is not None and ids[-1:] != [end]:  # some tokenizers append it themselves
            ids.append(end)
        encoded.append(np.array(ids, dtype=np.int32))
    return encoded


@contextmanager
def encoding_errors() -> Iterator[None]:
    """What the library raises for a text, as a ConfigError."""
    try:
        yield
    except Exception as error:  # it raises a bare Exception
        raise ConfigError(f"the tokenizer cannot take a text ({error}); mend its tokenizer.json") from error


def digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of what the tokenizer does, however its file is laid out."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def highest_id(tokenizer: Tokenizer) -> int:
    """Of its vocabulary, which may have holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)


def end_of_text_id(tokenizer: Tokenizer) -> int | None:
    """The id of the token that ends a document, by its usual names; None if the tokenizer has none of them."""
    ids = (tokenizer.token_to_id(name) for name in _END_OF_TEXT_NAMES)
    return next((token_id for token_id in ids if token_id is not None), None)


def _byte_tokenizer() -> Tokenizer:
    # ByteLevel writes a printable Latin-1 byte as itself and the others, in order, as U+0100, U+0101, ...
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [ord(character) for character in alphabet if ord(character) < 256]
    others = sorted(set(range(256)) - set(printable))
    vocab = {character: byte for character, byte in zip(alphabet, printable + others, strict=True)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    # A text that spells out the special token is still only bytes.
    tokenizer.encode_special_tokens = True
    return tokenizer
