"""8-bit weights: how far from the exact model, and that generation still works."""

import argparse
import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_trainer.config.choices import Family, Quantization
from moe_trainer.config.store import compose
from moe_trainer.generate.quantization import quantize_model
from moe_trainer.kernels.quantize import quantize, quantized_grouped_linear, quantized_linear
from moe_trainer.models.decoder import CausalLM
from moe_trainer.models.registry import FAMILIES
from moe_trainer.parallel.initialize import initialize
from moe_trainer.testing.compare import relative_error
from moe_trainer.train.loss import LossFn

FARTHEST = {Quantization.fp8: 0.05, Quantization.int8: 0.02}
DTYPES = {Quantization.fp8: torch.float8_e4m3fn, Quantization.int8: torch.int8}
SEQ, BATCH, STEPS = 64, 16, 150


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    """Bytes of a source file that every Python has, as token ids [tokens]."""
    return torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()


@pytest.fixture(
    scope="module",
    params=[pytest.param(f, marks=() if f is Family.mixtral else pytest.mark.grid, id=f.value) for f in Family],
)
def trained(request: pytest.FixtureRequest, text: torch.Tensor) -> CausalLM:
    """Not random weights: their routers decide by chance, which rounding flips, as no trained router does."""
    cfg = compose("train", [f"+recipe={request.param.value}_tiny"]).model
    model = FAMILIES[cfg.family].build(cfg)
    initialize(model, 0, cfg.initializer_range)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss_fn = LossFn(cfg.num_experts, 0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        starts = torch.randint(len(text) - SEQ - 1, (BATCH,), generator=generator).tolist()
        rows = torch.stack([text[start : start + SEQ + 1] for start in starts])
        loss, _ = loss_fn(model(rows[:, :-1]), rows[:, 1:], BATCH * SEQ)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 2
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", FARTHEST)
def test_rounding_is_within_half_a_step(kind: Quantization) -> None:
    weight = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 16).view(
        1, 16, 1
    )
    rounded = quantize(weight, DTYPES[kind])
    error = (rounded.dequantize(torch.float32) - weight).abs()
    if kind is Quantization.int8:
        assert (error <= 0.5001 * rounded.scale.unsqueeze(-1)).all()
    else:  # three bits of mantissa; below the smallest normal number the steps are equal
        assert (error <= torch.maximum(weight.abs() / 16, rounded.scale.unsqueeze(-1) * 2**-10) * 1.0001).all()
    zero = quantize(torch.zeros(4, 8), DTYPES[kind])
    assert torch.equal(zero.dequantize(torch.float32), torch.zeros(4, 8))


@pytest.mark.parametrize("kind", FARTHEST)
def test_products_against_rounded_operands_in_float64(kind: Quantization) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 64, generator=generator)
    weight = quantize(torch.randn(48, 64, generator=generator), DTYPES[kind])
    rows = (
        quantize(x.flatten(0, 1), DTYPES[kind]).dequantize(torch.float64) if kind is Quantization.fp8 else x.double()
    )
    expected = nn.functional.linear(rows.view(2, 5, 64), weight.dequantize(torch.float64))
    assert relative_error(quantized_linear(x, weight), expected) < 1e-6

    experts = quantize(torch.randn(3, 48, 64, generator=generator), DTYPES[kind])
    offsets = torch.tensor([4, 4, 9], dtype=torch.int32)
    out = quantized_grouped_linear(x.flatten(0, 1), experts, offsets)[:9]
    flat = rows.view(10, 64)
    of_expert = experts.dequantize(torch.float64)
    expected = torch.cat((flat[:4] @ of_expert[0].T, flat[4:9] @ of_expert[2].T))
    assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("kind", FARTHEST)
def test_logits_stay_close_and_the_first_choice_stays(
    kind: Quantization, trained: CausalLM, text: torch.Tensor
) -> None:
    ids = text[: 32 * SEQ].view(32, SEQ)  # 2,048 positions
    exact, model = trained(ids).logits, copy.deepcopy(trained)
    quantize_model(model, kind)
    rounded = model(ids).logits
    assert 0 < relative_error(rounded, exact) <= FARTHEST[kind]
    assert (rounded.argmax(-1) == exact.argmax(-1)).float().mean() >= 0.95
    before, after = (sum(p.numel() * p.element_size() for p in m.model.layers.parameters()) for m in (trained, model))
    assert after < 0.3 * before


def test_none_changes_nothing(trained: CausalLM) -> None:
    model = copy.deepcopy(trained)
    quantize_model(model, Quantization.none)
    for ours, theirs in zip(model.parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, theirs)
