"""Bit fields declared once, as rows, and read from one word or from an array by the same expression.

Rules of this file:
- A `Layout` is a partition of its 64 (or 32, 128) bits: an overlap or an unnamed bit is refused when it is made.
- `Field.get` and `Field.put` are the only places where a word is shifted; decode, build, explain and diff are
  derived from them.
- An address field keeps its value in place (bits [47:12] of OA are bits [47:12] of the value), so that a field split
  over several spans (LPA2 puts OA[51:50] in bits [9:8]) is an ordinary row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.uint64]
Flags: TypeAlias = npt.NDArray[np.bool_]
W = TypeVar("W", int, npt.NDArray[np.uint64])

_U64 = (1 << 64) - 1


class Span(NamedTuple):
    """Bits [lo + width - 1 : lo] of the word hold bits [at + width - 1 : at] of the value."""

    lo: int
    width: int
    at: int = 0

    @property
    def mask(self) -> int:
        """The span's bits in the word."""
        return ((1 << self.width) - 1) << self.lo

    @property
    def value_mask(self) -> int:
        """The span's bits in the value."""
        return ((1 << self.width) - 1) << self.at


@dataclass(frozen=True)
class Field:
    """One named field of a layout: where its bits are, what they mean.

    `values` maps a value to its meaning; `reserved` is "" for a field that has a meaning, else "RES0", "RES1" or
    "IGNORED" (hardware ignores it, software may use it).
    """

    name: str
    spans: tuple[Span, ...]
    doc: str = ""
    values: Mapping[int, str] = field(default_factory=dict, compare=False, hash=False)
    reserved: str = ""

    @cached_property
    def mask(self) -> int:
        """All of the field's bits in the word."""
        return sum(span.mask for span in self.spans)

    @cached_property
    def value_mask(self) -> int:
        """All bits that a value of this field may have."""
        return sum(span.value_mask for span in self.spans)

    def get(self, word: W) -> W:
        """The field's value in `word`: an int, or a uint64 array of the same shape."""
        lo, width, at = self.spans[0]
        value: Any = (word >> lo & ((1 << width) - 1)) << at  # the same line for an int and for an array
        for lo, width, at in self.spans[1:]:
            value = value | (word >> lo & ((1 << width) - 1)) << at
        return cast(W, value)

    def put(self, word: W, value: W | int) -> W:
        """`word` with this field set to `value`; raises ValueError for a value that does not fit."""
        result: Any = word & (~self.mask if isinstance(word, int) else _U64 ^ self.mask)
        for lo, width, at in self.spans:
            result = result | (self._fitting(value) >> at & ((1 << width) - 1)) << lo
        return cast(W, result)

    def _fitting(self, value: Any) -> Any:
        if isinstance(value, int):
            if value & ~self.value_mask:
                raise ValueError(f"{self} cannot hold {value:#x}")
            return value
        bad = value & np.uint64(_U64 ^ self.value_mask)
        if bad.any():
            raise ValueError(f"{self} cannot hold {int(value[bad != 0].flat[0]):#x}")
        return value

    def meaning(self, value: int) -> str:
        """What `value` means in this field, "" if the table does not say."""
        return self.values.get(value, "")

    def __str__(self) -> str:
        """Arm's notation: `OA[47:12]` for a field kept in place, `AP` (bits of the word are in `bits`)."""
        if any(span.at for span in self.spans):
            parts = ",".join(_range(s.at + s.width - 1, s.at) for s in self.spans)
            return f"{self.name}[{parts}]"
        return self.name

    @property
    def bits(self) -> str:
        """Where the field is in the word: `7:6`, or `9:8,49:12` for a split one."""
        return ",".join(_range(s.lo + s.width - 1, s.lo) for s in self.spans)


def _range(hi: int, lo: int) -> str:
    return f"{hi}" if hi == lo else f"{hi}:{lo}"


def bits(
    name: str,
    hi: int,
    lo: int | None = None,
    doc: str = "",
    values: Mapping[int, str] | None = None,
    *,
    reserved: str = "",
) -> Field:
    """A row: `name` is bits [hi:lo] of the word (bit `hi` alone without `lo`), its value counted from bit 0."""
    lo = hi if lo is None else lo
    return Field(name, (Span(lo, hi - lo + 1),), doc, values or {}, reserved)


def address(name: str, *ranges: tuple[int, int], doc: str = "", high: tuple[int, int, int] | None = None) -> Field:
    """A row for an address kept in place: `ranges` are (hi, lo); `high` a moved part (lo, width, address lo)."""
    spans = tuple(Span(lo, hi - lo + 1, lo) for hi, lo in ranges)
    if high:
        spans += (Span(high[0], high[1], high[2]),)
    return Field(name, spans, doc)


def res0(hi: int, lo: int | None = None) -> Field:
    """A row of reserved bits that software must write as 0."""
    return bits(f"RES0_{hi}" if lo in (None, hi) else f"RES0_{hi}_{lo}", hi, lo, "reserved, 0", reserved="RES0")


def res1(hi: int, lo: int | None = None) -> Field:
    """A row of reserved bits that software must write as 1."""
    return bits(f"RES1_{hi}" if lo in (None, hi) else f"RES1_{hi}_{lo}", hi, lo, "reserved, 1", reserved="RES1")


def ignored(hi: int, lo: int | None = None, doc: str = "ignored by hardware; software may use it") -> Field:
    """A row of bits that hardware ignores."""
    return bits(f"IGNORED_{hi}" if lo in (None, hi) else f"IGNORED_{hi}_{lo}", hi, lo, doc, reserved="IGNORED")


class Meaning(NamedTuple):
    """One line of an explanation."""

    field: Field
    value: int
    text: str


class Layout:
    """A word's format: named fields that together are every bit of it, highest first.

    Raises ValueError when two fields overlap, share a name or leave a bit unnamed.
    """

    def __init__(self, name: str, fields: tuple[Field, ...], width: int = 64) -> None:
        self.name = name
        self.width = width
        self.fields = tuple(sorted(fields, key=lambda f: -f.spans[0].lo))
        self._by_name = {f.name: f for f in self.fields}
        self._check()

    def _check(self) -> None:
        if len(self._by_name) != len(self.fields):
            names = [f.name for f in self.fields]
            raise ValueError(f"{self.name}: {next(n for n in names if names.count(n) > 1)} is named twice")
        seen = 0
        for f in self.fields:
            if f.mask.bit_count() != sum(span.width for span in f.spans):
                raise ValueError(f"{self.name}: {f.name} has spans that overlap")
            if seen & f.mask:
                raise ValueError(f"{self.name}: {f.name} overlaps bits {seen & f.mask:#x}")
            seen |= f.mask
        if seen != (1 << self.width) - 1:
            raise ValueError(f"{self.name}: unnamed bits {seen ^ (1 << self.width) - 1:#x}")

    def __getitem__(self, name: str) -> Field:
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(f"{self.name} has no field {name}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Field]:
        return iter(self.fields)

    def __repr__(self) -> str:
        return f"Layout({self.name!r}, {len(self.fields)} fields)"

    def view(self, word: W) -> View:
        """The fields of `word` as attributes."""
        return View(self, word)

    def mask(self, *names: str) -> int:
        """The bits of the named fields."""
        return sum(self[name].mask for name in names)

    def pack(self, base: int = 0, **values: int) -> int:
        """`base` with the named fields set; raises KeyError for an unknown name, ValueError for what does not fit."""
        word = base
        for name, value in values.items():
            word = self[name].put(word, value)
        return word

    def unpack(self, word: int) -> dict[str, int]:
        """Every field's value, highest bits first."""
        return {f.name: f.get(word) for f in self.fields}

    def explain(self, word: int) -> list[Meaning]:
        """Every field with its value and what the value means, highest bits first."""
        return [Meaning(f, f.get(word), f.meaning(f.get(word)) or f.doc) for f in self.fields]

    def misuse(self, word: int) -> list[Field]:
        """The reserved fields of `word` that do not hold what they must."""
        want = {"RES0": 0, "RES1": 1}
        return [
            f for f in self.fields if f.reserved in want and f.get(word) != (f.value_mask if want[f.reserved] else 0)
        ]

    def changed(self, old: int, new: int) -> dict[str, tuple[int, int]]:
        """The fields that differ, lowest bits first, with both values."""
        return {f.name: (f.get(old), f.get(new)) for f in reversed(self.fields) if (old ^ new) & f.mask}


def hex_word(word: int, width: int = 64) -> str:
    """A word of `width` bits in hexadecimal with its leading zeros; of fewer than 64 bits as one of 64."""
    return f"{word:#0{2 + max(width, 64) // 4}x}"


class View:
    """A word, or an array of words, seen through a layout: `view.AF`, `view.OA`."""

    __slots__ = ("layout", "word")

    def __init__(self, layout: Layout, word: Any) -> None:
        self.layout = layout
        self.word = word

    def __getattr__(self, name: str) -> Any:
        try:
            field = self.layout._by_name[name]
        except KeyError:
            raise AttributeError(f"{self.layout.name} has no field {name}") from None
        return field.get(self.word)

    def __repr__(self) -> str:
        if isinstance(self.word, int):
            return f"{self.layout.name}({hex_word(self.word, self.layout.width)})"
        return f"{self.layout.name}(array of {self.word.shape})"
