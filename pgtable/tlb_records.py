"""Descriptors that are not clean: what a TLB may still hold, and how far its invalidation has come.

Rules of this file:
- The steps: the store (written) - a DSB by the same CPU (visible) - a TLBI in whose scope it is (issued) - a DSB by
  the CPU of the TLBI that completes it (clean). A TLBI before the first DSB counts for nothing.
- At stage 2 a TLBI by IPA, completed by a DSB, leaves entries that combine both stages; a TLBI of all of stage 1, or of
  both stages, finishes (D8.17.6.1). Which VAs lead to an IPA is not known: TLBIs by VA do not count.
- A record goes when every CPU's TLB is certain to have forgotten the old content. Records are immutable and replaced.
Sources: Arm ARM D8.17.1 (R_DDMVT), D8.17.8 (R_PSMWS, R_TGVWD, R_BLDZX).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pgtable.params import WalkParams
from pgtable.tlb_events import Strength, Write, completes
from pgtable.tlbi import ELSEWHERE, LAST, Domain, Invalidation, Target, Type, misses

# How far an invalidation has come, or why it did not.
MISSING, EARLY, UNFINISHED, LOCAL = "no TLBI", "TLBI before DSB", "no DSB after the TLBI", "TLBI not broadcast"
LEAF_ONLY, COMBINED = "leaf-only TLBI of a table", "no TLBI of stage 1 after that of stage 2"
_NOT_VISIBLE, _TO_SELF, _TO_ALL = range(3)


class Unclean(NamedTuple):
    """A descriptor whose former content a TLB may still hold.

    `old`: that content; `word`: what is there now. `pending`: CPUs that may hold it, as a bit mask. `visible`: 0, 1 to
    the writer's own walks, 2 to every CPU's. `cause`: what its invalidation lacks. `serial`: tells records apart.
    `asid`: at stage 2 the VMID. `told`: a finding says that it is not clean. `combined`: of a stage 2 descriptor, only
    entries that combine both stages are left.
    """

    pa: int
    level: int
    va: int
    size: int
    old: int
    word: int
    cpu: int
    pc: int
    asid: int | None
    table: bool
    pending: int
    visible: int
    cause: str
    serial: int
    told: bool = False
    combined: bool = False


class _Issued(NamedTuple):
    """A TLBI that reached a record, until a DSB completes it; `cpus` then have forgotten."""

    pa: int
    serial: int
    cpus: int
    op: Invalidation
    by_ipa: bool


class Records:
    """The unclean descriptors of one half of a VA space that `cpus` CPUs share."""

    def __init__(self, params: WalkParams, cpus: int, stage: int = 1) -> None:
        self._params, self._stage = params, stage
        self._granule = params.fmt.granule
        self._all = (1 << cpus) - 1
        self._serial = 0
        self._records: dict[int, Unclean] = {}
        self._by_va: dict[int, dict[int, tuple[int, ...]]] = {}  # size -> first VA -> PAs of records
        self._fresh: dict[int, list[int]] = {}  # by writer: PAs whose store is not visible to all
        self._issued: dict[int, list[_Issued]] = {}  # by CPU of the TLBI
        self.get = self._records.get

    def __len__(self) -> int:
        return len(self._records)

    def all(self) -> list[Unclean]:
        """Every record, in the order in which the descriptors were changed."""
        return list(self._records.values())

    def add(self, event: Write, asid: int | None, *, table: bool) -> None:
        """A clean descriptor was changed. `asid`: what a TLB has the old content under, None for any."""
        self._serial += 1
        size = self._granule.level_size(event.level)
        va = (event.va or 0) & -size
        made = Unclean(
            *(event.pa, event.level, va, size, event.old, event.new, event.cpu, event.pc, asid, table),
            *(self._all, _NOT_VISIBLE, MISSING, self._serial),
        )
        self._put(made)

    def renew(self, event: Write, record: Unclean, *, told: bool) -> None:
        """An unclean descriptor was changed again: its invalidation starts anew."""
        self._serial += 1
        made = record._replace(word=event.new, cpu=event.cpu, pc=event.pc, visible=_NOT_VISIBLE, cause=MISSING)
        self._put(made._replace(pending=self._all, serial=self._serial, told=told, combined=False))

    def amend(self, record: Unclean, **changes: Any) -> None:
        """The record with some fields changed."""
        self._records[record.pa] = record._replace(**changes)

    def drop(self, record: Unclean) -> None:
        """The descriptor is clean."""
        del self._records[record.pa]
        vas = self._by_va[record.size]
        rest = tuple(pa for pa in vas[record.va] if pa != record.pa)
        if rest:
            vas[record.va] = rest
            return
        del vas[record.va]
        if not vas:
            del self._by_va[record.size]

    def _put(self, record: Unclean) -> None:
        self._records[record.pa] = record
        vas = self._by_va.setdefault(record.size, {})
        there = vas.get(record.va, ())
        if record.pa not in there:
            vas[record.va] = (*there, record.pa)
        self._fresh.setdefault(record.cpu, []).append(record.pa)

    def tlbi(self, cpu: int, op: Invalidation) -> None:
        """A TLBI: issued for the records that it must reach, if their stores are visible."""
        local = op.domain is Domain.LOCAL
        cpus = 1 << cpu if local else self._all
        for record in self._at(op):
            need = _TO_SELF if local and record.cpu == cpu else _TO_ALL
            why = misses(op, self._target(record))
            if not why and record.combined and op.end:
                continue  # by VA
            if why:
                self._not_reached(record, why)
            elif record.visible < need:
                self.amend(record, cause=EARLY)
            else:
                self.amend(record, cause=UNFINISHED)
                by_ipa = op.operation.type is Type.IPAS2
                self._issued.setdefault(cpu, []).append(_Issued(record.pa, record.serial, cpus, op, by_ipa))

    def _at(self, op: Invalidation) -> list[Unclean]:
        """The records that `op` may be about: all, or those at its address."""
        if not op.end or op.operation.ranged:
            return self.all()
        found = []
        for size, vas in self._by_va.items():
            found += [self._records[pa] for pa in vas.get(op.start & -size, ())]
        return found

    def _target(self, r: Unclean) -> Target:
        regime, leaf = self._params.regime, not r.table
        if self._stage == 1:
            return Target(regime, 0, r.asid, r.va, r.size, r.level, leaf, self._granule)
        stage = 3 if r.combined else 2
        return Target(regime, r.asid or 0, None, r.va, r.size, r.level, leaf, self._granule, stage)

    def _not_reached(self, record: Unclean, why: str) -> None:
        if why not in ELSEWHERE and record.cause == MISSING:
            self.amend(record, cause=LEAF_ONLY if why == LAST else f"TLBI of {why}")

    def dsb(self, cpu: int, strength: Strength) -> None:
        """A DSB: completes TLBIs of its CPU, makes its stores visible."""
        issued = self._issued.get(cpu)
        if issued:
            self._issued[cpu] = [one for one in issued if not self._completed(one, strength)]
        fresh = self._fresh.get(cpu)
        if fresh and strength.stores:
            self._show(cpu, fresh, _TO_ALL if strength.domain else _TO_SELF)

    def _completed(self, one: _Issued, strength: Strength) -> bool:
        """The DSB completes the TLBI: its CPUs have forgotten."""
        record = self._records.get(one.pa)
        if record is None or record.serial != one.serial:
            return True
        if not completes(strength, one.op):
            return False
        pending = record.pending & ~one.cpus
        if one.by_ipa:
            self.amend(record, combined=not pending, cause=LOCAL if pending else COMBINED)
        elif pending:
            self.amend(record, pending=pending, cause=LOCAL)
        else:
            self.drop(record)
        return True

    def _show(self, cpu: int, fresh: list[int], visible: int) -> None:
        for pa in fresh:
            record = self._records.get(pa)
            if record is not None and record.cpu == cpu and record.visible < visible:
                self.amend(record, visible=visible)
        if visible == _TO_ALL:
            del self._fresh[cpu]

    def snapshot(self) -> tuple[Any, ...]:
        """The state, for `restore`."""
        index = {size: dict(vas) for size, vas in self._by_va.items()}
        fresh = {cpu: tuple(pas) for cpu, pas in self._fresh.items()}
        issued = {cpu: tuple(many) for cpu, many in self._issued.items()}
        return dict(self._records), index, fresh, issued, self._serial

    def restore(self, state: tuple[Any, ...]) -> None:
        """Back to a state."""
        records, index, fresh, issued, self._serial = state
        self._records = dict(records)
        self._by_va = {size: dict(vas) for size, vas in index.items()}
        self._fresh = {cpu: list(pas) for cpu, pas in fresh.items()}
        self._issued = {cpu: list(many) for cpu, many in issued.items()}
        self.get = self._records.get

    def key(self) -> tuple[Any, ...]:
        """Hashable, equal for states that will go on alike: no PCs, no serial numbers."""
        records = sorted(
            (*r[:1], r.old, r.word, r.cpu, r.pending, r.visible, r.cause, r.combined, -1 if r.asid is None else r.asid)
            for r in self._records.values()
        )
        issued = sorted(
            (cpu, one.pa, one.cpus, one.op.name)
            for cpu, many in self._issued.items()
            for one in many
            if one.pa in self._records and self._records[one.pa].serial == one.serial
        )
        return tuple(records), tuple(issued)
