"""Breaking one rule at run time: a function's text edited, or a table replaced, and everything put back.

Rules of this file:
- An `Edit` insists that the text is there once: a mutant that no longer fits the code is an error, not a survivor.
- Nothing on disk changes. What the packages remember (function caches) is forgotten on both ways.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


class Edit:
    """Pieces of a function's text replaced; `target` is `module:name` or `module:Class.name`."""

    def __init__(self, target: str, *pieces: tuple[str, str]) -> None:
        self.target = target
        self.pieces = pieces

    def made(self, owner: Any, old: Any) -> Any:
        """The changed function or property; `owner` is the module or class that has it."""
        plain = inspect.unwrap(getattr(old, "func", None) or getattr(old, "fget", None) or old)
        text = _text(plain)
        for piece, new in self.pieces:
            if text.count(piece) != 1:
                raise ValueError(f"{self.target} has {text.count(piece)} times, not once: {piece!r}")
            text = text.replace(piece, new)
        made: dict[str, Any] = {}
        exec(compile(text, f"<mutant of {self.target}>", "exec"), plain.__globals__, made)
        (found,) = made.values()
        if hasattr(found, "__set_name__"):
            found.__set_name__(owner, self.target.rpartition(".")[2])
        return found


@cache
def _text(function: Any) -> str:
    """A function's text, as it was when first asked for: a file that is edited later would give another one."""
    return textwrap.dedent(inspect.getsource(function))


class Set:
    """A table or constant replaced by what `value` makes of it."""

    def __init__(self, target: str, value: Callable[[Any], Any]) -> None:
        self.target = target
        self.value = value

    def made(self, owner: Any, old: Any) -> Any:
        """The new value."""
        return self.value(old)


Change = Edit | Set


@contextmanager
def broken(
    changes: Iterable[Change], packages: tuple[str, ...], *, prefix: str = "", keep: Collection[object] = ()
) -> Iterator[None]:
    """The code with `changes` made, and put back afterwards.

    `packages`: where a replaced object may be bound. `prefix`: of the targets' modules. `keep`: caches to leave alone.
    """
    undo: list[tuple[Any, str, Any]] = []
    try:
        for change in changes:
            module, _, path = change.target.partition(":")
            owner: Any = importlib.import_module(prefix + module)
            *classes, name = path.split(".")
            for part in classes:
                owner = getattr(owner, part)
            old = vars(owner)[name]
            new = change.made(owner, old)
            for place in [owner] if classes else _holders(packages, name, old):
                undo.append((place, name, old))
                setattr(place, name, new)
        _forget(packages, keep)
        yield
    finally:
        for place, name, old in reversed(undo):
            setattr(place, name, old)
        _forget(packages, keep)


def _modules(packages: tuple[str, ...]) -> list[Any]:
    return [m for name, m in list(sys.modules.items()) if name.startswith(packages)]


def _holders(packages: tuple[str, ...], name: str, value: object) -> list[Any]:
    """The modules that define or import `value`."""
    return [m for m in _modules(packages) if vars(m).get(name) is value]


def _forget(packages: tuple[str, ...], keep: Collection[object]) -> None:
    """Clears everything remembered from before: the caches of functions."""
    for module in _modules(packages):
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear") and not any(value is kept for kept in keep):
                value.cache_clear()
