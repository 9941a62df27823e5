"""Where activation checkpointing may keep a result instead of computing it again.

To look at an operator costs the host more than most operators' own start, so it looks at those of `keepable` regions
and at no others.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

_keeper: ContextVar[TorchDispatchMode | None] = ContextVar("keeper", default=None)


def keepable() -> AbstractContextManager[object]:
    """A region whose operators the present keeper, if there is one, looks at."""
    return _keeper.get() or nullcontext()


def is_watched() -> bool:
    """Whether a dispatch mode looks at operators here."""
    return _get_current_dispatch_mode() is not None


@contextmanager
def kept_by(keeper: TorchDispatchMode) -> Iterator[None]:
    """Let the keeper look at what is `keepable` inside, on this thread."""
    token = _keeper.set(keeper)
    try:
        yield
    finally:
        _keeper.reset(token)
