"""Speed of one layer's experts, forward and backward, on one GPU, beside transformers' and beside dense products.

    python scripts/bench/layer.py [--tokens=16384] [--skew=0]

bfloat16; logits are random, with --skew=S each expert's are moved by S times a random number, as a router's may be
early on. Sorting the routes is timed, the router is not. FLOPs: 18 * tokens * top_k * hidden * intermediate. `dense`
are six plain products of the same FLOPs over as many rows: the bound without routing.
Each figure is the median of 20 calls, timed by CUDA events with the L2 cache as the call before left it.
"""

import statistics
from collections.abc import Callable

import torch
from record import option, record

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
        x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        logits = torch.randn(tokens, num_experts, device="cuda") + skew * torch.randn(num_experts, device="cuda")
        weights, index = logits.softmax(-1).topk(top_k)
        weights.requires_grad_()
        flops = 18 * tokens * top_k * hidden * intermediate
        ours, kept = _speed(experts, x, index, weights, flops)
        theirs = _transformers(experts, hidden, intermediate, num_experts, top_k)
        other = None if theirs is None else _speed(theirs, x, index, weights, flops)
        del theirs
        dense = _dense(tokens * top_k, hidden, intermediate, flops)
        load = torch.bincount(index.flatten(), minlength=num_experts).max().item() * num_experts / (tokens * top_k)
        row: dict[str, object] = {"shape": name, "tokens": tokens, "ours, TFLOP/s": ours, "kept GiB": round(kept, 2)}
        row |= {"transformers": "-" if other is None else round(other[0])}
        row |= {"kept by it": "-" if other is None else round(other[1], 2), "dense": dense}
        row |= {"ours / dense": round(ours / dense, 2), "busiest expert / mean": round(load, 2)}
        record("layer", row, heading=number == 0)


def _speed(
    experts: torch.nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, flops: int
) -> tuple[float, float]:
    """TFLOP/s, and GiB that one call keeps for its backward pass."""
    grad = torch.randn_like(x)

    def call() -> None:
        for leaf in (x, weights, *experts.parameters()):
            leaf.grad = None
        experts(x, index, weights).backward(grad)

    milliseconds = _median(call)
    before = torch.cuda.memory_allocated()
    out = experts(x, index, weights)
    kept = torch.cuda.memory_allocated() - before - out.nbytes
    return flops / milliseconds / 1e9, kept / 2**30


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


def _dense(rows: int, hidden: int, intermediate: int, flops: int) -> float:
    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, gate_up, down = values(rows, hidden), values(2 * intermediate, hidden), values(hidden, intermediate)
    wide, narrow = values(rows, 2 * intermediate), values(rows, intermediate)

    def call() -> None:
        for left, right in ((x, gate_up.t()), (narrow, down.t()), (x, down), (wide, gate_up)):
            left @ right
        wide.t() @ x
        x.t() @ narrow

    return flops / _median(call) / 1e9


def _median(call: Callable[[], None], times: int = 20) -> float:
    """Milliseconds."""
    for _ in range(5):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False))


if __name__ == "__main__":
    main()
