"""Walks as text, and the bits that decided a fault. Judge of the deciders: the walk with that one bit changed."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from pgtable import Access, AccessType, Format, Granule, translate
from pgtable.features import CPUS
from pgtable.nested import deciders
from pgtable.params import Regime, WalkParams
from pgtable.permissions import PR, PW, PX, UR, UX
from pgtable.why import attributes_text, rights
from tests.pgtable.hand import Tree, Words, hcr, leaf, tcr2, tree

READ, WRITE, FETCH = Access.read(), Access.write(), Access.fetch()
FAULTING = CPUS["max"].replace(contiguous_faults=True, nt_faults=True)


class Cause(NamedTuple):
    """A fault, the fields that must be named for it, and for each a change that lets the access through.

    A change is (level, bits to flip) of a descriptor or (register, bits to flip).
    """

    made: Tree
    access: Access
    named: dict[str, tuple[int | str, int]]


CAUSES = {
    "valid": Cause(tree(leaf(low=2)), READ, {"VALID": (3, 1)}),
    "reserved": Cause(tree(leaf(low=1)), READ, {"TYPE": (3, 2)}),
    "L0 block": Cause(tree(level=3).with_flipped(0, 2), READ, {"TYPE": (0, 2)}),
    "table valid": Cause(tree().with_flipped(1, 1), READ, {"VALID": (1, 1)}),
    "AF": Cause(tree(leaf(AF=0)), READ, {"AF": (3, 1 << 10)}),
    "OA": Cause(tree(leaf() | 1 << 45, ps=4), READ, {"OA[47:12]": (3, 1 << 45)}),
    "TA": Cause(tree(ps=4).with_flipped(1, 1 << 45), READ, {"TA[47:12]": (1, 1 << 45)}),
    "TTBR": Cause(tree(ps=4, TTBR0_EL1=0x4000_0000 | 1 << 45), READ, {"TTBR": ("TTBR0_EL1", 1 << 45)}),
    "EPD": Cause(tree(tcr_flags={"EPD0": 1}), READ, {"EPD": ("TCR_EL1", 1 << 7)}),
    "E0PD": Cause(tree(leaf(AP=1), tcr_flags={"E0PD0": 1}), Access.read(0), {"E0PD": ("TCR_EL1", 1 << 55)}),
    "contiguous": Cause(
        tree(leaf(low=1, Contiguous=1), ia=24, level=2, va=0x1234, cpu=FAULTING), READ, {"Contiguous": (2, 1 << 52)}
    ),
    "nT": Cause(tree(leaf(low=1, nT=1), level=2, cpu=FAULTING), READ, {"nT": (2, 1 << 16)}),
    "AP[2]": Cause(tree(leaf(AP=2)), WRITE, {"AP": (3, 1 << 7)}),
    "AP[1]": Cause(tree(leaf(AP=0)), Access.read(0), {"AP": (3, 1 << 6)}),
    "UXN": Cause(tree(leaf(AP=3, UXN=1)), Access.fetch(0), {"UXN": (3, 1 << 54)}),
    "PXN": Cause(tree(leaf(AP=2, PXN=1)), FETCH, {"PXN": (3, 1 << 53)}),
    "XN": Cause(tree(leaf(XN=1), regime="EL2"), Access.fetch(2), {"XN": (3, 1 << 54)}),
    "implicit PXN": Cause(tree(leaf(AP=1)), FETCH, {"AP": (3, 1 << 6)}),
    "APTable[1]": Cause(tree(tables={1: {"APTable": 2}}), WRITE, {"APTable": (1, 1 << 62)}),
    "APTable[0]": Cause(tree(leaf(AP=1), tables={0: {"APTable": 1}}), Access.read(0), {"APTable": (0, 1 << 61)}),
    "UXNTable": Cause(tree(leaf(AP=3), tables={2: {"UXNTable": 1}}), Access.fetch(0), {"UXNTable": (2, 1 << 60)}),
    "PXNTable": Cause(tree(leaf(AP=2), tables={0: {"PXNTable": 1}}), FETCH, {"PXNTable": (0, 1 << 59)}),
    "XNTable": Cause(tree(regime="EL3", tables={0: {"XNTable": 1}}), Access.fetch(3), {"XNTable": (0, 1 << 60)}),
    "PAN": Cause(tree(leaf(AP=1), PAN=1), READ, {"AP": (3, 1 << 6), "PSTATE.PAN": ("PAN", 1)}),
    "EPAN": Cause(
        tree(leaf(), PAN=1, sctlr_flags={"EPAN": 1}),
        READ,
        {"UXN": (3, 1 << 54), "PSTATE.PAN": ("PAN", 1), "SCTLR.EPAN": ("SCTLR_EL1", 1 << 57)},
    ),
    "WXN": Cause(tree(leaf(), sctlr_flags={"WXN": 1}), FETCH, {"AP": (3, 1 << 7), "SCTLR.WXN": ("SCTLR_EL1", 1 << 19)}),
    "WXN with EPAN on": Cause(
        tree(leaf(), sctlr_flags={"WXN": 1, "EPAN": 1}),
        FETCH,
        {"AP": (3, 1 << 7), "SCTLR.WXN": ("SCTLR_EL1", 1 << 19)},
    ),
    "PIIndex": Cause(tree(leaf(AP=1), TCR2_EL1=tcr2(PIE=1), PIR_EL1=5), READ, {"PIIndex[3,2,1,0]": (3, 1 << 6)}),
    "nDirty": Cause(tree(leaf(AP=2), TCR2_EL1=tcr2(PIE=1), PIR_EL1=5), WRITE, {"nDirty": (3, 1 << 7)}),
    "POIndex": Cause(tree(leaf(POIndex=1), TCR2_EL1=tcr2(POE=1), POR_EL1=7), READ, {"POIndex": (3, 1 << 60)}),
}


def changed(made: Tree, where: int | str, mask: int) -> Tree:
    if isinstance(where, int):
        return made.with_flipped(where, mask)
    return made.with_regs(**{where: made.regs[where] ^ mask})


@pytest.mark.parametrize("name", CAUSES)
def test_the_bits_named_are_those_whose_change_lets_the_access_through(name: str) -> None:
    made, access, named = CAUSES[name]
    found = translate(made.memory, made.regs, made.va, access)
    assert found.fault is not None
    assert {d.field for d in deciders(found)} == set(named)
    for decider in deciders(found):
        where, mask = named[decider.field]
        other = changed(made, where, mask)
        assert translate(other.memory, other.regs, other.va, access).ok, decider
        if isinstance(where, int):
            assert (decider.level, decider.pa) == (where, made.slots[where])
            assert decider.entry == (made.slots[where] & 0xFFFF) // 8
            assert _holds(decider.bits, mask)
        else:
            assert decider.pa is None


def _holds(bits: str, mask: int) -> bool:
    """The flipped bit is within `hi:lo,...`."""
    for part in bits.split(","):
        hi, _, lo = part.partition(":")
        if int(lo or hi) <= mask.bit_length() - 1 <= int(hi):
            return True
    return False


@pytest.mark.parametrize(
    ("made", "access"),
    [
        (tree(), READ),
        (tree(leaf(AttrIndx=1)), Access(AccessType.READ, 1, aligned=False)),
        (tree()._replace(memory=Words()), READ),
    ],
    ids=["no fault", "alignment", "external abort"],
)
def test_nothing_is_named_where_there_is_no_fault_or_no_bit_to_name(made: Tree, access: Access) -> None:
    assert deciders(translate(made.memory, made.regs, made.va, access)) == []


def test_a_range_fault_names_the_range_and_a_txsz_fault_the_field() -> None:
    made = tree()
    found = translate(made.memory, made.regs, made.va | 1 << 50)
    assert [(d.field, d.text) for d in deciders(found)] == [("range", "the VA is outside the range that TxSZ sets")]
    bad = made.with_regs(TCR_EL1=made.regs.TCR_EL1 & ~63 | 5)
    assert [d.field for d in deciders(translate(bad.memory, bad.regs, bad.va))] == ["TxSZ"]


def test_where_two_bits_forbid_the_access_each_by_itself_both_are_named() -> None:
    made = tree(leaf(AP=2), tables={1: {"APTable": 2}})
    found = translate(made.memory, made.regs, made.va, WRITE)
    assert {(d.field, d.level) for d in deciders(found)} == {("AP", 3), ("APTable", 1)}
    for level, mask in ((3, 1 << 7), (1, 1 << 62)):
        one = made.with_flipped(level, mask)
        assert not translate(one.memory, one.regs, one.va, WRITE).ok, "neither is enough alone"
    both = made.with_flipped(3, 1 << 7).with_flipped(1, 1 << 62)
    assert translate(both.memory, both.regs, both.va, WRITE).ok


@pytest.mark.parametrize("name", ["AP[2]", "APTable[1]", "PAN", "WXN", "valid", "OA", "TA"])
def test_a_big_endian_tree_has_the_same_deciders(name: str) -> None:
    made, access, _ = CAUSES[name]
    big = made.with_regs(SCTLR_EL1=made.regs.SCTLR_EL1 | 1 << 25)
    swapped = Words({pa: int.from_bytes(w.to_bytes(8, "big"), "little") for pa, w in made.memory.items()})
    little = translate(made.memory, made.regs, made.va, access)
    assert deciders(translate(swapped, big.regs, made.va, access)) == deciders(little)
    assert str(translate(swapped, big.regs, made.va, access)) == str(little)


# Text.

TABLES = """\
  L0 0x40000000[36] 0x0000000040010003 table -> 0x40010000
  L1 0x40010000[209] 0x0000000040020003 table -> 0x40020000
  L2 0x40020000[179] 0x0000000040030003 table -> 0x40030000
"""
HEAD = "VA 0x0000123456789ab8: EL1 {}, EL10 lower half, 48-bit, 4K granule\n" + TABLES


def text(made: Tree, access: Access = READ) -> str:
    return str(translate(made.memory, made.regs, made.va, access))


def test_golden_text_of_a_translation() -> None:
    made = tree(leaf(0x9ABC_D000, nG=1, DBM=1, PXN=1, UXN=1))
    assert text(made) == (
        HEAD.format("read")
        + "  L3 0x40030000[393] 0x006800009abcdf03 page UXN PXN DBM nG AF SH=0x3 -> 0x9abcd000\n"
        + "  = PA 0x9abcdab8 (level 3), EL1 rw- EL0 ---, Normal write-back read/write-allocate, "
        + "inner shareable, not global"
    )


def test_golden_text_of_an_el2_block_and_of_the_mmu_off() -> None:
    block = tree(leaf(0x4000_0000, low=1, AttrIndx=1), level=1, regime="EL2")
    assert text(block, Access.read(2)) == (
        "VA 0x0000123456789ab8: EL2 read, EL2 48-bit, 4K granule\n"
        "  L0 0x40000000[36] 0x0000000040010003 table -> 0x40010000\n"
        "  L1 0x40010000[209] 0x0000000040000705 block AF SH=0x3 AttrIndx=0x1 -> 0x40000000\n"
        "  = PA 0x56789ab8 (level 1), EL2 rwx, Device-nGnRnE, outer shareable"
    )
    off = tree(va=0x8000_0000, sctlr_flags={"M": 0})
    assert text(off) == (
        "VA 0x0000000080000000: EL1 read, EL10 lower half, 48-bit, 4K granule\n"
        "  = PA 0x80000000 (MMU off), EL1 rwx EL0 rwx, Device-nGnRnE, outer shareable"
    )


@pytest.mark.parametrize(
    ("made", "access", "last"),
    [
        (
            tree(0),
            READ,
            "  L3 0x40030000[393] 0x0000000000000000 invalid\n"
            "  = translation fault, level 3\n"
            "    because VALID (bit 0) is 0\n"
            "    ESR_EL1 0x96000007, FAR_EL1 0x123456789ab8",
        ),
        (
            tree(leaf(low=1)),
            READ,
            "  L3 0x40030000[393] 0x0000000080000701 invalid AF SH=0x3\n"
            "  = translation fault, level 3\n"
            "    because TYPE (bit 1) makes it a block, and level 3 has none\n"
            "    ESR_EL1 0x96000007, FAR_EL1 0x123456789ab8",
        ),
        (
            tree(leaf(AF=0)),
            WRITE,
            "  L3 0x40030000[393] 0x0000000080000303 page SH=0x3 -> 0x80000000\n"
            "  = access flag fault, level 3\n"
            "    because AF (bit 10) is 0\n"
            "    ESR_EL1 0x9600004b, FAR_EL1 0x123456789ab8",
        ),
        (
            tree(leaf() | 1 << 45, ps=4),
            READ,
            "  L3 0x40030000[393] 0x0000200080000703 page AF SH=0x3 -> 0x200080000000\n"
            "  = address size fault, level 3\n"
            "    because OA[47:12] (bits 47:12) exceeds 44 bits\n"
            "    ESR_EL1 0x96000003, FAR_EL1 0x123456789ab8",
        ),
        (
            tree(leaf(AP=2)),
            WRITE,
            "  L3 0x40030000[393] 0x0000000080000783 page AF SH=0x3 AP=0x2 -> 0x80000000\n"
            "  = permission fault, level 3\n"
            "    because AP = 0x2 (EL1 read-only, EL0 none) at level 3\n"
            "    ESR_EL1 0x9600004f, FAR_EL1 0x123456789ab8",
        ),
        (
            tree(leaf(AP=1), PAN=1),
            READ,
            "  L3 0x40030000[393] 0x0000000080000743 page AF SH=0x3 AP=0x1 -> 0x80000000\n"
            "  = permission fault, level 3\n"
            "    because AP = 0x1 (EL1 and EL0 read/write) at level 3\n"
            "    because PAN refuses EL1 data accesses to pages that EL0 can reach\n"
            "    ESR_EL1 0x9600000f, FAR_EL1 0x123456789ab8",
        ),
        (
            tree(leaf(AttrIndx=1)),
            Access(AccessType.READ, 1, aligned=False),
            "  L3 0x40030000[393] 0x0000000080000707 page AF SH=0x3 AttrIndx=0x1 -> 0x80000000\n"
            "  = alignment fault\n"
            "    ESR_EL1 0x96000021, FAR_EL1 0x123456789ab8",
        ),
    ],
    ids=["translation", "reserved", "access flag", "address size", "permission", "PAN", "alignment"],
)
def test_golden_text_of_each_fault_at_a_page(made: Tree, access: Access, last: str) -> None:
    assert text(made, access) == HEAD.format(access.type.value) + last


@pytest.mark.parametrize(
    ("made", "access", "lines"),
    [
        (
            tree(tables={1: {"APTable": 2}}),
            WRITE,
            [
                "  L1 0x40010000[209] 0x4000000040020003 table APTable=0x2 -> 0x40020000",
                "    because the leaf alone would allow it: APTable = 0x2 at level 1, entry 209, PA 0x40010688",
            ],
        ),
        (
            tree()._replace(memory=Words()),
            READ,
            ["  = external abort on the walk, level 0", "    ESR_EL1 0x96000014, FAR_EL1 0x123456789ab8"],
        ),
        (
            tree(tcr_flags={"EPD0": 1}),
            READ,
            ["  = translation fault, level 0", "    because TCR.EPD switches walks of this half off"],
        ),
        (
            tree(ps=4).with_flipped(1, 1 << 45),
            READ,
            ["  = address size fault, level 1", "    because TA[47:12] (bits 47:12) exceeds 44 bits"],
        ),
        (
            tree(ps=4, TTBR0_EL1=0x4000_0000 | 1 << 45),
            READ,
            ["  = address size fault, level 0", "    because TTBR's table address exceeds the output size"],
        ),
        (
            tree(leaf(AP=0), regime="EL20").with_regs(HCR_EL2=hcr(E2H=1, TGE=1)),
            Access.read(0),
            ["    ESR_EL2 0x9200000f, FAR_EL2 0x123456789ab8"],
        ),
        (tree(0, regime="EL3"), Access.read(3), ["    ESR_EL3 0x96000007, FAR_EL3 0x123456789ab8"]),
        (tree(upper=True), Access.read(1), ["VA 0xffff123456789ab8: EL1 read, EL10 upper half, 48-bit, 4K granule"]),
    ],
    ids=["APTable", "external", "EPD", "TA", "TTBR", "EL0 of a host", "EL3", "upper"],
)
def test_golden_lines_of_other_faults(made: Tree, access: Access, lines: list[str]) -> None:
    found = text(made, access).splitlines()
    assert [line for line in lines if line not in found] == []


@pytest.mark.parametrize(
    ("regime", "perms", "shown"),
    [
        (Regime.EL10, PR | PW | UR, "EL1 rw- EL0 r--"),
        (Regime.EL20, PR | PX | UX, "EL2 r-x EL0 --x"),
        (Regime.EL2, PR | PW | PX, "EL2 rwx"),
        (Regime.EL3, 0, "EL3 ---"),
    ],
)
def test_rights_as_text(regime: Regime, perms: int, shown: str) -> None:
    assert rights(perms, regime) == shown


def test_the_attributes_of_a_word_are_its_set_fields_from_the_top() -> None:
    params: Any = WalkParams.of(tree().regs, Regime.EL10, 0)
    assert attributes_text(0x00E8_0000_4000_0703, 3, params) == "page UXN PXN DBM AF SH=0x3"
    assert attributes_text(0x1800_0000_4000_0003, 1, params) == "table UXNTable PXNTable"
    assert attributes_text(0, 2, params) == "invalid"
    assert Format(Granule.K4).leaf(3)["UXN"].bits == "54"
