"""The four plans of a model family."""

from dataclasses import dataclass

Plan = dict[str, str]
"""Pattern of a module or parameter name (`*` for one part of it) -> name of a style."""


@dataclass(frozen=True, slots=True)
class ParallelPlans:
    """One complete plan for each pair of flags; None where the family has none."""

    tp: Plan | None
    sp: Plan | None
    tp_ep: Plan | None
    sp_ep: Plan | None
    optional: frozenset[str] = frozenset()
    """Patterns of parts that not every config of the family has: these alone may match nothing."""
