"""The break-before-make checker: the Arm ARM's list of changes, the steps, table pages, registers, the language."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pgtable import Format, Granule, Regime, Registers, WalkParams, tlb
from pgtable.bbm import Checker, check, format_program, parse_program, run
from pgtable.tlb_changes import Changes
from pgtable.tlb_events import Dsb, Event, Isb, Return, TableFree, Tlbi, Write
from pgtable.tlb_program import ProgramError
from pgtable.tlbi import OPERATIONS, decode, operand_for
from tests.pgtable.programs import CASES, Case, verdict

VA, SLOT = 0xFFFF_0000_0000_1000, 0x4000_3008
PARAMS = parse_program("").params
RW, RO, NG = 0x60000050000703, 0x60000050000783, 0x60000050000F03
MOVED = 0x60000050001703


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verdict_of_the_checker(case: Case) -> None:
    assert verdict(run(parse_program(case.text)), cause=True) == case.bbm


# Descriptor bits, typed again.
AP2, NGB, AF, CONT, NT, DBM, PXN, UXN, GP = (
    *(1 << 7, 1 << 11, 1 << 10, 1 << 52, 1 << 16),
    *(1 << 51, 1 << 53, 1 << 54, 1 << 50),
)

# level, old, new, FEAT_BBM level, rule, whether a TLB may hold what is now wrong. R_WHZWS, D8.17.2.
CHANGES = (
    (3, 0, RW, 0, "", False),
    (3, RW, 0, 0, "", True),
    (3, RW, RW, 0, "", False),
    (3, RW & ~AF, MOVED, 0, "", False),  # never cached: AF = 0 faults
    (3, RW, RW & ~AF, 0, "", False),
    (3, RW, RW | 1 << 55, 0, "", False),  # software's
    (3, RW, RW & ~AF | 1 << 58, 0, "", False),
    (3, RW, RO, 0, "", True),
    (3, RO, RW, 0, "", False),
    (3, RW, RW & ~PXN, 0, "", False),
    (3, RW & ~PXN, RW, 0, "", True),
    (3, RW | GP, RW, 0, "", False),
    (3, RW, RW | GP, 0, "", True),
    (3, RW, MOVED, 0, "output address", True),
    (3, RW, MOVED, 2, "output address", True),
    (3, RO, MOVED | AP2, 0, "output address", True),
    (3, RW, RW | 3 << 2, 0, "memory type", True),
    (3, RW | 3 << 2, RW | 4 << 2, 0, "memory type", True),  # Device-nGnRnE to nGnRE
    (3, RW, RW | 2 << 2, 0, "cacheability", True),
    (3, RW, RW | 1 << 2, 0, "", False),  # the same MAIR byte
    (3, RW, RW ^ 3 << 8, 0, "shareability", True),
    (3, RW | 3 << 2, (RW | 3 << 2) ^ 1 << 8, 0, "", False),  # Device memory is outer shareable whatever SH says
    (3, NG, RW, 0, "global over non-global", True),
    (3, RW, NG, 0, "", True),
    (3, RW | CONT, RW, 0, "contiguous", True),
    (3, RW, RW | CONT, 0, "contiguous", True),
    (3, RW, RW | CONT, 1, "", True),
    (3, RW, RW | CONT, 3, "", False),
    (2, 0x40003003, 0x40004003, 0, "table address", True),
    (2, 0x40003003, 0x40004003, 2, "table address", True),
    (2, 0x40003003, 0x40003003 | 1 << 59, 0, "", True),  # PXNTable
    (2, 0x40003003 | 1 << 59, 0x40003003, 0, "", False),
    (2, 0x40003003, 0x40003003 | 1 << 10, 0, "", False),
    (2, RW & ~2, 0x40003003, 0, "block size", True),
    (2, 0x40003003, RW & ~2, 0, "block size", True),
    (2, RW & ~2, 0x40003003, 1, "block size", True),
    (2, RW & ~2 | NT, 0x40003003, 1, "", True),
    (2, 0x40003003, RW & ~2 | NT, 1, "", True),
    (2, RW & ~2, RW & ~2 | NT, 1, "", True),
    (2, RW & ~2 | NT, RW & ~2, 1, "", False),
    (2, RW & ~2, 0x40003003, 2, "", True),
    (2, RW & ~2, 0x40003003, 3, "", False),
)


@pytest.mark.parametrize(("level", "old", "new", "bbm", "rule", "unclean"), CHANGES)
def test_changes(level: int, old: int, new: int, bbm: int, rule: str, unclean: bool) -> None:
    changes = Changes(PARAMS, bbm)
    assert changes(level, old, new) == (rule, unclean)
    assert changes(level, old, new) == (rule, unclean)  # from memory


def test_read_only_pages_with_equal_contents_may_move() -> None:
    changes = Changes(PARAMS, 0, lambda a, b, size: (a, b, size) == (0x5000_0000, 0x5000_1000, 4096))
    assert changes(3, RO, MOVED | AP2) == ("", True)
    assert changes(3, RO, (MOVED | AP2) + 4096) == ("output address", True)
    assert changes(3, RO, MOVED) == ("output address", True)  # writable afterwards


def test_a_clean_page_that_hardware_may_make_writable_is_writable() -> None:
    regs = parse_program("").registers
    hd = WalkParams.of(regs.replace(TCR_EL1=regs.TCR_EL1 | 1 << 39 | 1 << 40), Regime.EL10, VA)
    changes = Changes(hd, 0, lambda a, b, size: True)
    assert changes(3, RO | DBM, MOVED | AP2 | DBM).rule == "output address"
    assert changes(3, RW | DBM, RO | DBM) == ("", False)  # cleaned: the next write marks it again


def test_lpa2_descriptors_have_no_shareability() -> None:
    regs = parse_program("").registers
    wide = WalkParams.of(regs.replace(TCR_EL1=regs.TCR_EL1 | 1 << 59), Regime.EL10, VA)
    assert wide.fmt == Format(Granule.K4, ds=True)
    assert Changes(wide, 0)(3, RW, RW ^ 1 << 8).rule == "output address"  # those bits are OA[51:50]


def test_the_el2_regime_has_no_asids_and_one_execute_never() -> None:
    changes = Changes(parse_program("regime EL2\n").params, 0)
    assert changes(3, NG, RW) == ("", False)
    assert changes(3, RW & ~UXN, RW) == ("", True)


def flush(cpu: int = 0, name: str = "VAALE1IS", va: int = VA) -> list[Event]:
    """DSB ISHST, TLBI, DSB ISH."""
    return [Dsb(cpu, "ishst"), Tlbi(cpu, decode(name, operand_for(name, va))), Dsb(cpu, "ish"), Isb(cpu)]


def rules(events: list[Event], **options: Any) -> list[str]:
    """The rules of what is found, with causes."""
    return [f"{f.rule} ({f.cause})" if f.cause else f.rule for f in check(events, PARAMS, **options)]


def write(old: int, new: int, *, cpu: int = 0, pc: int = 0, pa: int = SLOT, level: int = 3, va: int = VA) -> Write:
    return Write(cpu, pc, pa, level, va, old, new)


def test_a_finding_names_everything() -> None:
    events: list[Event] = [write(RW, 0, pc=0x100), write(0, MOVED, cpu=1, pc=0x200), *flush(1)]
    (found,) = check(events, PARAMS, symbol={0x100: "breaker", 0x200: "maker"}.get)
    assert (found.rule, found.cause, found.level, found.va, found.pa) == ("make before clean", "no TLBI", 3, VA, SLOT)
    assert (found.old, found.new, found.cpu, found.pc, found.symbol) == (RW, MOVED, 1, 0x200, "maker")
    assert (found.write_cpu, found.write_pc, found.write_symbol) == (0, 0x100, "breaker")
    assert str(found) == (
        "make before clean (no TLBI): 0xffff000000001000 L3 [0x40003008] 0x0060000050000703 -> 0x0060000050001703; "
        "cpu1 at maker, written by cpu0 at breaker"
    )


def test_writing_the_old_content_back_needs_nothing() -> None:
    assert rules([write(RW, 0), Dsb(0, "ishst"), write(0, RW), Return(0)]) == []


def test_writing_back_less_needs_a_tlbi() -> None:
    assert rules([write(RW, 0), write(0, RO), Return(0)]) == ["unclean at return (no TLBI)"]
    assert rules([write(RW, 0), write(0, RO), *flush(), Return(0)]) == []


def test_a_second_break_starts_anew() -> None:
    events: list[Event] = [
        write(RW, 0),
        Dsb(0, "ish"),
        Tlbi(0, decode("VMALLE1IS")),
        write(0, RW),
        write(RW, 0),
        Dsb(0, "ish"),
    ]
    assert rules([*events, Return(0)]) == ["unclean at return (no TLBI)"]


def test_every_cpu_by_itself() -> None:
    """Local TLBIs on each CPU are as good as a broadcast one, once the store is visible to all."""
    own: list[list[Event]] = [[Tlbi(cpu, decode("VMALLE1")), Dsb(cpu, "nsh")] for cpu in (0, 1)]
    assert rules([write(RW, 0), Dsb(0, "ishst"), *own[0], *own[1], Return(0)]) == []
    assert rules([write(RW, 0), Dsb(0, "ishst"), *own[0], Return(0)]) == ["unclean at return (TLBI not broadcast)"]
    narrow: list[Event] = [write(RW, 0), Dsb(0, "nshst"), *own[0], *own[1], Return(0)]
    assert rules(narrow) == ["unclean at return (TLBI before DSB)"]


def test_another_cpu_may_do_the_tlbi_and_its_dsb() -> None:
    events: list[Event] = [write(RW, 0), Dsb(0, "ishst"), Tlbi(1, decode("VMALLE1IS")), Dsb(1, "ish"), Return(0)]
    assert rules(events) == []


def test_returns_are_each_cpus_own() -> None:
    assert rules([write(RW, 0), Return(1)]) == []


def test_a_store_to_a_page_in_no_tree_is_not_minded() -> None:
    assert rules([write(RW, MOVED)._replace(va=None), Return(0)]) == []


def test_a_removed_table_is_no_table_any_more_once_it_is_clean() -> None:
    link = write(0x40003003, 0, pa=0x4000_2000, level=2, va=VA & -(1 << 21))
    used_again = write(RW, 0x1234_5703)
    assert rules([link, *flush(name="VAAE1IS"), used_again, Return(0)]) == []
    assert rules([link, Dsb(0, "ishst"), used_again, *flush(name="VAAE1IS"), Return(0)]) == ["output address"]


def test_a_table_must_be_clean_when_it_is_freed() -> None:
    link = write(0x40003003, 0, pa=0x4000_2000, level=2, va=VA & -(1 << 21))
    assert rules([link, *flush(name="VAAE1IS"), TableFree(0x4000_3000)]) == []
    assert rules([link, *flush(), TableFree(0x4000_3000), Return(0)]) == [
        "table freed before invalidation (leaf-only TLBI of a table)"
    ]


def test_what_one_descriptor_needs_says_nothing_about_another() -> None:
    other = write(RW, 0, pa=SLOT + 8, va=VA + 4096)
    assert rules([write(RW, 0), other, *flush(), Return(0)]) == ["unclean at return (no TLBI)"]


def test_a_snapshot_brings_everything_back(rng: random.Random) -> None:
    for case in CASES:
        program = parse_program(case.text)
        checker = Checker(program.params, cpus=program.scene.cpus, bbm=program.scene.bbm)
        cut = rng.randrange(len(program.events) + 1)
        for event in program.events[:cut]:
            checker.feed(event)
        state, key = checker.snapshot(), checker.key()
        hash(key)
        for event in program.events[cut:]:
            checker.feed(event)
        first, last = list(map(str, checker.findings)), checker.key()
        checker.restore(state)
        assert checker.key() == key
        for event in program.events[cut:]:
            checker.feed(event)
        assert (list(map(str, checker.findings)), checker.key()) == (first, last)


# The language.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_program_is_written_and_read_back(case: Case) -> None:
    program = parse_program(case.text)
    assert parse_program(format_program(program)) == program


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpu0 jump 1", "line 1: 'jump' is no step; steps are dsb, fetch, free"),
        ("\n\nhello", "line 3: 'hello' is neither a step"),
        ("cpu5 isb", r"line 1: cpu5: there are 2 CPUs \(say `cpus 6`\)"),
        ("cpu0 write 0x40003008 L3 1", "line 1: write takes PA Ln OLD -> NEW"),
        ("cpu0 write 0x40003008 L2 1 -> 0", "line 1: PA 0x40003008 is in a level 3 table, not level 2"),
        ("cpu0 write 0x40003009 L3 1 -> 0", "line 1: PA 0x40003009 is not a multiple of 8"),
        (
            "cpu0 write 0x40003008 L3 1 -> 0\ncpu0 write 0x40003008 L3 1 -> 0",
            "line 2: PA 0x40003008 holds 0x0, not 0x1",
        ),
        ("cpu0 write 0x50000008 L3 1 -> 0", r"line 1: PA 0x50000008 is in no table: say where it translates \(va VA\)"),
        (
            "cpu0 write 0x50000008 L3 1 -> 0 va 0x1000",
            "line 1: VA 0x1000 is in the lower half, the tables are of the upper",
        ),
        ("cpu0 write 0x50000008 L3 1 -> 0 va 0xffff800000000000", "line 1: PA 0x50000008 is entry 1 of its table"),
        (
            "cpu0 write 0x50000008 L3 1 -> 0 va 0xffff000000001000",
            "its level 3 table at PA 0x40003000, not at 0x50000000",
        ),
        (
            "cpu0 write 0x40003008 L3 1 -> 0 va 0xffff000000002000",
            "PA 0x40003008 translates 0xffff000000001000, not 0xf",
        ),
        ("half lower\ncpu0 read 0xffff000000001000", "line 2: VA 0xffff000000001000 is in the upper half"),
        ("cpu0 write x L3 1 -> 0", "line 1: 'x' is not a number"),
        ("cpu0 tlbi vae9 0", "line 1: no TLBI operation is called vae9"),
        ("cpu0 tlbi vae1is", "line 1: tlbi vae1is takes an address"),
        ("cpu0 tlbi vmalle1is 0", "line 1: tlbi vmalle1is takes no address"),
        ("cpu0 tlbi rvae1is 0x1000 pages 3", "line 1: 3 pages: no range operation has exactly this size"),
        ("cpu0 dsb all", "line 1: dsb takes one of ish,"),
        ("cpu0 isb now", "line 1: isb takes nothing, not 'now'"),
        ("cpu0 msr FOO 1", "line 1: register FOO is not one that a translation reads"),
        ("cpu0 read", "line 1: read takes a VA"),
        ("cpu0 isb\nbbm 2", "line 2: bbm must stand before the first step"),
        ("bbm 4", "line 1: bbm 4: must be 0 to 3"),
        ("granule 8K", "line 1: granule 8K: must be 4K, 16K or 64K"),
        ("half middle", "line 1: half middle: must be upper or lower"),
        ("word 0x1000", "line 1: word takes NAME = VALUE"),
        ("word 0x1000 = 0x10000000000000000", "line 1: 0x10000000000000000 does not fit in 64 bits"),
    ],
)
def test_errors_are_one_sentence_with_the_line(text: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message) as caught:
        parse_program(text)
    assert "\n" not in str(caught.value)


def test_where_a_write_translates_is_found_in_the_tables() -> None:
    program = parse_program(
        "cpu0 write 0x40004010 L3 0 -> 0x60000050000703\n"  # in no tree yet
        "cpu0 write 0x40002018 L2 0 -> 0x40004003\n"
        "cpu0 write 0x40004018 L3 0 -> 0x60000050000703\n"
        "cpu0 write 0x40002018 L2 0x40004003 -> 0\n"
        "cpu0 write 0x40004018 L3 0x60000050000703 -> 0\n"
    )
    vas = [event.va for event in program.events if isinstance(event, Write)]
    base = 0xFFFF_0000_0060_0000
    assert vas == [None, base, base + 3 * 4096, base, base + 3 * 4096]


def test_a_va_puts_a_page_of_descriptors_where_it_translates() -> None:
    text = (
        "cpu0 write 0x50000008 L3 0x60000050000703 -> 0 va 0xffff800080001000\ncpu0 dsb ish\ncpu0 isb\ncpu0 return\n"
        "cpu1 read 0xffff800080001000\n"
    )
    program = parse_program(text)
    assert [f.rule for f in run(program)] == ["unclean at return"]
    assert [f.rule for f in tlb.run(program)] == ["missing invalidation"]
    assert parse_program(format_program(program)) == program
    moved = parse_program("tables none\n" + text.replace("0x50000008", "0x40003008"))
    assert [f.rule for f in tlb.run(moved)] == ["missing invalidation"]


def test_other_granules_and_halves() -> None:
    program = parse_program("granule 16K\nhalf lower\nva_bits 47\ncpu0 write 0x40008008 L3 0 -> 0x60000050000703\n")
    (event,) = program.events
    assert isinstance(event, Write)
    assert event.va == 0x4000
    assert program.params.fmt.granule is Granule.K16


def test_xt_is_taken_as_it_is() -> None:
    (event,) = parse_program("cpu0 tlbi rvaale1is xt 0x5f8000000001 @0x42\n").events
    assert isinstance(event, Tlbi)
    assert (event.op.operand, event.pc) == (0x5F8000000001, 0x42)


def test_every_operation_can_be_said(rng: random.Random) -> None:
    for name, row in OPERATIONS.items():
        xt = f" xt {rng.getrandbits(64):#x}" if row.takes_operand else ""
        (event,) = parse_program(f"cpu0 tlbi {name.lower()}{xt}\n").events
        assert isinstance(event, Tlbi)
        assert event.op.name == name


def test_registers_are_what_linux_has() -> None:
    regs = parse_program("asid 7\n").registers
    assert isinstance(regs, Registers)
    assert (PARAMS.txsz, PARAMS.fmt.granule, PARAMS.base, PARAMS.mmu_on) == (16, Granule.K4, 0x4000_0000, True)
    assert WalkParams.of(regs, Regime.EL10, VA).asid == 7
