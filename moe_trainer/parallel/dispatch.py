"""Tokens to the ranks that hold their experts, and back (GShard, Lepikhin et al., 2020; here without a capacity)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moe_trainer.kernels.permute import Routes, permute, sort_by_expert, unpermute, unsort
from moe_trainer.parallel.collectives import all_to_all


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows that this rank's experts are to compute, and the way back."""

    rows: torch.Tensor
    """[received pairs, hidden], sorted by local expert."""
    offsets: torch.Tensor
    """[num_local_experts] int32, the end of each expert's rows."""
    _sent: Routes
    _received: Routes
    _sent_sizes: list[int]
    _received_sizes: list[int]
    _group: ProcessGroup

    def combine(self, rows: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """The experts' outputs, in the order of `rows` -> this rank's [tokens, hidden], weighted and summed."""
        rows = unsort(rows, self._received)
        rows = all_to_all(rows, self._sent_sizes, self._received_sizes, self._group)
        return unpermute(rows, top_k_weights, self._sent)


def dispatch(x: torch.Tensor, top_k_index: torch.Tensor, num_experts: int, group: ProcessGroup) -> Dispatched:
    """Send each (token, expert) pair to the rank of `group` that holds the expert.

    Experts are dealt in blocks: rank r holds experts `r * num_experts / ranks` and on, so pairs sorted by expert are
    sorted by rank. The split sizes are read on the host, once; nothing else waits.

    Args:
        x: [tokens, hidden] of this rank; no tokens are fine.
        top_k_index: [tokens, top_k], global expert numbers.
    """
    ranks = group.size()
    local_experts = num_experts // ranks
    sent = sort_by_expert(top_k_index, num_experts)
    sent_counts = sent.offsets.diff(prepend=sent.offsets.new_zeros(1))
    received_counts = torch.empty_like(sent_counts)  # [ranks * num_local_experts], by sender
    dist.all_to_all_single(received_counts, sent_counts, group=group)
    counts = torch.stack((sent_counts, received_counts)).view(2, ranks, local_experts)
    sent_sizes, received_sizes = counts.sum(-1).tolist()

    rows = all_to_all(permute(x, sent), received_sizes, sent_sizes, group)
    experts = torch.arange(local_experts, device=x.device).repeat(ranks)
    experts = experts.repeat_interleave(received_counts, output_size=sum(received_sizes))
    received = sort_by_expert(experts.unsqueeze(1), local_experts)
    return Dispatched(permute(rows, received), received.offsets, sent, received, sent_sizes, received_sizes, group)
