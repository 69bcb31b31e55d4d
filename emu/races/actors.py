"""Who races: actors made of kernel calls and Python steps, and what is seen of them.

Rules of this file:
- Everything here is a value: states of an exploration share them.
- A Python step is one instruction to the others: nothing comes between its beginning and its end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from emu.checkers import Checkers
from emu.machine import Machine
from emu.trace import Barrier, Maintenance
from pgtable import Access, Walk
from pgtable.memory import PAGE
from pgtable.tlb_events import Return, TableFree
from pgtable.tlbi import operand_for


@dataclass(frozen=True)
class Call:
    """A function of the kernel (a symbol, or an address) and up to eight integer arguments."""

    function: str | int
    args: tuple[int, ...] = ()

    def __str__(self) -> str:
        name = self.function if isinstance(self.function, str) else f"{self.function:#x}"
        return f"{name}({', '.join(str(a) if -4096 < a < 4096 else f'{a:#x}' for a in self.args)})"


@dataclass(frozen=True)
class Step:
    """Something Python does at once: `action(scene)` gives the step's result, None for 0, or WAIT: not yet. Then it is
    tried again when another actor has done something."""

    name: str
    action: Callable[[Scene], int | None] = field(compare=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Actor:
    """A CPU with its work, in order. `name` is one word: schedules are made of names and numbers."""

    name: str
    work: tuple[Call | Step, ...]

    def __str__(self) -> str:
        return f"{self.name}: " + "; ".join(map(str, self.work))


def call(name: str, function: str | int, *args: int) -> Actor:
    """An actor that calls one function."""
    return Actor(name, (Call(function, args),))


class Note(NamedTuple):
    """Something that must not happen and did. `kind`: "warning", "stop", "freed-table", "deadlock", "bbm" and "tlb" (of
    the checkers of TLB maintenance), or a step's own."""

    kind: str
    actor: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.actor}: {self.text}"


class Progress(NamedTuple):
    """How far an actor is: the index of its operation, where it goes on (0: at its beginning), how many events (table
    accesses, atomics, barriers, TLB maintenance) it has had, the results of what is done, whether it waits (WFE), the
    granule that it has reserved where a store-exclusive comes next."""

    operation: int = 0
    pc: int = 0
    events: int = 0
    results: tuple[int, ...] = ()
    waiting: bool = False
    reserved: int = 0


class Event(NamedTuple):
    """What an instruction did that others can notice. `kind`: "read", "write", "barrier", "atomic", "tlbi", "step",
    "begin" or "end"; `text`: the instruction, or the step; `pa`, `old`, `new`: of a table word."""

    actor: str
    number: int
    kind: str
    pc: int
    text: str
    pa: int = 0
    old: int = 0
    new: int = 0


class Scene:
    """What a Python step or an invariant sees: memory, the actor's machine, and pages that were freed.

    `results`: what the actor's earlier operations gave.
    """

    def __init__(
        self,
        machine: Machine,
        results: tuple[int, ...],
        freed: frozenset[int],
        cpu: int = 0,
        checkers: Checkers | None = None,
    ) -> None:
        self.machine = machine
        self._cpu, self._checkers = cpu, checkers
        self.memory = machine.memory
        self.results = results
        self.freed = freed
        self.notes: list[tuple[str, str]] = []
        self.written: set[int] = set()

    def load(self, pa: int) -> int:
        """The word at `pa`; a finding if its page was freed."""
        self._check(pa, "read")
        return self.memory.fetch(pa)

    def store(self, pa: int, word: int) -> None:
        """Writes the word at `pa`; a finding if its page was freed."""
        self._check(pa, "written")
        if self._checkers:
            tree = self._checkers.tree
            event = tree.changed(self._cpu, 0, pa, self.memory.fetch(pa), word)
            self._checkers.feed(event)
            tree.linked(event)
        self.memory.store(pa, word)
        self.written.add(pa)

    def _check(self, pa: int, how: str) -> None:
        if pa & -self.machine.plan.page_size in self.freed:
            self.note("freed-table", f"PA {pa:#x} is {how}, in a table page that was freed")

    def free(self, pa: int) -> None:
        """From now on any access to the page at `pa` is a finding; it is filled with a pattern as poisoning would."""
        size = self.machine.plan.page_size
        page = pa & -size
        self.freed |= {page}
        if self._checkers:
            self._checkers.feed(TableFree(page, self._cpu))
        self.memory.words(page, size // 8)[:] = POISON
        self.written |= set(range(page, page + size, PAGE))

    def take(self, pa: int) -> None:
        """The page at `pa` is in use again."""
        self.freed -= {pa & -self.machine.plan.page_size}

    def access(self, va: int, access: Access | None = None) -> Walk:
        """An access by this CPU: through the TLB model where the race has one, else by the tables."""
        wanted = access or Access.read(el=1)
        if self._checkers and self._checkers.tlb:
            return self._checkers.access(self._cpu, va, wanted)
        return self.machine.translate(va, wanted)

    def tlbi(self, operation: str, va: int = 0, *, asid: int = 0) -> None:
        """A TLBI by its name (`vaae1is`) for an address; "dsb ish" and "isb" are `barrier`."""
        self._tell(Maintenance(operation.upper(), operand_for(operation, va, asid=asid), 0))
        for machine in (self.machine, *self.machine.siblings):
            machine.cpu.flush_tlb()

    def barrier(self, name: str) -> None:
        """`dsb ishst`, `dsb ish`, `isb` ..."""
        self._tell(Barrier(name, 0))

    def returns(self) -> None:
        """What this actor changed is done: what is unclean now is a finding."""
        if self._checkers:
            self._checkers.feed(Return(self._cpu))

    def _tell(self, event: Maintenance | Barrier) -> None:
        if self._checkers:
            self._checkers.saw(self._cpu, event)

    def note(self, kind: str, text: str) -> None:
        """A finding."""
        self.notes.append((kind, text))


WAIT = -1  # of a step: it cannot be done yet
POISON = 0xAAAA_AAAA_AAAA_AAAA  # PAGE_POISON of include/linux/poison.h: as a descriptor it is invalid
