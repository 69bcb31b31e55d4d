"""Linux's names for words. Judges: texts that real kernels' ptdump wrote, pgtable-prot.h, swap encodings.

The texts are those of test_ptdump.py, which test_ptdump_real.py has the compiled kernels write again.
"""

from __future__ import annotations

import random

import pytest

from kernel_model.describe import SWAP, SWAP_6_1, describe
from kernel_model.names import Bits
from kernel_model.variants import by_name
from pgtable import Explanation, Format, Kind, explain
from tests.kernel_model.test_ptdump import ALL, expected, measured
from tests.pgtable.hand import SEED

KP = 0x00E8_0000_0000_0703
PA = 0x4321_0000


def of(word: int, level: int = 3, kernel: str = "7.x", **asked: bool) -> Explanation:
    return describe(explain(word, level, **asked), by_name(kernel))


def linux(found: Explanation) -> set[str]:
    return {name for row in found.fields for name in row.linux}


class Placed(list[tuple[int, int, int]]):
    """What `measured` places: (va, level, word)."""

    def place(self, va: int, level: int, word: int) -> None:
        self.append((va, level, word))


@pytest.mark.parametrize("kernel", ALL)
def test_the_words_are_those_that_the_real_ptdump_wrote(kernel: str) -> None:
    placed = Placed()
    measured(placed)  # type: ignore[arg-type]  # it only places
    lines = [line for line in expected(kernel) if line.startswith("0x")]
    judged = 0
    for va, level, word in placed:
        row = next(line for line in lines if int(line[:18], 16) <= va < (int(line[19:37], 16) or 1 << 64))
        if int(row[:18], 16) != va and level < 3:
            continue  # 6.1 notes an invalid block nowhere: the line before goes on
        assert of(word, level, kernel).facts["ptdump"].split() == row.split()[3:], f"{kernel} {va:#x} {word:#x}"
        judged += 1
    assert judged >= 40


# pgtable-prot.h, as compiled (KPTI off, no BTI).
PROTECTIONS = {
    KP: "PAGE_KERNEL",
    0x00E8_0000_0000_0707: "PAGE_KERNEL_TAGGED",
    0x00E0_0000_0000_0783: "PAGE_KERNEL_RO",
    0x00C0_0000_0000_0783: "PAGE_KERNEL_ROX",
    0x00C8_0000_0000_0703: "PAGE_KERNEL_EXEC",
    0x0068_0000_0000_070F: "PROT_DEVICE_nGnRnE",
    0x0068_0000_0000_0713: "PROT_DEVICE_nGnRE",
    0x0068_0000_0000_070B: "PROT_NORMAL_NC",
    0x0060_0000_0000_0FC3: "like PAGE_READONLY",
    0x0020_0000_0000_0FC3: "like PAGE_READONLY_EXEC",
    0x00E8_0000_0000_0F43: "like PAGE_SHARED",
    0x0068_0000_0000_0FC3: "like PAGE_SHARED",
}


@pytest.mark.parametrize("word", PROTECTIONS, ids=PROTECTIONS.get)
def test_protections_have_their_names_as_pages_blocks_with_ng_and_with_52_bits(word: int) -> None:
    name = PROTECTIONS[word]
    assert of(word | PA).facts["prot"] == name
    assert of((word & ~2) | 0x4020_0000, 2).facts["prot"] == name
    if name.startswith("like"):
        return
    assert of(word | PA | 0x800).facts["prot"] == f"{name} | PTE_NG"
    assert of(word & ~0x300 | PA, ds=True).facts["prot"] == name
    assert of(word & ~1 | 0x800 | PA).facts["prot"] == f"{name}, made invalid"
    assert "prot" not in of(word & ~0x400 | PA).facts


def test_the_bits_of_a_kernel_page_have_their_names() -> None:
    found = of(KP | PA | 0x800 | 1 << 52 | 1 << 56, kernel="6.12")
    names = "VALID TYPE_PAGE SHARED AF NG WRITE PXN UXN DIRTY SPECIAL CONT ATTRINDX(MT_NORMAL)"
    assert linux(found) == {f"PTE_{name}" for name in names.split()}
    assert found["DBM"].linux == ("PTE_WRITE",)
    assert linux(of(0x0060_0000_0000_0FD3 | PA)) >= {"PTE_USER", "PTE_RDONLY", "PTE_ATTRINDX(MT_DEVICE_nGnRE)"}


def test_what_a_bit_is_called_depends_on_the_kernel_and_on_valid() -> None:
    bit58, bit57 = 1 << 58, 1 << 57
    assert "PTE_PROT_NONE" in linux(of(KP & ~1 | bit58, kernel="6.1"))
    assert "PTE_PROT_NONE" not in linux(of(KP | bit58, kernel="6.1"))
    assert "PTE_UFFD_WP" in linux(of(KP | bit58, kernel="6.12"))
    assert "PTE_UFFD" in linux(of(KP | bit58, kernel="7.x"))
    assert [("PTE_DEVMAP" in linux(of(KP | bit57, kernel=k))) for k in ("6.1", "6.12", "7.x")] == [True, True, False]
    assert "PTE_PRESENT_INVALID" in linux(of(KP & ~1 | 0x800))
    assert "PTE_NG" in linux(of(KP & ~1 | 0x800, kernel="6.1"))
    assert "PTE_PO_IDX_1" in linux(of(KP | 1 << 61))
    assert linux(of(0x1800_0000_4321_0403, 2)) == {"PMD_TYPE_TABLE", "PMD_TABLE_PXN", "PMD_TABLE_UXN", "PMD_TABLE_AF"}
    assert "PMD_TYPE_SECT" in linux(of(KP & ~2, 2))


def test_levels_are_called_what_debians_builds_call_them() -> None:
    table = 0x4321_0003
    names = {
        ("6.1", "4K"): {2: "pmd", 1: "pud", 0: "pgd"},
        ("7.x", "4K"): {2: "pmd", 1: "pud", 0: "p4d"},
        ("7.x", "16K"): {2: "pmd", 1: "pud", 0: "pgd"},
        ("7.x", "64K"): {2: "pmd", 1: "pgd"},
    }
    for (kernel, granule), levels in names.items():
        for level, name in levels.items():
            found = describe(explain(table, level, granule=granule), by_name(kernel))
            assert found.facts["Linux"] == f"a table: {name}_present, {name}_table"
    assert describe(explain(table, -1, ds=True), by_name("7.x")).facts["Linux"].startswith("a table: pgd_present")


def test_ptdump_has_no_words_for_an_entry_of_which_it_shows_no_bit() -> None:
    assert "ptdump" not in of(0).facts
    assert "ptdump" not in of(1 << 55 | 0x4321_0000).facts
    assert linux(of(0)) == set()


# What the kernels' own pte_present(), pmd_present() say (section 4.3 of the measured facts: 6.1, 6.12, 7.x).
STATES = [
    (0, 3, ("pte_none", "pte_none", "pte_none")),
    (KP, 3, ("pte_present, pte_valid",) * 3),
    (KP & ~1, 3, ("neither",) * 3),
    (KP & ~1 | 0x800, 3, ("neither", "pte_present (PTE_PRESENT_INVALID)", "pte_present (PTE_PRESENT_INVALID)")),
    (KP & ~1 | 1 << 58, 3, ("pte_present (PTE_PROT_NONE)", "neither", "neither")),
    (KP & ~3 | 1 << 59, 2, ("pmd_present (PMD_PRESENT_INVALID)", "neither", "neither")),
    (KP & ~3 | 0x800, 2, ("neither", "pmd_present (PTE_PRESENT_INVALID)", "pmd_present (PTE_PRESENT_INVALID)")),
    (0x4321_0003, 1, ("a table: pud_present",) * 3),
]


@pytest.mark.parametrize(("word", "level", "said"), STATES)
def test_what_kind_of_entry_it_is(word: int, level: int, said: tuple[str, ...]) -> None:
    for kernel, want in zip(("6.1", "6.12", "7.x"), said, strict=True):
        assert of(word, level, kernel).facts["Linux"].startswith(want), kernel


def test_present_agrees_with_the_models_predicates_on_random_words() -> None:
    rng = random.Random(f"{SEED} present")
    for kernel in ALL:
        bits = Bits.of(Format(), by_name(kernel))
        for _ in range(400):
            word = rng.getrandbits(64) & rng.choice((~0, ~1, ~3, 0xFFF, 0x0C00_0000_0000_0FFF))
            found = of(word, 3, kernel)
            says = "pte_present" in found.facts["Linux"] and "neither" not in found.facts["Linux"]
            assert (says and "is false" not in found.facts["Linux"]) == bits.pte_present(word), f"{kernel} {word:#x}"


def test_predicates_of_a_clean_and_of_a_dirty_page() -> None:
    clean, dirty = of(0x0068_0000_0000_0FC3 | PA), of(0x00E8_0000_0000_0F43 | PA)
    assert "pte_write" in clean.facts["Linux"]
    assert "pte_dirty" not in clean.facts["Linux"]
    assert "pte_dirty" in dirty.facts["Linux"]
    assert "pte_dirty" in of(0x0068_0000_0000_0F43 | PA).facts["Linux"], "writable for hardware counts as dirty"
    assert "pte_young" not in of(KP & ~0x400).facts["Linux"]
    assert "pte_user_exec" in of(0x0020_0000_0000_0FC3).facts["Linux"]


# __swp_entry(type, offset) in a PTE: type from bit 6 and offset from bit 12; in 6.1 from 3 and 8.


@pytest.mark.parametrize(
    ("kernel", "layout", "at"), [("6.1", SWAP_6_1, (3, 8)), ("6.12", SWAP, (6, 12)), ("7.x", SWAP, (6, 12))]
)
def test_swap_entries(kernel: str, layout: object, at: tuple[int, int]) -> None:
    swapped = of(3 << at[0] | 0x1234 << at[1], kernel=kernel)
    assert swapped.layout is layout
    assert (swapped["type"].value, swapped["offset"].value) == (3, 0x1234)
    assert "swap file 3, offset 0x1234" in swapped.facts["Linux"]
    assert swapped.title.startswith("swap entry, level 3, ")
    migrating = of(30 << at[0] | 0x4_3210 << at[1], kernel=kernel)
    assert "migration, write: PFN 0x43210" in migrating.facts["Linux"]
    assert "PTE marker" in of(31 << at[0], kernel=kernel).facts["Linux"]


def test_migration_entries_are_those_of_the_model() -> None:
    bits = Bits.of(Format(), by_name("6.12"))
    for type in range(32):
        word = type << 6 | PA << 0
        found = of(word, kernel="6.12")
        assert ("migration" in found.facts["Linux"]) == bits.is_migration_entry(word), type
        if bits.is_migration_entry(word):
            assert f"PFN {bits.swp_offset_phys(word, 4096) >> 12:#x}" in found.facts["Linux"]


def test_a_kernel_entry_whose_valid_bit_was_cleared_is_no_swap_entry() -> None:
    for word, level in ((KP & ~1 | PA, 3), (0x00E8_0000_4020_0700, 2), (0x00E8_0000_4020_0700, 3)):
        found = of(word, level, "6.1")
        assert found.layout is not SWAP_6_1
        assert found.place
        assert found.place.kind is Kind.INVALID
        assert ("note", "VALID") in {(f.kind, f.field) for f in found.findings}


def test_findings_of_linux() -> None:
    odd = of(KP & ~(1 << 51))
    assert any("pte_write() says no" in f.text for f in odd.findings)
    assert any("at once" in f.text for f in of(KP | 0x80).findings)
    for kernel, keeps in (("7.x", True), ("6.12", False)):
        said = next(f.text for f in of(KP & ~1 | 0x800, kernel=kernel).findings if f.field == "nG")
        assert ("set_memory_valid" in said) == keeps


@pytest.mark.parametrize("asked", [{"stage": 2}, {"regime": "EL2"}, {"regime": "EL3"}])
def test_linux_has_no_names_for_other_tables(asked: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="its own tables only"):
        describe(explain(KP, 3, **asked), by_name("7.x"))  # type: ignore[arg-type]
