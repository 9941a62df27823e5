"""Products in fp8: what is rounded, and that nothing else is."""

import pytest
import torch

from moe_trainer.kernels.fp8 import linear_fp8, multiply_fp8, quantize_columns
from moe_trainer.kernels.grouped_gemm import grouped_linear, multiply
from moe_trainer.kernels.quantize import FP8, quantize
from moe_trainer.testing.compare import relative_error

EXPERTS, WIDE, NARROW = 4, 96, 48
OFFSETS = torch.tensor([5, 5, 17, 40], dtype=torch.int32)  # the second expert has no rows


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("transposed", (False, True))
def test_product(transposed: bool) -> None:
    """Within fp8's rounding of the exact product, in both orders of memory."""
    rows, weight = values(40, WIDE), values(EXPERTS, NARROW, WIDE, seed=1) * 0.02
    weight = weight.mT if transposed else weight.mT.contiguous()
    exact = multiply(rows.double(), weight.double(), OFFSETS)
    ours = multiply_fp8(rows, weight, OFFSETS)
    assert 0.005 < relative_error(ours.double(), exact) < 0.05


def test_an_outlier_costs_its_own_row_and_column_alone() -> None:
    rows, weight = values(40, WIDE), values(EXPERTS, WIDE, NARROW, seed=1)
    plain = multiply_fp8(rows, weight, OFFSETS)
    rows[7], weight[2, :, 3] = rows[7] * 1e4, weight[2, :, 3] * 1e4
    ours = multiply_fp8(rows, weight, OFFSETS)
    same = torch.ones_like(ours, dtype=torch.bool)
    same[7], same[5:17, 3] = False, False  # rows 5 to 16 are the third expert's
    assert torch.equal(ours[same], plain[same]) and not torch.equal(ours, plain)


def test_rounding_has_a_scale_for_each_row_or_column() -> None:
    weight = values(EXPERTS, WIDE, NARROW) * torch.logspace(-3, 3, NARROW)
    by_column = quantize_columns(weight)
    assert by_column.values.shape == (EXPERTS, NARROW, WIDE) and by_column.scale.shape == (EXPERTS, NARROW)
    assert torch.equal(by_column.values.float(), quantize(weight.mT, FP8).values.float())
    largest = by_column.values.float().abs().amax(-1)
    assert torch.equal(largest, torch.full_like(largest, 448.0))
    error = (by_column.dequantize(torch.float32).mT - weight).abs()
    assert (error <= weight.abs() * 2**-4 + by_column.scale.unsqueeze(1) * 2**-10).all()


def test_gradients() -> None:
    """Inputs' gradients come through rounded products, weights' through exact ones."""
    rows, weight, grad = values(40, WIDE), values(EXPERTS, NARROW, WIDE, seed=1), values(40, NARROW, seed=2)
    found, exact = [], []
    for product, kept in ((multiply_fp8, found), (None, exact)):
        leaves = [rows.clone().requires_grad_(), weight.clone().requires_grad_()]
        grouped_linear(*leaves, OFFSETS, product).backward(grad)
        kept += [leaf.grad for leaf in leaves]
    assert 0.005 < relative_error(found[0], exact[0]) < 0.05
    assert torch.equal(found[0], multiply_fp8(grad, weight, OFFSETS))
    assert torch.equal(found[1], exact[1])


def test_linear() -> None:
    x, weight, grad = values(2, 5, WIDE), values(NARROW, WIDE, seed=1), values(2, 5, NARROW, seed=2)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    out = linear_fp8(*leaves)
    out.backward(grad)
    assert 0.005 < relative_error(out.detach(), (x @ weight.t()).detach()) < 0.05
    assert 0.005 < relative_error(x.grad, grad @ weight.detach()) < 0.05
    assert torch.equal(weight.grad, grad.flatten(0, 1).t() @ x.detach().flatten(0, 1))
