"""Documents to samples of equal length.

A sample is one row of `[samples, seq + 1]`: its inputs are all but the last token, its labels all but the first.
"""

import torch
from tokenizers import Tokenizer

from moe_trainer.config.errors import ConfigError
from moe_trainer.data.tokenizer import end_of_text_id

PADDING = -100
"""Fills a row on the right; as a label it is what cross entropy ignores."""

_ENCODE_AT_ONCE = 1024


def tokenize(documents: list[str], tokenizer: Tokenizer, vocab_size: int, name: str) -> list[torch.Tensor]:
    """Token ids of each document, ended by the end-of-text token if the tokenizer has one.

    Args:
        vocab_size: rows of the model's embedding.
        name: what the user calls the tokenizer, for the error.

    Returns:
        One int32 tensor `[tokens]` for each document.

    Raises:
        ConfigError: a token id that the embedding has no row for.
    """
    end = end_of_text_id(tokenizer)
    tokenized = []
    for start in range(0, len(documents), _ENCODE_AT_ONCE):
        for encoding in tokenizer.encode_batch(documents[start : start + _ENCODE_AT_ONCE]):
            ids = encoding.ids
            if end is not None and ids[-1:] != [end]:  # some tokenizers append it themselves
                ids.append(end)
            tokenized.append(torch.tensor(ids, dtype=torch.int32))
    highest = max(int(tokens.max()) for tokens in tokenized if len(tokens))
    if highest >= vocab_size:
        raise ConfigError(
            f"data.tokenizer={name} gives token id {highest}, but model.vocab_size={vocab_size}: "
            f"set model.vocab_size to at least {highest + 1}"
        )
    return tokenized


def pack(tokenized: list[torch.Tensor], seq_len: int | None) -> torch.Tensor:
    """Cut tokenised documents into samples.

    Args:
        tokenized: int32 `[tokens]` for each document.
        seq_len: inputs of a sample, the documents being concatenated; each token but the very first is a label once.
            None makes each document one sample, padded to the longest.

    Returns:
        int32 `[samples, seq + 1]`, padded on the right with `PADDING`.

    Raises:
        ConfigError: a sample without a label (fewer than two tokens).
    """
    if seq_len is None:
        pieces = tokenized
    else:
        stream = torch.cat(tokenized)
        # A window's last label is the first input of the next one.
        pieces = [stream[start : start + seq_len + 1] for start in range(0, max(len(stream) - 1, 1), seq_len)]
    for number, piece in enumerate(pieces, start=1):
        if len(piece) < 2:
            what = f"document {number}" if seq_len is None else "the whole text"
            raise ConfigError(f"data: {what} has {len(piece)} token(s), at least 2 are needed; use a longer text")
    return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=PADDING)
