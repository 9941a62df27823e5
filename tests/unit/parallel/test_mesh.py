"""Groups of a mesh's axes."""

from datetime import timedelta

import torch
import torch.distributed as dist

from moe_trainer.config.schema import ParallelConfig
from moe_trainer.parallel.mesh import build_meshes
from moe_trainer.testing.pool import run_distributed


def timeouts() -> set[timedelta]:
    parallel = ParallelConfig(fsdp=2, tp=2, ep=2, sequence_parallel=True, expert_parallel=True)
    meshes = build_meshes(parallel, "cpu")
    groups = [group for mesh in (meshes.dense, meshes.expert) for group in mesh.get_all_groups()]
    assert len(groups) == 4
    dist.barrier()  # a rank that ends would close the connections of one that still makes its own
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def test_every_axis_waits_as_long_as_the_world() -> None:
    """PyTorch gives new groups a time-out of their own, of many minutes."""
    assert run_distributed(timeouts, 4, timeout=23) == [{timedelta(seconds=23)}] * 4
