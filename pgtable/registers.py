"""System registers of the translation regimes, as layouts, and the set of values that a walk reads.

Rules of this file:
- A register's fields are rows, with the Arm ARM's names; a register with two forms (TCR_EL2 with and without
  HCR_EL2.E2H) has two layouts.
- The layouts of control registers are in controls.py, of syndromes in syndromes.py; they can be had from here too.
- `Registers` is immutable and hashable: a walk's parameters are computed once for it and kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pgtable.bits import Field, Layout, address, bits, res0, res1
from pgtable.controls import HCR_EL2, SCR_EL3, SCTLR_ALONE, SCTLR_EL1, flags
from pgtable.features import CPUS, Features
from pgtable.gpt_format import GPCCR_EL3, GPTBR_EL3, MFAR_EL3
from pgtable.syndromes import EC, EC_DATA, EC_FETCH, ESR, FSC, PAR_FAULT, PAR_OK, SH

__all__ = [
    "CONTEXTIDR_EL1",
    "EC",
    "EC_DATA",
    "EC_FETCH",
    "ESR",
    "FSC",
    "GPCCR_EL3",
    "GPTBR_EL3",
    "HCR_EL2",
    "LAYOUTS",
    "MAIR",
    "MFAR_EL3",
    "NAMES",
    "NIBBLES",
    "PAR_FAULT",
    "PAR_OK",
    "PA_BITS",
    "PA_SIZE",
    "SCR_EL3",
    "SCTLR_ALONE",
    "SCTLR_EL1",
    "SH",
    "TCR2",
    "TCR_EL1",
    "TCR_EL2",
    "TCR_EL3",
    "TTBR",
    "TTBR_52",
    "VSTCR_EL2",
    "VTCR_EL2",
    "VTTBR_EL2",
    "WIDE",
    "Registers",
]

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
        *flags((37, "TBI0", "top byte ignored, lower range"), (38, "TBI1", "top byte ignored, upper range")),
        *flags((39, "HA", "hardware sets the access flag"), (40, "HD", "hardware manages the dirty state")),
        *flags((41, "HPD0", "table permissions are ignored, lower range")),
        *flags((42, "HPD1", "table permissions are ignored, upper range")),
        bits("HWU0", 46, 43, "hardware may use descriptor bits 62:59, lower range"),
        bits("HWU1", 50, 47, "hardware may use descriptor bits 62:59, upper range"),
        *flags((51, "TBID0", "TBI0 is for data only"), (52, "TBID1", "TBI1 is for data only")),
        *flags((53, "NFD0", "non-fault walks disabled, lower range")),
        *flags((54, "NFD1", "non-fault walks disabled, upper range")),
        *flags((55, "E0PD0", "EL0 may not use the lower range"), (56, "E0PD1", "EL0 may not use the upper range")),
        *flags((57, "TCMA0", "unchecked tag 0"), (58, "TCMA1", "unchecked tag 15")),
        *flags((59, "DS", "52-bit addresses in 4K and 16K descriptors (LPA2)")),
        *flags((60, "MTX0", "extended tag checks, lower range"), (61, "MTX1", "extended tag checks, upper range")),
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
        *flags((20, "TBI", "top byte ignored"), (21, "HA", "hardware sets the access flag")),
        *flags((22, "HD", "hardware manages the dirty state")),
        res1(23),
        *flags((24, "HPD", "table permissions are ignored")),
        bits("HWU", 28, 25, "hardware may use descriptor bits 62:59"),
        *flags((29, "TBID", "TBI is for data only"), (30, "TCMA", "unchecked tag 0")),
        res1(31),
        *flags(
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
        *flags((34, "PnCH", "protected attribute instead of the Contiguous bit")),
        *flags((35, "PIE", "indirect permissions"), (36, "POE", "permission overlays"), (37, "AIE", "MAIR2_EL3")),
        *flags((38, "D128", "128-bit descriptors")),
        res0(40, 39),
        *flags(
            (41, "PTTWI", "walks may be treated as incoherent (FEAT_THE)"),
            (42, "HAFT", "hardware sets the access flag of tables"),
            (43, "DisCH0", "no Contiguous bit in the first table"),
        ),
        res0(63, 44),
    ),
)

TCR2 = Layout(
    "TCR2_ELx",
    (
        *flags((0, "PnCH", "protected attribute instead of the Contiguous bit"), (1, "PIE", "indirect permissions")),
        *flags((2, "E0POE", "permission overlays at EL0"), (3, "POE", "permission overlays")),
        *flags((4, "AIE", "MAIR2_ELx"), (5, "D128", "128-bit descriptors")),
        bits("SKL0", 7, 6, "levels that are skipped, lower range (EL2, D128)"),
        bits("SKL1", 9, 8, "levels that are skipped, upper range (EL2, D128)"),
        *flags(
            (10, "PTTWI", "walks may be treated as incoherent (FEAT_THE)"),
            (11, "HAFT", "hardware sets the access flag of tables"),
        ),
        *flags((12, "AMEC0", "alternate MECID, lower range"), (13, "AMEC1", "alternate MECID, upper range")),
        *flags((14, "DisCH0", "no Contiguous bit in the first table, lower range")),
        *flags((15, "DisCH1", "no Contiguous bit in the first table, upper range")),
        *flags((16, "A2", "each range has the ASID of its own TTBR (FEAT_ASID2)")),
        *flags(
            (17, "FNG0", "entries are not global, lower range"), (18, "FNG1", "entries are not global, upper range")
        ),
        res0(63, 19),
    ),
)

SCTLR2_EMEC = bits("EMEC", 1, doc="memory encryption contexts are on (FEAT_MEC)")

SL0 = {0: "start at level 2 (4K), 3 (16K, 64K)", 1: "start at level 1 (4K), 2 (16K, 64K)"}
SL0 |= {2: "start at level 0 (4K), 1 (16K, 64K)", 3: "start at level 3 (4K), 0 (16K with DS)"}
VTCR_EL2 = Layout(
    "VTCR_EL2",
    (
        bits("T0SZ", 5, 0, "the IPA range has 64 - T0SZ bits"),
        bits("SL0", 7, 6, "level of the first table", SL0),
        bits("IRGN0", 9, 8, "inner cacheability of walks", CACHE),
        bits("ORGN0", 11, 10, "outer cacheability of walks", CACHE),
        bits("SH0", 13, 12, "shareability of walks", SH),
        bits("TG0", 15, 14, "granule", TG0),
        bits("PS", 18, 16, "output address size", PA_SIZE),
        bits("VS", 19, doc="VMID size", values={0: "8 bits", 1: "16 bits"}),
        res0(20),
        *flags((21, "HA", "hardware sets the access flag"), (22, "HD", "hardware manages the dirty state")),
        res0(24, 23),
        bits("HWU", 28, 25, "hardware may use descriptor bits 62:59"),
        *flags((29, "NSW", "Secure state: walks of the Non-secure IPA space go to Non-secure memory")),
        *flags((30, "NSA", "Secure state: the Non-secure IPA space is Non-secure memory")),
        res1(31),
        *flags((32, "DS", "52-bit addresses in 4K and 16K descriptors (LPA2)")),
        *flags((33, "SL2", "with SL0 = 0, start at level -1 (4K with DS)")),
        *flags((34, "AssuredOnly", "descriptor bit 58 is AssuredOnly"), (35, "TL1", "TopLevel checks, range 1")),
        *flags((36, "S2PIE", "indirect permissions"), (37, "S2POE", "permission overlays")),
        *flags((38, "D128", "128-bit descriptors")),
        res0(39),
        *flags((40, "GCSH", "guarded control stacks need AssuredOnly"), (41, "TL0", "TopLevel checks, range 0")),
        res0(43, 42),
        *flags(
            (44, "HAFT", "hardware sets the access flag of tables"),
            (45, "HDBSS", "dirty state is tracked (FEAT_HDBSS)"),
        ),
        res0(63, 46),
    ),
)

VSTCR_EL2 = Layout(
    "VSTCR_EL2",
    (
        bits("T0SZ", 5, 0, "the Secure IPA range has 64 - T0SZ bits"),
        bits("SL0", 7, 6, "level of the first table", SL0),
        res0(13, 8),
        bits("TG0", 15, 14, "granule", TG0),
        res0(28, 16),
        *flags((29, "SW", "walks of the Secure IPA space go to Non-secure memory")),
        *flags((30, "SA", "the Secure IPA space is Non-secure memory")),
        res1(31),
        res0(32),
        *flags((33, "SL2", "with SL0 = 0, start at level -1 (4K with VTCR_EL2.DS)")),
        res0(63, 34),
    ),
)

# PIR_ELx, PIRE0_ELx, POR_ELx, S2PIR_EL2, S2POR_EL1: sixteen nibbles.
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

VTTBR_EL2 = Layout(
    "VTTBR_EL2", tuple(bits("VMID", 63, 48, "virtual machine identifier") if f.name == "ASID" else f for f in TTBR)
)
CONTEXTIDR_EL1 = Layout("CONTEXTIDR_EL1", (bits("PROCID", 31, 0, "what software calls the process"), res0(63, 32)))

# MAIR_ELx attribute bytes: what the pseudocode's S1DecodeMemAttrs makes of each is in attributes.py.
MAIR = Layout("MAIR_ELx", tuple(bits(f"Attr{i}", 8 * i + 7, 8 * i, f"attribute {i}") for i in range(8)))

# By name, every register whose layout does not depend on another one; TCR_EL2, SCTLR_EL2 and TTBRs have a second.
LAYOUTS: dict[str, Layout] = {
    **{"TCR_EL1": TCR_EL1, "TCR_EL2": TCR_EL2, "TCR_EL3": TCR_EL3, "VTCR_EL2": VTCR_EL2, "VTTBR_EL2": VTTBR_EL2},
    **{"VSTCR_EL2": VSTCR_EL2, "VSTTBR_EL2": VTTBR_EL2, "S2PIR_EL2": NIBBLES, "S2POR_EL1": NIBBLES},
    **{"SCTLR_EL1": SCTLR_EL1, "SCTLR_EL2": SCTLR_ALONE, "SCTLR_EL3": SCTLR_ALONE},
    **{"HCR_EL2": HCR_EL2, "SCR_EL3": SCR_EL3, "CONTEXTIDR_EL1": CONTEXTIDR_EL1},
    **{"GPCCR_EL3": GPCCR_EL3, "GPTBR_EL3": GPTBR_EL3, "MFAR_EL3": MFAR_EL3},
    **dict.fromkeys(("TCR2_EL1", "TCR2_EL2"), TCR2),
    **dict.fromkeys(("TTBR0_EL1", "TTBR1_EL1", "TTBR0_EL2", "TTBR1_EL2", "TTBR0_EL3"), TTBR),
    **dict.fromkeys(("MAIR_EL1", "MAIR_EL2", "MAIR_EL3", "MAIR2_EL1", "MAIR2_EL2", "MAIR2_EL3"), MAIR),
    **dict.fromkeys(("PIR_EL1", "PIR_EL2", "PIR_EL3", "PIRE0_EL1", "PIRE0_EL2"), NIBBLES),
    **dict.fromkeys(("POR_EL0", "POR_EL1", "POR_EL2", "POR_EL3", "S2PIR_EL2", "S2POR_EL1"), NIBBLES),
}

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
    **dict.fromkeys(("VSTCR_EL2", "VSTTBR_EL2", "S2PIR_EL2", "S2POR_EL1", "SCTLR2_EL2"), 0),
    **dict.fromkeys(("GPCCR_EL3", "GPTBR_EL3", "PAN", "UAO"), 0),
}
NAMES["HCR_EL2"] = 1 << 31  # RW: EL1 is AArch64
NAMES["SCR_EL3"] = 0x501 | 1 << 43  # RW, HCE, NS; TCR2En

WIDE = frozenset({"TTBR0_EL1", "TTBR1_EL1", "TTBR0_EL2", "TTBR1_EL2", "VTTBR_EL2"})  # 128 bits with FEAT_D128


class Registers:
    """Values of system registers; one that is not given has its value in `NAMES`. Immutable and hashable.

    `Registers(TTBR1_EL1=0x4000_0000, TCR_EL1=...)`; `features` is the CPU that has them (default: all).
    Raises ValueError for an unknown name or a value that is not 64 bits; with FEAT_D128 those in `WIDE` have 128.
    """

    __slots__ = ("_features", "_hash", "_params", "_values")

    def __init__(self, features: Features | None = None, **values: int) -> None:
        for name, value in values.items():
            if name not in NAMES:
                raise ValueError(f"register {name} is not one that a translation reads ({', '.join(sorted(NAMES))})")
            width = 128 if name in WIDE and features and features.d128 else 64
            if not isinstance(value, int) or not 0 <= value < 1 << width:
                raise ValueError(f"{name}={value!r}: must be an integer of {width} bits")
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
