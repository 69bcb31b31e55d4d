"""emu.tracing: what machines do to tables, in order, as events; and both checkers' verdicts on real code."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from emu import scenarios
from emu.check import stub_allocator
from emu.coldboot import protections
from emu.cpus import more_cpus
from emu.machine import Machine
from emu.races.parts import DBM, RDONLY
from emu.tracing import Policy, Trace
from pgtable.tlb_events import Dsb, Isb, Return, SysregWrite, Tlbi, Write
from pgtable.tlbi import operand_for
from tests.kernels import KERNELS, kernel_image
from tests.snapshots import WARM, booted

ALL = [pytest.param(name, marks=pytest.mark.kernels, id=name) for name in KERNELS]

# Instructions, encoded by hand; the operands are in X0 to X3: a VA, the VA of its PTE, a descriptor, TLBI's operand.
LOAD, STORE, CLEAR = 0xF9400009, 0xF9000022, 0xF900003F  # ldr x9, [x0]; str x2, [x1]; str xzr, [x1]
DSB_ISHST, DSB_ISH, ISB, RET = 0xD5033A9F, 0xD5033B9F, 0xD5033FDF, 0xD65F03C0
TLBI = 0xD5088363  # tlbi vaae1is, x3
MSR_TTBR0 = 0xD5182000  # msr ttbr0_el1, x0
BREAK = (CLEAR, DSB_ISHST, TLBI, DSB_ISH, ISB)


class Bare:
    """A machine without a kernel, one of its pages, and what snippets are given."""

    def __init__(self, trace: Trace, mmu: str = "model") -> None:
        self.machine = m = Machine.bare(mmu=mmu, trace=trace)
        self.va = m.plan.linear + 0x10_0000
        step = m.translate(self.va).steps[-1]
        self.pa, self.word = step.pa, step.word
        self.other = step.word + m.plan.page_size
        self.operand = operand_for("vaae1is", self.va)

    def run(self, *code: int, operand: int | None = None) -> list[tuple[str, str]]:
        """Runs a snippet from a fresh start; (rule, cause) of what was found."""
        m = self.machine
        m.memory.store(self.pa, self.word)
        given = self.operand if operand is None else operand
        result = m.run([*code, RET], self.va, m.plan.linear_va(self.pa), self.other, given)
        assert not result.stop
        return [(f.rule, f.cause) for f in result.findings]


# the TLB model serves the accesses

PROGRAMS: dict[str, tuple[tuple[int, ...], list[tuple[str, str]]]] = {
    "break, make": ((LOAD, *BREAK, STORE, DSB_ISHST, ISB, LOAD), []),
    "permission": ((LOAD, CLEAR, DSB_ISHST, TLBI, DSB_ISH, ISB), []),
    "no TLBI": (
        (LOAD, CLEAR, DSB_ISHST, ISB, LOAD),
        [("missing invalidation", ""), ("unclean at return", "no TLBI")],
    ),
    "no DSB after the TLBI": (
        (LOAD, CLEAR, DSB_ISHST, TLBI, LOAD),
        [("stale use", "VAAE1IS: not complete"), ("unclean at return", "no DSB after the TLBI")],
    ),
    "TLBI before the store": (
        (LOAD, TLBI, DSB_ISH, CLEAR, DSB_ISHST, ISB, LOAD),
        [("missing invalidation", ""), ("unclean at return", "no TLBI")],
    ),
    "no break": ((LOAD, STORE, DSB_ISHST, TLBI, DSB_ISH, ISB, LOAD), [("output address", "")]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_uses_and_returns_of_a_program(name: str) -> None:
    code, expected = PROGRAMS[name]
    assert Bare(Trace(policy=Policy())).run(*code) == expected


def test_a_stale_entry_serves_the_access_that_the_tables_refuse() -> None:
    """The load after the break goes through: nothing was invalidated, so that the program returns."""
    bare = Bare(Trace(policy=Policy()))
    code = (LOAD, CLEAR, DSB_ISHST, ISB, LOAD, RET)
    m = bare.machine
    result = m.run(code, bare.va, m.plan.linear_va(bare.pa))
    assert result.stop is None
    without = Bare(Trace())
    stopped = without.machine.run(code, without.va, without.machine.plan.linear_va(without.pa))
    without.machine.cpu.flush_tlb()
    assert without.machine.translate(without.va).fault
    assert not any("missing" in f.rule for f in stopped.findings)  # no policy: nobody looks at uses


def test_both_pcs_of_a_stale_use() -> None:
    trace = Trace(policy=Policy())
    bare = Bare(trace)
    bare.run(LOAD, CLEAR, DSB_ISHST, ISB, LOAD)
    code = bare.machine.plan.code
    assert (trace.findings[0].pc, trace.findings[0].write_pc) == (code + 16, code + 4)


def test_a_tlb_that_forgets_everything_has_no_stale_use() -> None:
    trace = Trace(policy=Policy(forget=1.0, speculative=False, late=False, isb=False))
    bare = Bare(trace)
    m = bare.machine
    m.memory.store(bare.pa, bare.word)
    result = m.run((LOAD, CLEAR, DSB_ISHST, ISB, LOAD, RET), bare.va, m.plan.linear_va(bare.pa))
    assert result.stop
    assert result.stop.kind == "fault"
    assert [f.rule for f in result.findings] == []  # it has not returned


def test_the_wrong_asid_cleans_nothing() -> None:
    """A TLBI VAE1IS of another ASID, for a page of EL0 that is not global."""
    trace = Trace(policy=Policy())
    m = Machine.bare(mmu="model", trace=trace)
    va = m.plan.user_data
    step = m.translate(va).steps[-1]
    not_global = m.tables.fmt.leaf(3)["nG"].put(step.word, 1)
    code = (CLEAR, DSB_ISHST, 0xD5088323, DSB_ISH, ISB, RET)  # tlbi vae1is, x3
    for asid, expected in ((0, []), (1, [("unclean at return", "TLBI of another ASID")])):
        m.memory.store(step.pa, not_global)
        result = m.run(code, 0, m.plan.linear_va(step.pa), 0, operand_for("vae1is", va, asid=asid))
        assert [(f.rule, f.cause) for f in result.findings] == expected


def test_a_use_by_another_cpu_after_the_return() -> None:
    trace = Trace(policy=Policy())
    bare = Bare(trace)
    (second,) = more_cpus(bare.machine)
    m = bare.machine
    assert second.trace
    assert second.trace.number == 1
    second.run((LOAD, RET), bare.va)
    m.run((CLEAR, DSB_ISHST, 0xD5088763, 0xD503379F, ISB, RET), 0, m.plan.linear_va(bare.pa), 0, bare.operand)
    found = second.run((LOAD, RET), bare.va).findings  # tlbi vaae1, dsb nsh: of the first CPU only
    assert [(f.rule, f.cpu, f.write_cpu) for f in found] == [("stale use", 1, 0)]


def test_what_python_changes_is_taken_as_done_right() -> None:
    trace = Trace(policy=Policy())
    bare = Bare(trace)
    m = bare.machine
    m.run((LOAD, RET), bare.va)
    m.memory.store(bare.pa, bare.other)
    assert m.run((LOAD, RET), bare.va).findings == ()
    assert trace.findings == []


@pytest.mark.parametrize("mmu", ["cpu", "model"])
def test_a_register_that_python_sets_is_an_event_and_taken_as_done_right(mmu: str) -> None:
    """An empty table in TTBR0_EL1, under the ASID of before: what a TLB had is gone with it."""
    out = io.StringIO()
    trace = Trace(out, policy=Policy())
    m = Machine.bare(mmu=mmu, trace=trace)
    va, root, empty = m.plan.user_data, m.registers().TTBR0_EL1, m.plan.ram[0] + 0x20_0000
    m.memory.words(empty, 512)[:] = 0
    assert not m.run((LOAD, RET), va).stop
    m.set_register("TTBR0_EL1", empty)
    stop = m.run((LOAD, RET), va).stop
    assert stop
    assert stop.kind == "fault"
    m.set_register("TTBR0_EL1", root)
    assert m.run((LOAD, RET), va).ok().findings == ()
    assert [e for e in trace.events if isinstance(e, SysregWrite)] == [
        SysregWrite(0, "TTBR0_EL1", empty),
        SysregWrite(0, "TTBR0_EL1", root),
    ]
    assert [row["value"] for row in rows(out) if row.get("kind") == "set"] == [f"{empty:#x}", f"{root:#x}"]


def test_a_register_that_the_guest_sets_is_no_event_of_python() -> None:
    out = io.StringIO()
    m = Machine.bare(mmu="model", trace=Trace(out))
    m.run((MSR_TTBR0, ISB, RET), m.user.root | 5 << 48)
    m.run((0xD500419F, RET))  # msr pan, #1: of PSTATE, no register of the regime
    m.run((RET,))
    assert [row["kind"] for row in rows(out)[1:]] == ["msr", "isb", "return", "return", "return"]


# the events


def kinds(trace: Trace) -> list[type]:
    return [type(event) for event in trace.events]


@pytest.mark.parametrize("mmu", ["cpu", "model"])
def test_events_are_in_the_order_of_the_program(mmu: str) -> None:
    trace = Trace()
    Bare(trace, mmu).run(*BREAK)
    assert kinds(trace) == [Write, Dsb, Tlbi, Dsb, Isb, Return]
    write = trace.events[0]
    assert isinstance(write, Write)
    assert (write.level, write.new) == (3, 0)


@pytest.mark.parametrize("mmu", ["cpu", "model"])
def test_an_msr_of_a_translation_register_is_an_event(mmu: str) -> None:
    trace = Trace()
    m = Machine.bare(mmu=mmu, trace=trace)
    root = m.user.root
    m.run((MSR_TTBR0, ISB, RET), root | 5 << 48)
    assert trace.events[0] == SysregWrite(0, "TTBR0_EL1", root | 5 << 48, m.plan.code)
    assert kinds(trace) == [SysregWrite, Isb, Return]


def test_an_exception_is_an_event() -> None:
    out = io.StringIO()
    m = Machine.bare(trace=Trace(out))
    assert m.run((0x00000000, RET)).stop
    assert [row["kind"] for row in rows(out)[1:]] == ["exception"]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_store_to_a_part_of_a_descriptor(size: int) -> None:
    trace = Trace()
    bare = Bare(trace)
    m = bare.machine
    code = {1: 0x3900003F, 2: 0x7900003F, 4: 0xB900003F}[size]  # strb, strh, str wzr, [x1]
    m.run((code, RET), 0, m.plan.linear_va(bare.pa) + 4)
    write = trace.events[0]
    assert isinstance(write, Write)
    mask = (1 << 8 * size) - 1 << 32
    assert (write.pa, write.old, write.new) == (bare.pa, bare.word, bare.word & ~mask)


def rows(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with Trace(path) as trace:
        bare = Bare(trace)
        bare.run(*BREAK[:2])
    head, *events = [json.loads(line) for line in path.read_text().splitlines()]
    assert head == {"schema": "pgtable.trace/1"}
    assert [row["kind"] for row in events] == ["write", "dsb", "return", "finding"]
    assert [row["n"] for row in events] == [1, 2, 3, 4]
    first = events[0]
    assert (first["va"], first["size"], first["level"]) == (f"{bare.va:#018x}", 4096, 3)
    assert first["fields"]["VALID"] == ["0x1", "0x0"]
    assert (events[3]["rule"], events[3]["cause"]) == ("unclean at return", "no TLBI")


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        Trace(path)
    assert path.read_text() == "mine"


def test_a_machine_has_one_trace() -> None:
    m = Machine.bare(trace=Trace())
    with pytest.raises(ValueError, match="has a trace"):
        m.attach(Trace())


# tables that are linked during a run


@pytest.mark.parametrize("word", [0x701, 0x703])  # a block; a table outside RAM
def test_a_table_is_followed_as_soon_as_it_is_linked(word: int) -> None:
    """A page of RAM becomes a table by a store of the program; its next store, into that page, has a VA."""
    trace = Trace()
    m = Machine.bare(trace=trace)
    table = m.plan.ram[0] + 0x20_0000
    m.memory.words(table, 512)[:] = 0
    va = m.plan.linear + (1 << 40)
    root = m.translate(va).steps[-1]
    code = (0xF9000022, 0xF9000460, RET)  # str x2, [x1]; str x0, [x3, #8]
    m.run(code, word, m.plan.linear_va(root.pa), table | 3, m.plan.linear_va(table))
    first, second = (e for e in trace.events if isinstance(e, Write))
    assert (first.pa, first.va, first.level) == (root.pa, va, root.level)
    assert (second.pa, second.level, second.va) == (table + 8, root.level + 1, va + (1 << 30))


def test_a_table_that_one_cpu_links_is_followed_once_on_another() -> None:
    """Of each CPU's store into it there is one event, in this run and in later ones."""
    trace = Trace()
    m = Machine.bare(trace=trace)
    (second,) = more_cpus(m)
    table = m.plan.ram[0] + 0x20_0000
    m.memory.words(table, 512)[:] = 0
    root = m.translate(m.plan.linear + (1 << 40)).steps[-1]
    m.run((STORE, RET), 0, m.plan.linear_va(root.pa), table | 3)
    for cpu in (second, m, second):
        cpu.run((STORE, RET), 0, m.plan.linear_va(table), 0)
    writes = [(e.cpu, e.pa) for e in trace.events if isinstance(e, Write)]
    assert writes == [(0, root.pa), (1, table), (0, table), (1, table)]


@pytest.mark.parametrize("name", ALL)
def test_tables_that_the_kernel_makes_are_followed(name: str) -> None:
    """vmap_range_noflush() of a page where no table is: it takes pages and links them, then stores the PTE."""
    trace = Trace()
    m = Machine.boot(kernel_image(name), trace=trace)
    stub_allocator(m)
    for counted in ("lruvec_stat_mod_folio", "mod_node_state", "__mod_node_page_state", "__mod_lruvec_page_state"):
        if m.image and counted in m.image.symbols:
            m.stub(counted, lambda _: 0)
    va = scenarios.test_va(m.plan)
    prot = protections(m.tables.fmt).kernel | 3
    m.call("vmap_range_noflush", va, va + m.plan.page_size, m.plan.ram[0] + 0x300_0000, prot, 12).ok()
    writes = [e for e in trace.events if isinstance(e, Write)]
    assert [(w.level, w.va) for w in writes][-1] == (3, va)
    assert m.translate(va).ok
    assert writes[-1].pa == m.translate(va).steps[-1].pa
    assert trace.findings == []


# shipped functions


@pytest.mark.parametrize("name", ALL)
def test_set_memory_valid_is_clean_and_noflush_is_not(name: str) -> None:
    trace = Trace()
    m = Machine.boot(kernel_image(name), trace=trace)
    va = m.plan.linear + 0x200_0000
    assert m.call("set_memory_valid", va, 2, 0).ok().findings == ()
    page = m.struct_page(m.plan.ram[0] + 0x210_0000)
    (found,) = m.call("set_direct_map_invalid_noflush", page).ok().findings
    assert (found.rule, found.cause, found.va) == ("unclean at return", "no TLBI", m.plan.linear + 0x210_0000)
    assert found.write_symbol.split("+")[0] in {"change_page_range", "pageattr_pte_entry"}


@pytest.mark.kernels
def test_update_range_prot_leaves_the_tlbi_to_its_caller() -> None:
    """7.3's: of set_memory_ro() and the like it is the middle; with its TLBI 6.12's is clean."""
    for name, function in (("debian:6.12", "__change_memory_common"), ("debian:7.3", "update_range_prot")):
        m = Machine.boot(kernel_image(name), trace=Trace())
        va, size = m.plan.linear + 0x200_0000, 2 * m.plan.page_size
        result = m.call(function, va, size, RDONLY, DBM).ok()
        found = [(f.rule, f.cause, f.va) for f in result.findings]
        unclean = [("unclean at return", "no TLBI", va + at) for at in range(0, size, m.plan.page_size)]
        assert found == (unclean if function == "update_range_prot" else [])


@pytest.mark.full
@pytest.mark.qemu
@pytest.mark.parametrize("name", WARM[:3])
def test_a_booted_kernel_is_traced_too(name: str) -> None:
    """vmalloc() of more than a block links a table that the kernel gave; set_memory_ro() of it is clean."""
    trace = Trace()
    machine = booted(name).machine().attach(trace)
    size = 1 << 22
    va = machine.call("vmalloc", size).ok().value
    tables = {w.pa & -4096 for w in trace.events if isinstance(w, Write) and w.level == 3}
    assert tables >= {machine.translate(va + at).steps[-1].pa & -4096 for at in range(0, size, 1 << 21)}
    assert machine.call("set_memory_ro", va, size >> 12).ok().findings == ()
    assert trace.findings == []


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mmu", ["cpu", "model"])
def test_a_trace_changes_no_result(name: str, mmu: str) -> None:
    results = []
    for trace in (None, Trace(policy=Policy())):
        m = Machine.boot(kernel_image(name), mmu=mmu, trace=trace)
        result = m.call("set_memory_valid", m.plan.linear + 0x200_0000, 3, 0, record="order").ok()
        results.append((result.value, list(map(str, result.changes)), list(map(str, result.events or ()))))
    assert results[0] == results[1]
