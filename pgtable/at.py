"""Address translation instructions: AT operations and the PAR_EL1 that they give.

Source: pseudocode AArch64.AT, EncodePAR, EncodePARAttrs; Arm ARM C5.4.
"""

from __future__ import annotations

from pgtable.access import Access, AccessType
from pgtable.faults import Fault, FaultType
from pgtable.memory import Memory
from pgtable.params import Regime
from pgtable.registers import HCR_EL2, PAR_OK, Registers
from pgtable.walk import Swap, Translation, Walk, translate

_R, _W, _A = AccessType.AT_READ, AccessType.AT_WRITE, AccessType.AT_ANY

# Operation: access type, EL it asks for, whether PSTATE.PAN counts.
OPERATIONS: dict[str, tuple[AccessType, int, bool]] = {
    "S1E0R": (_R, 0, False),
    "S1E0W": (_W, 0, False),
    "S1E1R": (_R, 1, False),
    "S1E1W": (_W, 1, False),
    "S1E1RP": (_R, 1, True),
    "S1E1WP": (_W, 1, True),
    "S1E1A": (_A, 1, False),
    "S1E2R": (_R, 2, False),
    "S1E2W": (_W, 2, False),
    "S1E2A": (_A, 2, False),
    "S1E3R": (_R, 3, False),
    "S1E3W": (_W, 3, False),
    "S1E3A": (_A, 3, False),
    "S12E0R": (_R, 0, False),
    "S12E0W": (_W, 0, False),
    "S12E1R": (_R, 1, False),
    "S12E1W": (_W, 1, False),
}


class ExternalAbort(Exception):  # noqa: N818  Arm's name: the AT instruction takes this exception, PAR_EL1 is UNKNOWN
    """The walk of an AT instruction met an external abort."""

    def __init__(self, walk: Walk, esr: int) -> None:
        super().__init__(f"AT of {walk.va:#x} takes an exception: {walk.result}")
        self.walk = walk
        self.esr = esr


def at_request(regs: Registers, operation: str) -> tuple[Access, Regime]:
    """What an AT instruction asks, and in which regime.

    Raises ValueError for an unknown operation, and for one that asks stage 2.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"AT {operation}: must be one of {', '.join(OPERATIONS)}")
    if operation.startswith("S12") and stage2_on(regs):
        raise ValueError(f"AT {operation} with HCR_EL2.VM or DC set: stage 2 is not modelled")
    kind, el, pan = OPERATIONS[operation]
    return Access(kind, el, pan=bool(regs.PAN) if pan else None), _regime(regs, el)


def at_walk(memory: Memory, regs: Registers, operation: str, va: int, swap: Swap | None = None) -> Walk:
    """The walk that an AT instruction makes; raises as `at_request`."""
    access, regime = at_request(regs, operation)
    return translate(memory, regs, va, access, regime=regime, swap=swap)


def stage2_on(regs: Registers) -> bool:
    """AT S12* asks both stages; with HCR_EL2.{DC, VM} = {0, 0}, or {E2H, TGE} = {1, 1}, it is the S1 operation."""
    hcr = HCR_EL2.view(regs.HCR_EL2)
    return bool((hcr.VM or hcr.DC) and not (hcr.E2H and hcr.TGE))


def _regime(regs: Registers, el: int) -> Regime:
    """S1E0* and S1E1* ask EL2&0 when HCR_EL2.{E2H, TGE} are {1, 1}; S1E2* when E2H is 1."""
    host, tge = HCR_EL2["E2H"].get(regs.HCR_EL2), HCR_EL2["TGE"].get(regs.HCR_EL2)
    if el == 3:
        return Regime.EL3
    if el == 2:
        return Regime.EL20 if host else Regime.EL2
    return Regime.EL20 if host and tge else Regime.EL10


def at(memory: Memory, regs: Registers, operation: str, va: int, swap: Swap | None = None) -> int:
    """PAR_EL1 after `AT operation, va`; raises ExternalAbort where the instruction takes an exception instead."""
    return par_of_walk(at_walk(memory, regs, operation, va, swap))


def par_of_walk(walk: Walk) -> int:
    """PAR_EL1 after the AT instruction that made `walk`; raises ExternalAbort as `at`."""
    if isinstance(walk.result, Fault):
        if walk.result.type is FaultType.EXTERNAL_ON_WALK:
            raise ExternalAbort(walk, walk.result.esr(walk.access))
        return walk.result.par()
    return par_of(walk.result)


def par_of(result: Translation) -> int:
    """PAR_EL1 of a translation (pseudocode EncodePAR): PA at 4K resolution, attributes, shareability."""
    return PAR_OK.pack(
        SH=result.sh,
        NS=int(result.ns),
        NSE=1,
        PA=result.pa & PAR_OK["PA"].value_mask,
        ATTR=result.attr,
    )
