"""How the sequence is split over the tensor-parallel ranks."""

import torch
from torch.distributed import ProcessGroup

from moe_trainer.parallel.collectives import all_gather, reduce_scatter


class SequenceShards:
    """The split of the sequence that is being computed: `ceil(seq / ranks)` positions a rank, the last ones fewer.

    Inside the region between the blocks a rank holds its own positions and no others. Where the ranks do not divide
    the sequence, later ranks hold fewer positions, possibly none; padding exists only inside the collectives. The
    embedding, which sees the whole input, sets `batch` and `seq` at the start of each forward pass.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.batch = self.seq = 0

    @property
    def sizes(self) -> list[int]:
        """Positions of each rank."""
        ranks = self.group.size()
        chunk = -(-self.seq // ranks)
        return [max(0, min(chunk, self.seq - rank * chunk)) for rank in range(ranks)]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, local seq, ...] -> [batch, seq, ...]; backward is reduce-scatter."""
        return all_gather(x, 1, self.sizes, self.group)

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Partial sums [batch, seq, ...] -> [batch, local seq, ...]; backward is all-gather."""
        return reduce_scatter(x, 1, self.sizes, self.group)

    @property
    def token_sizes(self) -> list[int]:
        """Tokens of each rank."""
        return [self.batch * size for size in self.sizes]

    def local(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's positions of [batch, seq, ...], which every rank has in full."""
        return x.split(self.sizes, 1)[self.group.rank()]
