"""VMSAv9-128: translation table descriptors of 128 bits, as rows (FEAT_D128). **Not judged**: no emulator has them.

Rules of this file:
- The facts are Arm's, from the pseudocode and Arm ARM M.a.a D8.3.2; a function's docstring names its source.
- A `Format128` is a `Format` whose layouts have 128 bits: what only reads fields by name works with both.
- A descriptor says how many levels it skips (SKL): bits [1:0] do not tell a table from a block, level + SKL does.
- Permissions are indirect always: there is no AP, XN or DBM, and a table limits no permission below it.
Where the published Sail model (v9.4) and the Arm ARM's pseudocode (M.a.a) differ, M.a.a is followed: AMEC is bit 108
(M.a.a S1AMECFault), not 103 (v9.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

from pgtable.bits import Field, Layout, address, bits, ignored, res0
from pgtable.descriptors import (
    AF_VALUES,
    CONTIGUOUS_VALUES,
    GP_VALUES,
    LAST_LEVEL,
    NG_VALUES,
    NT_VALUES,
    S2_MEMATTR,
    S2_MEMATTR_FWB,
    SH_VALUES,
    TABLE_AF_VALUES,
    VALID_VALUES,
    Format,
    Granule,
    Kind,
)

NOT_JUDGED = "not judged: no emulator has 128-bit descriptors"
WORD = 16  # bytes of a descriptor
TOP = 55  # the highest bit of an address
LOWEST_LEVEL_128 = {Granule.K4: -2, Granule.K16: -1, Granule.K64: 0}

# Entries in one contiguous run, by granule and level (pseudocode ContiguousSize and ContiguousBit with d128 = 1).
CONTIGUOUS_RUN_128: dict[Granule, dict[int, int]] = {
    Granule.K4: {1: 4, 2: 16, 3: 16},
    Granule.K16: {1: 4, 2: 16, 3: 64},
    Granule.K64: {2: 64, 3: 16},
}
# The most levels that a descriptor may skip (pseudocode DecodeDescriptorType).
MOST_SKIPPED = {Granule.K4: 3, Granule.K16: 2, Granule.K64: 2}

SKL_VALUES = {
    0: "no level is skipped; at level 3 a page",
    1: "one level is skipped; at level 2 a block",
    2: "two levels are skipped; at level 1 a block",
    3: "three levels are skipped; at level 0 a block (4K only)",
}
DISCH_VALUES = {0: "Contiguous counts in the next table", 1: "Contiguous is ignored in the next table"}
PROTECTED_VALUES = {0: "not protected", 1: "protected: needed for an assured translation (FEAT_THE)"}


@dataclass(frozen=True)
class Format128(Format):
    """Which rows apply to a tree of 128-bit descriptors; not judged. The fields are Format's; `pie` is always on.

    `ds` matters at stage 2 only: VTCR_EL2.DS (see `params128`). Words are Python ints of 128 bits.
    """

    @property
    def stride(self) -> int:
        """Address bits that one level resolves: descriptors have 16 bytes."""
        return self.granule.page_shift - 4

    def level_shift(self, level: int) -> int:
        """log2 of the bytes that one entry at `level` covers (pseudocode TranslationSize)."""
        return self.granule.page_shift + (LAST_LEVEL - level) * self.stride

    def level_size(self, level: int) -> int:
        """The bytes that one entry at `level` covers."""
        return 1 << self.level_shift(level)

    def leaf(self, level: int) -> Layout:
        """The layout of a block or page at `level`, 128 bits."""
        return _leaf(self, level)

    def table(self, level: int) -> Layout:
        """The layout of a table descriptor, 128 bits, the same at every level."""
        return _table(self)

    def layout(self, word: int, level: int) -> Layout:
        """The layout that `word` has at `level`; an invalid word is shown as what it would be if valid."""
        return self.table(level) if level + self.skipped(word) < LAST_LEVEL else self.leaf(level)

    def kind(self, word: int, level: int) -> Kind:
        """Table, block, page or invalid, by level + SKL (pseudocode DecodeDescriptorType); bit 1 is not looked at."""
        skipped = self.skipped(word)
        end = level + skipped
        if not word & 1 or skipped > MOST_SKIPPED[self.granule] or end > LAST_LEVEL:
            return Kind.INVALID
        if end < LAST_LEVEL:
            return Kind.TABLE
        return Kind.BLOCK if skipped else Kind.PAGE

    def skipped(self, word: int) -> int:
        """SKL: how many levels a table descriptor skips; of a leaf, 3 minus its level."""
        return int(self.table(LAST_LEVEL)["SKL"].get(word))

    def next_level(self, word: int, level: int) -> int:
        """The level of the table that a table descriptor at `level` leads to (pseudocode S1NextWalkStateTable)."""
        return level + self.skipped(word) + 1

    def index_bits(self, word: int) -> int:
        """Address bits that the table below resolves: a level's, and those of every level skipped."""
        return self.stride * (self.skipped(word) + 1)

    def table_base(self, word: int) -> int:
        """The next table's address, aligned down to that table's size (pseudocode NextTableBase).

        So M.a.a; v9.4 aligns to the granule only, and address bits below the table's size are mixed with the index.
        """
        return int(self.table(LAST_LEVEL)["TA"].get(word)) & -(WORD << self.index_bits(word))

    @cached_property
    def block_levels(self) -> frozenset[int]:
        """Levels at which a block is legal: where SKL can be 3 minus the level (BlockDescSupported is not asked)."""
        return frozenset(level for level in range(LAST_LEVEL) if LAST_LEVEL - level <= MOST_SKIPPED[self.granule])

    @property
    def wide(self) -> bool:
        """False: no part of an address is moved."""
        return False


def _address(fmt: Format128, shift: int, name: str, doc: str) -> list[Field]:
    """The address row and the reserved bits around it; where nothing is left of the address, reserved bits only."""
    rows = [res0(90, TOP + 1), res0(107, 101), ignored(100, 91, "for software")]
    rows.append(address(name, (TOP, shift), doc=doc))
    return rows + ([res0(shift - 1, 12)] if shift > 12 else [])


def _common(skipped: bool) -> list[Field]:
    """Rows that every descriptor has; nT where something is skipped: a block, or a table descriptor with SKL."""
    nt = bits("nT", 6, doc="the entry is being changed; RES0 with SKL 0", values=NT_VALUES)
    return [
        bits("VALID", 0, doc="the descriptor is valid", values=VALID_VALUES),
        res0(1),
        nt if skipped else res0(6),
        bits("SKL", 110, 109, "skip level: 3 minus the level in a block or page", SKL_VALUES),
        res0(120, 119),
        res0(126, 125),
    ]


@cache
def _leaf(fmt: Format128, level: int) -> Layout:
    page = level == LAST_LEVEL
    rows = [
        *_common(not page),
        bits("SH", 9, 8, "shareability", SH_VALUES),
        bits("AF", 10, doc="access flag: 0 faults, or hardware sets it (HA)", values=AF_VALUES),
        bits("AMEC", 108, doc="alternate encryption context, Realm state (FEAT_MEC); RES0 in the field tables"),
        bits("Contiguous", 111, doc="one of a run of entries with the same attributes", values=CONTIGUOUS_VALUES),
        bits("PIIndex", 118, 115, "which field of S2PIR_EL2" if fmt.stage2 else "which field of PIR_ELx"),
        bits("POIndex", 124, 121, "which field of the overlay register") if fmt.poe else res0(124, 121),
        *(_stage2_leaf(fmt) if fmt.stage2 else _stage1_leaf(fmt)),
        *_address(fmt, fmt.level_shift(level), "OA", "output address"),
    ]
    kind = "page" if page else "block"
    return Layout(f"{fmt.granule.label} level {level} 128-bit {kind}{_stage(fmt)}", tuple(rows), width=128)


def _stage1_leaf(fmt: Format128) -> list[Field]:
    nt_global = bits("nG", 11, doc="not global: tagged with the ASID", values=NG_VALUES)
    one_level = bits("nG", 11, doc="reserved, 0, in a regime with one level", reserved="RES0")
    index = [bits("AttrIndx", 5, 2, "which attribute of MAIR_ELx and MAIR2_ELx")]
    return [
        *(index if fmt.aie else [bits("AttrIndx", 4, 2, "which attribute of MAIR_ELx"), ignored(5)]),
        bits("nDirty", 7, doc="not dirty: a write makes it 0", values={0: "dirty", 1: "clean"}),
        nt_global if fmt.el0 else one_level,
        ignored(112),
        bits("GP", 113, doc="guarded page (FEAT_BTI)", values=GP_VALUES),
        bits("Protected", 114, doc="of an assured translation", values=PROTECTED_VALUES),
        bits("NS", 127, doc="output address space is Non-secure (Secure state, Realm EL2&0)"),
    ]


def _stage2_leaf(fmt: Format128) -> list[Field]:
    memattr = "memory type, a limit on stage 1's"
    return [
        bits("MemAttr", 5, 2, memattr, S2_MEMATTR_FWB if fmt.fwb else S2_MEMATTR),
        bits("Dirty", 7, doc="dirty: a write makes it 1", values={0: "clean", 1: "dirty"}),
        bits("FnXS", 11, doc="TLBI nXS need not wait", values={0: "XS is 1", 1: "XS is 0 (FEAT_XS)"}),
        res0(113, 112),
        bits("AssuredOnly", 114, doc="for assured translations only (FEAT_THE)"),
        bits("NS", 127, doc="Realm state: output address space is Non-secure; else reserved, 0"),
    ]


@cache
def _table(fmt: Format128) -> Layout:
    rows = [
        *_common(True),
        ignored(5, 2),
        ignored(9, 7),
        bits("AF", 10, doc="access flag of the table (FEAT_HAFT; ignored without)", values=TABLE_AF_VALUES),
        ignored(11),
        res0(108),
        ignored(111),
        ignored(118, 115),
        ignored(124, 121, "ignored with overlays; else reserved, 0"),
        *(_stage2_table() if fmt.stage2 else _stage1_table()),
        *_address(fmt, fmt.granule.page_shift, "TA", "next-level table address"),
    ]
    return Layout(f"{fmt.granule.label} 128-bit table{_stage(fmt)}", tuple(rows), width=128)


def _stage1_table() -> list[Field]:
    return [
        bits("DisCH", 112, doc="disable Contiguous in the next table, and only there", values=DISCH_VALUES),
        ignored(113),
        bits("Protected", 114, doc="of an assured translation", values=PROTECTED_VALUES),
        bits("NSTable", 127, doc="next level is looked up in Non-secure memory (Secure state only)"),
    ]


def _stage2_table() -> list[Field]:
    return [res0(113, 112), ignored(114), ignored(127, doc="ignored in Realm state; else reserved, 0")]


def _stage(fmt: Format128) -> str:
    return ", stage 2" if fmt.stage2 else ""
