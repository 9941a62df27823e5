"""Shards to samples of equal length.

A sample is a stretch of a shard: its inputs are all but the last token, its labels all but the first. With `seq_len`
the stretches follow each other, a stretch's last label being the first input of the next; without it each document is
one, padded to the longest.

    shard       | A A A A A | B B | C C C C C C |        packing=documents        packing=concatenate
    inputs        A A A A     A B B C     C C C C
    labels        A A A A     - B - C     C C C C        - : not learned          A B B C
    documents     0 0 0 0     0 1 1 2     0 0 0 0        see only their own       0 0 0 0
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_trainer.config.choices import Packing
from moe_trainer.config.errors import ConfigError
from moe_trainer.data.order import ORDER
from moe_trainer.data.shards import Shard

IGNORED = -100
"""A label that is not learned: padding, a prompt, the start of another document."""


class Sample(NamedTuple):
    """One row of a batch."""

    inputs: np.ndarray
    """[seq] int64."""
    labels: np.ndarray
    """[seq] int64, `IGNORED` where nothing is learned."""
    documents: np.ndarray
    """[seq] int32: numbers that rise from document to document, from 0 on; one where they see each other."""


class Samples:
    """The samples of one source, made when they are asked for."""

    def __init__(self, shards: Sequence[Shard], seq_len: int | None, packing: Packing) -> None:
        """
        Args:
            seq_len: inputs of a sample; None: each document is one.

        Raises:
            ConfigError: no label at all, or a document that would be a sample without one.
        """
        self.shards = shards
        self.packing = packing
        self._by_document = seq_len is None
        if self._by_document:
            lengths = np.concatenate([np.diff(shard.ends, prepend=0) for shard in shards])
            if (lengths < 2).any():
                number = int((lengths < 2).argmax())
                raise _too_short(f"document {number + 1} has {lengths[number]} token(s)")
            seq_len = int(lengths.max()) - 1
            counts = [len(shard.ends) for shard in shards]
        else:
            counts = [-(-(len(shard.tokens) - 1) // seq_len) for shard in shards]
            if not sum(counts):
                raise _too_short(f"the whole text has {sum(len(shard.tokens) for shard in shards)} token(s)")
        self.seq_len = seq_len
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        """The sample, padded on the right.

        Raises:
            ConfigError: a token id that the shard says it has not, and the embedding may have no row for.
        """
        shard, start, stop = self._stretch(index)
        inputs = np.zeros(self.seq_len, dtype=np.int64)  # any valid id will do where the label is padding
        labels = np.full(self.seq_len, IGNORED, dtype=np.int64)
        documents = np.zeros(self.seq_len, dtype=np.int32)
        length = stop - start - 1
        tokens = shard.tokens[start:stop].astype(np.int64)
        if (highest := int(tokens.max())) > shard.highest_token:
            raise ConfigError(
                f"data: token id {highest} where {shard.highest_token} is the highest: a file of tokens is damaged; "
                "moe-data verify path=DIR tells which, prepare it again"
            )
        inputs[:length] = tokens[:-1]
        numbers, is_learned = self._numbers(shard, start, stop), self._learned(shard, start, stop)
        labels[:length][is_learned] = tokens[1:][is_learned]
        if self.packing is Packing.documents:
            documents[:length] = numbers[:-1]
            documents[length:] = numbers[-2]
        return Sample(inputs, labels, documents)

    def place(self, index: int) -> dict[str, list[int] | int]:
        """Where the sample lies, all numbers from 0 on: its shard, and there the first and last document that it
        touches and the tokens from its first input to its last label, the end excluded."""
        shard, start, stop = self._stretch(index)
        first, last = np.searchsorted(shard.ends, (start, stop - 1), side="right").tolist()
        number = next(number for number, other in enumerate(self.shards) if other is shard)
        return {"shard": number, "documents": [first, last], "tokens": [start, stop]}

    def num_labels(self, index: int) -> int:
        """Labels of the sample that are learned, found without its tokens."""
        return int(self._learned(*self._stretch(index)).sum())

    def fingerprint(self) -> str:
        """Tells changed data or another cut of it; the seed, batch sizes and ranks do not matter."""
        cut = "documents" if self._by_document else self.seq_len
        parts = (ORDER, cut, self.packing.value, [shard.digest for shard in self.shards])
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _stretch(self, index: int) -> tuple[Shard, int, int]:
        """The shard of a sample and its tokens, from the first input to the last label."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self.shards[number]
        place = index - (int(self._ends[number - 1]) if number else 0)
        if self._by_document:
            return shard, int(shard.ends[place - 1]) if place else 0, int(shard.ends[place])
        start = place * self.seq_len
        return shard, start, min(start + self.seq_len + 1, len(shard.tokens))

    def _numbers(self, shard: Shard, start: int, stop: int) -> np.ndarray:
        """[stop - start] the tokens' documents, counted from the first in the stretch."""
        first, last = np.searchsorted(shard.ends, (start, stop - 1), side="right")
        numbers = np.zeros(stop - start, dtype=np.int32)
        numbers[shard.ends[first:last] - start] = 1
        return numbers.cumsum(dtype=np.int32)

    def _learned(self, shard: Shard, start: int, stop: int) -> np.ndarray:
        """[stop - start - 1] which labels are: targets, and those that go on with their input's document."""
        learned = np.ones(stop - start - 1, dtype=bool)
        if shard.targets is not None:
            learned &= shard.targets[start + 1 : stop] != 0
        if self.packing is Packing.documents:
            numbers = self._numbers(shard, start, stop)
            learned &= numbers[1:] == numbers[:-1]
        return learned


def _too_short(what: str) -> ConfigError:
    return ConfigError(f"data: {what}, at least 2 are needed; use a longer text")
