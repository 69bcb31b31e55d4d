"""Every known trap and every golden vector has a test: the tables of traps.py, and the tests that were missing.

Values were measured on Debian 6.1.176, 6.12.95, 6.12.107, 7.2.13 (16K pages) and 7.3.4.
"""

from __future__ import annotations

import ast
import functools
import string
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from emu.checks.ptdump import Bench as DumpBench
from emu.checks.ptdump_trees import Case
from emu.checks.surroundings import Surroundings
from emu.machine import Machine
from emu.reading import relocations
from kernel_model.apply import apply_to_existing_page_range
from kernel_model.levels import U64, Levels
from kernel_model.locktable import freed_by
from kernel_model.mm import Kernel, Mm, Rwsem, Warn, Write
from kernel_model.names import Bits
from kernel_model.pagewalk import Action
from kernel_model.ptdump_text import AddrMarker
from kernel_model.variants import VARIANTS, by_name
from kernel_model.vmalloc import VmFlags, VmStruct
from kernel_model.walkers import (
    walk_kernel_page_table_range,
    walk_kernel_page_table_range_lockless,
    walk_page_range,
    walk_page_range_debug,
    walk_page_range_novma,
)
from pgtable import Format
from tests.kernel_model import goldens, test_pageattr, test_split
from tests.kernel_model.bench import SEVEN, SIX, Bench, benches, tlbis, warns
from tests.kernel_model.test_pagewalk import ALL, KINDS, NEW, PAGE, PMD, PUD, SIZE_16K, V_16K, Walker
from tests.kernel_model.test_ptdump import MARKERS, L, measured
from tests.kernel_model.traps import AREA, GOLDENS, SPLITS, TRAPS, VALID
from tests.kernels import KERNELS, kernel_image

TESTS = Path(__file__).parent.parent
ROWS = {
    VALID: {vector.name for vector in goldens.VECTORS},
    AREA: set(test_pageattr.ROWS),
    SPLITS: set(test_split.ROWS),
}


# the tables


class Row(NamedTuple):
    """One row of a table: what it is called, its sentence, the tests."""

    name: str
    sentence: str
    tests: list[str]


def rows(table: str) -> list[Row]:
    found: list[Row] = []
    for line in table.strip().splitlines():
        if line.startswith(" "):
            found[-1].tests.append(line.strip())
        else:
            name, _, sentence = line.partition(":")
            found.append(Row(name, sentence.strip(), []))
    return found


@functools.cache
def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def missing(reference: str) -> list[str]:
    """What is named by a reference and not there."""
    test, _, some = reference.partition("[")
    file, _, name = test.partition("::")
    if not (TESTS / file).is_file() or name not in functions(TESTS / file):
        return [test]
    return [row for row in some.rstrip("]").split(" / ") if row and row not in ROWS[test]]


def test_every_trap_is_in_the_table_once() -> None:
    found = rows(TRAPS)
    assert [row.name for row in found] == [str(n) for n in range(1, 62)]
    assert all(row.sentence.endswith(".") for row in found)
    assert len({row.sentence for row in found}) == 61


def test_every_trap_has_a_test() -> None:
    assert [row.name for row in rows(TRAPS) if not row.tests] == []


def test_every_golden_vector_is_in_the_table_once() -> None:
    names = [name for row in rows(GOLDENS) for name in row.name.split(", ")]
    letters = {*string.ascii_uppercase, "Q2", "Q3", "pte-none", "bit58", "lock0", "inst", "low", "9.1 locks"}
    assert {name for name in names if name[:3] not in ("9.2", "9.3", "9.4", "9.5")} == letters
    assert [sum(name.startswith(part) for name in names) for part in ("9.2", "9.3", "9.4", "9.5")] == [2, 15, 10, 9]
    assert len(set(names)) == len(names)
    assert all(row.tests for row in rows(GOLDENS))


@pytest.mark.parametrize("table", [TRAPS, GOLDENS], ids=["traps", "goldens"])
def test_every_test_that_is_named_exists(table: str) -> None:
    assert [gone for row in rows(table) for reference in row.tests for gone in missing(reference)] == []


def test_every_stored_row_is_named() -> None:
    named = {row.partition("[")[0]: set[str]() for row in ROWS}
    for reference in (reference for row in rows(GOLDENS) for reference in row.tests if "[" in reference):
        test, _, some = reference.partition("[")
        named[test] |= set(some.rstrip("]").split(" / "))
    assert {test: ROWS[test] - named[test] for test in ROWS} == {test: set() for test in ROWS}


# walks


def entries(w: Walker, size: int) -> dict[str, tuple[int, int]]:
    """PA and word of the entry that each callback got last."""
    seen: dict[str, tuple[int, int]] = {}
    w.before = lambda kind, pa: seen.update({kind: (pa, w.memory.fetch(pa))} if kind != "hole" else {})
    assert w(0, size) == 0
    return seen


def test_a_folded_top_gives_the_pgd_callback_an_entry_of_another_address() -> None:
    for name in ALL:
        w = Walker(name).pages()
        seen, top = entries(w, PAGE), w.tables.slot(w.v, 0)
        assert seen["p4d"] == (top.pa, w.memory.fetch(top.pa))
        assert seen["pgd"] == (seen["p4d"] if name == "6.1" else (w.tables.root + 8 * 15, 0))
    for name in NEW:
        w = Walker(name, (0xFFF1_0000_0000_0000, Levels(12, 5, 52, 52))).pages()
        seen = entries(w, PAGE)
        assert (seen["pgd"][0], seen["p4d"][0]) == tuple(w.tables.slot(w.v, level).pa for level in (-1, 0))
        assert seen["pgd"][1] & ~0xFFF == seen["p4d"][0] & ~0xFFF


def test_with_16k_pages_the_entries_of_the_callbacks() -> None:
    w = Walker("7.x", (V_16K, Levels(14, 4, 52, 47)))
    w.tables.place(w.v, 3, 0x00E8_0000_4000_0703)
    seen = entries(w, SIZE_16K)
    assert seen["pgd"] == seen["p4d"] == (w.tables.root + 8 * 31, 0)
    assert seen["pud"][0] == w.tables.slot(w.v, 1).pa
    w = Walker("7.x", (0xFFF9_0000_0000_0000, Levels(14, 4, 52, 52)))
    w.tables.place(w.v, 3, 0x00E8_0000_4000_0403)
    seen = entries(w, SIZE_16K)
    assert seen["pgd"] == seen["p4d"] == (w.tables.slot(w.v, 0).pa, seen["pgd"][1])
    assert seen["pgd"][1] & 3 == 3


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("word", [0x4000_0001, 0x4000_0002, 0x00E8_0000_4000_0700])
def test_the_pud_and_pmd_loops_clear_nothing(name: str, level: int, word: int) -> None:
    w = Walker(name)
    w.word(w.v, level, word)
    before = w.memory.mark()
    assert w(0, PAGE) == 0
    assert w.names() == ["pgd", "p4d", "pud", "pmd"][: 2 + level]
    assert len(w.memory.changes(before).pa) == 0


@pytest.mark.parametrize("name", ALL)
def test_again_from_the_upper_callbacks_means_nothing(name: str) -> None:
    for kind in ("pgd", "p4d"):
        w = Walker(name).pages()
        w.actions[kind] = [Action.AGAIN]
        assert (w(0, PAGE), w.names()) == (0, ["pgd", "p4d", "pud", "pmd", "pte"])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("kind", "deepest"), [("pud", 3), ("pmd", 4)])
def test_an_entry_is_read_again_after_its_callback(name: str, kind: str, deepest: int) -> None:
    w = Walker(name).pages()

    def make_block(seen: str, pa: int) -> None:
        if seen == kind:
            w.memory.store(pa, 0x00E8_0000_4000_0701)

    w.before = make_block
    assert (w(0, PAGE), len(w.events)) == (0, deepest)


@pytest.mark.parametrize("name", ALL)
def test_a_walk_to_the_last_byte_visits_the_last_page(name: str) -> None:
    w = Walker(name)
    last = 0xFFFF_FFFF_FFFF_F000
    w.tables.place(last, 3, 0x00E8_0000_4000_0703)
    start = last - PMD - w.v
    assert w(start, U64 - w.v, "pmd", "pte", "hole") == 0
    assert w.events[-1] == ("pte", last - w.v, -w.v, 0x00E8_0000_4000_0703)
    assert [event[0] for event in w.events] == ["hole", "pmd", *["pte"] * 512]


@pytest.mark.parametrize("name", ALL)
def test_without_deeper_callbacks_a_leaf_is_like_a_table(name: str) -> None:
    w = Walker(name).pages()
    base = -w.v % PUD
    w.word(w.v + base, 1, 0x00E8_0000_8000_0701).word(w.v + PMD, 2, 0x00E8_0000_4020_0701)
    assert (w(base, base + 2 * PUD, "pud"), w.names()) == (0, ["pud"])
    assert (w(0, 2 * PMD, "pmd"), w.names()) == (0, ["pmd", "pmd"])
    assert (w(base, base + PUD, "pmd", "pte"), w.names()) == (0, [])
    assert (w(PMD, 2 * PMD, "pte", "hole"), w.names()) == (0, [])


@pytest.mark.parametrize("name", ALL)
def test_without_an_mm_nothing_is_walked(name: str) -> None:
    w = Walker(name).pages()
    assert walk_page_range(w.kernel, None, w.v, w.v + PAGE, w.ops(KINDS)) == -22
    if name == "6.1":
        assert walk_page_range_novma(w.kernel, None, w.v, w.v + PAGE, w.ops(KINDS)) == -22
    assert (w.events, w.kernel.events) == ([], [])


@pytest.mark.kernels
@pytest.mark.parametrize("name", [*KERNELS, "debian:6.12.95"])
def test_without_an_mm_the_compiled_walks_refuse(name: str) -> None:
    image = kernel_image(name)
    machine = Machine.boot(image)
    walks = [each for each in ("walk_page_range", "walk_page_range_novma") if each in image.symbols]
    assert len(walks) == 2 - (name in ("debian:6.12", "debian:7.3"))
    for walk in walks:
        got = machine.call(walk, 0, machine.plan.window, machine.plan.window + PAGE, machine.plan.spare).ok()
        assert (got.signed, got.warnings) == (-22, ())


# locks of walks


def warned(kernel: Kernel) -> int:
    found = sum(isinstance(event, Warn) for event in kernel.events)
    kernel.events.clear()
    return found


@pytest.mark.parametrize("name", NEW)
def test_the_debug_walk_warns_once_for_each_lock_also_for_an_empty_range(name: str) -> None:
    for mine, init, warnings in ((0, 0, 2), (1, 0, 1), (0, 1, 1), (1, 1, 0), (0x100, 0x100, 2)):
        w = Walker(name).pages()
        w.kernel.init_mm.mmap_lock = Rwsem(init)
        for size, value in ((PAGE, 0), (0, -22), (-PAGE, -22)):
            mm = Mm(w.tables.root, Rwsem(mine))
            assert walk_page_range_debug(w.kernel, mm, w.v, w.v + size, w.ops(("pte",))) == value
            assert warned(w.kernel) == warnings


def test_warns_of_a_kernel_walk_that_is_refused() -> None:
    for name, warnings in (("6.12", 0), ("7.x", 1)):
        w = Walker(name)
        assert walk_kernel_page_table_range(w.kernel, w.v, w.v, w.ops(KINDS)) == -22
        assert warned(w.kernel) == warnings
    assert walk_kernel_page_table_range_lockless(w.kernel, w.v, w.v, w.ops(KINDS)) == -22
    assert warned(w.kernel) == 0
    ops = w.ops(KINDS)
    ops.install_pte = lambda addr, next, walk: (0, 0)
    assert walk_kernel_page_table_range(w.kernel, w.v, w.v + PAGE, ops) == -22
    assert (warned(w.kernel), w.events) == (1, [])


@pytest.mark.parametrize("name", NEW)
def test_a_walk_without_the_lock_goes_on_after_its_warn(name: str) -> None:
    for count, warnings in ((0, 1), (1, 0), (0x100, 0)):
        w = Walker(name).pages()
        w.kernel.init_mm.mmap_lock = Rwsem(count)
        assert walk_kernel_page_table_range(w.kernel, w.v, w.v + PAGE, w.ops(KINDS)) == 0
        assert (warned(w.kernel), w.names()) == (warnings, ["pgd", "p4d", "pud", "pmd", "pte"])


def test_no_read_lock_keeps_tables_from_being_freed() -> None:
    for name, row in VARIANTS.items():
        found = freed_by(row)
        assert found["memory hot-unplug"].startswith("no mmap lock at all")
        trylock = name in NEW
        assert found["huge vmap"].startswith("a read trylock of init_mm's lock" if trylock else "no lock")


# pageattr.c


VA, PHYS = test_pageattr.AREA, test_pageattr.PHYS


@pytest.mark.parametrize("name", KERNELS)
def test_what_set_memory_valid_leaves_in_an_empty_pte_is_an_entry(name: str) -> None:
    for enable, left in ((1, 1), (0, 0x800 if name in SEVEN else 0)):
        bench = Bench(name)
        pte = bench.entry(VA, "PTE")
        bench.run("set_memory_valid", VA, 1, enable)
        assert bench.fetch(pte) == left
        assert apply_to_existing_page_range(bench._kernel(), VA, PAGE, lambda *_: 5) == (5 if left else 0)


def area(addr: int = VA, flags: int = VmFlags.VM_ALLOC) -> VmStruct:
    pages = tuple(PHYS + i * PAGE for i in range(test_pageattr.PAGES + 1))
    return VmStruct(addr, len(pages) * PAGE, flags, pages, test_pageattr.PAGES)


@pytest.mark.parametrize("made", benches())
def test_the_area_is_asked_about_the_address_as_given(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    around = Surroundings(bench.settings(), area=area(VA + 0x800))
    for offset, value in ((0x900, 0), (0x700, -22)):
        got = bench.run("set_memory_x", VA + offset, 0, around=around)
        assert (got.value, warns(got)) == (value, ["change_memory_common"])


@pytest.mark.parametrize("made", benches())
def test_the_flags_are_looked_at_before_the_number_of_pages(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    for flags, value in ((VmFlags.VM_ALLOC, 0), (VmFlags.VM_MAP, -22)):
        around = Surroundings(bench.settings(), area=area(flags=flags))
        assert bench.run("set_memory_ro", VA, 0, around=around).value == value


@pytest.mark.parametrize("made", benches())
def test_an_alias_that_cannot_change_is_forgotten_by_6_x_and_returned_by_7_x(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    pte = bench.lay(VA, "PTE", *(test_pageattr.VM | PHYS + i * PAGE for i in range(test_pageattr.PAGES)))
    bench.lay(bench.linear(PHYS), "PMD", test_pageattr.LINEAR & ~2 | PHYS)
    got = bench.run("set_memory_ro", VA + PAGE, 2, around=Surroundings(bench.settings(), area=area()))
    changed = [i for i in range(test_pageattr.PAGES) if bench.fetch(pte + 8 * i) != test_pageattr.VM | PHYS + i * PAGE]
    if made[1] in SEVEN:
        assert (got.value, tlbis(got), warns(got), changed) == (-22, 1, ["pageattr_pmd_entry"], [])
    else:
        assert (got.value, tlbis(got), warns(got), changed) == (0, 8, ["__apply_to_page_range"] * 6, [1, 2])


@pytest.mark.parametrize("made", benches())
def test_type_2_is_absent_or_a_leaf(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    for word in (0x00E8_0000_4000_0702, 0x00E8_0000_4000_0F02):
        bench.new()
        entry = bench.lay(VA, "PMD", word)
        got = bench.run("set_memory_valid", VA, 1, 0)
        leaf = bool(word & 0x800) and made[1] != "debian:6.1"
        assert got.value == (-22 if leaf else 0)
        assert (bench.fetch(entry) == word) == (leaf or made[1] in SEVEN)


@pytest.mark.parametrize(("there", "tables"), [("", 3), ("PUD", 2), ("PMD", 1)])
@pytest.mark.parametrize("made", benches(*SIX))
def test_6_x_makes_every_level_that_is_missing(made: tuple[type[Bench], str], there: str, tables: int) -> None:
    bench = made[0](made[1])
    if there:
        bench.entry(VA, there)
    got = bench.run("set_memory_valid", VA, 1, 1)
    assert (got.value, warns(got)) == (0, [])
    assert sum(isinstance(event, Write) and event.value & 3 == 3 for event in got.events) == tables


def test_bits_49_and_48_are_address_but_in_6_1() -> None:
    word = 0x00EB_0000_4000_0703
    for name in ALL:
        bits = Bits.of(Format(), by_name(name))
        assert bits.pte_to_phys(word) == (0x4000_0000 if name == "6.1" else 0x0003_0000_4000_0000)


# machines


@pytest.mark.kernels
@pytest.mark.parametrize("name", KERNELS)
def test_memstart_addr_is_lowered_where_fewer_bits_run_than_were_built(name: str) -> None:
    machine = Machine.boot(kernel_image(name))
    memstart = machine.word_at(machine.symbol("memstart_addr"), 8)
    assert memstart == (0x4000_0000 if name == "debian:6.1" else 0xFFF1_0000_4000_0000)
    page_offset = 0xFFFF_0000_0000_0000 if name == "debian:6.1" else 0xFFF0_0000_0000_0000
    assert memstart + (machine.plan.linear - page_offset) & U64 == machine.translate(machine.plan.linear).pa


@pytest.mark.kernels
@pytest.mark.parametrize("name", KERNELS)
def test_unmapping_warns_of_what_was_left_in_a_guard_page(name: str) -> None:
    machine = Machine.boot(kernel_image(name))
    va = machine.plan.window + (1 << 28)
    for word, warnings in ((test_pageattr.GUARD_RO, 1), (0, 0)):
        machine.tables.place(va, 3, word)
        got = machine.call("__vunmap_range_noflush", va, va + PAGE).ok()
        assert [warn.site.partition("+")[0] for warn in got.warnings] == ["__vunmap_range_noflush"] * warnings


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["debian:6.12", "debian:7.3"])
def test_kfence_is_asked_about_translation_faults_only(name: str) -> None:
    machine = Machine.boot(kernel_image(name))
    asked: list[str] = []

    def asking(function: str) -> Callable[[Machine], int]:
        def stub(_: Machine) -> int:
            asked.append(function)
            return 1

        return stub

    for function in ("kfence_handle_page_fault", "die_kernel_fault"):
        machine.stub(function, asking(function))
    machine.stub("fixup_exception", lambda _: 0)
    va = machine.plan.window + (1 << 28)
    for esr in (0x9600_0004, 0x9600_0007, 0x9600_0047):  # no table at level 0, no page, the same for a store
        machine.call("__do_kernel_fault", va, esr, machine.plan.spare).ok()
    assert asked == ["kfence_handle_page_fault"] * 3
    for esr in (0x9600_000F, 0x9600_004F):  # permission, level 3; nothing after die_kernel_fault means anything
        asked.clear()
        machine.call("__do_kernel_fault", va, esr, machine.plan.spare)
        assert asked[0] == "die_kernel_fault"


class Uninitialised(DumpBench):
    """A machine on which ptdump_init() has not run."""

    def _boot(self) -> Machine:
        machine = Machine.boot(self.image)
        machine.stub("_printk", self._print)
        return machine

    def _read_markers(self) -> tuple[AddrMarker, ...]:
        return ()


@pytest.mark.kernels
@pytest.mark.parametrize("name", KERNELS)
def test_without_ptdump_init_every_entry_prints_like_a_hole(name: str) -> None:
    bench, case = Uninitialised(kernel_image(name)), Case("measured", L, measured, MARKERS)
    lines = bench.real(case, *bench.tree(case)).text.splitlines()
    assert "0xffff000000000000-0xffff000000200000           2M PTE" in lines
    assert {line.split()[-1] for line in lines if line.startswith("0x")} == {"PGD", "PUD", "PMD", "PTE"}


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("name", "rela"),
    [("debian:6.1", True), ("debian:6.12.95", True), ("debian:6.12", False), ("debian:7.3", False)],
)
def test_relocations_are_of_the_form_that_the_toolchain_chose(name: str, rela: bool) -> None:
    image = kernel_image(name)
    found = relocations(image.data, image.base, image.symbols)
    assert (len(found.rows) > 100_000, len(found.inplace) > 100_000) == (rela, not rela)
    assert rela or len(found.rows) == 7
