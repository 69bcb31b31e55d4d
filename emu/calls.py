"""What a call on a machine did, what a machine can go back to, and a limit on how long a call may run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from emu.changes import Changes
from emu.engine import Cpu
from emu.exceptions import Stop
from emu.trace import Barrier, Event, Maintenance
from pgtable.memory import Pages
from pgtable.tlb_events import Finding

TIMEOUT = 10.0  # seconds of CPU time that a call may take


class Warn(NamedTuple):
    """A WARN that the guest ran into: `site` is symbol+offset; `repeat`: a WARN_ON_ONCE that had fired before."""

    pc: int
    site: str
    file: str
    line: int
    once: bool
    repeat: bool

    def __str__(self) -> str:
        once = f" ({'again, ' if self.repeat else ''}once)" if self.once else ""
        return f"WARN at {self.site}, {self.file}:{self.line}{once}"


@dataclass(frozen=True)
class CallResult:
    """What a call did. `value` is X0 unsigned.

    `changes`: descriptors that differ, from a comparison. `maintenance`: TLBI in order. `events`: with
    record="order", TLBI, barriers and table writes in order. `stop`: None, or why it did not return. `x`: X0 to X30,
    () with record="events" or "nothing". `printed`: the messages of printk(), of a booted kernel. `findings`: of a
    traced machine (emu.tracing); `traced`: whether it was one.
    """

    value: int
    changes: Changes
    maintenance: tuple[Maintenance, ...]
    warnings: tuple[Warn, ...]
    stop: Stop | None
    events: tuple[Event, ...] | None = None
    x: tuple[int, ...] = ()
    printed: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    traced: bool = False

    @property
    def signed(self) -> int:
        """X0 as a signed number: 64 bits, or a C int where the upper half is 0 (as the compiler leaves it)."""
        width = 32 if self.value >> 32 == 0 else 64
        return self.value - (1 << width) if self.value >> width - 1 else self.value

    @property
    def barriers(self) -> tuple[str, ...]:
        """Names of the barriers executed, in order; needs record="order"."""
        if self.events is None:
            raise ValueError('barriers are recorded with record="order"')
        return tuple(event.name for event in self.events if isinstance(event, Barrier))

    def ok(self) -> CallResult:
        """This result; raises RuntimeError if the call did not return."""
        if self.stop:
            raise RuntimeError(str(self.stop))
        return self


class State(NamedTuple):
    """A machine's memory and registers at one moment (`Machine.save`)."""

    pages: Pages
    registers: tuple[int, ...]
    system: tuple[int, ...]
    warned: frozenset[int]
    pages_given: int
    tables_used: int
    user_used: int
    later: tuple[int, ...] = ()  # registers of the model MMU that Unicorn's CPU has not
    context: object = None  # all of Unicorn's registers, of a booted kernel


class Budget:
    """A limit on basic blocks, counted by a hook that lives as long as the call."""

    def __init__(self, cpu: Cpu, limit: int) -> None:
        if limit <= 0:
            raise ValueError(f"blocks={limit}: must be more than 0")
        self.limit, self.count, self._cpu = limit, 0, cpu
        self._handle = cpu.on_block(self._tick)
        cpu.flush_code()

    def _tick(self, _: int) -> bool:
        self.count += 1
        return not self.spent

    @property
    def spent(self) -> bool:
        """More ran than was allowed."""
        return self.count > self.limit

    def close(self) -> None:
        """Takes the hook away."""
        self._cpu.remove(self._handle)
        self._cpu.flush_code()
