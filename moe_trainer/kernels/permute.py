"""From tokens to rows sorted by expert, and back as a sum.

A *pair* is one (token, chosen expert); pair `p` belongs to token `p // top_k`. Both directions are gathers, forward
and backward, through the sort and its inverse: no scatter-add, so no order of execution can change the result.
"""

from typing import Any, NamedTuple

import torch

from moe_trainer.kernels.backend import has_kernel, has_sort


class Routes(NamedTuple):
    """The sort of the pairs by expert."""

    order: torch.Tensor
    """[rows] the pair at each row; all pairs, or without those whose expert is elsewhere."""
    inverse: torch.Tensor
    """[pairs] the row of each pair; at or past `offsets[-1]` where its expert is elsewhere."""
    offsets: torch.Tensor
    """[num_experts] int32, the end of each expert's rows."""
    top_k: int
    """Pairs of each token."""

    def count_rows(self) -> "HostCount | None":
        """How many rows have an expert here, for `trimmed`. In training, where rows are kept for the backward pass,
        memory for all pairs would be several times what is needed."""
        return HostCount(self.offsets[-1]) if torch.is_grad_enabled() else None

    def trimmed(self, num_rows: "HostCount | None") -> "Routes":
        """Without the rows of no expert, of which `offsets[-1]` is the first; None: with them."""
        return self if num_rows is None else self._replace(order=self.order[: num_rows.read()])


class HostCount:
    """A number on its way from the device to the host, so that the device has other work while the host waits."""

    def __init__(self, count: torch.Tensor) -> None:
        """`count`: scalar."""
        self._count = count.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if count.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> int:
        """The number; waits for it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._count)


def tokens_per_expert(index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert is named, [num_experts] int64; a number past the last expert counts nowhere."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=index.device)
    flat = index.flatten()
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]


def sort_by_expert(top_k_index: torch.Tensor, num_experts: int, first: int = 0) -> Routes:
    """Stable sort of the pairs by expert.

    Args:
        top_k_index: [tokens, top_k], numbers of experts; the pairs of those that are not here come last.
        num_experts: that are here.
        first: the number of the first of them.
    """
    if has_sort(top_k_index):
        from moe_trainer.kernels.gpu import sort as gpu

        return Routes(*gpu.sort(top_k_index.flatten(), num_experts, first), top_k_index.shape[1])
    local = top_k_index.flatten() - first
    experts, order = local.masked_fill((local < 0) | (local > num_experts), num_experts).sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    numbers = torch.arange(num_experts, device=order.device)
    offsets = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    return Routes(order, inverse, offsets, top_k_index.shape[1])


def permute(tokens: torch.Tensor, routes: Routes) -> torch.Tensor:
    """[tokens, width] -> [rows, width], a copy of its token for each row; backward sums a token's rows.

    Rows of no expert are undefined.
    """
    return _Permute.apply(tokens, routes)


def combine(rows: torch.Tensor, routes: Routes) -> torch.Tensor:
    """[rows, width] -> [tokens, width], the sum of each token's rows; backward copies."""
    return _Combine.apply(rows, routes)


def gather_rows(tokens: torch.Tensor, routes: Routes) -> torch.Tensor:
    """[tokens, width] -> [rows, width], without autograd. Rows of no expert are undefined."""
    if has_kernel(tokens) and tokens.shape[1] >= _NARROW:
        from moe_trainer.kernels.gpu import rows as gpu

        sizes = len(routes.order), routes.top_k
        return gpu.spread(tokens.contiguous(), routes.inverse, routes.offsets[-1:], *sizes)
    return tokens.index_select(0, routes.order // routes.top_k)


def sum_pairs(rows: torch.Tensor, routes: Routes) -> torch.Tensor:
    """[rows, width] -> [tokens, width], summed in float32 at least, without autograd.

    Rows of no expert hold whatever the memory held, so they are selected away, not multiplied by zero.
    """
    if has_kernel(rows) and rows.shape[1] >= _NARROW:
        from moe_trainer.kernels.gpu import rows as gpu

        return gpu.sum_pairs(rows.contiguous(), routes.inverse, routes.offsets[-1:], routes.top_k)
    if not len(rows):
        return rows.new_zeros(len(routes.inverse) // routes.top_k, rows.shape[1])
    elsewhere = (routes.inverse >= routes.offsets[-1]).unsqueeze(-1)
    pairs = rows.index_select(0, routes.inverse.clamp(max=len(rows) - 1)).masked_fill_(elsewhere, 0)
    wide = torch.promote_types(rows.dtype, torch.float32)
    return pairs.unflatten(0, (-1, routes.top_k)).sum(1, dtype=wide).to(rows.dtype)


_NARROW = 64
"""Below this width a row is no work for a program of its own."""


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, routes: Routes) -> torch.Tensor:
        ctx.routes = routes
        return gather_rows(tokens, routes)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return sum_pairs(grad, ctx.routes), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, routes: Routes) -> torch.Tensor:
        ctx.routes = routes
        return sum_pairs(rows, routes)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather_rows(grad, ctx.routes), None
