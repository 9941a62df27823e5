import pytest
import torch
import torch.nn.functional as F
from transformers import MixtralConfig
from transformers.models.mixtral import modeling_mixtral

from moe_trainer.config.choices import AuxScope
from moe_trainer.models.decoder import ModelOutput
from moe_trainer.models.moe import Experts, SparseMoeBlock
from moe_trainer.models.router import Router, Routing
from moe_trainer.train.loss import LossFn

HUB = MixtralConfig(hidden_size=16, intermediate_size=12, num_local_experts=6, num_experts_per_tok=2)


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3
    return module


def naive_experts(experts: Experts, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = []
    for token, chosen, share in zip(x, index.tolist(), weights, strict=True):
        parts = []
        for expert, weight in zip(chosen, share, strict=True):
            gate, up = (experts.gate_up_proj[expert, half] @ token for half in range(2))
            parts.append(weight * (experts.down_proj[expert] @ (F.silu(gate) * up)))
        out.append(sum(parts))
    return torch.stack(out)


def test_experts_against_a_naive_loop() -> None:
    experts = filled(Experts(16, 12, 6).double())
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 3], [3, 0], [5, 3], [0, 5], [3, 5], [0, 3], [3, 5]])  # 1, 2 and 4 get no token
    weights = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    ours, theirs = experts(x, index, weights), naive_experts(experts, x, index, weights)
    torch.testing.assert_close(ours, theirs)
    inputs = (x, weights, *experts.parameters())
    grad = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_experts_without_any_token_still_have_gradients() -> None:
    experts = filled(Experts(16, 12, 6))
    experts(torch.empty(0, 16), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_router_against_transformers(dtype: torch.dtype) -> None:
    ours, theirs = filled(Router(16, 6, 2)), modeling_mixtral.MixtralTopKRouter(HUB)
    theirs.weight = ours.weight
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    routing = ours(x)
    logits, weights, index = theirs(x.float())
    assert routing.logits.dtype == routing.top_k_weights.dtype == torch.float32
    assert torch.equal(routing.top_k_index, index)
    torch.testing.assert_close(routing.logits, logits)
    torch.testing.assert_close(routing.top_k_weights, weights)
    chosen = routing.logits.gather(1, index).softmax(-1)  # the docstring's claim
    torch.testing.assert_close(routing.top_k_weights, chosen)


def test_block_keeps_the_shape_and_reports_its_routing() -> None:
    block = filled(SparseMoeBlock(Router(16, 6, 2), Experts(16, 12, 6)).double())
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    out, routing = block(x)
    assert out.shape == x.shape and routing.top_k_index.shape == (10, 2)
    expected = naive_experts(block.experts, x.flatten(0, 1), routing.top_k_index, routing.top_k_weights)
    torch.testing.assert_close(out, expected.view_as(x))


def routing_of(logits: torch.Tensor) -> Routing:
    probabilities = logits.softmax(-1)
    return Routing(logits, probabilities, *probabilities.topk(2))


def test_loss_against_transformers_and_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(11, (3, 4), generator=generator)
    labels[0, 2:] = -100
    labels[2] = -100
    logits = torch.randn(3, 4, 11, generator=generator)
    gates = tuple(torch.randn(12, 6, generator=generator) for _ in range(2))
    valid = labels != -100
    output = ModelOutput(logits, tuple(routing_of(gate) for gate in gates))
    total, losses = LossFn(6, 0.5)(output, labels, int(valid.sum()))
    aux = modeling_mixtral.load_balancing_loss_func(gates, 6, 2, valid)
    torch.testing.assert_close(losses.aux_loss, aux)
    torch.testing.assert_close(losses.loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    torch.testing.assert_close(total, losses.loss + 0.5 * aux)
    assert losses.expert_counts.sum(1).tolist() == [2.0 * valid.sum()] * 2


@pytest.mark.parametrize("num_tokens", (8, 0))
def test_loss_of_a_micro_batch_without_labels_is_zero(num_tokens: int) -> None:
    """Be it that the rest of the batch has labels, or that it has none either."""
    labels = torch.full((1, 4), -100)
    logits = torch.randn(1, 4, 11, requires_grad=True)
    gate = torch.randn(4, 6, requires_grad=True)
    total, losses = LossFn(6, 0.5)(ModelOutput(logits, (routing_of(gate),)), labels, num_tokens)
    total.backward()
    assert total == 0 and losses.aux_loss == 0 and not losses.expert_counts.any()
    assert not logits.grad.any() and not gate.grad.any()


def test_z_loss_and_sequence_balance_against_their_formulas() -> None:
    """Token after token and sequence after sequence, with gradients; padding counts in neither."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(11, (3, 4), generator=generator)
    labels[0, 2:] = -100
    labels[2] = -100
    valid = labels != -100
    logits = torch.randn(3, 4, 11, generator=generator, dtype=torch.float64)
    gates = torch.randn(2, 12, 6, generator=generator, dtype=torch.float64)
    gates.requires_grad_()
    loss_fn = LossFn(6, 0.5, z_coef=0.25, aux_scope=AuxScope.sequence)
    total, losses = loss_fn(ModelOutput(logits, tuple(map(routing_of, gates))), labels, int(valid.sum()))
    (gradient,) = torch.autograd.grad(total, gates)

    z_loss, aux_loss = 0.0, 0.0
    for layer in gates:
        for sequence, kept in zip(layer.view(3, 4, 6), valid, strict=True):
            rows = sequence[kept]
            if len(rows) == 0:
                continue
            z_loss += sum(row.exp().sum().log() ** 2 for row in rows) / valid.sum() / 2
            chosen = F.one_hot(rows.topk(2).indices, 6).sum(1).double()  # [tokens, experts]
            products = 6 / 2 * chosen.mean(0) * rows.softmax(-1).mean(0)
            aux_loss += products.sum() * len(rows) / valid.sum() / 2
    torch.testing.assert_close(losses.z_loss, z_loss.detach())
    torch.testing.assert_close(losses.aux_loss, aux_loss.detach())
    (expected,) = torch.autograd.grad(0.25 * z_loss + 0.5 * aux_loss, gates)
    torch.testing.assert_close(gradient, expected)
    assert gradient[:, valid.flatten()].any() and not gradient[:, ~valid.flatten()].any()
