"""How the ranks of one start find each other, and no rank of a start before.

torchrun keeps one store over its restarts, and its ranks share it without a name of their own: gloo and NCCL would
find there the addresses of ranks that are gone (torch 2.13: "Gloo connectFullMesh failed ... refused"). Its
count of restarts is no such name: each machine's torchrun counts for itself.
"""

import json
import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

_SECONDS_BETWEEN_LOOKS = 0.02
_ROOM = "moe_trainer"


def is_shared_store() -> bool:
    """Whether torchrun brings the store, which then may have seen other starts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_of_this_start(timeout_seconds: float) -> dist.Store:
    """A part of torchrun's store that only the ranks of this start use. Collective.

    Raises:
        DistNetworkError: the store cannot be reached.
        RuntimeError: not all ranks came in time.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_seconds))
    return meet(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout_seconds)


def meet(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> dist.Store:
    """Each rank says a word that nobody said before; rank 0 lists the words it reads, until each rank has found its
    own in the list, and so knows that the list is of this start."""
    word, deadline = secrets.token_hex(8), time.monotonic() + timeout_seconds
    store.set(f"{_ROOM}/word/{rank}", word)
    name = word if rank == 0 else None
    while True:
        if rank == 0:
            words = [store.get(f"{_ROOM}/word/{other}").decode() for other in range(world_size)]  # waits for each
            store.set(f"{_ROOM}/list", json.dumps(words))
            found = [store.check([f"{_ROOM}/{name}/{other}"]) for other in range(1, world_size)]
            if all(found):
                break
        else:
            words = json.loads(store.get(f"{_ROOM}/list"))
            if len(words) == world_size and words[rank] == word:
                name = words[0]
                store.set(f"{_ROOM}/{name}/{rank}", "here")
                break
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {rank} did not meet the other ranks in {timeout_seconds:g} s")
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return dist.PrefixStore(f"{_ROOM}/{name}", store)
