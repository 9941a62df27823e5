"""Where a rank's shard lies, against what DTensor itself computes and what it gathers."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe_trainer.config.schema import ParallelConfig
from moe_trainer.kernels.local_part import local_part
from moe_trainer.parallel.shards import local_box
from moe_trainer.testing.compare import full_tensors
from moe_trainer.testing.pool import run_distributed
from tests.distributed.reference import MODEL, Case, plain_model, sharded_model

MESHES = [
    ParallelConfig(fsdp=2, tp=2, ep=4, sequence_parallel=True, expert_parallel=True),
    ParallelConfig(fsdp=2, tp=2, ep=1),
    ParallelConfig(dp_replicate=2, fsdp=1, tp=2, ep=2, expert_parallel=True),
    ParallelConfig(dp_replicate=2, fsdp=2, tp=1, ep=1),
]


def check_boxes(meshes: list[ParallelConfig]) -> int:
    checked = 0
    for parallel in meshes:
        case = Case(parallel, torch.float64)
        plain = dict(plain_model(case).named_parameters())
        for name, parameter in sharded_model(case)[0].named_parameters():
            box = local_box(parameter)
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            assert [part.start for part in box] == list(offset), (parallel, name)
            assert [part.stop - part.start for part in box] == list(shape), (parallel, name)
            assert torch.equal(local_part(parameter), plain[name].detach()[box]), (parallel, name)
            checked += 1
    return checked


def test_real_parameters() -> None:
    counts = run_distributed(check_boxes, 4, MESHES)
    assert counts == [len(MESHES) * (3 + 9 * MODEL.num_layers)] * 4


def check_uneven(rows: int) -> tuple[int, int]:
    """Rows over tp and then over fsdp: 10 rows of 2 x 2 ranks are 3, 2, 3, 2; 3 rows leave ranks without any."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    whole = torch.arange(2.0 * rows).view(rows, 2)
    layer = torch.nn.Linear(2, rows, bias=False)
    chunk = -(-rows // 2)
    part = whole[mesh["tp"].get_local_rank() * chunk :][:chunk].clone()
    sharded = DTensor.from_local(part, mesh["tp"], [Shard(0)], run_check=False, shape=whole.shape, stride=(2, 1))
    layer.weight = torch.nn.Parameter(sharded)
    fully_shard(layer, mesh=mesh["fsdp"])
    box = local_box(layer.weight)
    assert torch.equal(local_part(layer.weight), whole[box])
    for put_together in full_tensors({"weight": layer.weight}).values():
        assert torch.equal(put_together, whole)
    return box[0].start, box[0].stop


@pytest.mark.parametrize(
    ("rows", "boxes"),
    [
        (8, [(0, 2), (4, 6), (2, 4), (6, 8)]),
        (10, [(0, 3), (5, 8), (3, 5), (8, 10)]),
        (2, [(0, 1), (1, 2), (1, 1), (2, 2)]),
    ],
)
def test_boxes_of_uneven_shards(rows: int, boxes: list[tuple[int, int]]) -> None:
    """Ranks in the order (fsdp, tp): tp takes halves, fsdp takes parts of them."""
    assert run_distributed(check_uneven, 4, rows) == boxes


def check_partial() -> None:
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(NotImplementedError, match="has no fixed part"):
        local_box(DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False))


def test_a_partial_sum_has_no_box() -> None:
    run_distributed(check_partial, 2)


def test_a_plain_tensor_is_whole() -> None:
    tensor = torch.zeros(2, 3, requires_grad=True)
    assert local_box(tensor) == (slice(0, 2), slice(0, 3))
    assert not local_part(tensor).requires_grad and local_part(tensor).data_ptr() == tensor.data_ptr()
