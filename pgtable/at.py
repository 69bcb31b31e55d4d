"""Address translation instructions: AT operations and the PAR_EL1 that they give.

Source: pseudocode AArch64.AT, EncodePAR, EncodePARAttrs; Arm ARM C5.4.
"""

from __future__ import annotations

import numpy.typing as npt

from pgtable.access import Access, AccessType
from pgtable.bulk import Many
from pgtable.faults import FaultType
from pgtable.gpc import checked, gpc_esr, guard
from pgtable.gpt import GpcFault
from pgtable.memory import Memory
from pgtable.mmu import made, refuse_rme, translate, translate_many
from pgtable.nested import translate_nested
from pgtable.nested128 import NestedWalk128
from pgtable.nested_many import nested_many
from pgtable.params import Regime, WalkParams, stage2_on
from pgtable.registers import HCR_EL2, Registers
from pgtable.walk import Swap, Walk
from pgtable.walk128 import Walk128

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

    Raises ValueError for an unknown operation.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"AT {operation}: must be one of {', '.join(OPERATIONS)}")
    kind, el, pan = OPERATIONS[operation]
    return Access(kind, el, pan=bool(regs.PAN) if pan else None), _regime(regs, el)


def at_walk(memory: Memory, regs: Registers, operation: str, va: int, swap: Swap | None = None) -> Walk:
    """The walk that an AT instruction makes; raises as `at_request`.

    With stage 2 on, that of S12* is through both stages, and that of S1E1* and S1E0* ends with an IPA; in both, the
    reads of stage 1's tables go through stage 2. With stage 2 off, S12* is the S1 operation.
    """
    access, regime = at_request(regs, operation)
    if asks_stage1_only(regs, operation):
        guarded = guard(memory, regs, WalkParams.of(regs, regime, va))
        found = translate_nested(guarded or memory, regs, va, access, swap=swap, stage1_only=True)
        return checked(memory, guarded, found, access) if guarded else found
    return translate(memory, regs, va, access, regime=regime, swap=swap)


def asks_stage1_only(regs: Registers, operation: str) -> bool:
    """The result is an IPA, though stage 2 is on."""
    return not operation.startswith("S12") and OPERATIONS[operation][1] < 2 and stage2_on(regs)


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


def at_many(memory: Memory, regs: Registers, operation: str, vas: npt.ArrayLike, *, swap: bool = False) -> Many:
    """The walks that `AT operation` makes for each of `vas`; `par()` of the result is PAR_EL1.

    Raises ValueError for an unknown operation.
    """
    access, regime = at_request(regs, operation)
    if asks_stage1_only(regs, operation):
        refuse_rme(regs)
        return made(memory, nested_many(memory, regs, vas, access, stage1_only=True), swap)
    return translate_many(memory, regs, vas, access, regime=regime, swap=swap)


def par_of_walk(walk: Walk) -> int:
    """PAR_EL1 after the AT instruction that made `walk`; raises ExternalAbort as `at`."""
    if takes_exception(walk):
        raise ExternalAbort(walk, external_abort(walk))
    return walk.par() if isinstance(walk, Walk128 | NestedWalk128) else walk.result.par()


def takes_exception(walk: Walk) -> bool:
    """The AT instruction, run at EL3, takes an exception: an external abort, or a granule that cannot be told.

    A granule that refuses is reported in PAR_EL1 at EL3, and below with SCR_EL3.GPF and HCR_EL2.GPF = 0.
    """
    fault = walk.fault
    if fault is None or fault.gpc is None:
        return fault is not None and fault.type is FaultType.EXTERNAL_ON_WALK
    return fault.gpc.fault is not GpcFault.FAIL


def external_abort(walk: Walk) -> int:
    """ESR_ELx of the exception that an AT instruction takes; ValueError if the walk met no external abort.

    It goes to EL2 where stage 2's walk met it, else to the EL that the operation asks for; that of a broken granule
    protection table to EL3.
    """
    if walk.fault is None or not takes_exception(walk):
        raise ValueError(f"the walk of {walk.va:#x} met no external abort")
    if walk.fault.gpc is not None:
        return gpc_esr(walk.fault, walk.access)
    el = 2 if walk.fault.stage == 2 else max(walk.access.el, 1)
    return walk.fault.esr(Access(walk.access.type, el), target_el=el)
