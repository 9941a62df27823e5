"""All ranks go on, or all of them stop with the same words.

A rank that fails alone leaves the others waiting in their next collective. So each step of saving and loading that
can fail on one rank ends in an exchange of errors. Without a process group these are ordinary calls.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from moe_trainer.config.errors import ConfigError

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether a process group is initialised."""
    return dist.is_available() and dist.is_initialized()


def is_rank_zero() -> bool:
    """Whether this process does what is done once: rank 0, or the only process."""
    return not is_distributed() or dist.get_rank() == 0


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in rank order. Collective; the value must be picklable.

    `group`: all ranks too, for a thread whose collectives must not meet those of training.
    """
    if not is_distributed():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def agreed(action: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the body, then raise on every rank what any rank raised. Collective, over `group`; the body may be too.

    Raises:
        ConfigError: some rank raised one, or an operating system error such as a full disk.
        RuntimeError: some rank raised anything else. Both say `action` and, where ranks differ, which rank said what.
    """
    error: BaseException | None = None
    try:
        yield
    except (Exception, CheckpointException) as caught:  # the latter derives from BaseException
        error = caught
    texts = gather(None if error is None else (_is_users(error), describe_error(error)), group)
    failed = {rank: text for rank, text in enumerate(texts) if text is not None}
    if not failed:
        return
    said = {text for _, text in failed.values()}
    message = (
        said.pop() if len(said) == 1 else "; ".join(f"rank {rank}: {text}" for rank, (_, text) in failed.items())
    )
    kind = ConfigError if all(is_users for is_users, _ in failed.values()) else RuntimeError
    raise kind(f"{action}: {message}") from error


def on_rank_zero(action: str, fn: Callable[[], T]) -> T:
    """`fn()` of rank 0, on every rank. Collective.

    Raises:
        ConfigError, RuntimeError: as `agreed`, what `fn` raised on rank 0.
    """
    results: list[T | None] = [None]
    with agreed(action):
        if is_rank_zero():
            results = [fn()]
    if is_distributed():
        dist.broadcast_object_list(results, src=0)
    return results[0]  # type: ignore[return-value]


def describe_error(error: BaseException) -> str:
    """One line for a person; a full disk is called by its name, which torch's writer does not do."""
    if isinstance(error, CheckpointException):  # torch's own gathering, each with its traceback
        return "; ".join(f"rank {rank}: {describe_error(failure)}" for rank, (failure, _) in error.failures.items())
    text = " ".join(str(error).split())
    if "unexpected pos" in text or "PytorchStreamWriter failed" in text:
        return f"disk full or not writable ({text[:200]})"
    return text if isinstance(error, (ConfigError, OSError)) else f"{type(error).__name__}: {text[:2000]}"


def _is_users(error: BaseException) -> bool:
    """Whether a person can mend it: their own mistake, or the disk's."""
    if isinstance(error, CheckpointException):
        return all(_is_users(failure) for failure, _ in error.failures.values())
    return isinstance(error, (ConfigError, OSError))
