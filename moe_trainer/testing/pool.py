"""Runs a function on a few processes, for a fraction of a CPU-second instead of a launcher's thirty.

The processes are forked from a server that has only imported the program, so no rank pays for the import and none
inherits a thread.
"""

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import select
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_context = multiprocessing.get_context("forkserver")
# pytest, where it is installed, because the modules of tests import it.
_context.set_forkserver_preload(["pytest", "moe_trainer.testing.preload"])


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60, device: str = "cpu"
) -> list[Any]:
    """Run `fn(*args)` on `world_size` ranks with an initialised process group.

    Args:
        fn: a module-level function; its result must be picklable.
        timeout: seconds for a collective and, with 15 s on top, for the whole call.
        device: `cpu`, or `cuda` for a GPU for each rank; CUDA tensors travel by NCCL, all else by gloo.

    Returns:
        The ranks' results, in rank order.

    Raises:
        RuntimeError: a rank raised, died or hung; the message holds every such rank's traceback.
    """
    folder = tempfile.mkdtemp(prefix="ranks_")
    ranks = []
    for rank in range(world_size):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank, args=(fn, rank, world_size, folder, args, sender, timeout, device))
        process.start()
        sender.close()
        ranks.append((process, receiver))
    deadline = time.monotonic() + timeout + 15
    try:
        outcomes = [_outcome(rank, *pair, deadline) for rank, pair in enumerate(ranks)]
    finally:
        for process, _ in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)
    failed = [f"--- rank {rank}: {text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
    if failed:
        raise RuntimeError("\n".join(failed))
    return [result for _, result in outcomes]


def _outcome(rank: int, process: multiprocessing.Process, receiver: Connection, deadline: float) -> tuple[bool, Any]:
    try:
        if receiver.poll(max(0.1, deadline - time.monotonic())):
            return pickle.loads(receiver.recv_bytes())
        return False, "no result in time"
    except EOFError:
        process.join(5)
        return False, f"died with exit code {process.exitcode}"


def _rank(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    args: tuple[Any, ...],
    sender: Connection,
    timeout: float,
    device: str,
) -> None:
    import torch
    import torch.distributed as dist

    from moe_trainer.parallel.gpus import take_gpu

    faulthandler.enable()
    threading.Thread(target=_end_unheard, args=(sender.fileno(),), daemon=True).start()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in names.items()}, GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    try:
        if device == "cuda":
            take_gpu()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        outcome = (True, fn(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    try:
        # Plain pickle copies tensors; the connection's own would share memory that dies with this process.
        payload = pickle.dumps(outcome)
    except Exception:
        payload = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(payload)
    sender.close()
    # A rank that leaves early breaks the others' last collectives; leave without waiting, all results are sent.
    os._exit(0)


def _end_unheard(pipe: int) -> None:
    """End this process when nobody is left to read from the pipe: the server lives as long as the ranks do."""
    poll = select.poll()
    poll.register(pipe, 0)  # an error is always told
    poll.poll()
    os._exit(1)
