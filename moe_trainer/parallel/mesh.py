"""The two views of the same ranks: a dense mesh and an expert mesh."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from moe_trainer.config.schema import ParallelConfig


@dataclass(frozen=True, slots=True)
class Meshes:
    """Dense view `(dp_replicate, fsdp, tp)` and expert view `(dp_replicate, efsdp, ep)` of one world.

    `fsdp` and `efsdp` are always there, even of length 1; the other axes only where they are longer. Example of 8
    ranks, fsdp=4, tp=2, ep=4:

        rank     0    1    2    3    4    5    6    7
        fsdp     0    0    1    1    2    2    3    3     which batch it sees
        tp       0    1    0    1    0    1    0    1     which slice of heads, of the sequence
        ep       0    1    2    3    0    1    2    3     which quarter of the experts
        efsdp    0    0    0    0    1    1    1    1     which copy of them
    """

    dense: DeviceMesh
    expert: DeviceMesh

    @property
    def tp(self) -> DeviceMesh | None:
        """Axis that splits heads, vocabulary and sequence; None where it has one rank."""
        return self.dense["tp"] if "tp" in self.dense.mesh_dim_names else None

    @property
    def ep(self) -> DeviceMesh | None:
        """Axis that splits the experts; None where it has one rank or the plan splits inside them."""
        return self.expert["ep"] if "ep" in self.expert.mesh_dim_names else None

    @property
    def dense_data(self) -> DeviceMesh:
        """`(dp_replicate, fsdp)`: ranks that see different batches, for all but the experts."""
        return _data_axes(self.dense, "fsdp")

    @property
    def expert_data(self) -> DeviceMesh:
        """`(dp_replicate, efsdp)`: ranks that hold the same experts."""
        return _data_axes(self.expert, "efsdp" if "efsdp" in self.expert.mesh_dim_names else "fsdp")

    @property
    def data_rank(self) -> int:
        """Which share of each global batch this rank sees."""
        rank = 0
        for axis in self.dense_data.mesh_dim_names:
            rank = rank * self.dense[axis].size() + self.dense[axis].get_local_rank()
        return rank

    @property
    def data_size(self) -> int:
        """Into how many shares a global batch is dealt."""
        return self.dense_data.size()


def build_meshes(parallel: ParallelConfig, device_type: str) -> Meshes:
    """Lay the ranks of the default process group out; `parallel` has concrete sizes (fsdp > 0, ep set).

    The groups of all axes wait for a rank as long as the default group does.
    The expert view exists only under expert parallelism; otherwise the experts live on the dense mesh.
    """
    world = parallel.dp_replicate * parallel.fsdp * parallel.tp
    assert world == dist.get_world_size(), f"the mesh wants {world} ranks, there are {dist.get_world_size()}"
    dense = _mesh(device_type, dp_replicate=parallel.dp_replicate, fsdp=parallel.fsdp, tp=parallel.tp)
    if not parallel.expert_parallel or parallel.ep == 1:
        return Meshes(dense, dense)
    efsdp = parallel.fsdp * parallel.tp // parallel.ep
    return Meshes(dense, _mesh(device_type, dp_replicate=parallel.dp_replicate, efsdp=efsdp, ep=parallel.ep))


def _mesh(device_type: str, **sizes: int) -> DeviceMesh:
    axes = {name: size for name, size in sizes.items() if size > 1 or name in ("fsdp", "efsdp")}
    mesh = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    # Groups of an axis have PyTorch's time-out of 10 or 30 minutes, whatever the world was given.
    options = getattr(dist.group.WORLD._get_backend(torch.device("cpu")), "options", None)
    if options is not None:  # a fake world, for printing a plan, has none
        for group in mesh.get_all_groups():
            _set_pg_timeout(options._timeout, group)
    return mesh


def _data_axes(mesh: DeviceMesh, shard_axis: str) -> DeviceMesh:
    return mesh["dp_replicate", shard_axis] if "dp_replicate" in mesh.mesh_dim_names else mesh[shard_axis]
