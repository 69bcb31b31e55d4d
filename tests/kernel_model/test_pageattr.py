"""set_memory_ro, _rw, _nx, _x and the linear map: measured values (facts of real kernels) for the model and the real.

The rows were measured on 6.1.176, 6.12.107 and 7.3.4 over an area of six pages and its guard.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from emu.checks.surroundings import Monitor, Surroundings
from kernel_model import mem_encrypt, pageattr, stores, tlbflush
from kernel_model.mm import Barrier, Context, Kernel, Tlbi
from kernel_model.names import Bits
from kernel_model.pageattr import Masks, Rodata, parse_rodata
from kernel_model.variants import VARIANTS, by_name
from kernel_model.vmalloc import VmFlags, VmStruct
from pgtable import Format, Granule, PhysicalMemory
from tests.kernel_model.bench import SEVEN, SIX, Bench, benches, called, order, tlbis, warns

AREA, PAGE, PAGES, PHYS = 0xFFFF_8000_9000_0000, 0x1000, 6, 0x6000_0000
VM, LINEAR = 0x00E8_0000_0000_0703, 0x00E8_0000_0000_0707
VM_RO, LINEAR_RO, VM_X = 0x00E0_0000_0000_0783, 0x00E0_0000_0000_0787, 0x00C8_0000_0000_0703
GUARD_RO = 0x80
SYNC = ["dsb ishst", "isb"]


@dataclass(frozen=True)
class Row:
    """One call, as it was measured; `vm` and `linear` are the attributes of entries that are not as at the start.

    Fields with 6 or 7 in their names differ between 6.x and 7.3. `pages` None: the area is not found.
    """

    call: str
    page: int
    pages: int
    vm: dict[int, int] = field(default_factory=dict)
    linear6: dict[int, int] = field(default_factory=dict)
    linear7: dict[int, int] = field(default_factory=dict)
    tlbi6: int = 0
    tlbi7: int = 0
    value6: int = 0
    value7: int = 0
    offset: int = 0
    rodata_full: bool = True
    flags: int = VmFlags.VM_ALLOC
    area: bool = True


ALL_RO = dict.fromkeys(range(PAGES), LINEAR_RO)
TWO_RO = {1: VM_RO, 2: VM_RO}
BOTH = VmFlags.VM_ALLOC | VmFlags.VM_ALLOW_HUGE_VMAP
ROWS = {
    "ro": Row("ro", 1, 2, TWO_RO, ALL_RO, {1: LINEAR_RO, 2: LINEAR_RO}, 8, 4),
    "rw of what is": Row("rw", 1, 2, {}, {}, {}, 8, 4),
    "nx of what is": Row("nx", 1, 2, {}, {}, {}, 2, 2),
    "x": Row("x", 1, 2, {1: VM_X, 2: VM_X}, {}, {}, 2, 2),
    "ro, rodata_full=0": Row("ro", 1, 2, TWO_RO, {}, {}, 2, 2, rodata_full=False),
    "ro of no page": Row("ro", 0, 0),
    "ro with the guard": Row(
        "ro", 0, 7, {**dict.fromkeys(range(6), VM_RO), 6: GUARD_RO}, ALL_RO, {**ALL_RO, 6: GUARD_RO}, 13, 14
    ),
    "ro behind the guard": Row("ro", 0, 8, value6=-22, value7=-22),
    "ro of VM_MAP": Row("ro", 0, 6, value6=-22, value7=-22, flags=VmFlags.VM_MAP),
    "ro of no area": Row("ro", 0, 6, value6=-22, value7=-22, area=False),
    "ro unaligned": Row("ro", 1, 1, {1: VM_RO}, ALL_RO, {1: LINEAR_RO}, 7, 2, offset=0x123),
}


def lay(bench: Bench) -> tuple[int, int]:
    """The area's PTEs and those of its linear alias; PAs of the first of each."""
    vm = bench.lay(AREA, "PTE", *(VM | PHYS + i * PAGE for i in range(PAGES)))
    linear = bench.lay(bench.linear(PHYS), "PTE", *(LINEAR | PHYS + i * PAGE for i in range(PAGES)))
    return vm, linear


def attributes(bench: Bench, first: int, plain: int) -> dict[int, int]:
    """Entries that are not `plain`, without their address, by index; the guard is plain when it is 0."""
    found = {}
    for i in range(PAGES + 1):
        word = bench.fetch(first + 8 * i)
        address = PHYS + i * PAGE if i < PAGES else 0
        if word != (plain | address if i < PAGES else 0):
            found[i] = word ^ address
    return found


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("made", benches())
def test_permissions_of_an_area_are_as_measured(made: tuple[type[Bench], str], row: Row) -> None:
    bench = made[0](made[1])
    vm, linear = lay(bench)
    pages = tuple(PHYS + i * PAGE for i in range(PAGES + 1))
    area = VmStruct(AREA, (PAGES + 1) * PAGE, row.flags, pages, PAGES) if row.area else None
    around = Surroundings(bench.settings(rodata_full=row.rodata_full), area=area)
    got = bench.run(f"set_memory_{row.call}", AREA + row.page * PAGE + row.offset, row.pages, around=around)

    seven = made[1] in SEVEN
    assert got.value == (row.value7 if seven else row.value6)
    assert attributes(bench, vm, VM) == row.vm
    assert attributes(bench, linear, LINEAR) == (row.linear7 if seven else row.linear6)
    assert tlbis(got) == (row.tlbi7 if seven else row.tlbi6)
    assert called(got) == (["vm_unmap_aliases"] if row.vm or tlbis(got) else [])
    assert warns(got) == (["change_memory_common"] if row.offset else [])


@pytest.mark.parametrize("made", benches())
def test_huge_vmap_is_refused_by_7_x_only(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    vm, _ = lay(bench)
    area = VmStruct(AREA, (PAGES + 1) * PAGE, BOTH, tuple(PHYS + i * PAGE for i in range(PAGES)))
    got = bench.run("set_memory_ro", AREA, 1, around=Surroundings(bench.settings(), area=area))
    assert (got.value, tlbis(got)) == ((-22, 0) if made[1] in SEVEN else (0, 7))
    assert attributes(bench, vm, VM) == ({} if made[1] in SEVEN else {0: VM_RO})


@pytest.mark.parametrize("made", benches(*SIX))
def test_6_x_makes_tables_in_a_hole_and_bits_in_none_ptes(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    bench.entry(AREA, "PMD")
    got = bench.run("set_memory_valid", AREA, 2, 1)
    assert got.value == 0
    table = bench.fetch(bench.entry(AREA, "PMD")) & 0xFFFF_FFFF_F000
    assert [bench.fetch(table + 8 * i) for i in range(3)] == [1, 1, 0]


@pytest.mark.parametrize("word", [0x00E8_0000_4000_0700, 0x00E8_0000_4000_0702], ids=hex)
@pytest.mark.parametrize("made", benches())
def test_what_is_bad_at_the_pmd_level_is_replaced_by_6_x_and_skipped_by_7_x(
    made: tuple[type[Bench], str], word: int
) -> None:
    bench = made[0](made[1])
    entry = bench.lay(AREA, "PMD", word)
    got = bench.run("set_memory_valid", AREA, 1, 0)
    assert got.value == 0
    assert warns(got) == ([] if made[1] in SEVEN else ["__apply_to_page_range"])
    assert (bench.fetch(entry) == word) == (made[1] in SEVEN)


@pytest.mark.parametrize("made", benches())
def test_a_block_marked_present_invalid_is_bad_to_6_1_and_a_leaf_later(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    word = 0x00E8_0000_4000_0F00
    entry = bench.lay(AREA, "PMD", word)
    got = bench.run("set_memory_valid", AREA, 1, 0)
    assert (got.value, len(warns(got))) == ((0, 1) if made[1] == "debian:6.1" else (-22, 1))
    assert (bench.fetch(entry) == word) == (made[1] != "debian:6.1")


# the linear map


@pytest.mark.parametrize("made", benches())
def test_the_noflush_calls_do_not_flush_and_do_nothing_without_leave(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    keeps = made[1] in SEVEN
    entry = bench.lay(bench.linear(PHYS), "PTE", LINEAR_RO | PHYS)
    for function, word in (
        ("set_direct_map_invalid_noflush", LINEAR_RO & ~1 | (0x800 if keeps else 0) | PHYS),
        ("set_direct_map_default_noflush", LINEAR | PHYS),
    ):
        got = bench.run(function, PHYS)
        assert (got.value, tlbis(got), bench.fetch(entry)) == (0, 0, word)
        leave = bench.settings(rodata_full=False, kfence_early=True, kfence=False)
        got = bench.run(function, PHYS, around=Surroundings(leave))
        assert (got.value, bench.fetch(entry)) == (0, LINEAR_RO | PHYS)


@pytest.mark.parametrize("made", benches(*SEVEN))
def test_set_direct_map_valid_noflush_flushes_what_it_makes_invalid(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    bench.lay(bench.linear(PHYS), "PTE", LINEAR | PHYS, LINEAR | PHYS + PAGE)
    assert tlbis(bench.run("set_direct_map_valid_noflush", PHYS, 2, 0)) == 2
    assert tlbis(bench.run("set_direct_map_valid_noflush", PHYS, 2, 1)) == 0


PRESENT = {
    "page": ("PTE", 0x00E8_0000_6000_0707, 1, 1),
    "page without VALID": ("PTE", 0x00E8_0000_6000_0706, 0, 0),
    "page marked present-invalid": ("PTE", 0x00E8_0000_6000_0F06, 0, 0),
    "none": ("PTE", 0, 0, 0),
    "block": ("PMD", 0x00E8_0000_6000_0705, 1, 1),
    "block of a PUD": ("PUD", 0x00E8_0000_4000_0705, 1, 1),
    "no PMD": ("PMD", 0, 0, 0),
    "no PUD": ("PUD", 0, 0, 0),
}


@pytest.mark.parametrize("case", PRESENT.values(), ids=PRESENT)
@pytest.mark.parametrize("made", benches())
def test_kernel_page_present(made: tuple[type[Bench], str], case: tuple[str, int, int, int]) -> None:
    bench = made[0](made[1])
    level, word, six, seven = case
    bench.lay(bench.linear(PHYS), level, word)
    assert bench.run("kernel_page_present", PHYS).value == (seven if made[1] in SEVEN else six)


@pytest.mark.parametrize("made", benches(*SEVEN))
def test_kernel_page_present_knows_an_invalid_block_in_7_x(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    bench.lay(bench.linear(PHYS), "PMD", 0x00E8_0000_6000_0F04)
    assert bench.run("kernel_page_present", PHYS).value == 0


@pytest.mark.parametrize("made", benches())
def test_stock_kfence_lets_the_direct_map_be_set_with_rodata_off(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    late, early = (bench.settings(rodata_full=False, kfence_early=early) for early in (False, True))
    assert bench.run("can_set_direct_map", around=Surroundings(late)).value == int(made[1] != "debian:6.1")
    assert bench.run("can_set_direct_map", around=Surroundings(early)).value == 0
    assert bench.run("can_set_direct_map").value == 1


# lazy MMU mode and interrupts


@pytest.mark.parametrize("made", benches(*SEVEN))
def test_in_an_interrupt_every_pte_has_its_barriers(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    bench.lay(AREA, "PTE", *(VM & ~1 | 0x800 | PHYS + i * PAGE for i in range(3)))
    assert order(bench.run("set_memory_valid", AREA, 3, 1)) == SYNC
    for context in (Context.SOFTIRQ, Context.HARDIRQ):
        got = bench.run("set_memory_valid", AREA, 3, 1, around=Surroundings(bench.settings(), context))
        assert order(got) == SYNC * 3


def lazy_kernel(name: str = "7.x") -> Kernel:
    """A kernel with one PTE at 0x40000000."""
    levels = Bench("debian:7.3").levels
    bits = Bits.of(Format(Granule.K4), by_name(name))
    return Kernel(PhysicalMemory((0x4000_0000, 1 << 16)), 0x4000_0000, levels, bits)


def barriers(kernel: Kernel) -> int:
    """Pairs of barriers since the last time."""
    found = kernel.events.count(Barrier("isb"))
    kernel.events.clear()
    return found


def test_lazy_sections_nest_and_the_end_of_each_emits_what_is_pending() -> None:
    kernel = lazy_kernel()
    stores.lazy_mmu_mode_enable(kernel)
    stores.set_pte(kernel, 0x4000_0000, VM)
    stores.set_pte(kernel, 0x4000_0008, VM)
    stores.lazy_mmu_mode_enable(kernel)
    assert barriers(kernel) == 0
    stores.lazy_mmu_mode_disable(kernel)
    assert barriers(kernel) == 1
    assert stores.is_lazy_mmu_mode_active(kernel)
    stores.lazy_mmu_mode_disable(kernel)
    assert barriers(kernel) == 0
    assert not stores.is_lazy_mmu_mode_active(kernel)


def test_a_paused_section_is_none() -> None:
    kernel = lazy_kernel()
    stores.lazy_mmu_mode_enable(kernel)
    stores.set_pte(kernel, 0x4000_0000, VM)
    stores.lazy_mmu_mode_pause(kernel)
    assert barriers(kernel) == 1
    stores.lazy_mmu_mode_enable(kernel)
    stores.set_pte(kernel, 0x4000_0000, VM)
    assert barriers(kernel) == 1
    stores.lazy_mmu_mode_disable(kernel)
    stores.lazy_mmu_mode_resume(kernel)
    stores.set_pte(kernel, 0x4000_0000, VM)
    assert barriers(kernel) == 0
    assert kernel.lazy.enable_count == 1


def test_6_x_has_no_lazy_mode() -> None:
    kernel = lazy_kernel("6.12")
    stores.lazy_mmu_mode_enable(kernel)
    stores.set_pte(kernel, 0x4000_0000, VM)
    assert barriers(kernel) == 1


def test_only_valid_ptes_that_el0_cannot_reach_are_ordered() -> None:
    kernel = lazy_kernel()
    for word, ordered in ((VM, 1), (VM & ~1, 0), (VM & ~(1 << 54), 0), (VM | 1 << 6, 0), (0x1, 0)):
        stores.set_pte(kernel, 0x4000_0000, word)
        assert barriers(kernel) == ordered
    for word, ordered in ((0x1, 1), (0x3, 1), (0xF00, 0)):
        stores.set_pmd(kernel, 0x4000_0000, word)
        assert barriers(kernel) == ordered
    stores.set_p4d(kernel, 0x4000_0000, 0)
    assert barriers(kernel) == 1


# the TLB


def flushed(name: str, start: int, end: int, **settings: bool) -> list[tuple[str, int]]:
    kernel = lazy_kernel(name)
    for setting, value in settings.items():
        setattr(kernel.settings, setting, value)
    tlbflush.flush_tlb_kernel_range(kernel, start, end)
    return [(e.operation, e.operand) for e in kernel.events if isinstance(e, Tlbi)]


V = 0xFFFF_8000_9000_0000
OPERAND = V >> 12 & (1 << 44) - 1
TG_4K = 1 << 46


def test_a_cpu_with_range_tlbi_flushes_by_powers_of_two_and_an_odd_page_alone() -> None:
    base = V >> 12 & (1 << 37) - 1

    def ranged(page: int, scale: int, num: int) -> tuple[str, int]:
        return "RVAALE1IS", base + page | TG_4K | scale << 44 | num << 39

    assert flushed("7.x", V, V + PAGE, tlb_range=True) == [("VAALE1IS", OPERAND)]
    assert flushed("7.x", V, V + 2 * PAGE, tlb_range=True) == [ranged(0, 0, 0)]
    assert flushed("7.x", V, V + 3 * PAGE, tlb_range=True) == [ranged(0, 0, 0), ("VAALE1IS", OPERAND + 2)]
    assert flushed("7.x", V, V + 512 * PAGE, tlb_range=True) == [ranged(0, 1, 7)]
    assert flushed("7.x", V, V + (1 << 21) * PAGE, tlb_range=True) == [ranged(0, 3, 31)]
    assert flushed("7.x", V, V + ((1 << 21) + 1) * PAGE, tlb_range=True) == [("VMALLE1IS", 0)]
    assert flushed("6.12", V, V + 2 * PAGE, tlb_range=True) == [("VAALE1IS", OPERAND), ("VAALE1IS", OPERAND + 1)]


def test_rounding_and_the_limit_are_the_kernels_own() -> None:
    assert len(flushed("6.12", V + 0x123, V + PAGE + 0x123)) == 1
    assert len(flushed("7.x", V + 0x123, V + PAGE + 0x123)) == 2
    assert len(flushed("6.12", V, V + 512 * PAGE)) == 512
    assert flushed("7.x", V, V + 512 * PAGE) == flushed("6.12", V, V + 513 * PAGE) == [("VMALLE1IS", 0)]
    assert flushed("6.12", V, V) == []


# realms


@pytest.mark.parametrize("made", benches(*SEVEN))
def test_a_realm_makes_pages_invalid_asks_the_monitor_and_makes_them_valid(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    shared = 1 << 40
    entry = bench.lay(bench.linear(PHYS), "PTE", LINEAR | PHYS)
    around = Surroundings(bench.settings(realm=True, ns_shared=shared), monitor=Monitor.IN_PARTS)
    got = bench.run("set_memory_decrypted", bench.linear(PHYS), 1, around=around)
    assert (got.value, bench.fetch(entry)) == (0, LINEAR | PHYS | shared)
    assert called(got) == ["rsi_set_addr_range_state"]
    assert tlbis(got) == 1
    refused = Surroundings(bench.settings(realm=True, ns_shared=shared), monitor=Monitor.REJECTS)
    got = bench.run("set_memory_decrypted", bench.linear(PHYS), 1, around=refused)
    assert (got.value, bench.fetch(entry)) == (-22, LINEAR & ~1 | 0x800 | PHYS | shared)
    assert warns(got) == ["realm_set_memory_decrypted"]


@pytest.mark.parametrize("made", benches(*SEVEN))
def test_outside_the_linear_map_a_realm_refuses_and_an_unaligned_address_counts_as_done(
    made: tuple[type[Bench], str],
) -> None:
    bench = made[0](made[1])
    around = Surroundings(bench.settings(realm=True))
    assert bench.run("set_memory_encrypted", AREA, 1, around=around).value == -22
    got = bench.run("set_memory_encrypted", bench.linear(PHYS) + 1, 1, around=around)
    assert (got.value, warns(got)) == (0, ["set_memory_encrypted"])
    assert bench.run("set_memory_encrypted", AREA, 1).value == 0


def test_the_states_that_a_realm_asks_for() -> None:
    kernel = lazy_kernel()
    mem_encrypt.rsi_set_memory_range(kernel, 0, PAGE, mem_encrypt.Ripas.RSI_RIPAS_RAM)
    assert str(kernel.events[-1]) == "rsi_set_addr_range_state(0x0, 0x1000, 0x1, 0x1)"


# rodata=


@pytest.mark.parametrize("name", VARIANTS)
def test_rodata_on_means_full_in_7_x_where_full_is_no_word(name: str) -> None:
    variant = by_name(name)
    seven = name.startswith("7")
    assert parse_rodata(variant, "off") == Rodata(False, False)
    assert parse_rodata(variant, "on") == Rodata(True, seven)
    assert parse_rodata(variant, "full") == (None if seven else Rodata(True, True))
    assert parse_rodata(variant, "noalias") == (Rodata(True, False) if seven else None)


def test_clear_comes_before_set() -> None:
    assert pageattr.masked(0x800, Masks(0x801, 0x800)) == 0x801
    assert pageattr.masked(0x801, Masks(0x800, 0x801)) == 0x800
