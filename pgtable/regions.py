"""Walks of many addresses side by side: each region of the VA space once, then each address by two reads.

Rules of this file:
- A region is what one last-level table covers (2 MiB with the 4K granule). Each distinct region is walked once, level
  by level, all regions together (`Descent`); an address then costs a look-up of its region and one read.
- A block, a hole or a table with no RAM is the affair of its region (`_Decided`, `_Exact`), not of the whole call.
- Loops run over levels, RAM regions, chunks (addresses.py) and kinds of region, never over addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pgtable.addresses import CHUNK, Addresses, Index, Sheet, distinct
from pgtable.bits import Flags, Words
from pgtable.classes import ENDS, LEVELS, NO_WORDS, Context, Ends, Judge, Numbers, inherited_mask, type_bits
from pgtable.descriptors import LAST_LEVEL, Kind
from pgtable.faults import FaultType
from pgtable.memory import PAGE, Memory, NoMemory, PhysicalMemory, WordChanges
from pgtable.table_params import TableParams

ALIKE = 64  # descriptors reached in the same way that are worth sorting into classes before they are judged

# Physical memory, as the walks of many addresses read it.


class _Source(NamedTuple):
    """Tables that lie in one array: table i starts at `start[i]` of `words`; `inside`: it is there, all of it."""

    words: Words
    start: npt.NDArray[np.int64]
    inside: Flags


class Reader(Protocol):
    """Physical memory as `Descent` and `Walks` read it."""

    dense: bool  # reading a table that nobody asked for is cheap

    def gather(self, pas: Words) -> tuple[Words, Flags]:
        """The word at each of `pas` and whether there is RAM."""
        ...

    def sources(self, tables: Words, n: int) -> Iterator[_Source]:
        """Arrays that hold some of `tables`, the PAs of `n` words each."""
        ...


def reader(memory: Memory) -> Reader:
    """How to read `memory` in bulk."""
    return _Ram(memory) if isinstance(memory, PhysicalMemory) else _Pages(memory)


class _Ram:
    """PhysicalMemory: its regions are such arrays."""

    dense = True

    def __init__(self, memory: PhysicalMemory) -> None:
        self.memory = memory
        self.gather = memory.gather

    def sources(self, tables: Words, n: int) -> Iterator[_Source]:
        """For each RAM region, which of `tables` (PAs of `n` words each) are in it."""
        for region in self.memory.regions:
            size, offset = region.size, tables - np.uint64(region.base)  # wraps far above `size` below the base
            inside = offset <= np.uint64(max(size - 8 * n, 0))
            if size >= 8 * n and inside.any():
                yield _Source(region.words, (offset >> np.uint64(3)).view(np.int64), inside)


class _Pages:
    """Any other Memory: each 4 KiB page is read once, when first needed, and kept."""

    dense = False
    per_page = PAGE // 8

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.rows: dict[int, int] = {}  # page number: row of `words`, -1 where there is no RAM
        self.words = np.zeros((0, self.per_page), np.uint64)

    def gather(self, pas: Words) -> tuple[Words, Flags]:
        """The word at each of `pas` and whether there is RAM, as PhysicalMemory.gather."""
        rows, start = self._located(pas)
        there = rows >= 0
        out = np.zeros(pas.shape, np.uint64)
        out[there] = self.words.reshape(-1)[start[there]]
        return out, there

    def sources(self, tables: Words, n: int) -> Iterator[_Source]:
        """The pages read so far, as one array; tables larger than a page are not in it."""
        if n <= self.per_page:
            rows, start = self._located(tables)
            yield _Source(self.words.reshape(-1), start, rows >= 0)

    def _located(self, pas: Words) -> tuple[Numbers, npt.NDArray[np.int64]]:
        """The row of each PA's page, and the PA's place in all rows joined."""
        numbers, inverse = distinct(pas // np.uint64(PAGE))
        pages: list[int] = numbers.tolist()
        self._load(pages)
        rows = np.array([self.rows[page] for page in pages], np.intp)[inverse]
        return rows, rows * self.per_page + (pas % np.uint64(PAGE) // np.uint64(8)).view(np.int64)

    def _load(self, pages: list[int]) -> None:
        new: list[Words] = []
        for page in pages:
            if page not in self.rows:
                try:
                    words = self.memory.words(page * PAGE, self.per_page)
                    self.rows[page] = len(self.words) + len(new)
                    new.append(words)
                except NoMemory:
                    self.rows[page] = -1
        if new:
            self.words = np.concatenate([self.words, np.stack(new)])


# Descent: many walks side by side, level by level.


class _Live(NamedTuple):
    """Walks under way, in arrays of shape (m,): the numbers of their addresses, and what they carry down."""

    row: Numbers
    va: Words
    table: Words
    inherited: Words
    word: Words

    def some(self, which: Flags) -> _Live:
        row, va, table, inherited, word = self
        return _Live(row[which], va[which], table[which], inherited[which], word[which])


class Descent:
    """Walks of one half's addresses. `updates`: the table descriptors whose access flag hardware sets."""

    def __init__(self, source: Reader, p: TableParams) -> None:
        self.source = source
        self.p = p
        self.keep = np.uint64(inherited_mask(p))
        self.over = np.uint64(p.over)
        self.updates: list[WordChanges] = []
        self.ends_here = {level: np.array([kind is not Kind.TABLE for kind in p.kinds[level]]) for level in LEVELS}

    def to_last_table(self, va: Words) -> Ends:
        """Down to the last-level table, whose address is checked but which is not read."""
        ends, live, above = self._down(va, self.p.levels[:-1])
        live, _ = self._halt(ends, live, live.table, live.table & self.over != 0, above, FaultType.ADDRESS_SIZE)
        if live.row.size == va.size:
            return Ends(ends.level, ends.end, live.inherited, live.word, live.table)
        _end(ends, LAST_LEVEL, None, live, live.table)
        return ends

    def to_leaf(self, va: Words) -> Ends:
        """All the way down."""
        return self._down(va, self.p.levels)[0]

    def _down(self, va: Words, levels: tuple[tuple[int, int, int], ...]) -> tuple[Ends, _Live, int]:
        n = va.size
        live = _Live(np.arange(n), va, np.full(n, self.p.base, np.uint64), *np.zeros((2, n), np.uint64))
        ends = Ends(np.full(n, LAST_LEVEL, np.int8), np.zeros(n, np.uint8), *np.zeros((3, n), np.uint64))
        above = 0
        for level, shift, mask in levels:
            entry = (live.va >> np.uint64(shift) & np.uint64(mask)) << np.uint64(3)
            live = self._step(ends, live, live.table | entry, level, above)
            above = level
        return ends, live, above

    def _step(self, ends: Ends, live: _Live, at: Words, level: int, above: int) -> _Live:
        """Reads one descriptor for each live walk; those that go on through a table stay live."""
        live, at = self._halt(ends, live, at, at & self.over != 0, above, FaultType.ADDRESS_SIZE)
        words, there = self.source.gather(at)
        words = words.byteswap() if self.p.big_endian else words
        if not there.all():
            words = words[there]
            live, at = self._halt(ends, live, at, ~there, level, FaultType.EXTERNAL_ON_WALK)
        live = live._replace(word=words)
        live, at = self._halt(ends, live, at, self.ends_here[level][type_bits(self.p, words)], level)
        if self.p.haft:
            self._mark_used(at, live.word)
        return live._replace(table=self.p.table_address(live.word), inherited=live.inherited | live.word & self.keep)

    def _halt(
        self, ends: Ends, live: _Live, at: Words, where: Flags, level: int, type: FaultType | None = None
    ) -> tuple[_Live, Words]:
        """Notes the end of some walks, at `level`; returns the others."""
        if not where.any():
            return live, at
        _end(ends, level, type, live.some(where), at[where])
        return live.some(~where), at[~where]

    def _mark_used(self, at: Words, words: Words) -> None:
        """FEAT_HAFT: hardware sets the access flag of tables that a walk goes through."""
        unused = (words & np.uint64(self.p.table_af) == 0) & (self.p.table_address(words) & self.over == 0)
        self.updates.append(WordChanges(at[unused], words[unused], words[unused] | np.uint64(self.p.table_af)))


def _end(ends: Ends, level: int, type: FaultType | None, live: _Live, at: Words) -> None:
    rows = live.row
    ends.level[rows], ends.end[rows] = level, ENDS.index(type)
    ends.inherited[rows], ends.word[rows], ends.at[rows] = live.inherited, live.word, at


# Routes: how an address gets from its region to its descriptor.


class _Route(Protocol):
    def read(self, va: Words, rows: Numbers, out: Words) -> int | Numbers:
        """The classes of addresses `va` in regions `rows` (an int: all the same); PAs go to `out` (faults: any)."""
        ...

    def word(self, some: Numbers) -> Words:
        """The last descriptor read for some of the addresses of the last `read`."""
        ...

    def at(self, some: Numbers) -> Words:
        """Its PA."""
        ...


class _Decided:
    """Walks that ended: in a block, a hole or a fault, or at a page. `regions`: which of `ends` matter."""

    def __init__(self, judge: Judge, ends: Ends, regions: Numbers) -> None:
        self.ends = ends
        self.number = np.zeros(len(ends.level), np.intp)
        self._classify(judge, regions)
        numbers, found = self.number[regions], judge.table[self.number]
        self.offset = found["offset"].copy()
        self.base = ends.word & found["free"] | found["fixed"]
        self.same = int(numbers[0]) if (numbers == numbers[0]).all() else None

    def _classify(self, judge: Judge, regions: Numbers) -> None:
        codes = judge.codes(self.ends)[regions]
        kinds: list[int] = np.flatnonzero(np.bincount(codes)).tolist()
        if regions.size < ALIKE * len(kinds):
            self.number[regions] = judge.add(self.ends.some(regions))
            return
        for code in kinds:
            alike = regions[codes == code]
            self.number[alike] = judge.context(code).classify(self.ends.word[alike])

    def read(self, va: Words, rows: Numbers, out: Words) -> int | Numbers:
        self.rows = rows
        offset = self.offset[rows[0]] if self.same is not None else self.offset.take(rows, mode="clip")
        np.bitwise_and(va, offset, out=out)
        np.bitwise_or(out, self.base.take(rows, mode="clip"), out=out)
        return self.number.take(rows, mode="clip") if self.same is None else self.same

    def word(self, some: Numbers) -> Words:
        return self.ends.word[self.rows[some]]

    def at(self, some: Numbers) -> Words:
        return self.ends.at[self.rows[some]]


class _Exact:
    """Regions whose table is in no single array: each address is walked to the end."""

    def __init__(self, judge: Judge, descent: Descent) -> None:
        self.judge = judge
        self.descent = descent

    def read(self, va: Words, rows: Numbers, out: Words) -> int | Numbers:
        each = np.arange(va.size)
        self.decided = _Decided(self.judge, self.descent.to_leaf(va), each)
        return self.decided.read(va, each, out)

    def word(self, some: Numbers) -> Words:
        return self.decided.word(some)

    def at(self, some: Numbers) -> Words:
        return self.decided.at(some)


class _Tables:
    """Regions whose last-level tables are in one array of words and under the same table attributes.

    By region: `start` is its table's place in `words`, `tables` the table's PA, both less the region's first page.
    """

    def __init__(self, context: Context, words: Words, start: npt.NDArray[np.int64], tables: Words) -> None:
        self.context = context
        self.words = words
        self.start = start
        self.tables = tables
        self.page_shift = context.judge.p.fmt.granule.page_shift
        self.index = np.empty(CHUNK, np.int64)
        self.found = np.empty(CHUNK, np.uint64)

    def read(self, va: Words, rows: Numbers, out: Words) -> int | Numbers:
        index, found = self.index[: va.size], self.found[: va.size]
        np.take(self.start, rows, out=index, mode="clip")
        np.right_shift(va, self.page_shift, out=found)
        np.add(index, found.view(np.int64), out=index)
        np.take(self.words, index, out=found, mode="clip")
        if self.context.judge.p.big_endian:
            found.byteswap(inplace=True)
        number: int | Numbers = self.context.classify(found)
        self.context.place(va, found, number, index.view(np.uint64), out)
        self.va, self.rows = va, rows
        return number

    def word(self, some: Numbers) -> Words:
        return self.found[some]

    def at(self, some: Numbers) -> Words:
        page = self.va[some] >> np.uint64(self.page_shift)
        return self.tables[self.rows[some]] + (page << np.uint64(3))


class Walks:
    """The walks of addresses of one half, all in its range; the answers go to `sheet`."""

    def __init__(self, source: Reader, judge: Judge, addresses: Addresses, sheet: Sheet) -> None:
        self.p = p = judge.p
        self.judge = judge
        self.addresses = addresses
        self.sheet = sheet
        self.descent = Descent(source, p)
        self.routes: list[_Route] = []
        self.scratch = np.empty((2, CHUNK), np.uint64)
        shift = p.fmt.granule.level_shift(LAST_LEVEL - 1)
        index = Index.of(addresses, shift, source.dense and not p.haft)
        if index is None:  # as if all were in one region, each to be walked to the end
            self.index = Index(NO_WORDS, shift, 0, inverse=np.zeros(addresses.bounds.n, np.intp))
            self.routes.append(_Exact(self.judge, self.descent))
            return
        self.index = index
        first = np.maximum(index.keys << np.uint64(shift), np.uint64(p.half_base))
        self.route = np.zeros(len(first), np.uint16)  # by region
        page = first >> np.uint64(p.fmt.granule.page_shift)
        self._plan(source, self.descent.to_last_table(first), page)

    def _plan(self, source: Reader, ends: Ends, page: Words) -> None:
        """A route for each region. `page`: the number of each region's first page."""
        left = (ends.level == LAST_LEVEL) & (ends.end == 0)
        if not left.all():
            self._add(~left, _Decided(self.judge, ends, np.flatnonzero(~left)))
        tables, at = np.flatnonzero(left), ends.at - (page << np.uint64(3))
        codes = self.judge.codes(ends)[tables]
        for words, start, inside in source.sources(ends.at[tables], self.p.levels[-1][2] + 1):
            place = -page.view(np.int64)
            place[tables] += start
            for code in np.flatnonzero(np.bincount(codes[inside])).tolist():
                regions = tables[inside & (codes == code)]
                self._add(regions, _Tables(self.judge.context(code), words, place, at))
            left[tables[inside]] = False
        if left.any():
            self._add(left, _Exact(self.judge, self.descent))

    def _add(self, regions: Flags | Numbers, route: _Route) -> None:
        self.route[regions] = len(self.routes)
        self.routes.append(route)

    def run(self) -> None:
        """Answers every address."""
        for start, va, where in self.addresses.chunks():
            rows = self.index.rows(start, va, self.scratch[0])
            for route, some in self._split(rows):
                if some is None:
                    self._answer(route, va, rows, where)
                else:
                    places = some + start if isinstance(where, slice) else where[some]
                    self._answer(route, va.take(some, mode="clip"), rows.take(some, mode="clip"), places)
        self.sheet.tables.append(self.judge.table)
        self.sheet.updates += self.descent.updates

    def _split(self, rows: Numbers) -> Iterator[tuple[_Route, Numbers | None]]:
        """The routes that regions `rows` need, with the positions in `rows`; None for all of them."""
        if len(self.routes) == 1:
            yield self.routes[0], None
            return
        taken = self.route.take(rows, mode="clip")
        for i, route in enumerate(self.routes):
            some = np.flatnonzero(taken == i)
            if some.size:
                yield route, some if some.size < rows.size else None

    def _answer(self, route: _Route, va: Words, rows: Numbers, where: slice | Numbers) -> None:
        """The answers for addresses that take the same route, at positions `where` of the call."""
        judge, sheet = self.judge, self.sheet
        out = sheet.pa[where] if isinstance(where, slice) else self.scratch[1][: va.size]
        number = route.read(va, rows, out)
        sheet.put(where, number)
        if not judge.all_ok:
            stopped = _members(~judge.ok, number, va.size)
            out[stopped] = 0
            sheet.stop(stopped + where.start if isinstance(where, slice) else where[stopped], route.word(stopped))
        if judge.any_flip:
            self._note_updates(route, number, va.size)
        if not isinstance(where, slice):
            sheet.pa[where] = out

    def _note_updates(self, route: _Route, number: int | Numbers, n: int) -> None:
        some = _members(self.judge.flip != 0, number, n)
        if some.size:
            words, flips = route.word(some), self.judge.flip[number if isinstance(number, int) else number[some]]
            self.descent.updates.append(WordChanges(route.at(some), words, words ^ flips))


def _members(classes: Flags, number: int | Numbers, n: int) -> Numbers:
    """The positions, of n, of addresses in one of `classes`."""
    if isinstance(number, int):
        return np.arange(n if classes[number] else 0)
    return np.flatnonzero(classes.take(number, mode="clip"))
