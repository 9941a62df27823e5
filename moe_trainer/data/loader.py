"""Batches as a pure function of seed and position, the same for every mesh.

    order of samples    | epoch 0, shuffled by (seed, 0) | epoch 1, shuffled by (seed, 1) | ...      endless
    global batch        `global_batch_size` consecutive samples of that order, from a position on
    micro-batch j       `micro_batch_size` consecutive samples of a global batch
    data rank           j % data_size, as its accumulation step j // data_size

Only the last line knows about ranks, so nothing needs saving but the position: the samples consumed so far. See
`order` for the shuffle and for mixtures of sources, `packing` for what a sample is, `build` for the loaders of a run:
`build_loader` and `build_validation_loader`.
"""

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from moe_trainer.config.errors import ConfigError
from moe_trainer.data.order import Order
from moe_trainer.data.packing import IGNORED, Samples
from moe_trainer.models.documents import Documents


@dataclass
class Batch:
    """Samples of one data rank, its micro-batches one after the other."""

    input_ids: torch.Tensor  # [n, seq] int64
    labels: torch.Tensor  # [n, seq] int64, -100 where nothing is learned: padding, prompts, ends of documents
    documents: Documents | None = None  # of the tokens, for the model; None: each row is one

    def split(self, grad_accum_steps: int) -> list["Batch"]:
        """The micro-batches in order, as views."""
        nothing = [None] * grad_accum_steps
        documents = nothing if self.documents is None else self.documents.split(grad_accum_steps)
        parts = self.input_ids.chunk(grad_accum_steps), self.labels.chunk(grad_accum_steps), documents
        return [Batch(*part) for part in zip(*parts, strict=True)]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        documents = None if self.documents is None else self.documents.to(device)
        ids, labels = (part.to(device, non_blocking=True) for part in (self.input_ids, self.labels))
        return Batch(ids, labels, documents)

    def pin_memory(self) -> "Batch":
        """The same in memory that a GPU copies from by itself."""
        documents = None if self.documents is None else self.documents.pin_memory()
        return Batch(self.input_ids.pin_memory(), self.labels.pin_memory(), documents)


class Loader:
    """Deals the global order of samples to one data rank; the next batch is made while the last one is used.

    Args:
        sources: where samples come from, all of one length; they may be fewer than a batch, the order wraps.
        shares: of the samples, for each source; None: a single source.
        data_rank, data_size: which of how many ranks that see different data.
        shuffles: False deals the sources once, in order, one after the other; then come samples without labels.
        pins_memory: for batches that go to a GPU.

    Raises:
        ConfigError: the global batch does not divide into micro-batches for every rank.
    """

    def __init__(
        self,
        sources: Sequence[Samples],
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        data_rank: int,
        data_size: int,
        *,
        shares: Sequence[float] | None = None,
        shuffles: bool = True,
        pins_memory: bool = False,
    ) -> None:
        if global_batch_size < 1 or micro_batch_size < 1 or global_batch_size % (micro_batch_size * data_size):
            raise ConfigError(
                f"data.global_batch_size={global_batch_size} must be a positive multiple of "
                f"data.micro_batch_size({micro_batch_size}) x data ranks({data_size})"
            )
        assert 0 <= data_rank < data_size, f"data rank {data_rank} of {data_size}"
        assert len({source.seq_len for source in sources}) == 1, "sources of one length"
        self.sources = sources
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.grad_accum_steps = global_batch_size // (micro_batch_size * data_size)
        self.data_rank = data_rank
        self.data_size = data_size
        self.data_seconds = 0.0
        """For how long the last call of `batch` kept its caller waiting."""
        self._shares = list(shares) if shares is not None else [1.0] * len(sources)
        self._shuffles = shuffles
        self._pins_memory = pins_memory
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self.seed = seed

    @property
    def seed(self) -> int:
        """Of the order of samples."""
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed = seed
        self._order = Order([len(source) for source in self.sources], self._shares, seed)
        self._ahead: tuple[int, Future[tuple[Batch, int]]] | None = None
        self._dealt: tuple[int, int] | None = None

    @property
    def seq_len(self) -> int:
        """Inputs of a sample, padding included."""
        return self.sources[0].seq_len

    @property
    def num_batches(self) -> int:
        """Global batches that hold every sample; the last may be filled up."""
        return -(-sum(len(source) for source in self.sources) // self.global_batch_size)

    def batch(self, position: int) -> Batch:
        """This rank's share of the global batch from `position` on: `[grad_accum_steps * micro_batch_size, seq]`."""
        begin = time.perf_counter()
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == position:
            batch, num_tokens = ahead[1].result()
        else:
            batch, num_tokens = self._deal(position)
        self._dealt = position, num_tokens
        following = position + self.global_batch_size
        self._ahead = following, self._worker.submit(self._deal, following)
        if self._pins_memory:  # here, because in the worker it would be the first GPU's driver that pins
            batch = batch.pin_memory()
        self.data_seconds = time.perf_counter() - begin
        return batch

    def num_tokens(self, position: int) -> int:
        """Labels that count in the whole global batch from `position` on: every rank knows them without asking."""
        if self._dealt is not None and self._dealt[0] == position:
            return self._dealt[1]
        return self._num_labels(self._samples(position))

    def places(self, position: int) -> list[dict[str, list[int] | int]]:
        """Which samples `batch` is made of at this position: micro-batch, source, and what `Samples.place` says."""
        samples, size = self._samples(position), self.micro_batch_size
        places = []
        for row, place in enumerate(self._rows()):
            if place < len(samples):
                source, index = samples[place]
                where = {"micro_batch": row // size + 1, "position": position + place, "source": source}
                places.append(where | {"sample": index} | self.sources[source].place(index))
        return places

    def fingerprint(self) -> str:
        """Tells changed data, shares or cuts of it on resume; the seed, batch sizes and ranks do not matter."""
        prints = [source.fingerprint() for source in self.sources]
        shares = [share / sum(self._shares) for share in self._shares]
        return hashlib.sha256(repr((prints, shares)).encode()).hexdigest()

    def _samples(self, position: int) -> list[tuple[int, int]]:
        """Source and index of each sample of the global batch; fewer at the end of a loader that does not shuffle."""
        if self._shuffles:
            sources, indices = self._order.samples(position, self.global_batch_size)
        else:
            ends = np.cumsum([len(source) for source in self.sources])
            places = np.arange(position, min(position + self.global_batch_size, ends[-1]))
            sources = np.searchsorted(ends, places, side="right")
            indices = places - np.concatenate(([0], ends))[sources]
        return list(zip(sources.tolist(), indices.tolist(), strict=True))

    def _rows(self) -> list[int]:
        """The places of this rank's samples in a global batch."""
        size = self.micro_batch_size
        micro_batches = range(self.data_rank, self.global_batch_size // size, self.data_size)
        return [number * size + offset for number in micro_batches for offset in range(size)]

    def _deal(self, position: int) -> tuple[Batch, int]:
        samples = self._samples(position)
        places = self._rows()
        inputs = np.zeros((len(places), self.seq_len), dtype=np.int64)
        labels = np.full_like(inputs, IGNORED)
        documents = np.zeros(inputs.shape, dtype=np.int32)
        for row, place in enumerate(places):
            if place < len(samples):
                source, index = samples[place]
                inputs[row], labels[row], documents[row] = self.sources[source][index]
        per_row = int(documents.max()) + 1
        # A power of two, so that few different numbers reach the kernels.
        packed = Documents(torch.from_numpy(documents), 1 << (per_row - 1).bit_length()) if per_row > 1 else None
        batch = Batch(torch.from_numpy(inputs), torch.from_numpy(labels), packed)
        return batch, self._num_labels(samples)

    def _num_labels(self, samples: list[tuple[int, int]]) -> int:
        return sum(self.sources[source].num_labels(index) for source, index in samples)
