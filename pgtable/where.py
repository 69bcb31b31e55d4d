"""Which rows of a listing: a small language of conditions, `W and X`, `attr==device and not AF`, `size>=2M`.

Grammar: `or`, `and`, `not`, parentheses; a condition is a name, or a name, an operator (== != < <= > >=) and a value.
Names and what they are stand in `HELP`; any field of a leaf descriptor (`AttrIndx==4`, `AP==2`, `DBM`) is a name too.
Numbers are what `int(x, 0)` reads, with K, M, G, T behind sizes. Every mistake is a ValueError with one sentence.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from pgtable.attributes import MemoryAttributes, is_device
from pgtable.bits import Flags
from pgtable.descriptors import LAST_LEVEL
from pgtable.listing import Listing, Runs
from pgtable.permissions import PR, PW, PX, UR, UW, UX
from pgtable.tree import halves

HELP = {
    "R W X": "readable, writable, executable at the regime's own EL",
    "UR UW UX": "the same at EL0",
    "user": "EL0 may do something",
    "write exec": "some EL may write, execute",
    "block page": "the kind of descriptor",
    "contiguous AF nG global DBM guarded": "bits of the descriptor",
    "fault": "no access goes through, whatever the permissions",
    "level": "-1 to 3",
    "size va pa": "bytes and addresses",
    "attr": "device, normal, nc, wt, wb, tagged, or a MAIR byte",
    "sh": "non, outer, inner",
}

_PERMISSIONS = {"R": PR, "W": PW, "X": PX, "UR": UR, "UW": UW, "UX": UX}
_PERMISSIONS |= {"user": UR | UW | UX, "write": PW | UW, "exec": PX | UX, "read": PR | UR}
_FIELDS = {"contiguous": "Contiguous", "guarded": "GP"}
_SHAREABILITY = {"non": 0, "outer": 2, "inner": 3}
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
DEEPEST = 100  # parentheses and nots, which may stand inside each other
_TOKEN = re.compile(r"\s*(?:(==|!=|<=|>=|<|>|\(|\))|([\w.-]+)|(\S))")


def where(listing: Listing, expression: str) -> Flags:
    """The rows of `listing.runs` that `expression` is true of, bool of shape (n,). Raises ValueError."""
    return _Parser(listing, expression).parsed()


class _Parser:
    """Recursive descent; what it returns is a mask over the rows."""

    def __init__(self, listing: Listing, expression: str) -> None:
        self.listing, self.expression, self.runs = listing, expression, listing.runs
        self.tokens: list[str] = []
        for symbol, word, other in _TOKEN.findall(expression):
            if other:
                raise ValueError(f"condition {expression!r}: {other!r} has no meaning there")
            self.tokens.append(symbol or word)
        if sum(token in ("(", "not") for token in self.tokens) > DEEPEST:
            raise self._error(f"there are more than {DEEPEST} parentheses and nots")

    def parsed(self) -> Flags:
        """The whole expression."""
        mask = self._or()
        if self.tokens:
            raise self._error(f"{self.tokens[0]!r} is not expected")
        return mask

    def _error(self, what: str) -> ValueError:
        return ValueError(f"condition {self.expression!r}: {what}")

    def _next(self, *wanted: str) -> str | None:
        """Takes the next token if it is one of `wanted` (any, where none are named)."""
        if not self.tokens or (wanted and self.tokens[0].lower() not in wanted):
            return None
        return self.tokens.pop(0)

    def _or(self) -> Flags:
        mask = self._and()
        while self._next("or"):
            mask = mask | self._and()
        return mask

    def _and(self) -> Flags:
        mask = self._not()
        while self._next("and"):
            mask = mask & self._not()
        return mask

    def _not(self) -> Flags:
        if self._next("not"):
            return ~self._not()
        if self._next("("):
            mask = self._or()
            if not self._next(")"):
                raise self._error("a ) is missing")
            return mask
        name = self._next()
        if name is None or name in (")", *_OPERATORS) or name.lower() in ("and", "or"):
            raise self._error(f"a name is expected{'' if name is None else f', not {name!r}'}")
        sign = self._next(*_OPERATORS)
        if sign is None:
            return self._flag(name)
        value = self._next()
        if value is None:
            raise self._error(f"a value is missing behind {sign}")
        return self._compared(name, sign, value)

    def _flag(self, name: str) -> Flags:
        runs = self.runs
        if name in _PERMISSIONS:
            return _mask(runs.perms & _PERMISSIONS[name])
        if name in ("block", "page"):
            return _mask((runs.level == LAST_LEVEL) == (name == "page"))
        if name == "fault":
            return _mask(runs.fault)
        if name == "global":
            return _mask(self._field("nG") == 0)
        return _mask(self._field(_FIELDS.get(name, name)) != 0)

    def _compared(self, name: str, sign: str, value: str) -> Flags:
        compare = _OPERATORS[sign]
        if name == "attr":
            if sign not in ("==", "!="):
                raise self._error(f"attr {sign}: it is == or !=")
            return self._attr(value) ^ (sign == "!=")
        if name == "sh":
            number = _SHAREABILITY.get(value.lower())
            return _mask(compare(self.runs.sh, self._number(value) if number is None else number))
        wanted = self._number(value)
        if name in ("va", "pa", "size"):
            return _mask(compare(getattr(self.runs, name), np.uint64(wanted & (1 << 64) - 1)))
        if name == "level":
            return _mask(compare(self.runs.level, wanted))
        return _mask(compare(self._field(_FIELDS.get(name, name)), wanted))

    def _number(self, text: str) -> int:
        return number(text, f"condition {self.expression!r}")

    def _attr(self, value: str) -> Flags:
        kinds = {
            "device": is_device,
            "normal": lambda byte: MemoryAttributes.of(byte).type == "Normal",
            "nc": lambda byte: MemoryAttributes.of(byte).outer == "non-cacheable",
            "wt": lambda byte: MemoryAttributes.of(byte).outer.startswith("write-through"),
            "wb": lambda byte: MemoryAttributes.of(byte).outer.startswith("write-back"),
            "tagged": lambda byte: MemoryAttributes.of(byte).tagged,
        }
        kind: Callable[[int], bool] | None = kinds.get(value.lower())
        if kind is None:
            return _mask(self.runs.attr == self._number(value))
        return _mask(np.array([kind(byte) for byte in range(256)])[self.runs.attr])

    def _field(self, name: str) -> Any:
        """A field of each row's descriptor, 0 where its format has none; unknown in all formats: ValueError."""
        return field_of(self.listing, self.runs, name, self.expression)


def _mask(values: Any) -> Flags:
    return np.asarray(values, np.bool_)


def field_of(listing: Listing, runs: Runs, name: str, expression: str = "") -> Any:
    """The values of the descriptor field `name` of each row, int64; raises ValueError where no format has it."""
    found, known = np.zeros(len(runs.va), np.int64), False
    for p in halves(listing.regs, listing.regime):
        here = runs.va >= np.uint64(p.half_base) if p.upper else runs.va >> np.uint64(55) == 0
        for level in range(-1, LAST_LEVEL + 1):
            leaf = p.fmt.leaf(level)
            if name not in leaf:
                continue
            known = True
            rows = here & (runs.level == level)
            found[rows] = leaf[name].get(runs.word[rows]).astype(np.int64)
    if not known and halves(listing.regs, listing.regime):
        names = " ".join(HELP)
        raise ValueError(f"condition {expression!r}: {name} is none of {names} and no field of a leaf descriptor")
    return found


def number(text: str, what: str) -> int:
    """A number with a size's unit, `0x1000`, `2M`; raises ValueError that begins with `what`."""
    match = re.fullmatch(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))([KMGT]?)", text, re.I)
    if match is None:
        raise ValueError(f"{what}: {text} is no number (0x1000, 4096, 2M)")
    return int(match[1], 0) << _UNITS[match[2].upper()]
