"""Break-before-make: a state machine for each descriptor, fed with what CPUs do, that reports what is out of order.

Rules of this file:
- What needs break-before-make is decided in tlb_changes.py, how far an invalidation has come in tlb_records.py, what
  a TLBI reaches in tlbi.py. Here is what follows from a write, a return, and the life of table pages.
- A store to a page that is in no tree, or was a table and that no TLB leads to any more, is no store to a descriptor.
- A snapshot is a few shallow copies.
Sources: Arm ARM D8.17.1 (R_DDMVT, R_WHZWS), D8.17.5 (scope), D8.17.8 (R_PSMWS, R_TGVWD, R_BLDZX).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pgtable.descriptors import LAST_LEVEL
from pgtable.memory import Memory, NoMemory
from pgtable.params import WalkParams
from pgtable.registers import Registers
from pgtable.tlb_changes import Changes, SameContents
from pgtable.tlb_events import (
    STRENGTHS,
    Dsb,
    Event,
    Finding,
    Isb,
    Return,
    Symbol,
    SysregWrite,
    TableFree,
    TableReuse,
    Tlbi,
    Use,
    Write,
    named,
)
from pgtable.tlb_program import parse_program
from pgtable.tlb_records import Records, Unclean
from pgtable.tlb_registers import RegisterChanges
from pgtable.tlb_scene import Program, format_program, line_of

__all__ = ["Checker", "Finding", "Program", "Unclean", "check", "format_program", "parse_program"]

# Rules besides those of tlb_changes.py.
MAKE, AT_RETURN = "make before clean", "unclean at return"
FREED, REUSED, LINKED = "table freed before invalidation", "table reused before invalidation", "linked table freed"
NT_PENDING = "nT not invalidated"

State = tuple[Any, ...]


class Checker:
    """The break-before-make checker of one half of a VA space; `findings` is what it found.

    `params`: of the half (WalkParams.of). `cpus`: how many share the tables. `bbm`: FEAT_BBM level, 0 to 3, default
    the CPU's. `memory`: the tables, if they can be read: then what was below a removed table counts too.
    `registers`: of every CPU at the beginning, if known.
    `same_contents(pa, pa, bytes)`: memory is equal there. `symbol(pc)`: names for messages.
    `stage` 2: the tables are stage 2's of EL1&0, their VAs are IPAs, and a write's `asid` is the VMID.
    """

    def __init__(
        self,
        params: WalkParams,
        *,
        cpus: int = 2,
        bbm: int | None = None,
        memory: Memory | None = None,
        registers: Registers | None = None,
        same_contents: SameContents | None = None,
        symbol: Symbol | None = None,
        stage: int = 1,
    ) -> None:
        self.params = params
        self.changes = Changes(params, bbm, same_contents, stage=stage)
        self.findings: list[Finding] = []
        self.registers = RegisterChanges(params, symbol, registers)
        self._memory, self._symbol = memory, symbol
        self._granule, self._stage = params.fmt.granule, stage
        self._records = Records(params, cpus, stage)
        self._links: dict[int, tuple[int, int]] = {}  # table page -> PA of the descriptor that refers to it, level
        self._gone: dict[int, int] = {}  # table page that was unlinked -> PA of the descriptor that referred to it

    # events

    def feed(self, event: Event) -> None:
        """One event of any kind."""
        getattr(self, _FEED[type(event)])(event)

    def write(self, event: Write) -> None:
        """A store to a descriptor."""
        old, new, level = event.old, event.new, event.level
        if event.va is None or (self._gone and self._is_gone(event.pa)):
            return
        record = self._records.get(event.pa)
        changes = self.changes
        if record is not None and not changes.cacheable(level, old):
            if not changes.cacheable(level, new):
                return
            verdict = changes(level, record.old, new)
            rule = MAKE if verdict.rule else ""
        else:
            verdict = changes(level, old, new)
            rule = verdict.rule or self._resized(event, record)
        if rule:
            self._find(rule, event, record)
        self._track(event, record, unclean=verdict.unclean or bool(rule), told=rule == MAKE)
        if (old | new) & 1 and level < LAST_LEVEL:
            self._tables(event)

    def tlbi(self, event: Tlbi) -> None:
        """A TLBI."""
        self.registers.tlbi(event.cpu, event.op)
        if self._records:
            self._records.tlbi(event.cpu, event.op)

    def dsb(self, event: Dsb) -> None:
        """A DSB."""
        strength = STRENGTHS[event.domain]
        if self.registers.changed:
            self.registers.dsb(event.cpu, strength)
        self._records.dsb(event.cpu, strength)

    def isb(self, event: Isb) -> None:
        """A context synchronization event."""
        self.findings += self.registers.isb(event.cpu, event.pc, self._memory)

    def sysreg(self, event: SysregWrite) -> None:
        """An MSR."""
        self.registers.write(event)

    def table_free(self, event: TableFree) -> None:
        """A table page is freed."""
        self._page(event.pa, FREED, event)
        link = self._links.get(event.pa)
        if link and self._records.get(link[0]) is None and self._refers(link, event.pa):
            slot, level = link
            word = self.params.fmt.table(level)["TA"].put(3, event.pa)
            self._report(LINKED, "", event.cpu, event.pc, Write(event.cpu, event.pc, slot, level, 0, word, word))

    def table_reuse(self, event: TableReuse) -> None:
        """A page that was a table gets another use."""
        self._page(event.pa, REUSED, event)

    def returned(self, event: Return) -> None:
        """A function that changed tables returns: its records become findings, and are dropped."""
        for record in [record for record in self._records.all() if record.cpu == event.cpu]:
            if not record.told:
                self._report(AT_RETURN, record.cause, event.cpu, event.pc, record)
            self._records.drop(record)
        self.findings += self.registers.returned(event.cpu, event.pc)

    def use(self, event: Use) -> None:
        """An access: nothing to this checker."""

    # state

    @property
    def unclean(self) -> list[Unclean]:
        """The descriptors that are not clean, in the order in which they were changed."""
        return self._records.all()

    def snapshot(self) -> State:
        """The state, to be given to `restore`. Cheap: shallow copies."""
        found = len(self.findings)
        return self._records.snapshot(), self.registers.snapshot(), dict(self._links), dict(self._gone), found

    def restore(self, state: State) -> None:
        """Back to `state`; findings since are dropped."""
        records, registers, links, gone, found = state
        self._records.restore(records)
        self.registers.restore(registers)
        self._links, self._gone = dict(links), dict(gone)
        del self.findings[found:]

    def key(self) -> tuple[Any, ...]:
        """Hashable, equal for states that will judge alike: no PCs, no history."""
        return self._records.key(), self.registers.key()

    # records

    def _track(self, event: Write, record: Unclean | None, *, unclean: bool, told: bool = False) -> None:
        """Makes, renews or drops the record of the descriptor that was written."""
        if unclean:
            if record is not None:
                self._records.renew(event, record, told=told)
            else:
                self._records.add(event, self._asid(event), table=self.changes.is_table(event.level, event.old))
        elif record is not None and self.changes(event.level, record.old, event.new).unclean:
            self._records.amend(record, word=event.new)  # what a TLB may hold is still wrong
        elif record is not None:
            self._records.drop(record)

    def _asid(self, event: Write) -> int | None:
        """The ASID that a TLB has with the old content; None for a global leaf."""
        p = self.params
        if self._stage == 2:
            return event.asid
        leaf = not self.changes.is_table(event.level, event.old)
        if not p.regime.has_el0 or (leaf and not event.old & p.ng):
            return None
        return self.registers.asid(event.cpu) if event.asid is None else event.asid

    # tables

    def _resized(self, event: Write, record: Unclean | None) -> str:
        """A change of size that FEAT_BBM allows: what is wrong with it all the same."""
        changes, level = self.changes, event.level
        was, now = changes.is_table(level, event.old), changes.is_table(level, event.new)
        if was == now or not event.old & event.new & 1:
            return ""
        if changes.bbm == 1 and record is not None and changes.nT(level, event.old):
            return NT_PENDING
        return self._children_differ(event) if now else ""

    def _children_differ(self, event: Write) -> str:
        """A block replaced by a table must translate as the block did."""
        p, level = self.params, event.level
        size = self._granule.level_size(level + 1)
        base = p.output_address(level, event.old)
        template = event.old & ~p.fmt.leaf(level)["OA"].mask & ~p.contiguous & ~p.nt | (
            3 if level + 1 == LAST_LEVEL else 1
        )
        for i, word in enumerate(self._words(p.table_address(event.new))):
            if self.changes.is_table(level + 1, word) or not word & 1:
                continue
            same = p.fmt.leaf(level + 1)["OA"].put(template, base + i * size)
            rule = self.changes(level + 1, same, word & ~p.contiguous).rule
            if rule:
                return rule
        return ""

    def _words(self, table: int) -> list[int]:
        """The descriptors of a table, none where it cannot be read."""
        if self._memory is None:
            return []
        try:
            return [int(word) for word in self._memory.words(table, self._granule.entries)]
        except NoMemory:
            return []

    def _tables(self, event: Write) -> None:
        """Follows tables that are linked and unlinked."""
        changes, level, p = self.changes, event.level, self.params
        was, now = changes.is_table(level, event.old), changes.is_table(level, event.new)
        old = p.table_address(event.old) if was else None
        new = p.table_address(event.new) if now else None
        if old == new:
            return
        if new is not None:
            self._page(new, REUSED, event)
            self._links[new] = event.pa, level
            self._gone.pop(new, None)
        if old is not None:
            if self._links.get(old, (event.pa, 0))[0] == event.pa:
                self._links.pop(old, None)
                self._gone[old] = event.pa
            self._unlink(event, old)

    def _is_gone(self, pa: int) -> bool:
        """In a page that was a table, and that no TLB leads to any more: what is written there is no descriptor."""
        page = pa & -self._granule.page_size
        if page not in self._gone:
            return False
        record = self._records.get(self._gone[page])
        return record is None or not record.table or self.params.table_address(record.old) != page

    def _unlink(self, event: Write, table: int) -> None:
        """What was valid below a removed table may be in TLBs too."""
        level = event.level + 1
        size = self._granule.level_size(level)
        first = (event.va or 0) & -self._granule.level_size(event.level)
        for i, word in enumerate(self._words(table)):
            if not self.changes.cacheable(level, word):
                continue
            child = Write(event.cpu, event.pc, table + 8 * i, level, first + i * size, word, 0, event.asid)
            self._track(child, self._records.get(child.pa), unclean=True)
            if self.changes.is_table(level, word):
                self._unlink(child, self.params.table_address(word))

    def _page(self, page: int, rule: str, event: Write | TableFree | TableReuse) -> None:
        """The table at `page` is freed or used again: a descriptor that referred to it must be clean."""
        page &= -self._granule.page_size
        for record in self._records.all():
            refers = record.table and self.params.table_address(record.old) == page
            if refers and record.pa != event.pa:
                self._report(rule, record.cause, event.cpu, event.pc, record)
                self._records.amend(record, told=True)
                return

    def _refers(self, link: tuple[int, int], page: int) -> bool:
        """The descriptor still refers to the page, as far as can be told."""
        if self._memory is None:
            return True
        word = self._memory.fetch(link[0])
        return self.changes.is_table(link[1], word) and self.params.table_address(word) == page

    # findings

    def _find(self, rule: str, event: Write, record: Unclean | None) -> None:
        if rule == MAKE and record is not None:
            self._report(rule, record.cause, event.cpu, event.pc, event._replace(old=record.old), record)
        else:
            self._report(rule, "", event.cpu, event.pc, event)

    def _report(
        self, rule: str, cause: str, cpu: int, pc: int, about: Write | Unclean, broke: Unclean | None = None
    ) -> None:
        new = about.new if isinstance(about, Write) else about.word
        wrote = broke or about
        self.findings.append(
            Finding(
                *(rule, cause, cpu, pc, about.va or 0, about.level, about.pa, about.old, new, wrote.cpu, wrote.pc),
                *(named(self._symbol, pc), named(self._symbol, wrote.pc)),
            )
        )


_FEED = {
    Write: "write",
    Tlbi: "tlbi",
    Dsb: "dsb",
    Isb: "isb",
    SysregWrite: "sysreg",
    TableFree: "table_free",
    TableReuse: "table_reuse",
    Return: "returned",
    Use: "use",
}


def check(events: Iterable[Event], params: WalkParams, **options: Any) -> list[Finding]:
    """What is wrong in a list of events. `params`, `options`: as for `Checker`."""
    checker = Checker(params, **options)
    for event in events:
        checker.feed(event)
    return checker.findings


def run(program: Program) -> list[Finding]:
    """What the checker finds in a program."""
    memory, scene = program.memory(), program.scene
    checker = Checker(
        program.params,
        cpus=scene.cpus,
        bbm=scene.bbm,
        memory=memory,
        registers=program.registers,
        symbol=line_of,
        stage=scene.stage,
    )
    for event in program.events:
        if isinstance(event, Write):
            memory.store(event.pa, event.new)
        checker.feed(event)
    return checker.findings
