"""Text to token ids: the project's own byte-level tokenizer, or any tokenizer.json."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

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


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Args:
        name: `byte` for the byte-level tokenizer (257 ids: the byte values and `<|endoftext|>` = 256), otherwise the
            path of a tokenizer.json.

    Raises:
        ConfigError: the file is missing or is not a tokenizer.
    """
    if name == "byte":
        return _byte_tokenizer()
    if not Path(name).is_file():
        raise ConfigError(f"data.tokenizer={name}: no such file; give `byte` or the path of a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(name)
    except Exception as error:  # the library raises a bare Exception
        raise ConfigError(f"data.tokenizer={name}: not a readable tokenizer.json ({error})") from error
    # Settings of whoever saved the file: a sample is cut and padded by packing alone.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


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
