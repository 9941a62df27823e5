"""The split that brings float32 through bfloat16 products; the products themselves need a GPU (tests/gpu)."""

import torch

from moe_trainer.kernels.router_gemm import bfloat16_terms


def test_three_terms_are_the_number() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    terms = bfloat16_terms(x)
    assert {term.dtype for term in terms} == {torch.bfloat16}
    total = sum(term.double() for term in terms)
    assert ((total - x.double()).abs() <= x.double().abs() * 2**-24).all()
    assert not torch.equal(total - terms[2].double(), x.double())  # two would not do
