"""Descriptor formats: positions, kinds and golden words.

Judges: the Arm ARM's figures (D8.3) typed here again, and Linux's protections (arch/arm64 pgtable-prot.h).
"""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest

from pgtable.descriptors import CONTIGUOUS_RUN, Format, Granule, Kind
from tests.pgtable.hand import U64

K4, K16, K64 = Granule.K4, Granule.K16, Granule.K64

# Arm ARM D8.3.1 and D8.3.2: field and bits; RES0_ and IGNORED_ rows say it of theirs.
COMMON_LEAF = {
    **{"VALID": "0", "TYPE": "1", "AttrIndx": "4:2", "NS": "5", "AP": "7:6", "SH": "9:8", "AF": "10", "nG": "11"},
    **{"GP": "50", "DBM": "51", "Contiguous": "52", "PXN": "53", "UXN": "54"},
}
COMMON_TABLE = {
    **{"VALID": "0", "TYPE": "1", "AF": "10", "PXNTable": "59", "UXNTable": "60", "APTable": "62:61", "NSTable": "63"},
}
# Output address of a leaf: granule, wide (52-bit addresses), level.
OUTPUT = {
    (K4, False, 3): "47:12",
    (K4, False, 2): "47:21",
    (K4, False, 1): "47:30",
    (K4, True, 3): "49:12,9:8",
    (K4, True, 2): "49:21,9:8",
    (K4, True, 1): "49:30,9:8",
    (K4, True, 0): "49:39,9:8",
    (K16, False, 3): "47:14",
    (K16, False, 2): "47:25",
    (K16, True, 3): "49:14,9:8",
    (K16, True, 2): "49:25,9:8",
    (K16, True, 1): "49:36,9:8",
    (K64, False, 3): "47:16",
    (K64, False, 2): "47:29",
    (K64, True, 3): "47:16,15:12",
    (K64, True, 2): "47:29,15:12",
    (K64, True, 1): "47:42,15:12",
}
NEXT_TABLE = {
    (K4, False): "47:12",
    (K4, True): "49:12,9:8",
    (K16, False): "47:14",
    (K16, True): "49:14,9:8",
    (K64, False): "47:16",
    (K64, True): "47:16,15:12",
}
BLOCKS = {
    (K4, False): {1, 2},
    (K4, True): {0, 1, 2},
    (K16, False): {2},
    (K16, True): {1, 2},
    (K64, False): {2},
    (K64, True): {1, 2},
}


def form(granule: Granule, wide: bool, **more: bool) -> Format:
    return Format(granule, ds=wide and granule is not K64, lpa=wide, **more)


# Positions.


@pytest.mark.parametrize(("granule", "wide", "level"), OUTPUT)
def test_leaf_fields_are_where_the_arm_arm_has_them(granule: Granule, wide: bool, level: int) -> None:
    layout = form(granule, wide).leaf(level)
    want = COMMON_LEAF | {"OA": OUTPUT[granule, wide, level]}
    if wide and granule is not K64:
        del want["SH"]  # TCR.DS: the bits hold OA[51:50], shareability comes from TCR
    if level < 3:
        want["nT"] = "16"
    assert {f.name: f.bits for f in layout if not f.reserved} == want


@pytest.mark.parametrize(("granule", "wide"), NEXT_TABLE)
def test_table_fields_are_where_the_arm_arm_has_them(granule: Granule, wide: bool) -> None:
    layout = form(granule, wide).table(2)
    want = COMMON_TABLE | {"TA": NEXT_TABLE[granule, wide]}
    assert {f.name: f.bits for f in layout if not f.reserved} == want


def test_one_level_regimes_have_xn_and_no_unprivileged_fields() -> None:
    fmt = Format(el0=False)
    leaf = {f.name: f.bits for f in fmt.leaf(3) if not f.reserved}
    assert leaf == {n: b for n, b in COMMON_LEAF.items() if n not in ("UXN", "PXN")} | {"XN": "54", "OA": "47:12"}
    assert fmt.leaf(3)["PXN"].reserved == "RES0"
    table = {f.name: f.bits for f in fmt.table(1) if not f.reserved}
    want = {n: b for n, b in COMMON_TABLE.items() if n not in ("UXNTable", "PXNTable")}
    assert table == want | {"XNTable": "60", "TA": "47:12"}


def test_stage_2_fields_are_where_the_arm_arm_has_them() -> None:
    want = {
        "VALID": "0",
        "TYPE": "1",
        "MemAttr": "5:2",
        "S2AP": "7:6",
        "SH": "9:8",
        "AF": "10",
        "FnXS": "11",
        "DBM": "51",
    }
    want |= {"Contiguous": "52", "XN": "54:53", "NS": "55", "AssuredOnly": "58"}
    for granule in Granule:
        for level, nt in ((3, {}), (2, {"nT": "16"})):
            leaf = {
                f.name: f.bits for f in Format(granule, stage2=True).leaf(level) if not f.reserved and f.name != "OA"
            }
            assert leaf == want | nt
            stage1 = Format(granule).leaf(level)["OA"]
            assert Format(granule, stage2=True).leaf(level)["OA"].bits == stage1.bits
        table = {f.name: f.bits for f in Format(granule, stage2=True).table(1) if not f.reserved}
        assert set(table) == {"VALID", "TYPE", "AF", "TA"}
    assert "SH" not in Format(ds=True, stage2=True).leaf(3)


def test_indirect_permissions_take_four_bits_and_make_ap2_ndirty() -> None:
    leaf = {f.name: f.bits for f in Format(pie=True).leaf(3) if not f.reserved}
    want = {n: b for n, b in COMMON_LEAF.items() if n not in ("AP", "DBM", "PXN", "UXN")}
    assert leaf == want | {"PIIndex": "54,53,51,6", "nDirty": "7", "OA": "47:12"}


def test_overlays_and_attribute_indexes_take_the_pbha_bits() -> None:
    leaf = Format(poe=True, aie=True).leaf(3)
    assert leaf["POIndex"].bits == "62:60"
    assert leaf["AttrIndx3"].bits == "59"
    assert [f.bits for f in Format().leaf(3) if f.reserved == "IGNORED"] == ["63", "62:60", "59", "58:55"]


def test_every_format_has_layouts_for_all_its_levels() -> None:
    for granule, *flags in product(Granule, *[(False, True)] * 6):
        fmt = Format(granule, *flags)
        for level in range({K4: -1 if fmt.ds else 0, K16: 0, K64: 1}[granule], 4):
            assert fmt.leaf(level).mask("VALID", "TYPE") == 3, (fmt, level)
            assert fmt.leaf(level) is fmt.leaf(level), (fmt, level)
            if level < 3:
                assert fmt.table(level)["TA"].get(0x0000_7777_7777_0003) >> 16 == 0x7777_7777, (fmt, level)


# Kinds.


@pytest.mark.parametrize(("granule", "wide"), BLOCKS)
def test_blocks_are_legal_where_block_desc_supported_says(granule: Granule, wide: bool) -> None:
    fmt = form(granule, wide)
    assert fmt.block_levels == BLOCKS[granule, wide]
    for level in range(-1, 4):
        for rest in (0, 0xFFFF_FFFF_FFFF_FFFC):
            assert fmt.kind(rest | 0, level) is Kind.INVALID
            assert fmt.kind(rest | 2, level) is Kind.INVALID
            assert fmt.kind(rest | 3, level) is (Kind.PAGE if level == 3 else Kind.TABLE)
            legal = level in BLOCKS[granule, wide]
            assert fmt.kind(rest | 1, level) is (Kind.BLOCK if legal else Kind.INVALID), (level, rest)


def test_ds_does_nothing_for_64k_and_lpa_nothing_for_the_others() -> None:
    assert [Format(K64, ds=ds, lpa=False).block_levels for ds in (False, True)] == [{2}, {2}]
    assert {f.name: f.bits for f in Format(K64, ds=True).leaf(3)} == {f.name: f.bits for f in Format(K64).leaf(3)}
    assert [Format(K4, lpa=lpa).block_levels for lpa in (False, True)] == [{1, 2}, {1, 2}]
    assert [Format(K4, ds=ds).lpa2 for ds in (False, True)] == [False, True]
    assert not Format(K64, ds=True).lpa2


def test_an_invalid_word_is_shown_as_what_it_would_be_if_valid() -> None:
    fmt = Format()
    assert fmt.layout(0x4000_0002, 2).name == "4K table"
    assert fmt.layout(0x4000_0000, 2).name == "4K level 2 block"
    assert fmt.layout(0x4000_0002, 3).name == "4K level 3 page"


# Golden words.


@pytest.mark.parametrize(
    ("word", "fields"),
    [
        (
            0x00E8_0000_0000_0703,  # PAGE_KERNEL
            {"VALID": 1, "TYPE": 1, "AttrIndx": 0, "AP": 0, "SH": 3, "AF": 1, "DBM": 1, "PXN": 1, "UXN": 1},
        ),
        (
            0x00E8_0000_0000_0707,  # PAGE_KERNEL_TAGGED
            {"VALID": 1, "TYPE": 1, "AttrIndx": 1, "AP": 0, "SH": 3, "AF": 1, "DBM": 1, "PXN": 1, "UXN": 1},
        ),
        (
            0x00E0_0000_0000_0783,  # PAGE_KERNEL_RO
            {"VALID": 1, "TYPE": 1, "AttrIndx": 0, "AP": 2, "SH": 3, "AF": 1, "DBM": 0, "PXN": 1, "UXN": 1},
        ),
        (
            0x00C0_0000_0000_0783,  # PAGE_KERNEL_ROX
            {"VALID": 1, "TYPE": 1, "AttrIndx": 0, "AP": 2, "SH": 3, "AF": 1, "DBM": 0, "PXN": 0, "UXN": 1},
        ),
        (
            0x00C8_0000_0000_0703,  # PAGE_KERNEL_EXEC
            {"VALID": 1, "TYPE": 1, "AttrIndx": 0, "AP": 0, "SH": 3, "AF": 1, "DBM": 1, "PXN": 0, "UXN": 1},
        ),
        (
            0x0068_0000_0900_0713,  # PROT_DEVICE_nGnRE of a UART
            {"VALID": 1, "TYPE": 1, "AttrIndx": 4, "AP": 0, "SH": 3, "AF": 1, "DBM": 1, "PXN": 1, "UXN": 1},
        ),
        (
            0x00E8_0000_4020_3F02,  # PAGE_KERNEL with nG, invalidated by 7.x
            {"VALID": 0, "TYPE": 1, "AttrIndx": 0, "AP": 0, "SH": 3, "AF": 1, "nG": 1, "DBM": 1, "PXN": 1, "UXN": 1},
        ),
    ],
    ids=["KERNEL", "TAGGED", "RO", "ROX", "EXEC", "DEVICE", "invalid nG"],
)
def test_linux_page_protections_decode_field_by_field(word: int, fields: dict[str, int]) -> None:
    found = Format().leaf(3).unpack(word)
    zero = {"NS": 0, "nG": 0, "GP": 0, "Contiguous": 0, "RES0_49_48": 0, "IGNORED_62_60": 0}
    zero |= {"IGNORED_59": 0, "IGNORED_63": 0}
    software = {"IGNORED_58_55": word >> 55 & 15}  # PTE_DIRTY is bit 55
    assert found == zero | fields | software | {"OA": word & 0x0000_FFFF_FFFF_F000}


@pytest.mark.parametrize(
    ("granule", "wide", "level", "word", "pa"),
    [
        (K4, False, 3, 0xFFFF_FFFF_FFFF_FFFF, 0x0000_FFFF_FFFF_F000),
        (K4, False, 2, 0x00E8_0000_4020_0701, 0x4020_0000),
        (K4, False, 1, 0x0060_0000_C000_0F01, 0xC000_0000),
        (K4, True, 3, 0x0068_0000_8000_0703, 0x000C_0000_8000_0000),  # [9:8] = 3: the peers' thirteenth case
        (K4, True, 3, 0x0003_0000_0000_1103, 0x0007_0000_0000_1000),
        (K4, True, 0, 0x0003_FF80_0000_0301, 0x000F_FF80_0000_0000),
        (K16, True, 2, 0x0002_0000_0200_0201, 0x000A_0000_0200_0000),
        (K64, True, 3, 0x0068_0000_8000_A703, 0x000A_0000_8000_0000),  # [15:12] = 10
        (K64, True, 1, 0x0000_0400_0000_F401, 0x000F_0400_0000_0000),
        (K64, False, 3, 0x0068_0000_8000_A703, 0x8000_0000),
    ],
)
def test_output_addresses_of_golden_leaves(granule: Granule, wide: bool, level: int, word: int, pa: int) -> None:
    oa = form(granule, wide).leaf(level)["OA"]
    assert oa.get(word) == pa
    assert oa.get(np.array([word], np.uint64)).tolist() == [pa]


# Granules.


@pytest.mark.parametrize(
    ("granule", "shifts"),
    [
        (K4, {3: 12, 2: 21, 1: 30, 0: 39, -1: 48}),
        (K16, {3: 14, 2: 25, 1: 36, 0: 47}),
        (K64, {3: 16, 2: 29, 1: 42}),
    ],
)
def test_level_sizes(granule: Granule, shifts: dict[int, int]) -> None:
    assert {level: granule.level_shift(level) for level in shifts} == shifts
    assert {level: granule.level_size(level) for level in shifts} == {at: 1 << s for at, s in shifts.items()}


@pytest.mark.parametrize(
    ("granule", "width", "shifts"),
    [(K4, 9, (12, 21, 30, 39, 48)), (K16, 11, (14, 25, 36, 47)), (K64, 13, (16, 29, 42))],
)
def test_the_index_of_a_va_is_its_binary_digits_at_the_level(
    granule: Granule, width: int, shifts: tuple[int, ...], rng: random.Random
) -> None:
    for va in (0x000F_ABCD_1234_5678, 0, U64, *(rng.getrandbits(64) for _ in range(100))):
        digits = f"{va:064b}"
        for level, shift in zip((3, 2, 1, 0, -1), shifts, strict=False):
            want = int(digits[max(64 - shift - width, 0) : 64 - shift], 2)
            assert granule.index(va, level) == want, (hex(va), level)


@pytest.mark.parametrize(("granule", "size", "entries"), [(K4, 0x1000, 512), (K16, 0x4000, 2048), (K64, 0x10000, 8192)])
def test_granule_sizes(granule: Granule, size: int, entries: int) -> None:
    assert (granule.page_size, granule.entries, 8 * granule.entries) == (size, entries, size)


@pytest.mark.parametrize(("text", "granule"), [("4k", K4), ("4K", K4), ("4KB", K4), ("16K", K16), ("64kb", K64)])
def test_granules_are_found_by_name(text: str, granule: Granule) -> None:
    assert Granule.named(text) is granule


@pytest.mark.parametrize("text", ["", "8K", "4096", "K4"])
def test_another_name_of_a_granule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"^granule {text}: must be 4K, 16K or 64K$"):
        Granule.named(text)


def test_contiguous_runs_are_those_of_the_arm_arm() -> None:
    sizes = {
        (g.label, level): n * g.level_size(level) for g, runs in CONTIGUOUS_RUN.items() for level, n in runs.items()
    }
    assert sizes == {
        ("4K", 3): 64 << 10,
        ("4K", 2): 32 << 20,
        ("4K", 1): 16 << 30,
        ("16K", 3): 2 << 20,
        ("16K", 2): 1 << 30,
        ("64K", 3): 2 << 20,
        ("64K", 2): 16 << 30,
    }
