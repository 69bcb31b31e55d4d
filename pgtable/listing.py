"""What a tree maps, merged: the one listing that dump, find, diff, audit and map work on.

Rules of this file:
- A row is a run of leaves of one level that map consecutive VAs to consecutive PAs with the same attributes. What a
  walk would say is in it: permissions of every level, and the fault of an access that no permission refuses.
- Runs are found in the words themselves: a leaf's successor has the same bits and an output address one entry further,
  so the difference of neighbouring words is the entry's size. Only where it is not, fields are looked at.
- Everything is bounded and nothing raises for what is in the tables: findings say what is not in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pgtable.access import Access, AccessType
from pgtable.bits import Words
from pgtable.descriptors import LAST_LEVEL
from pgtable.leaves import permissions_of
from pgtable.memory import TableMemory
from pgtable.mmu import regime_of
from pgtable.params import Regime, WalkParams
from pgtable.registers import Registers
from pgtable.stage2 import Stage2Params
from pgtable.table_params import TableParams
from pgtable.tree import CHUNK, NO_TABLES, Finding, Index, Levels, P, Tables, Tree, all_halves, grow, words_of
from pgtable.walk import leaf_memory, walk


class Runs(NamedTuple):
    """Rows in VA order; every array has shape (n,).

    `va`, `pa`, `size` uint64: addresses, bytes. `word`, `slot` uint64: the first descriptor and its PA. `inherited`
    uint64: the table attributes above. `level` int8. `leaves` int64: descriptors in the run. `perms` uint16: bits of
    permissions.py. `fault` uint8: xFSC of an access that no permission refuses (AF = 0, address size ...), else 0.
    `attributes` uint64: the first descriptor without its address. `attr`, `sh` uint8: memory attributes of data
    accesses as a MAIR byte, shareability.
    """

    va: Words
    size: Words
    pa: Words
    level: Levels
    word: Words
    slot: Words
    inherited: Words
    perms: npt.NDArray[np.uint16]
    leaves: Index
    fault: npt.NDArray[np.uint8]
    attributes: Words
    attr: npt.NDArray[np.uint8]
    sh: npt.NDArray[np.uint8]

    def pick(self, rows: Any) -> Runs:
        """The rows that a mask, slice or index array takes."""
        return Runs(*(column[rows] for column in self))


@dataclass(frozen=True)
class Listing:
    """All that a regime's tables map. `trees`: of each half that is on. `findings`: what the rows do not say.

    `stage` 2: of stage 2, where `va` of a row is an IPA. `ipa`: of both stages, the VAs at which rows begin, and their
    IPAs; else None.
    """

    regs: Registers
    regime: Regime
    runs: Runs
    trees: Sequence[Tree[TableParams]]
    findings: list[Finding] = field(default_factory=list)
    stage: int = 1
    ipa: tuple[Words, Words] | None = None

    def ipa_of(self, va: int) -> int:
        """The IPA of a VA that is in a row, where the rows are of both stages."""
        assert self.ipa is not None
        starts, ipas = self.ipa
        i = int(np.searchsorted(starts, np.uint64(va), side="right")) - 1
        return int(ipas[i]) + va - int(starts[i])

    @property
    def stage_text(self) -> str:
        """`1`, `2`, or `both`."""
        return str(self.stage) if self.ipa is None else "both"

    @cached_property
    def tables(self) -> Tables:
        """All table pages, roots first."""
        levels = [tables for tree in self.trees for tables in tree.levels]
        return Tables(*(np.concatenate(column) for column in zip(*levels, strict=True))) if levels else NO_TABLES

    @property
    def complete(self) -> bool:
        """Nothing was left out: the rows are all that is mapped."""
        return all(tree.complete for tree in self.trees)

    def params(self, va: int) -> TableParams:
        """The walk parameters of the half that `va` is in, or stage 2's."""
        if self.stage == 2:
            return Stage2Params.of(self.regs)
        return WalkParams.of(self.regs, self.regime, va)

    def at(self, va: int) -> int | None:
        """The row that `va` is in, None if it is in none."""
        i = int(np.searchsorted(self.runs.va, np.uint64(va), side="right")) - 1
        return i if i >= 0 and va - int(self.runs.va[i]) < int(self.runs.size[i]) else None


_U64 = (1 << 64) - 1
_NONE = np.zeros(0, np.uint64)
NO_RUNS = Runs(
    va=_NONE,
    size=_NONE,
    pa=_NONE,
    level=_NONE.astype(np.int8),
    word=_NONE,
    slot=_NONE,
    inherited=_NONE,
    perms=_NONE.astype(np.uint16),
    leaves=_NONE.astype(np.int64),
    fault=_NONE.astype(np.uint8),
    attributes=_NONE,
    attr=_NONE.astype(np.uint8),
    sh=_NONE.astype(np.uint8),
)


def listing(memory: TableMemory, regs: Registers, *, regime: Regime | None = None) -> Listing:
    """Everything that stage 1 of a regime (default: that of EL1) maps, both halves, in VA order.

    With stage 2 on, EL1&0's tables are at IPAs: then `memory` is the guest's (nested_many.GuestMemory).
    """
    regime = regime or regime_of(regs, 1)
    trees, findings, parts = [], [], [NO_RUNS]
    for p in all_halves(regs, regime):
        if p.why_off:
            text = f"{'upper' if p.upper else 'lower'} half: {p.why_off}"
            findings.append(Finding("off", p.half_base, 1 << p.ia_bits, -2, 0, text))
            continue
        tree = grow(memory, p)
        trees.append(tree)
        findings += tree.findings
        parts += [_decided(memory, p, *level) for level in half_runs(memory, tree, findings)]
    return Listing(regs, regime, joined(concatenated(parts)), trees, findings)


def concatenated(parts: list[Runs]) -> Runs:
    """Rows of several lists, in VA order."""
    some = [part for part in parts if len(part.va)] or parts[:1]
    columns = some[0] if len(some) == 1 else Runs(*(np.concatenate(column) for column in zip(*some, strict=True)))
    if (columns.va[1:] >= columns.va[:-1]).all():
        return columns
    return columns.pick(np.argsort(columns.va, kind="stable"))


def joined(runs: Runs) -> Runs:
    """Rows that go on in the next one made one, as across the border of two tables."""
    if len(runs.va) < 2:
        return runs
    goes_on = (runs.va[1:] == runs.va[:-1] + runs.size[:-1]) & (runs.pa[1:] == runs.pa[:-1] + runs.size[:-1])
    near = np.flatnonzero(goes_on)
    for column in (runs.level, runs.attributes, runs.inherited, runs.perms, runs.fault):
        near = near[column[near + 1] == column[near]]
    if not len(near):
        return runs
    starts = np.ones(len(runs.va), bool)
    starts[near + 1] = False
    first = np.flatnonzero(starts)
    sums = {"size": np.add.reduceat(runs.size, first), "leaves": np.add.reduceat(runs.leaves, first)}
    return runs.pick(first)._replace(**sums)


class Found(NamedTuple):
    """Runs of one level as they are found: what is read, before anything is decided. Columns as in Runs."""

    va: Words
    pa: Words
    word: Words
    slot: Words
    inherited: Words
    leaves: Index


def _decided(memory: TableMemory, p: WalkParams, level: int, found: Found) -> Runs:
    """Rows with their permissions, memory attributes, and what an access meets that no permission refuses: all of that
    is the same in a whole row, and decided once for each combination of the bits that it depends on.
    """
    leaf = p.fmt.leaf(level)
    attributes = found.word & np.uint64(_U64 ^ leaf["OA"].mask)
    deciding = leaf.mask(*(name for name in _DECIDES if name in leaf))
    fault, attr, sh = _judged(memory, p, level, found, attributes & np.uint64(deciding))
    first, which = changes(attributes, found.inherited)
    size = np.uint64(p.fmt.granule.level_size(level))
    return Runs(
        va=found.va,
        size=found.leaves.astype(np.uint64) * size,
        pa=found.pa,
        level=np.full(len(found.va), level, np.int8),
        word=found.word,
        slot=found.slot,
        inherited=found.inherited,
        perms=permissions_of(p, found.word[first], found.inherited[first])[which],
        leaves=found.leaves,
        fault=fault,
        attributes=attributes,
        attr=attr,
        sh=sh,
    )


# The fields of a leaf that decide about accesses which no permission refuses, and about memory attributes.
_DECIDES = ("AF", "Contiguous", "nT", "AttrIndx", "AttrIndx3", "SH")

Bytes = npt.NDArray[np.uint8]


def _judged(
    memory: TableMemory, p: WalkParams, level: int, found: Found, deciding: Words
) -> tuple[Bytes, Bytes, Bytes]:
    """Fault code, memory attributes and shareability of each row, by a walk for each combination of what decides."""
    too_large = (found.pa & np.uint64(p.over)) != 0
    starts, which = changes(deciding, too_large)
    key = deciding[starts] | too_large[starts]  # bit 0 is VALID, and decides nothing
    _, first, kind = np.unique(key, return_index=True, return_inverse=True)
    first, which = starts[first], kind[which]
    access = Access(AccessType.AT_ANY, p.regime.el)
    rows = []
    for va, word in zip(found.va[first].tolist(), found.word[first].tolist(), strict=True):
        fault = walk(memory.fetch, p, va, access).fault
        rows.append((fault.code if fault else 0, *leaf_memory(p, level, word)))
    codes, attr, sh = np.array(rows, np.uint8).reshape(-1, 3).T
    return codes[which], attr[which], sh[which]


def changes(*columns: npt.NDArray[Any]) -> tuple[Index, Index]:
    """The rows that are not as the one before, and for each row which of them it is as."""
    changes = np.ones(len(columns[0]), bool)
    changes[1:] = False
    for column in columns:
        changes[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(changes), np.cumsum(changes) - 1


def half_runs(memory: TableMemory, tree: Tree[P], findings: list[Finding]) -> Iterator[tuple[int, Found]]:
    """The runs of a half, level by level, not yet joined across tables."""
    leaf_levels = (*tree.params.fmt.block_levels, LAST_LEVEL)
    for tables, (level, _, mask) in zip(tree.levels, tree.params.levels, strict=False):
        parts = []
        for first in range(0, len(tables.pa), CHUNK):
            some = tables.pick(slice(first, first + CHUNK))
            words, there = words_of(memory, tree.params, some.pa, mask + 1)
            if not there.all():
                words = np.where(there[:, None], words, np.uint64(0))
            parts.append(_runs_in(tree.params, level, some, words, level in leaf_levels, findings))
        if any(len(part.va) for part in parts):
            found = parts[0] if len(parts) == 1 else Found(*map(np.concatenate, zip(*parts, strict=True)))
            parts.clear()  # its rows are not held twice while more is found out about them
            yield level, found


def _runs_in(
    p: TableParams, level: int, tables: Tables, words: Words, has_leaves: bool, findings: list[Finding]
) -> Found:
    """The runs in some tables of one level, and findings about entries of a reserved kind."""
    leaf, size, entries = p.fmt.leaf(level), p.fmt.granule.level_size(level), words.shape[1]
    start = _starts(words, size)
    word = words.reshape(-1)[start]
    count = np.diff(np.append(start, words.size))
    low = leaf.mask("VALID", "TYPE")
    wanted = low if level == LAST_LEVEL else leaf["VALID"].mask
    is_leaf = (word & np.uint64(low)) == np.uint64(wanted)
    reserved = (
        (word & np.uint64(low)) == np.uint64(leaf["VALID"].mask) if level == LAST_LEVEL or not has_leaves else None
    )
    if reserved is not None and reserved.any():
        is_leaf &= ~reserved
        findings.extend(_reserved(p, level, tables, start[reserved], count[reserved], entries))
    return _rows(p, level, tables, words, start[is_leaf], count[is_leaf])


def _rows(p: TableParams, level: int, tables: Tables, words: Words, start: Index, count: Index) -> Found:
    """The runs of `count` leaves that begin at the entries `start` of some tables.

    The output addresses of a run go on without a carry into other bits and without crossing the largest address.
    """
    size, entries, run = p.fmt.granule.level_size(level), words.shape[1], p.run_length(level)
    first, last = words.reshape(-1)[start], words.reshape(-1)[start + count - 1]
    pa, end = p.output_address(level, first), p.output_address(level, last)
    over = np.uint64(p.over)
    odd = (end - pa != (count - 1).astype(np.uint64) * np.uint64(size)) | ((pa & over) != (end & over))
    row, entry = start // entries, (start % entries).astype(np.uint64)
    va = tables.va[row] + entry * np.uint64(size)
    if p.features.contiguous_output and run > 1:  # hardware takes the low bits of a whole run from the VA
        mask = np.uint64(run * size - 1)
        contiguous = (first & np.uint64(p.contiguous)) != 0
        odd |= contiguous & (((pa ^ va) & mask) != 0) & (count > 1)
        pa = np.where(contiguous, pa & ~mask | va & mask, pa)
    if (odd & (count > 1)).any():
        single = odd & (count > 1)
        each = np.concatenate([np.arange(s, s + n) for s, n in zip(start[single], count[single], strict=True)])
        start = np.concatenate((start[~single], each))
        count = np.concatenate((count[~single], np.ones(len(each), np.int64)))
        return _rows(p, level, tables, words, start, count)
    slot = tables.pa[row] + entry * np.uint64(8)
    return Found(va, pa, first, slot, tables.inherited[row], count)


def _starts(words: Words, size: int) -> Index:
    """Where in a block of tables, read as one array, a run begins: at each table, and where the words do not go on."""
    flat = words.reshape(-1)
    breaks = np.empty(len(flat), bool)
    np.not_equal(flat[1:] - flat[:-1], np.uint64(size), out=breaks[1:])
    breaks[:: words.shape[1]] = True
    return np.flatnonzero(breaks)


def _reserved(p: TableParams, level: int, tables: Tables, start: Index, count: Index, entries: int) -> list[Finding]:
    """Entries that are valid and neither a leaf nor a table: bits [1:0] = 0b01 where there are no blocks."""
    size = p.fmt.granule.level_size(level)
    found = []
    for at, n in zip(start[:_FEW].tolist(), count[:_FEW].tolist(), strict=True):
        va = int(tables.va[at // entries]) + at % entries * size
        slot = int(tables.pa[at // entries]) + at % entries * 8
        text = f"{n} level {level} descriptor{'s' * (n > 1)} with bits [1:0] = 0b01, reserved here: a translation fault"
        found.append(Finding("reserved", va, n * size, level, slot, text))
    if len(start) > _FEW:
        text = f"{int(count[_FEW:].sum())} more in these tables of level {level}"
        found.append(Finding("reserved", int(tables.va[0]), 0, level, int(tables.pa[0]), text))
    return found


_FEW = 1000  # findings of a kind in some tables
