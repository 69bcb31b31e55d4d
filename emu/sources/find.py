"""The root tables in RAM of which nothing is known: no registers, no symbols, no operating system.

How it is done, and what counts as evidence:
1. One pass over all RAM keeps the 4 KiB pages whose words could be descriptors: some valid ones, none with reserved
   address bits, not more rubbish among the invalid ones than there are valid ones (`survey`).
2. From level 3 up, a page is a table where each of its valid entries is a leaf with an address that can exist, or
   leads to a page that is a table of the next level, or one below which nothing is mapped (`_Search`).
3. A table that no table of the level above leads to is a root. Its tree is listed, and the listing gives what makes
   a root believable (`Root`): how many leaves, whether they lead to RAM, how much RAM is mapped at one distance (a
   linear map), whether the tree's own tables are mapped by it. Stale and accidental roots fail one of these.
A kernel's root maps its own tables and most of RAM; that of a process maps pages for EL0 and little else.
Nothing here reads Linux's own notes: VMCOREINFO (vmcoreinfo.py) is another witness, not a hint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from emu.sources.ram import Scannable, scannable
from emu.sources.vmcoreinfo import linux_registers
from pgtable.bits import Flags, Layout, Words
from pgtable.descriptors import LAST_LEVEL, Format, Granule
from pgtable.leaves import Leaves, leaves, tables
from pgtable.memory import PAGE, TableMemory
from pgtable.permissions import UNPRIVILEGED
from pgtable.registers import Registers

BATCH = 2048  # tables looked at together
TRIALS = 24  # roots of one format whose trees are listed
EXISTS = 48  # bits of an address that can exist even where no RAM says so: devices

# Formats worth a search, and for each the levels that a root may have with the VA bits of a full one.
FORMATS: tuple[tuple[Format, dict[int, int]], ...] = (
    (Format(Granule.K4), {0: 48, 1: 39}),
    (Format(Granule.K16), {0: 48, 1: 47, 2: 36}),
    (Format(Granule.K64, lpa=False), {1: 48, 2: 42}),
    (Format(Granule.K4, ds=True), {-1: 52}),
    (Format(Granule.K16, ds=True), {0: 52}),
)


@dataclass(frozen=True)
class Root:
    """A root table at PA `pa`, and the evidence for it.

    `upper`: it is more likely a TTBR1's. `tables`, `leaves`: how many of each its tree has. `own`: the share of its
    own tables that it maps. `linear`: the share of RAM that it maps at one distance, `distance` = VA - PA (modulo
    2^64). `in_ram`: the share of its leaves that lead to RAM. `user`: the share of them that EL0 may use.
    """

    pa: int
    granule: Granule
    start_level: int
    va_bits: int
    upper: bool
    tables: int
    leaves: int
    own: float
    linear: float
    distance: int
    in_ram: float
    user: float

    @property
    def score(self) -> float:
        """What roots are ranked by: leaves count little, mapping all of RAM and oneself count much."""
        return math.log2(1 + self.leaves) * (0.1 + self.own) * (0.1 + self.linear) * (0.1 + self.in_ram)

    @property
    def registers(self) -> Registers:
        """Registers for a walk from this root, with Linux's MAIR; the other half is off."""
        return linux_registers(self.pa, self.granule.page_size, self.va_bits, upper=self.upper)

    def __str__(self) -> str:
        half = "upper half (TTBR1)" if self.upper else "lower half (TTBR0)"
        return (
            f"PA {self.pa:#x}: {self.granule.label}, {self.va_bits} VA bits, {half}; {self.tables} tables, "
            f"{self.leaves} leaves, {self.in_ram:.0%} of them in RAM, {self.user:.0%} for EL0; maps {self.linear:.0%} "
            f"of RAM at one distance and {self.own:.0%} of its own tables"
        )


def find_roots(ram: TableMemory) -> list[Root]:
    """The roots in `ram`, the most believable first. Reads all of it once, then the tables. Raises SourceError."""
    memory = scannable(ram)
    seen = survey(memory)
    found = [pair for fmt, starts in FORMATS for pair in _Search(memory, fmt, seen).roots(starts)]
    kept: list[Root] = []
    known: set[int] = set()  # tables of better roots: a part of a tree is a tree too, in another format
    for root, own in sorted(found, key=lambda pair: -pair[0].score):
        if root.pa not in known:
            kept.append(root)
            known.update(own.tolist())
    return kept


def limit(memory: Scannable) -> int:
    """Addresses from here on cannot exist."""
    return 1 << max([EXISTS, *((base + size - 1).bit_length() for base, size in memory.ranges)])


class Survey(NamedTuple):
    """4 KiB pages by what is in them: PAs, ascending.

    `pages`: could be (a part of) a table, with valid descriptors. `busy`: hold words that are odd, hence valid ones if
    they were descriptors. `ranges`: where RAM is.
    """

    pages: Words
    busy: Words
    ranges: Sequence[tuple[int, int]]

    def idle(self, pas: Words, size: int) -> Flags:
        """Which of the tables of `size` bytes at `pas` are RAM without a valid descriptor."""
        found = _inside(pas, *_columns(self.ranges))
        for at in range(0, size, PAGE):
            found &= ~_in_sorted(pas + np.uint64(at), self.busy)
        return found


def survey(memory: Scannable) -> Survey:
    """Looks at every page once."""
    top = np.uint64(_reserved(Format().leaf(LAST_LEVEL)) & _reserved(Format().table(2)))
    if limit(memory) > 1 << EXISTS:
        top = np.uint64(0)  # with 52-bit addresses nothing is reserved in all formats
    pages, busy = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    for pa, words in memory.chunks():
        rows = words.reshape(-1, PAGE // 8)
        used = np.flatnonzero((rows & np.uint64(1)).any(axis=1))
        busy.append(used.astype(np.uint64) * np.uint64(PAGE) + np.uint64(pa))
        pages.append(busy[-1][_could_be(rows[used], top)])
    return Survey(np.sort(np.concatenate(pages)), np.sort(np.concatenate(busy)), memory.ranges)


def _could_be(words: Words, reserved: np.uint64) -> Flags:
    """Rows of valid descriptors, none with reserved bits, and not more other words than those.

    Descriptors made invalid, all of whose other bits were left, do not count as other words: freed memory of a kernel
    and guard pages look so.
    """
    tested = words & (np.uint64(1) | reserved)
    valid = np.count_nonzero(tested & np.uint64(1), axis=1)
    clean = np.count_nonzero(tested == 1, axis=1)
    once = np.count_nonzero((tested == 0) & (words & _AF != 0), axis=1)
    return np.asarray((valid > 0) & (valid == clean) & (np.count_nonzero(words, axis=1) - once <= 2 * valid))


_AF = np.uint64(Format().leaf(LAST_LEVEL)["AF"].mask)


def _reserved(layout: Layout) -> int:
    return sum(field.mask for field in layout if field.reserved == "RES0")


class _Level(NamedTuple):
    """The tables found for a level: PAs (ascending), leaves below each, and every table that they lead to."""

    pa: Words
    leaves: Words
    below: Words


_NOTHING = _Level(*(np.zeros(0, np.uint64) for _ in range(3)))


class _Search:
    """The search for trees of one format among the pages of a survey."""

    def __init__(self, memory: Scannable, fmt: Format, seen: Survey) -> None:
        self.memory = memory
        self.fmt = fmt
        self.limit = np.uint64(limit(memory) - 1)
        size = fmt.granule.page_size
        self.survey = seen
        self.barren: dict[int, Words] = {}
        self.candidates = np.unique(seen.pages & np.uint64(-size & (1 << 64) - 1))

    def roots(self, starts: dict[int, int]) -> list[tuple[Root, Words]]:
        """The roots whose level is in `starts` (level: VA bits), with their evidence and their tables."""
        levels: dict[int, _Level] = {}
        below = _NOTHING
        for level in range(LAST_LEVEL, min(starts) - 1, -1):
            below = levels[level] = self._tables_at(level, below)
        found: list[tuple[Root, Words]] = []
        for level, va_bits in starts.items():
            above = levels.get(level - 1, _NOTHING)
            found += self._judged(levels[level], above, level, va_bits)
        return found

    def _tables_at(self, level: int, below: _Level) -> _Level:
        parts = [_NOTHING, *(self._batch(level, below, pas) for pas in _batches(self.candidates))]
        pa, count, refs = (np.concatenate(column) for column in zip(*parts, strict=True))
        return _Level(pa, count, np.unique(refs))

    def _batch(self, level: int, below: _Level, pas: Words) -> _Level:
        """Which of `pas` are tables at `level`: those that lead somewhere, and nowhere else than they may."""
        words, there = self.memory.tables(pas, self.fmt.granule.entries)
        leaf, table = self._kinds(words, level)
        sound = there & ((leaf | table) == (words & np.uint64(1) == 1)).all(axis=1) & self._used(words, leaf)
        pas, own, (row, entry) = pas[sound], np.count_nonzero(leaf[sound], axis=1), np.nonzero(table[sound])
        targets = self._target(words[sound][row, entry])
        known, count = _found(targets, below)
        n = len(pas)
        hopeful = (np.bincount(row[known], minlength=n) > 0) | (own > 0)
        unknown = ~known & hopeful[row]  # the others are not worth a look
        wrong = row[unknown][~self._are_barren(targets[unknown], level + 1)]
        good = hopeful & (np.bincount(wrong, minlength=n) == 0)
        counts = own + np.bincount(row, count, n)
        return _Level(pas[good], counts[good].astype(np.uint64), targets[good[row]])

    def _kinds(self, words: Words, level: int) -> tuple[Flags, Flags]:
        """Which words are leaves and which lead to tables at `level`; a valid word that is neither cannot be there."""
        valid, typed = words & np.uint64(1) == 1, words & np.uint64(2) != 0
        layout = self.fmt.leaf(level)
        allowed = typed if level == LAST_LEVEL else ~typed & (level in self.fmt.block_levels)
        leaf = valid & allowed & (words & np.uint64(_reserved(layout)) == 0)
        leaf &= layout["OA"].get(words) <= self.limit
        if level == LAST_LEVEL:
            return leaf, np.zeros_like(leaf)
        rows = self.fmt.table(level)
        table = valid & typed & (words & np.uint64(_reserved(rows)) == 0) & (rows["TA"].get(words) <= self.limit)
        return leaf, table

    def _used(self, words: Words, leaf: Flags) -> Flags:
        """Most leaves have their access flag: what an operating system maps, it uses."""
        flag = np.uint64(self.fmt.leaf(LAST_LEVEL)["AF"].mask)
        return np.asarray(2 * np.count_nonzero(leaf & (words & flag != 0), axis=1) >= np.count_nonzero(leaf, axis=1))

    def _are_barren(self, pas: Words, level: int) -> Flags:
        """Which of `pas` are tables at `level` below which nothing is mapped."""
        return self.survey.idle(pas, self.fmt.granule.page_size) | np.isin(pas, self._barren_at(level))

    def _barren_at(self, level: int) -> Words:
        """The candidates that are tables at `level` with entries, below which nothing is mapped all the same."""
        if level not in self.barren:
            found = [np.zeros(0, np.uint64)]
            for pas in _batches(self.candidates if level < LAST_LEVEL else found[0]):
                words, there = self.memory.tables(pas, self.fmt.granule.entries)
                _, table = self._kinds(words, level)
                sound = there & (table == (words & np.uint64(1) == 1)).all(axis=1)
                row, entry = np.nonzero(table & sound[:, None])
                wrong = row[~self._are_barren(self._target(words[row, entry]), level + 1)]
                found.append(pas[sound & (np.bincount(wrong, minlength=len(pas)) == 0)])
            self.barren[level] = np.concatenate(found)
        return self.barren[level]

    def _target(self, words: Words) -> Words:
        field = self.fmt.table(LAST_LEVEL - 1)["TA"]
        return field.get(words)

    def _judged(self, here: _Level, above: _Level, level: int, va_bits: int) -> list[tuple[Root, Words]]:
        free = ~np.isin(here.pa, above.below) & ~np.isin(here.pa, here.below)
        order = np.argsort(here.leaves[free])[::-1][:TRIALS]
        found = (self._evidence(int(pa), level, va_bits) for pa in here.pa[free][order])
        return [pair for pair in found if pair and pair[0].leaves]

    def _evidence(self, pa: int, level: int, va_bits: int) -> tuple[Root, Words] | None:
        """The listing of the tree, as evidence, and its tables; None where it is no tree."""
        size = self.fmt.granule.page_size
        for upper in (True, False):
            regs = linux_registers(pa, size, va_bits, upper=upper)
            try:
                found, own = leaves(self.memory, regs), np.unique(tables(self.memory, regs).pa)
            except ValueError:  # it refers to itself
                return None
            n = np.array([self.fmt.granule.level_size(k) for k in range(LAST_LEVEL + 1)], np.uint64)[found.level]
            in_ram = _inside(found.pa, *_columns(self.memory.ranges))
            distance, mapped = _linear(found, np.where(in_ram, n, np.uint64(0)))
            user = _share(found.perms & np.uint16(UNPRIVILEGED) != 0)
            if upper and user <= 0.5 and not _is_identity(found, va_bits):
                break
        root = Root(
            pa, self.fmt.granule, level, va_bits, upper, len(own), len(found.va),
            own=_share(_inside(own, found.pa, n)),
            linear=min(1.0, mapped / max(1, sum(size for _, size in self.memory.ranges))),
            distance=distance, in_ram=_share(in_ram), user=user,
        )  # fmt: skip
        return root, own


def _is_identity(found: Leaves, va_bits: int) -> bool:
    """Leaves listed as the upper half's are an identity map, and nothing else, in the lower half.

    The linear map of a kernel whose RAM begins at PA 0 looks the same, but it is not all that a kernel maps.
    """
    return bool((found.va - found.pa == np.uint64((1 << 64) - (1 << va_bits))).all())


def _found(targets: Words, below: _Level) -> tuple[Flags, Words]:
    """Which of `targets` are tables of the level below, and the leaves in them."""
    if not len(below.pa):
        return np.zeros(len(targets), np.bool_), np.zeros(len(targets), np.uint64)
    at = np.minimum(np.searchsorted(below.pa, targets), len(below.pa) - 1)
    known = below.pa[at] == targets
    return known, np.where(known, below.leaves[at], np.uint64(0))


def _in_sorted(values: Words, among: Words) -> Flags:
    if not len(among):
        return np.zeros(len(values), np.bool_)
    return np.asarray(among[np.minimum(np.searchsorted(among, values), len(among) - 1)] == values)


def _batches(pas: Words) -> Iterator[Words]:
    return (pas[i : i + BATCH] for i in range(0, len(pas), BATCH))


def _share(flags: Flags) -> float:
    return float(np.count_nonzero(flags)) / max(1, len(flags))


def _linear(found: Leaves, sizes: Words) -> tuple[int, int]:
    """The distance VA - PA that most bytes are mapped at, and how many."""
    if not len(found.va):
        return 0, 0
    distances, which = np.unique(found.va - found.pa, return_inverse=True)
    mapped = np.bincount(which, sizes.astype(np.float64))
    best = int(mapped.argmax())
    return int(distances[best]), int(mapped[best])


def _columns(ranges: Sequence[tuple[int, int]]) -> tuple[Words, Words]:
    """Starts and sizes of ranges, as arrays."""
    both = np.array(ranges, np.uint64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _inside(pas: Words, starts: Words, sizes: Words) -> Flags:
    """Which of `pas` are in one of the ranges; ranges of one start count with the largest."""
    if not len(starts):
        return np.zeros(len(pas), np.bool_)
    order = np.lexsort((sizes, starts))
    starts, ends = starts[order], np.maximum.accumulate(starts[order] + sizes[order])
    at = np.searchsorted(starts, pas, side="right") - 1
    return np.asarray((at >= 0) & (pas < ends[np.maximum(at, 0)]))
