"""Triton kernels against plain PyTorch in float64.

Elsewhere than on a GPU they run in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/gpu/test_kernels.py`.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from moe_trainer.config.schema import Family, RopeConfig
from moe_trainer.config.store import compose
from moe_trainer.kernels import cross_entropy, experts, norm, permute, rope
from moe_trainer.kernels.permute import Routes, sort_by_expert, sum_pairs
from moe_trainer.kernels.router_gemm import router_logits
from moe_trainer.models.registry import FAMILIES
from moe_trainer.models.rope import rotation
from moe_trainer.parallel.initialize import initialize
from moe_trainer.testing.compare import relative_error
from moe_trainer.train.loss import LossFn

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from moe_trainer.kernels.gpu import adamw as gpu_adamw  # noqa: E402
from moe_trainer.kernels.gpu import cross_entropy as gpu_cross_entropy  # noqa: E402
from moe_trainer.kernels.gpu import norm as gpu_norm  # noqa: E402
from moe_trainer.kernels.gpu import rope as gpu_rope  # noqa: E402
from moe_trainer.kernels.gpu import rows as gpu_rows  # noqa: E402
from moe_trainer.kernels.gpu import swiglu as gpu_swiglu  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
NUM_EXPERTS, TOP_K, TOKENS = 5, 3, 37


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def values(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def routes() -> Routes:
    """Some pairs go to experts elsewhere."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(TOKENS, NUM_EXPERTS + 1, generator=generator).topk(TOP_K).indices
    return sort_by_expert(chosen.to(DEVICE), NUM_EXPERTS)


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Within the rounding of our type."""
    step = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), exact.double(), rtol=4 * step, atol=8 * step)


@pytest.mark.parametrize("width", (64, 100, 2048))
def test_rows(dtype: torch.dtype, width: int) -> None:
    sort, tokens = routes(), values(dtype, TOKENS, width)
    assert torch.equal(gpu_rows.gather(tokens, sort.order, TOP_K), tokens[sort.order // TOP_K])
    rows = values(dtype, TOKENS * TOP_K, width)
    rows[int(sort.offsets[-1]) :] = float("nan")
    ours = gpu_rows.sum_pairs(rows, sort.inverse, sort.offsets[-1:], TOP_K)
    close(ours, sum_pairs(rows.cpu().double(), Routes(*(t.cpu() for t in sort[:3]), TOP_K)).to(DEVICE))


@pytest.mark.parametrize("width", (8, 100, 1500))
def test_swiglu(dtype: torch.dtype, width: int) -> None:
    sort = routes()
    end = int(sort.offsets[-1])
    gate_up, grad = values(dtype, TOKENS * TOP_K, 2 * width), values(dtype, TOKENS * TOP_K, width)
    weights = values(torch.float32, TOKENS, TOP_K).sigmoid()
    exact_sort = Routes(*(t.cpu() for t in sort[:3]), TOP_K)
    exact = [t.cpu().double() for t in (gate_up, grad, weights)]
    ours = gpu_swiglu.swiglu(gate_up, weights, sort.order, sort.offsets[-1:])
    close(ours[:end], experts.swiglu(exact[0], exact[2], exact_sort)[:end].to(DEVICE))
    ours = gpu_swiglu.swiglu_backward(gate_up, grad, weights, sort.order, sort.offsets[-1:])
    theirs = experts.swiglu_backward(*exact, exact_sort)
    close(ours[0][:end], theirs[0][:end].to(DEVICE))
    close(ours[1][:end], theirs[1][:end].to(DEVICE))
    torch.testing.assert_close(
        ours[2].view_as(weights), theirs[2].to(DEVICE, torch.float32), rtol=1e-5, atol=1e-5 * width**0.5
    )


@pytest.mark.parametrize("shape", ((33, 100), (300, 16), (7, 2048), (5, 5000)))
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, grad, weight = values(dtype, *shape), values(dtype, *shape, seed=1), values(torch.float32, shape[1])
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = F.rms_norm(exact_x, shape[1:], exact_weight, 1e-5)
    out, inverse_rms = gpu_norm.rms_norm(x, weight, 1e-5)
    close(out, exact)
    grad_x, grad_weight = gpu_norm.rms_norm_backward(grad, x, weight, inverse_rms)
    exact_grads = torch.autograd.grad(exact, (exact_x, exact_weight), grad.double())
    close(grad_x, exact_grads[0])
    torch.testing.assert_close(grad_weight.double(), exact_grads[1], rtol=1e-4, atol=1e-4)


def test_rms_norm_of_a_part_of_a_wider_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows do not follow one another in memory."""
    monkeypatch.setattr(norm, "has_kernel", lambda x: x.dtype is torch.float32)
    wide, weight = values(torch.float32, 2, 5, 40), values(torch.float32, 32)
    inputs = wide.requires_grad_(), weight.requires_grad_()
    exact = F.rms_norm(wide[..., :32].double(), (32,), weight.double(), 1e-5)
    out = norm.rms_norm(wide[..., :32], weight, 1e-5)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    grad = values(torch.float32, 2, 5, 80, seed=1)[..., 3:35]
    ours = torch.autograd.grad(out, inputs, grad)
    for mine, other in zip(ours, torch.autograd.grad(exact, inputs, grad.double()), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ((2, 3, 7, 24), (1, 40, 5, 128)))
def test_rope(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    batch, heads, seq, width = shape
    x = values(dtype, batch, seq, heads, width).transpose(1, 2)
    turn = rotation(torch.arange(seq, device=DEVICE), width, RopeConfig(), dtype)
    exact_x = x.cpu().double().requires_grad_()
    exact = rope.rotate(exact_x, turn.cos.cpu().double(), turn.sin.cpu().double())
    close(gpu_rope.rotate(x, *turn, inverse=False), exact.to(DEVICE))
    grad = values(dtype, *shape, seed=1)
    (exact_grad,) = torch.autograd.grad(exact, exact_x, grad.cpu().double())
    close(gpu_rope.rotate(grad, *turn, inverse=True), exact_grad.to(DEVICE))


@pytest.mark.parametrize("vocab", (50, 9000))
def test_cross_entropy(dtype: torch.dtype, vocab: int) -> None:
    logits = 3 * values(dtype, 9, vocab)
    labels = torch.arange(9, device=DEVICE) * (vocab // 9)
    labels[3], labels[4] = -100, vocab + 7
    scale = torch.linspace(0, 2, 9, device=DEVICE)
    exact = cross_entropy.statistics(logits.cpu().double(), labels.cpu())
    ours = gpu_cross_entropy.statistics(logits, labels)
    for mine, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.cpu().double(), other, rtol=1e-5, atol=1e-6)
    normalizer = (exact[0] + exact[1].log()).to(DEVICE)
    theirs = cross_entropy.gradient_(logits.cpu().double(), labels.cpu(), normalizer.cpu(), scale.cpu().double())
    close(gpu_cross_entropy.gradient_(logits.clone(), labels, normalizer.float(), scale), theirs.to(DEVICE))


def test_no_rows() -> None:
    empty = sort_by_expert(torch.empty(0, 2, dtype=torch.int64, device=DEVICE), 4)
    assert gpu_rows.gather(values(torch.float32, 0, 64), empty.order, 2).shape == (0, 64)
    assert gpu_rows.sum_pairs(values(torch.float32, 0, 64), empty.inverse, empty.offsets[-1:], 2).shape == (0, 64)


@pytest.mark.parametrize("size", (5, 10000))
def test_adamw(size: int) -> None:
    """Three steps, the second of them skipped."""
    weight, exp_avg, exp_avg_sq = (
        values(torch.float32, size),
        torch.zeros(size).to(DEVICE),
        torch.zeros(size).to(DEVICE),
    )
    exact = weight.double().requires_grad_()
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.3}
    reference = torch.optim.AdamW([exact], **options)
    taken = torch.zeros((), device=DEVICE)
    for number, factor in enumerate((0.5, float("nan"), 2.0)):
        grad = values(torch.float32, size, seed=number)
        is_finite = factor == factor
        taken += is_finite
        scale = torch.tensor(factor, device=DEVICE)
        gpu_adamw.adamw_(weight, grad, exp_avg, exp_avg_sq, taken, scale, *options.values())
        if is_finite:
            exact.grad = factor * grad.double()
            reference.step()
    state = reference.state[exact]
    torch.testing.assert_close(weight.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(exp_avg.double(), state["exp_avg"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(exp_avg_sq.double(), state["exp_avg_sq"], rtol=1e-5, atol=1e-6)


def test_adamw_with_rounded_moments() -> None:
    """Constant gradients: float32 moments rise towards them in steps that bfloat16 alone would soon lose."""
    size, options = 4096, {"lr": 1e-2, "betas": (0.99, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    grad = values(torch.float32, size)
    exact, rounded = ([torch.zeros(size).to(DEVICE) for _ in range(3)] for _ in range(2))
    rounded[1:] = [moment.bfloat16() for moment in rounded[1:]]
    taken, factor = torch.zeros((), device=DEVICE), torch.ones((), device=DEVICE)
    for _ in range(200):
        taken += 1
        for weight, exp_avg, exp_avg_sq in (exact, rounded):
            gpu_adamw.adamw_(weight, grad, exp_avg, exp_avg_sq, taken, factor, *options.values(), number=3)
    for ours, wide in zip(rounded[1:], exact[1:], strict=True):
        ratio = ours.double() / wide.double()
        assert abs(ratio.mean() - 1) < 2e-3  # nothing lost on average
        assert 1e-4 < ratio.std() < 0.1  # and rounded it was
    assert relative_error(rounded[0], exact[0]) < 0.02


@pytest.mark.skipif(INTERPRETED, reason="a product of PyTorch's that CPUs lack")
def test_router_logits() -> None:
    """As exact as the scalar units are: float32 weights and gradients lose nothing to bfloat16."""
    x, weight = values(torch.bfloat16, 301, 512), values(torch.float32, 40, 512, seed=1)
    grad = values(torch.float32, 301, 40, seed=2)
    inputs = x.requires_grad_(), weight.requires_grad_()
    exact_inputs = [t.detach().cpu().double().requires_grad_() for t in inputs]
    exact = exact_inputs[0] @ exact_inputs[1].t()
    exact_grads = torch.autograd.grad(exact, exact_inputs, grad.cpu().double())
    logits = router_logits(*inputs)
    grad_x, grad_weight = torch.autograd.grad(logits, inputs, grad)
    scalar = relative_error((x.float() @ weight.t()).cpu(), exact)
    assert relative_error(logits.cpu(), exact) < max(2 * scalar, 1e-6)
    assert relative_error(grad_weight.cpu(), exact_grads[1]) < 2e-6
    close(grad_x, exact_grads[0].to(DEVICE))


@pytest.mark.parametrize("family", Family)
def test_every_family_through_the_kernels(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and every gradient of the tiny model, with and without kernels: what they are given in a model, parts of
    wider tensors included, is not what a test of one kernel thinks of."""
    cfg = compose("train", [f"+recipe={family.value}_tiny"]).model
    model = FAMILIES[family].build(cfg)
    initialize(model, 0, cfg.initializer_range)
    ids = torch.randint(cfg.vocab_size, (2, 10), generator=torch.Generator().manual_seed(0))

    def compute(device: str) -> dict[str, torch.Tensor]:
        model.to(device).zero_grad()
        output = model(ids[:, :-1].to(device))
        loss, _ = LossFn(cfg.num_experts, 0.1, z_coef=0.1)(output, ids[:, 1:].to(device), 18)
        logits = output.logits.detach().cpu().clone()  # the backward pass uses their memory
        loss.backward()
        return {"logits": logits} | {name: p.grad.cpu().clone() for name, p in model.named_parameters()}

    expected = compute("cpu")
    calls = []
    if INTERPRETED:
        for module in (norm, rope, experts, permute, cross_entropy):
            monkeypatch.setattr(module, "has_kernel", lambda x: not calls.append(1))
    actual = compute(DEVICE)
    assert calls or not INTERPRETED
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-4, errors
