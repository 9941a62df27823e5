import pytest
import torch
import torch.nn.functional as F

from moe_trainer.kernels.grouped_gemm import expert_of_rows, grouped_gemm_supported, grouped_linear, sum_rows

COUNTS = {
    "usual": [3, 1, 2],
    "an expert without rows": [0, 4, 0],
    "no rows": [0, 0, 0],
    "rows of no expert at the end": [2, 0, 1],
}


def naive(rows: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    parts = rows[: sum(counts)].split(counts)
    return torch.cat([part @ weight[expert].T for expert, part in enumerate(parts)])


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_against_a_naive_loop(dtype: torch.dtype, name: str) -> None:
    counts = COUNTS[name]
    used, total = sum(counts), sum(counts) + (5 if "end" in name else 0)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(total, 8, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(3, 4, 8, dtype=dtype, generator=generator).requires_grad_()
    grad = torch.randn(total, 4, dtype=dtype, generator=generator)
    offsets = torch.tensor(counts).cumsum(0).int()

    out = grouped_linear(rows, weight, offsets)
    out.backward(grad)
    expected = naive(rows, weight, counts)
    grad_rows, grad_weight = torch.autograd.grad(expected, (rows, weight), grad[:used])
    assert out.shape == (total, 4)
    torch.testing.assert_close(out[:used], expected)
    torch.testing.assert_close(rows.grad[:used], grad_rows[:used])
    torch.testing.assert_close(weight.grad, grad_weight)
    for expert, count in enumerate(counts):
        assert count or not weight.grad[expert].any()


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_sums_of_each_experts_rows(dtype: torch.dtype, name: str) -> None:
    counts = COUNTS[name]
    used, total = sum(counts), sum(counts) + (5 if "end" in name else 0)
    rows = torch.randn(total, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[used:] = float("nan")  # undefined: nothing may come of it
    offsets = torch.tensor(counts).cumsum(0).int()
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    assert expert_of_rows(total, offsets)[:used].equal(experts)
    wide = torch.stack([part.double().sum(0) for part in rows[:used].split(counts)])
    torch.testing.assert_close(sum_rows(rows, offsets), wide.to(dtype))


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 3, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(3, 2, 3, dtype=torch.float64, generator=generator).requires_grad_()
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda r, w: grouped_linear(r, w, offsets), (rows, weight))


@pytest.mark.parametrize("used", ("rows", "weight"))
def test_gradient_of_one_input_only(used: str) -> None:
    tensors = {"rows": torch.randn(4, 8), "weight": torch.randn(2, 4, 8)}
    tensors[used].requires_grad_()
    grouped_linear(tensors["rows"], tensors["weight"], torch.tensor([1, 4], dtype=torch.int32)).sum().backward()
    assert tensors[used].grad.any()


def test_poison_past_the_last_offset_stays_out() -> None:
    """Rows of no expert may hold anything: neither the others' outputs nor any gradient sees it."""
    for dtype in (torch.float64, torch.float32):
        rows = torch.randn(6, 8, dtype=dtype)
        rows[3:] = float("nan")
        rows.requires_grad_()
        weight = torch.randn(2, 4, 8, dtype=dtype, requires_grad=True)
        out = grouped_linear(rows, weight, torch.tensor([1, 3], dtype=torch.int32))
        grad = torch.ones_like(out)
        grad[3:] = float("nan")
        out.backward(grad)
        assert out[:3].isfinite().all() and weight.grad.isfinite().all() and rows.grad[:3].isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "widths", "supported"),
    [
        (torch.bfloat16, (8, 16), True),
        (torch.bfloat16, (8, 12), False),
        (torch.float32, (4, 12), True),
        (torch.float32, (4, 6), False),
        (torch.float64, (8, 8), False),
    ],
)
def test_supported(dtype: torch.dtype, widths: tuple[int, ...], supported: bool) -> None:
    assert grouped_gemm_supported(dtype, *widths) is supported


def test_grouped_gemm_runs_where_supported_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    grouped_mm = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda x, *a, **k: (calls.append(x.dtype), grouped_mm(x, *a, **k))[1])
    offsets = torch.tensor([2, 4], dtype=torch.int32)
    for dtype, width in ((torch.float32, 8), (torch.float32, 6), (torch.float64, 8)):
        rows, weight = torch.ones(4, width, dtype=dtype), torch.ones(2, 8, width, dtype=dtype)
        assert grouped_linear(rows, weight, offsets).eq(width).all()
    assert calls == [torch.float32]
