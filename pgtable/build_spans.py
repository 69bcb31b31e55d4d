"""Writes many descriptors of one level at once, over as many tables as it takes.

Rules of this file:
- One array step for each level, whatever the size: the entries that a range goes through are a range of numbers,
  counted from the lowest VA of the tree.
- Leaves are written straight into memory, a piece at a time that stays in the processor's cache: consecutive addresses
  are one template, added to.
- New tables of a level are consecutive in the pool. One that is about to be written whole is not zeroed before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from pgtable.bits import Words
from pgtable.descriptors import Format
from pgtable.memory import NoMemory, PhysicalMemory

PIECE = 1 << 16  # descriptors that are written in one step: 512 KiB
ABSENT = np.uint64(2**64 - 1)  # in place of a PA: there is no table
PLAIN_BITS = 48  # an output address of so many bits stands in a descriptor as it is, in every format


class Entries(NamedTuple):
    """`n` consecutive entries of one level, from number `first` on, counted from the tree's lowest VA."""

    first: int
    n: int

    def tables(self, entries: int) -> Entries:
        """The entries one level up that cover these, where a table has so many entries."""
        first = self.first // entries
        return Entries(first, (self.first + self.n - 1) // entries - first + 1)


class Spans:
    """The tables of one tree: from `root`, whose level is `start_level`; a root of several tables is one."""

    def __init__(self, memory: PhysicalMemory, fmt: Format, root: int, start_level: int) -> None:
        self.memory, self.fmt, self.root, self.start_level = memory, fmt, root, start_level
        self.entries = fmt.granule.entries

    def tables(self, level: int, span: Entries, found: Callable[[int, Entries, Words, Words], Words]) -> Words:
        """The PA of each table of `level` that entries `span` are in, ABSENT where there is none.

        At each level above, `found(level, entries, slots, words)` says what the descriptors at the PAs `slots` are to
        be: it may refuse (raise), or give others in place of those that are no tables.
        """
        if level == self.start_level:
            return np.array([self.root], np.uint64)
        above = span.tables(self.entries)
        tables = self.tables(level - 1, above, found)
        slots = self.slots(level - 1, above, tables)
        words = np.zeros(above.n, np.uint64)
        there = slots != ABSENT
        words[there] = self._read(slots[there])
        words = found(level - 1, above, slots, words)
        layout = self.fmt.table(level - 1)
        is_table = words & np.uint64(layout.mask("VALID", "TYPE")) == np.uint64(layout.mask("VALID", "TYPE"))
        return np.where(is_table, layout["TA"].get(words), ABSENT)

    def _read(self, slots: Words) -> Words:
        words, there = self.memory.gather(slots)
        if not there.all():
            raise NoMemory(int(slots[~there][0]))
        return words

    def slots(self, level: int, span: Entries, tables: Words) -> Words:
        """The PA of each descriptor of `span`, ABSENT in a table that is not there."""
        number = np.arange(span.first, span.first + span.n)
        if level == self.start_level:
            at_root: Words = number.astype(np.uint64) * np.uint64(8) + np.uint64(self.root)
            return at_root
        table = tables[number // self.entries - span.first // self.entries]
        return np.where(table != ABSENT, table + (number % self.entries).astype(np.uint64) * np.uint64(8), ABSENT)

    def runs(self, level: int, span: Entries, tables: Words) -> Iterator[tuple[int, int, int]]:
        """Descriptors of `span` that are consecutive in memory: (PA, first, count), none where there is no table."""
        if level == self.start_level:
            yield self.root + 8 * span.first, span.first, span.n
            return
        size = np.uint64(8 * self.entries)
        apart = np.append(True, tables[1:] != tables[:-1] + size)
        for region in self.memory.regions:  # words of two regions are not consecutive in this process
            apart |= tables == np.uint64(region.base)
        breaks = np.flatnonzero(apart)
        ends = np.append(breaks[1:], len(tables))
        there = tables[breaks] != ABSENT
        first_table, end = span.first // self.entries, span.first + span.n
        for i, j in zip(breaks[there].tolist(), ends[there].tolist(), strict=True):
            first, last = max((first_table + i) * self.entries, span.first), min((first_table + j) * self.entries, end)
            yield int(tables[i]) + 8 * (first - (first_table + i) * self.entries), first, last - first

    def live(self, level: int, span: Entries, tables: Words) -> tuple[int, int] | None:
        """The first valid descriptor of `span`: its number and the word."""
        for pa, first, count in self.runs(level, span, tables):
            words = self.memory.words(pa, count)
            for at in range(0, count, PIECE):
                piece = words[at : at + PIECE]
                valid = piece & np.uint64(1)
                if valid.any():
                    i = int(np.argmax(valid))
                    return first + at + i, int(piece[i])
        return None

    def store(self, slots: Words, words: Words) -> None:
        """Writes descriptors where they belong."""
        for region in self.memory.regions:
            offset = slots - np.uint64(region.base)
            inside = offset < np.uint64(region.size)
            region.words[(offset[inside] >> np.uint64(3)).view(np.int64)] = words[inside]


def write_run(memory: PhysicalMemory, slot: int, fmt: Format, level: int, pa: int, count: int, word: int) -> None:
    """Writes `count` descriptors from PA `slot` on that map consecutive addresses from `pa`, all else as in `word`."""
    out, unit = memory.words(slot, count), fmt.granule.level_size(level)
    step = np.arange(min(count, PIECE), dtype=np.uint64) * np.uint64(unit)
    plain = pa + count * unit <= 1 << PLAIN_BITS
    oa = fmt.leaf(level)["OA"]
    ramp = step + np.uint64(word & ~oa.mask) if plain else step
    for at in range(0, count, PIECE):
        piece = out[at : at + PIECE]
        first = np.uint64(pa + at * unit)
        if plain:
            np.add(ramp[: len(piece)], first, out=piece)
        else:
            piece[:] = oa.put(np.full(len(piece), word, np.uint64), ramp[: len(piece)] + first)


def whole_tables(level: int, span: Entries, entries: int, start_level: int) -> tuple[int, int]:
    """The tables, counted from that of the first entry, that `span` covers whole: (first, end)."""
    if level == start_level:
        return 0, 0
    above = span.tables(entries)
    first, end = -(-span.first // entries), (span.first + span.n) // entries
    return (first - above.first, end - above.first) if first < end else (0, 0)
