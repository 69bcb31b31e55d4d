"""Descriptors that a run changed: found by comparing table pages before and after, decoded when asked.

Rules of this file:
- Two copies of the table pages are all that a run costs; arrays are made when asked for, and a `Change` for one
  element when it is looked at.
- A page's level and VA come from the tree as it is afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np

from pgtable import Format, PhysicalMemory, Registers
from pgtable.bits import Words
from pgtable.leaves import Levels, Tables
from pgtable.leaves import tables as tables_of
from pgtable.memory import Mark, difference


class Change(NamedTuple):
    """One descriptor that changed. `level` and `va` are None for a word of a table page that no tree reaches."""

    va: int | None
    level: int | None
    pa: int
    old: int
    new: int
    fields: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        where = f"{self.va:#018x} L{self.level}" if self.va is not None else f"PA {self.pa:#x}"
        fields = ", ".join(f"{name} {old:#x}->{new:#x}" for name, (old, new) in self.fields.items())
        return f"{where} {self.old:#018x} -> {self.new:#018x}  {fields}"

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "va": None if self.va is None else f"{self.va:#018x}",
            "level": self.level,
            "pa": f"{self.pa:#018x}",
            "old": f"{self.old:#018x}",
            "new": f"{self.new:#018x}",
            "fields": {name: [f"{old:#x}", f"{new:#x}"] for name, (old, new) in self.fields.items()},
        }


class Changes(Sequence[Change]):
    """The changed descriptors in PA order; `va`, `pa`, `old`, `new` uint64 and `level` int8, all of shape (n,).

    `before` and `after` are copies of the pages that may hold tables; the tree is the one of `regs` in `after`.
    The comparison is made when it is first asked for. A page that was given out in between (`after` has it, `before`
    has not) counts only if the tree reaches it. `level` is -128, and `va` 0, for a word that no tree reaches.
    """

    UNREACHED = -128

    def __init__(self, before: Mark, after: Mark, fmt: Format, regs: Registers | None) -> None:
        self._before, self._after, self._regs = before, after, regs
        self.fmt = fmt

    @cached_property
    def _columns(self) -> tuple[Words, Words, Words, Words, Levels]:
        pa, old, new = difference(self._before, self._after)
        tables = _tables(self._after, self._regs) if self._regs and len(pa) else None
        va, level = _places(pa, self.fmt, tables)
        columns = (pa, old, new, va, level)
        if self._before.ranges == self._after.ranges:
            return columns
        pa, old, new, va, level = (column[level != self.UNREACHED] for column in columns)
        return pa, old, new, va, level

    @property
    def pa(self) -> Words:
        """Where each descriptor is."""
        return self._columns[0]

    @property
    def old(self) -> Words:
        """The descriptors before."""
        return self._columns[1]

    @property
    def new(self) -> Words:
        """The descriptors after."""
        return self._columns[2]

    @property
    def va(self) -> Words:
        """The lowest VA that each translates."""
        return self._columns[3]

    @property
    def level(self) -> Levels:
        """The level of each."""
        return self._columns[4]

    def __len__(self) -> int:
        return len(self.pa)

    @overload
    def __getitem__(self, index: int) -> Change: ...
    @overload
    def __getitem__(self, index: slice) -> list[Change]: ...
    def __getitem__(self, index: int | slice) -> Change | list[Change]:
        if isinstance(index, slice):
            return [self._at(i) for i in range(*index.indices(len(self)))]
        return self._at(range(len(self))[index])

    def __iter__(self) -> Iterator[Change]:
        return (self._at(i) for i in range(len(self)))

    def _at(self, i: int) -> Change:
        old, new, level = int(self.old[i]), int(self.new[i]), int(self.level[i])
        if level == self.UNREACHED:
            return Change(None, None, int(self.pa[i]), old, new, {})
        layout = self.fmt.layout(new if new & 1 else old, level)
        return Change(int(self.va[i]), level, int(self.pa[i]), old, new, layout.changed(old, new))

    def __repr__(self) -> str:
        return f"<{len(self)} changed descriptors>"


def _tables(mark: Mark, regs: Registers) -> Tables:
    """The table pages of the tree as it was when `mark` was made, those that it has copies of."""
    memory = PhysicalMemory(*((pa, 8 * n) for pa, n in mark.ranges))
    memory.restore(mark)
    return tables_of(memory, regs)


def _places(pa: Words, fmt: Format, tables: Tables | None) -> tuple[Words, Levels]:
    """VA and level of the descriptors at `pa`, found through the table pages they are in."""
    page = fmt.granule.page_size
    va = np.zeros(len(pa), np.uint64)
    level = np.full(len(pa), Changes.UNREACHED, np.int8)
    if tables is None or not len(tables.pa) or not len(pa):
        return va, level
    order = np.argsort(tables.pa, kind="stable")
    starts = tables.pa[order]
    first, end = np.searchsorted(pa, starts), np.searchsorted(pa, starts + np.uint64(page))  # pa is ascending
    for k in np.flatnonzero(end > first).tolist():
        inside, table = slice(first[k], end[k]), order[k]
        level[inside] = tables.level[table]
        size = np.uint64(fmt.granule.level_size(int(tables.level[table])))
        va[inside] = tables.va[table] + (pa[inside] - starts[k] >> np.uint64(3)) * size
    return va, level
