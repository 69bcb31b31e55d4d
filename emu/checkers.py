"""Both checkers over the tables of running machines: break-before-make (pgtable.bbm) for each half, and the TLB model.

Rules of this file:
- A store goes to the checker of its half, everything else to both; what both say is said once.
- A snapshot is cheap, so that a search can go back at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emu.table_events import TableEvents
from emu.trace import Event as Seen
from pgtable.access import Access
from pgtable.bbm import Checker
from pgtable.memory import PhysicalMemory
from pgtable.params import RANGE_BIT
from pgtable.registers import Registers
from pgtable.tlb import Policy, TlbModel
from pgtable.tlb_events import Event, Finding, Symbol, Write
from pgtable.walk import Swap, Walk


class Checkers:
    """`registers`: of each CPU. `policy`: how TLBs behave, None for no TLB model. `fresh`: findings not yet taken."""

    def __init__(
        self,
        memory: PhysicalMemory,
        registers: Sequence[Registers],
        *,
        policy: Policy | None = None,
        symbol: Symbol | None = None,
    ) -> None:
        self.tree = TableEvents(memory, registers[0])
        self.fresh: list[Finding] = []
        count = len(registers)
        self._halves = [
            (upper, Checker(p, cpus=count, memory=memory, registers=registers[0], symbol=symbol))
            for upper, p in self.tree.halves.items()
        ]
        self.tlb = TlbModel(memory, registers, cpus=count, policy=policy, symbol=symbol) if policy else None

    def saw(self, cpu: int, seen: Seen) -> Event | None:
        """What a hook saw; a store before memory has it. The event that it is, None for nothing to TLBs."""
        event = self.tree.event(cpu, seen)
        if event is not None:
            self.feed(event)
        return event

    def feed(self, event: Event) -> None:
        """An event of any kind."""
        for upper, checker in self._halves:
            if not isinstance(event, Write) or event.va is None or bool(event.va & RANGE_BIT) == upper:
                checker.feed(event)
                self._take(checker.findings)
        if self.tlb:
            self.tlb.feed(event)
            self._take(self.tlb.findings)

    def access(self, cpu: int, va: int, access: Access, pc: int = 0, swap: Swap | None = None) -> Walk:
        """An access through the TLB model, which must be there."""
        assert self.tlb
        found = self.tlb.access(cpu, va, access, pc, swap)
        self._take(self.tlb.findings)
        return found

    def _take(self, findings: list[Finding]) -> None:
        self.fresh += [finding for finding in findings if finding not in self.fresh]
        findings.clear()

    def taken(self) -> list[Finding]:
        """The findings since the last time."""
        found, self.fresh = self.fresh, []
        return found

    # state

    def snapshot(self) -> Any:
        """The state, for `restore`; findings that were not taken are not in it."""
        tlb = self.tlb.snapshot() if self.tlb else None
        return self.tree.snapshot(), tuple(checker.snapshot() for _, checker in self._halves), tlb

    def restore(self, state: Any) -> None:
        """Back to a state."""
        tree, halves, tlb = state
        self.tree.restore(tree)
        for (_, checker), known in zip(self._halves, halves, strict=True):
            checker.restore(known)
        if self.tlb:
            self.tlb.restore(tlb)
        self.fresh = []

    def key(self) -> tuple[Any, ...]:
        """Hashable, equal for states that will judge alike."""
        return tuple(checker.key() for _, checker in self._halves), self.tlb.key() if self.tlb else None
