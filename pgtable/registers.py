"""System registers of the translation regimes, as layouts, and the set of values that a walk reads.

Rules of this file:
- A register's fields are rows, with the Arm ARM's names; a register with two forms (TCR_EL2 with and without
  HCR_EL2.E2H) has two layouts.
- `Registers` is immutable and hashable: a walk's parameters are computed once for it and kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pgtable.bits import Field, Layout, address, bits, ignored, res0, res1
from pgtable.features import CPUS, Features

TG0 = {0: "4K", 1: "64K", 2: "16K", 3: "reserved"}
TG1 = {0: "reserved", 1: "16K", 2: "4K", 3: "64K"}
PA_SIZE = {
    0: "32 bits, 4 GiB",
    1: "36 bits, 64 GiB",
    2: "40 bits, 1 TiB",
    3: "42 bits, 4 TiB",
    4: "44 bits, 16 TiB",
    5: "48 bits, 256 TiB",
    6: "52 bits, 4 PiB",
    7: "56 bits, 64 PiB (52 bits without FEAT_D128)",
}
PA_BITS = (32, 36, 40, 42, 44, 48, 52, 52)  # by PS, IPS and PARange
CACHE = {
    0: "non-cacheable",
    1: "write-back write-allocate",
    2: "write-through",
    3: "write-back no write-allocate",
}
SH = {0: "non-shareable", 1: "reserved", 2: "outer shareable", 3: "inner shareable"}
OFF_ON = {0: "off", 1: "on"}


def _flags(*rows: tuple[int, str, str]) -> list[Field]:
    """One-bit fields from (bit, name, doc)."""
    return [bits(name, bit, doc=doc, values=OFF_ON if not doc else {}) for bit, name, doc in rows]


def _range_rows(n: int, low: int) -> list[Field]:
    """TCR_EL1's rows for the lower (n = 0) and upper (n = 1) VA range, from bit `low` on."""
    return [
        bits(f"T{n}SZ", low + 5, low, "the VA range has 64 - TnSZ bits"),
        bits(f"EPD{n}", low + 7, doc="walks of this range are disabled"),
        bits(f"IRGN{n}", low + 9, low + 8, "inner cacheability of walks", CACHE),
        bits(f"ORGN{n}", low + 11, low + 10, "outer cacheability of walks", CACHE),
        bits(f"SH{n}", low + 13, low + 12, "shareability of walks", SH),
        bits(f"TG{n}", low + 15, low + 14, "granule", TG1 if n else TG0),
    ]


# TCR_EL1; also TCR_EL2 when HCR_EL2.E2H is 1.
TCR_EL1 = Layout(
    "TCR_EL1",
    (
        *_range_rows(0, 0),
        *_range_rows(1, 16),
        res0(6),
        bits("A1", 22, doc="which TTBR holds the ASID", values={0: "TTBR0", 1: "TTBR1"}),
        bits("IPS", 34, 32, "output address size", PA_SIZE),
        res0(35),
        bits("AS", 36, doc="ASID size", values={0: "8 bits", 1: "16 bits"}),
        *_flags((37, "TBI0", "top byte ignored, lower range"), (38, "TBI1", "top byte ignored, upper range")),
        *_flags((39, "HA", "hardware sets the access flag"), (40, "HD", "hardware manages the dirty state")),
        *_flags((41, "HPD0", "table permissions are ignored, lower range")),
        *_flags((42, "HPD1", "table permissions are ignored, upper range")),
        bits("HWU0", 46, 43, "hardware may use descriptor bits 62:59, lower range"),
        bits("HWU1", 50, 47, "hardware may use descriptor bits 62:59, upper range"),
        *_flags((51, "TBID0", "TBI0 is for data only"), (52, "TBID1", "TBI1 is for data only")),
        *_flags((53, "NFD0", "non-fault walks disabled, lower range")),
        *_flags((54, "NFD1", "non-fault walks disabled, upper range")),
        *_flags((55, "E0PD0", "EL0 may not use the lower range"), (56, "E0PD1", "EL0 may not use the upper range")),
        *_flags((57, "TCMA0", "unchecked tag 0"), (58, "TCMA1", "unchecked tag 15")),
        *_flags((59, "DS", "52-bit addresses in 4K and 16K descriptors (LPA2)")),
        *_flags((60, "MTX0", "extended tag checks, lower range"), (61, "MTX1", "extended tag checks, upper range")),
        res0(63, 62),
    ),
)

# TCR_EL2 when HCR_EL2.E2H is 0; also TCR_EL3.
TCR_EL2 = Layout(
    "TCR_EL2",
    (
        bits("T0SZ", 5, 0, "the VA range has 64 - T0SZ bits"),
        res0(7, 6),
        bits("IRGN0", 9, 8, "inner cacheability of walks", CACHE),
        bits("ORGN0", 11, 10, "outer cacheability of walks", CACHE),
        bits("SH0", 13, 12, "shareability of walks", SH),
        bits("TG0", 15, 14, "granule", TG0),
        bits("PS", 18, 16, "output address size", PA_SIZE),
        res0(19),
        *_flags((20, "TBI", "top byte ignored"), (21, "HA", "hardware sets the access flag")),
        *_flags((22, "HD", "hardware manages the dirty state")),
        res1(23),
        *_flags((24, "HPD", "table permissions are ignored")),
        bits("HWU", 28, 25, "hardware may use descriptor bits 62:59"),
        *_flags((29, "TBID", "TBI is for data only"), (30, "TCMA", "unchecked tag 0")),
        res1(31),
        *_flags(
            (32, "DS", "52-bit addresses in 4K and 16K descriptors (LPA2)"),
            (33, "MTX", "extended tag checks"),
        ),
        res0(63, 34),
    ),
)

# TCR_EL3: EL3 has no TCR2; its upper half is it.
TCR_EL3 = Layout(
    "TCR_EL3",
    (
        *[f for f in TCR_EL2 if f.reserved != "RES0" or f.mask < 1 << 32],
        *_flags((34, "PnCH", "protected attribute instead of the Contiguous bit")),
        *_flags((35, "PIE", "indirect permissions"), (36, "POE", "permission overlays"), (37, "AIE", "MAIR2_EL3")),
        *_flags((38, "D128", "128-bit descriptors")),
        res0(40, 39),
        *_flags((41, "PTTWI", ""), (42, "HAFT", "hardware sets the access flag of tables"), (43, "DisCH0", "")),
        res0(63, 44),
    ),
)

TCR2 = Layout(
    "TCR2_ELx",
    (
        *_flags((0, "PnCH", "protected attribute instead of the Contiguous bit"), (1, "PIE", "indirect permissions")),
        *_flags((2, "E0POE", "permission overlays at EL0"), (3, "POE", "permission overlays")),
        *_flags((4, "AIE", "MAIR2_ELx"), (5, "D128", "128-bit descriptors")),
        bits("SKL0", 7, 6, "skipped levels, lower range (EL2, D128)"),
        bits("SKL1", 9, 8, "skipped levels, upper range (EL2, D128)"),
        *_flags((10, "PTTWI", ""), (11, "HAFT", "hardware sets the access flag of tables")),
        *_flags((12, "AMEC0", "alternate MECID, lower range"), (13, "AMEC1", "alternate MECID, upper range")),
        *_flags((14, "DisCH0", ""), (15, "DisCH1", ""), (16, "FNG0", ""), (17, "FNG1", ""), (18, "A2", "")),
        res0(63, 19),
    ),
)

# The fields of HCR_EL2 and SCR_EL3 that stage 1 of a lower EL reads; the rest is named for what it is to us.
HCR_EL2 = Layout(
    "HCR_EL2",
    (
        *_flags((0, "VM", "stage 2 on"), (2, "PTW", "stage 1 walks may not read Device memory")),
        bits("OTHER_1", 1),
        bits("OTHER_11_3", 11, 3),
        *_flags((12, "DC", "default cacheable")),
        bits("OTHER_26_13", 26, 13),
        *_flags((27, "TGE", "EL0 is EL2's"), (31, "RW", "EL1 is AArch64"), (32, "CD", "stage 2 data non-cacheable")),
        bits("OTHER_30_28", 30, 28),
        *_flags((33, "ID", "stage 2 instructions non-cacheable"), (34, "E2H", "EL2 is a host (VHE)")),
        bits("OTHER_41_35", 41, 35),
        *_flags((42, "NV", ""), (43, "NV1", ""), (44, "AT", ""), (45, "NV2", ""), (46, "FWB", "forced write-back")),
        bits("OTHER_56_47", 56, 47),
        *_flags((57, "DCT", "default cacheable is tagged")),
        bits("OTHER_63_58", 63, 58),
    ),
)
SCR_EL3 = Layout(
    "SCR_EL3",
    (
        *_flags((0, "NS", "lower ELs are Non-secure"), (3, "EA", ""), (8, "HCE", ""), (10, "RW", "EL2 is AArch64")),
        *_flags((9, "SIF", "Secure state does not fetch from Non-secure memory")),
        bits("OTHER_2_1", 2, 1),
        bits("OTHER_7_4", 7, 4),
        bits("OTHER_17_11", 17, 11),
        *_flags((18, "EEL2", "Secure EL2 on")),
        bits("OTHER_42_19", 42, 19),
        *_flags((43, "TCR2En", "TCR2 may be used"), (44, "SCTLR2En", ""), (45, "PIEn", ""), (46, "AIEn", "")),
        bits("OTHER_63_47", 63, 47),
    ),
)

# PIR_ELx, PIRE0_ELx, POR_ELx: sixteen nibbles.
NIBBLES = Layout("PIR/POR", tuple(bits(f"Perm{i}", 4 * i + 3, 4 * i, f"permission {i}") for i in range(16)))

TTBR = Layout(
    "TTBRn_EL1",
    (
        bits("CnP", 0, doc="common, not private: other PEs share these tables' TLB entries"),
        address("BADDR", (47, 1), doc="table base address; bits below the table's size are 0"),
        bits("ASID", 63, 48, "address space identifier"),
    ),
)
# With 52-bit addresses (64K granule and PS = 6, or DS = 1) BADDR[51:48] are in bits [5:2].
TTBR_52 = Layout(
    "TTBRn_EL1, 52-bit",
    (
        bits("CnP", 0, doc="common, not private: other PEs share these tables' TLB entries"),
        res0(1),
        address("BADDR", (47, 6), high=(2, 4, 48), doc="table base address"),
        bits("ASID", 63, 48, "address space identifier"),
    ),
)

SCTLR_EL1 = Layout(
    "SCTLR_EL1",
    (
        *_flags((0, "M", "MMU on"), (1, "A", "alignment checks"), (2, "C", "data cacheable")),
        *_flags((3, "SA", "SP alignment check"), (4, "SA0", "SP alignment check at EL0"), (5, "CP15BEN", "")),
        *_flags(
            (6, "nAA", ""),
            (7, "ITD", ""),
            (8, "SED", ""),
            (9, "UMA", ""),
            (10, "EnRCTX", ""),
            (11, "EOS", ""),
        ),
        *_flags((12, "I", "instructions cacheable"), (13, "EnDB", ""), (14, "DZE", "EL0 may DC ZVA")),
        *_flags((15, "UCT", ""), (16, "nTWI", ""), (18, "nTWE", "")),
        res0(17),
        *_flags(
            (19, "WXN", "writable implies execute-never"),
            (20, "TSCXT", ""),
            (21, "IESB", ""),
            (22, "EIS", ""),
        ),
        *_flags((23, "SPAN", "PAN is left alone on exception entry"), (24, "E0E", "EL0 data big-endian")),
        *_flags((25, "EE", "data and table walks big-endian"), (26, "UCI", "EL0 may do cache maintenance")),
        *_flags((27, "EnDA", ""), (28, "nTLSMD", ""), (29, "LSMAOE", ""), (30, "EnIB", ""), (31, "EnIA", "")),
        *_flags((32, "CMOW", "EL0 cache maintenance needs write permission"), (33, "MSCEn", "")),
        res0(34),
        *_flags((35, "BT0", ""), (36, "BT1", ""), (37, "ITFSB", "")),
        bits("TCF0", 39, 38, "tag check faults at EL0"),
        bits("TCF", 41, 40, "tag check faults at EL1"),
        *_flags(
            (42, "ATA0", "EL0 tag access"),
            (43, "ATA", "EL1 tag access"),
            (44, "DSSBS", ""),
            (45, "TWEDEn", ""),
        ),
        bits("TWEDEL", 49, 46),
        *_flags((50, "TMT0", ""), (51, "TMT", ""), (52, "TME0", ""), (53, "TME", ""), (54, "EnASR", "")),
        *_flags((55, "EnAS0", ""), (56, "EnALS", ""), (57, "EPAN", "PAN also for EL0-executable pages")),
        *_flags((58, "TCSO0", ""), (59, "TCSO", ""), (60, "EnTP2", ""), (61, "NMI", ""), (62, "SPINTMASK", "")),
        *_flags((63, "TIDCP", "")),
    ),
)

# MAIR_ELx attribute bytes: what the pseudocode's S1DecodeMemAttrs makes of each is in attributes.py.
MAIR = Layout("MAIR_ELx", tuple(bits(f"Attr{i}", 8 * i + 7, 8 * i, f"attribute {i}") for i in range(8)))

EC_FETCH, EC_DATA = 0x20, 0x24  # aborts from a lower EL; from the same EL it is one more
EC = {
    EC_FETCH: "instruction abort from a lower EL",
    EC_FETCH + 1: "instruction abort from the same EL",
    EC_DATA: "data abort from a lower EL",
    EC_DATA + 1: "data abort from the same EL",
}


def _fsc() -> dict[int, str]:
    """Fault status codes of an abort (Arm ARM, ISS encoding for a data abort, DFSC)."""
    codes = {}
    for level in range(-1, 4):
        codes[0x29 if level < 0 else 0x00 | level] = f"address size fault, level {level}"
        codes[0x2B if level < 0 else 0x04 | level] = f"translation fault, level {level}"
        codes[0x13 if level < 0 else 0x14 | level] = f"external abort on the walk, level {level}"
        if level >= 0:
            codes[0x08 | level] = f"access flag fault, level {level}"
            codes[0x0C | level] = f"permission fault, level {level}"
    return codes | {
        0x10: "external abort, not on a walk",
        0x11: "tag check fault",
        0x21: "alignment fault",
        0x30: "TLB conflict abort",
        0x31: "unsupported atomic hardware update",
        0x34: "lockdown",
        0x35: "unsupported exclusive or atomic access",
    }


FSC = _fsc()

ESR = Layout(
    "ESR_ELx (abort)",
    (
        bits("FSC", 5, 0, "fault status code", FSC),
        bits("WnR", 6, doc="write, not read", values={0: "read", 1: "write"}),
        bits("S1PTW", 7, doc="stage 2 fault on a stage 1 walk"),
        bits("CM", 8, doc="cache maintenance or AT"),
        bits("EA", 9, doc="external abort type"),
        bits("FnV", 10, doc="FAR is not valid"),
        bits("SET", 12, 11, "synchronous error type"),
        bits("VNCR", 13, doc="by VNCR_EL2"),
        bits("AR", 14, doc="acquire/release"),
        bits("SF", 15, doc="64-bit register"),
        bits("SRT", 20, 16, "register transferred"),
        bits("SSE", 21, doc="sign extend"),
        bits("SAS", 23, 22, "access size"),
        bits("ISV", 24, doc="bits 23:14 are valid"),
        bits("IL", 25, doc="32-bit instruction"),
        bits("EC", 31, 26, "exception class", EC),
        bits("Xs", 36, 32, "register of a 64-byte store"),
        bits("DirtyBit", 37, doc="permission fault because of the dirty state"),
        bits("Overlay", 38, doc="permission fault because of a permission overlay"),
        bits("AssuredOnly", 39, doc="stage 2 AssuredOnly"),
        bits("GCS", 40, doc="guarded control stack access"),
        bits("TagAccess", 41, doc="NoTagAccess fault"),
        bits("TnD", 42, doc="tag, not data"),
        bits("HDBSSF", 43, doc="hardware dirty state tracking structure fault"),
        res0(63, 44),
    ),
)

PAR_OK = Layout(
    "PAR_EL1 (F=0)",
    (
        bits("F", 0, doc="fault", values={0: "translated", 1: "fault"}),
        res0(6, 1),
        bits("SH", 8, 7, "shareability", SH),
        bits("NS", 9, doc="Non-secure output address space"),
        bits("IMPDEF", 10, doc="IMPLEMENTATION DEFINED"),
        bits("NSE", 11, doc="with NS, the output address space; RES1 without FEAT_RME"),
        address("PA", (51, 12), doc="output address"),
        res0(55, 52),
        bits("ATTR", 63, 56, "memory attributes, as in MAIR_ELx"),
    ),
)
PAR_FAULT = Layout(
    "PAR_EL1 (F=1)",
    (
        bits("F", 0, doc="fault", values={0: "translated", 1: "fault"}),
        bits("FST", 6, 1, "fault status code", FSC),
        res0(7),
        bits("PTW", 8, doc="stage 2 fault on a stage 1 walk"),
        bits("S", 9, doc="stage of the fault", values={0: "stage 1", 1: "stage 2"}),
        res0(10),
        res1(11),
        bits("AssuredOnly", 12, doc="stage 2 AssuredOnly"),
        bits("TopLevel", 13, doc="stage 2 TopLevel"),
        bits("Overlay", 14, doc="because of a permission overlay"),
        bits("DirtyBit", 15, doc="because of the dirty state"),
        res0(47, 16),
        ignored(63, 48, "IMPLEMENTATION DEFINED"),
    ),
)

# What can be given to `Registers`, with its value when it is not (0 for the rest). PAN, UAO and EL0_POE are no
# registers of their own on hardware: PSTATE bits.
NAMES: dict[str, int] = {
    **dict.fromkeys(("TCR_EL1", "TCR_EL2", "TCR_EL3", "TCR2_EL1", "TCR2_EL2"), 0),
    **dict.fromkeys(("TTBR0_EL1", "TTBR1_EL1", "TTBR0_EL2", "TTBR1_EL2", "TTBR0_EL3"), 0),
    **dict.fromkeys(("MAIR_EL1", "MAIR_EL2", "MAIR_EL3", "MAIR2_EL1", "MAIR2_EL2", "MAIR2_EL3"), 0),
    **dict.fromkeys(("SCTLR_EL1", "SCTLR_EL2", "SCTLR_EL3"), 0x1005),  # M, C, I: what people who give tables mean
    **dict.fromkeys(("PIR_EL1", "PIR_EL2", "PIR_EL3", "PIRE0_EL1", "PIRE0_EL2"), 0),
    **dict.fromkeys(("POR_EL0", "POR_EL1", "POR_EL2", "POR_EL3"), 0),
    **dict.fromkeys(("HCR_EL2", "SCR_EL3", "VTCR_EL2", "VTTBR_EL2", "CONTEXTIDR_EL1"), 0),
    **dict.fromkeys(("PAN", "UAO"), 0),
}
NAMES["HCR_EL2"] = 1 << 31  # RW: EL1 is AArch64
NAMES["SCR_EL3"] = 0x501 | 1 << 43  # RW, HCE, NS; TCR2En


class Registers:
    """Values of system registers; one that is not given has its value in `NAMES`. Immutable and hashable.

    `Registers(TTBR1_EL1=0x4000_0000, TCR_EL1=...)`; `features` is the CPU that has them (default: all).
    Raises ValueError for an unknown name or a value that is not
    64 bits.
    """

    __slots__ = ("_features", "_hash", "_params", "_values")

    def __init__(self, features: Features | None = None, **values: int) -> None:
        for name, value in values.items():
            if name not in NAMES:
                raise ValueError(f"register {name} is not one that a translation reads ({', '.join(sorted(NAMES))})")
            if not isinstance(value, int) or not 0 <= value < 1 << 64:
                raise ValueError(f"{name}={value!r}: must be an integer of 64 bits")
        self._values = {**NAMES, **values}
        self._features = features or CPUS["max"]
        self._hash = hash((self.features, *self._values.values()))
        self._params: dict[Any, Any] = {}  # what params.py computed from this set

    @classmethod
    def parse(cls, text: str) -> Registers:
        """From lines `NAME=VALUE` (`#` starts a comment), or one JSON object; a value is what int(x, 0) reads."""
        if text.lstrip().startswith("{"):
            pairs = {name: str(value) for name, value in json.loads(text).items()}
        else:
            lines = [line.partition("#")[0].strip() for line in text.splitlines()]
            pairs = dict(_pair(line) for line in lines if line)
        return cls(None, **{name: _number(name, value) for name, value in pairs.items()})

    @property
    def features(self) -> Features:
        """The CPU that has them."""
        return self._features

    def __getattr__(self, name: str) -> int:
        try:
            values: dict[str, int] = object.__getattribute__(self, "_values")
            return values[name]
        except KeyError:
            raise AttributeError(f"no register {name}") from None

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def replace(self, **values: int) -> Registers:
        """The same set with some registers changed."""
        return Registers(self.features, **{**self._values, **values})

    def as_dict(self) -> Mapping[str, int]:
        """Every register's value."""
        return dict(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Registers) and self._values == other._values and self.features == other.features

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        given = {k: v for k, v in self._values.items() if v != NAMES[k]}
        return f"Registers({', '.join(f'{k}={v:#x}' for k, v in given.items())})"


def _pair(line: str) -> tuple[str, str]:
    name, equals, value = line.partition("=")
    if not equals:
        raise ValueError(f"register line {line!r}: must be NAME=VALUE")
    return name.strip(), value.strip()


def _number(name: str, text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise ValueError(f"{name}={text}: not a number (0x..., decimal)") from None
