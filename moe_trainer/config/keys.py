"""The keys of a schema: dotted name, type and the text under the field, which `--help` prints."""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache, reduce
from typing import Any


@dataclass(slots=True)
class Key:
    """One leaf of a config."""

    name: str
    """Dotted, as on the command line."""
    type: Any
    """Without `| None`."""
    optional: bool
    """Whether it may be null."""
    doc: str
    """The text under the field."""

    @property
    def is_text(self) -> bool:
        """Whether the value is a string."""
        return self.type is str

    @property
    def is_mapping(self) -> bool:
        """Whether the value has keys of its own, which no schema lists."""
        return typing.get_origin(self.type) is dict


def keys_of(schema: type, prefix: str = "") -> Iterator[Key]:
    """Every leaf of the dataclass `schema`, depth first, in the order of declaration."""
    hints = typing.get_type_hints(schema)
    docs = {name: doc for part in reversed(schema.__mro__[:-1]) for name, doc in _field_docs(part).items()}
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        name = prefix + field.name
        if dataclasses.is_dataclass(hint):
            yield from keys_of(hint, f"{name}.")
            continue
        optional = isinstance(hint, types.UnionType)
        plain = next(part for part in typing.get_args(hint) if part is not types.NoneType) if optional else hint
        yield Key(name, plain, optional, docs.get(field.name, ""))


def keys_help(cfg: Any, without: tuple[str, ...] = ()) -> str:
    """A line for each key of the config object, `name=value  (type)`, and its text below.

    Args:
        without: keys and nodes, dotted, that the command has no use for.
    """
    lines = []
    for key in keys_of(type(cfg)):
        if any(f"{key.name}.".startswith(f"{name}.") for name in without):
            continue
        value = reduce(getattr, key.name.split("."), cfg)
        lines.append(f"  {key.name}={'unset' if value is None else _plain(value)}  ({_type_name(key.type)})")
        lines += textwrap.wrap(key.doc, 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


@cache
def _field_docs(schema: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs


def _type_name(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(member.name for member in kind)
    if of := typing.get_args(kind):
        return f"{typing.get_origin(kind).__name__}[{', '.join(map(_type_name, of))}]"
    return kind.__name__


def _plain(value: Any) -> str:
    if isinstance(value, Enum):
        return value.name
    return str(value).lower() if isinstance(value, bool) else str(value)
