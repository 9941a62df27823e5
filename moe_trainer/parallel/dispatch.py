"""Tokens to the ranks that hold their experts, and back (GShard, Lepikhin et al., 2020; here without a capacity).

Two ways. *All-to-all* sends each (token, expert) pair to its expert's rank: `top_k` rows a token, whatever the number
of ranks. *All-gather* sends every token to every rank, which picks its own pairs, and a reduce-scatter sums what they
give: `ranks - 1` rows a token, so it moves less where there are fewer ranks than choices.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moe_trainer.kernels.permute import combine, permute, sort_by_expert
from moe_trainer.parallel.collectives import all_gather, all_to_all, reduce_scatter

Compute = Callable[..., torch.Tensor]
"""(x [tokens, hidden], top_k_index into the rank's experts, top_k_weights, trim) -> [tokens, hidden]."""


def local_index(top_k_index: torch.Tensor, num_experts: int, group: ProcessGroup) -> torch.Tensor:
    """Global expert numbers -> this rank's own, their number for experts of other ranks.

    Experts are dealt in blocks: rank r holds experts `r * num_experts / ranks` and on.
    """
    num_local_experts = num_experts // group.size()
    index = top_k_index - group.rank() * num_local_experts
    elsewhere = (index < 0) | (index >= num_local_experts)
    return index.masked_fill(elsewhere, num_local_experts)


def gathered_experts(
    compute: Compute,
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    num_experts: int,
    sizes: list[int],
    group: ProcessGroup,
) -> torch.Tensor:
    """All-gather, the rank's own experts, reduce-scatter; backward is the same in reverse.

    Args:
        x: [tokens, hidden] of this rank; no tokens are fine.
        top_k_index: [tokens, top_k], global expert numbers.
        top_k_weights: [tokens, top_k].
        sizes: tokens of each rank.
    """
    x, top_k_index, top_k_weights = (all_gather(t, 0, sizes, group) for t in (x, top_k_index, top_k_weights))
    out = compute(x, local_index(top_k_index, num_experts, group), top_k_weights, trim=torch.is_grad_enabled())
    return reduce_scatter(out, 0, sizes, group)


def exchanged_experts(
    compute: Compute,
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    num_experts: int,
    group: ProcessGroup,
) -> torch.Tensor:
    """Two all-to-alls around the experts; backward makes two. Arguments as `gathered_experts`.

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

    rows = all_to_all(permute(x, routes), received_sizes, sent_sizes, group)
    weights = permute(top_k_weights.reshape(-1, 1), routes._replace(top_k=1))
    weights = all_to_all(weights, received_sizes, sent_sizes, group)
    experts = torch.arange(local_experts, device=x.device).repeat(ranks)
    experts = experts.repeat_interleave(received_counts, output_size=sum(received_sizes))
    out = compute(rows, experts.unsqueeze(1), weights)
    return combine(all_to_all(out, sent_sizes, received_sizes, group), routes)
