"""VMSAv8-64 translation table descriptors, as rows (Arm ARM D8.3, "Translation table descriptor formats").

Rules of this file:
- A `Format` says which rows apply (granule, DS, stage, regime, PIE, POE, AIE, FWB); `table` and `leaf` give the layout
  of a descriptor of that format at a level. There is no other copy of a bit number in the project.
- Stage 2 formats are for reading words (describe.py): the walk and the rule tables know stage 1 only.
- Levels are Arm's: 3 holds pages, 0 is the root of a 48-bit 4K space, -1 that of a 52-bit one.
- Which levels may hold a block is a table here (`BLOCK_LEVELS`), the pseudocode's AArch64.BlockDescSupported.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import cache, cached_property

from pgtable.bits import Field, Layout, Span, address, bits, ignored, res0

LAST_LEVEL = 3


class Granule(Enum):
    """A translation granule; the value is log2 of its size in bytes."""

    K4 = 12
    K16 = 14
    K64 = 16

    def __init__(self, page_shift: int) -> None:
        self.page_shift = page_shift
        self.page_size = 1 << page_shift
        self.stride = page_shift - 3  # address bits resolved by a level
        self.entries = 1 << self.stride  # descriptors in a full table
        self.label = f"{1 << page_shift >> 10}K"

    def level_shift(self, level: int) -> int:
        """log2 of the bytes that one entry at `level` covers."""
        return self.page_shift + (LAST_LEVEL - level) * self.stride

    def level_size(self, level: int) -> int:
        """The bytes that one entry at `level` covers."""
        return 1 << self.level_shift(level)

    def index(self, va: int, level: int) -> int:
        """The entry of a full table at `level` that translates `va`."""
        return va >> self.level_shift(level) & (self.entries - 1)

    @classmethod
    def named(cls, text: str) -> Granule:
        """`4k`, `16K`, `64k` ... Raises ValueError for another word."""
        for granule in cls:
            if text.upper() in (granule.label, granule.label + "B"):
                return granule
        raise ValueError(f"granule {text}: must be 4K, 16K or 64K")


class Kind(IntEnum):
    """What a descriptor is at its level (pseudocode DecodeDescriptorType)."""

    INVALID = 0
    TABLE = 1
    BLOCK = 2
    PAGE = 3


# Levels at which a block is legal: always; only with 52-bit output addresses in the descriptor (64K: always when
# LPA is implemented, QEMU trap T16; 4K and 16K: TCR.DS = 1).
BLOCK_LEVELS: dict[Granule, tuple[frozenset[int], frozenset[int]]] = {
    Granule.K4: (frozenset({1, 2}), frozenset({0})),
    Granule.K16: (frozenset({2}), frozenset({1})),
    Granule.K64: (frozenset({2}), frozenset({1})),
}

# Entries in one contiguous run, by granule and level (Arm ARM, "Contiguous bit").
CONTIGUOUS_RUN: dict[Granule, dict[int, int]] = {
    Granule.K4: {3: 16, 2: 16, 1: 16},
    Granule.K16: {3: 128, 2: 32},
    Granule.K64: {3: 32, 2: 32},
}

AP_READ_ONLY = 2  # AP[2] in a value of AP
AP_VALUES = {
    0: "EL1 read/write, EL0 none",
    1: "EL1 and EL0 read/write",
    2: "EL1 read-only, EL0 none",
    3: "EL1 and EL0 read-only",
}
AP_VALUES_ONE_EL = {0: "read/write", 1: "read/write", 2: "read-only", 3: "read-only"}
APTABLE_VALUES = {
    0: "no effect on later levels",
    1: "no EL0 access",
    2: "no write at any EL",
    3: "no write at any EL, no EL0 access",
}
SH_VALUES = {
    0: "non-shareable",
    1: "reserved (non-shareable, outer or inner)",
    2: "outer shareable",
    3: "inner shareable",
}
VALID_VALUES = {0: "invalid: any access faults, and hardware ignores the other bits", 1: "valid"}
AF_VALUES = {0: "not accessed: an access faults, or hardware sets it (TCR.HA)", 1: "accessed"}
NG_VALUES = {0: "global: the same for every ASID", 1: "not global: TLB entries are tagged with the ASID"}
GP_VALUES = {0: "not guarded", 1: "guarded: a branch here must land on BTI (FEAT_BTI)"}
CONTIGUOUS_VALUES = {0: "on its own", 1: "one of a run of entries that a TLB may hold as one"}
UXN_VALUES = {0: "EL0 may execute", 1: "EL0 may not execute"}
PXN_VALUES = {0: "privileged code may execute", 1: "privileged code may not execute"}
XN_VALUES = {0: "may be executed", 1: "may not be executed"}
DBM_VALUES = {0: "hardware does not track the dirty state", 1: "hardware may make it writable at a write (TCR.HD)"}
NT_VALUES = {0: "usual", 1: "its size or address is being changed (FEAT_BBM)"}
TABLE_AF_VALUES = {0: "not accessed (counts with FEAT_HAFT only)", 1: "accessed (counts with FEAT_HAFT only)"}
TABLE_XN_VALUES = {0: "no effect on later levels", 1: "no execution below"}
TABLE_UXN_VALUES = {0: "no effect on later levels", 1: "no execution at EL0 below"}
TABLE_PXN_VALUES = {0: "no effect on later levels", 1: "no privileged execution below"}

# Stage 2 (Arm ARM D8.4, D8.6): S2AP, XN[1:0], and MemAttr without and with HCR_EL2.FWB.
S2AP_VALUES = {0: "no access", 1: "read-only", 2: "write-only", 3: "read/write"}
S2XN_VALUES = {
    0: "EL1 and EL0 may execute",
    1: "EL0 may execute, EL1 may not",
    2: "neither EL1 nor EL0 may execute",
    3: "EL1 may execute, EL0 may not",
}
_DEVICES = dict(enumerate(("Device-nGnRnE", "Device-nGnRE", "Device-nGRE", "Device-GRE")))
_CACHES = {1: "non-cacheable", 2: "write-through", 3: "write-back"}
S2_MEMATTR = {
    **{value: f"at most {name}" for value, name in _DEVICES.items()},
    **{
        outer << 2 | inner: f"Normal, at most {_CACHES[inner]}"
        if inner == outer
        else f"Normal, at most inner {_CACHES[inner]}, outer {_CACHES[outer]}"
        for outer in _CACHES
        for inner in _CACHES
    },
    4: "Normal write-back, no tag access (FEAT_MTE_PERM; else reserved)",
    8: "reserved",
    12: "reserved",
}
_FWB = {
    **{value: f"{name}, or what stage 1 says if that is stricter" for value, name in _DEVICES.items()},
    4: "reserved",
    5: "Normal non-cacheable, or stage 1's Device type",
    6: "Normal write-back, whatever stage 1 says",
    7: "what stage 1 says",
}
S2_MEMATTR_FWB = _FWB | {
    **{8 | value: f"{name} (FEAT_MTE_PERM; else MemAttr[3] is reserved)" for value, name in _FWB.items()},
    14: "Normal write-back, whatever stage 1 says; no tag access (FEAT_MTE_PERM)",
    15: "what stage 1 says; no tag access (FEAT_MTE_PERM)",
}


@dataclass(frozen=True)
class Format:
    """Which descriptor rows apply to a tree.

    `ds`: TCR.DS, 52-bit addresses with 4K and 16K granules. `el0`: the regime has an unprivileged level (EL1&0,
    EL2&0), so AP[1], UXN and PXN exist. `pie`, `poe`, `aie`: FEAT_S1PIE, S1POE and AIE are enabled for the regime.
    `lpa`: the 64K granule's descriptors hold OA[51:48]. `stage2`: EL1&0's stage 2, `ds` being VTCR_EL2's; `fwb`:
    HCR_EL2.FWB, for stage 2 only.
    """

    granule: Granule = Granule.K4
    ds: bool = False
    el0: bool = True
    pie: bool = False
    poe: bool = False
    aie: bool = False
    lpa: bool = True
    stage2: bool = False
    fwb: bool = False

    def leaf(self, level: int) -> Layout:
        """The layout of a block (level < 3) or page (level 3) descriptor."""
        return _leaf(self, level)

    def table(self, level: int) -> Layout:
        """The layout of a table descriptor at `level` (< 3)."""
        return _table(self)

    def layout(self, word: int, level: int) -> Layout:
        """The layout that `word` has at `level`; an invalid word is shown as what it would be if valid."""
        return self.table(level) if word & 2 and level < LAST_LEVEL else self.leaf(level)

    def kind(self, word: int, level: int) -> Kind:
        """Table, block, page or invalid (pseudocode DecodeDescriptorType)."""
        if not word & 1:
            return Kind.INVALID
        if level == LAST_LEVEL:
            return Kind.PAGE if word & 2 else Kind.INVALID
        if word & 2:
            return Kind.TABLE
        return Kind.BLOCK if level in self.block_levels else Kind.INVALID

    @cached_property
    def block_levels(self) -> frozenset[int]:
        """Levels at which a block is legal (pseudocode AArch64.BlockDescSupported)."""
        always, wide = BLOCK_LEVELS[self.granule]
        return always | wide if self.wide else always

    @property
    def wide(self) -> bool:
        """Descriptors hold 52-bit addresses."""
        return self.lpa if self.granule is Granule.K64 else self.ds

    @property
    def lpa2(self) -> bool:
        """OA[51:50] are in bits [9:8] (TCR.DS; it has no effect on the 64K granule)."""
        return self.ds and self.granule is not Granule.K64


def _output(fmt: Format, shift: int, name: str, doc: str) -> list[Field]:
    """The address row for addresses aligned to `shift`, and the reserved bits around it."""
    if fmt.granule is Granule.K64 and fmt.lpa:
        return [address(name, (47, shift), high=(12, 4, 48), doc=doc), res0(49, 48)]
    if fmt.lpa2:
        return [address(name, (49, shift), high=(8, 2, 50), doc=doc)]
    return [address(name, (47, shift), doc=doc), res0(49, 48)]


def _below(fmt: Format, shift: int, low: int = 12) -> list[Field]:
    """Rows between bit 12 and the address: nT in a block, and reserved bits."""
    rows = []
    low = 16 if fmt.granule is Granule.K64 and fmt.lpa else low
    if shift > 16 and low <= 16:
        rows.append(bits("nT", 16, doc="block translation entry is being changed", values=NT_VALUES))
        rows += [res0(shift - 1, 17)] if shift > 17 else []
        rows += [res0(15, low)] if low < 16 else []
    elif shift > low:
        rows.append(res0(shift - 1, low))
    return rows


# With indirect permissions the bits that were execute-never, DBM and the lower access bit index PIR_ELx or S2PIR_EL2.
_PIINDEX = (Span(54, 1, 3), Span(53, 1, 2), Span(51, 1, 1), Span(6, 1, 0))


def _permission_rows(fmt: Format) -> list[Field]:
    if fmt.pie:
        return [
            Field("PIIndex", _PIINDEX, "which field of PIR_ELx gives the permissions"),
            bits("nDirty", 7, doc="not dirty: a write makes it 0", values={0: "dirty", 1: "clean"}),
        ]
    if fmt.el0:
        return [
            bits("AP", 7, 6, "data access permissions AP[2:1]", AP_VALUES),
            bits("DBM", 51, doc="dirty bit modifier: hardware may clear AP[2] on a write", values=DBM_VALUES),
            bits("PXN", 53, doc="privileged execute-never", values=PXN_VALUES),
            bits("UXN", 54, doc="unprivileged execute-never", values=UXN_VALUES),
        ]
    return [
        bits("AP", 7, 6, "data access permissions AP[2:1]; AP[1] is RES1 in this regime", AP_VALUES_ONE_EL),
        bits("DBM", 51, doc="dirty bit modifier: hardware may clear AP[2] on a write", values=DBM_VALUES),
        bits("PXN", 53, doc="reserved, 0, in a regime with one level", reserved="RES0"),
        bits("XN", 54, doc="execute-never", values=XN_VALUES),
    ]


def _high_rows(fmt: Format) -> list[Field]:
    """Bits 63:55: software's, and what FEAT_S1POE and FEAT_AIE took of the old PBHA bits."""
    rows = [ignored(58, 55, "for software"), ignored(63)]
    rows += [bits("POIndex", 62, 60, "which field of POR_ELx overlays")] if fmt.poe else [ignored(62, 60)]
    rows += [bits("AttrIndx3", 59, doc="AttrIndx[3]: MAIR2_ELx")] if fmt.aie else [ignored(59)]
    return rows


@cache
def _leaf(fmt: Format, level: int) -> Layout:
    shift = fmt.granule.level_shift(level)
    page = level == LAST_LEVEL
    kind = "page" if page else "block"
    rows = [
        bits("VALID", 0, doc="the descriptor is valid", values=VALID_VALUES),
        bits("TYPE", 1, doc="page" if page else "block or table", values=_type_values(level)),
        bits("AF", 10, doc="access flag: 0 faults, or hardware sets it (TCR.HA)", values=AF_VALUES),
        bits("Contiguous", 52, doc="one of a run of entries with the same attributes", values=CONTIGUOUS_VALUES),
        *(_stage2_rows(fmt) if fmt.stage2 else _stage1_rows(fmt)),
        *_output(fmt, shift, "OA", "output address"),
        *_below(fmt, shift),
    ]
    rows += [] if fmt.lpa2 else [bits("SH", 9, 8, "shareability", SH_VALUES)]
    return Layout(f"{fmt.granule.label} level {level} {kind}{', stage 2' if fmt.stage2 else ''}", tuple(rows))


def _stage1_rows(fmt: Format) -> list[Field]:
    ns = {0: "Secure output address, in Secure state", 1: "Non-secure output address"}
    return [
        bits("AttrIndx", 4, 2, "which attribute of MAIR_ELx"),
        bits("NS", 5, doc="output address space is Non-secure (Secure state only)", values=ns),
        bits("nG", 11, doc="not global: tagged with the ASID", values=NG_VALUES),
        bits("GP", 50, doc="guarded page (FEAT_BTI)", values=GP_VALUES),
        *_permission_rows(fmt),
        *_high_rows(fmt),
    ]


def _stage2_rows(fmt: Format) -> list[Field]:
    """What stage 2 has of its own; bits 58 and 55 are software's where the feature they name is not used."""
    return [
        bits("MemAttr", 5, 2, "memory type, a limit on stage 1's", S2_MEMATTR_FWB if fmt.fwb else S2_MEMATTR),
        *_stage2_permission_rows(fmt),
        bits("FnXS", 11, doc="TLBI nXS need not wait", values={0: "XS is 1", 1: "XS is 0 (FEAT_XS)"}),
        res0(50),
        bits("NS", 55, doc="Realm state: output address space is Non-secure; else for software"),
        ignored(57, 56, "for software"),
        bits(
            "AssuredOnly", 58, doc="with VTCR_EL2.AssuredOnly (FEAT_THE): assured translations only; else for software"
        ),
        bits("POIndex", 62, 59, "which field of S2POR_EL1 overlays") if fmt.poe else ignored(62, 59),
        ignored(63),
    ]


def _stage2_permission_rows(fmt: Format) -> list[Field]:
    if fmt.pie:
        return [
            Field("PIIndex", _PIINDEX, "which field of S2PIR_EL2 gives the permissions"),
            bits("Dirty", 7, doc="dirty: a write needs it or sets it", values={0: "clean", 1: "dirty"}),
        ]
    dirty = {0: DBM_VALUES[0], 1: "hardware may set S2AP[1] at a write (VTCR_EL2.HD)"}
    return [
        bits("S2AP", 7, 6, "data access permissions, a limit on stage 1's", S2AP_VALUES),
        bits("DBM", 51, doc="dirty bit modifier: hardware may set S2AP[1] on a write", values=dirty),
        bits("XN", 54, 53, "execute-never XN[1:0]; bit 53 needs FEAT_XNX", S2XN_VALUES),
    ]


def _type_values(level: int) -> dict[int, str]:
    return {0: "reserved: fault", 1: "page"} if level == LAST_LEVEL else {0: "block", 1: "table"}


@cache
def _table(fmt: Format) -> Layout:
    shift = fmt.granule.page_shift
    rows = [
        bits("VALID", 0, doc="the descriptor is valid", values=VALID_VALUES),
        bits("TYPE", 1, doc="table", values={0: "block", 1: "table"}),
        ignored(7, 2),
        bits("AF", 10, doc="access flag of the table (FEAT_HAFT; ignored without)", values=TABLE_AF_VALUES),
        ignored(11),
        *_output(fmt, shift, "TA", "next-level table address"),
        *([res0(shift - 1, 12)] if shift > 12 and not (fmt.granule is Granule.K64 and fmt.lpa) else []),
        ignored(58, 50),
        *([res0(63, 59)] if fmt.stage2 else _table_permission_rows(fmt)),
    ]
    rows += [] if fmt.lpa2 else [ignored(9, 8)]
    return Layout(f"{fmt.granule.label} table{', stage 2' if fmt.stage2 else ''}", tuple(rows))


def _table_permission_rows(fmt: Format) -> list[Field]:
    non_secure = bits("NSTable", 63, doc="next level is looked up in Non-secure memory (Secure state only)")
    if fmt.el0:
        return [
            bits("PXNTable", 59, doc="PXN for everything below", values=TABLE_PXN_VALUES),
            bits("UXNTable", 60, doc="UXN for everything below", values=TABLE_UXN_VALUES),
            bits("APTable", 62, 61, "limit on AP for everything below", APTABLE_VALUES),
            non_secure,
        ]
    return [
        ignored(59),
        bits("XNTable", 60, doc="XN for everything below", values=TABLE_XN_VALUES),
        bits("APTable", 62, 61, "limit on AP for everything below; APTable[0] is RES0 here", APTABLE_VALUES),
        non_secure,
    ]
