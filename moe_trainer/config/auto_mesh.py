"""`parallel.mesh=auto`: the largest legal mesh of the ranks there are."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from moe_trainer.config.choices import MeshChoice
from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import ParallelConfig


def largest_mesh(
    wish: ParallelConfig, ranks: int, check: Callable[[ParallelConfig], ParallelConfig], all_of_them: bool
) -> ParallelConfig:
    """The mesh of as many of `ranks` as possible that `check` accepts, nearest to `wish` among those of that size.

    Nearest: `tp` as wished, else smaller, else larger; then `dp_replicate` as wished, else 1; then `ep` as wished,
    else `tp`. The flags stay, so the plan is the same.

    Args:
        check: the mesh with concrete `fsdp` and `ep`; raises ConfigError for one that is not legal.
        all_of_them: whether every rank has to be in it, because they all run already.

    Raises:
        ConfigError: there is none; names the largest that is legal where `all_of_them` rules it out.
    """
    refused: ConfigError | None = None
    for size in range(ranks, 0, -1):
        for candidate in _candidates(wish, size):
            try:
                mesh = check(candidate)
            except ConfigError as error:
                refused = refused or error
                continue
            if all_of_them and size < ranks:
                raise ConfigError(f"parallel.mesh=auto: no mesh of {ranks} ranks is legal ({refused}); {size} are")
            return replace(mesh, mesh=MeshChoice.auto)
    raise ConfigError(f"parallel.mesh=auto: no mesh of 1 to {ranks} ranks is legal: {refused}")


def _candidates(wish: ParallelConfig, size: int) -> Iterator[ParallelConfig]:
    tps = sorted(_divisors(size), key=lambda tp: (tp > wish.tp, abs(tp - wish.tp)))
    for tp in tps:
        for dp_replicate in dict.fromkeys((wish.dp_replicate, 1)):
            if size % (tp * dp_replicate):
                continue
            for ep in dict.fromkeys((wish.ep, None)):
                yield replace(wish, tp=tp, dp_replicate=dp_replicate, fsdp=size // (tp * dp_replicate), ep=ep)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
