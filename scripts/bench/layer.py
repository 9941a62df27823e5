"""Speed of one layer's experts, forward and backward, on one GPU, beside transformers' and beside dense products.

    python scripts/bench/layer.py [--tokens=16384] [--skew=0]

bfloat16; logits are random, with --skew=S each expert's are moved by S times a random number, as a router's may be
early on. Sorting the routes is timed, the router is not. FLOPs: 18 * tokens * top_k * hidden * intermediate. `dense`
are six plain products of the same FLOPs over as many rows: the bound without routing. Also with PyTorch's grouped
products in place of ours.
Each figure is the median of 20 calls, timed by CUDA events; the sides take turns.
"""

import copy
import statistics
import sys
from collections.abc import Callable
from unittest import mock

import torch
from record import option, record

from moe_trainer.kernels import grouped_gemm
from moe_trainer.kernels.fp8 import multiply_fp8
from moe_trainer.models.moe import Experts

SHAPES = {  # hidden, intermediate, experts, top_k
    "Mixtral 8x7B": (4096, 14336, 8, 2),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "OLMoE-1B-7B": (2048, 1024, 64, 8),
}


def main() -> None:
    """Print one row a shape."""
    tokens, skew = int(option("tokens", "16384")), float(option("skew", "0"))
    for number, (name, (hidden, intermediate, num_experts, top_k)) in enumerate(SHAPES.items()):
        torch.manual_seed(0)
        experts = Experts(hidden, intermediate, num_experts).to("cuda", torch.bfloat16)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        in_fp8 = copy.copy(experts)  # the same weights
        in_fp8.multiply = multiply_fp8
        x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        logits = torch.randn(tokens, num_experts, device="cuda") + skew * torch.randn(num_experts, device="cuda")
        weights, index = logits.softmax(-1).topk(top_k)
        weights.requires_grad_()
        layers: dict[str, torch.nn.Module] = {"ours": experts, "fp8": in_fp8}
        theirs = _transformers(experts, hidden, intermediate, num_experts, top_k)
        if theirs is not None:
            layers["transformers"] = theirs
        kept = {side: round(_kept(layer, x, index, weights), 2) for side, layer in layers.items()}
        calls = {side: _pass(layer, x, index, weights) for side, layer in layers.items()}
        calls |= {f"{side}, PyTorch": _with_pytorchs_products(calls[side]) for side in ("ours", "fp8")}
        milliseconds = _medians(calls | {"dense": _dense(tokens * top_k, hidden, intermediate)})
        flops = 18 * tokens * top_k * hidden * intermediate
        speed = {side: round(flops / median / 1e9) for side, median in milliseconds.items()}
        load = torch.bincount(index.flatten(), minlength=num_experts).max().item() * num_experts / (tokens * top_k)
        row: dict[str, object] = {"shape": name, "tokens": tokens, "ours, TFLOP/s": speed["ours"]}
        row |= {"kept GiB": kept["ours"], "transformers": speed.get("transformers", "-")}
        row |= {"kept by it": kept.get("transformers", "-"), "dense": speed["dense"]}
        row |= {"ours / dense": round(milliseconds["dense"] / milliseconds["ours"], 2), "ours in fp8": speed["fp8"]}
        row |= {"with PyTorch's products": speed["ours, PyTorch"], "in fp8 with them": speed["fp8, PyTorch"]}
        row |= {"busiest expert / mean": round(load, 2)}
        record("layer", row, heading=number == 0)


def _pass(
    experts: torch.nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> Callable[[], None]:
    """Forward and backward."""
    grad = torch.randn_like(x)

    def call() -> None:
        for leaf in (x, weights, *experts.parameters()):
            leaf.grad = None
        experts(x, index, weights).backward(grad)

    return call


def _with_pytorchs_products(call: Callable[[], None]) -> Callable[[], None]:
    """The same with PyTorch's grouped products in place of ours."""

    def patched() -> None:
        with mock.patch.object(grouped_gemm, "_FEW_ROWS", sys.maxsize):
            call()

    return patched


def _kept(experts: torch.nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> float:
    """GiB that one forward pass keeps for the backward pass."""
    before = torch.cuda.memory_allocated()
    out = experts(x, index, weights)
    return (torch.cuda.memory_allocated() - before - out.nbytes) / 2**30


def _transformers(
    ours: Experts, hidden: int, intermediate: int, num_experts: int, top_k: int
) -> torch.nn.Module | None:
    """transformers' experts with the same weights, where it is installed."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError:
        return None
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=num_experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(ours.gate_up_proj.detach().flatten(1, 2))
    experts.down_proj = torch.nn.Parameter(ours.down_proj.detach())
    return experts


def _dense(rows: int, hidden: int, intermediate: int) -> Callable[[], None]:
    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, gate_up, down = values(rows, hidden), values(2 * intermediate, hidden), values(hidden, intermediate)
    wide, narrow = values(rows, 2 * intermediate), values(rows, intermediate)

    def call() -> None:
        for left, right in ((x, gate_up.t()), (narrow, down.t()), (x, down), (wide, gate_up)):
            left @ right
        wide.t() @ x
        x.t() @ narrow

    return call


def _medians(calls: dict[str, Callable[[], None]], rounds: int = 20) -> dict[str, float]:
    """Milliseconds. The sides take turns: a GPU's clock falls as it gets warm, and then falls for all."""
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {side: [] for side in calls}
    for number in range(rounds + 5):
        for side, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            if number >= 5:
                marks[side].append((start, end))
    torch.cuda.synchronize()
    return {side: statistics.median(a.elapsed_time(b) for a, b in pairs) for side, pairs in marks.items()}


if __name__ == "__main__":
    main()
