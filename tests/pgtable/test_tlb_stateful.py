"""The TLB model under every policy against a plain one: what speculation, unseen stores and a missing ISB leave behind.

tests/pgtable/test_tlb.py has contexts and all operations, with TLBs that hold only what was accessed. Here it is one
context, and what hardware may do besides: what is changed is held, an invalidation is late, the CPU's own waits for an
ISB, and a walk brings back what a store has not replaced yet for everybody. The plain model is a dict for each CPU.
Source: Arm ARM D8.16, D8.17; the policies are those of `Policy`.

    PGTABLE_HYPOTHESIS=long pytest tests/pgtable/test_tlb_stateful.py       many more, other ones each time
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pgtable import Access, Fault, FaultType, PhysicalMemory, Registers
from pgtable.tlb import Policy, TlbModel
from pgtable.tlb_events import Dsb, Isb, Tlbi, Write
from pgtable.tlbi import decode, operand_for
from tests.stateful import settings_of

CPUS, PAGES, ROOT, OUT = (0, 1), (0, 1, 2), 0x4000_0000, 0x5000_0000
TCR = 43 | 1 << 23 | 5 << 32  # a 2 MiB lower half, whose root is a level 3 table
VALID, AF = 0xB03, 1 << 10  # page, not global, inner shareable


class Issued(NamedTuple):
    """A TLBI: `page` None for all of them, `at` when, `unseen` the pages whose last store not everybody sees."""

    page: int | None
    shared: bool
    at: int
    unseen: frozenset[int]


class Speculating(RuleBasedStateMachine):
    """Every access of every CPU gives what the plain model says."""

    @initialize(late=st.booleans(), isb=st.booleans(), speculative=st.booleans())
    def begin(self, late: bool, isb: bool, speculative: bool) -> None:
        self.policy = Policy(late=late, isb=isb, speculative=speculative)
        self.memory = PhysicalMemory((ROOT, 0x1000))
        regs = Registers(TTBR0_EL1=ROOT, TCR_EL1=TCR, SCTLR_EL1=0x1005, MAIR_EL1=0xFF)
        self.model = TlbModel(self.memory, regs, cpus=len(CPUS), policy=self.policy)
        self.held: dict[int, dict[tuple[int, int], int]] = {cpu: {} for cpu in CPUS}  # (page, word) -> since
        self.unseen: dict[int, int] = {}  # page -> the CPU whose store it is
        self.issued: dict[int, list[Issued]] = {cpu: [] for cpu in CPUS}
        self.own: dict[int, list[Issued]] = {cpu: [] for cpu in CPUS}
        self.clock = 0

    def word(self, page: int) -> int:
        """What memory has."""
        return self.memory.fetch(ROOT + 8 * page)

    def hold(self, cpu: int, page: int, word: int) -> None:
        if word & 1 and word & AF:
            self.held[cpu][page, word] = self.clock

    @rule(cpu=st.sampled_from(CPUS), page=st.sampled_from(PAGES), to=st.integers(0, 3), af=st.booleans())
    def store(self, cpu: int, page: int, to: int, af: bool) -> None:
        """0: a hole."""
        self.clock += 1
        old, new = self.word(page), (OUT + to * 4096 | VALID | AF * af) if to else 0
        if old & 1:
            for other in CPUS if self.policy.speculative and old != new else ():
                self.hold(other, page, old)
            self.unseen[page] = cpu
        self.model.feed(Write(cpu, 0, ROOT + 8 * page, 3, page * 4096, old, new))
        self.memory.store(ROOT + 8 * page, new)

    @rule(cpu=st.sampled_from(CPUS), page=st.sampled_from(PAGES))
    def access(self, cpu: int, page: int) -> None:
        self.clock += 1
        words = {word for at, word in self.held[cpu] if at == page}
        result = self.model.access(cpu, page * 4096 + 8, Access.read()).result
        if len(words) > 1:
            assert isinstance(result, Fault)
            assert result.type is FaultType.TLB_CONFLICT
            return
        if not words:
            words = {self.word(page)}
            self.hold(cpu, page, self.word(page))
        word = words.pop()
        expected = (word & 0xFFFF_FFFF_F000) + 8 if word & 1 and word & AF else None
        assert getattr(result, "pa", None) == expected

    @rule(
        cpu=st.sampled_from(CPUS),
        name=st.sampled_from(("VAE1", "VAALE1", "VMALLE1")),
        shared=st.booleans(),
        page=st.sampled_from(PAGES),
    )
    def tlbi(self, cpu: int, name: str, shared: bool, page: int) -> None:
        self.clock += 1
        everything = name == "VMALLE1"
        full = name + "IS" * shared
        self.model.feed(Tlbi(cpu, decode(full, 0 if everything else operand_for(full, page * 4096))))
        unseen = frozenset(at for at, writer in self.unseen.items() if shared or writer != cpu)
        one = Issued(None if everything else page, shared, self.clock, unseen)
        if self.policy.late:
            self.issued[cpu].append(one)
        else:
            for other in CPUS if shared else (cpu,):
                self.drop(other, one)

    def drop(self, cpu: int, one: Issued) -> None:
        """An invalidation reaches a CPU: what is there since before it goes, but for what a walk would bring back."""
        for (page, word), since in list(self.held[cpu].items()):
            if since < one.at and one.page in (None, page) and page not in one.unseen:
                del self.held[cpu][page, word]

    @rule(cpu=st.sampled_from(CPUS), domain=st.sampled_from(("ish", "ishst", "nsh", "sy")))
    def dsb(self, cpu: int, domain: str) -> None:
        self.model.feed(Dsb(cpu, domain))
        done = [one for one in self.issued[cpu] if domain in ("ish", "sy") or (domain == "nsh" and not one.shared)]
        for one in done:
            self.issued[cpu].remove(one)
            for other in CPUS if one.shared else ():
                if other != cpu:
                    self.drop(other, one)
            if self.policy.isb:
                self.own[cpu].append(one)
            else:
                self.drop(cpu, one)
        if domain != "nsh":
            self.unseen = {page: writer for page, writer in self.unseen.items() if writer != cpu}

    @rule(cpu=st.sampled_from(CPUS))
    def isb(self, cpu: int) -> None:
        self.model.feed(Isb(cpu))
        for one in self.own[cpu]:
            self.drop(cpu, one)
        self.own[cpu] = []

    @invariant()
    def all_hold_the_same(self) -> None:
        for cpu in CPUS if hasattr(self, "model") else ():
            held = {(entry.target.start >> 12, entry.steps[-1][2]) for entry in self.model.entries(cpu)}
            assert held == set(self.held[cpu])

    @rule()
    def go_back(self) -> None:
        """A state that is given back is the same."""
        state, key = self.model.snapshot(), self.model.key()
        self.model.access(0, PAGES[-1] * 4096, Access.read())
        self.model.feed(Isb(1))
        self.model.restore(state)
        assert self.model.key() == key


TestSpeculating = Speculating.TestCase
TestSpeculating.settings = settings_of(examples=80, steps=40)
TestSpeculating.pytestmark = [pytest.mark.timeout(600)]
