"""EL1&0 through both stages where at least one has 128-bit descriptors (FEAT_D128). **Not judged**.

Rules of this file:
- As in nested.py: addresses in stage 1's tables are IPAs, and a stage 2 fault on the way to one ends the walk.
- Either stage may have descriptors of either size. An assured translation (FEAT_THE) needs Protected = 1 in every
  descriptor of stage 1, which 64-bit ones do not have here (PnCH), and a mostly read-only page of stage 2 below each.
Sources: pseudocode AArch64.FullTranslate, S1Walk, S1InitialTTWState, S1NextWalkStateTable/Leaf (s1assured, M.a.a: it
starts with VTCR_EL2.TL0 or TL1, in v9.4 with D128), CreateAccDescS1TTW, CreateAccDescTTEUpdate, EncodePAR.
"""

from __future__ import annotations

from functools import cached_property

from pgtable.access import Access, AccessType
from pgtable.d128 import NOT_JUDGED
from pgtable.descriptors import LAST_LEVEL
from pgtable.faults import Fault, FaultType
from pgtable.memory import Memory
from pgtable.nested import READ_TABLE, WRITE_TABLE, NestedWalk, _combined, _Stage2Abort, _Through
from pgtable.params import Regime, WalkParams, d128_on
from pgtable.params128 import Stage2Params128, WalkParams128, stage1_params, stage2_params
from pgtable.registers import Registers
from pgtable.stage2 import Stage2, Stage2Params, Stage2Walk, stage2_walk, vtcr_d128
from pgtable.stage2_128 import Of, Stage2Walk128, stage2_walk128
from pgtable.walk import RawStep, Step, Swap, Translation, Update, Walk
from pgtable.walk128 import Changed, Run, Walk128, attempt, fetch16, par128, steps_of


class NestedWalk128(NestedWalk):
    """A NestedWalk with 128-bit descriptors in stage 1, in stage 2 or in both: not judged."""

    __slots__ = ("par_is_128",)
    par_is_128: bool

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """Stage 1's descriptors, in order; addresses are IPAs."""
        if isinstance(self.params, WalkParams128):
            return steps_of(self.params, self.va, self.raw)
        return Walk(self.va, self.access, self.params, self.raw, self.result).steps

    def par(self) -> int:
        """PAR_EL1 after an AT instruction, in the form of the stage that gives the result (isPARFormatD128, M.a.a)."""
        return par128(self.result) if self.par_is_128 else self.result.par()

    def __str__(self) -> str:
        return f"{super().__str__()}\n  {NOT_JUDGED}"


def nested_d128(regs: Registers) -> bool:
    """EL1&0 has 128-bit descriptors at either stage."""
    return regs.features.d128 and (d128_on(regs, Regime.EL10) or vtcr_d128(regs))


def translate_nested128(
    memory: Memory, regs: Registers, va: int, access: Access, *, swap: Swap | None = None, stage1_only: bool = False
) -> NestedWalk128:
    """What an access of EL1 or EL0 does under a hypervisor, for `translate_nested`: a NestedWalk128, not judged.

    `swap(pa, old, new)` gets words of 64 or 128 bits, as the stage whose descriptor it is.
    """
    p, p2 = stage1_params(regs, Regime.EL10, va), stage2_params(regs)
    side = _Side(memory, p, p2, access, swap)
    first = _wide(side, p, va) if isinstance(p, WalkParams128) else _Narrow(side, regs, va).walk(va, access)
    second, result = None, first.result
    if isinstance(first.result, Translation) and p2.on and not stage1_only:
        assured = side.assured and first.result.level is not None
        second = side.walk(first.result.pa, access, Of(assured=assured))
        done = second.result
        result = done if isinstance(done, Fault) else _combined(first, first.result, done, p2)
    updates = (*side.updates, *(second.stored_updates if second else ()))
    found = NestedWalk128(first, result, tuple(side.tables), second, updates)
    found.par_is_128 = p2.d128 if p2.on and not stage1_only else p.d128
    return found


class _Side:
    """Stage 2 as stage 1's walk meets it.

    `tables`: the walks for stage 1's descriptors. `updates`: what hardware changed on the way, as memory holds it.
    `assured`: stage 1's translation so far is an assured one.
    """

    def __init__(self, memory: Memory, p: WalkParams, p2: Stage2Params, access: Access, swap: Swap | None) -> None:
        self.memory, self.p, self.p2, self.access, self.swap = memory, p, p2, access, swap
        self.tables: list[Stage2Walk] = []
        self.updates: list[Update] = []
        self.start()

    def start(self) -> None:
        """Stage 1 begins its walk, or begins again (pseudocode S1InitialTTWState)."""
        p2 = self.p2
        self.assured = isinstance(p2, Stage2Params128) and p2.vm and (p2.tl1 if self.p.upper else p2.tl0)

    def walk(self, ipa: int, access: Access, of: Of) -> Stage2Walk:
        """Stage 2's walk."""
        if isinstance(self.p2, Stage2Params128):
            return stage2_walk128(fetch16(self.memory), self.p2, ipa, access, of, swap=self.swap)
        return stage2_walk(self.memory.fetch, self.p2, ipa, access, s1ptw=of.s1ptw, swap=self.swap)

    def reach(self, ipa: int, how: Access, *, first: bool) -> Stage2:
        """Where a stage 1 descriptor is; raises _Stage2Abort."""
        found = self.walk(ipa, how, Of(True, first, self.p.upper, self.assured))
        self.tables.append(found)
        self.updates += [update for update in found.stored_updates if update not in self.updates]
        fault = found.result
        if isinstance(fault, Fault):
            write = self.access.type in (AccessType.WRITE, AccessType.GCS_WRITE)  # of the access, not of the walk
            raise _Stage2Abort(fault._replace(write=write) if fault.type is FaultType.PERMISSION else fault)
        return fault

    def passed(self, protected: bool) -> None:
        """Stage 1 has read a descriptor, by the walk that is the last of `tables`."""
        last = self.tables[-1]
        self.assured = self.assured and protected and isinstance(last, Stage2Walk128) and last.mro


class _Narrow(_Through):
    """Stage 1 with 64-bit descriptors."""

    def __init__(self, side: _Side, regs: Registers, va: int) -> None:
        super().__init__(side.memory, regs, va, side.swap)
        self._side, self.tables, self.updates = side, side.tables, side.updates

    def _reach(self, ipa: int, how: Access, above: list[RawStep]) -> Stage2:
        return self._side.reach(ipa, how, first=how is READ_TABLE and not self._raw)

    def _fetch(self, ipa: int) -> int:
        if not self._raw:
            self._side.start()
        word = super()._fetch(ipa)
        self._side.passed(protected=False)
        return word


def _wide(side: _Side, p: WalkParams128, va: int) -> Walk128:
    """Stage 1 with 128-bit descriptors; its result is stage 2's fault where a table cannot be reached."""
    while True:
        run = _Guest(side, p)
        try:
            result = attempt(run, p, va, side.access)
        except Changed:
            continue
        except _Stage2Abort as abort:
            return Walk128(va, side.access, p, run.raw, abort.fault)
        return Walk128(va, side.access, p, run.raw, result)


class _Guest(Run):
    """A Run whose descriptors are reached through stage 2."""

    def __init__(self, side: _Side, p: WalkParams128) -> None:
        super().__init__(self._read, self._write, p.big_endian)
        self._side, self._protected = side, p.fmt.table(LAST_LEVEL - 1)["Protected"].mask
        self._memory = fetch16(side.memory)
        side.start()

    def read(self, level: int, pa: int) -> int:
        word = super().read(level, pa)
        self._side.passed(bool(word & self._protected))
        return word

    def _read(self, ipa: int) -> int:
        return self._memory(self._side.reach(ipa, READ_TABLE, first=not self.raw).pa)

    def _write(self, ipa: int, old: int, new: int) -> bool:
        pa = self._side.reach(ipa, WRITE_TABLE, first=False).pa
        if self._side.swap and not self._side.swap(pa, old, new):
            return False
        self._side.updates.append(Update(pa, old, new))
        return True
