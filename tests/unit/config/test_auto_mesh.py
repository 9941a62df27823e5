"""`parallel.mesh=auto`: as many ranks as make a legal mesh, as near to the declared one as they can be."""

import pytest

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import Config, ParallelConfig
from moe_trainer.config.store import compose
from moe_trainer.config.validate import validate, world_size_of


def chosen(ranks: int | None, *more: str, world: int | None = None, gpus: int = 0) -> ParallelConfig:
    nproc = [] if ranks is None else [f"nproc={ranks}"]
    cfg: Config = compose("train", ["+recipe=mixtral_sp_ep", "parallel.mesh=auto", *nproc, *more])
    return validate(cfg, world, gpus).parallel


@pytest.mark.parametrize(
    ("ranks", "mesh"),
    [
        (1, (1, 1, 1)),
        (2, (1, 2, 2)),
        (3, (1, 2, 2)),  # 3 divide neither the batch of 8 nor the 4 heads
        (4, (2, 2, 2)),
        (5, (2, 2, 2)),
        (6, (2, 2, 2)),
        (7, (2, 2, 2)),
        (8, (4, 2, 2)),
        (16, (8, 2, 2)),
        (17, (8, 2, 2)),
    ],
)
def test_largest_legal_mesh_near_the_declared_one(ranks: int, mesh: tuple[int, int, int]) -> None:
    found = chosen(ranks)
    assert (found.fsdp, found.tp, found.ep) == mesh
    assert found.sequence_parallel and found.expert_parallel


def test_tp_gives_way_before_ranks_stand_idle() -> None:
    assert (chosen(16, "parallel.tp=1").fsdp, chosen(16, "parallel.tp=1").tp) == (8, 2)
    assert (chosen(4, "data.global_batch_size=2", "parallel.tp=1").tp, world_size_of(chosen(4))) == (2, 4)


def test_wishes_are_kept_where_they_are_legal() -> None:
    replicated = chosen(8, "parallel.dp_replicate=2", "parallel.ep=4")
    assert (replicated.dp_replicate, replicated.fsdp, replicated.tp, replicated.ep) == (2, 2, 2, 4)
    smaller = chosen(2, "parallel.dp_replicate=2", "parallel.ep=4")
    assert (smaller.dp_replicate, smaller.fsdp, smaller.tp, smaller.ep) == (1, 1, 2, 2)


def test_ranks_come_from_torchrun_nproc_the_gpus_or_the_sizes() -> None:
    assert world_size_of(chosen(None)) == 4
    assert world_size_of(chosen(None, gpus=8)) == 8
    assert world_size_of(chosen(2, gpus=8)) == 2
    assert world_size_of(chosen(2, world=8)) == 8
    with pytest.raises(ConfigError, match=r"no mesh of 3 ranks is legal \(.*\); 2 are"):
        chosen(None, world=3)


def test_declared_sizes_are_not_touched() -> None:
    with pytest.raises(ConfigError, match="4 ranks, but WORLD_SIZE or nproc says 2"):
        validate(compose("train", ["+recipe=mixtral_sp_ep", "nproc=2"]), None, 0)
