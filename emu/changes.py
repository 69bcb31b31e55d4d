"""Descriptors that a run changed: found by comparing table pages before and after, decoded when asked.

Rules of this file:
- Two copies of the table pages are all that a run costs; arrays are made when asked for, and a `Change` for one
  element when it is looked at. Runs of equal changes are found in the words, without an array of all changes.
- A page's level and VA come from the tree as it is afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np

from pgtable import Format, Registers
from pgtable.bits import Flags, Words
from pgtable.descriptors import LAST_LEVEL
from pgtable.leaves import Levels, Tables
from pgtable.leaves import tables as tables_of
from pgtable.memory import Mark, NoMemory, difference
from pgtable.tree import NO_TABLES, Index


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


class ChangeRun(NamedTuple):
    """Consecutive descriptors that changed in the same bits, `flips`: `n` of them, from PA `pa` and VA `va` on.

    `old`, `new`: the first of them. `level` and `va` are None for words of table pages that no tree reaches.
    """

    va: int | None
    level: int | None
    pa: int
    n: int
    flips: int
    old: int
    new: int

    def __str__(self) -> str:
        where = f"{self.va:#018x} L{self.level}" if self.va is not None else f"PA {self.pa:#x}"
        return f"{where}, {self.n} descriptors: {self.old:#018x} -> {self.new:#018x}, bits {self.flips:#018x}"


class Changes(Sequence[Change]):
    """The changed descriptors in PA order; `va`, `pa`, `old`, `new` uint64 and `level` int8, all of shape (n,).

    `before` and `after` are copies of the pages that may hold tables; the tree is the one of `regs` in `after`.
    The comparison is made when it is first asked for. A page that was given out in between (`after` has it, `before`
    has not) counts only if the tree reaches it. `level` is -128, and `va` 0, for a word that no tree reaches.
    """

    UNREACHED = -128

    def __init__(
        self, before: Mark, after: Mark, fmt: Format, regs: Registers | None, known: KnownTables | None = None
    ) -> None:
        self._before, self._after, self._regs = before, after, regs
        self._known = known or KnownTables(fmt)
        self.fmt = fmt

    @cached_property
    def _columns(self) -> tuple[Words, Words, Words, Words, Levels]:
        pa, old, new = difference(self._before, self._after)
        va, level = self._places(pa)
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

    @cached_property
    def runs(self) -> list[ChangeRun]:
        """The same changes, those joined that are neighbours, in PA and in VA, and flip the same bits.

        Costs a comparison of the table pages, whatever the number of changes.
        """
        pa, n, old, new, level, va = self._runs()
        reached = level != self.UNREACHED
        size = _sizes(self.fmt)[np.maximum(level, -1) + 1]
        flips = old ^ new
        goes_on = (pa[1:] == pa[:-1] + n[:-1] * np.uint64(8)) & (flips[1:] == flips[:-1]) & (level[1:] == level[:-1])
        goes_on &= ~reached[1:] | (va[1:] == va[:-1] + n[:-1] * size[:-1])
        first = np.flatnonzero(np.append(True, ~goes_on)[: len(pa)])
        counts = np.add.reduceat(n, first) if len(first) else n
        rows = zip(*(column[first].tolist() for column in (va, level, pa, flips, old, new, reached)), strict=True)
        return [
            ChangeRun(va if there else None, level if there else None, pa, count, flips, old, new)
            for (va, level, pa, flips, old, new, there), count in zip(rows, counts.tolist(), strict=True)
        ]

    def _runs(self) -> tuple[Words, Words, Words, Words, Levels, Words]:
        """Runs within one table page each, in PA order: PA, number, first word before and after, level, VA."""
        if self._before.ranges != self._after.ranges:
            return self.pa, np.ones(len(self), np.uint64), self.old, self.new, self.level, self.va
        parts: list[tuple[Words, ...]] = []
        for (base, _), before, after in zip(self._before.ranges, self._before.copies, self._after.copies, strict=True):
            start, count = _equal_flips(before, after, self.fmt.granule.entries)
            at = start.astype(np.uint64) * np.uint64(8) + np.uint64(base)
            parts.append((at, count, before[start], after[start]))
        pa, n, old, new = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(pa, kind="stable")
        pa, n, old, new = pa[order], n[order], old[order], new[order]
        va, level = self._places(pa)
        return pa, n, old, new, level, va

    def _places(self, pa: Words) -> tuple[Words, Levels]:
        if not self._regs or not len(pa):
            return np.zeros(len(pa), np.uint64), np.full(len(pa), self.UNREACHED, np.int8)
        return self._known.places(self._after, self._regs).of(pa)

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


PIECE = 1 << 16  # words that are compared in one step: what is made of them stays in the processor's cache


def _equal_flips(before: Words, after: Words, entries: int) -> tuple[Index, Words]:
    """Where words differ: the starts of equal differences, each in one table page, and how many there are."""
    flips, breaks = np.empty(PIECE, np.uint64), np.empty(PIECE, np.bool_)
    parts = []
    for at in range(0, len(before), PIECE):  # a whole number of table pages
        n = min(PIECE, len(before) - at)
        np.bitwise_xor(before[at : at + n], after[at : at + n], out=flips[:n])
        np.not_equal(flips[1:n], flips[: n - 1], out=breaks[1:n])
        breaks[:n:entries] = True
        parts.append(np.flatnonzero(breaks[:n]) + at)
    starts = np.concatenate([*parts, np.array([len(before)])])
    first, counts = starts[:-1], np.diff(starts).view(np.uint64)
    changed = before[first] != after[first]
    return first[changed], counts[changed]


class _MarkMemory:
    """The words of a mark as memory that a listing reads (pgtable.memory.TableMemory), without another copy."""

    def __init__(self, mark: Mark) -> None:
        self._parts = [(pa, 8 * n, words) for (pa, n), words in zip(mark.ranges, mark.copies, strict=True)]

    def fetch(self, pa: int) -> int:
        return int(self.words(pa, 1)[0])

    def words(self, pa: int, n: int) -> Words:
        for base, size, words in self._parts:
            if base <= pa and pa + 8 * n <= base + size:
                return words[pa - base >> 3 :][:n]
        raise NoMemory(pa)

    def gather(self, pas: Words) -> tuple[Words, Flags]:
        out, there = np.zeros(pas.shape, np.uint64), np.zeros(pas.shape, np.bool_)
        for base, size, words in self._parts:
            offset = pas - np.uint64(base)  # wraps far above `size` below the base
            inside = offset < np.uint64(size)
            out[inside] = words[(offset[inside] >> np.uint64(3)).astype(np.int64)]
            there |= inside
        return out, there

    def tables(self, pas: Words, n: int) -> tuple[Words, Flags]:
        words, there = self.gather(pas[:, None] + np.arange(n, dtype=np.uint64) * np.uint64(8))
        return words, there[:, 0]


class Places:
    """VA and level of any descriptor, by the table page that it is in; a page that is a table twice: its last place."""

    def __init__(self, fmt: Format, tables: Tables) -> None:
        order = np.argsort(tables.pa, kind="stable")
        starts = tables.pa[order]
        last = np.append(starts[1:] != starts[:-1], True)[: len(starts)]
        self._starts, self._ends = starts[last], starts[last] + np.uint64(fmt.granule.page_size)
        self._va, self._level = tables.va[order][last], tables.level[order][last]
        self._size = _sizes(fmt)[self._level + 1]

    def of(self, pa: Words) -> tuple[Words, Levels]:
        """Of the descriptors at `pa` (ascending); level UNREACHED where no tree has a table."""
        va, level = np.zeros(len(pa), np.uint64), np.full(len(pa), Changes.UNREACHED, np.int8)
        first, end = np.searchsorted(pa, self._starts), np.searchsorted(pa, self._ends)
        counts = end - first
        inside = _ranges(first, counts)
        level[inside] = np.repeat(self._level, counts)
        entry = pa[inside] - np.repeat(self._starts, counts) >> np.uint64(3)
        va[inside] = np.repeat(self._va, counts) + entry * np.repeat(self._size, counts)
        return va, level


class KnownTables:
    """Where the tables of a tree are, looked up again only when a descriptor above the last level has changed."""

    def __init__(self, fmt: Format) -> None:
        self._fmt = fmt
        self._key: tuple[Registers, tuple[tuple[int, int], ...]] | None = None
        self._places = Places(fmt, NO_TABLES)
        self._above: list[tuple[int, Words]] = []

    def places(self, mark: Mark, regs: Registers) -> Places:
        """Of the tree as it was when `mark` was made, the tables that it has copies of."""
        memory = _MarkMemory(mark)
        if self._key != (regs, mark.ranges) or any(
            (memory.words(pa, len(old)) != old).any() for pa, old in self._above
        ):
            found = tables_of(memory, regs)
            pages: list[int] = np.unique(found.pa[(found.level < LAST_LEVEL) & found.there]).tolist()
            self._above = [(pa, memory.words(pa, self._fmt.granule.entries).copy()) for pa in pages]
            self._places = Places(self._fmt, found)
            self._key = regs, mark.ranges
        return self._places


def _sizes(fmt: Format) -> Words:
    """Bytes that a descriptor translates, by level from -1 on; 0 for a level that 64 bits have no room for."""
    return np.array([fmt.granule.level_size(at) & (1 << 64) - 1 for at in range(-1, LAST_LEVEL + 1)], np.uint64)


def _ranges(first: Index, counts: Index) -> Index:
    """The numbers from first[i] on, counts[i] of them, one range after the other."""
    numbers: Index = np.arange(int(counts.sum())) + np.repeat(first - np.append(0, np.cumsum(counts)[:-1]), counts)
    return numbers
