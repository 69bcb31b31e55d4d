"""What a run did to the MMU: TLB maintenance, barriers and table writes, by name and in order.

Encodings: Arm ARM C5.5 (TLBI), C6.2 (DSB, DMB, ISB).
"""

from __future__ import annotations

from typing import NamedTuple

# TLBI operations of EL1 by (op1, CRm, op2) in the 0b1000 space of CRn; CRm picks the shareability domain.
_EL1_BY_OP2 = {0: "VMALLE1", 1: "VAE1", 2: "ASIDE1", 3: "VAAE1", 5: "VALE1", 7: "VAALE1"}
_EL1_RANGE_BY_OP2 = {1: "RVAE1", 3: "RVAAE1", 5: "RVALE1", 7: "RVAALE1"}
_DOMAIN = {1: "OS", 3: "IS", 7: ""}
_RANGE_DOMAIN = {5: "OS", 2: "IS", 6: ""}

_BARRIER_OPTIONS = {
    1: "oshld", 2: "oshst", 3: "osh", 5: "nshld", 6: "nshst", 7: "nsh",
    9: "ishld", 10: "ishst", 11: "ish", 13: "ld", 14: "st", 15: "sy",
}  # fmt: skip


class Maintenance(NamedTuple):
    """One TLBI: its name, operand (Xt, 0 for none) and PC."""

    operation: str
    operand: int
    pc: int

    @property
    def va(self) -> int | None:
        """The VA of a by-VA operation (bits [43:0] of the operand are VA[55:12]), sign-extended; None for others."""
        if "VA" not in self.operation or self.operation.startswith("R"):
            return None
        va = (self.operand & (1 << 44) - 1) << 12
        return va | 0xFF << 56 if va >> 55 else va

    @property
    def broadcast(self) -> bool:
        """It reaches the other CPUs: the IS and OS forms."""
        return self.operation.removesuffix("NXS").endswith(("IS", "OS"))

    def __str__(self) -> str:
        return f"tlbi {self.operation.lower()}" + (f", {self.va:#018x}" if self.va is not None else "")


class Barrier(NamedTuple):
    """A DSB, DMB or ISB that was executed."""

    name: str
    pc: int

    def __str__(self) -> str:
        return self.name


class TableWrite(NamedTuple):
    """A store to a table page, in order."""

    pa: int
    value: int
    pc: int

    def __str__(self) -> str:
        return f"[{self.pa:#x}] = {self.value:#018x}"


Event = Maintenance | Barrier | TableWrite


def tlbi_name(op1: int, crn: int, crm: int, op2: int) -> str | None:
    """The TLBI operation, `VAALE1IS`, with `NXS` for the XS variants; None for another SYS instruction."""
    if crn not in (8, 9):
        return None
    xs = "NXS" if crn == 9 else ""
    if op1 == 0:
        if crm in _DOMAIN and op2 in _EL1_BY_OP2:
            return _EL1_BY_OP2[op2] + _DOMAIN[crm] + xs
        if crm in _RANGE_DOMAIN and op2 in _EL1_RANGE_BY_OP2:
            return _EL1_RANGE_BY_OP2[op2] + _RANGE_DOMAIN[crm] + xs
    return f"TLBI_{op1}_{crm}_{op2}{xs}"


def barrier_name(word: int) -> str | None:
    """`dsb ish`, `dmb ishst`, `isb`; None for another instruction word."""
    if word & 0xFFFFF01F != 0xD503301F:
        return None
    option, kind = word >> 8 & 15, word >> 5 & 7
    if kind == 6:
        return "isb" if option == 15 else f"isb #{option}"
    if kind in (4, 5):
        return f"{'dsb' if kind == 4 else 'dmb'} {_BARRIER_OPTIONS.get(option, f'#{option}')}"
    return None
