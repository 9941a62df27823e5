import pytest
import torch

from moe_trainer.kernels.permute import HostCount, combine, permute, sort_by_expert, tokens_per_expert

ELSEWHERE = 4  # one past the last of four experts
INDEX = {
    "usual": [[0, 3], [2, 1], [3, 0], [1, 2], [0, 2]],
    "experts without tokens": [[3, 1], [1, 3], [3, 1]],
    "some pairs elsewhere": [[0, ELSEWHERE], [ELSEWHERE, 1], [ELSEWHERE, ELSEWHERE], [2, 3]],
    "all elsewhere": [[ELSEWHERE, ELSEWHERE], [ELSEWHERE, ELSEWHERE]],
    "one choice": [[2], [0], [2]],
    "no tokens": [],
}


def index_of(name: str) -> torch.Tensor:
    return torch.tensor(INDEX[name], dtype=torch.int64).view(len(INDEX[name]), -1 if INDEX[name] else 2)


@pytest.mark.parametrize("name", INDEX)
def test_sorted_by_expert(name: str) -> None:
    index = index_of(name)
    routes = sort_by_expert(index, 4)
    experts = index.flatten()[routes.order]
    assert experts.tolist() == sorted(index.flatten().tolist())
    assert torch.equal(routes.order[routes.inverse], torch.arange(index.numel()))
    assert routes.offsets.dtype == torch.int32
    assert routes.offsets.tolist() == [int((index <= expert).sum()) for expert in range(4)]
    assert tokens_per_expert(index, 4).tolist() == [int((index == expert).sum()) for expert in range(4)]
    for expert in range(4):  # stable: an expert's pairs stay in the order of the tokens
        pairs = routes.order[experts == expert]
        assert pairs.tolist() == sorted(pairs.tolist())


def test_experts_before_the_first_and_past_the_last_come_last() -> None:
    routes = sort_by_expert(torch.tensor([[5, 0], [2, 3], [1, 6], [3, 4]]), 2, first=2)
    assert routes.offsets.tolist() == [1, 3]
    assert routes.order.tolist()[:3] == [2, 3, 6]
    assert sorted(routes.order.tolist()[3:]) == [0, 1, 4, 5, 7]
    assert routes.inverse[routes.order].tolist() == list(range(8))


def naive(tokens: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Expert e squares its tokens and multiplies by e + 1; experts elsewhere give nothing."""
    out = 0 * tokens + 0 * weights.sum()
    for token, experts in enumerate(index.tolist()):
        for choice, expert in enumerate(experts):
            if expert < ELSEWHERE:
                row = (expert + 1) * tokens[token] ** 2
                out = out.index_add(0, torch.tensor([token]), (weights[token, choice] * row).unsqueeze(0))
    return out


def sorted_way(tokens: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, trim: bool) -> torch.Tensor:
    """The same through the kernels, with poison wherever memory would not have been set."""
    routes = sort_by_expert(index, 4)
    routes = routes.trimmed(HostCount(routes.offsets[-1])) if trim else routes
    rows = _Poison.apply(permute(tokens, routes), int(routes.offsets[-1]))
    factors = index.flatten()[routes.order].unsqueeze(1) + 1
    rows = _Poison.apply(factors * rows**2, int(routes.offsets[-1]))
    return combine(rows * permute(weights.reshape(-1, 1), routes._replace(top_k=1)), routes)


class _Poison(torch.autograd.Function):
    """NaN in the rows from `end` on, forward and backward, as a grouped GEMM may leave them."""

    @staticmethod
    def forward(ctx, rows, end):
        ctx.end = end
        return _Poison.poisoned(rows, end)

    @staticmethod
    def backward(ctx, grad):
        return _Poison.poisoned(grad, ctx.end), None

    @staticmethod
    def poisoned(rows, end):
        rows = rows.clone()
        rows[end:] = float("nan")
        return rows


@pytest.mark.parametrize("trim", (False, True))
@pytest.mark.parametrize("name", INDEX)
def test_against_a_naive_loop(name: str, trim: bool) -> None:
    index = index_of(name)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(len(index), 3, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.rand(index.shape, dtype=torch.float64, generator=generator).requires_grad_()
    grad = torch.randn(len(index), 3, dtype=torch.float64, generator=generator)
    out, expected = sorted_way(tokens, weights, index, trim), naive(tokens, weights, index)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out, (tokens, weights), grad)
    theirs = torch.autograd.grad(expected, (tokens, weights), grad)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_gradcheck() -> None:
    routes = sort_by_expert(index_of("usual"), 4)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 3, dtype=torch.float64, generator=generator).requires_grad_()
    rows = torch.randn(10, 3, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: permute(t, routes), (tokens,))
    assert torch.autograd.gradcheck(lambda r: combine(r, routes), (rows,))


def test_the_sum_is_in_float32() -> None:
    """Three bf16 rows whose small part survives only if they are summed wider."""
    routes = sort_by_expert(torch.tensor([[0, 1, 2]]), 3)
    rows = torch.tensor([[256.0], [0.5], [-256.0]], dtype=torch.bfloat16)
    out = combine(rows, routes)
    assert out.dtype == torch.bfloat16 and out.item() == 0.5
