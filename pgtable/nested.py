"""EL1&0 through both stages: the reads of stage 1's tables go through stage 2, and so does its result.

    walk = translate_nested(memory, regs, va, Access.write(el=1))
    walk.ok, walk.ipa, walk.pa, walk.fault, walk.hpfar; print(walk)

Rules of this file:
- Addresses in stage 1's tables are IPAs. A stage 2 fault on the way to one ends the walk (`Fault.s1ptw`).
- Attributes are stage 1's, limited or replaced by stage 2's (combine.py).
Sources: pseudocode AArch64.FullTranslate, S1Walk, S2Translate, AArch64.FaultSyndrome (HPFAR_EL2); Arm ARM D8.1, D8.6.
"""

from __future__ import annotations

from collections.abc import Iterator

from pgtable.access import Access, AccessType
from pgtable.combine import combined, combined_sh
from pgtable.descriptors import LAST_LEVEL
from pgtable.faults import Fault, FaultType
from pgtable.gpc import in_space
from pgtable.memory import Memory
from pgtable.params import Regime, WalkParams
from pgtable.registers import Registers
from pgtable.stage2 import Stage2, Stage2Params, Stage2Walk, stage2_walk
from pgtable.syndromes import HPFAR_EL2
from pgtable.walk import RawStep, Swap, Translation, Update, Walk, in_memory, walk
from pgtable.why import Decider, deciders_of
from pgtable.why_stage2 import stage2_bits, stage2_lines

READ_TABLE, WRITE_TABLE = Access(AccessType.READ), Access(AccessType.WRITE)
HAS_FIPA = (FaultType.TRANSLATION, FaultType.ADDRESS_SIZE, FaultType.ACCESS_FLAG)  # and PERMISSION with S1PTW: IPAValid


class NestedWalk(Walk):
    """A translation of `va` through both stages with its evidence.

    Of stage 1, as in Walk: `params`, `access`, and `raw` and `steps`, whose addresses are IPAs. `tables`: the stage 2
    walks of its descriptors, in order (also those of hardware updates). `stage2`: the walk of its result, None where
    there was none. `result`: with the PA and the combined attributes, or the fault of either stage. `updates`: of the
    tables of both stages, by PA, as memory holds them (the byte orders of the two may differ).
    """

    __slots__ = ("stage1_result", "stage2", "tables")

    def __init__(
        self,
        first: Walk,
        result: Translation | Fault,
        tables: tuple[Stage2Walk, ...],
        stage2: Stage2Walk | None,
        updates: tuple[Update, ...],
    ) -> None:
        super().__init__(first.va, first.access, first.params, first.raw, result, updates)
        self.stage1_result = first.result
        self.tables = tables
        self.stage2 = stage2

    @property
    def stage1_ok(self) -> bool:
        """Stage 1 gave an IPA."""
        return not isinstance(self.stage1_result, Fault)

    @property
    def last_stage2(self) -> Stage2Walk | None:
        """The last walk of stage 2: of the result, or of the table that stopped stage 1; None where there was none."""
        return self.stage2 or (self.tables[-1] if self.tables else None)

    @property
    def ipa(self) -> int | None:
        """Stage 1's result; where stage 2 faulted, the address that it was asked for; None where stage 1 faulted."""
        fault = self.fault
        if fault is not None and fault.stage == 2:
            assert self.last_stage2
            return self.last_stage2.ipa
        return None if isinstance(self.stage1_result, Fault) else self.stage1_result.pa

    @property
    def hpfar(self) -> int:
        """HPFAR_EL2 of a stage 2 fault; 0 where it is UNKNOWN, and for faults of stage 1."""
        return HPFAR_EL2.pack(FIPA=(self.ipa or 0) & -1 << 12, NS=int(self._secure_ns)) if self.has_fipa else 0

    @property
    def has_fipa(self) -> bool:
        """HPFAR_EL2 has the IPA (pseudocode IPAValid)."""
        fault = self.fault
        if fault is None or fault.stage != 2:
            return False
        return fault.type in HAS_FIPA or (fault.s1ptw and fault.type is FaultType.PERMISSION)

    @property
    def _secure_ns(self) -> bool:
        """The IPA that stage 2 was asked for is in Secure state's Non-secure space."""
        return self.params.secure and self.last_stage2 is not None and self.last_stage2.params.ipa_ns

    def __str__(self) -> str:
        return "\n".join(_lines(self))


class _Stage2Abort(Exception):  # noqa: N818  Arm's name
    """Stage 2 refused an access to a stage 1 table."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


def translate_nested(
    memory: Memory,
    regs: Registers,
    va: int,
    access: Access | None = None,
    *,
    swap: Swap | None = None,
    stage1_only: bool = False,
) -> NestedWalk:
    """What an access of EL1 or EL0 does under a hypervisor: a NestedWalk. With stage 2 off it is stage 1's alone.

    `swap`: as for `translate`, for the tables of both stages. `stage1_only`: the result is an IPA, with stage 1's
    attributes, as AT S1E1R gives; its table reads go through stage 2 all the same. Raises ValueError for a VA of more
    than 64 bits.
    """
    if va >> 64:
        raise ValueError(f"VA {va:#x}: must be 64 bits")
    access = access or Access()
    if regs.features.d128:
        from pgtable.nested128 import nested_d128, translate_nested128  # it is made of this module

        if nested_d128(regs):
            return translate_nested128(memory, regs, va, access, swap=swap, stage1_only=stage1_only)
    through = _Through(memory, regs, va, swap)
    first = through.walk(va, access)
    p2 = Stage2Params.of(regs, ns=through.secure and isinstance(first.result, Translation) and first.result.ns)
    second, result = None, first.result
    if isinstance(first.result, Translation) and p2.on and not stage1_only:
        second = stage2_walk(in_space(memory, p2.table_space).fetch, p2, first.result.pa, access, swap=swap)
        done = second.result
        result = done if isinstance(done, Fault) else _combined(first, first.result, done, p2)
    updates = (*through.updates, *(second.stored_updates if second else ()))
    return NestedWalk(first, result, tuple(through.tables), second, updates)


class _Through:
    """Stage 1's walk of `p`, its descriptors reached through stage 2.

    `tables`: the walks that this took. `updates`: what hardware changes on the way, in the tables of both stages.
    """

    def __init__(self, memory: Memory, regs: Registers, va: int, swap: Swap | None) -> None:
        self._memory, self._regs, self._swap = memory, regs, swap
        self._p = p = WalkParams.of(regs, Regime.EL10, va)
        self.secure = p.secure
        self._raw: list[RawStep] = []
        self.tables: list[Stage2Walk] = []
        self.updates: list[Update] = []

    def walk(self, va: int, access: Access) -> Walk:
        """The walk; its result is stage 2's fault where a table cannot be reached."""
        try:
            return walk(self._fetch, self._p, va, access, self._update)
        except _Stage2Abort as abort:
            return Walk(va, access, self._p, self._raw, abort.fault)

    def _reach(self, ipa: int, how: Access, above: list[RawStep]) -> Stage2:
        """Where the descriptor at `ipa` is, below the tables `above`: those say which IPA space it is in."""
        ns = self.secure and any(word & self._p.ns_table for _, _, word in above)
        p2 = Stage2Params.of(self._regs, ns=ns)
        tables = in_space(self._memory, p2.table_space)
        found = stage2_walk(tables.fetch, p2, ipa, how, s1ptw=True, swap=self._swap)
        self.tables.append(found)
        self.updates += [update for update in found.stored_updates if update not in self.updates]
        if isinstance(found.result, Fault):
            raise _Stage2Abort(found.result)
        return found.result

    def _fetch(self, ipa: int) -> int:
        at = self._reach(ipa, READ_TABLE, self._raw)
        word = in_space(self._memory, at.space).fetch(at.pa)
        (step,) = in_memory(Update(ipa, 0, word), self._p.big_endian)[2:]
        self._raw.append((self._p.levels[len(self._raw)][0], ipa, step))
        return word

    def _above(self, ipa: int) -> list[RawStep]:
        """The steps before the one that read the descriptor at `ipa`."""
        return self._raw[: next(i for i, step in enumerate(self._raw) if step[1] == ipa)]

    def _update(self, ipa: int, old: int, new: int) -> bool:
        """Hardware changes a descriptor of stage 1: stage 2 must let it write there."""
        pa = self._reach(ipa, WRITE_TABLE, self._above(ipa)).pa
        if self._swap and not self._swap(pa, old, new):
            self._raw.clear()  # it is all read again
            return False
        self.updates.append(Update(pa, old, new))
        return True


def _combined(first: Walk, s1: Translation, s2: Stage2, p2: Stage2Params) -> Translation:
    """Stage 1's result at stage 2's PA, with the attributes of both."""
    p, leaf = first.params, p2.fmt.leaf(LAST_LEVEL)
    off = p2.fetch_off if first.access.type is AccessType.FETCH else p2.data_off
    attr = combined(s1.attr, leaf["MemAttr"].get(s2.word), fwb=p2.fwb, off=off)
    own = s1.sh if s1.level is None else p.sh if p.fmt.lpa2 else p.page["SH"].get(s1.word)
    sh2 = p2.sh if p2.fmt.lpa2 else leaf["SH"].get(s2.word)
    return s1._replace(pa=s2.pa, attr=attr, sh=combined_sh(own, sh2, attr), ns=s2.ns, space=s2.space)


def deciders(found: Walk) -> list[Decider]:
    """The bits that decided a fault, of the stage that refused (see why.py); [] where there was none."""
    last = found.last_stage2 if isinstance(found, NestedWalk) else None
    if last is not None and found.fault is not None and found.fault.stage == 2:
        return [Decider(*row) for row in stage2_bits(last)]
    return deciders_of(found)


# text


def _lines(found: NestedWalk) -> Iterator[str]:
    yield f"VA {found.va:#018x}: {found.access}, both stages of EL1&0"
    reads = [table for table in found.tables if table.access is READ_TABLE]
    for i, table in enumerate(reads):
        yield f"  stage 1 table at IPA {table.ipa:#x}"
        yield from (f"    {line}" for line in stage2_lines(table))
        if i < len(found.raw):
            level, ipa, word = found.raw[i]
            kind = found.params.fmt.kind(word, level).name.lower()
            yield f"  S1 L{level} IPA {ipa:#x} {word:#018x} {kind}"
    if found.stage2 is not None:
        yield f"  result, IPA {found.stage2.ipa:#x}"
        yield from (f"    {line}" for line in stage2_lines(found.stage2))
    if isinstance(found.result, Fault):
        yield f"  = {'on the walk of stage 1: ' if found.result.s1ptw else ''}{found.result}"
        for decider in deciders(found):
            yield f"    {decider.text}"
        return
    yield f"  = PA {found.result.pa:#x}, {found.result.attributes}, shareability {found.result.sh}"
