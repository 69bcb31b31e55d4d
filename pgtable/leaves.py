"""Everything that a tree maps, as arrays; and where its tables are.

Rules of this file:
- The tables are tree.py's; a tree that refers to its own tables is followed like any other, and refused where that
  file would leave out a part.
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
from pgtable.tree import NO_TABLES, Levels, Tables, Tree, grow, halves, words_of
from pgtable.walk import leaf_permissions

_NONE = np.zeros(0, np.uint64)


__all__ = ["Leaves", "Levels", "Run", "Tables", "halves", "leaves", "permissions_of", "runs", "tables"]


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
    """All table pages of both halves of a regime (default: that of EL1), roots first.

    Raises ValueError for a tree that refers to itself more often than can be followed.
    """
    levels = [level for p in halves(regs, regime) for level in _complete(memory, p).levels]
    return Tables(*_joined(levels)) if levels else NO_TABLES


def _complete(memory: TableMemory, p: WalkParams) -> Tree[WalkParams]:
    """All visits of a half's tables; raises ValueError for a tree that has too many."""
    tree = grow(memory, p)
    if not tree.complete:
        raise ValueError(f"the tree at PA {p.base:#x} refers to itself more often than can be followed")
    return tree


def _joined(parts: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Columns of rows of arrays, each concatenated."""
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _leaves_of(memory: TableMemory, p: WalkParams) -> Leaves:
    parts = []
    for found, (level, _, mask) in zip(_complete(memory, p).levels, p.levels, strict=False):
        words, there = words_of(memory, p, found.pa, mask + 1)
        parts.append(_leaves_at(p, level, found, np.where(there[:, None], words, np.uint64(0))))
    columns = _joined(parts)
    order = np.argsort(columns[0], kind="stable")
    return Leaves(*(column[order] for column in columns))


def _leaves_at(p: WalkParams, level: int, found: Tables, words: Words) -> Leaves:
    """The blocks or pages in the tables of one level."""
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
