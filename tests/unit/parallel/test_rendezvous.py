"""Ranks meet in a store that has seen other starts."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from moe_trainer.parallel.rendezvous import meet


def start(store: dist.Store, world_size: int) -> list[dist.Store]:
    with ThreadPoolExecutor(world_size) as ranks:
        return list(ranks.map(lambda rank: meet(store, rank, world_size, 20.0), reversed(range(world_size))))


def test_each_start_has_a_part_of_its_own_whatever_came_before() -> None:
    store = dist.HashStore()
    for world_size in (3, 3, 2, 4, 1):
        stores = start(store, world_size)
        assert not any(part.check(["address"]) for part in stores)
        stores[0].set("address", f"of {world_size}")
        assert {part.get("address") for part in stores} == {f"of {world_size}".encode()}


def test_a_rank_does_not_take_the_list_of_another_start_for_its_own() -> None:
    store = dist.HashStore()
    start(store, 2)
    with pytest.raises(RuntimeError, match="rank 1 did not meet the other ranks in 0.2 s"):
        meet(store, 1, 2, 0.2)
