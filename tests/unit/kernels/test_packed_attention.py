"""What surrounds the GPU's kernel, with the same mathematics in plain PyTorch in its place."""

from collections.abc import Iterator

import pytest
import torch

from moe_trainer.kernels import packed_attention as module
from moe_trainer.kernels.packed_attention import packed_attention, takes_packed

BOUNDARIES = torch.tensor([0, 3, 4, 4, 11], dtype=torch.int32)
TOKENS, HEADS, KV_HEADS, WIDTH, VALUE = 11, 4, 2, 8, 6


def scores(query: torch.Tensor, key: torch.Tensor, window: int | None, scale: float | None) -> torch.Tensor:
    """[heads, tokens, tokens], minus infinity where a token does not look."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    products = torch.einsum("qhd,khd->hqk", query, key) * (scale or query.shape[-1] ** -0.5)
    number = torch.searchsorted(BOUNDARIES, torch.arange(TOKENS), right=True)
    distance = torch.arange(TOKENS).unsqueeze(1) - torch.arange(TOKENS)
    looks = (number.unsqueeze(1) == number) & (distance >= 0) & (distance < (window or TOKENS))
    return products.masked_fill(~looks, -torch.inf)


def forward(query, key, value, boundaries, longest, window, scale):
    """As FlashAttention: output and the logarithm of the denominators."""
    each = scores(query, key, window, scale)
    log_sum = each.logsumexp(-1)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return torch.einsum("hqk,khd->qhd", (each - log_sum.unsqueeze(-1)).exp(), value), log_sum, log_sum, log_sum, None


def backward(grad, query, key, value, out, log_sum, boundaries, rng_state, unused, longest, window, scale):
    """As FlashAttention: from the output and denominators that it is given (Dao et al., 2022, algorithm 4)."""
    groups = query.shape[1] // key.shape[1]
    shares = (scores(query, key, window, scale) - log_sum.unsqueeze(-1)).exp()
    pulled = torch.einsum("qhd,khd->hqk", grad, value.repeat_interleave(groups, 1))
    slopes = shares * (pulled - (grad * out).sum(-1).T.unsqueeze(-1)) * (scale or query.shape[-1] ** -0.5)
    d_query = torch.einsum("hqk,khd->qhd", slopes, key.repeat_interleave(groups, 1))
    d_key, d_value = torch.einsum("hqk,qhd->khd", slopes, query), torch.einsum("hqk,qhd->khd", shares, grad)
    return d_query, *(part.unflatten(1, (-1, groups)).sum(2) for part in (d_key, d_value))


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[torch.Tensor, ...]]:
    monkeypatch.setattr(module, "_attend", forward)
    monkeypatch.setattr(module, "_attend_backward", backward)
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, HEADS, WIDTH), (TOKENS, KV_HEADS, WIDTH), (TOKENS, KV_HEADS, VALUE), (HEADS,)]
    yield tuple(torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)


@pytest.mark.parametrize("window", [None, 2])
def test_sinks_take_part_in_the_softmax_and_have_no_value(inputs, window: int | None) -> None:
    query, key, value, sinks = inputs
    out = packed_attention(query, key, value, BOUNDARIES, 7, window, 0.4, sinks)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad((out * weights).sum(), inputs)

    each = torch.cat((scores(query, key, window, 0.4), sinks.view(-1, 1, 1).expand(-1, TOKENS, 1)), -1)
    wide = value.repeat_interleave(HEADS // KV_HEADS, 1)
    expected = torch.einsum("hqk,khd->qhd", each.softmax(-1)[..., :-1], wide)
    torch.testing.assert_close(out, expected)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for actual, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, right)


def test_narrow_values_come_out_narrow(inputs) -> None:
    query, key, value, _ = inputs
    out = packed_attention(query, key, value, BOUNDARIES, 7, None, None)
    wide = value.repeat_interleave(HEADS // KV_HEADS, 1)
    torch.testing.assert_close(out, torch.einsum("hqk,khd->qhd", scores(query, key, None, None).softmax(-1), wide))


@pytest.mark.parametrize("window", [None, 2])
def test_the_operators_take_what_we_give_them(window: int | None) -> None:
    """Without values: PyTorch checks names, types and shapes of the arguments."""
    like = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}
    shapes = [(TOKENS, HEADS, 16), (TOKENS, KV_HEADS, 16), (TOKENS, KV_HEADS, 8), (HEADS,)]
    query, key, value, sinks = inputs = [torch.empty(shape, **like) for shape in shapes]
    for given in (None, sinks):
        out = packed_attention(query, key, value, BOUNDARIES.to("meta"), 7, window, 0.4, given)
        assert out.shape == (TOKENS, HEADS, 8)
        gradients = torch.autograd.grad(out.sum(), inputs[: 3 if given is None else 4])
        assert [gradient.shape for gradient in gradients] == [part.shape for part in inputs[: len(gradients)]]


def test_the_kernel_is_for_gpus() -> None:
    query = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16)
    assert not takes_packed(query, query)
