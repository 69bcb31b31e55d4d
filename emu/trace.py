"""What a run did to the MMU: TLB maintenance, barriers and table writes, by name and in order.

Encodings: pgtable.tlbi (TLBI), Arm ARM C6.2 (DSB, DMB, ISB).
"""

from __future__ import annotations

from typing import NamedTuple

from pgtable.tlbi import BY_ENCODING

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
    """A store of `size` bytes to a table page, in order."""

    pa: int
    value: int
    pc: int
    size: int = 8

    def __str__(self) -> str:
        return f"[{self.pa:#x}] = {self.value:#018x}"


Event = Maintenance | Barrier | TableWrite


def tlbi_name(op1: int, crn: int, crm: int, op2: int) -> str | None:
    """The TLBI operation of EL1, `VAALE1IS`, with `NXS` for the XS variants; None for another SYS instruction.

    Operations that EL1 has not are `TLBI_`, their encoding and `NXS`.
    """
    if crn not in (8, 9):
        return None
    known = BY_ENCODING.get((op1, crn, crm, op2)) if op1 == 0 else None
    return known.name.upper() if known else f"TLBI_{op1}_{crm}_{op2}{'NXS' if crn == 9 else ''}"


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
