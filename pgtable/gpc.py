"""Granule protection around translations: every descriptor read is checked, and the output of a real access.

Rules of this file:
- `Guard` is the memory that a walk reads from: what the check refuses is not read, and the walk ends in a fault.
- AT instructions do not check where they lead (pseudocode AArch64.AT); everything else does, after the translation.
- A fault of these checks is an exception of its own to EL3 (EC 0x1E), or an ordinary abort: `is_gpc_exception`.
Sources: pseudocode FetchDescriptor, AArch64.TranslateAddress, ReportAsGPCException, AArch64.FaultSyndrome.
"""

from __future__ import annotations

from pgtable.access import Access, AccessType
from pgtable.bits import Words
from pgtable.faults import Fault, FaultType, GranuleRefusal
from pgtable.gpt import GpcFault, Gpt, GptWalk, granule_protection_check
from pgtable.gpt_format import MFAR_EL3
from pgtable.memory import Memory
from pgtable.params import WalkParams
from pgtable.registers import HCR_EL2, SCR_EL3, Registers
from pgtable.spaces import PASpace
from pgtable.syndromes import EC_GPC, esr_layout
from pgtable.walk import Fetch, Swap, Translation, Walk, walk

_ESR = esr_layout(EC_GPC)
_GCS = 8  # bit of ISS2


class Guard:
    """Memory as accesses in one space reach it. `checks`: every check made, in order."""

    def __init__(self, memory: Memory, gpt: Gpt, space: PASpace, state: PASpace, checks: list[GptWalk]) -> None:
        self._memory = memory
        self._gpt = gpt
        self._space = space
        self._state = state
        self.checks = checks

    def fetch(self, pa: int) -> int:
        """The word at `pa`; raises GranuleRefusal, or NoMemory."""
        self._check(pa)
        return self._memory.fetch(pa)

    def words(self, pa: int, n: int) -> Words:
        """The `n` words from `pa` on; raises as `fetch`."""
        for page in range(pa & -(1 << 12), pa + 8 * n, 1 << 12):
            self._check(page)
        return self._memory.words(pa, n)

    def _check(self, pa: int) -> None:
        found = granule_protection_check(self._memory.fetch, self._gpt, pa, self._space, self._state)
        self.checks.append(found)
        if not found.ok:
            raise GranuleRefusal(found)

    def of(self, space: PASpace) -> Guard:
        """The same memory in another space, its checks added to the same list."""
        return Guard(self._memory, self._gpt, space, self._state, self.checks)

    @property
    def below_nonsecure_tables(self) -> Fetch | None:
        """What reads the tables that NSTable puts in Non-secure memory; None in a state where NSTable says nothing."""
        return self.of(PASpace.NONSECURE).fetch if self._space is PASpace.SECURE else None


def in_space(memory: Memory, space: PASpace | None) -> Memory:
    """What reads `memory` in `space`, if it is guarded at all."""
    return memory.of(space) if isinstance(memory, Guard) and space is not None else memory


def guard(memory: Memory, regs: Registers, p: WalkParams) -> Guard | None:
    """What the walks of `p` read through; None with the checks off."""
    gpt = Gpt.of(regs)
    return Guard(memory, gpt, p.space, p.space, []) if gpt.on and p.space is not None else None


def guarded_walk(memory: Guard, p: WalkParams, va: int, access: Access, swap: Swap | None) -> Walk:
    """Stage 1's walk with its reads checked."""
    return walk(memory.fetch, p, va, access, swap, memory.below_nonsecure_tables)


def checked(memory: Memory, guard: Guard, found: Walk, access: Access) -> Walk:
    """`found` with the checks of its reads; where a real access goes is checked too, and may be the fault.

    `memory`: where the granule protection table is.
    """
    if isinstance(found.result, Translation) and found.result.space is not None and not access.is_at:
        last = granule_protection_check(memory.fetch, guard._gpt, found.result.pa, found.result.space, guard._state)
        guard.checks.append(last)
        if not last.ok:
            found.result = Fault(FaultType.GPC_ON_OUTPUT, 0, gpc=last, cause="granule")
    found.granules = tuple(guard.checks)
    return found


def is_gpc_exception(fault: Fault, regs: Registers, el: int) -> bool:
    """The fault is taken to EL3 as a granule protection check exception (pseudocode ReportAsGPCException).

    `el`: where the instruction runs that met it. False for faults of other kinds.
    """
    if fault.gpc is None:
        return False
    return fault.gpc.fault is not GpcFault.FAIL or bool(el < 3 and SCR_EL3["GPF"].get(regs.SCR_EL3))


def abort_el(fault: Fault, regs: Registers, el: int) -> int:
    """The exception level that takes the abort of an access at `el` (pseudocode AArch64.Abort, RouteToEL2)."""
    if is_gpc_exception(fault, regs, el):
        return 3
    hcr, scr = HCR_EL2.view(regs.HCR_EL2), SCR_EL3.view(regs.SCR_EL3)
    if el > 1 or not (scr.NS or scr.EEL2):
        return max(el, 1)
    to_el2 = fault.stage == 2 or (hcr.TGE and el == 0) or (fault.gpc is not None and hcr.GPF)
    return 2 if to_el2 else 1


def gpc_esr(fault: Fault, access: Access) -> int:
    """ESR_EL3 of a granule protection check exception; raises ValueError for a fault of another kind."""
    if fault.gpc is None:
        raise ValueError(f"{fault}: no granule protection check has failed")
    fetch = access.type is AccessType.FETCH
    return _ESR.pack(
        xFSC=fault.code,
        WnR=int(not fetch and (access.is_maintenance or access.type in (AccessType.WRITE, AccessType.GCS_WRITE))),
        S1PTW=int(fault.s1ptw),
        CM=int(access.is_maintenance),
        GPCSC=fault.gpc.gpcsc,
        InD=int(fetch),
        S2PTW=int(fault.stage == 2),
        IL=1,
        EC=EC_GPC,
        ISS2=int(access.is_gcs) << _GCS,
    )


def mfar(fault: Fault) -> int:
    """MFAR_EL3 of a granule protection check exception: PA and space; raises as `gpc_esr`."""
    if fault.gpc is None:
        raise ValueError(f"{fault}: no granule protection check has failed")
    pa = fault.gpc.pa & MFAR_EL3["FPA"].value_mask
    return MFAR_EL3.pack(FPA=pa, NSE=fault.gpc.space.nse, NS=fault.gpc.space.ns)
