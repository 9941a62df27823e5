"""Tokens to the ranks that hold their experts, and back (GShard, Lepikhin et al., 2020).

Two ways. *All-to-all* sends each (token, expert) pair to its expert's rank: `top_k` rows a token, whatever the number
of ranks. *All-gather* sends every token to every rank, which picks its own pairs, and a reduce-scatter sums what they
give: `ranks - 1` rows a token, so it moves less where there are fewer ranks than choices.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moe_trainer.kernels.permute import Routes, combine, permute, sort_by_expert
from moe_trainer.parallel.collectives import (
    Pending,
    all_gather,
    all_to_all,
    reduce_scatter,
    start_all_gather,
    start_reduce_scatter,
)


class TokenExchange:
    """The tokens of all ranks to each, and the sum of their gradients back, beside other work (see `Exchange`)."""

    def __init__(self, sizes: list[int], group: ProcessGroup) -> None:
        """`sizes`: tokens of each rank."""
        self._sizes, self._group = sizes, group
        self._gathering: Pending | None = None
        self._summing: Pending | None = None

    def start(self, x: torch.Tensor) -> None:
        """Begin to gather this rank's [tokens, hidden]."""
        self._gathering = start_all_gather(x, self._sizes, self._group)

    def tokens(self) -> torch.Tensor:
        """What was gathered, [tokens of all ranks, hidden]."""
        pending, self._gathering = self._gathering, None
        return pending.wait()

    def start_sum(self, grad: torch.Tensor) -> None:
        """Begin to sum gradients of all ranks' tokens."""
        self._summing = start_reduce_scatter(grad, self._sizes, self._group)

    def sum(self) -> torch.Tensor:
        """The sum for this rank's tokens."""
        pending, self._summing = self._summing, None
        return pending.wait()


def sort_for_rank(top_k_index: torch.Tensor, num_experts: int, group: ProcessGroup) -> Routes:
    """The pairs sorted by this rank's experts.

    Experts are dealt in blocks: rank r holds experts `r * num_experts / ranks` and on.
    """
    num_local = num_experts // group.size()
    return sort_by_expert(top_k_index, num_local, group.rank() * num_local)


def gathered_experts(
    compute: Callable[[torch.Tensor, Routes, torch.Tensor, TokenExchange], torch.Tensor],
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    num_experts: int,
    sizes: list[int],
    group: ProcessGroup,
) -> torch.Tensor:
    """All-gather, the rank's own experts, reduce-scatter; backward is the same in reverse.

    Args:
        compute: `Experts.compute_routes` with the rank's weights.
        x: [tokens, hidden] of this rank; no tokens are fine.
        top_k_index: [tokens, top_k], global expert numbers.
        top_k_weights: [tokens, top_k].
        sizes: tokens of each rank.
    """
    top_k_index = all_gather(top_k_index, 0, sizes, group)
    exchange = TokenExchange(sizes, group)
    exchange.start(x.detach())  # hides the sort, and that the host waits for its count
    routes = sort_for_rank(top_k_index, num_experts, group)
    num_rows = routes.count_rows()
    top_k_weights = all_gather(top_k_weights, 0, sizes, group)
    return reduce_scatter(compute(x, routes.trimmed(num_rows), top_k_weights, exchange), 0, sizes, group)


def exchanged_experts(
    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    num_experts: int,
    group: ProcessGroup,
) -> torch.Tensor:
    """Two all-to-alls around the experts; backward makes two. Arguments as `gathered_experts`, but for `compute`,
    which is given rows, the local expert of each, [rows, 1], and its weight, [rows, 1].

    Pairs sorted by expert are sorted by rank. The split sizes are read on the host, once; nothing else waits.
    """
    ranks = group.size()
    local_experts = num_experts // ranks
    routes = sort_by_expert(top_k_index, num_experts)
    sent_counts = routes.offsets.diff(prepend=routes.offsets.new_zeros(1))
    received_counts = torch.empty_like(sent_counts)  # [ranks * num_local_experts], by sender
    dist.all_to_all_single(received_counts, sent_counts, group=group)
    counts = torch.stack((sent_counts, received_counts)).view(2, ranks, local_experts)
    sent_sizes, received_sizes = counts.sum(-1).tolist()
    routes = routes._replace(order=routes.order[: sum(sent_sizes)])  # less what is beyond an expert's capacity

    rows = all_to_all(permute(x, routes), received_sizes, sent_sizes, group)
    weights = permute(top_k_weights.reshape(-1, 1), routes._replace(top_k=1))
    weights = all_to_all(weights, received_sizes, sent_sizes, group)
    experts = torch.arange(local_experts, device=x.device).repeat(ranks)
    experts = experts.repeat_interleave(received_counts, output_size=sum(received_sizes))
    out = compute(rows, experts.unsqueeze(1), weights)
    return combine(all_to_all(out, sent_sizes, received_sizes, group), routes)
