"""Triton kernels against plain PyTorch in float64.

Elsewhere than on a GPU they run in Triton's interpreter (tests/conftest.py), which computes as NumPy does, knows no
products in bfloat16, and accepts what the compiler refuses: see test_compilation.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moe_trainer.config.choices import Family
from moe_trainer.config.schema import RopeConfig
from moe_trainer.config.store import compose
from moe_trainer.kernels import (
    backend,
    cross_entropy,
    experts,
    grouped_gemm,
    latent_heads,
    norm,
    permute,
    rope,
    silu_mul,
)
from moe_trainer.kernels.keepable import keepable, kept_by
from moe_trainer.kernels.permute import Routes, sort_by_expert, sum_pairs
from moe_trainer.kernels.quantize import FP8, Quantized, quantize
from moe_trainer.kernels.router_gemm import router_logits
from moe_trainer.kernels.stochastic_rounding import RandomBits, round_stochastically
from moe_trainer.models.deepseek_v3 import model as deepseek
from moe_trainer.models.deepseek_v3.model import LatentAttention
from moe_trainer.models.registry import FAMILIES
from moe_trainer.models.rope import Rotation, rotation
from moe_trainer.parallel.initialize import initialize
from moe_trainer.testing.compare import relative_error
from moe_trainer.train.loss import LossFn

INTERPRETED = pytest.importorskip("triton").knobs.runtime.interpret

from moe_trainer.kernels.gpu import accumulate as gpu_accumulate  # noqa: E402
from moe_trainer.kernels.gpu import adamw as gpu_adamw  # noqa: E402
from moe_trainer.kernels.gpu import bfloat16_terms as gpu_bfloat16_terms  # noqa: E402
from moe_trainer.kernels.gpu import cross_entropy as gpu_cross_entropy  # noqa: E402
from moe_trainer.kernels.gpu import fp8 as gpu_fp8  # noqa: E402
from moe_trainer.kernels.gpu import grouped_gemm as gpu_grouped_gemm  # noqa: E402
from moe_trainer.kernels.gpu import norm as gpu_norm  # noqa: E402
from moe_trainer.kernels.gpu import normal as gpu_normal  # noqa: E402
from moe_trainer.kernels.gpu import rope as gpu_rope  # noqa: E402
from moe_trainer.kernels.gpu import rows as gpu_rows  # noqa: E402
from moe_trainer.kernels.gpu import silu_mul as gpu_silu_mul  # noqa: E402
from moe_trainer.kernels.gpu import sort as gpu_sort  # noqa: E402
from moe_trainer.kernels.gpu import sum_of_squares as gpu_sum_of_squares  # noqa: E402
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
    end = int(sort.offsets[-1])
    copies = gpu_rows.spread(tokens, sort.inverse, sort.offsets[-1:], end + 2, TOP_K)
    assert len(copies) == end + 2 and torch.equal(copies[:end], tokens[sort.order[:end] // TOP_K])
    rows = values(dtype, TOKENS * TOP_K, width)
    rows[end:] = float("nan")
    ours = gpu_rows.sum_pairs(rows, sort.inverse, sort.offsets[-1:], TOP_K)
    close(ours, sum_pairs(rows.cpu().double(), Routes(*(t.cpu() for t in sort[:3]), TOP_K)).to(DEVICE))


@pytest.mark.parametrize("num_experts", (1, 5, 64, 200))
@pytest.mark.parametrize("tokens", (0, 1, 700))
@pytest.mark.parametrize("first", (0, 3))
def test_sort(tokens: int, num_experts: int, first: int) -> None:
    """Also heavy skew, experts without a pair, and pairs of experts elsewhere, before and after these."""
    generator = torch.Generator().manual_seed(tokens + num_experts)
    skewed = (torch.rand(tokens, TOP_K, generator=generator) ** 4 * 1.3 * num_experts).long()
    for index in (skewed, torch.full_like(skewed, num_experts - 1), torch.full_like(skewed, 2 * num_experts)):
        ours = Routes(*gpu_sort.sort(index.flatten().to(DEVICE), num_experts, first), TOP_K)
        exact = sort_by_expert(index, num_experts, first)
        end = int(exact.offsets[-1])
        assert torch.equal(ours.offsets.cpu(), exact.offsets) and ours.offsets.dtype == exact.offsets.dtype
        assert torch.equal(ours.order[:end].cpu(), exact.order[:end])
        assert torch.equal(ours.inverse[ours.order], torch.arange(tokens * TOP_K, device=DEVICE))


LOADS = {
    "one expert": [300],
    "tiny first experts, one without rows": [1, 0, 5, 700, 128],
    "skew": [0, 3, 64, 65, 1000, 0, 127, 129],
    "many": [17] * (20 if INTERPRETED else 200),
    "no rows": [0, 0, 0],
}


ON_HOPPER = not INTERPRETED and torch.cuda.get_device_capability() == (9, 0)
HOPPER = pytest.mark.skipif(not ON_HOPPER, reason="for Hopper")
HOPPER_OR_INTERPRETER = pytest.mark.skipif(not (ON_HOPPER or INTERPRETED), reason="for Hopper")
MATRIX_DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
PRODUCT_RTOL = 2**-7 if INTERPRETED else 2**-8  # the interpreter cuts off what bfloat16 has not


@pytest.fixture(params=("long",) if INTERPRETED else ("long", "short"))
def sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products by the kernel that takes long sums, or by the one that takes short ones, whatever they are."""
    monkeypatch.setattr(gpu_grouped_gemm, "_SHORT_BYTES", {"long": 0, "short": 2**30}[request.param])


@HOPPER_OR_INTERPRETER
@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("widths", ((128, 136), (264, 1000), (512, 256)), ids=str)
@pytest.mark.parametrize("load", LOADS)
def test_grouped_gemm(load: str, widths: tuple[int, int]) -> None:
    """Both memory orders of the weight; rows of no expert, which hold anything, come last."""
    counts, (width, other) = LOADS[load], widths
    used, total = sum(counts), sum(counts) + 70
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    rows, grad = values(MATRIX_DTYPE, total, width), values(MATRIX_DTYPE, total, other, seed=1)
    rows[used:], grad[used:] = float("nan"), float("nan")
    weight = values(MATRIX_DTYPE, len(counts), width, other)
    parts = [part.double() for part in rows[:used].split(counts)]
    exact = torch.cat([part @ own for part, own in zip(parts, weight.double(), strict=True)])
    for given in (weight, weight.mT.contiguous().mT):
        ours = gpu_grouped_gemm.multiply(rows, given, offsets)
        assert ours.shape == (total, other)
        torch.testing.assert_close(ours[:used].double(), exact, rtol=PRODUCT_RTOL, atol=1e-3)
    exact = torch.stack([part.T @ own.double() for part, own in zip(parts, grad[:used].split(counts), strict=True)])
    ours = gpu_grouped_gemm.outer(rows, grad, offsets)
    torch.testing.assert_close(ours.double(), exact, rtol=PRODUCT_RTOL, atol=1e-3)
    assert ours.equal(gpu_grouped_gemm.outer(rows, grad, offsets))


@HOPPER_OR_INTERPRETER
@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("widths", ((128, 144), (272, 1008)), ids=str)
@pytest.mark.parametrize("load", LOADS)
def test_grouped_gemm_in_fp8(load: str, widths: tuple[int, int]) -> None:
    """Exact but for the sum: the factors are what they were rounded to."""
    counts, (width, other) = LOADS[load], widths
    used, total = sum(counts), sum(counts) + 70
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    rows = quantize(values(torch.float32, total, width), FP8)
    rows.scale[used:] = float("nan")
    weight = quantize(values(torch.float32, len(counts), other, width), FP8)
    parts = zip(rows.dequantize(torch.float64)[:used].split(counts), weight.dequantize(torch.float64), strict=True)
    exact = torch.cat([part @ own.T for part, own in parts])
    ours = gpu_grouped_gemm.multiply_scaled(*rows, *weight, offsets)
    assert ours.shape == (total, other) and ours.dtype is torch.bfloat16
    torch.testing.assert_close(ours[:used].double(), exact, rtol=2**-7, atol=2**-4)  # sums in fp8 keep 14 bits


@HOPPER
@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("first", (0, 7, 98))
def test_grouped_gemm_touches_no_memory_but_its_own(first: int) -> None:
    """A tensor alone in what the driver mapped, whose first tiles are not full: addresses before it are errors."""
    torch.cuda.empty_cache()
    rows, weight = values(torch.bfloat16, 20000, 1024), values(torch.bfloat16, 3, 1024, 1024)
    offsets = torch.tensor([first, first, 19990], device=DEVICE, dtype=torch.int32)
    out, grad = gpu_grouped_gemm.multiply(rows, weight, offsets), gpu_grouped_gemm.outer(rows, rows, offsets)
    torch.cuda.synchronize()
    exact = rows[first:19990].double()
    torch.testing.assert_close(out[first:19990].double(), exact @ weight[2].double(), rtol=2**-8, atol=1e-2)
    torch.testing.assert_close(grad[2].double(), exact.T @ exact, rtol=2**-8, atol=1e-2)


class Keeper(TorchDispatchMode):
    """Names the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.append(op.name())
        return op(*args, **(kwargs or {}))


@HOPPER
@pytest.mark.parametrize("sizes", ((128, 136), (1000, 264), (768, 2048)), ids=str)
@pytest.mark.parametrize("load", LOADS)
def test_products_with_swiglu(load: str, sizes: tuple[int, int]) -> None:
    """Forward and backward, against float64. Rows of no expert hold anything."""
    from moe_trainer.kernels.gpu import ping_pong

    counts, (width, hidden) = LOADS[load], sizes
    used, total = sum(counts), sum(counts) + 70
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    rows, grad = values(torch.bfloat16, total, hidden), values(torch.bfloat16, total, hidden, seed=1)
    rows[used:], grad[used:] = float("nan"), float("nan")
    gate_up_proj = values(torch.bfloat16, len(counts), 2, width, hidden) / hidden**0.5 * 2
    down_proj = values(torch.bfloat16, len(counts), hidden, width) / hidden**0.5
    order = torch.randperm(total, device=DEVICE)
    weights = values(torch.float32, total).sigmoid()

    gate_up, activated = ping_pong.swiglu(rows, gate_up_proj, offsets, weights, order)
    parts = zip(rows[:used].double().split(counts), gate_up_proj.flatten(1, 2).double(), strict=True)
    exact = torch.cat([part @ own.T for part, own in parts])
    torch.testing.assert_close(gate_up[:used].double(), exact, rtol=2**-8, atol=1e-3)
    of_rows = weights.double()[order[:used], None].requires_grad_()
    wide = gate_up[:used].double().requires_grad_()  # as it was rounded
    plain = experts.gated(*wide.chunk(2, dim=1)) * of_rows
    torch.testing.assert_close(activated[:used].double(), plain, rtol=2**-8, atol=1e-5)

    gate_up[used:] = float("nan")
    parts = zip(grad[:used].double().split(counts), down_proj.double(), strict=True)
    upstream = torch.cat([part @ own for part, own in parts])
    wide_grad, weights_grad = torch.autograd.grad(plain, (wide, of_rows), upstream)
    given = grad, down_proj, offsets, weights, order, gate_up
    ours = ping_pong.swiglu_backward(*given)
    torch.testing.assert_close(ours[0][:used].double(), wide_grad, rtol=2**-8, atol=1e-4)
    assert torch.equal(ours[1][:used], activated[:used])
    exact = torch.zeros(total, dtype=torch.float64, device=DEVICE)
    exact[order[:used]] = weights_grad.flatten()
    torch.testing.assert_close(ours[2].double(), exact, rtol=1e-4, atol=1e-4 * width**0.5)
    again = ping_pong.swiglu_backward(*given)
    assert all(torch.equal(one[:used], other[:used]) for one, other in zip(ours[:2], again[:2], strict=True))
    assert torch.equal(ours[2], again[2])


@HOPPER
@pytest.mark.parametrize("clamped", (False, True))
def test_which_experts_have_swiglu_in_the_product(monkeypatch: pytest.MonkeyPatch, clamped: bool) -> None:
    """The plain ones, unless activation checkpointing wants the product alone; gradients are those without it."""
    from moe_trainer.kernels.gpu import ping_pong
    from moe_trainer.models.moe import ClampedExperts, Experts

    taken: list[str] = []
    for name in ("swiglu", "swiglu_backward"):
        kernel = getattr(ping_pong, name)
        record = lambda *args, name=name, kernel=kernel: (taken.append(name), kernel(*args))[1]  # noqa: E731
        monkeypatch.setattr(ping_pong, name, record)
    sizes = 256, 128, 8
    layer = ClampedExperts(*sizes, experts.Clamp(1.7, 0.9)) if clamped else Experts(*sizes)
    layer = layer.to(DEVICE, torch.bfloat16)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = values(torch.bfloat16, 2500, 256).requires_grad_()
    weights, index = values(torch.float32, 2500, 8).softmax(-1).topk(2)
    inputs = x, weights.requires_grad_(), *layer.parameters()

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(x, index, weights), inputs, values(torch.bfloat16, 2500, 256, seed=1))

    ours = gradients()
    assert taken == ([] if clamped else ["swiglu", "swiglu_backward"])
    keeper = Keeper()
    with kept_by(keeper):
        layer(x, index, weights)
    assert len(taken) == (0 if clamped else 2) and "moe_trainer::grouped_mm" in keeper.seen
    monkeypatch.setattr(backend, "uses_reference", True)
    for mine, other in zip(ours, gradients(), strict=True):
        assert relative_error(mine.float(), other.float()) < 1e-2
    assert len(taken) == (0 if clamped else 2)


@HOPPER
def test_which_products_take_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, ...]] = []
    for name in ("multiply", "outer"):
        kernel = getattr(gpu_grouped_gemm, name)
        record = lambda *args, kernel=kernel: (taken.append(args[1].shape), kernel(*args))[1]  # noqa: E731
        monkeypatch.setattr(gpu_grouped_gemm, name, record)
    offsets = torch.tensor([100, 4096], device=DEVICE, dtype=torch.int32)
    rows, weight = values(torch.bfloat16, 4096, 256), values(torch.bfloat16, 2, 128, 256)
    for own in (weight.mT, weight.float().mT, weight[:, :64].mT, weight.mT.contiguous()):
        multiplied = grouped_gemm.multiply(rows.to(own.dtype), own, offsets)
        exact = torch.cat([rows[:100].double() @ own[0].double(), rows[100:].double() @ own[1].double()])
        torch.testing.assert_close(multiplied.double(), exact, rtol=2**-8, atol=1e-2)
    grouped_gemm.multiply(rows[:4000], weight.mT, offsets - 96)
    grouped_gemm.outer(rows, rows[:, :128], offsets)
    assert taken == [(2, 256, 128), (2, 256, 128), (4096, 128)]
    monkeypatch.setattr(backend, "uses_reference", True)
    grouped_gemm.multiply(rows, weight.mT, offsets)
    assert len(taken) == 3


@HOPPER_OR_INTERPRETER
def test_a_product_is_an_operator_only_where_one_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a region that checkpointing may keep; elsewhere in the layer it does without PyTorch's dispatcher."""
    direct, keeper = [], Keeper()
    if INTERPRETED:
        library = torch.library.Library("moe_trainer", "FRAGMENT")
        library.impl("grouped_mm", gpu_grouped_gemm._grouped_mm, "CPU")
    product = gpu_grouped_gemm._grouped_mm  # which the operator keeps
    monkeypatch.setattr(gpu_grouped_gemm, "_grouped_mm", lambda *args: (direct.append(args), product(*args))[1])
    offsets = torch.tensor([5, 37], device=DEVICE, dtype=torch.int32)
    rows, weight = values(MATRIX_DTYPE, 37, 64), values(MATRIX_DTYPE, 2, 64, 128)
    with kept_by(keeper):
        apart = gpu_grouped_gemm.multiply(rows, weight, offsets)
        assert len(direct) == 1 and keeper.seen == []
        with keepable():
            watched = gpu_grouped_gemm.multiply(rows, weight, offsets)
    assert len(direct) == 1 and keeper.seen.count("moe_trainer::grouped_mm") == 1
    assert torch.equal(apart, watched)
    if INTERPRETED:
        library._destroy()


@pytest.mark.parametrize("clamp", (None, experts.Clamp(1.7, 0.9)), ids=("plain", "clamped"))
@pytest.mark.parametrize("width", (8, 100, 1500))
def test_swiglu(dtype: torch.dtype, width: int, clamp: experts.Clamp | None) -> None:
    """Clamped, also with a bias."""
    sort = routes()
    end = int(sort.offsets[-1])
    gate_up, grad = values(dtype, TOKENS * TOP_K, 2 * width), values(dtype, TOKENS * TOP_K, width)
    weights = values(torch.float32, TOKENS, TOP_K).sigmoid()
    bias = None if clamp is None else values(dtype, NUM_EXPERTS, 2 * width)
    of_rows = None if bias is None else grouped_gemm.expert_of_rows(len(gate_up), sort.offsets)
    more, exact_more = (bias, of_rows, clamp), (None if bias is None else bias.cpu().double(), clamp)
    exact_sort = Routes(*(t.cpu() for t in sort[:3]), TOP_K)
    exact = [t.cpu().double() for t in (gate_up, grad, weights)]
    ours = gpu_swiglu.swiglu(gate_up, weights, sort.order, sort.offsets[-1:], *more)
    close(ours[:end], experts.swiglu(exact[0], exact[2], exact_sort, *exact_more)[:end].to(DEVICE))
    ours = gpu_swiglu.swiglu_backward(gate_up, grad, weights, sort.order, sort.offsets[-1:], *more)
    theirs = experts.swiglu_backward(*exact, exact_sort, *exact_more)
    close(ours[0][:end], theirs[0][:end].to(DEVICE))
    close(ours[1][:end], theirs[1][:end].to(DEVICE))
    torch.testing.assert_close(
        ours[2].view_as(weights), theirs[2].to(DEVICE, torch.float32), rtol=1e-5, atol=1e-5 * width**0.5
    )


def test_swiglu_of_what_is_no_number() -> None:
    """Clamping does not make a number of it, forward or backward."""
    sort, clamp = routes(), experts.Clamp(1.7, 0.9)
    gate_up, grad = values(torch.float32, TOKENS * TOP_K, 16), values(torch.float32, TOKENS * TOP_K, 8)
    weights = values(torch.float32, TOKENS, TOP_K).sigmoid()
    gate_up[0, 3], gate_up[1, 3], gate_up[1, 8 + 3] = float("nan"), 0.5, float("nan")
    given = weights, sort.order, sort.offsets[-1:], None, None, clamp
    assert gpu_swiglu.swiglu(gate_up, *given)[:2, 3].isnan().all()
    assert gpu_swiglu.swiglu_backward(gate_up, grad, *given)[0][:2, 3].isnan().all()


@pytest.mark.parametrize("shape", ((5, 3, 100), (1, 5000), (0, 4)))
def test_silu_mul(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up, grad = (values(dtype, *shape, seed=seed) for seed in range(3))
    exact_inputs = [t.double().requires_grad_() for t in (gate, up)]
    exact = F.silu(exact_inputs[0]) * exact_inputs[1]
    close(gpu_silu_mul.silu_mul(gate, up), exact)
    ours = gpu_silu_mul.silu_mul_backward(grad, gate, up)
    for mine, other in zip(ours, torch.autograd.grad(exact, exact_inputs, grad.double()), strict=True):
        close(mine, other)


@pytest.mark.parametrize("shape", ((0,), (3, 5), (70, 300)))
def test_accumulate(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """A first gradient of the type, and a second one; then a third in the memory of the sum."""
    first, second, third = (values(dtype, *shape, seed=seed) for seed in range(3))
    total = torch.empty(shape, device=DEVICE)
    gpu_accumulate.add(first, second, total)
    assert torch.equal(total, first.float() + second.float())
    gpu_accumulate.add(total, third, total)
    assert torch.equal(total, first.float() + second.float() + third.float())


def test_sum_of_squares(dtype: torch.dtype) -> None:
    """Small, empty and large tensors; a value that is none, or too large, shows."""
    tensors = [values(dtype, *shape) for shape in ((3,), (0, 5), (1,), (70, 300), (8192,))]
    exact = sum(tensor.double().square().sum() for tensor in tensors)
    torch.testing.assert_close(gpu_sum_of_squares.sum_of_squares(tensors).double(), exact, rtol=1e-5, atol=0)
    for bad in (float("nan"), float("inf"), 1e30):
        assert not gpu_sum_of_squares.sum_of_squares([*tensors, tensors[0] * bad]).isfinite()


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


@pytest.mark.parametrize("have_own_positions", (False, True))
@pytest.mark.parametrize("shape", ((2, 7, 3, 24), (1, 5, 40, 128), (3, 4, 1, 6)), ids=str)
def test_rotated_norm(
    dtype: torch.dtype, shape: tuple[int, ...], have_own_positions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of heads that are parts of wider rows, forward and both gradients."""
    monkeypatch.setattr(norm, "has_kernel", lambda x: x.dtype is dtype)
    batch, seq, heads, width = shape
    wide, weight = values(dtype, batch, seq, heads, width + 5), values(torch.float32, width)
    tokens = batch * seq if have_own_positions else seq
    turn = rotation(torch.arange(tokens, device=DEVICE) * 3 % 11, width, RopeConfig(), dtype)
    inputs = wide.requires_grad_(), weight.requires_grad_()
    exact_inputs = [part.detach().double().cpu().requires_grad_() for part in inputs]
    normed = F.rms_norm(exact_inputs[0][..., 2:-3], (width,), exact_inputs[1], 1e-5)
    exact = rope.rotate(normed.transpose(1, 2), *(part.cpu().double() for part in turn))
    out = norm.rms_norm_rotated(wide[..., 2:-3], weight, 1e-5, *turn)
    close(out, exact.to(DEVICE))
    grad = values(dtype, batch, heads, seq, width, seed=1)
    ours = torch.autograd.grad(out, inputs, grad)
    for mine, other in zip(ours, torch.autograd.grad(exact, exact_inputs, grad.double().cpu()), strict=True):
        assert relative_error(mine.cpu(), other) < (1e-5 if dtype is torch.float32 else 1e-2)


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


@pytest.mark.parametrize("interleave", (False, True))
@pytest.mark.parametrize("sizes", ((3, 24, 8, 16), (16, 128, 64, 128), (1, 16, 6, 40)), ids=str)
def test_latent_heads(
    dtype: torch.dtype, sizes: tuple[int, ...], interleave: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of seven positions; the shared key is a part of a wider tensor. Against the model's plain formulas."""
    heads, nope, rope_dim, value = sizes
    layer = LatentAttention.__new__(LatentAttention)
    torch.nn.Module.__init__(layer)
    layer.nope_dim, layer.rope_dim, layer.value_dim, layer.rope_interleave = nope, rope_dim, value, interleave
    turn = rotation(torch.arange(7, device=DEVICE), rope_dim, RopeConfig(), dtype)
    wide = values(dtype, 2, 7, 5 + rope_dim)
    inputs = values(dtype, 2, 7, heads, nope + rope_dim), values(dtype, 2, 7, heads, nope + value), wide
    inputs = [part.requires_grad_() for part in inputs]
    exact_inputs = [part.detach().cpu().double().requires_grad_() for part in inputs]
    monkeypatch.setattr(deepseek, "has_latent_kernel", lambda query, cos: query.dtype is dtype)
    ours = layer.heads(*inputs[:2], inputs[2][..., 5:], turn)
    exact_turn = Rotation(turn.cos.cpu().double(), turn.sin.cpu().double())
    exact = layer.heads(*exact_inputs[:2], exact_inputs[2][..., 5:], exact_turn)
    grads = [values(dtype, *part.shape, seed=seed) for seed, part in enumerate(exact)]
    for mine, other in zip(ours, exact, strict=True):
        close(mine, other.to(DEVICE))
    theirs = torch.autograd.grad(exact, exact_inputs, [grad.cpu().double() for grad in grads])
    for mine, other in zip(torch.autograd.grad(ours, inputs, grads), theirs, strict=True):
        close(mine, other.to(DEVICE))


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


def test_cross_entropy_of_what_is_no_number() -> None:
    """In one place, or everywhere, in a vocabulary of one block and a part: it is not lost."""
    logits = values(torch.float32, 4, 5000)
    logits[0, 4999], logits[1, 7], logits[2] = float("nan"), float("nan"), float("nan")
    logits[3, :4990] = float("-inf")
    highest, total, _ = gpu_cross_entropy.statistics(logits, torch.zeros(4, dtype=torch.int64, device=DEVICE))
    assert total[:3].isnan().all()
    torch.testing.assert_close(highest[3] + total[3].log(), logits[3].logsumexp(0))


@pytest.mark.parametrize("width", (16, 100, 5000))
def test_rounding_to_fp8(dtype: torch.dtype, width: int) -> None:
    """Rows, and columns of each expert, with empty ones and those of very different size."""
    x = values(dtype, 3, 70, width) * torch.logspace(-3, 3, width, device=DEVICE).to(dtype)
    x[1, 5], x[2, :, 7] = 0, 0
    for ours, theirs in (
        (gpu_fp8.quantize_rows(x), quantize(x.cpu(), FP8)),
        (gpu_fp8.quantize_columns(x), quantize(x.mT.cpu(), FP8)),
    ):
        theirs = Quantized(*(part.to(DEVICE) for part in theirs))
        torch.testing.assert_close(ours[1], theirs.scale, rtol=1e-6, atol=0)
        differ = ours[0].float() != theirs.values.float()
        # A quotient that differs in its last bit may round to the other neighbour.
        assert INTERPRETED or differ.float().mean() < 1e-3
        rtol = 0.51 if INTERPRETED else 0.15  # the interpreter forgets the carry into the exponent
        torch.testing.assert_close(ours[0].float(), theirs.values.float(), rtol=rtol, atol=2**-9)


def test_normal_numbers() -> None:
    """A function of seed and place; of the right shape, and without a pattern between neighbours or seeds."""
    a, longer, other = (
        gpu_normal.normal_(torch.empty(size, device=DEVICE), seed, 0.5)
        for size, seed in ((9_999, 2**62 + 3), (20_000, 2**62 + 3), (9_999, 2**62 + 4))
    )
    assert torch.equal(a, longer[: len(a)])
    exact = torch.distributions.Normal(0.0, 0.5)
    for sample in (longer, other):
        steps = torch.arange(len(sample), device=DEVICE) / len(sample)
        assert (exact.cdf(sample.sort().values) - steps).abs().max() < 1.95 / len(sample) ** 0.5  # Kolmogorov, 0.1%
    for left, right in ((a, other), (a[1:], a[:-1])):
        assert abs(torch.corrcoef(torch.stack((left, right)))[0, 1]) < 0.04


def test_no_rows() -> None:
    empty = sort_by_expert(torch.empty(0, 2, dtype=torch.int64, device=DEVICE), 4)
    assert gpu_rows.spread(values(torch.float32, 0, 64), empty.inverse, empty.offsets[-1:], 0, 2).shape == (0, 64)
    assert gpu_rows.sum_pairs(values(torch.float32, 0, 64), empty.inverse, empty.offsets[-1:], 2).shape == (0, 64)


def whole(size: int, name: str = "weight") -> RandomBits:
    return RandomBits.of(name, (size,), [slice(0, size)])


@pytest.mark.parametrize("size", (5, 10000))
def test_adamw(size: int) -> None:
    """Three steps, the second of them skipped; the copy is the weight, rounded."""
    weight, exp_avg, exp_avg_sq = (
        values(torch.float32, size),
        torch.zeros(size).to(DEVICE),
        torch.zeros(size).to(DEVICE),
    )
    exact = weight.double().requires_grad_()
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.3}
    reference = torch.optim.AdamW([exact], **options)
    taken, copy = torch.zeros((), device=DEVICE), weight.bfloat16()
    for number, factor in enumerate((0.5, float("nan"), 2.0)):
        grad = values(torch.float32, size, seed=number)
        is_finite = factor == factor
        taken += is_finite
        scale = torch.tensor(factor, device=DEVICE)
        gpu_adamw.adamw_(weight, grad, exp_avg, exp_avg_sq, taken, scale, *options.values(), whole(size), copy)
        if not INTERPRETED:  # which cuts off instead
            assert torch.equal(copy, weight.bfloat16())
        torch.testing.assert_close(copy.float(), weight, rtol=2**-7, atol=0)
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
            gpu_adamw.adamw_(weight, grad, exp_avg, exp_avg_sq, taken, factor, *options.values(), whole(size))
    for ours, wide in zip(rounded[1:], exact[1:], strict=True):
        ratio = ours.double() / wide.double()
        assert abs(ratio.mean() - 1) < 2e-3  # nothing lost on average
        assert 1e-4 < ratio.std() < 0.1  # and rounded it was
    assert relative_error(rounded[0], exact[0]) < 0.02


ADAMW = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.3}
BLOCKS = {
    "whole": (slice(0, 4), slice(0, 2), slice(0, 12), slice(0, 40)),
    "rows": (slice(1, 3), slice(0, 2), slice(0, 12), slice(0, 40)),
    "parts of rows": (slice(1, 3), slice(0, 2), slice(0, 12), slice(20, 40)),
    "parts of parts": (slice(0, 4), slice(0, 2), slice(6, 12), slice(20, 40)),
}


def adamw_once(dtypes: tuple[torch.dtype, ...], source: RandomBits, size: int) -> list[torch.Tensor]:
    """Weight and moments of these types after step 3, from bfloat16 values; the gradient is bfloat16 too."""
    start = [values(torch.float32, size, seed=seed).bfloat16() for seed in range(4)]
    grad, state = start[0], [start[1], 0.1 * start[2], start[3].square()]
    stored = [value.to(dtype, copy=True) for value, dtype in zip(state, dtypes, strict=True)]
    step, factor = torch.full((), 3.0, device=DEVICE), torch.full((), 0.5, device=DEVICE)
    gpu_adamw.adamw_(stored[0], grad, *stored[1:], step, factor, *ADAMW.values(), source)
    return stored


@pytest.mark.parametrize("block", BLOCKS)
def test_adamw_rounds_an_element_by_its_place(block: str) -> None:
    """Bit for bit as PyTorch rounds what the kernel computes, each of the three by bits of its own."""
    source = RandomBits.of("weight", (4, 2, 12, 40), BLOCKS[block])
    size = math.prod(source.sizes)
    wide = adamw_once((torch.float32,) * 3, source, size)
    bits = source.draw(3, wide[0].device)
    expected = [round_stochastically(value, bits >> 16 * number) for number, value in enumerate(wide)]
    for rounded in ((0,), (1, 2), (0, 1, 2)):
        dtypes = tuple(torch.bfloat16 if number in rounded else torch.float32 for number in range(3))
        for number, value in enumerate(adamw_once(dtypes, source, size)):
            if number in rounded:
                assert torch.equal(value, expected[number])
            else:  # the compiler contracts products and sums differently for other types
                torch.testing.assert_close(value, wide[number], rtol=1e-6, atol=1e-9)


def test_adamw_with_rounded_weights_is_right_on_average() -> None:
    """Against float64: never farther than the next bfloat16, and in the mean of many roundings the exact value."""
    size, many = 600, 200
    start = [values(torch.float32, size, seed=seed).bfloat16().double() for seed in range(4)]
    exact = start[1].clone().requires_grad_()
    reference = torch.optim.AdamW([exact], **ADAMW)
    reference.state[exact] = {
        "step": torch.tensor(2.0), "exp_avg": start[2].mul(0.1).bfloat16().double(),
        "exp_avg_sq": start[3].bfloat16().square().double(),
    }  # fmt: skip
    exact.grad = 0.5 * start[0]
    reference.step()
    moments = reference.state[exact]
    goals = [exact.detach(), moments["exp_avg"], moments["exp_avg_sq"]]
    draws = [adamw_once((torch.bfloat16,) * 3, whole(size, f"{number}"), size) for number in range(many)]
    for goal, found in zip(goals, zip(*draws, strict=True), strict=True):
        found = torch.stack(found).double()
        step = 2.0 ** (goal.abs().log2().floor() - 7)  # between neighbours
        assert ((found - goal).abs() < step * 1.001).all()
        error = (found.mean(0) - goal) / step
        assert error.abs().max() < 5 * 0.5 / many**0.5
        assert error.mean().abs() < 5 * 0.5 / (many * size) ** 0.5


@pytest.mark.parametrize("shape", ((37, 60), (1, 128), (300, 1)))
def test_bfloat16_terms(shape: tuple[int, int]) -> None:
    x = values(torch.float32, *shape)
    first, again, second, third = gpu_bfloat16_terms.stacked_terms(x)
    assert torch.equal(first, again)
    total = first.double() + second.double() + third.double()
    assert ((total - x.double()).abs() <= x.double().abs() * 2**-24).all()
    assert not torch.equal(first.double() + second.double(), x.double())  # two would not do
    assert torch.equal(gpu_bfloat16_terms.joined_terms(x), torch.cat((third, second, first, first), 1))


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
        for module in (norm, rope, experts, permute, cross_entropy, silu_mul, latent_heads):
            monkeypatch.setattr(module, "has_kernel", lambda x: not calls.append(1))
    actual = compute(DEVICE)
    assert calls or not INTERPRETED
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-4, errors
