"""What rules of an audit look at and what they find: rows of a listing as columns, ranges as columns.

Rules of this file:
- Nothing is looked at page by page: a rule is a mask over rows, or a sweep over the intervals of PAs that rows share.
- A range that offends is kept as numbers and the index of a sentence; the sentence is made when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pgtable.attributes import FORCED_OUTER, OUTER_SHAREABLE, MemoryAttributes
from pgtable.bits import Flags, Words
from pgtable.faults import FaultType, fault_code
from pgtable.listing import Listing, Runs
from pgtable.memory import TableMemory
from pgtable.params import RANGE_BIT, WalkParams
from pgtable.table_params import TableParams
from pgtable.tree import Index

NOWHERE = (1 << 64) - 1  # in a column of PAs or aliases: there is none


class Place(NamedTuple):
    """A range that a rule is about: VAs [va, va + size), mapped to `pa` (None: to none that counts).

    `alias`: where else `pa` is mapped, for a rule about two mappings. `text`: what is wrong with it.
    """

    va: int
    size: int
    pa: int | None
    alias: int | None
    text: str


@dataclass(frozen=True)
class Places:
    """Ranges as columns of shape (n,); iterating gives each as a Place. `why` indexes `reasons`."""

    va: Words
    size: Words
    pa: Words
    alias: Words
    why: Index
    reasons: Sequence[str]

    def __len__(self) -> int:
        return len(self.va)

    def __iter__(self) -> Iterator[Place]:
        for va, size, pa, alias, why in zip(*(column.tolist() for column in self._columns), strict=True):
            yield Place(va, size, None if pa == NOWHERE else pa, None if alias == NOWHERE else alias, self.reasons[why])

    @property
    def _columns(self) -> tuple[npt.NDArray[Any], ...]:
        return self.va, self.size, self.pa, self.alias, self.why

    def pick(self, rows: Any) -> Places:
        """The ranges that a mask, slice or index array takes."""
        va, size, pa, alias, why = (column[rows] for column in self._columns)
        return Places(va, size, pa, alias, why, self.reasons)

    @property
    def bytes(self) -> int:
        """Of all ranges."""
        return int(self.size.sum())

    def merged(self) -> Places:
        """In VA order; ranges whose VAs and PAs go on in the next one, for the same reason, made one."""
        if len(self) < 2:
            return self
        a = self.pick(np.argsort(self.va, kind="stable"))
        goes_on = (a.va[1:] == a.va[:-1] + a.size[:-1]) & (a.why[1:] == a.why[:-1])
        for column in (a.pa, a.alias):
            none = (column[1:] == np.uint64(NOWHERE)) & (column[:-1] == np.uint64(NOWHERE))
            goes_on &= none | (column[1:] == column[:-1] + a.size[:-1])
        first = np.flatnonzero(np.concatenate(([True], ~goes_on)))
        found = a.pick(first)
        return Places(found.va, np.add.reduceat(a.size, first), found.pa, found.alias, found.why, a.reasons)


def _nowhere(n: int) -> Words:
    return np.full(n, NOWHERE, np.uint64)


def places(
    va: Words,
    size: Words,
    keys: npt.NDArray[Any],
    text: Callable[[int], str],
    *,
    pa: Words | None = None,
    alias: Words | None = None,
) -> Places:
    """Ranges for which `text` of the key (an integer) says what is wrong, merged."""
    distinct, why = np.unique(keys, return_inverse=True)
    reasons = [text(int(key)) for key in distinct.tolist()]
    here = pa if pa is not None else _nowhere(len(va))
    there = alias if alias is not None else _nowhere(len(va))
    return Places(va, size, here, there, why.ravel(), reasons).merged()


def nothing() -> Places:
    """No range."""
    none = np.zeros(0, np.uint64)
    return Places(none, none, none, none, none.astype(np.int64), ())


def joined(parts: Sequence[Places]) -> Places:
    """All ranges of several lists, in VA order."""
    if not parts:
        return nothing()
    starts = np.cumsum([0, *(len(part.reasons) for part in parts)])
    why = [part.why + start for part, start in zip(parts, starts, strict=False)]
    columns = zip(*(part._columns[:4] for part in parts), strict=True)
    va, size, pa, alias = (np.concatenate(column) for column in columns)
    reasons = [reason for part in parts for reason in part.reasons]
    return Places(va, size, pa, alias, np.concatenate(why), reasons).merged()


# memory types


def _type(byte: int) -> str:
    """What must be the same in all mappings of a PA: type and cacheability, allocation hints left out."""
    found = MemoryAttributes.of(byte)
    if found.type != "Normal":
        return found.type
    inner, outer = found.inner.split()[0], found.outer.split()[0]
    return f"Normal {inner}" if inner == outer else f"Normal inner {inner}, outer {outer}"


_TYPE_OF_BYTE = tuple(_type(byte) for byte in range(256))
TYPES = tuple(dict.fromkeys(_TYPE_OF_BYTE))
TYPE_INDEX = np.array([TYPES.index(name) for name in _TYPE_OF_BYTE], np.int64)
_FORCED = np.array(FORCED_OUTER, bool)
AF_FAULTS = [fault_code(FaultType.ACCESS_FLAG, level) for level in range(4)]


class Subject:
    """What is audited: a listing, the memory with its tables, and columns that rules share.

    `rows`: the runs that an access can go through once AF is set. `byte`: their MAIR attribute. `sh`: shareability.
    """

    def __init__(self, listing: Listing, memory: TableMemory) -> None:
        self.listing = listing
        self.memory = memory
        fault = listing.runs.fault
        self.rows: Runs = listing.runs.pick((fault == 0) | np.isin(fault, AF_FAULTS))

    @cached_property
    def halves(self) -> list[tuple[TableParams, Flags]]:
        """The halves that are on, and which of `rows` are theirs."""
        upper = (self.rows.va & np.uint64(RANGE_BIT)) != 0
        return [(tree.params, upper == tree.params.upper) for tree in self.listing.trees]

    def _stage1_halves(self) -> Iterator[tuple[WalkParams, Flags]]:
        return ((p, here) for p, here in self.halves if isinstance(p, WalkParams))

    @cached_property
    def byte(self) -> npt.NDArray[np.uint8]:
        """The attribute byte of each row; of stage 2, what it makes of write-back memory."""
        if self.listing.stage == 2:
            return self.rows.attr
        found = np.zeros(len(self.rows.va), np.uint8)
        for p, here in self._stage1_halves():
            word = self.rows.attributes[here]
            index = p.page["AttrIndx"].get(word)
            index = index | p.page["AttrIndx3"].get(word) << np.uint64(3) if p.fmt.aie else index
            found[here] = np.array(p.mair, np.uint8)[index.astype(np.int64)]
        return found

    @cached_property
    def sh(self) -> Words:
        """The shareability that each row's descriptors, or TCR for them, ask for."""
        if self.listing.stage == 2:
            return self.rows.sh.astype(np.uint64)
        found = np.zeros(len(self.rows.va), np.uint64)
        for p, here in self._stage1_halves():
            found[here] = p.page["SH"].get(self.rows.attributes[here]) if "SH" in p.page else np.uint64(p.sh)
        return found

    @cached_property
    def memory_key(self) -> Index:
        """What must not differ between mappings of a PA: 4 * index into TYPES + shareability as it counts."""
        sh = np.where(_FORCED[self.byte], OUTER_SHAREABLE, self.sh)
        return np.asarray(TYPE_INDEX[self.byte] * 4 + sh.astype(np.int64), np.int64)

    def places(self, mask: Flags, keys: npt.NDArray[Any], text: Callable[[int], str]) -> Places:
        """The rows of a mask, for the reason that their key tells."""
        rows = self.rows.pick(mask)
        return places(rows.va, rows.size, keys[mask], text, pa=rows.pa)

    def having(self, perms: int) -> Flags:
        """The rows that grant all of these permissions."""
        return np.asarray((self.rows.perms & np.uint16(perms)) == perms)

    def having_any(self, perms: int) -> Flags:
        """The rows that grant one of these permissions."""
        return np.asarray((self.rows.perms & np.uint16(perms)) != 0)


class Cover:
    """Which of some rows maps a PA: the one that reaches furthest of those that begin at or below it."""

    def __init__(self, rows: Runs, mask: Flags) -> None:
        index = np.flatnonzero(mask)
        self._rows = index[np.argsort(rows.pa[index], kind="stable")]
        self._start = rows.pa[self._rows]
        end = self._start + rows.size[self._rows]
        self._end = np.maximum.accumulate(end) if len(end) else end
        self._best = np.maximum.accumulate(np.where(end == self._end, np.arange(len(end)), 0)) if len(end) else end

    def row(self, pas: Words) -> Index:
        """The index of a row that maps each PA, -1 for none."""
        if not len(self._rows):
            return np.full(len(pas), -1, np.int64)
        at = np.searchsorted(self._start, pas, side="right") - 1
        known = np.maximum(at, 0)
        there = (at >= 0) & (self._end[known] > pas)
        return np.where(there, self._rows[self._best[known].astype(np.int64)], -1)


def vas_at(rows: Runs, index: Index, pas: Words) -> Words:
    """The VA at which each of some rows (by index) maps a PA."""
    return np.asarray(rows.va[index] + (pas - rows.pa[index]), np.uint64)


class Sweep:
    """The intervals of PAs between the bounds of rows: in each, every row is everywhere or nowhere."""

    def __init__(self, rows: Runs) -> None:
        self.rows = rows
        end = rows.pa + rows.size
        self.bounds = np.unique(np.concatenate((rows.pa, end)))
        self._first = np.searchsorted(self.bounds, rows.pa)
        self._last = np.searchsorted(self.bounds, end)

    def total(self, weights: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """The sum of the weights of the rows that are in each interval; exact below 2^53."""
        n = len(self.bounds)
        begins = np.bincount(self._first, weights.astype(np.float64), n)
        return np.cumsum(begins - np.bincount(self._last, weights.astype(np.float64), n))[:-1]

    def pairs(self, bad: Flags, a: Index, b: Index, keys: Index, text: Callable[[int], str]) -> Places:
        """The intervals of a mask, each mapped by row `a` and by row `b`, as ranges of the VAs of `a`; merged."""
        start, end = self.bounds[:-1][bad], self.bounds[1:][bad]
        va, alias = (vas_at(self.rows, i, start) for i in (a, b))
        return places(va, end - start, keys, text, pa=start, alias=alias)
