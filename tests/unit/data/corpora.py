"""Documents of small numbers, for tests of what is made of them."""

from collections.abc import Sequence

import numpy as np

from moe_trainer.config.choices import Packing
from moe_trainer.data.packing import Samples
from moe_trainer.data.shards import Encoded, Shard


def counting(*lengths: int) -> Shard:
    """Documents of these lengths whose tokens count on from one to the next."""
    numbers = np.arange(sum(lengths), dtype=np.int32)
    return Shard.of([Encoded(part) for part in np.split(numbers, np.cumsum(lengths)[:-1])])


def numbered(count: int, first: int = 0) -> Samples:
    """So many documents of three tokens, each a sample whose first input is its number."""
    documents = [Encoded(np.full(3, first + number, dtype=np.int32)) for number in range(count)]
    return Samples([Shard.of(documents)], None, Packing.documents)


def rows(samples: Samples) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Inputs, labels and documents of all samples."""
    parts: Sequence[tuple] = [samples[index] for index in range(len(samples))]
    inputs, labels, documents = zip(*parts, strict=True)
    return tuple([row.tolist() for row in column] for column in (inputs, labels, documents))
