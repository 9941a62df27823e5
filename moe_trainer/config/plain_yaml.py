"""A saved config as plain values, from a file that anybody may have written."""

from collections.abc import Iterator
from typing import Any

import yaml


def read_leaves(text: str) -> dict[str, Any]:
    """Dotted key -> value of a YAML mapping.

    Raises:
        ValueError: not YAML, not a mapping, nested too deeply, or with aliases.
    """
    try:
        return dict(_leaves(yaml.load(text, _PlainLoader) or {}))
    except (yaml.YAMLError, AttributeError, LookupError, RecursionError) as error:  # `!!int ""` is a LookupError
        raise ValueError(str(error).splitlines()[0] if str(error) else "it is not a mapping") from error


def _leaves(node: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class _PlainLoader(yaml.SafeLoader):
    """Without aliases: a few lines of them would make a tree of billions of leaves."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)
