"""Everything that a tree maps, as arrays; and where its tables are.

Rules of this file:
- One array step per level: a level's tables are gathered at once, split into leaves and the next level's tables.
- A table outside RAM ends its branch; a tree that refers to its own tables is followed level by level like any
  other, and refused when it grows beyond `MAX_TABLES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pgtable.bits import Words
from pgtable.descriptors import LAST_LEVEL
from pgtable.memory import TableMemory
from pgtable.params import Regime, WalkParams
from pgtable.registers import Registers
from pgtable.walk import leaf_permissions, regime_of

MAX_TABLES = 1 << 22  # table pages visited: 16 GiB of 4K tables
MAX_VISITS = 1 << 12  # of a table page at one level, on average, in a tree that refers to its own upper tables

_NONE = np.zeros(0, np.uint64)

Levels = npt.NDArray[np.int8]


class Leaves(NamedTuple):
    """Block and page descriptors in VA order; every array has shape (n,).

    `va`, `pa`, `word` uint64: input address, output address, descriptor. `slot` uint64: the descriptor's own PA.
    `inherited` uint64: table attribute bits above it. `level` int8. `perms` uint16: permissions.py's bits.
    """

    va: Words
    level: Levels
    pa: Words
    word: Words
    slot: Words
    inherited: Words
    perms: npt.NDArray[np.uint16]


class Tables(NamedTuple):
    """Table pages of a tree, level by level; a page that is referred to twice is there twice. Shape (n,).

    `pa`, `va` uint64: where the table is, the lowest VA it translates. `level` int8: the level of its entries.
    `inherited` uint64: the table attribute bits above it. `there` bool: there is RAM.
    """

    pa: Words
    va: Words
    level: Levels
    inherited: Words
    there: npt.NDArray[np.bool_]


class Run(NamedTuple):
    """Consecutive leaves of one level that map consecutive addresses with the same attributes."""

    va: int
    size: int
    pa: int
    level: int
    word: int  # the first leaf
    inherited: int
    perms: int
    leaves: int


def leaves(memory: TableMemory, regs: Registers, *, regime: Regime | None = None) -> Leaves:
    """All leaves of both halves of a regime (default: that of EL1), invalid entries left out, in VA order."""
    nothing = Leaves(_NONE, _NONE.astype(np.int8), _NONE, _NONE, _NONE, _NONE, _NONE.astype(np.uint16))
    return Leaves(*_joined([nothing, *(_leaves_of(memory, p) for p in halves(regs, regime))]))


def tables(memory: TableMemory, regs: Registers, *, regime: Regime | None = None) -> Tables:
    """All table pages of both halves of a regime (default: that of EL1), roots first."""
    nothing = Tables(_NONE, _NONE, _NONE.astype(np.int8), _NONE, _NONE.astype(np.bool_))
    parts = [nothing, *(level for p in halves(regs, regime) for level, _ in _levels(memory, p, pages=False))]
    return Tables(*_joined(parts))


def _joined(parts: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Columns of rows of arrays, each concatenated."""
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def halves(regs: Registers, regime: Regime | None = None) -> list[WalkParams]:
    """The walk parameters of the halves that are on, with a root that can be reached: lower, then upper."""
    regime = regime or regime_of(regs, 1)
    sides = (0, 1 << 63 | 1 << 55) if regime.has_el0 else (0,)
    found = [WalkParams.of(regs, regime, va) for va in sides]
    return [p for p in found if p.mmu_on and p.txsz_ok and not p.epd and not p.base & p.over]


def _unread(memory: TableMemory, pa: Words) -> tuple[Words, npt.NDArray[np.bool_]]:
    """Tables whose words nobody wants, and whether there is RAM."""
    return np.zeros((len(pa), 0), np.uint64), memory.gather(pa)[1]


def _levels(memory: TableMemory, p: WalkParams, *, pages: bool = True) -> list[tuple[Tables, Words]]:
    """For each level, its tables and their words: uint64 (tables, entries). Without `pages`, level 3 stays unread."""
    found: list[tuple[Tables, Words]] = []
    pa, va, inherited = (np.array([x], np.uint64) for x in (p.base, p.half_base, 0))
    visited = 0
    for level, _, mask in p.levels:
        visited += len(pa)
        distinct = np.unique(pa)
        recursive = any(np.isin(distinct, above.pa).any() for above, _ in found)
        if visited > MAX_TABLES or (recursive and len(pa) > MAX_VISITS * len(distinct)):
            raise ValueError(f"the tree at PA {p.base:#x} has {visited} tables at level {level}: it refers to itself")
        words, there = memory.tables(pa, mask + 1) if level != LAST_LEVEL or pages else _unread(memory, pa)
        if p.big_endian:
            words = words.byteswap()
        found.append((Tables(pa, va, np.full(len(pa), level, np.int8), inherited, there), words))
        if level == LAST_LEVEL:
            break
        pa, va, inherited = _below(p, found[-1][0], words, level)
        if not len(pa):
            break
    return found


def _below(p: WalkParams, above: Tables, words: Words, level: int) -> tuple[Words, Words, Words]:
    """The tables that the entries of a level refer to: PA, VA, accumulated table attributes."""
    table = p.fmt.table(level)
    is_table = (table["VALID"].get(words) & table["TYPE"].get(words)) == 1
    row, entry = np.nonzero(is_table)
    descriptors = words[row, entry]
    pa = p.table_address(descriptors)
    ok = (pa & np.uint64(p.over)) == 0
    va = above.va[row] + entry.astype(np.uint64) * np.uint64(p.fmt.granule.level_size(level))
    inherited = (above.inherited[row] | descriptors) & np.uint64(p.inherited_mask)
    return pa[ok], va[ok], inherited[ok]


def _leaves_of(memory: TableMemory, p: WalkParams) -> Leaves:
    parts = [_leaves_at(p, level, words) for level, words in _levels(memory, p)]
    columns = _joined(parts)
    order = np.argsort(columns[0], kind="stable")
    return Leaves(*(column[order] for column in columns))


def _leaves_at(p: WalkParams, found: Tables, words: Words) -> Leaves:
    """The blocks or pages in the tables of one level."""
    level = int(found.level[0])
    leaf = p.fmt.leaf(level)
    wanted = 1 if level == LAST_LEVEL else 0
    is_leaf = (leaf["VALID"].get(words) == 1) & (leaf["TYPE"].get(words) == wanted)
    if level != LAST_LEVEL and level not in p.fmt.block_levels:
        is_leaf = np.zeros_like(is_leaf)
    row, entry = np.nonzero(is_leaf)
    word, inherited = words[row, entry], found.inherited[row]
    offset = entry.astype(np.uint64)
    return Leaves(
        va=found.va[row] + offset * np.uint64(p.fmt.granule.level_size(level)),
        level=np.full(len(row), level, np.int8),
        pa=p.output_address(level, word),
        word=word,
        slot=found.pa[row] + offset * np.uint64(8),
        inherited=inherited,
        perms=permissions_of(p, word, inherited),
    )


def permissions_of(p: WalkParams, word: Words, inherited: Words) -> npt.NDArray[np.uint16]:
    """Permission bits of leaves under the given table attributes; the array form of walk.leaf_permissions."""
    base, overlay, _ = leaf_permissions(p, word, inherited)
    return np.asarray(base & overlay, np.uint16)


def runs(found: Leaves, regs: Registers, *, regime: Regime | None = None) -> list[Run]:
    """Leaves merged where level, attributes and permissions are the same and both addresses go on."""
    if not len(found.va):
        return []
    size = np.zeros(len(found.va), np.uint64)
    attributes = np.zeros(len(found.va), np.uint64)
    for p in halves(regs, regime):
        for level in range(-1, LAST_LEVEL + 1):
            here = (found.level == level) & (
                (found.va >= np.uint64(p.half_base)) if p.upper else (found.va >> np.uint64(55) == 0)
            )
            if here.any():
                size[here] = p.fmt.granule.level_size(level)
                attributes[here] = found.word[here] & np.uint64(((1 << 64) - 1) ^ p.fmt.leaf(level)["OA"].mask)
    same = (attributes[1:] == attributes[:-1]) & (found.level[1:] == found.level[:-1])
    same &= (found.perms[1:] == found.perms[:-1]) & (found.inherited[1:] == found.inherited[:-1])
    same &= (found.va[1:] == found.va[:-1] + size[:-1]) & (found.pa[1:] == found.pa[:-1] + size[:-1])
    starts = np.concatenate(([0], np.flatnonzero(~same) + 1))
    counts = np.diff(np.concatenate((starts, [len(found.va)])))
    return [_run(found, int(i), int(n), int(size[i])) for i, n in zip(starts, counts, strict=True)]


def _run(found: Leaves, i: int, n: int, size: int) -> Run:
    return Run(
        int(found.va[i]),
        size * n,
        int(found.pa[i]),
        int(found.level[i]),
        int(found.word[i]),
        int(found.inherited[i]),
        int(found.perms[i]),
        n,
    )
