"""Patterns of module and parameter names: `*` stands for one part between dots."""

import re


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern means this very name."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), name) is not None


def covers(pattern: str, name: str) -> bool:
    """Whether the pattern means this parameter, or a module that it is in."""
    parts = name.split(".")
    return any(matches(pattern, ".".join(parts[:length])) for length in range(1, len(parts) + 1))
