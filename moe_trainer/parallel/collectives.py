"""Collectives that autograd can go through. Each says what its backward is, and why.

Shards may be uneven: `sizes` gives every rank's length along the dim. The padding to equal lengths that the
collective itself needs is added and removed here, so it exists nowhere else.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup

# torch 2.13 renamed these two and warns at each use of the old names; 2.11 has only the old names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def copy_to_group(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Identity; backward is all-reduce, because each rank's gradient is what its own weights contributed."""
    return _CopyToGroup.apply(x, group)


def all_reduce(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Sum over the group; backward is identity, because every rank goes on with the same sum."""
    return _AllReduce.apply(x, group)


def all_gather(x: torch.Tensor, dim: int, sizes: list[int], group: ProcessGroup) -> torch.Tensor:
    """Concatenate the ranks' parts; backward is reduce-scatter: each rank adds a partial gradient of the whole."""
    return _AllGather.apply(x, dim, sizes, group)


def reduce_scatter(x: torch.Tensor, dim: int, sizes: list[int], group: ProcessGroup) -> torch.Tensor:
    """Sum over the group, keep this rank's part; backward is all-gather: each part depends on every rank."""
    return _ReduceScatter.apply(x, dim, sizes, group)


def gather_replicated(x: torch.Tensor, dim: int, sizes: list[int], group: ProcessGroup) -> torch.Tensor:
    """Concatenate the ranks' parts; backward is this rank's slice: every rank computes the same from the whole."""
    return _GatherReplicated.apply(x, dim, sizes, group)


def all_to_all(
    rows: torch.Tensor, output_sizes: list[int], input_sizes: list[int], group: ProcessGroup
) -> torch.Tensor:
    """Send `input_sizes[r]` rows to rank r and receive `output_sizes[r]`; backward sends the gradients back."""
    return _AllToAll.apply(rows, output_sizes, input_sizes, group)


def _sum(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class Pending(NamedTuple):
    """A collective under way."""

    work: dist.Work | None
    """None if it is done, as far as the device's order of work goes."""
    finish: Callable[[], torch.Tensor]
    sent: torch.Tensor
    """Kept until the end: its memory is being read."""

    def wait(self) -> torch.Tensor:
        """The result, for what is queued from now on."""
        if self.work is not None:
            self.work.wait()
        return self.finish()


def start_all_gather(x: torch.Tensor, sizes: list[int], group: ProcessGroup, async_op: bool = True) -> Pending:
    """Begin to concatenate the ranks' parts along dim 0, outside autograd."""
    longest = max(sizes)
    part = _pad(x, 0, longest).contiguous()
    whole = part.new_empty(len(sizes) * longest, *part.shape[1:])
    work = _all_gather_single(whole, part, group=group, async_op=async_op)

    def finish() -> torch.Tensor:
        if min(sizes) == longest:
            return whole
        return torch.cat([chunk[:size] for chunk, size in zip(whole.split(longest), sizes, strict=True)])

    return Pending(work, finish, part)


def start_reduce_scatter(x: torch.Tensor, sizes: list[int], group: ProcessGroup, async_op: bool = True) -> Pending:
    """Begin to sum over the group; the result is this rank's part along dim 0. Outside autograd."""
    longest, size = max(sizes), sizes[group.rank()]
    if min(sizes) < longest:
        x = torch.cat([_pad(chunk, 0, longest) for chunk in x.split(sizes)])
    whole = x.contiguous()
    part = whole.new_empty(longest, *whole.shape[1:])
    work = _reduce_scatter_single(part, whole, group=group, async_op=async_op)
    return Pending(work, lambda: part if size == longest else part[:size].clone(), whole)


def _concatenate(x: torch.Tensor, dim: int, sizes: list[int], group: ProcessGroup) -> torch.Tensor:
    return _from_front(start_all_gather(x.movedim(dim, 0), sizes, group, async_op=False).wait(), dim)


def _sum_part(x: torch.Tensor, dim: int, sizes: list[int], group: ProcessGroup) -> torch.Tensor:
    return _from_front(start_reduce_scatter(x.movedim(dim, 0), sizes, group, async_op=False).wait(), dim)


def _from_front(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Move the first dim to `dim`, in memory too. Never a view: FSDP's hooks on what a module returns would warn."""
    return x if dim == 0 else x.movedim(0, dim).clone(memory_format=torch.contiguous_format)


def _pad(x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    missing = length - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat((x, x.new_zeros(shape)), dim)


def _exchange(
    rows: torch.Tensor, output_sizes: list[int], input_sizes: list[int], group: ProcessGroup
) -> torch.Tensor:
    received = rows.new_empty(sum(output_sizes), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), output_sizes, input_sizes, group=group)
    return received


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum(grad, ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, dim: int, sizes: list[int], group: ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.sizes, ctx.group = dim, sizes, group
        return _concatenate(x, dim, sizes, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _sum_part(grad, ctx.dim, ctx.sizes, ctx.group), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, dim: int, sizes: list[int], group: ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.sizes, ctx.group = dim, sizes, group
        return _sum_part(x, dim, sizes, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _concatenate(grad, ctx.dim, ctx.sizes, ctx.group), None, None, None


class _GatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, dim: int, sizes: list[int], group: ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.sizes, ctx.rank = dim, sizes, group.rank()
        return _concatenate(x, dim, sizes, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return grad.split(ctx.sizes, ctx.dim)[ctx.rank], None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        rows: torch.Tensor,
        output_sizes: list[int],
        input_sizes: list[int],
        group: ProcessGroup,
    ) -> torch.Tensor:
        ctx.output_sizes, ctx.input_sizes, ctx.group = output_sizes, input_sizes, group
        return _exchange(rows, output_sizes, input_sizes, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _exchange(grad, ctx.input_sizes, ctx.output_sizes, ctx.group), None, None, None
