"""One step of an actor at a time: from a state to the state at its next switch point; nothing is run twice.

Rules of this file:
- A state is the content of all pages that any path writes, and all registers. The TLB is dropped when a CPU is gone on
  with from a state that it did not just reach.
- Memory is sequentially consistent: an instruction's effect is seen by all before the next instruction of anyone.
Where switch points are: emu.races.watch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from emu import engine
from emu.checkers import Checkers
from emu.cpus import fail_exclusive
from emu.machine import Machine
from emu.races.actors import WAIT, Actor, Call, Event, Note, Progress, Scene
from emu.races.states import Context, Running, State
from emu.races.watch import GRANULE, Learned, Ranges, Watch
from pgtable import Access
from pgtable.tlb_events import Return

__all__ = ["Learned", "Stepper"]

LOST = -1  # a reservation that another actor's store has ended


class Stepper(Watch):
    """Runs `actors[i]` on `machines[i]`; `tables`: the PA ranges whose accesses are switch points.

    `interrupt`: all but the first actor run on the first's CPU, in a softirq. `checkers`: the checkers of TLB
    maintenance, which are told of everything that actors do. `quiet`: kinds of sites ("barrier", "tlbi") before which
    nobody else gets a turn.
    """

    def __init__(
        self,
        machines: Sequence[Machine],
        actors: Sequence[Actor],
        tables: Ranges,
        *,
        interrupt: bool = False,
        checkers: Checkers | None = None,
        quiet: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(machines, actors, tables, interrupt=interrupt, checkers=checkers, quiet=quiet)
        self.steps = 0
        self._given = machines[0].first._pages_given
        self._checked = checkers.snapshot() if checkers else None
        self._contexts = tuple(Context(machine.cpu.context()) for machine in machines)
        self._set_pages()

    def _set_pages(self) -> None:
        super()._set_pages()
        self._at: State | None = None
        self._loaded: list[Any] = [None] * len(self.machines)

    # states

    def begin(self) -> State:
        """The state in which nothing has run."""
        self.memory.rewind(self._begin)
        self.machines[0].first._pages_given = self._given
        if self.checkers:
            self.checkers.restore(self._checked)
        self._loaded = [None] * len(self.machines)
        progress = tuple(Progress() for _ in self.actors)
        return self._made(self._contexts, progress, frozenset(), (), self.machines[0].first._pages_given)

    def _made(
        self,
        contexts: tuple[Context, ...],
        actors: tuple[Progress, ...],
        freed: frozenset[int],
        notes: tuple[Note, ...],
        given: int,
    ) -> State:
        pages = np.concatenate([words[numbers] for words, numbers in self._views])
        judged = (self.checkers.snapshot(), self.checkers.key()) if self.checkers else (None, None)
        self._at = State(pages, contexts, actors, freed, notes, given, *judged)
        return self._at

    def restore(self, state: State) -> None:
        """Memory as it is in `state`, and what the checkers know."""
        if self.checkers:
            self.checkers.restore(state.judged)
        if state is self._at:
            return
        done = 0
        for words, numbers in self._views:
            words[numbers] = state.pages[done : done + len(numbers)]
            done += len(numbers)
        self.machines[0].first._pages_given = state.given
        self._at = state
        self._loaded = [None] * len(self.machines)

    def step(self, state: State, actor: int, *, free: bool = False) -> State:
        """The state at the actor's next switch point, or with `free` at its end or where it has to wait."""
        self.restore(state)
        self.steps += 1
        progress = state.actors[actor]
        work = self.actors[actor].work[progress.operation]
        self._running = actor
        self._now = now = Running(
            progress.events, progress.events, free=free, freed=state.freed, notes=list(state.notes)
        )
        if not isinstance(work, Call):
            return self._python_step(state, actor, progress)
        machine = self.machines[actor]
        resumed = self._loaded[actor] is state.contexts[actor] and progress.pc
        if not resumed:
            machine.cpu.set_context(state.contexts[actor].saved)
            machine.cpu.flush_tlb()
        pc = progress.pc or self._prepare(state, actor, work)
        if progress.reserved == LOST:
            fail_exclusive(machine, pc)
            pc += 4
            now.events += 1
        now.skip = pc if progress.pc else 0
        return self._run(state, actor, pc)

    def _prepare(self, state: State, actor: int, work: Call) -> int:
        machine = self.machines[actor]
        pc = machine.prepare(work.function, *work.args)
        if self.interrupt and actor:
            self._enter_softirq(state, machine)
        return pc

    def _run(self, state: State, actor: int, pc: int) -> State:
        machine, now = self.machines[actor], self._now
        ended, stop = machine.proceed(pc)
        progress = state.actors[actor]._replace(events=now.events, waiting=False, reserved=0)
        for warn in machine.warnings:
            self._note("warning", str(warn))
        if stop is not None:
            self._note("stop", f"{stop.kind}: {stop.message} at {stop.symbol}")
            progress = progress._replace(operation=len(self.actors[actor].work), pc=0)
        elif ended.pc == machine.plan.landing:
            progress = self._finished(actor, progress, machine.cpu.read(engine.X[0]))
        else:
            reserved = self._reserved(machine, ended.pc)
            progress = progress._replace(pc=ended.pc, waiting=now.waits, reserved=reserved)
        return self._after(state, actor, progress)

    def _reserved(self, machine: Machine, pc: int) -> int:
        """The granule that the store-exclusive at `pc` needs to be as its load-exclusive left it; 0 for others."""
        if pc not in self._exclusives:
            return 0
        register = self._exclusives[pc]
        va = machine.cpu.read(engine.SP if register == 31 else engine.X[register])
        granule = machine.translate(va, Access.write(el=1)).pa & -GRANULE
        if granule not in self._granules:
            self._granules.add(granule)
            self._new.add("site")
        return granule

    def _finished(self, actor: int, progress: Progress, result: int) -> Progress:
        if self.interrupt and actor:
            self._add_preempt_count(-SOFTIRQ_OFFSET)
        if self.checkers:
            self.checkers.feed(Return(self._cpu))
            self._note_findings()
        if self.trace is not None:
            self.trace.append(Event(self._name, progress.events, "end", 0, f"returns {result:#x}"))
        return progress._replace(operation=progress.operation + 1, pc=0, results=(*progress.results, result))

    def _python_step(self, state: State, actor: int, progress: Progress) -> State:
        work = self.actors[actor].work[progress.operation]
        assert not isinstance(work, Call)
        scene = Scene(self.machines[actor], progress.results, state.freed, self._cpu, self.checkers)
        result = work.action(scene) or 0
        if self.checkers:
            self._note_findings()
        for pa in scene.written:
            self._written(pa, 8, 0)
            self._disturbed(pa, 8, 0)
        for kind, text in scene.notes:
            self._note(kind, text)
        self._now.freed = scene.freed
        for page in scene.freed:
            self._guard(page)
        if result == WAIT:
            return self._after(state, actor, progress._replace(waiting=True))
        self._now.events += 1
        if self.trace is not None:
            self.trace.append(Event(self._name, self._now.events, "step", 0, work.name))
        progress = progress._replace(
            operation=progress.operation + 1, events=self._now.events, results=(*progress.results, result)
        )
        return self._after(state, actor, progress)

    def _after(self, state: State, actor: int, progress: Progress) -> State:
        """The state now, in which `actor` has moved on; whoever waited may find what it waits for."""
        if self._new - {"block"}:
            raise Learned
        context = Context(self.machines[actor].cpu.context())
        self._loaded = [context if i == actor else None for i in range(len(self.machines))]
        moved = (progress.pc, progress.operation) != (state.actors[actor].pc, state.actors[actor].operation)
        actors = tuple(progress if i == actor else self._seen(p, moved) for i, p in enumerate(state.actors))
        return self._made(
            _with(state.contexts, actor, context),
            actors,
            self._now.freed,
            tuple(self._now.notes),
            self.machines[0].first._pages_given,
        )

    def _seen(self, other: Progress, moved: bool) -> Progress:
        """How far another actor is after this step."""
        if other.reserved in self._now.disturbed:
            other = other._replace(reserved=LOST)
        return other._replace(waiting=False) if other.waiting and moved else other

    # interrupts

    def _enter_softirq(self, state: State, machine: Machine) -> None:
        """On the interrupted CPU's stack and task, with the count that in_interrupt() looks at."""
        first = self.machines[0]
        context = state.contexts[0].saved if state.actors[0].pc else None
        stack = context.reg_read(engine.SP) if context is not None else first.plan.stack
        machine.cpu.write(engine.SP, (stack - FRAME) & -16)
        machine.cpu["SP_EL0"] = first.plan.task
        self._add_preempt_count(SOFTIRQ_OFFSET)

    @cached_property
    def _preempt_count(self) -> int:
        first = self.machines[0]
        return first.translate(first.plan.task + first.types.btf.offset("task_struct", "thread_info.preempt_count")).pa

    def _add_preempt_count(self, count: int) -> None:
        pa = self._preempt_count
        value = int.from_bytes(self.memory.read(pa, 4), "little") + count
        self.memory.write(pa, (value & 0xFFFF_FFFF).to_bytes(4, "little"))
        self._written(pa, 4, 0)


SOFTIRQ_OFFSET = 1 << 8  # include/linux/preempt.h
FRAME = 0x200  # bytes of the stack that the exception's frame takes; struct pt_regs is smaller


def _with(values: tuple[Any, ...], i: int, value: Any) -> tuple[Any, ...]:
    return (*values[:i], value, *values[i + 1 :])
