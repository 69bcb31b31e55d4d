"""A trace of what machines do to translation tables and TLBs, in order, and the verdicts of both checkers on it.

    trace = Trace("trace.jsonl")
    machine = Machine.boot("debian:7.3", trace=trace)
    machine.call("set_memory_valid", va, 1, 0).ok()
    trace.events, trace.findings

Rules of this file:
- Hooks are on table pages, TLBI, barriers and MSRs of translation registers only; a table that is linked during a
  run is hooked at once on the CPU that runs, on the others when they run. What it costs: `python -m benchmarks.tlb`.
- Break-before-make is judged always; uses of TLB entries where a `Policy` is given and the machine has mmu="model",
  whose misses are then served by the TLB model. Unicorn's own TLB is dropped at each event, so that every use after an
  event is seen.
- What Python changes between runs is taken as done right: entries of before are forgotten. A register that it has set
  is an event besides, that nobody judges.
- The end of a call is a return: what it left unclean is a finding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from emu import engine
from emu.checkers import Checkers
from emu.engine import SystemInstruction
from emu.trace import Event as Seen
from pgtable.access import Access
from pgtable.memory import Mark
from pgtable.params import RANGE_BIT
from pgtable.registers import Registers
from pgtable.tlb import Policy
from pgtable.tlb_events import Dsb, Event, Finding, Isb, Return, SysregWrite, Tlbi, Write
from pgtable.walk import Swap, Walk

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["Policy", "Trace"]

SCHEMA = "pgtable.trace/1"
# Whose MSRs are events, by encoding: what translation depends on.
_REGISTERS = {engine.SYSTEM[name]: name for name in ("SCTLR_EL1", "TTBR0_EL1", "TTBR1_EL1", "TCR_EL1", "MAIR_EL1")}


class Trace:
    """Of one machine and the CPUs that share its memory. `out`: the path of a new file, or a text stream, for JSON
    lines, schema pgtable.trace/1. `policy`: how a TLB behaves; None: no TLB model.

    `events`: as the checkers get them. `findings`: what was wrong, in order. Raises FileExistsError for a path where a
    file is, OSError for one that cannot be written.
    """

    def __init__(self, out: str | os.PathLike[str] | IO[str] | None = None, *, policy: Policy | None = None) -> None:
        self.events: list[Event] = []
        self.findings: list[Finding] = []
        self.policy = policy
        self.machines: list[Machine] = []
        self.stale = False  # Unicorn's TLBs may hold what an event has ended
        self._close = isinstance(out, (str, os.PathLike))
        self._out: IO[str] | None = open(out, "x") if isinstance(out, (str, os.PathLike)) else out  # noqa: SIM115
        self.checkers: Checkers | None = None
        self._known: Mark | None = None
        self._registers: list[Registers] = []  # of each CPU when a run last ended
        self._number = 0
        self._write_line({"schema": SCHEMA})

    # machines

    def tap(self, machine: Machine) -> Tap:
        """A further CPU on the same memory: sets its hooks. For Machine.attach."""
        tap = Tap(self, machine, len(self.machines))
        self.machines.append(machine)
        self._known = None
        return tap

    @property
    def tables(self) -> list[tuple[int, int]]:
        """The table pages: (PA, bytes)."""
        assert self.checkers
        tree = self.checkers.tree
        return [(pa, tree.page) for pa in tree.pages]

    def begin(self) -> int:
        """Before a run: what Python has changed since the last one is learned. How many findings there are."""
        registers = [_of_regime(machine) for machine in self.machines]
        known, self._known = self._known, None
        registers_set = known is not None and self._note_set(registers)
        if known is None or registers_set or not known.same_as(self.machines[0].memory.mark(self.tables)):
            self._start(registers)
        return len(self.findings)

    def _note_set(self, registers: Sequence[Registers]) -> bool:
        """Registers that Python has set since the last run are events; whether there are any."""
        found = False
        for cpu, (old, new) in enumerate(zip(self._registers, registers, strict=True)):
            for name in new if old != new else ():
                if old[name] != new[name]:
                    self.events.append(SysregWrite(cpu, name, new[name]))
                    self._say(cpu, 0, {"kind": "set", "register": name, "value": f"{new[name]:#x}"})
                    found = True
        return found

    def _start(self, registers: Sequence[Registers]) -> None:
        """The checkers anew, on the tables and registers as they are."""
        first = self.machines[0]
        policy = self.policy if first.mmu else None
        self.checkers = Checkers(first.memory, registers, policy=policy, symbol=first.describe)
        self.stale = True

    def end(self, cpu: int, pc: int, *, returned: bool) -> None:
        """After a run: `returned` to `pc`, or stopped."""
        if returned:
            self.feed(Return(cpu, pc), "return")
        self._known = self.machines[0].memory.mark(self.tables)
        self._registers = [_of_regime(machine) for machine in self.machines]

    def since(self, count: int) -> tuple[Finding, ...]:
        """The findings since `begin` gave their number."""
        return tuple(self.findings[count:])

    # events

    def saw(self, cpu: int, seen: Seen) -> None:
        """What a hook saw; a store before memory has it."""
        assert self.checkers
        event = self.checkers.tree.event(cpu, seen)
        if event is None:
            self._say(cpu, seen.pc, {"kind": "barrier", "name": str(seen)})
            return
        self.feed(event)
        if isinstance(event, Write):
            self._follow(cpu, self.checkers.tree.linked(event))

    def _follow(self, cpu: int, pages: list[int]) -> None:
        """Pages that have become tables: hooked on the CPU that runs. Others hook all tables when they run."""
        assert self.checkers
        for page in pages:
            self.machines[cpu].follow(page, self.checkers.tree.page)

    def register(self, cpu: int, pc: int, name: str, value: int) -> None:
        """An MSR of a translation register, before it is executed."""
        assert self.checkers
        self.feed(SysregWrite(cpu, name, value, pc))
        if name.startswith("TTBR"):
            self._follow(cpu, self.checkers.tree.follow(self.machines[cpu].registers().replace(**{name: value})))

    def feed(self, event: Event, kind: str = "") -> None:
        """An event, to both checkers and to the file."""
        assert self.checkers
        self.events.append(event)
        self._say(event.cpu, event.pc, self._fields(event, kind))
        self.stale = True
        self.checkers.feed(event)
        self._note()

    def access(self, cpu: int, pc: int, regs: Registers, va: int, access: Access, swap: Swap | None) -> Walk:
        """An access through the TLB model; `regs` for PSTATE."""
        assert self.checkers
        assert self.checkers.tlb
        self.checkers.tlb.set_pstate(cpu, PAN=regs.PAN, UAO=regs.UAO)
        walk = self.checkers.access(cpu, va, access, pc, swap)
        self._note()
        return walk

    def _note(self) -> None:
        """Keeps what the checkers have found."""
        assert self.checkers
        for finding in self.checkers.taken() if self.checkers.fresh else ():
            if finding not in self.findings:
                self.findings.append(finding)
                self._say(finding.cpu, finding.pc, {"kind": "finding", **finding_json(finding)})

    # the file

    def close(self) -> None:
        """Closes a file that this trace has opened."""
        if self._out and self._close:
            self._out.close()
            self._out = None

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fields(self, event: Event, kind: str) -> dict[str, Any]:
        match event:
            case Write(pa=pa, level=level, va=va, old=old, new=new):
                return {"kind": "write", "pa": f"{pa:#x}", **self._place(va, level, old, new), **_words(old, new)}
            case Tlbi(op=op):
                return {"kind": "tlbi", "operation": op.name, "operand": f"{op.operand:#x}", "reaches": str(op)}
            case Dsb(domain=domain):
                return {"kind": "dsb", "domain": domain}
            case SysregWrite(name=name, value=value):
                return {"kind": "msr", "register": name, "value": f"{value:#x}"}
            case _:
                return {"kind": kind or type(event).__name__.lower()}

    def _place(self, va: int | None, level: int, old: int, new: int) -> dict[str, Any]:
        """Which descriptor, and which of its fields change."""
        if va is None or self.checkers is None:
            return {}
        fmt = self.checkers.tree.halves[bool(va & RANGE_BIT)].fmt
        fields = fmt.layout(new if new & 1 else old, level).changed(old, new)
        size = fmt.granule.level_size(level)
        where = {"va": f"{va:#018x}", "size": size, "level": level}
        return {**where, "fields": {name: [f"{a:#x}", f"{b:#x}"] for name, (a, b) in fields.items()}}

    def _say(self, cpu: int, pc: int, fields: dict[str, Any]) -> None:
        self._number += 1
        if self._out:
            at = self.machines[0].describe(pc)
            self._write_line({"n": self._number, "cpu": cpu, "pc": f"{pc:#x}", "at": at, **fields})

    def _write_line(self, row: dict[str, Any]) -> None:
        if self._out:
            self._out.write(json.dumps(row) + "\n")


class Tap:
    """One CPU's side of a trace: its hooks."""

    def __init__(self, trace: Trace, machine: Machine, number: int) -> None:
        self._trace, self._cpu, self.number = trace, machine.cpu, number
        machine.on_table_event(lambda seen: trace.saw(number, seen))  # type: ignore[arg-type]
        if machine.mmu:
            machine.mmu.trace = self
        else:
            machine.cpu.on_msr(self.msr)
        if machine.mmu and trace.policy:
            machine.cpu.on_block(self._drop_stale)
        machine.cpu.flush_code()

    def _drop_stale(self, _: int) -> bool:
        """Before a block runs: Unicorn's TLBs have nothing that an event has ended."""
        if self._trace.stale:
            self._trace.stale = False
            for machine in self._trace.machines:
                machine.cpu.flush_tlb()
        return True

    def also(self, machine: Machine) -> Tap:
        """The tap of another CPU on the same memory."""
        return self._trace.tap(machine)

    @property
    def has_tlb(self) -> bool:
        """Accesses go through the TLB model."""
        return self._trace.checkers is not None and self._trace.checkers.tlb is not None

    @property
    def tables(self) -> list[tuple[int, int]]:
        """The table pages: (PA, bytes)."""
        return self._trace.tables

    def begin(self) -> int:
        """Before a run: the number of findings so far."""
        return self._trace.begin()

    def end(self, pc: int, *, returned: bool) -> None:
        """After a run that has returned to `pc`, or was stopped there."""
        self._trace.end(self.number, pc, returned=returned)

    def since(self, count: int) -> tuple[Finding, ...]:
        """The findings of the run, before which there were `count`."""
        return self._trace.since(count)

    def msr(self, instruction: SystemInstruction, value: int) -> bool:
        """Before an MSR: one that translation depends on is an event. It is left to the CPU."""
        name = _REGISTERS.get(instruction[:5])
        if name:
            self.register(name, value)
        return False

    def register(self, name: str, value: int) -> None:
        """A translation register is written."""
        self._trace.register(self.number, self._cpu.read(engine.PC), name, value)

    def synchronized(self, pc: int, why: str) -> None:
        """An exception was taken: a context synchronization event."""
        self._trace.feed(Isb(self.number, pc), why)

    def access(self, regs: Registers, va: int, access: Access, swap: Swap | None) -> Walk:
        """An access through the TLB model."""
        return self._trace.access(self.number, self._cpu.read(engine.PC), regs, va, access, swap)


def _of_regime(machine: Machine) -> Registers:
    """A CPU's registers of translation, without what is PSTATE's and changes all the time."""
    return machine.registers().replace(PAN=0, UAO=0)


def _words(old: int, new: int) -> dict[str, str]:
    return {"old": f"{old:#018x}", "new": f"{new:#018x}"}


def finding_json(finding: Finding) -> dict[str, Any]:
    """A finding of either checker, as JSON."""
    return {
        "rule": finding.rule,
        "cause": finding.cause,
        "va": f"{finding.va:#018x}",
        "level": finding.level,
        "pa": f"{finding.pa:#x}",
        **_words(finding.old, finding.new),
        "symbol": finding.symbol or f"{finding.pc:#x}",
        "write_cpu": finding.write_cpu,
        "write_pc": f"{finding.write_pc:#x}",
        "write_symbol": finding.write_symbol or f"{finding.write_pc:#x}",
        "text": str(finding),
    }
