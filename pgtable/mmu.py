"""What an access does: by the registers, the translation regime and its parameters, one stage or both.

    walk = translate(memory, regs, 0xFFFF_8000_1234_5678, Access.write(el=1))

Rules of this file:
- EL1&0 goes through stage 2 where HCR_EL2 has it on (nested.py); every other regime is stage 1 alone (walk.py).
- The parameters are looked up once for each exception level and half and kept with the registers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pgtable.access import Access
from pgtable.bulk import Many, stage1_many
from pgtable.gpc import checked, guard, guarded_walk
from pgtable.memory import Memory, PhysicalMemory
from pgtable.nested import translate_nested
from pgtable.nested128 import NestedWalk128
from pgtable.nested_many import nested_many
from pgtable.params import Regime, d128_on, stage2_on
from pgtable.params128 import WalkParams128, stage1_params
from pgtable.registers import HCR_EL2, Registers
from pgtable.stage2 import vtcr_d128
from pgtable.walk import Swap, Walk, walk
from pgtable.walk128 import Walk128, fetch16, walk128


def translate(
    memory: Memory,
    regs: Registers,
    va: int,
    access: Access | None = None,
    *,
    regime: Regime | None = None,
    swap: Swap | None = None,
) -> Walk:
    """What `access` (default: an EL1 read) to `va` does: a Walk, whose result is a Translation or a Fault.

    With stage 2 on (HCR_EL2.VM or DC), EL1&0's is a NestedWalk. With 128-bit descriptors (FEAT_D128) it is a Walk128 or
    a NestedWalk128: those are not judged.

    `swap(pa, old, new)` makes hardware updates (access flag, dirty state), the words as memory holds them, and says
    whether the word was still `old`; without it they are only listed in `updates`. Source: pseudocode
    AArch64.FullTranslate. With GPCCR_EL3.GPC (FEAT_RME) every descriptor read is checked, and where a real access goes.
    """
    access = access or _READ
    if va >> 64:
        raise ValueError(f"VA {va:#x}: must be 64 bits")
    if regime is None:
        key = access.el, va >> 55 & 1
        params = regs._params.get(key)
        if params is None:
            params = regs._params[key] = stage1_params(regs, regime_of(regs, access.el), va)
    else:
        params = stage1_params(regs, regime, va)
    if params.space is not None and (guarded := guard(memory, regs, params)):
        if params.through_stage2:
            found: Walk = translate_nested(guarded, regs, va, access, swap=swap)
        else:
            found = guarded_walk(guarded, params, va, access, swap)
        return checked(memory, guarded, found, access)
    if params.through_stage2:
        return translate_nested(memory, regs, va, access, swap=swap)
    if isinstance(params, WalkParams128):
        return walk128(fetch16(memory), params, va, access, swap)
    return walk(memory.fetch, params, va, access, swap)


def translate128(
    memory: Memory,
    regs: Registers,
    va: int,
    access: Access | None = None,
    *,
    regime: Regime | None = None,
    swap: Swap | None = None,
) -> Walk128 | NestedWalk128:
    """`translate` where it goes through 128-bit descriptors; not judged. Raises ValueError where it does not.

    The result is a Translation or a Fault; `swap` gets words of 128 bits.
    """
    chosen = regime or regime_of(regs, (access or _READ).el)
    both = chosen is Regime.EL10 and stage2_on(regs)
    if not (d128_on(regs, chosen) or (both and vtcr_d128(regs))):
        raise ValueError(f"{chosen.value}: 128-bit descriptors are off (D128), or the CPU has no FEAT_D128")
    found = translate(memory, regs, va, access, regime=regime, swap=swap)
    assert isinstance(found, Walk128 | NestedWalk128)
    return found


_READ = Access()


def translate_many(
    memory: Memory,
    regs: Registers,
    vas: npt.ArrayLike,
    access: Access | None = None,
    *,
    regime: Regime | None = None,
    swap: bool = False,
) -> Many:
    """What `access` (default: an EL1 read) to each of `vas` (integers of 64 bits, any shape) does.

    128-bit descriptors do not fit into its arrays: ValueError. With stage 2 on, EL1&0's is a NestedMany. RAM is taken
    to come in whole 4 KiB pages. `swap` makes the hardware updates, which are else only listed; it needs a
    PhysicalMemory. Raises ValueError for VAs that are not unsigned 64-bit integers, and for a CPU with FEAT_RME.
    """
    refuse_rme(regs)
    access = access or Access()
    regime = regime or regime_of(regs, access.el)
    both = regime is Regime.EL10 and stage2_on(regs)
    found = nested_many(memory, regs, vas, access) if both else stage1_many(memory, regs, vas, access, regime)
    return made(memory, found, swap)


def refuse_rme(regs: Registers) -> None:
    """Raises ValueError where addresses have spaces and granules, which arrays do not tell."""
    if regs.features.rme:
        raise ValueError(f"{regs.features.name}: arrays do not tell physical address spaces (FEAT_RME): use translate")


def made(memory: Memory, found: Many, swap: bool) -> Many:
    """The same, its hardware updates made in `memory` if `swap`; raises ValueError for one that cannot be written."""
    if not swap:
        return found
    if not isinstance(memory, PhysicalMemory):
        raise ValueError(f"swap=True: {type(memory).__name__} cannot be written, only a PhysicalMemory")
    for region in memory.regions:
        offset = found.stored.pa - np.uint64(region.base)
        inside = offset < np.uint64(region.size)
        region.words[(offset[inside] >> np.uint64(3)).view(np.int64)] = found.stored.new[inside]
    return found


def regime_of(regs: Registers, el: int) -> Regime:
    """The regime that an access at exception level `el` uses (pseudocode TranslationRegime)."""
    if el == 3:
        return Regime.EL3
    host = HCR_EL2["E2H"].get(regs.HCR_EL2)
    if el == 2:
        return Regime.EL20 if host else Regime.EL2
    return Regime.EL20 if el == 0 and host and HCR_EL2["TGE"].get(regs.HCR_EL2) else Regime.EL10


def branch_target(regs: Registers, va: int, el: int) -> int:
    """The PC after a branch to `va` at exception level `el`: a tag that TBI ignores is replaced by copies of bit 55.

    Source: pseudocode AArch64.BranchAddr. Fetch faults report this address in FAR_ELx.
    """
    p = stage1_params(regs, regime_of(regs, el), va)
    if not p.tbi or p.tbid:
        return va
    low = va & TAG_BYTE - 1
    return low | (_U64 ^ TAG_BYTE - 1) if p.regime.has_el0 and low >> 55 else low


TAG_BYTE = 1 << 56  # the lowest bit of the tag that TBI ignores
_U64 = (1 << 64) - 1
