"""The experts' function that keeps little, against autograd on the formula."""

import pytest
import torch
import torch.nn.functional as F

from moe_trainer.kernels.experts import Clamp
from moe_trainer.kernels.grouped_gemm import multiply
from moe_trainer.kernels.permute import HostCount, sort_by_expert
from moe_trainer.models.moe import ClampedExperts, Experts
from tests.unit.kernels.test_permute import ELSEWHERE, INDEX, _Poison, index_of


def naive(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: Experts) -> torch.Tensor:
    out = [0 * row for row in x]
    for token, choices in enumerate(index.tolist()):
        for choice, expert in enumerate(choices):
            if expert < ELSEWHERE:
                gate, up = experts.gate_up_proj[expert] @ x[token]
                if isinstance(experts, ClampedExperts):
                    gate, up = torch.stack((gate, up)) + experts.gate_up_bias[expert]
                    gate, up = gate.clamp(max=0.9), up.clamp(-0.9, 0.9)
                    row = experts.down_proj[expert] @ ((up + 1) * gate * torch.sigmoid(1.7 * gate))
                    row = row + experts.down_bias[expert]
                else:
                    row = experts.down_proj[expert] @ (F.silu(gate) * up)
                out[token] = out[token] + weights[token, choice] * row
    return torch.stack(out) if len(x) else x


def poisoned(kind: str) -> Experts:
    """With products whose rows of no expert are NaN, as a grouped GEMM may leave them."""
    experts = ClampedExperts(6, 5, 4, Clamp(1.7, 0.9)) if kind == "clamped" else Experts(6, 5, 4)
    experts.multiply = lambda *args: _Poison.apply(multiply(*args), int(args[-1][-1]))
    return experts.double()


@pytest.mark.parametrize("kind", ("plain", "clamped"))
@pytest.mark.parametrize("trim", (False, True))
@pytest.mark.parametrize("name", INDEX)
def test_value_and_gradients(name: str, trim: bool, kind: str) -> None:
    index = index_of(name)
    generator = torch.Generator().manual_seed(0)
    experts = poisoned(kind)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(len(index), 6, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.rand(index.shape, dtype=torch.float64, generator=generator).requires_grad_()
    routes = sort_by_expert(index, 4).trimmed(HostCount((index < ELSEWHERE).sum()) if trim else None)
    out = experts.compute_routes(x, routes, weights, experts.weights())
    expected = naive(x, index, weights, experts)
    torch.testing.assert_close(out, expected)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    inputs = (x, weights, *experts.parameters())
    ours = torch.autograd.grad(out, inputs, grad)
    theirs = torch.autograd.grad(expected, inputs, grad, allow_unused=True, materialize_grads=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_what_is_kept_for_the_backward_pass() -> None:
    """The input, the weights of the combination, the pre-activation and the parameters: no row of hidden width."""
    experts = Experts(8, 4, 4)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, 8, requires_grad=True)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        experts(x, index_of("usual"), torch.rand(5, 2, requires_grad=True))
    assert sorted(kept) == sorted([x.shape, (5, 2), (10, 8), (4, 2, 4, 8), (4, 8, 4)])
