"""Collectives of a training step against the bandwidth of the links, and the two dispatches against each other.

    python -m torch.distributed.run --standalone --nproc-per-node=2 scripts/bench/comm.py [--tokens=16384]

Bus bandwidth as NCCL's tests define it: all three move (ranks - 1) / ranks of the whole. The dispatches carry the
tokens of a rank to experts that do nothing and back, forward and backward.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from record import device, option, record

from moe_trainer.kernels.experts import exchanged
from moe_trainer.kernels.permute import combine, permute
from moe_trainer.parallel.collectives import start_all_gather, start_reduce_scatter
from moe_trainer.parallel.dispatch import exchanged_experts, gathered_experts
from moe_trainer.parallel.process_group import process_group

SHAPES = {  # hidden, experts, top_k
    "Mixtral 8x7B": (4096, 8, 2),
    "Qwen3-30B-A3B": (2048, 128, 8),
    "OLMoE-1B-7B": (2048, 64, 8),
}
MEBIBYTES = (1, 16, 64, 256)


def main() -> None:
    """Two tables."""
    with process_group(device()) as here:
        world = dist.get_world_size()
        for number, mebibytes in enumerate(MEBIBYTES):
            row: dict[str, object] = {"ranks": world, "MiB": mebibytes} | _collectives(mebibytes * 2**20, here)
            if dist.get_rank() == 0:
                record("comm", row, heading=number == 0)
        for number, shape in enumerate(SHAPES):
            row = {"ranks": world, "shape": shape} | _dispatches(*SHAPES[shape], int(option("tokens", "16384")), here)
            if dist.get_rank() == 0:
                record("dispatch", row, heading=number == 0)


def _collectives(nbytes: int, device: torch.device) -> dict[str, object]:
    """Bus bandwidth."""
    world, group = dist.get_world_size(), dist.group.WORLD
    whole = torch.empty(nbytes // 4 // world * world, device=device)
    part, other, sizes = whole.chunk(world)[0].clone(), torch.empty_like(whole), [len(whole) // world] * world
    moves = {
        "all-gather": lambda: start_all_gather(part, sizes, group, async_op=False),
        "reduce-scatter": lambda: start_reduce_scatter(whole, sizes, group, async_op=False),
        "all-to-all": lambda: dist.all_to_all_single(other, whole),
    }
    moved = whole.nbytes * (world - 1) / world
    return {f"{name}, GB/s": moved / _median(move) / 1e9 for name, move in moves.items()}


def _dispatches(hidden: int, num_experts: int, top_k: int, tokens: int, device: torch.device) -> dict[str, object]:
    """Milliseconds, forward and backward."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    x = torch.randn(tokens, hidden, device=device, dtype=dtype, generator=generator).requires_grad_()
    index = torch.rand(tokens, num_experts, device=device, generator=generator).topk(top_k).indices
    weights = torch.rand(tokens, top_k, device=device, generator=generator).requires_grad_()
    sizes, group = [tokens] * dist.get_world_size(), dist.group.WORLD

    def gather() -> None:
        out = gathered_experts(
            lambda x, routes, weights, exchange: combine(permute(exchanged(x, exchange), routes), routes),
            *(x, index, weights, num_experts, sizes, group),
        )
        out.backward(x.detach())

    def exchange() -> None:
        out = exchanged_experts(lambda rows, experts, weights: rows, x, index, weights, num_experts, group)
        out.backward(x.detach())

    return {"all-gather, ms": _median(gather) * 1e3, "all-to-all, ms": _median(exchange) * 1e3}


def _median(call: Callable[[], object], times: int = 20) -> float:
    """Seconds, on rank 0's clock; all ranks call."""
    seconds = []
    for _ in range(times + 5):
        dist.barrier()
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[5:])


if __name__ == "__main__":
    main()
