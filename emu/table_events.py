"""What hooks see of a machine's tables, as events of pgtable.tlb_events: which descriptor a store is to, of which VA.

Rules of this file:
- A table is known by its page. The tree is read once; from then on a table is followed as soon as a descriptor refers
  to it, with all that is below it, and stays known when it is unlinked (a TLB may still lead to it).
- A table outside RAM is none: nobody can write it.
- A store is told with the word before and after it, whatever its size.
- EL1&0, stage 1: what a kernel's own tables are.
Sources: Arm ARM C5.5 (TLBI encodings), D8.3 (descriptor formats).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from emu.trace import Barrier, Maintenance, TableWrite
from emu.trace import Event as Seen
from pgtable.descriptors import LAST_LEVEL, Kind
from pgtable.leaves import tables
from pgtable.memory import PhysicalMemory
from pgtable.params import RANGE_BIT, Regime, WalkParams
from pgtable.registers import Registers
from pgtable.tlb_events import STRENGTHS, Dsb, Isb, Tlbi, Write
from pgtable.tlbi import decode
from pgtable.tree import all_halves


class Table(NamedTuple):
    """A table: where it begins, its level, the first VA that it translates."""

    pa: int
    level: int
    va: int


class TableEvents:
    """The tables of both halves of EL1&0 in `memory`, as `registers` name them; grows as tables are linked."""

    def __init__(self, memory: PhysicalMemory, registers: Registers) -> None:
        self._memory = memory
        self.halves: dict[bool, WalkParams] = {p.upper: p for p in all_halves(registers, Regime.EL10)}
        self.page = self.halves[True].fmt.granule.page_size
        self._tables: dict[int, Table] = {}
        self.follow(registers)

    def follow(self, registers: Registers) -> list[int]:
        """Reads the tree that the registers name; the pages of tables that were not known."""
        self.halves = {p.upper: p for p in all_halves(registers, Regime.EL10)}
        try:
            found = tables(self._memory, registers, regime=Regime.EL10)
        except ValueError:  # it refers to itself more often than can be followed
            return []
        rows = zip(found.pa.tolist(), found.va.tolist(), found.level.tolist(), strict=True)
        there = [row for row in rows if row[0] & -self.page not in self._tables and row[0] in self._memory]
        new = {pa & -self.page: Table(pa, level, va) for pa, va, level in there}
        self._tables = {**self._tables, **new}
        return list(new)

    @property
    def pages(self) -> list[int]:
        """The PAs of all table pages that are known."""
        return list(self._tables)

    # state: known tables are never changed in place

    def snapshot(self) -> dict[int, Table]:
        """The state, for `restore`."""
        return self._tables

    def restore(self, state: dict[int, Table]) -> None:
        """Back to a state."""
        self._tables = state

    # events

    def event(self, cpu: int, seen: Seen) -> Write | Tlbi | Dsb | Isb | None:
        """The event that a hook's is, None where it is nothing to TLBs. A store is not in memory yet."""
        match seen:
            case TableWrite(pa, value, pc, size):
                at, shift = pa & -8, 8 * (pa & 7)
                mask = (1 << 8 * size) - 1 << shift
                old = self._memory.fetch(at)
                return self.changed(cpu, pc, at, old, old & ~mask | value << shift & mask)
            case Maintenance():
                return _tlbi(cpu, seen, ds=self.halves[True].fmt.ds)
            case Barrier():
                return _barrier(cpu, seen)

    def changed(self, cpu: int, pc: int, pa: int, old: int, new: int) -> Write:
        """A store to the descriptor at `pa`."""
        table = self._tables.get(pa & -self.page)
        if table is None:
            return Write(cpu, pc, pa, LAST_LEVEL, None, old, new)
        size = self.halves[_is_upper(table.va)].fmt.granule.level_size(table.level)
        return Write(cpu, pc, pa, table.level, table.va + (pa - table.pa >> 3) * size, old, new)

    def linked(self, write: Write) -> list[int]:
        """The pages of tables that a store links and that were not known."""
        if write.va is None:
            return []
        new = {table.pa & -self.page: table for table in self._below(write.va, write.level, write.new)}
        self._tables = {**self._tables, **new} if new else self._tables
        return list(new)

    def _below(self, va: int, level: int, word: int, depth: int = 0) -> Iterator[Table]:
        p = self.halves[_is_upper(va)]
        if level >= LAST_LEVEL or depth > LAST_LEVEL + 1 or p.kinds[level][word & 3] is not Kind.TABLE:
            return
        pa = p.table_address(word)
        if pa & -self.page in self._tables or pa not in self._memory:
            return
        yield Table(pa, level + 1, va)
        words = self._memory.words(pa, p.fmt.granule.entries)
        size = p.fmt.granule.level_size(level + 1)
        for i in (words & 1).nonzero()[0].tolist():
            yield from self._below(va + i * size, level + 1, int(words[i]), depth + 1)


def _tlbi(cpu: int, event: Maintenance, *, ds: bool) -> Tlbi | None:
    """A TLBI; None for one that EL1 has not."""
    if event.operation.startswith("TLBI_"):
        return None
    return Tlbi(cpu, decode(event.operation, event.operand, ds=ds), event.pc)


def _barrier(cpu: int, event: Barrier) -> Dsb | Isb | None:
    """A barrier that TLBs know of; None for a DMB."""
    kind, _, option = event.name.partition(" ")
    if kind == "isb":
        return Isb(cpu, event.pc)
    return Dsb(cpu, option, event.pc) if kind == "dsb" and option in STRENGTHS else None


def _is_upper(va: int) -> bool:
    return bool(va & RANGE_BIT)
