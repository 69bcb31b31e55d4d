"""A model of TLBs: what CPUs may still hold after tables changed, and what an access then does.

Rules of this file:
- An entry is the descriptors that a walk read. A hit is the same walk again over the kept words, so permissions,
  attributes and faults come out as the walk gives them, for any kind of access.
- A leaf and each table on the way are entries of their own. A miss goes on from the deepest table entry that is kept.
- What hardware may do differently is in `Policy`. The default is the worst that a correct program must survive:
  nothing is forgotten, whatever can be translated is held, an invalidation happens as late as it may.
- What is a wrong use of an entry is decided in tlb_stale.py.
- One stage: a walk gives stage 1 entries. Entries of stage 2, or both, can be put in by hand and are invalidated.
Sources: Arm ARM D8.16 (what may be cached), D8.17 (invalidation, completion), D8.15 (TLB conflict abort).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from pgtable.access import Access
from pgtable.descriptors import LAST_LEVEL, Kind
from pgtable.faults import Fault, FaultType
from pgtable.memory import Memory, NoMemory
from pgtable.mmu import regime_of
from pgtable.params import Regime, WalkParams
from pgtable.registers import VTTBR_EL2, Registers
from pgtable.tlb_events import (
    STRENGTHS,
    Dsb,
    Event,
    Finding,
    Isb,
    Return,
    Symbol,
    SysregWrite,
    TableFree,
    TableReuse,
    Tlbi,
    Use,
    Write,
    completes,
)
from pgtable.tlb_scene import Program, line_of
from pgtable.tlb_stale import CONFLICT, FREED, Judge, conflict, outcome, replay
from pgtable.tlb_store import SHARED, Entry, Policy, Steps, Stores
from pgtable.tlb_unseen import Unseen
from pgtable.tlbi import Domain, Invalidation, Target, canonical, misses
from pgtable.walk import Swap, Walk, in_memory, walk

__all__ = ["Entry", "Policy", "TlbModel", "run"]


class _Issued(NamedTuple):
    """A TLBI that is not complete. `hidden`: PAs of stores that were not visible when it was executed."""

    op: Invalidation
    serial: int
    hidden: frozenset[int]


State = tuple[Any, ...]


class TlbModel:
    """TLBs of several CPUs over one memory. `findings` is what was wrong.

    `registers`: one set for all CPUs, or one for each. `symbol(pc)`: names for messages. Feed it every write to a
    descriptor, TLBI, DSB, ISB and register write in order, and ask it for every access.
    """

    def __init__(
        self,
        memory: Memory,
        registers: Registers | Sequence[Registers],
        *,
        cpus: int = 2,
        policy: Policy | None = None,
        symbol: Symbol | None = None,
    ) -> None:
        self.memory = memory
        self.policy = policy or Policy()
        each = [registers] * cpus if isinstance(registers, Registers) else list(registers)
        self._now: dict[int, Registers] = dict(enumerate(each))  # in effect
        self._next: dict[int, Registers] = dict(self._now)  # after the next ISB
        self._stores = Stores(len(each), self.policy.seed)
        self._judge = Judge(memory, symbol, self._holds)
        self._serial = 0
        self._hidden: dict[int, int] = {}  # PA of a store that not every CPU sees yet -> the writer
        self._issued: dict[int, tuple[_Issued, ...]] = {}
        self._own: dict[int, tuple[_Issued, ...]] = {}  # complete for others, waiting for the CPU's own ISB
        self._freed: frozenset[int] = frozenset()
        self._unseen = Unseen(isb=self.policy.isb)

    @property
    def findings(self) -> list[Finding]:
        """What was wrong so far."""
        return self._judge.findings

    # accesses

    def access(self, cpu: int, va: int, access: Access, pc: int = 0, swap: Swap | None = None) -> Walk:
        """What an access does: through an entry if there is one, else a walk whose entries are kept.

        `swap`: as for `translate`; hardware updates go to memory through it. A walk that two entries contradict has
        a TLB conflict fault.
        """
        regs = self._now[cpu]
        p = WalkParams.of(regs, regime_of(regs, access.el), va)
        if self.policy.forget:
            self._stores.forget(cpu, self.policy.forget)
        if not p.mmu_on:
            return walk(self.memory.fetch, p, va, access)
        hits = self._stores.hits(cpu, p, self._vmid(cpu, p.regime), canonical(va))
        leaves = [entry for entry in hits if entry.target.leaf]
        if leaves:
            return self._hit(cpu, va, access, pc, p, leaves, swap)
        table = max(hits, key=_level, default=None)
        return self._miss(cpu, va, access, pc, p, table, swap)

    def _hit(
        self, cpu: int, va: int, access: Access, pc: int, p: WalkParams, leaves: list[Entry], swap: Swap | None
    ) -> Walk:
        walks = [replay(entry, va, access, p) for entry in leaves]
        entry, found = leaves[0], walks[0]
        if len(leaves) > 1 and conflict(leaves, walks):
            self._judge.note(CONFLICT, cpu, pc, va, entry)
            fault = Fault(FaultType.TLB_CONFLICT, entry.target.level, cause="TLB conflict")
            return Walk(va, access, p, found.raw, fault)
        if swap is not None and not all(swap(*in_memory(update, p.big_endian)) for update in found.updates):
            self._stores.remove(cpu, lambda one: one is entry)
            return self.access(cpu, va, access, pc, swap)
        self._compare(cpu, va, access, pc, p, entry, found)
        return found

    def _miss(
        self, cpu: int, va: int, access: Access, pc: int, p: WalkParams, table: Entry | None, swap: Swap | None
    ) -> Walk:
        if table is None:
            found = walk(self.memory.fetch, p, va, access, swap)
        else:
            found = walk(self._over(table.words), table.params, va, access, swap)
            self._compare(cpu, va, access, pc, p, table, found)
        if self._freed:
            self._check_freed(cpu, va, pc, found)
        if self._unseen and found.ok:
            self._unseen.check(cpu, va, pc, found, self._judge)
        self.fill(cpu, found)
        return found

    def _over(self, words: dict[int, int]) -> Callable[[int], int]:
        """Memory, with some descriptors as they were."""
        fetch = self.memory.fetch

        def read(pa: int) -> int:
            word = words.get(pa)
            return fetch(pa) if word is None else word

        return read

    def _compare(self, cpu: int, va: int, access: Access, pc: int, p: WalkParams, entry: Entry, found: Walk) -> None:
        """Compares what an entry gave with what the tables say now."""
        fetch = self.memory.fetch
        if entry.params is p and all(fetch(pa) == word for pa, word in entry.words.items()):
            return
        gave = outcome(found)
        if outcome(walk(fetch, p, va, access)) != gave:
            self._judge.stale(cpu, va, pc, entry, access, p, gave)

    def _check_freed(self, cpu: int, va: int, pc: int, found: Walk) -> None:
        p = found.params
        page = p.fmt.granule.page_size
        step = next((step for step in found.raw if step[1] & -page in self._freed), None)
        if step:
            target = Target(p.regime, 0, None, canonical(va) & -page, page, step[0], False, p.fmt.granule)
            self._judge.note(FREED, cpu, pc, va, Entry(target, (step,), p, va))

    def set_pstate(self, cpu: int, **bits: int) -> None:
        """PSTATE.PAN and UAO of a CPU: in effect at once, unlike a system register."""
        for name, value in bits.items():
            if self._now[cpu][name] != value:
                self._now[cpu] = _changed(self._now[cpu], name, value)
                self._next[cpu] = _changed(self._next[cpu], name, value)

    # entries

    def _vmid(self, cpu: int, regime: Regime) -> int:
        return VTTBR_EL2["VMID"].get(self._now[cpu].VTTBR_EL2) if regime is Regime.EL10 else 0

    def fill(self, cpu: int, found: Walk) -> None:
        """Keeps what a walk read and a TLB may hold: its tables, and its leaf unless that faults (R_XCLRD)."""
        raw, p = found.raw, found.params
        leaf = bool(raw) and p.kinds[raw[-1][0]][raw[-1][2] & 3] in (Kind.BLOCK, Kind.PAGE)
        fault = found.fault
        allowed = fault is None or fault.type in (FaultType.PERMISSION, FaultType.ALIGNMENT)
        tables = raw[:-1] if leaf else [step for step in raw if p.kinds[step[0]][step[2] & 3] is Kind.TABLE]
        if self.policy.tables:
            for n in range(1, len(tables) + 1):
                self._keep(cpu, p, canonical(found.va), tuple(tables[:n]), leaf=False)
        if leaf and allowed and (raw[-1][2] & p.af or found.updates):
            new = {pa: word for pa, _, word in found.updates}
            steps = tuple((level, pa, new.get(pa, word)) for level, pa, word in raw)
            self._keep(cpu, p, canonical(found.va), steps, leaf=True)

    def _keep(self, cpu: int, p: WalkParams, va: int, steps: Steps, *, leaf: bool) -> None:
        level, _, word = steps[-1]
        size = p.fmt.granule.level_size(level)
        if leaf and self.policy.contiguous and word & p.contiguous:
            size *= p.run_length(level)
        is_global = leaf and p.regime.has_el0 and not word & p.ng
        asid = None if is_global else p.asid
        target = Target(p.regime, self._vmid(cpu, p.regime), asid, va & -size, size, level, leaf, p.fmt.granule)
        self.insert(cpu, Entry(target, steps, p, va), shared=p.cnp)

    def insert(self, cpu: int, entry: Entry, *, shared: bool = False) -> None:
        """Puts an entry into a CPU's TLB, or into the one that all CPUs share. An equal one stays as it is, but where a
        TLBI waits for its completion: that will end the old one, and not one that was fetched since."""
        entry.serial = self._serial + 1
        waiting = any(self._issued.values()) or any(self._own.values())
        if self._stores.insert(SHARED if shared else cpu, entry, again=waiting):
            self._serial += 1

    def entries(self, cpu: int) -> Iterator[Entry]:
        """What a CPU's TLB holds, shared entries included."""
        return self._stores.entries(cpu)

    def _holds(self, cpu: int, entry: Entry) -> bool:
        return any(entry.key == one.key for one in self._stores.entries(cpu))

    # events

    def feed(self, event: Event) -> None:
        """One event of any kind."""
        getattr(self, _FEED[type(event)])(event)

    def use(self, event: Use) -> None:
        """An access. `access` says what came of it."""
        self.access(event.cpu, event.va, event.access, event.pc)

    def write(self, event: Write) -> None:
        """A store to a descriptor, told before or after memory has it."""
        self._serial += 1
        if self._freed and event.new & 3 == 3 and event.level < LAST_LEVEL:
            self._freed -= {self._params(event.cpu, event.va or 0).table_address(event.new)}
        if event.old & 1:
            if self.policy.speculative and event.va is not None and event.old != event.new:
                self._speculate(event, event.va)
            self._hidden[event.pa] = event.cpu
        self._unseen.write(event, self._serial)
        self._judge.write(event, self._serial)

    def _params(self, cpu: int, va: int) -> WalkParams:
        regs = self._now[cpu]
        return WalkParams.of(regs, regime_of(regs, _el(regs)), va)

    def _speculate(self, event: Write, va: int) -> None:
        """Every CPU whose tables have the descriptor holds what it was."""
        read = self._over({event.pa: event.old})
        for cpu in self._now:
            p = self._params(cpu, va)
            if not p.mmu_on:
                continue
            found = walk(read, p, va, _READ[p.regime.el])
            if any(pa == event.pa for _, pa, _ in found.raw):
                self.fill(cpu, found)
                if p.kinds[event.level][event.old & 3] is Kind.TABLE:
                    self._speculate_below(cpu, p, event, canonical(va), tuple(found.raw))

    def _speculate_below(self, cpu: int, p: WalkParams, event: Write, first: int, raw: Steps) -> None:
        """The leaves of a table that is taken away are held."""
        level = event.level + 1
        above = tuple(step for step in raw if step[0] < level)
        table, size = p.table_address(event.old), p.fmt.granule.level_size(level)
        try:
            words = self.memory.words(table, p.fmt.granule.entries)
        except NoMemory:
            return
        for i in (words & 1).nonzero()[0].tolist():
            word = int(words[i])
            if p.kinds[level][word & 3] in (Kind.BLOCK, Kind.PAGE) and (word & p.af or p.ha):
                self._keep(cpu, p, first + i * size, (*above, (level, table + 8 * i, word)), leaf=True)

    def tlbi(self, event: Tlbi) -> None:
        """A TLBI. With `Policy.late` it happens at the DSB that completes it, to what was held by now."""
        cpu, op, _ = event
        self._serial += 1
        self._judge.tlbi(event, self._serial)
        local = op.domain is Domain.LOCAL
        hidden = frozenset(pa for pa, writer in self._hidden.items() if not (local and writer == cpu))
        issued = _Issued(op, self._serial, hidden)
        if self.policy.late:
            self._issued[cpu] = (*self._issued.get(cpu, ()), issued)
        else:
            for other in self._now if not local else (cpu,):
                self._invalidate(other, issued)

    def _invalidate(self, cpu: int, issued: _Issued) -> None:
        op, serial, hidden = issued

        def gone(entry: Entry) -> bool:
            if entry.serial > serial or misses(op, entry.target):
                return False
            return not hidden or hidden.isdisjoint(entry.words)  # else a walk brings it back at once

        one = op.end and not op.operation.ranged
        self._stores.remove(cpu, gone, (lambda size: (op.start & -size,)) if one else None)

    def dsb(self, event: Dsb) -> None:
        """A DSB: the CPU's stores become visible, its TLBIs complete."""
        cpu, strength = event.cpu, STRENGTHS[event.domain]
        issued = self._issued.get(cpu)
        if issued:
            self._issued[cpu] = tuple(one for one in issued if not completes(strength, one.op))
            for one in issued:
                if completes(strength, one.op):
                    self._complete(cpu, one)
        if strength.stores and strength.domain and self._hidden:
            self._hidden = {pa: writer for pa, writer in self._hidden.items() if writer != cpu}
        if strength.stores and self._unseen:
            self._unseen.dsb(cpu)

    def _complete(self, cpu: int, issued: _Issued) -> None:
        if issued.op.domain is not Domain.LOCAL:
            for other in self._now:
                if other != cpu:
                    self._invalidate(other, issued)
        if self.policy.isb:
            self._own[cpu] = (*self._own.get(cpu, ()), issued)
        else:
            self._invalidate(cpu, issued)

    def isb(self, event: Isb) -> None:
        """A context synchronization event: register writes count, the CPU's own TLB is up to date."""
        cpu = event.cpu
        for issued in self._own.pop(cpu, ()):
            self._invalidate(cpu, issued)
        self._now[cpu] = self._next[cpu]
        if self._unseen:
            self._unseen.isb(cpu)

    def sysreg(self, event: SysregWrite) -> None:
        """An MSR: in effect at the next ISB."""
        regs = self._next[event.cpu]
        if regs[event.name] != event.value:
            self._next[event.cpu] = _changed(regs, event.name, event.value)

    def table_free(self, event: TableFree | TableReuse) -> None:
        """A page is no table any more: a walk through it from now on is an error."""
        self._freed |= {event.pa}

    def returned(self, event: Return) -> None:
        """A function returns: accesses that used what it changed, and could still, become findings."""
        self._serial += 1
        self._judge.returned(event.cpu, self._serial)

    def finish(self) -> list[Finding]:
        """The end: all findings. Every writer is taken to have returned."""
        self._judge.finish()
        return self.findings

    # state

    def snapshot(self) -> State:
        """The state, to be given to `restore`. Cheap: shallow copies."""
        maps = (self._now, self._next, self._hidden, self._issued, self._own)
        copied = tuple(dict(one) for one in maps)
        parts = self._stores.snapshot(), self._judge.snapshot(), self._unseen.snapshot()
        return (*parts, copied, self._serial, self._freed)

    def restore(self, state: State) -> None:
        """Back to `state`; findings since are dropped."""
        stores, judged, unseen, copied, self._serial, self._freed = state
        self._unseen.restore(unseen)
        self._stores.restore(stores)
        self._judge.restore(judged)
        self._now, self._next, self._hidden, self._issued, self._own = (dict(one) for one in copied)

    def key(self) -> tuple[Any, ...]:
        """Hashable, equal for states in which accesses and maintenance will do the same: no PCs, no history."""
        issued = tuple(
            (cpu, tuple((one.op.name, one.op.operand, one.hidden, self._younger(one)) for one in many))
            for waiting in (self._issued, self._own)
            for cpu, many in sorted(waiting.items())
        )
        regs = tuple((self._now[cpu], self._next[cpu]) for cpu in self._now)
        hidden = frozenset(self._hidden.items())
        return self._stores.key(), self._judge.key(), issued, regs, hidden, self._unseen.key(), self._freed

    def _younger(self, issued: _Issued) -> frozenset[tuple[int, Any]]:
        """The entries that a TLBI which is not complete will leave alone."""
        return frozenset(
            (cpu, entry.key) for cpu in self._now for entry in self._stores.entries(cpu) if entry.serial > issued.serial
        )


_READ = {el: Access.read(el=el) for el in range(4)}
_KNOWN: dict[tuple[Registers, str, int], Registers] = {}


def _level(entry: Entry) -> int:
    return entry.target.level


def _changed(regs: Registers, name: str, value: int) -> Registers:
    """One object for each set of registers: what was computed for it is kept."""
    key = regs, name, value
    if key not in _KNOWN:
        if len(_KNOWN) > 1 << 12:
            _KNOWN.clear()
        _KNOWN[key] = regs.replace(**{name: value})
    return _KNOWN[key]


def _el(regs: Registers) -> int:
    """The exception level whose regime the registers are set up for: the lowest that is on."""
    return next((el for el in (1, 2, 3) if regs[f"SCTLR_EL{el}"] & 1), 1)


_FEED = {
    Write: "write",
    Tlbi: "tlbi",
    Dsb: "dsb",
    Isb: "isb",
    SysregWrite: "sysreg",
    TableFree: "table_free",
    TableReuse: "table_free",
    Return: "returned",
    Use: "use",
}


def run(program: Program, policy: Policy | None = None) -> list[Finding]:
    """What the model finds in a program; raises ValueError for one of stage 2, which the walk has not."""
    if program.scene.stage != 1:
        raise ValueError("the TLB model has no walk of stage 2: the break-before-make checker alone judges it")
    memory = program.memory()
    model = TlbModel(memory, program.registers, cpus=program.scene.cpus, policy=policy, symbol=line_of)
    for event in program.events:
        model.feed(event)
        if isinstance(event, Write):
            memory.store(event.pa, event.new)
    return model.finish()
