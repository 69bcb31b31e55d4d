"""Failing cases as files: what a case holds as plain JSON, read back by the types of its fields.

Rules of this file:
- A file names no class. The case's dataclass says what is made of each value, and refuses what does not fit.
- Flags are numbers, since a combination of them has no name; other enums are kept by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from emu import jsontext


class StoredError(ValueError):
    """A case that cannot be stored, or a file that holds no case of a function; says why."""


def dump(function: str, flavour: str, page_size: int, case: Any) -> str:
    """The text of a file; raises StoredError for a case with a value that JSON cannot hold."""
    head = {"schema": "pgtable.case/1", "function": function, "world": flavour, "page_size": page_size}
    return json.dumps({**head, "case": _plain(case)})


def load(text: str, function: str, page_size: int, kind: type) -> tuple[str, Any]:
    """World and case of a file that is of `function` and `page_size`; `kind`: the dataclass of the function's cases.

    Raises StoredError for any other file.
    """
    try:
        data = jsontext.loads(text)
        name, flavour, pages, case = (data[key] for key in ("function", "world", "page_size", "case"))
    except (ValueError, KeyError, TypeError) as error:
        raise StoredError(f"not a stored case: {error}") from None
    if name != function:
        raise StoredError(f"is of {name} in world {flavour}, not of {function}")
    if pages != page_size:
        raise StoredError(f"is of a kernel with pages of {pages} bytes, not {page_size}")
    return str(flavour), _made(kind, case, "case")


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)  # also of flags
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return [[_plain(key), _plain(item)] for key, item in value.items()]
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    raise StoredError(f"{type(value).__name__}: cannot be stored")


def _made(hint: Any, value: Any, where: str) -> Any:
    """The value of type `hint` that is stored as `value` at `where` of a case."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is UnionType:  # with None, always
        return None if value is None else _made(next(arg for arg in args if arg is not NoneType), value, where)
    if hint in (int, str, bool):
        return _checked(value, hint, where)
    if origin is dict:
        return dict(_items(args, pair, where) for pair in _checked(value, list, where))
    if origin:  # a tuple, or what may be one
        return tuple(_items(args, value, where))
    if issubclass(hint, Enum):
        return _member(hint, value, where)
    hints = get_type_hints(hint)
    if issubclass(hint, tuple):
        return hint(*_items(tuple(hints.values()), value, where))
    given = _checked(value, dict, where)
    if given.keys() != hints.keys():
        raise StoredError(f"{where}: {', '.join(given) or 'nothing'} where a {hint.__name__} has {', '.join(hints)}")
    return hint(**{name: _made(hints[name], item, f"{where}.{name}") for name, item in given.items()})


def _checked(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise StoredError(f"{where}: {json.dumps(value)[:40]} where {_KINDS[kind]} is due")
    return value


_KINDS = {int: "a number", str: "a text", bool: "true or false", list: "a list", dict: "an object"}


def _items(hints: tuple[Any, ...], value: Any, where: str) -> list[Any]:
    """The items of a list: each has its type, or all have the first (`tuple[int, ...]`, `Sequence[int]`)."""
    items = _checked(value, list, where)
    if len(hints) == 1 or hints[1] is Ellipsis:
        hints = hints[:1] * len(items)
    if len(hints) != len(items):
        raise StoredError(f"{where}: {len(items)} items where {len(hints)} are due")
    return [_made(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, items, strict=True))]


def _member(kind: type[Enum], value: Any, where: str) -> Enum:
    try:
        return kind[_checked(value, str, where)]
    except KeyError:
        raise StoredError(f"{where}: {value} is no {kind.__name__}") from None
