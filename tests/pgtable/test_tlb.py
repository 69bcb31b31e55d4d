"""The TLB model: against a plain one (a dict of pages for each VMID and ASID), and rule by rule."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pgtable import Access, Fault, FaultType, PhysicalMemory, Registers
from pgtable.bbm import parse_program
from pgtable.tlb import Policy, TlbModel, run
from pgtable.tlb_events import Dsb, Isb, SysregWrite, Tlbi, Write
from pgtable.tlbi import decode, operand_for, range_operand
from tests.pgtable.programs import BEGIN, CASES, DOC, FINISH, SPLIT_TABLE, Case, table, verdict

CPUS, ASIDS, VMIDS, PAGES = (0, 1), (1, 2), (0, 3), (0, 1, 2, 3)
ROOTS = {1: 0x4000_0000, 2: 0x4000_1000}
TCR = 43 | 1 << 36 | 1 << 23 | 43 << 16 | 5 << 32 | 2 << 30  # a 2 MiB lower half: the root is a level 3 table
OPS = ("VAE1", "VALE1", "VAAE1", "VAALE1", "ASIDE1", "VMALLE1", "VMALLS12E1", "ALLE1", "RVAE1", "RVAALE1", "VAE2")


class Page(NamedTuple):
    """A mapping, as the plain model has it."""

    pa: int
    is_global: bool


class Held(NamedTuple):
    """What the plain TLB has for a page, and since when."""

    page: Page
    since: int


class Pending(NamedTuple):
    """A TLBI that no DSB has completed."""

    name: str
    page: int
    asid: int
    vmid: int
    at: int


class TlbAgainstPages(RuleBasedStateMachine):
    """Every access, of every CPU in every context, gives what the plain model says."""

    late = False

    @initialize()
    def start(self) -> None:
        self.memory = PhysicalMemory((0x4000_0000, 0x4000))
        regs = Registers(TTBR0_EL1=self._ttbr(1), TCR_EL1=TCR, SCTLR_EL1=0x1005, MAIR_EL1=0xFF)
        policy = Policy(late=self.late, isb=False, speculative=False)
        self.model = TlbModel(self.memory, regs, policy=policy)
        self.tables: dict[tuple[int, int], Page] = {}  # ASID, page
        self.context = dict.fromkeys(CPUS, (0, 1))  # VMID, ASID
        self.tlb: dict[int, dict[tuple[int, int | None, int], Held]] = {cpu: {} for cpu in CPUS}
        self.pending: dict[int, list[Pending]] = {cpu: [] for cpu in CPUS}
        self.clock = 0

    def _ttbr(self, asid: int) -> int:
        return ROOTS[asid] | asid << 48

    @rule(asid=st.sampled_from(ASIDS), page=st.sampled_from(PAGES), pa=st.integers(0, 7), is_global=st.booleans())
    def map(self, asid: int, page: int, pa: int, is_global: bool) -> None:
        self.tables[asid, page] = Page(0x5000_0000 + pa * 4096, is_global)
        self._store(asid, page, 0x5000_0000 + pa * 4096 | (0x703 if is_global else 0xF03))

    @rule(asid=st.sampled_from(ASIDS), page=st.sampled_from(PAGES))
    def unmap(self, asid: int, page: int) -> None:
        self.tables.pop((asid, page), None)
        self._store(asid, page, 0)

    def _store(self, asid: int, page: int, word: int) -> None:
        pa = ROOTS[asid] + 8 * page
        self.model.feed(Write(0, 0, pa, 3, page * 4096, self.memory.fetch(pa), word))
        self.memory.store(pa, word)
        self.model.feed(Dsb(0, "ishst"))

    @rule(cpu=st.sampled_from(CPUS), vmid=st.sampled_from(VMIDS), asid=st.sampled_from(ASIDS))
    def switch(self, cpu: int, vmid: int, asid: int) -> None:
        self.context[cpu] = vmid, asid
        self.model.feed(SysregWrite(cpu, "TTBR0_EL1", self._ttbr(asid)))
        self.model.feed(SysregWrite(cpu, "VTTBR_EL2", vmid << 48))
        self.model.feed(Isb(cpu))

    @rule(cpu=st.sampled_from(CPUS), page=st.sampled_from(PAGES))
    def access(self, cpu: int, page: int) -> None:
        vmid, asid = self.context[cpu]
        held = [self.tlb[cpu].get((vmid, tag, page)) for tag in (None, asid)]
        found = {one.page.pa for one in held if one}
        result = self.model.access(cpu, page * 4096 + 8, Access.read()).result
        if len(found) > 1:
            assert isinstance(result, Fault)
            assert result.type is FaultType.TLB_CONFLICT
            return
        if not found and (asid, page) in self.tables:
            there = self.tables[asid, page]
            self.clock += 1
            self.tlb[cpu][vmid, None if there.is_global else asid, page] = Held(there, self.clock)
            found = {there.pa}
        assert getattr(result, "pa", None) == next((pa + 8 for pa in found), None)

    @rule(
        cpu=st.sampled_from(CPUS),
        name=st.sampled_from(OPS),
        shared=st.booleans(),
        asid=st.sampled_from(ASIDS),
        page=st.sampled_from(PAGES),
    )
    def tlbi(self, cpu: int, name: str, shared: bool, asid: int, page: int) -> None:
        full = name + ("IS" if shared else "")
        if name.startswith("R"):
            operand = range_operand(page * 4096, 2, asid=asid)
        elif name[:2] == "VA" or name == "ASIDE1":
            operand = operand_for(full, 0 if name == "ASIDE1" else page * 4096, asid=asid)
        else:
            operand = 0
        self.clock += 1
        vmid = self.context[cpu][0]
        self.model.feed(Tlbi(cpu, decode(full, operand, vmid=vmid)))
        self.pending[cpu].append(Pending(full, page, asid, vmid, self.clock))
        if not self.late:
            self._complete(cpu, lambda _: True)

    @rule(cpu=st.sampled_from(CPUS), domain=st.sampled_from(("ish", "nsh", "ishst", "sy", "ishld", "ishnxs")))
    def dsb(self, cpu: int, domain: str) -> None:
        self.model.feed(Dsb(cpu, domain))
        if domain in ("ish", "sy"):
            self._complete(cpu, lambda _: True)
        elif domain == "nsh":
            self._complete(cpu, lambda one: not one.name.endswith("IS"))

    def _complete(self, cpu: int, done: Any) -> None:
        for one in [one for one in self.pending[cpu] if done(one)]:
            self.pending[cpu].remove(one)
            for other in CPUS if one.name.endswith("IS") else (cpu,):
                for key, held in list(self.tlb[other].items()):
                    if held.since < one.at and self._matches(one, *key):
                        del self.tlb[other][key]

    def _matches(self, one: Pending, vmid: int, tag: int | None, page: int) -> bool:
        name = one.name.removesuffix("IS")
        if name == "VAE2":
            return False
        if name == "ALLE1":
            return True
        if vmid != one.vmid:
            return False
        pages = (one.page, one.page + 1) if name.startswith("R") else (one.page,)
        if name.startswith("VMALL"):
            return True
        if name == "ASIDE1":
            return tag == one.asid
        return page in pages and ("VAA" in name or tag in (None, one.asid))

    @invariant()
    def restoring_changes_nothing(self) -> None:
        if hasattr(self, "model"):
            key = self.model.key()
            self.model.restore(self.model.snapshot())
            assert self.model.key() == key


class LateTlbAgainstPages(TlbAgainstPages):
    """The same where an invalidation happens with its DSB."""

    late = True


TestAtOnce = TlbAgainstPages.TestCase
TestLate = LateTlbAgainstPages.TestCase
TestAtOnce.settings = TestLate.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verdict_of_the_model(case: Case) -> None:
    assert verdict(run(parse_program(case.text)), cause=False) == case.tlb


def test_the_table_in_the_page_is_what_the_checkers_say() -> None:
    text = DOC.read_text()
    assert BEGIN + table() + FINISH in text, "python -m tests.pgtable.programs --write"


def good(text: str, **policy: Any) -> list[str]:
    """The findings of a program under a policy, as rules."""
    return [f.rule for f in run(parse_program(text), Policy(**policy))]


UNMAP = "cpu0 write 0x40003008 L3 0x60000050000703 -> 0\n"
V = "0xffff000000001000"


def test_a_finding_has_both_pcs() -> None:
    (found, *_) = run(parse_program(f"{UNMAP.strip()} @0x1234\ncpu0 dsb ish\ncpu0 return\ncpu1 read {V} @0x5678\n"))
    assert (found.write_cpu, found.write_pc, found.cpu, found.pc) == (0, 0x1234, 1, 0x5678)
    assert (found.va, found.level, found.pa) == (0xFFFF_0000_0000_1000, 3, 0x4000_3008)
    assert (found.old, found.new) == (0x60000050000703, 0)


def test_without_speculation_only_what_was_accessed_is_held() -> None:
    rest = f"cpu0 dsb ish\ncpu0 isb\ncpu0 return\ncpu1 read {V}\n"
    assert good(UNMAP + rest, speculative=False) == []
    assert good(f"cpu1 read {V}\n" + UNMAP + rest, speculative=False) == ["missing invalidation"]


def test_a_tlb_that_forgets_everything_is_never_stale() -> None:
    assert good(UNMAP + f"cpu0 dsb ish\ncpu0 return\ncpu1 read {V}\n", forget=1.0) == []


def test_forgetting_depends_on_the_seed_alone() -> None:
    reads = "".join(f"cpu1 read {V}\n" for _ in range(20))
    runs = [
        [len(run(parse_program(UNMAP + f"cpu0 dsb ish\ncpu0 return\n{reads}"), Policy(forget=0.1, seed=seed)))] * 2
        for seed in range(6)
    ]
    assert all(a == b for a, b in runs)
    assert len({a for a, _ in runs}) > 1


def test_an_early_invalidation_needs_no_dsb_after_it() -> None:
    text = UNMAP + f"cpu0 dsb ishst\ncpu0 tlbi vaale1is {V}\ncpu0 return\ncpu1 read {V}\ncpu0 read {V}\n"
    assert good(text, late=False) == []
    assert good(text) == ["stale use", "stale use"]


CONT = "".join(
    f"word {0x40003000 + 8 * i:#x} = {0x70000050000703 + 0x1000 * i:#x}\n" for i in range(16)
)  # a contiguous run


def test_a_run_held_as_one_entry_goes_with_any_of_its_pages() -> None:
    text = CONT + (
        "cpu1 read 0xffff000000005000\ncpu0 write 0x40003028 L3 0x70000050005703 -> 0\ncpu0 dsb ishst\n"
        "cpu0 tlbi vaale1is 0xffff000000000000\ncpu0 dsb ish\ncpu0 return\ncpu1 read 0xffff000000005000\n"
    )
    assert good(text, contiguous=True, speculative=False) == []
    assert good(text, speculative=False) == ["missing invalidation"]


def test_a_run_held_as_one_entry_translates_all_of_it() -> None:
    program = parse_program(CONT)
    model = TlbModel(program.memory(), program.registers, policy=Policy(contiguous=True))
    model.access(0, 0xFFFF_0000_0000_3008, Access.read())
    assert model.access(0, 0xFFFF_0000_0000_E010, Access.read()).pa == 0x5000_E010
    (leaf,) = [entry for entry in model.entries(0) if entry.target.leaf]
    assert leaf.target.size == 16 * 4096


def test_overlapping_entries_are_a_conflict_below_bbm_level_3() -> None:
    text = (
        SPLIT_TABLE + "word 0x40002008 = 0x40004003\ncpu1 read 0xffff000000200000\n"
        "cpu0 write 0x40002008 L2 0x40004003 -> 0x60000050000701\ncpu0 dsb ishst\n"
        "cpu0 tlbi vaae1is 0xffff000000201000\ncpu0 dsb ish\ncpu0 isb\ncpu0 return\n"
        "cpu1 read 0xffff000000201000\ncpu1 read 0xffff000000200000\n"
    )
    assert good("bbm 2\n" + text) == ["TLB conflict"]
    assert good("bbm 3\n" + text) == []


def test_common_entries_serve_every_cpu_and_a_local_tlbi_drops_them() -> None:
    program = parse_program("reg TTBR1_EL1 = 0x40000001\nword 0x40003008 = 0x60000050000703\n")
    memory = program.memory()
    model = TlbModel(memory, program.registers, policy=Policy(speculative=False))
    va = 0xFFFF_0000_0000_1000
    assert model.access(0, va, Access.read()).ok
    memory.store(0x4000_3008, 0)
    assert model.access(1, va, Access.read()).ok
    model.feed(Tlbi(1, decode("VMALLE1")))
    model.feed(Dsb(1, "nsh"))
    model.feed(Isb(1))
    assert not model.access(0, va, Access.read()).ok


def test_faults_that_may_not_be_cached_are_not() -> None:
    program = parse_program("word 0x40003008 = 0x60000050000303\n")  # AF = 0
    memory = program.memory()
    model = TlbModel(memory, program.registers)
    va = 0xFFFF_0000_0000_1000
    assert not model.access(0, va, Access.read()).ok
    memory.store(0x4000_3008, 0x60000050000703)
    assert model.access(0, va, Access.read()).ok


def test_permission_faults_come_from_the_entry() -> None:
    program = parse_program("word 0x40003008 = 0x60000050000783\n")  # read-only
    memory = program.memory()
    model = TlbModel(memory, program.registers)
    va = 0xFFFF_0000_0000_1000
    assert model.access(0, va, Access.read()).ok
    memory.store(0x4000_3008, 0x60000050000703)
    assert not model.access(0, va, Access.write()).ok


def test_hardware_marks_the_page_dirty_in_memory_not_in_the_entry() -> None:
    """An entry that is clean makes the write update the descriptor, if it is still what the entry says."""
    tcr = 1 << 39 | 1 << 40
    base = parse_program("").registers
    program = parse_program("word 0x40003008 = 0x68000050000783\n")  # DBM, clean
    memory = program.memory()
    model = TlbModel(memory, base.replace(TCR_EL1=base.TCR_EL1 | tcr))
    va = 0xFFFF_0000_0000_1000

    def swap(pa: int, old: int, new: int) -> bool:
        if memory.fetch(pa) != old:
            return False
        memory.store(pa, new)
        return True

    assert model.access(0, va, Access.read(), swap=swap).ok
    assert model.access(0, va, Access.write(), swap=swap).ok
    assert memory.fetch(0x4000_3008) == 0x68000050000703
    memory.store(0x4000_3008, 0)
    assert not model.access(0, va, Access.write(), swap=swap).ok


def test_a_register_write_counts_after_the_isb() -> None:
    program = parse_program("half lower\nword 0x40003008 = 0x60000050000f03\n")
    model = TlbModel(program.memory(), program.registers)
    model.feed(SysregWrite(0, "TTBR0_EL1", 0x1_0000_4000_8000))
    assert model.access(0, 0x1000, Access.read()).ok
    model.feed(Isb(0))
    assert not model.access(0, 0x1000, Access.read()).ok


def test_restoring_gives_the_same_findings_again() -> None:
    for case in CASES:
        program = parse_program(case.text)
        memory = program.memory()
        model = TlbModel(memory, program.registers, cpus=program.scene.cpus)
        state, words = model.snapshot(), dict(memory.known)

        def play(model: TlbModel = model, memory: Any = memory, events: Any = program.events) -> list[str]:
            for event in events:
                model.feed(event)
                if isinstance(event, Write):
                    memory.store(event.pa, event.new)
            return [str(f) for f in model.finish()]

        first, key = play(), model.key()
        model.restore(state)
        memory.known = words
        assert play() == first
        assert model.key() == key
        hash(key)
