"""Failing cases as files: any tree of dataclasses, named tuples, enums, dicts and tuples, as JSON and back."""

from __future__ import annotations

import importlib
import json
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any


class StoredError(ValueError):
    """A file that holds no case; says why."""


def dump(function: str, flavour: str, case: Any) -> str:
    """The text of a file."""
    return json.dumps({"schema": "pgtable.case/1", "function": function, "world": flavour, "case": _plain(case)})


def load(text: str) -> tuple[str, str, Any]:
    """Function, world and case of a file; raises StoredError for anything else."""
    try:
        data = json.loads(text)
        return data["function"], data["world"], _made(data["case"])
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise StoredError(f"not a stored case: {error}") from None


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": _name(value), "fields": {f.name: _plain(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Enum):
        return {"enum": _name(value), "name": value.name}
    if isinstance(value, tuple):
        named = hasattr(value, "_fields")
        return {"tuple": _name(value) if named else "", "items": [_plain(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(item)] for key, item in value.items()]}
    if value is None or isinstance(value, int | str | bool):
        return value
    raise StoredError(f"{type(value).__name__}: cannot be stored")


def _name(value: Any) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


def _made(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "type" in value:
        return _class(value["type"])(**{name: _made(item) for name, item in value["fields"].items()})
    if "enum" in value:
        return _class(value["enum"])[value["name"]]
    if "tuple" in value:
        items = [_made(item) for item in value["items"]]
        return _class(value["tuple"])(*items) if value["tuple"] else tuple(items)
    return {_made(key): _made(item) for key, item in value["dict"]}


def _class(name: str) -> Any:
    """A class of ours by its name; nothing else is looked up."""
    module, _, qualname = name.partition(":")
    if module.partition(".")[0] not in ("emu", "kernel_model", "pgtable"):
        raise StoredError(f"{name}: not a class of this project")
    return getattr(importlib.import_module(module), qualname)
