"""What a checkpoint costs: how long training pauses for it, and how fast it is written, hashed and published.

    python scripts/bench/checkpoint.py --gigabytes 2 --ranks 2    # CPU; --device cuda takes a GPU for each rank

Each rank holds its shard of float32 tensors and plays training beside the save: on the CPU a matrix product after the
other, on a GPU too, with an all-reduce in each step, so collectives of two threads meet. A line tells of each save as
it is done; the row at the end holds medians of the pause of an asynchronous save (the copy to host memory), of its
time to publication, of the steps' time during one, and of a synchronous save. No save begins after `--seconds`, but
there are always two asynchronous ones, of which the first makes room for the copy, and a synchronous one: of 8 GB on
a disk of 1 GB/s that takes half a minute.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from record import record
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
    parser.add_argument("--saves", type=int, default=5, help="at most, of either kind")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which no save begins")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", help="on the disk to measure; default a temporary one")
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="bench_checkpoint_", dir=given.folder))
    free = shutil.disk_usage(root).free
    print(f"{root}: {free / 1e9:.0f} GB free", flush=True)
    try:
        arguments = (root, given.gigabytes, given.saves, given.seconds, given.device)
        found = run_distributed(measure, given.ranks, *arguments, timeout=600, device=given.device)
    finally:
        shutil.rmtree(root)
    worst = {name: max(rank[name] for rank in found) for name in found[0]}
    size = worst.pop("bytes")
    row = {"tensors on": given.device, "ranks": given.ranks, "GB": size / 1e9, **worst}
    speeds = {f"GB/s {kind}": size / worst[f"{kind}, s"] / 1e9 for kind in ("published", "synchronous")}
    record("checkpoint", row | speeds)


def measure(root: Path, gigabytes: float, saves: int, seconds: float, device: str) -> dict[str, float]:
    """The figures of one rank."""
    end = time.monotonic() + seconds
    tensors = _tensors(gigabytes, device)
    manager = CheckpointManager(root, keep_last=1)
    alone = [_step(device) for _ in range(20)][5:]
    _tell(f"a step alone: {statistics.median(alone) * 1000:.1f} ms")
    pauses, published, during, sync = [], [], [], []
    number = 0
    while len(pauses) < 2 or (len(pauses) <= saves and not dist_any(time.monotonic() > end - seconds / 2)):
        number += 1
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
        _tell(f"asynchronous save {number}: pause {pauses[-1]:.3f} s, published after {published[-1]:.2f} s")
    while not sync or (len(sync) < saves and not dist_any(time.monotonic() > end)):
        number += 1
        dist.barrier()
        began = time.perf_counter()
        manager.save(number, tensors, {})
        sync.append(time.perf_counter() - began)
        _tell(f"synchronous save {number}: {sync[-1]:.2f} s")
    return {
        "bytes": float(sum(tensor.numel() * 4 for tensor in tensors.values())),
        "saves": float(len(pauses) - 1),
        "first pause, s": pauses[0],
        "pause, s": statistics.median(pauses[1:]),
        "published, s": statistics.median(published[1:]),
        "synchronous, s": statistics.median(sync),
        "step, ms": 1000 * statistics.median(alone),
        "step during a save, ms": 1000 * statistics.median(during),
    }


def _tell(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


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
