"""Changes of the registers that translation reads, as far as TLBs remember them: fields that need a TLBI, ASIDs.

Rules of this file:
- A register that a TLB may cache is unclean on its CPU from the MSR until ISB, a TLBI of everything, and a DSB.
- An ASID belongs to the table that TTBR0 named when it was first used; another table needs a TLBI of that ASID first.
  A table without a valid entry (as Linux's reserved one) puts nothing into a TLB and does not count.
- Where the values before are not known (`registers` is None), the first write of each register is not judged.
Sources: Arm ARM D8.16.3 (ASIDs), D8.17 (R_VNRFW), D19.1.2 (synchronization of system registers).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pgtable.memory import Memory, NoMemory
from pgtable.params import WalkParams
from pgtable.registers import TCR_EL1, TTBR, Registers
from pgtable.tlb_events import Finding, Strength, Symbol, SysregWrite, completes, named
from pgtable.tlbi import Domain, Invalidation, Type

CHANGED, REUSED = "register change", "ASID reuse"
_CACHED = tuple(f"{name}_EL{el}" for name in ("MAIR", "MAIR2", "TCR", "TCR2", "PIR", "PIRE0") for el in (1, 2, 3))
_WHOLE = (Type.ALL, Type.VMALL, Type.VMALLS12)
_NO_ISB, _NO_TLBI, _NO_DSB, _CLEAN = "no ISB", "no TLBI", "no DSB after the TLBI", ""


class _Change(NamedTuple):
    """A register that is not clean on a CPU. `op`: the TLBI that waits for its DSB, by `by`."""

    old: int
    new: int
    pc: int
    lacks: str
    op: Invalidation | None = None
    by: int = 0


class RegisterChanges:
    """What register writes have left to do, for every CPU. See `bbm.Checker`."""

    def __init__(self, params: WalkParams, symbol: Symbol | None = None, registers: Registers | None = None) -> None:
        self._params, self._symbol, self._registers = params, symbol, registers
        self._values: dict[tuple[int, str], int] = {}
        self._changes: dict[tuple[int, str], _Change] = {}
        self._moved: frozenset[int] = frozenset()  # CPUs that wrote a TTBR or TCR since their last ISB
        self._spaces: dict[int, int] = {}  # ASID -> the table it belongs to
        self._seen(0)

    @property
    def changed(self) -> bool:
        """There are changes that are not clean."""
        return bool(self._changes)

    def value(self, cpu: int, name: str) -> int | None:
        """A register of a CPU; None if it is not known."""
        if (cpu, name) in self._values:
            return self._values[cpu, name]
        return self._registers[name] if self._registers else None

    def asid(self, cpu: int) -> int | None:
        """The current ASID of a CPU, as its registers were written."""
        tcr, el = self.value(cpu, f"TCR_EL{self._params.regime.el}"), self._params.regime.el
        ttbr = self.value(cpu, f"TTBR{TCR_EL1['A1'].get(tcr or 0)}_EL{el}")
        if ttbr is None:
            return self._params.asid
        asid = TTBR["ASID"].get(ttbr)
        return asid if tcr is not None and TCR_EL1["AS"].get(tcr) else asid & 0xFF

    def write(self, event: SysregWrite) -> None:
        """An MSR."""
        cpu, name, value, pc = event
        old = self.value(cpu, name)
        self._values[cpu, name] = value
        if name in _CACHED and old is not None and old != value:
            self._changes[cpu, name] = _Change(old, value, pc, _NO_ISB)
        if name.startswith(("TTBR", "TCR_")):
            self._moved |= {cpu}

    def isb(self, cpu: int, pc: int, memory: Memory | None) -> list[Finding]:
        """A context synchronization event: what was written counts from now on."""
        for key, change in self._changes.items():
            if key[0] == cpu and change.lacks == _NO_ISB:
                self._changes[key] = change._replace(lacks=_NO_TLBI)
        if cpu not in self._moved:
            return []
        self._moved -= {cpu}
        return self._seen(cpu, pc, memory)

    def tlbi(self, cpu: int, op: Invalidation) -> None:
        """A TLBI: of everything for registers, of an ASID for that ASID."""
        if op.regime is not self._params.regime:
            return
        type = op.operation.type
        if type in _WHOLE:
            self._spaces.clear()
            for key, change in self._changes.items():
                if change.lacks == _NO_TLBI and (key[0] == cpu or op.domain is not Domain.LOCAL):
                    self._changes[key] = change._replace(lacks=_NO_DSB, op=op, by=cpu)
        elif type is Type.ASID and op.asid is not None:
            self._spaces.pop(op.asid, None)

    def dsb(self, cpu: int, strength: Strength) -> None:
        """A DSB."""
        for key, change in list(self._changes.items()):
            if change.op is not None and change.by == cpu and completes(strength, change.op):
                del self._changes[key]

    def returned(self, cpu: int, pc: int) -> list[Finding]:
        """A function returns: its changes that are not clean."""
        mine = [key for key in self._changes if key[0] == cpu]
        return [self._finding(CHANGED, key, self._changes.pop(key), pc) for key in mine]

    def _seen(self, cpu: int, pc: int = 0, memory: Memory | None = None) -> list[Finding]:
        """Notes which table the CPU's ASID belongs to now."""
        el = self._params.regime.el
        ttbr0, asid = self.value(cpu, f"TTBR0_EL{el}"), self.asid(cpu)
        if ttbr0 is None or asid is None or not self._params.regime.has_el0:
            return []
        base = TTBR["BADDR"].get(ttbr0)
        if memory is not None and _is_empty(memory, base):
            return []
        before = self._spaces.setdefault(asid, base)
        if before == base:
            return []
        self._spaces[asid] = base
        return [self._finding(REUSED, (cpu, f"ASID {asid:#x}"), _Change(before, base, pc, _NO_TLBI), pc)]

    def _finding(self, rule: str, key: tuple[int, str], change: _Change, pc: int) -> Finding:
        cpu, name = key
        names = named(self._symbol, pc), named(self._symbol, change.pc)
        cause = f"{name}: {change.lacks}"
        return Finding(rule, cause, cpu, pc, 0, -2, 0, change.old, change.new, cpu, change.pc, *names)

    def snapshot(self) -> Any:
        """The state, for `restore`."""
        return dict(self._values), dict(self._changes), self._moved, dict(self._spaces)

    def restore(self, state: Any) -> None:
        """Back to a state."""
        values, changes, self._moved, spaces = state
        self._values, self._changes, self._spaces = dict(values), dict(changes), dict(spaces)

    def key(self) -> tuple[Any, ...]:
        """Hashable, equal for states that will judge alike."""
        changes = sorted((*key, c.old, c.new, c.lacks, c.by) for key, c in self._changes.items())
        return tuple(sorted(self._values.items())), tuple(changes), self._moved, tuple(sorted(self._spaces.items()))


def _is_empty(memory: Memory, table: int) -> bool:
    """No entry of the first 4 KiB of a table is valid."""
    try:
        return not (memory.words(table, 512) & 1).any()
    except NoMemory:
        return True
