"""kernel_model.ptdump against texts that real kernels wrote, as literals: facts/kernel.md 5.4, and its traps.

`dumped` is the small table of 5.4; test_ptdump_real.py gives the same table to the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from kernel_model import contpte, ptdump
from kernel_model.levels import U64, Levels
from kernel_model.mm import Kernel, Runaway, Warn, Write
from kernel_model.names import Bits
from kernel_model.ptdump import Insecure, WxCount
from kernel_model.ptdump_text import AddrMarker, address_markers, level_name, pte_bits, size
from kernel_model.variants import V6_12_NOVMA, by_name
from pgtable import Format, Granule, PhysicalMemory
from pgtable.build import TableBuilder

RAM = (0x5000_0000, 2 << 20)
L, V, TOP = 0xFFFF_0000_0000_0000, 0xFFFF_8000_8000_0000, 0xFFFF_FFFF_FFFF_F000
LINEAR = 0x00E8_0000_0000_0707  # PAGE_KERNEL, tagged
BLOCK = 0x00E8_0000_0000_0705
CONT = 1 << 52

BUILDS = {
    "6.1": Levels(12, 4, 48, 48),
    "6.12": Levels(12, 5, 52, 48),
    "7.x": Levels(12, 5, 52, 48),
}
ALL = sorted(BUILDS)
MARKERS = (
    AddrMarker(L, "Linear Mapping start"),
    AddrMarker(0xFFFF_8000_0000_0000, "Linear Mapping end"),
    AddrMarker(V, "vmalloc() area"),
    AddrMarker(U64, ""),
)

Fill = Callable[[TableBuilder], None]


def kernel(name: str, fill: Fill, levels: Levels | None = None, *, upper: bool = True) -> Kernel:
    """A model kernel over tables that `fill` filled."""
    levels = levels or BUILDS[name]
    fmt = Format(Granule(levels.page_shift), ds=levels.va_bits > 48)
    memory = PhysicalMemory(RAM)
    tables = TableBuilder(memory, RAM, fmt=fmt, va_bits=levels.va_bits, upper=upper)
    fill(tables)
    return Kernel(memory, tables.root, levels, Bits.of(fmt, by_name(name)), step_limit=200_000)


def dump(name: str, fill: Fill, markers: tuple[AddrMarker, ...] = MARKERS, base: int = L) -> list[str]:
    """The lines of a dump."""
    return ptdump.ptdump_walk(kernel(name, fill), markers, base=base).split("\n")


def words(*entries: tuple[int, int, int]) -> Fill:
    """Places (va, level, word)."""

    def fill(tables: TableBuilder) -> None:
        for entry in entries:
            tables.place(*entry)

    return fill


def measured(tables: TableBuilder) -> None:
    """The table of 5.4."""
    for i in range(16):
        tables.place(L + i * 0x1000, 3, LINEAR | i * 0x1000)
        tables.place(L + 0x20000 + i * 0x1000, 3, LINEAR | CONT | i * 0x1000)
    for i in range(4):
        tables.place(L + 0x10000 + i * 0x1000, 3, LINEAR & ~(1 << 51) | 0x80)
    for va, level, word in (
        (L + 0x14000, 3, LINEAR & ~1),
        (L + 0x15000, 3, LINEAR & ~1 | 0x800),
        (L + 0x200000, 2, BLOCK),
        (L + 0x400000, 2, BLOCK | CONT),
        (L + 0x600000, 2, BLOCK & ~1 | 0x800),
        (L + 0x40000000, 1, BLOCK),
        (V, 3, 0x00C0_0000_0000_0783),
        (V + 0x3000, 3, 0x0068_0000_0000_070F),
        (V + 0x4000, 3, 0x0060_0000_0000_07D3),
        (V + 0x5000, 3, 0x0068_0000_0000_0F0B),
        (TOP, 3, LINEAR),
    ):
        tables.place(va, level, word)


BLOCK_2M = "0xffff000000600000-0xffff000000800000           2M PMD F     RW NX SHD AF NG     "
INVALID_BLOCK = {
    "6.1": [],
    "6.12": [BLOCK_2M + "BLK UXN    MEM/NORMAL-TAGGED"],
    "7.x": [BLOCK_2M + "    UXN    MEM/NORMAL-TAGGED"],
}
CONT_BLOCK = {
    "6.1": "0xffff000000400000-0xffff000000800000           4M PMD  ",
    "6.12": "0xffff000000400000-0xffff000000600000           2M PMD  ",
    "7.x": "0xffff000000400000-0xffff000000600000           2M PMD  ",
}


def expected(name: str) -> list[str]:
    """What real kernels wrote of it."""
    return [
        "---[ Linear Mapping start ]---",
        "0xffff000000000000-0xffff000000010000          64K PTE       RW NX SHD AF            UXN    MEM/NORMAL-TAGGED",
        "0xffff000000010000-0xffff000000014000          16K PTE       ro NX SHD AF            UXN    MEM/NORMAL-TAGGED",
        "0xffff000000014000-0xffff000000015000           4K PTE F     RW NX SHD AF            UXN    MEM/NORMAL-TAGGED",
        "0xffff000000015000-0xffff000000016000           4K PTE F     RW NX SHD AF NG         UXN    MEM/NORMAL-TAGGED",
        "0xffff000000016000-0xffff000000020000          40K PTE",
        "0xffff000000020000-0xffff000000030000          64K PTE       RW NX SHD AF    CON     UXN    MEM/NORMAL-TAGGED",
        "0xffff000000030000-0xffff000000200000        1856K PTE",
        "0xffff000000200000-0xffff000000400000           2M PMD       RW NX SHD AF        BLK UXN    MEM/NORMAL-TAGGED",
        CONT_BLOCK[name] + "     RW NX SHD AF    CON BLK UXN    MEM/NORMAL-TAGGED",
        *INVALID_BLOCK[name],
        "0xffff000000800000-0xffff000040000000        1016M PMD",
        "0xffff000040000000-0xffff000080000000           1G PUD       RW NX SHD AF        BLK UXN    MEM/NORMAL-TAGGED",
        "0xffff000080000000-0xffff008000000000         510G PUD",
        "0xffff008000000000-0xffff800000000000      130560G PGD",
        "---[ Linear Mapping end ]---",
        "0xffff800000000000-0xffff800080000000           2G PUD",
        "---[ vmalloc() area ]---",
        "0xffff800080000000-0xffff800080001000           4K PTE       ro x  SHD AF            UXN    MEM/NORMAL",
        "0xffff800080001000-0xffff800080003000           8K PTE",
        "0xffff800080003000-0xffff800080004000           4K PTE       RW NX SHD AF            UXN    DEVICE/nGnRnE",
        "0xffff800080004000-0xffff800080005000           4K PTE   USR ro NX SHD AF            UXN    DEVICE/nGnRE",
        "0xffff800080005000-0xffff800080006000           4K PTE       RW NX SHD AF NG         UXN    MEM/NORMAL-NC",
        "0xffff800080006000-0xffff800080200000        2024K PTE",
        "0xffff800080200000-0xffff8000c0000000        1022M PMD",
        "0xffff8000c0000000-0xffff808000000000         509G PUD",
        "0xffff808000000000-0xffffff8000000000         127T PGD",
        "0xffffff8000000000-0xffffffffc0000000         511G PUD",
        "0xffffffffc0000000-0xffffffffffe00000        1022M PMD",
        "0xffffffffffe00000-0xfffffffffffff000        2044K PTE",
        "0xfffffffffffff000-0x0000000000000000           4K PTE       RW NX SHD AF            UXN    MEM/NORMAL-TAGGED",
        "",
    ]


@pytest.mark.parametrize("name", ALL)
def test_the_measured_table_gives_the_measured_text(name: str) -> None:
    assert dump(name, measured) == expected(name)


# sizes, names, words


@pytest.mark.parametrize(
    ("nbytes", "column"),
    [
        (0x1000, "        4K"),
        (2 << 20, "        2M"),
        (1536 << 10, "     1536K"),
        (1536 << 20, "     1536M"),  # trap 41
        (255 << 39, "   130560G"),
        (1 << 40, "        1T"),
        (1 << 60, "        1E"),
        (0, "        0E"),
        (0x800, "        2K"),
    ],
)
def test_a_size_is_divided_while_that_is_exact(nbytes: int, column: str) -> None:
    assert size(nbytes) == column


def test_level_names_follow_the_levels_configured_in_6_1() -> None:
    four, three, two = (Levels(12, n, {4: 48, 3: 39, 2: 30}[n], {4: 48, 3: 39, 2: 30}[n]) for n in (4, 3, 2))
    row = by_name("6.1")
    assert [level_name(four, row, i) for i in range(5)] == ["PGD", "P4D", "PUD", "PMD", "PTE"]
    assert [level_name(three, row, i) for i in (2, 3)] == ["PGD", "PMD"]
    assert [level_name(two, row, i) for i in (2, 3)] == ["PGD", "PGD"]
    assert [level_name(two, by_name("6.12"), i) for i in (2, 3)] == ["PUD", "PMD"]


@pytest.mark.parametrize(("name", "level"), [("6.12", "PGD"), ("7.x", "PGD")])
def test_trap_42_a_folded_level_is_called_pgd_only_with_an_mm(name: str, level: str) -> None:
    for mm, word in ((True, level), (False, "P4D")):
        text = ptdump.ptdump_walk(kernel(name, words()), MARKERS, mm_named=mm, base=L)
        assert text.split("\n")[1].split()[2] == word


def test_a_pud_leaf_of_16k_pages_at_47_bits_is_called_pgd() -> None:
    levels, base = Levels(14, 4, 52, 47), 0xFFFF_8000_0000_0000
    made = kernel("7.x", words((base, 1, BLOCK)), levels)
    lines = ptdump.ptdump_walk(made, (AddrMarker(base, "start"), AddrMarker(U64, "")), base=base).split("\n")
    assert lines[1:3] == [
        "0xffff800000000000-0xffff801000000000          64G PGD       RW NX SHD AF        BLK UXN    MEM/NORMAL-TAGGED",
        "0xffff801000000000-0x0000000000000000      131008G PGD",
    ]


@pytest.mark.parametrize("name", ALL)
def test_a_memory_type_that_linux_has_not_gives_no_word(name: str) -> None:
    line = dump(name, words((L, 3, 0x00E8_0000_0000_0703 | 5 << 2)))[1]
    assert line == "0xffff000000000000-0xffff000000001000           4K PTE       RW NX SHD AF            UXN   "


@pytest.mark.parametrize("name", ALL)
def test_half_of_the_shareability_is_not_shd(name: str) -> None:
    assert "SHD" not in dump(name, words((L, 3, LINEAR & ~0x100)))[1]


def test_with_lpa2_the_address_bits_51_and_50_read_as_shd() -> None:
    levels, base = Levels(12, 5, 52, 52), 0xFFF0_0000_0000_0000
    made = kernel("7.x", words((base, 3, 0x00E8_0000_0000_0707), (base + 0x1000, 3, 0x00E8_0000_0000_0407)), levels)
    lines = ptdump.ptdump_walk(made, (AddrMarker(base, "start"), AddrMarker(U64, "")), base=base).split("\n")
    assert ["SHD" in line for line in lines[1:3]] == [True, False]


# traps 37 to 41


@pytest.mark.parametrize("name", ALL)
def test_trap_37_a_page_of_type_1_is_valid_and_a_block(name: str) -> None:
    line = dump(name, words((L, 3, 0x00E8_0000_0000_0705)))[1]
    assert line.endswith("4K PTE       RW NX SHD AF        BLK UXN    MEM/NORMAL-TAGGED")


@pytest.mark.parametrize("name", ALL)
def test_trap_38_two_markers_at_one_address_both_print_and_a_third_waits(name: str) -> None:
    at = L + 0x2000
    markers = (MARKERS[0], *(AddrMarker(at, word) for word in "abc"), AddrMarker(U64, ""))
    lines = dump(name, words(*((L + i * 0x1000, 3, LINEAR) for i in range(5))), markers)
    assert [line[:42] for line in lines[:7]] == [
        "---[ Linear Mapping start ]---",
        "0xffff000000000000-0xffff000000002000     ",
        "---[ a ]---",
        "---[ b ]---",
        "0xffff000000002000-0xffff000000003000     ",
        "---[ c ]---",
        "0xffff000000003000-0xffff000000005000     ",
    ]


@pytest.mark.parametrize("name", ALL)
def test_trap_38_the_last_line_ends_at_zero(name: str) -> None:
    assert dump(name, words())[-2:] == ["0xffff808000000000-0x0000000000000000      130560G PGD", ""]


@pytest.mark.parametrize(("name", "block"), [("6.1", True), ("6.12", True), ("7.x", False)])
def test_trap_39_blk_of_an_invalid_page(name: str, block: bool) -> None:
    line = dump(name, words((L, 3, 0x00E8_0000_0000_0704)))[1]
    assert line.split("PTE ")[1].startswith("F  ")
    assert ("BLK" in line) is block


@pytest.mark.parametrize("name", ALL)
def test_trap_40_address_dbm_dirty_and_special_do_not_split_a_line(name: str) -> None:
    others = (0, 1 << 51, 1 << 55, 1 << 56, 0x12_3456_7000)
    lines = dump(name, words(*((L + i * 0x1000, 3, 0x0060_0000_0000_0707 | bits) for i, bits in enumerate(others))))
    assert lines[1].startswith("0xffff000000000000-0xffff000000005000          20K PTE  ")


@pytest.mark.parametrize("name", ALL)
def test_trap_40_a_page_with_none_of_the_bits_shown_prints_like_a_hole(name: str) -> None:
    lines = dump(name, words((L, 3, 1 << 55 | 0x7000)))
    assert lines[1] == "0xffff000000000000-0xffff000000200000           2M PTE"


@pytest.mark.parametrize("name", ALL)
def test_trap_41_the_check_does_not_ask_whether_a_page_is_valid(name: str) -> None:
    made = kernel(name, words(*((L + i * 0x1000, 3, 0x0008_0000_0000_0706) for i in range(3))))
    found = ptdump.check_wx(made)
    assert found == WxCount(3, 3, (Insecure("note_prot_uxn", L), Insecure("note_prot_wx", L)))
    assert made.events == [Warn("note_prot_uxn"), Warn("note_prot_wx")]
    assert not found.passed


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("word", "wx", "uxn"),
    [
        (LINEAR, 0, 0),
        (LINEAR & ~(1 << 53), 1, 0),
        (LINEAR & ~(1 << 53) | 0x80, 0, 0),
        (LINEAR & ~(1 << 54), 0, 1),
        (LINEAR & ~(3 << 53), 1, 1),
        (0, 0, 0),
    ],
)
def test_what_counts_as_writable_and_executable_or_as_user_executable(name: str, word: int, wx: int, uxn: int) -> None:
    found = ptdump.check_wx(kernel(name, words((L + 0x5000, 3, word), (L + 0x6000, 3, LINEAR))))
    assert (found.wx, found.uxn, found.passed) == (wx, uxn, not wx and not uxn)


@pytest.mark.parametrize("name", ALL)
def test_each_kind_is_warned_of_once_and_counted_always(name: str) -> None:
    bad = LINEAR & ~(1 << 53)
    made = kernel(name, words((L, 3, bad), (L + 0x2000, 3, bad), (L + 0x200000, 2, bad & ~2), (TOP, 3, bad)))
    assert ptdump.check_wx(made) == WxCount(1 + 1 + 512 + 1, 0, (Insecure("note_prot_wx", L),))


# what is in no note, and what a walk changes


@pytest.mark.parametrize("name", ALL)
def test_an_absent_entry_is_swallowed_by_the_line_before(name: str) -> None:
    lines = dump(name, words((L, 2, BLOCK), (L + 0x200000, 2, 0x00E8_0000_0000_0704)))
    assert lines[1].startswith("0xffff000000000000-0xffff000000400000           4M PMD       RW")


@pytest.mark.parametrize(("name", "cleared"), [("6.1", False), ("6.12", True), ("7.x", True)])
def test_a_bad_top_level_entry_is_a_hole_and_cleared_where_its_level_exists(name: str, cleared: bool) -> None:
    made = kernel(name, words((L, 0, 0x00E8_0000_0000_0701)))
    lines = ptdump.ptdump_walk(made, MARKERS, base=L).split("\n")
    assert lines[1] == "0xffff000000000000-0xffff800000000000         128T PGD"
    assert [event for event in made.events if isinstance(event, Write)] == ([Write(made.pgd, 0)] if cleared else [])


# where a dump begins and ends


@pytest.mark.parametrize("name", ALL)
def test_a_dump_of_the_lower_half_ends_at_task_size(name: str) -> None:
    made = kernel(name, words((0x1000, 3, LINEAR)), upper=False)
    lines = ptdump.ptdump_walk(made, (AddrMarker(0, "start"), AddrMarker(U64, "")), base=0).split("\n")
    end = {"6.1": 0}.get(name, 1 << 48)
    assert lines[-2].startswith(f"0x0000008000000000-0x{end:016x} ")
    assert lines[1] == "0x0000000000000000-0x0000000000001000           4K PTE"


def test_6_12_before_note_page_flush_ends_every_dump_at_zero() -> None:
    made = kernel("6.12", words(), upper=False)
    made.bits = replace(made.bits, variant=V6_12_NOVMA)
    assert "-0x0000000000000000 " in ptdump.ptdump_walk(made, (AddrMarker(0, "a"), AddrMarker(U64, "")), base=0)


@pytest.mark.parametrize("name", ALL)
def test_a_dump_from_the_last_byte_walks_nothing(name: str) -> None:
    assert ptdump.ptdump_walk(kernel(name, measured), MARKERS, base=U64) == "---[ Linear Mapping start ]---\n"


# contiguous runs


def run_of(change: int, *, at: int = 5, first: int = LINEAR | CONT) -> Fill:
    """Sixteen PTEs of a run, with one whose bits are turned."""
    return words(*((L + i * 0x1000, 3, first ^ (change if i == at else 0) | i * 0x1000) for i in range(16)))


@pytest.mark.parametrize(("name", "shared"), [("6.1", False), ("6.12", True), ("7.x", True)])
def test_af_of_one_page_of_a_run_is_that_of_all(name: str, shared: bool) -> None:
    young = dump(name, run_of(0x400, first=LINEAR & ~0x400 | CONT))
    assert young[1].startswith(f"0xffff000000000000-0xffff0000000{'10000' if shared else '05000'} ")
    assert (" AF " in young[1]) is shared


@pytest.mark.parametrize(("name", "shared"), [("6.1", False), ("6.12", True), ("7.x", True)])
def test_a_dirty_page_makes_its_run_read_as_writable(name: str, shared: bool) -> None:
    read_only = (LINEAR | CONT | 0x80) & ~(1 << 55)
    assert (" RW " in dump(name, run_of(1 << 55, first=read_only))[1]) is shared
    assert " ro " in dump(name, run_of(0, first=read_only))[1]
    assert " ro " in dump(name, run_of(1 << 55, first=read_only & ~(1 << 51)))[1]  # without DBM it stays read-only


@pytest.mark.parametrize("change", [1, CONT, 1 << 53, 0x800, 1 << 56, 0x4000_0000])
def test_6_12_waits_for_ever_for_a_run_that_does_not_fit(change: int) -> None:
    with pytest.raises(Runaway):
        dump("6.12", run_of(change))
    for name in ("6.1", "7.x"):
        assert dump(name, run_of(change))


def test_ptep_get_leaves_memory_alone() -> None:
    made = kernel("7.x", run_of(0x400, first=LINEAR & ~0x400 | CONT))
    before = made.memory.read(*RAM)
    made_pte = RAM[0] + 3 * 0x1000
    assert contpte.ptep_get(made, made_pte) == LINEAR | CONT
    assert made.memory.read(*RAM) == before


# address_markers[]

NEW = [
    ("Linear Mapping start", 0xFFF0_0000_0000_0000),
    ("Linear Mapping end", 0xFFFF_8000_0000_0000),
    ("Modules start", 0xFFFF_8000_0000_0000),
    ("Modules end", 0xFFFF_8000_8000_0000),
    ("vmalloc() area", 0xFFFF_8000_8000_0000),
    ("vmalloc() end", 0xFFFF_FDFF_BF80_0000),
    ("vmemmap start", 0xFFFF_FDFF_C000_0000),
    ("vmemmap end", 0xFFFF_FFFF_C000_0000),
    ("PCI I/O start", 0xFFFF_FFFF_C080_0000),
    ("PCI I/O end", 0xFFFF_FFFF_C180_0000),
    ("Fixmap start", 0xFFFF_FFFF_FF42_7000),
    ("Fixmap end", 0xFFFF_FFFF_FF80_0000),
    ("", U64),
]
OLD = [
    ("Linear Mapping start", 0xFFFF_0000_0000_0000),
    ("Linear Mapping end", 0xFFFF_8000_0000_0000),
    ("Modules start", 0xFFFF_8000_0000_0000),
    ("Modules end", 0xFFFF_8000_0800_0000),
    ("vmalloc() area", 0xFFFF_8000_0800_0000),
    ("vmalloc() end", 0xFFFF_FBFF_F000_0000),
    ("Fixmap start", 0xFFFF_FBFF_FDC0_0000),
    ("Fixmap end", 0xFFFF_FBFF_FE00_0000),
    ("PCI I/O start", 0xFFFF_FBFF_FE80_0000),
    ("PCI I/O end", 0xFFFF_FBFF_FF80_0000),
    ("vmemmap start", 0xFFFF_FC00_0000_0000),
    ("vmemmap end", 0xFFFF_FE00_0000_0000),
    ("", U64),
]


@pytest.mark.parametrize(("name", "rows"), [("6.1", OLD), ("6.12", NEW), ("7.x", NEW)])
def test_the_markers_of_a_build(name: str, rows: list[tuple[str, int]]) -> None:
    fixmap = dict(rows)["Fixmap start"]
    assert [(m.name, m.start_address) for m in address_markers(BUILDS[name], by_name(name), fixmap)] == rows


def test_markers_of_16k_pages_and_of_52_bits() -> None:
    row = by_name("7.x")
    k16 = {m.name: m.start_address for m in address_markers(Levels(14, 4, 52, 47), row, 0)}
    assert (k16["Linear Mapping end"], k16["vmalloc() end"]) == (0xFFFF_C000_0000_0000, 0xFFFF_FFBF_BF80_0000)
    wide = {m.name: m.start_address for m in address_markers(Levels(12, 5, 52, 52), row, 0)}
    assert wide["vmemmap start"] == 0xFFFF_C1FF_C000_0000


@pytest.mark.parametrize("name", ALL)
def test_every_word_has_a_row_and_the_masks_are_what_splits_lines(name: str) -> None:
    rows = pte_bits(kernel(name, words()).bits)
    said = ["VALID", "USER", "RDONLY", "PXN", "SH", "AF", "NG", "CONT", "type", "UXN", "GP", *["AttrIndx"] * 5]
    assert len(rows) == len(said)
    mask = 0x0070_0000_0000_0FDF | 0x0004_0000_0000_0000 if name == "7.x" else 0x0074_0000_0000_0FDF
    assert ptdump.PtdumpPgState(kernel(name, words()), MARKERS, U64).mask == mask
