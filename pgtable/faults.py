"""Faults as values, and their encodings in ESR_ELx and PAR_EL1.

Sources: pseudocode EncodeLDFSC (fault status codes), AArch64.FaultSyndrome (ISS), AArch64.EncodePAR.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from pgtable.access import Access, AccessType
from pgtable.descriptors import LAST_LEVEL
from pgtable.gpt import GptWalk
from pgtable.registers import EC_DATA, EC_FETCH, ESR, FSC, PAR_FAULT


class FaultType(Enum):
    """A fault of the translation system; the value is its name in messages."""

    ADDRESS_SIZE = "address size"
    TRANSLATION = "translation"
    ACCESS_FLAG = "access flag"
    PERMISSION = "permission"
    EXTERNAL_ON_WALK = "external abort on the walk"
    ALIGNMENT = "alignment"
    TLB_CONFLICT = "TLB conflict"
    UNSUPPORTED_UPDATE = "unsupported atomic hardware update"
    GPC_ON_WALK = "granule protection on the walk"
    GPC_ON_OUTPUT = "granule protection"


# Fault status code of level 0 (levels add to it), and of the levels below it: -1, and -2 (FEAT_D128).
_CODES: dict[FaultType, tuple[int, dict[int, int]]] = {
    FaultType.ADDRESS_SIZE: (0x00, {-1: 0x29, -2: 0x2C}),
    FaultType.TRANSLATION: (0x04, {-1: 0x2B, -2: 0x2A}),
    FaultType.ACCESS_FLAG: (0x08, {}),
    FaultType.PERMISSION: (0x0C, {}),
    FaultType.EXTERNAL_ON_WALK: (0x14, {-1: 0x13, -2: 0x12}),
    FaultType.GPC_ON_WALK: (0x24, {-1: 0x23, -2: 0x22}),
}
ASSURED_ONLY, TOP_LEVEL = "AssuredOnly", "TopLevel"  # causes of stage 2's permission faults
_WITHOUT_LEVEL = {
    FaultType.ALIGNMENT: 0x21,
    FaultType.TLB_CONFLICT: 0x30,
    FaultType.UNSUPPORTED_UPDATE: 0x31,
    FaultType.GPC_ON_OUTPUT: 0x28,
}


def fault_code(type: FaultType, level: int) -> int:
    """The xFSC of a fault (pseudocode EncodeLDFSC); raises ValueError for a level that the fault cannot have."""
    if type in _WITHOUT_LEVEL:
        return _WITHOUT_LEVEL[type]
    base, below = _CODES[type]
    if 0 <= level <= LAST_LEVEL:
        return base | level
    if level not in below:
        raise ValueError(f"a {type.value} fault cannot be at level {level}")
    return below[level]


class Fault(NamedTuple):
    """Why an access did not translate.

    `level`: the lookup level reported. `stage`: 1 or 2; `s1ptw`: the stage 2 fault was on a stage 1 table access.
    `write`: for a permission fault, a write was refused. `dirty_bit`, `overlay`: what refused it, as in ESR_ELx.ISS2.
    `cause`: what decided, in one word: the descriptor, the register field or the check ("OA", "EPD", "range" ...).
    Stage 2's "AssuredOnly" and "TopLevel" (FEAT_THE) are in the syndrome too. `gpc`: the granule protection check that
    refused (FEAT_RME).
    """

    type: FaultType
    level: int
    stage: int = 1
    s1ptw: bool = False
    write: bool = False
    dirty_bit: bool = False
    overlay: bool = False
    cause: str = ""
    gpc: GptWalk | None = None

    @property
    def code(self) -> int:
        """The fault status code, DFSC or IFSC."""
        return fault_code(self.type, self.level)

    def esr(self, access: Access, *, target_el: int | None = None) -> int:
        """ESR_ELx of the abort, taken to `target_el` (default: the access's EL, 1 for EL0), ISV = 0."""
        target = max(access.el, 1) if target_el is None else target_el
        fetch = access.type is AccessType.FETCH
        return ESR.pack(
            FSC=self.code,
            WnR=int(not fetch and self._wnr(access)),
            S1PTW=int(self.s1ptw),
            CM=int(access.is_maintenance),
            IL=1,
            EC=(EC_FETCH if fetch else EC_DATA) + int(access.el == target),
            DirtyBit=int(self.dirty_bit and not fetch),
            Overlay=int(self.overlay),
            GCS=int(access.is_gcs),
            AssuredOnly=int(self.cause == ASSURED_ONLY),
            SSE=int(self.cause == TOP_LEVEL),  # the bit is TopLevel with ISV = 0
        )

    def _wnr(self, access: Access) -> bool:
        """WnR: 0 for an atomic that a read would have stopped too; maintenance always counts as a write."""
        if self.type is FaultType.PERMISSION:
            return self.write or access.is_maintenance
        return access.type in (AccessType.WRITE, AccessType.GCS_WRITE) or access.is_maintenance

    def par(self) -> int:
        """PAR_EL1 after an AT instruction that met this fault (pseudocode EncodePAR)."""
        return PAR_FAULT.pack(
            F=1,
            FST=self.code,
            PTW=int(self.s1ptw),
            S=int(self.stage == 2),
            RES1_11=1,
            Overlay=int(self.overlay),
            DirtyBit=int(self.dirty_bit),
            AssuredOnly=int(self.cause == ASSURED_ONLY),
            TopLevel=int(self.cause == TOP_LEVEL),
        )

    def __str__(self) -> str:
        said = f"{FSC[self.code]}{' (stage 2)' if self.stage == 2 else ''}"
        if self.gpc is None or self.gpc.fault is None:
            return said
        return f"{said}: {self.gpc.fault.value} fault, GPT level {self.gpc.level}"


class GranuleRefusal(Exception):  # noqa: N818  what happened: a walk makes a fault of it
    """A granule protection check refused a read."""

    def __init__(self, found: GptWalk) -> None:
        super().__init__(str(found))
        self.found = found

    def fault(self, level: int, *, stage: int = 1, s1ptw: bool = False) -> Fault:
        """The fault of the walk that read a descriptor of `level`."""
        return Fault(FaultType.GPC_ON_WALK, level, stage, s1ptw, cause="granule", gpc=self.found)
