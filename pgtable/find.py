"""Reverse: which VAs reach a PA, where a table is referred to, where a word is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pgtable.bits import Words
from pgtable.descriptors import Kind
from pgtable.listing import Listing
from pgtable.memory import TableMemory
from pgtable.tree import CHUNK, ROOT, words_of


class Alias(NamedTuple):
    """A range of VAs that reaches wanted PAs; `row` is the listing's. `same`: attr and sh are those of the first."""

    va: int
    pa: int
    size: int
    row: int
    same: bool


class Entry(NamedTuple):
    """A descriptor in a table: its level, PA, word and kind, and the lowest VA that it translates.

    A root is no descriptor's: `slot` is None and `word` the TTBR.
    """

    level: int
    slot: int | None
    word: int
    kind: Kind
    va: int


def aliases(listing: Listing, pa: int, size: int = 1) -> list[Alias]:
    """All ranges of VAs that reach a PA in [pa, pa + size), in VA order."""
    runs = listing.runs
    first, last = runs.pa, runs.pa + (runs.size - np.uint64(1))
    rows = np.flatnonzero((first <= np.uint64(pa + size - 1)) & (last >= np.uint64(pa)))
    low = np.maximum(first[rows], np.uint64(pa))
    size_of = np.minimum(last[rows], np.uint64(pa + size - 1)) - low + np.uint64(1)
    va = runs.va[rows] + low - first[rows]
    same = (runs.attr[rows] == runs.attr[rows[:1]]) & (runs.sh[rows] == runs.sh[rows[:1]])
    columns = (column.tolist() for column in (va, low, size_of, rows, same))
    return [Alias(*row) for row in zip(*columns, strict=True)]


def references(memory: TableMemory, listing: Listing, table: int) -> list[Entry]:
    """The descriptors that refer to the table page at or around the PA `table`, roots first."""
    found = []
    for tree in listing.trees:
        p = tree.params
        page = p.fmt.granule.page_size
        for tables in tree.levels:
            for i in np.flatnonzero(tables.pa & np.uint64((1 << 64) - page) == np.uint64(table & -page)).tolist():
                slot, level = int(tables.slot[i]), int(tables.level[i])
                if slot == ROOT:
                    found.append(Entry(level - 1, None, p.root, Kind.TABLE, int(tables.va[i])))
                    continue
                word = _word(memory, slot, p.big_endian)
                found.append(Entry(level - 1, slot, word, p.fmt.kind(word, level - 1), int(tables.va[i])))
    return found


def _word(memory: TableMemory, pa: int, big_endian: bool) -> int:
    word = memory.fetch(pa)
    return int.from_bytes(word.to_bytes(8, "little"), "big") if big_endian else word


def entries(memory: TableMemory, listing: Listing, word: int, mask: int) -> Iterator[Entry]:
    """All descriptors whose bits under `mask` are those of `word`, table by table from the roots down.

    An entry that several paths lead to is there once for each.
    """
    for tree in listing.trees:
        p = tree.params
        for tables, (level, _, index) in zip(tree.levels, p.levels, strict=False):
            size = p.fmt.granule.level_size(level)
            for first in range(0, len(tables.pa), CHUNK):
                some = tables.pick(slice(first, first + CHUNK))
                words, there = words_of(memory, p, some.pa, index + 1)
                hit = ((words ^ np.uint64(word)) & np.uint64(mask)) == 0
                rows, places = np.nonzero(hit & there[:, None])
                for row, place in zip(rows.tolist(), places.tolist(), strict=True):
                    value = int(words[row, place])
                    slot, va = int(some.pa[row]) + 8 * place, int(some.va[row]) + place * size
                    yield Entry(level, slot, value, p.fmt.kind(value, level), va)


def table_bytes(listing: Listing) -> int:
    """Bytes of RAM that the table pages take, each page once."""
    total = 0
    for tree in listing.trees:
        page = tree.params.fmt.granule.page_size
        pages: list[Words] = [t.pa[t.there] & np.uint64((1 << 64) - page) for t in tree.levels]
        total += page * len(np.unique(np.concatenate(pages)))
    return total
