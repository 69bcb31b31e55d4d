"""Races: what happens when kernel functions change the same tables without a lock, by running them in every order.

    machine = Machine.boot("debian:6.12")
    va = machine.plan.linear + 0x200_0000
    race = Race(machine, (call("A", "set_memory_valid", va, 1, 0), call("B", "__change_memory_common", ...)), [va])
    for finding in race.explore(preemptions=2).findings:
        print(finding, race.columns(finding.schedule), sep="\\n")

What is judged, of each end that the interleavings have:
- the table words must be those of some order in which the actors run one after the other, else an update is lost;
- `expected` descriptors and `invariants`, where they are given;
- a WARN, a BUG or a fault of an actor, a table page that is used after it was freed, and a deadlock are findings.
Memory is sequentially consistent here: what only weaker ordering allows is not found.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from emu.checkers import Checkers
from emu.cpus import more_cpus
from emu.machine import Machine
from emu.races.actors import WAIT, Actor, Call, Event, Note, Scene, Step, call
from emu.races.explore import Explorer, Outcome, Schedule
from emu.races.show import Places, Word, columns, table_ranges
from emu.races.steps import Learned, Stepper
from pgtable.registers import Registers
from pgtable.tlb import Policy

__all__ = ["WAIT", "Actor", "Call", "Finding", "Note", "Race", "RaceResult", "Scene", "Schedule", "Step", "call"]

MODES = ("smp", "interrupt")
Invariant = Callable[[Scene], str | None]


@dataclass(frozen=True)
class Finding:
    """Something wrong, and the schedule with the fewest preemptions that shows it.

    `kind`: "lost-update", "unexpected", "invariant", or a note's (see `Note`). `count`: how many interleavings end so.
    """

    kind: str
    text: str
    schedule: Schedule
    count: int
    words: tuple[Word, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"

    @property
    def key(self) -> tuple[object, ...]:
        """What is wrong, whatever the schedule."""
        return self.kind, self.text if not self.words else self.words

    def same_as(self, other: Finding) -> bool:
        """The same thing is wrong."""
        return self.key == other.key


@dataclass(frozen=True)
class RaceResult:
    """What a search found. `interleavings`: different schedules covered; `runs`: those run to their end (the others go
    on as one of these does); `preemptions`: the bound, None for none; `wrong`: schedules, random ones too, that end in
    a finding; `seconds` of CPU time, of the search alone."""

    interleavings: int
    runs: int
    steps: int
    states: int
    walks: int
    preemptions: int | None
    mode: str
    outcomes: tuple[tuple[Outcome, int], ...]
    findings: tuple[Finding, ...]
    wrong: int
    seconds: float


def _with_bbm(regs: Registers, bbm: int | None) -> Registers:
    return regs if bbm is None else Registers(regs.features.replace(bbm=bbm), **regs.as_dict())


class Race:
    """Actors on the tables of `machine`, the first CPU; each further actor that calls functions gets a CPU of its own.

    `watch`: VAs (the tables that translate them) and PA ranges (PA, bytes) whose accesses are switch points.
    `frees`: functions that give a page back, and how to read its PA from their arguments; they are replaced.
    `judge`: the checkers of TLB maintenance are told of everything, a TLB behaving as the policy says; their findings
    are notes. `bbm`: the FEAT_BBM level that they assume, default the machine's.
    `quiet`: kinds of events ("barrier", "tlbi") that are no switch points, for code that has hundreds of them.
    `expected`: descriptor by VA at the end. `invariants`: each gives a sentence if something is wrong at the end.
    The machine is the race's from now on: make what the actors need before.
    """

    def __init__(
        self,
        machine: Machine,
        actors: Sequence[Actor],
        watch: Sequence[int | tuple[int, int]],
        *,
        mode: str = "smp",
        expected: Mapping[int, int] | None = None,
        invariants: Sequence[Invariant] = (),
        serial: bool = True,
        frees: Mapping[str, Callable[[Machine], int]] | None = None,
        judge: Policy | None = None,
        bbm: int | None = None,
        quiet: Collection[str] = (),
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode {mode}: must be one of {', '.join(MODES)}")
        self.machine, self.actors, self.mode = machine, tuple(actors), mode
        self.expected, self.invariants, self.serial = dict(expected or {}), tuple(invariants), serial
        self.places = Places(machine)
        callers = [i for i, actor in enumerate(actors) if any(isinstance(work, Call) for work in actor.work)]
        extra = iter(more_cpus(machine, len(callers) - 1) if len(callers) > 1 else ())
        machines = [next(extra) if i in callers[1:] else machine for i in range(len(actors))]
        tables = [r for at in watch for r in ([at] if isinstance(at, tuple) else table_ranges(machine, at))]
        registers = [_with_bbm(m.registers(), bbm) for m in machines]
        checkers = Checkers(machine.memory, registers, policy=judge, symbol=self._named) if judge else None
        self.stepper = stepper = Stepper(
            machines,
            self.actors,
            sorted(set(tables)),
            interrupt=mode == "interrupt",
            checkers=checkers,
            quiet=frozenset(quiet),
        )
        for name, address in (frees or {}).items():
            for cpu in dict.fromkeys(machines):
                cpu.stub(name, lambda m, address=address: stepper.free(address(m)))  # type: ignore[misc]

    def _named(self, pc: int) -> str:
        """Where a PC is, for findings; Python steps have none."""
        return self.machine.describe(pc) if pc else "a step"

    # searching

    def explore(
        self,
        preemptions: int | None = 2,
        *,
        prune: bool = True,
        walks: int = 0,
        seed: int = 1,
        progress: Callable[[str], None] = lambda _: None,
    ) -> RaceResult:
        """All schedules with at most that many preemptions (None: any number), then `walks` random ones.

        `prune`: a state that was seen is not gone on from again; without it each interleaving is run to its end.
        """
        bounds: tuple[int | None, ...] = (0, None) if preemptions is None else tuple(range(preemptions + 1))
        while True:
            explorer = Explorer(self.stepper, prune=prune)
            try:
                self.stepper.learn()
                began, steps, counts = time.process_time(), self.stepper.steps, Counter[int]()
                for bound in bounds:
                    counts = explorer.within(bound)
                    progress(f"{'any number of' if bound is None else bound} preemptions: {counts.total()} schedules")
                    self.stepper.check_learned()
                seconds, runs = time.process_time() - began, explorer.ends
                rng = random.Random(seed)
                walked = Counter(explorer.random_walk(rng) for _ in range(walks))
                self.stepper.check_learned()
            except Learned:
                continue
            outcomes = tuple((outcome, (counts + walked)[i]) for i, outcome in enumerate(explorer.outcomes))
            judged = [(count, self._judged(explorer, outcome, count)) for outcome, count in outcomes]
            found, wrong = (
                self._merged(each for _, some in judged for each in some),
                sum(n for n, some in judged if some),
            )
            size = (counts.total(), runs, self.stepper.steps - steps, explorer.states, walks)
            return RaceResult(*size, preemptions, self.mode, outcomes, found, wrong, seconds)

    def replay(self, schedule: Schedule | str) -> tuple[list[Finding], list[Event]]:
        """Runs one schedule: what is wrong with its end, and all events in order.

        Raises ValueError for a schedule that the actors cannot follow.
        """
        names = [actor.name for actor in self.actors]
        wanted = Schedule.parse(schedule, names) if isinstance(schedule, str) else schedule
        while True:
            explorer = Explorer(self.stepper)
            try:
                self.stepper.learn()
                explorer.within(0)
                events: list[Event] = []
                self.stepper.trace = events
                number = explorer.replay(wanted)
            except Learned:
                continue
            finally:
                self.stepper.trace = None
            replayed = replace(explorer.outcomes[number], schedule=wanted)
            return self._judged(explorer, replayed, 1), events

    def columns(self, schedule: Schedule | str) -> str:
        """What each actor does, in order of time, one column for each."""
        return columns(self.replay(schedule)[1], self.actors, self.machine, self.places)

    def minimised(self, finding: Finding) -> Finding:
        """A finding of the same kind on the same words, whose schedule has no segment that could be left out."""
        smallest = finding
        while smaller := next(self._smaller(smallest), None):
            smallest = smaller
        return smallest

    def _smaller(self, finding: Finding) -> Iterator[Finding]:
        """The same finding with a segment less, or with one that goes on to its end in place of the later ones."""
        schedule = finding.schedule
        for i, segment in enumerate(schedule):
            if segment.until is None:
                continue
            to_end = segment._replace(until=None)
            rest = [later for later in schedule[i + 1 :] if later.actor != segment.actor]
            for fewer in (schedule[:i] + schedule[i + 1 :], (*schedule[:i], to_end, *rest)):
                try:
                    found, _ = self.replay(Schedule(fewer))
                except ValueError:
                    continue
                yield from (f for f in found if f.same_as(finding))

    # judging

    def _merged(self, findings: Iterable[Finding]) -> tuple[Finding, ...]:
        """One for each thing that is wrong, that with the shortest schedule; the counts of the others are added."""
        merged: dict[tuple[object, ...], Finding] = {}
        for finding in findings:
            known = merged.get(finding.key)
            count = finding.count + (known.count if known else 0)
            first = min([f for f in (known, finding) if f], key=lambda f: (f.schedule.preemptions, len(f.schedule)))
            merged[finding.key] = replace(first, count=count)
        return tuple(merged.values())

    def _judged(self, explorer: Explorer, outcome: Outcome, count: int) -> list[Finding]:
        """What is wrong with an end that `count` schedules have."""
        serial = [other for other in explorer.outcomes if not other.schedule.preemptions]
        found = [Finding(n.kind, f"{n.actor}: {n.text}", outcome.schedule, count) for n in outcome.notes]
        if self.serial and not any(np.array_equal(outcome.tables, other.tables) for other in serial):
            found.append(self._lost(outcome, serial, count))
        return found + [Finding(kind, text, outcome.schedule, count) for kind, text in self._wrong(explorer, outcome)]

    def _lost(self, outcome: Outcome, serial: Sequence[Outcome], count: int) -> Finding:
        """What differs from the serial order that is nearest."""
        nearest = min(serial, key=lambda other: int(np.count_nonzero(other.tables != outcome.tables)))
        differ = np.argwhere(nearest.tables != outcome.tables).tolist()
        words = tuple(self._word(nearest, outcome, row, column) for row, column in differ)
        text = f"{'; '.join(map(str, words))} (as after {nearest.schedule})"
        return Finding("lost-update", text, outcome.schedule, count, words)

    def _word(self, serial: Outcome, outcome: Outcome, row: int, column: int) -> Word:
        pa = self.stepper.table_pages[row] + 8 * column
        right, wrong = int(serial.tables[row, column]), int(outcome.tables[row, column])
        return self.places.word(pa, right, wrong)

    def _wrong(self, explorer: Explorer, outcome: Outcome) -> Iterator[tuple[str, str]]:
        """Expected descriptors and invariants, in the memory of that end."""
        if not self.expected and not self.invariants:
            return
        explorer.replay(outcome.schedule)
        scene = Scene(self.machine, (), frozenset())
        found = [("invariant", text) for invariant in self.invariants if (text := invariant(scene))]
        for va, word in self.expected.items():
            last = self.machine.translate(va).steps[-1]
            if last.word != word:
                found.append(("unexpected", f"{va:#018x} has {last.word:#018x}, not {word:#018x}"))
        yield from found
