"""What surrounds the GPU's kernel, with the same mathematics in plain PyTorch in its place."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_trainer.kernels import packed_attention as module
from moe_trainer.kernels.packed_attention import packed_attention, takes_packed
from moe_trainer.train import recompute

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


@pytest.mark.parametrize("window", [None, 2])
def test_documents_of_one_length(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """cuDNN's operators are given what they take, too, without values; it has no window."""
    monkeypatch.setattr(module, "_takes_cudnn", lambda *args: args[-1] is None)
    like = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}
    inputs = [torch.empty(shape, **like) for shape in ((6, 4, 16), (6, 2, 16), (6, 2, 8), (4,))]
    query, key, value, sinks = inputs
    out = packed_attention(query, key, value, None, 3, window, 0.4, sinks)
    assert out.shape == (6, 4, 8)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert [gradient.shape for gradient in gradients] == [part.shape for part in inputs]


def test_one_length_is_boundaries_that_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(module, "_attend", lambda *args: (seen.append(args[3].tolist()), args[0])[1:])
    query = torch.empty(6, 4, 16)
    packed_attention(query, query, query, None, 3, None, None)
    assert seen == [[0, 3, 6]]


def cpu_attend(query, key, value, boundaries, longest, window, scale):
    """By an operator that activation checkpointing keeps, for one document."""
    rows = (module.batched(part, longest) for part in (query, key, value))
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*rows, 0.0, True, scale=scale)
    return module.end_to_end(out), log_sum.transpose(0, 1).flatten(1), torch.zeros(1), torch.zeros(1)


def cpu_attend_backward(grad, query, key, value, out, log_sum, boundaries, state, more, longest, window, scale):
    rows = (module.batched(part, longest) for part in (grad, query, key, value, out))
    sums = log_sum.unflatten(1, (-1, longest)).transpose(0, 1).contiguous()
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return tuple(map(module.end_to_end, backward(*rows, sums, 0.0, True, scale=scale)))


def test_what_recomputation_has_kept_is_not_scaled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's output is kept and given again; the sinks' share is taken off anew."""
    monkeypatch.setattr(module, "_attend", cpu_attend)
    monkeypatch.setattr(module, "_attend_backward", cpu_attend_backward)
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 16), *[(16, 16)] * 4, (2,)]
    given = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def layer(x, wq, wk, wv, wo, sinks):
        query, key, value = ((x @ weight).view(6, 2, 8) for weight in (wq, wk, wv))
        return packed_attention(query, key, value, None, 6, None, None, sinks).flatten(1) @ wo

    def gradients(kept) -> tuple[torch.Tensor, ...]:
        leaves = [part.clone().requires_grad_() for part in given]
        contexts = partial(recompute._contexts, kept)
        out = layer(*leaves) if kept is None else checkpoint(layer, *leaves, use_reentrant=False, context_fn=contexts)
        return torch.autograd.grad(out.square().sum(), leaves)

    expected = gradients(None)
    for kept in (recompute._CHOICES, recompute._ATTENTION):
        for found, right in zip(gradients(kept), expected, strict=True):
            torch.testing.assert_close(found, right)


def test_the_kernel_is_for_gpus() -> None:
    query = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16)
    assert not takes_packed(query, query)
