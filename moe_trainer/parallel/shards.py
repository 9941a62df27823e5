"""Which part of a parameter this rank holds."""

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

Box = tuple[slice, ...]
"""One slice for each dim: a contiguous block of a tensor."""


def local_box(parameter: torch.Tensor) -> Box:
    """The block of the global tensor that this rank's local shard holds; it may be empty.

    A plain tensor is whole. The mesh axes are applied from the last to the first, because FSDP (the outer axes)
    shards what tensor or expert parallelism (the inner axis) left on the rank; that is what `_StridedShard` says too.

    Raises:
        NotImplementedError: a placement that is neither a shard nor a replica (such as Partial).
    """
    starts, stops = [0] * parameter.ndim, list(parameter.shape)
    if isinstance(parameter, DTensor):
        coordinate = parameter.device_mesh.get_coordinate()
        assert coordinate is not None, "this rank is not on the parameter's mesh"
        for axis in reversed(range(parameter.device_mesh.ndim)):
            placement = parameter.placements[axis]
            if isinstance(placement, Replicate):
                continue
            if not isinstance(placement, (Shard, _StridedShard)):
                raise NotImplementedError(f"{placement} has no fixed part of the tensor on a rank")
            dim = placement.dim
            chunk = -(-(stops[dim] - starts[dim]) // parameter.device_mesh.size(axis))
            start = min(starts[dim] + coordinate[axis] * chunk, stops[dim])
            starts[dim], stops[dim] = start, min(start + chunk, stops[dim])
    return tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))
