"""Batches as a pure function of seed and position, the same for every mesh.

    order of samples    | epoch 0, shuffled by (seed, 0) | epoch 1, shuffled by (seed, 1) | ...      endless
    global batch        `global_batch_size` consecutive samples of that order, from a position on
    micro-batch j       `micro_batch_size` consecutive samples of a global batch
    data rank           j % data_size, as its accumulation step j // data_size

Only the last line knows about ranks, so nothing needs saving but the position: the samples consumed so far.
"""

import hashlib
import logging
from dataclasses import dataclass
from functools import lru_cache

import torch
from tokenizers import Tokenizer

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config
from moe_trainer.data.packing import PADDING, pack, tokenize
from moe_trainer.data.sources import read_documents
from moe_trainer.data.tokenizer import load_tokenizer

_logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """Samples of one data rank, its micro-batches one after the other.

    A position is padding exactly where its label is -100.
    """

    input_ids: torch.Tensor  # [n, seq] int64
    labels: torch.Tensor  # [n, seq] int64

    def split(self, grad_accum_steps: int) -> list["Batch"]:
        """The micro-batches in order, as views."""
        parts = zip(self.input_ids.chunk(grad_accum_steps), self.labels.chunk(grad_accum_steps), strict=True)
        return [Batch(*part) for part in parts]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        return Batch(self.input_ids.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))


class Loader:
    """Deals the global order of samples to one data rank.

    Args:
        samples: int32 `[samples, seq + 1]` from `pack`; may be fewer than a batch, the order wraps.
        data_rank, data_size: which of how many ranks that see different data.

    Raises:
        ConfigError: the global batch does not divide into micro-batches for every rank.
    """

    def __init__(
        self,
        samples: torch.Tensor,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        data_rank: int,
        data_size: int,
    ) -> None:
        if global_batch_size < 1 or micro_batch_size < 1 or global_batch_size % (micro_batch_size * data_size):
            raise ConfigError(
                f"data.global_batch_size={global_batch_size} must be a positive multiple of "
                f"data.micro_batch_size({micro_batch_size}) x data ranks({data_size})"
            )
        assert 0 <= data_rank < data_size, f"data rank {data_rank} of {data_size}"
        self.samples = samples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.grad_accum_steps = global_batch_size // (micro_batch_size * data_size)
        self.seed = seed
        self.data_rank = data_rank
        self.data_size = data_size
        self._labels = (samples[:, 1:] != PADDING).sum(1)  # [samples]
        # A batch may straddle two epochs; drawing a permutation again for every batch would be linear in the data.
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    @property
    def seq_len(self) -> int:
        """Inputs of a sample, padding included."""
        return self.samples.shape[1] - 1

    def batch(self, position: int) -> Batch:
        """This rank's share of the global batch from `position` on: `[grad_accum_steps * micro_batch_size, seq]`."""
        micro_batches = range(self.data_rank, self.global_batch_size // self.micro_batch_size, self.data_size)
        starts = (position + micro_batch * self.micro_batch_size for micro_batch in micro_batches)
        indices = [self._sample(start + offset) for start in starts for offset in range(self.micro_batch_size)]
        rows = self.samples[indices].long()  # [n, seq + 1]
        inputs = rows[:, :-1]
        labels = rows[:, 1:]
        # Any valid id will do where the label is padding.
        return Batch(inputs.masked_fill(labels == PADDING, 0), labels.contiguous())

    def num_tokens(self, position: int) -> int:
        """Labels that count in the whole global batch from `position` on: every rank knows them without asking."""
        indices = [self._sample(position + offset) for offset in range(self.global_batch_size)]
        return int(self._labels[indices].sum())

    def fingerprint(self) -> str:
        """SHA-256 of the samples, whatever the seed, batch sizes and ranks: tells changed data on resume."""
        digest = hashlib.sha256(repr(tuple(self.samples.shape)).encode())
        digest.update(self.samples.contiguous().numpy().data)
        return digest.hexdigest()

    def _sample(self, position: int) -> int:
        epoch, place = divmod(position, len(self.samples))
        return int(self._permutation(epoch)[place])

    def _draw_permutation(self, epoch: int) -> torch.Tensor:
        # Hashed, since neighbouring (seed, epoch) pairs must not share an order as seed + epoch would.
        mixed = hashlib.sha256(f"order of samples/{self.seed}/{epoch}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(mixed, "big", signed=True))
        return torch.randperm(len(self.samples), generator=generator)


def build_loader(cfg: Config, vocab_size: int, data_rank: int, data_size: int) -> tuple[Loader, Tokenizer]:
    """Read, tokenise and pack what `cfg.data` names, for one data rank.

    Args:
        vocab_size: rows of the model's embedding, after `model.init_from`.

    Raises:
        ConfigError: data, tokenizer or sizes that cannot work; nothing has been written by then.
    """
    data = cfg.data
    tokenizer = load_tokenizer(data.tokenizer)
    documents = tokenize(read_documents(data), tokenizer, vocab_size, data.tokenizer)
    seq_len, longest = data.seq_len, max(map(len, documents)) - 1
    if seq_len is None and longest > cfg.model.max_position_embeddings:
        seq_len = cfg.model.max_position_embeddings
        _logger.info("the longest document has %d tokens: cut into samples of %d (data.seq_len)", longest, seq_len)
    samples = pack(documents, seq_len)
    loader = Loader(samples, data.global_batch_size, data.micro_batch_size, cfg.seed, data_rank, data_size)
    return loader, tokenizer
