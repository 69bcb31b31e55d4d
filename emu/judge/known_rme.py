"""Where a judge is wrong about granule protection (FEAT_RME): the rows that `known.py` adds for CPUs that have it.

The traps of QEMU are numbered as in docs/judges.md.
"""

from __future__ import annotations

from typing import NamedTuple

from emu.judge.corpus import EXC, TO_EL3, Answer, Case
from pgtable import FaultType, NestedWalk, Translation, Walk
from pgtable.faults import fault_code
from pgtable.gpt import NONSECURE_ONLY
from pgtable.gpt_format import CONTIGUOUS, GRANULES, L1_GRANULES, MFAR_EL3, SORT
from pgtable.registers import ESR, PAR_FAULT, PAR_OK
from pgtable.spaces import PASpace
from pgtable.stage2 import Stage2
from pgtable.syndromes import EC_GPC, esr_layout

_ON_WALK = {fault_code(FaultType.GPC_ON_WALK, level) for level in range(-1, 4)}
_GPCSC_LEVEL = esr_layout(EC_GPC)["GPCSC"].put(0, 1)
_U64 = (1 << 64) - 1


class Context(NamedTuple):
    """What a row's test sees."""

    case: Case
    walk: Walk
    judge: Answer
    model: Answer

    @property
    def judge_fst(self) -> int | None:
        """The fault that the judge reports in PAR_EL1."""
        if not isinstance(self.judge, int) or self.judge & EXC or not self.judge & 1:
            return None
        return PAR_FAULT["FST"].get(self.judge)


def not_taken(c: Context) -> bool:
    """T28: an AT instruction meets a broken table of granules."""
    taken = isinstance(c.model, int) and c.model & EXC and ESR["EC"].get(c.model & _U64) == EC_GPC
    return bool(taken) and c.judge_fst in _ON_WALK and c.walk.fault is not None and c.walk.fault.gpc is not None


def of_stage2(c: Context) -> bool:
    """T29: a granule refuses a table of EL1&0's stage 1, where stage 2 is another table or off."""
    fault = c.walk.fault
    if fault is None or fault.gpc is None or fault.stage != 1 or c.judge_fst not in _ON_WALK:
        return False
    return c.walk.params.through_el1 and isinstance(c.judge, int) and bool(c.judge & PAR_FAULT.mask("S"))


def mfar_offset(c: Context) -> bool:
    """T30: all but the low bits of MFAR_EL3 is equal."""
    if not isinstance(c.judge, tuple) or not isinstance(c.model, tuple) or not c.judge[0] & TO_EL3:
        return False
    return c.judge[:2] == c.model[:2] and c.judge[2] & MFAR_EL3.mask("FPA", "NS", "NSE") == c.model[2]


def par_space(c: Context) -> bool:
    """T31: the space of an output, where PAR_EL1 has the one that QEMU would say."""
    result = c.walk.result
    if not isinstance(c.judge, int) or c.judge & (EXC | 1) or not isinstance(result, Translation):
        return False
    said = PAR_OK["NS"].get(c.judge), PAR_OK["NSE"].get(c.judge)
    theirs = result.space in (PASpace.NONSECURE, PASpace.REALM), 1
    return said == theirs and not (c.judge ^ result.par()) & ~PAR_OK.mask("IMPDEF", "NS", "NSE")


def table_of_secure(c: Context) -> bool:
    """T33: SA or NSA puts a table of Secure state's stage 1 in Non-secure memory, not where stage 2's tables are."""
    if not isinstance(c.walk, NestedWalk) or c.walk.params.space is not PASpace.SECURE:
        return False
    return any(
        isinstance(table.result, Stage2)
        and table.result.space is PASpace.NONSECURE
        and table.params.table_space is PASpace.SECURE
        for table in c.walk.tables
    )


def level_of_walk(c: Context) -> bool:
    """T34: GPCSC has the level of the descriptor, not of the granule protection table; else as T30."""
    if not isinstance(c.judge, tuple) or not isinstance(c.model, tuple) or not c.judge[0] & c.model[0] & TO_EL3:
        return False
    fault = c.walk.fault
    if fault is None or fault.type is not FaultType.GPC_ON_WALK or c.judge[0] ^ c.model[0] != _GPCSC_LEVEL:
        return False
    return c.judge[1] == c.model[1] and c.judge[2] & MFAR_EL3.mask("FPA", "NS", "NSE") == c.model[2]


def refused_nonsecure_only(c: Context) -> bool:
    """T35: HCR_EL2.GPF, and a granule that is Non-secure Only."""
    fault = c.walk.fault
    if fault is None or fault.gpc is None or fault.gpc.gpi != NONSECURE_ONLY or not isinstance(c.judge, tuple):
        return False
    return c.judge == (fault.esr(c.walk.access), c.walk.va, 0)


def unread_gpi(c: Context) -> bool:
    """T32: another granule's GPI makes the entry invalid; QEMU goes on with this one's."""
    fault = c.walk.fault
    if fault is None or fault.gpc is None or fault.gpc.cause != "GPI" or fault.gpc.level != 1:
        return False
    gpt, word = fault.gpc.gpt, fault.gpc.steps[-1].word
    if SORT.get(word) == CONTIGUOUS:
        return False
    _, granule = gpt.shifts
    return gpt.valid(L1_GRANULES[f"GPI{fault.gpc.pa >> granule & GRANULES - 1}"].get(word))
