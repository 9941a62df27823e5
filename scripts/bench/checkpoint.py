"""What a checkpoint costs: how long training pauses for it, and how fast it is written, hashed and published.

    python scripts/bench/checkpoint.py --gigabytes 2 --ranks 2    # CPU; --device cuda takes a GPU for each rank

Each rank holds its shard of float32 tensors and plays training beside the save: on the CPU a matrix product after the
other, on a GPU too, with an all-reduce in each step, so collectives of two threads meet. Printed are medians over
`--saves` saves of the pause of an asynchronous save (the copy to host memory), of its time to publication, of the
steps' time during one, and of a synchronous save.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from moe_trainer.checkpoint.manager import CheckpointManager
from moe_trainer.testing.pool import run_distributed

_ROWS, _COLUMNS = 4096, 1024
"""Of a tensor: 16 MiB, about what a layer's parts are."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Pause and throughput of checkpoints.")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of all tensors together")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", help="on the disk to measure; default a temporary one")
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="bench_checkpoint_", dir=given.folder))
    try:
        arguments = (root, given.gigabytes, given.saves, given.device)
        found = run_distributed(measure, given.ranks, *arguments, timeout=1800, device=given.device)
    finally:
        shutil.rmtree(root)
    size = found[0]["bytes"]
    print(f"{size / 1e9:.2f} GB from {given.ranks} rank(s) on {given.device}, medians of {given.saves}:")
    for name, text in (
        ("pause", "training pauses"),
        ("first_pause", "the first time, which makes room for the copy"),
        ("published", "until published, beside training"),
        ("sync", "synchronous save"),
    ):
        seconds = max(rank[name] for rank in found)
        print(f"  {text:<48} {seconds:8.3f} s  {size / seconds / 1e9:7.2f} GB/s")
    for name, text in (("step", "a step without a save"), ("step_during", "a step during one")):
        print(f"  {text:<48} {max(rank[name] for rank in found) * 1000:8.1f} ms")


def measure(root: Path, gigabytes: float, saves: int, device: str) -> dict[str, float]:
    """Seconds, and the bytes of a checkpoint; of one rank."""
    tensors = _tensors(gigabytes, device)
    manager = CheckpointManager(root, keep_last=1)
    step_seconds = [_step(device) for _ in range(20)]
    pauses, published, during = [], [], []
    for number in range(1, saves + 2):
        dist.barrier()
        began = time.perf_counter()
        manager.start_save(number, tensors, {})
        pauses.append(time.perf_counter() - began)
        while dist_any(manager.newest != number and manager.failure is None):
            during.append(_step(device))
        manager.wait()
        if manager.failure is not None:
            raise manager.failure
        published.append(time.perf_counter() - began)
    sync = []
    for number in range(saves + 2, 2 * saves + 2):
        dist.barrier()
        began = time.perf_counter()
        manager.save(number, tensors, {})
        sync.append(time.perf_counter() - began)
    return {
        "bytes": float(sum(tensor.numel() * 4 for tensor in tensors.values())),
        "first_pause": pauses[0],
        "pause": statistics.median(pauses[1:]),
        "published": statistics.median(published[1:]),
        "sync": statistics.median(sync),
        "step": statistics.median(step_seconds[5:]),
        "step_during": statistics.median(during),
    }


def dist_any(value: bool) -> bool:
    """Whether it holds on any rank, so that all take the same number of steps."""
    votes = torch.tensor(float(value))
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes.item())


def _tensors(gigabytes: float, device: str) -> dict[str, torch.Tensor]:
    world = dist.get_world_size()
    mesh = init_device_mesh(device, (world,))
    count = max(1, round(gigabytes * 1e9 / (_ROWS * _COLUMNS * 4)))
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    return {
        f"w{number}": DTensor.from_local(torch.randn(_ROWS // world, _COLUMNS, device=where), mesh, [Shard(0)])
        for number in range(count)
    }


def _step(device: str) -> float:
    began = time.perf_counter()
    size = 4096 if device == "cuda" else 256
    product = torch.randn(size, size, device=device) @ torch.randn(size, size, device=device)
    dist.all_reduce(product)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
