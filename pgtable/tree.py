"""The table pages of a tree, level by level, whatever the tree looks like; and what is wrong with it.

Rules of this file:
- One array step per level: the tables of a level are read at once, and split into leaves and the next level's tables.
- A table outside RAM, or with an address that is too large, ends its branch and is a finding.
- A page that several descriptors refer to is visited once for each: that is what hardware does. A tree that refers to
  its own tables could be visited for ever; beyond a number of repeated visits of a level (`_most`) the rest is left
  out, and what is left out is a finding too. Time is bounded by the RAM that tables can be in.
Sources: Arm ARM D8.2 and D8.3 (translation table lookup), pseudocode S1Walk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pgtable.bits import Flags, Words
from pgtable.descriptors import LAST_LEVEL
from pgtable.memory import TableMemory
from pgtable.mmu import regime_of
from pgtable.params import Regime, WalkParams
from pgtable.registers import Registers
from pgtable.table_params import TableParams

MAX_REPEATED = 1 << 20  # bytes of tables that were visited before that a level may always have
CHUNK = 256  # tables that are read at a time
ROOT = (1 << 64) - 1  # the slot of a root: no descriptor refers to it

P = TypeVar("P", bound=TableParams)
P_co = TypeVar("P_co", bound=TableParams, covariant=True)
Levels = npt.NDArray[np.int8]
Index = npt.NDArray[np.int64]


class Tables(NamedTuple):
    """Table pages of a tree, level by level; a page that is referred to twice is there twice. Shape (n,).

    `pa`, `va` uint64: where the table is, the lowest VA it translates. `level` int8: the level of its entries.
    `inherited` uint64: the table attribute bits above it. `there` bool: there is RAM. `slot` uint64: the PA of the
    descriptor that refers to it, ROOT for a root.
    """

    pa: Words
    va: Words
    level: Levels
    inherited: Words
    there: Flags
    slot: Words

    def pick(self, rows: Any) -> Tables:
        """The rows that a mask, slice or index array takes."""
        return Tables(*(column[rows] for column in self))


_NONE = np.zeros(0, np.uint64)
NO_TABLES = Tables(_NONE, _NONE, _NONE.astype(np.int8), _NONE, _NONE.astype(bool), _NONE)


class Finding(NamedTuple):
    """Something that a listing must say besides its rows: `kind`, the VAs it is about, `text`.

    `level` and `slot`: of the descriptor (PA), -2 and 0 where it is about none.
    """

    kind: str
    va: int
    size: int
    level: int
    slot: int
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: VA {self.va:#018x}, {self.size:#x} bytes: {self.text}"


class Tree(NamedTuple, Generic[P_co]):
    """A half's tables: `levels` from the root down, and what is wrong with them. `complete`: nothing was left out."""

    params: P_co
    levels: list[Tables]
    findings: list[Finding]
    complete: bool


def halves(regs: Registers, regime: Regime | None = None) -> list[WalkParams]:
    """The walk parameters of the halves that are on, with a root that can be reached: lower, then upper."""
    return [p for p in all_halves(regs, regime) if not p.why_off]


def all_halves(regs: Registers, regime: Regime | None = None) -> list[WalkParams]:
    """The walk parameters of a regime's halves: lower, then upper where it has one."""
    regime = regime or regime_of(regs, 1)
    return [WalkParams.of(regs, regime, va) for va in ((0, 1 << 63 | 1 << 55) if regime.has_el0 else (0,))]


def words_of(memory: TableMemory, p: TableParams, pas: Words, entries: int) -> tuple[Words, Flags]:
    """The descriptors in tables: uint64 (len(pas), entries) in the CPU's order, and whether there is RAM."""
    words, there = memory.tables(pas, entries)
    return (words.byteswap() if p.big_endian else words), there


def grow(memory: TableMemory, p: P) -> Tree[P]:
    """Visits all tables of a half. The words of the last level's tables are not read."""
    tree = Tree(p, [], [], True)
    here = _root(memory, p)
    parents: list[tuple[Words, Index]] = []  # of each level above: the pages, and for each table below its row
    for level, _, mask in p.levels:
        tree.levels.append(here)
        tree.findings.extend(_absent(p, here))
        if level == LAST_LEVEL or not len(here.pa):
            break
        below, row = _below(memory, p, here, mask + 1, tree.findings)
        parents.append((here.pa, row))
        keep = _limited(below.pa, _most(tree, below))
        _repeated(p, below, parents, tree.findings)
        if len(keep) < len(below.pa):
            tree.findings.extend(_left_out(p, below, keep))
            tree = tree._replace(complete=False)
            below = below.pick(keep)
            parents[-1] = here.pa, row[keep]
        here = below
    return tree


def _root(memory: TableMemory, p: TableParams) -> Tables:
    pa = np.array([p.base], np.uint64)
    level = np.array([p.start_level], np.int8)
    zero = np.zeros(1, np.uint64)
    return Tables(pa, zero + np.uint64(p.half_base), level, zero, memory.gather(pa)[1], zero + np.uint64(ROOT))


def _below(
    memory: TableMemory, p: TableParams, above: Tables, entries: int, findings: list[Finding]
) -> tuple[Tables, Index]:
    """The tables that a level's entries refer to, and for each the row in `above` of the table that does."""
    level = int(above.level[0])
    layout, size = p.fmt.table(level), p.fmt.granule.level_size(level)
    parts, rows = [], []
    for first in range(0, len(above.pa), CHUNK):
        words, there = words_of(memory, p, above.pa[first : first + CHUNK], entries)
        is_table = (words & np.uint64(layout.mask("VALID", "TYPE"))) == np.uint64(layout.mask("VALID", "TYPE"))
        row, entry = np.nonzero(is_table & there[:, None])
        word = words[row, entry]
        row += first
        va = above.va[row] + entry.astype(np.uint64) * np.uint64(size)
        slot = above.pa[row] + entry.astype(np.uint64) * np.uint64(8)
        pa = p.table_address(word)
        ok = (pa & np.uint64(p.over)) == 0
        findings.extend(
            Finding("address size", v, size, level, s, f"the table's PA {a:#x} exceeds {p.ps_bits} bits")
            for v, s, a in zip(va[~ok].tolist(), slot[~ok].tolist(), pa[~ok].tolist(), strict=True)
        )
        inherited = (above.inherited[row] | word) & np.uint64(p.inherited_mask)
        parts.append((pa[ok], va[ok], inherited[ok], slot[ok]))
        rows.append(row[ok])
    pa, va, inherited, slot = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Tables(pa, va, np.full(len(pa), level + 1, np.int8), inherited, memory.gather(pa)[1], slot), np.concatenate(
        rows
    )


def _absent(p: TableParams, found: Tables) -> Iterator[Finding]:
    """Tables where there is no RAM."""
    for i in np.flatnonzero(~found.there).tolist():
        level = int(found.level[i])
        text = f"the level {level} table at PA {int(found.pa[i]):#x} is outside RAM"
        yield Finding("no memory", int(found.va[i]), _span(p, level), level - 1, int(found.slot[i]), text)


def _span(p: TableParams, level: int) -> int:
    """Bytes of VA that a table of `level` entries translates."""
    return 1 << p.ia_bits if level == p.start_level else p.fmt.granule.level_size(level - 1)


def _most(tree: Tree[P], below: Tables) -> int:
    """Repeated visits that a level may have: a tree with one entry for itself has as many as it has tables."""
    pages = np.unique(np.concatenate([each.pa[each.there] for each in (below, *tree.levels)]))
    return max(MAX_REPEATED // tree.params.fmt.granule.page_size, 2 * len(pages) if MAX_REPEATED else 0)


def _limited(pa: Words, most: int) -> Index:
    """The rows to visit: each page once, and the first `most` of the repeated ones."""
    order = np.argsort(pa, kind="stable")
    repeated = np.zeros(len(pa), bool)
    repeated[order[1:]] = pa[order[1:]] == pa[order[:-1]]
    again = np.flatnonzero(repeated)
    if len(again) <= most:
        return np.arange(len(pa))
    repeated[again[:most]] = False
    return np.flatnonzero(~repeated)


def _left_out(p: TableParams, found: Tables, keep: Index) -> Iterator[Finding]:
    """The VA ranges below tables that are not visited, neighbours joined."""
    out = np.ones(len(found.pa), bool)
    out[keep] = False
    vas = np.sort(found.va[out])
    level = int(found.level[0])
    size = _span(p, level)
    starts = np.flatnonzero(np.concatenate(([True], np.diff(vas) != np.uint64(size))))
    counts = np.diff(np.concatenate((starts, [len(vas)])))
    for first, count in zip(starts.tolist(), counts.tolist(), strict=True):
        text = f"{count} tables of level {level} that were visited before: not listed"
        yield Finding("not listed", int(vas[first]), size * count, level - 1, 0, text)


def _repeated(p: TableParams, found: Tables, parents: list[tuple[Words, Index]], findings: list[Finding]) -> None:
    """Tables that are on their own path, and pages that several descriptors refer to."""
    looped = np.zeros(len(found.pa), bool)
    row = parents[-1][1]
    for depth in range(len(parents) - 1, -1, -1):
        above = parents[depth][0]
        here = found.pa == above[row]
        for i in np.flatnonzero(here & ~looped)[:_FEW].tolist():
            level = int(found.level[i])
            own = f"its own level {p.start_level + depth} table"
            text = f"the level {level} table at PA {int(found.pa[i]):#x} is also {own}"
            findings.append(Finding("loop", int(found.va[i]), _span(p, level), level - 1, int(found.slot[i]), text))
        looped |= here
        row = parents[depth - 1][1][row] if depth else row
    pages, first, counts = np.unique(found.pa[~looped], return_index=True, return_counts=True)
    where = np.flatnonzero(~looped)[first]
    for k in np.flatnonzero(counts > 1)[:_FEW].tolist():
        i, level = where[k], int(found.level[where[k]])
        text = f"{int(counts[k])} descriptors refer to the level {level} table at PA {int(pages[k]):#x}"
        findings.append(Finding("shared table", int(found.va[i]), _span(p, level), level - 1, int(found.slot[i]), text))


_FEW = 100  # findings of a kind at one level
