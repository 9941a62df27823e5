"""Every collective, forward and backward, against one process that computes the same function of all ranks' inputs.

Each rank r holds an input x_r and weighs its output y_r with w_r; the function differentiated is sum_r <y_r, w_r>.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from moe_trainer.config.schema import ParallelConfig
from moe_trainer.kernels.local_part import local_part
from moe_trainer.parallel import collectives
from moe_trainer.parallel.cross_entropy import IGNORED_LABEL, cross_entropy_sum
from moe_trainer.testing.compare import full_tensors
from moe_trainer.testing.pool import run_distributed
from tests.distributed.reference import MODEL, Case, batches, clip_grad_norm, plain_model, sharded_model

WORLD = 3
SIZES = ([2, 2, 2], [3, 2, 0], [0, 5, 1])
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def uneven(dim: int, size: int) -> list[int]:
    shape = [2, 3, 4]
    shape[dim] = size
    return shape


def values(seed: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, label: str = "") -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 4, msg=lambda text: label + text)


def compare(
    name: str,
    function: Callable[[torch.Tensor], torch.Tensor],
    whole: Callable[[list[torch.Tensor]], list[torch.Tensor]],
    shapes: list[list[int]],
    dtype: torch.dtype,
) -> None:
    """`function` on this rank's input against `whole` on the list of all inputs, which gives the list of outputs."""
    inputs = [values(rank, shape, dtype).requires_grad_() for rank, shape in enumerate(shapes)]
    expected = whole(inputs)
    weights = [values(10 + rank, list(y.shape), dtype) for rank, y in enumerate(expected)]
    total = sum((y * w).sum() for y, w in zip(expected, weights, strict=True))
    expected_grads = torch.autograd.grad(total, inputs)
    rank = dist.get_rank()
    mine = inputs[rank].detach().clone().requires_grad_()
    output = function(mine)
    (output * weights[rank]).sum().backward()
    for direction, ours, theirs in (
        ("forward", output, expected[rank]),
        ("backward", mine.grad, expected_grads[rank]),
    ):
        label = f"{name} {direction} {dtype} {shapes}: "
        assert_close(ours, theirs, label)


def check_collectives(dtype: torch.dtype) -> None:
    group = dist.group.WORLD
    rank = dist.get_rank()

    # all_reduce promises an identity backward: right where every rank goes on alike, so one rank's weight counts.
    weight_of_all = values(20, [2, 3], dtype)
    x = values(rank, [2, 3], dtype).requires_grad_()
    y = collectives.all_reduce(x, group)
    (y * weight_of_all).sum().backward()
    expected = sum(values(r, [2, 3], dtype) for r in range(WORLD))
    assert_close(y, expected)
    assert torch.equal(x.grad, weight_of_all)

    # copy_to_group: the same input everywhere, each rank's use of it its own.
    shared = values(0, [2, 3], dtype).requires_grad_()
    y = collectives.copy_to_group(shared, group)
    assert torch.equal(y, shared)
    (y * values(10 + rank, [2, 3], dtype)).sum().backward()
    expected = sum(values(10 + r, [2, 3], dtype) for r in range(WORLD))
    assert_close(shared.grad, expected)

    for sizes in SIZES:
        for dim in range(3):
            parts = [uneven(dim, size) for size in sizes]
            total = uneven(dim, sum(sizes))
            compare(
                f"all_gather dim {dim}",
                lambda x, dim=dim, sizes=sizes: collectives.all_gather(x, dim, sizes, group),
                lambda xs, dim=dim: [torch.cat(xs, dim)] * WORLD,
                parts,
                dtype,
            )
            compare(
                f"reduce_scatter dim {dim}",
                lambda x, dim=dim, sizes=sizes: collectives.reduce_scatter(x, dim, sizes, group),
                lambda xs, dim=dim, sizes=sizes: list(sum(xs).split(sizes, dim)),
                [total] * WORLD,
                dtype,
            )
            # gather_replicated: every rank goes on alike, so the same weight everywhere counts once.
            x = values(rank, parts[rank], dtype).requires_grad_()
            y = collectives.gather_replicated(x, dim, sizes, group)
            assert torch.equal(y, torch.cat([values(r, parts[r], dtype) for r in range(WORLD)], dim))
            weight = values(20, total, dtype)
            (y * weight).sum().backward()
            assert torch.equal(x.grad, weight.split(sizes, dim)[rank])

    # Sent from row rank to column rank; the last rank sends nothing, the first receives nothing.
    for table in ([[1, 2, 3], [2, 1, 0], [1, 1, 1]], [[0, 2, 3], [0, 1, 0], [0, 0, 0]]):
        compare(
            "all_to_all",
            lambda x, table=table: collectives.all_to_all(x, [row[rank] for row in table], table[rank], group),
            lambda xs, table=table: [
                torch.cat([x.split(row)[to] for x, row in zip(xs, table, strict=True)]) for to in range(WORLD)
            ],
            [[sum(row), 4] for row in table],
            dtype,
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_collectives(dtype: torch.dtype) -> None:
    run_distributed(check_collectives, WORLD, dtype)


def check_cross_entropy() -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    vocab = 4 * WORLD
    for dtype in TOLERANCE:
        logits = values(0, [2, 5, vocab], dtype).mul(8).requires_grad_()
        for labels in (
            torch.tensor([[0, 3, 4, 7, 8], [11, IGNORED_LABEL, 5, IGNORED_LABEL, 1]]),
            torch.full((2, 5), IGNORED_LABEL),
        ):
            wide = logits.to(torch.promote_types(dtype, torch.float32))
            rows = wide.flatten(0, 1)
            expected = F.cross_entropy(rows, labels.flatten(), reduction="sum", ignore_index=IGNORED_LABEL)
            (expected_grad,) = torch.autograd.grad(3 * expected, logits)
            part = logits.detach().chunk(WORLD, -1)[rank].clone().requires_grad_()
            for mine, its_group, its_grad in (
                (part, group, expected_grad.chunk(WORLD, -1)[rank]),
                (logits.detach().clone().requires_grad_(), None, expected_grad),
            ):
                loss = cross_entropy_sum(mine, labels, its_group)
                assert loss.dtype == wide.dtype
                assert_close(loss, expected)
                (3 * loss).backward()
                assert_close(mine.grad, its_grad)


def test_cross_entropy_of_a_split_vocabulary() -> None:
    run_distributed(check_cross_entropy, WORLD)


def check_cross_entropy_of_large_logits() -> None:
    """The largest logit is taken off before the exponential, and that of all ranks."""
    rank = dist.get_rank()
    logits = torch.tensor([[1e4, 0.0, 0.0, -1e4]], dtype=torch.float64)
    labels = torch.tensor([3])
    loss = cross_entropy_sum(logits.chunk(2, -1)[rank], labels, dist.group.WORLD)
    assert loss.item() == F.cross_entropy(logits, labels).item() == 2e4


def test_cross_entropy_of_large_logits() -> None:
    run_distributed(check_cross_entropy_of_large_logits, 2)


CLIP_MESHES = [
    ParallelConfig(fsdp=2, tp=2, ep=4, sequence_parallel=True, expert_parallel=True),
    ParallelConfig(fsdp=1, tp=4, ep=1),
    ParallelConfig(dp_replicate=2, fsdp=1, tp=2, ep=2, expert_parallel=True),
    ParallelConfig(dp_replicate=2, fsdp=2, tp=1, ep=1, sequence_parallel=True),
]


def check_clipping(meshes: list[ParallelConfig]) -> None:
    """Gradients as functions of the weights, so that every mesh has the same ones."""
    for parallel in meshes:
        case = Case(parallel, torch.float64)
        model, plain = sharded_model(case)[0], plain_model(case)
        for parameter in (*model.parameters(), *plain.parameters()):
            parameter.grad = parameter.detach().sin()
        model.lm_head.weight.grad = plain.lm_head.weight.grad = None  # a parameter without a gradient is no obstacle
        for max_norm in (0.25, float("inf")):
            norm = clip_grad_norm(model.parameters(), max_norm)
            expected = nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
            assert norm.ndim == 0
            torch.testing.assert_close(norm, expected, rtol=1e-13, atol=0)
            grads = {
                name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
            }
            for name, clipped in full_tensors(grads).items():
                torch.testing.assert_close(clipped, plain.get_parameter(name).grad, rtol=1e-12, atol=0)
            for parameter in (*model.parameters(), *plain.parameters()):
                if parameter.grad is not None:
                    local_part(parameter.grad).mul_(3)


def test_clipping_over_several_meshes() -> None:
    run_distributed(check_clipping, 4, CLIP_MESHES)


def check_a_step_reads_nothing_on_the_host() -> None:
    """Clipping costs one all-reduce of one number."""
    case = Case(CLIP_MESHES[0], torch.float32, model=replace(MODEL, num_layers=1))
    model, loss_fn, _ = sharded_model(case)
    ids, labels = (tensor[:1] for tensor in batches(case.model, case.seq)[0])
    loss_fn(model(ids), labels, 9)[0].backward()
    reduced: list[int] = []
    all_reduce = dist.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "item", lambda self: pytest.fail("clipping read a value on the host"))
        patch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("clipping read values on the host"))
        patch.setattr(dist, "all_reduce", lambda x, *rest, **more: (reduced.append(x.numel()), all_reduce(x))[1])
        clip_grad_norm(model.parameters(), 1.0)
    assert reduced == [1]


def test_clipping_reads_nothing_on_the_host() -> None:
    run_distributed(check_a_step_reads_nothing_on_the_host, 4)
