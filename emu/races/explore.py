"""The search through interleavings: depth first, fewest preemptions first, states that were seen are not run again.

A schedule says who runs and how far: `A5 B A` is actor A up to its 5th event, B to its end, A to its end. A switch away
from an actor that could go on is a preemption; one at its end, or where it waits, is none.

Counting: `interleavings` are the different schedules that the search covers. With pruning, those that go on from a
state seen before are counted and not run again: equal memory, registers and choices go on equally.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from emu.races.actors import Note, Progress
from emu.races.states import State
from emu.races.steps import Stepper
from pgtable.bits import Words

Counts = Counter[int]  # of schedules by outcome


class Segment(NamedTuple):
    """An actor and the number of events it is to have had when it stops; None: it runs to its end."""

    actor: str
    until: int | None = None

    def __str__(self) -> str:
        return self.actor if self.until is None else f"{self.actor}{self.until}"


class Schedule(tuple[Segment, ...]):
    """Segments in order."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str, actors: Iterable[str]) -> Schedule:
        """The schedule in `A5 B A`; raises ValueError naming what is wrong."""
        names, segments = list(actors), []
        for word in text.split():
            name = next((n for n in sorted(names, key=len, reverse=True) if word.startswith(n)), None)
            count = word[len(name) :] if name else ""
            if name is None or (count and not count.isdecimal()):
                raise ValueError(f"schedule {text!r}: {word} is no actor ({', '.join(names)}) with a count of events")
            segments.append(Segment(name, int(count) if count else None))
        missing = [n for n in names if Segment(n) not in segments]
        if missing:
            raise ValueError(f"schedule {text!r}: {missing[0]} never runs to its end")
        return cls(segments)

    def __str__(self) -> str:
        return " ".join(map(str, self))

    @property
    def preemptions(self) -> int:
        """Segments that end before their actor does."""
        return sum(segment.until is not None for segment in self)


@dataclass(frozen=True)
class Outcome:
    """An end that schedules have: the words of the table pages, results of each actor, notes; `schedule`: the first."""

    schedule: Schedule
    tables: Words
    results: tuple[tuple[int, ...], ...]
    notes: tuple[Note, ...]


class Explorer:
    """One search. `outcomes` in the order in which they were met, by their number."""

    def __init__(self, stepper: Stepper, *, prune: bool = True) -> None:
        self.stepper, self.prune = stepper, prune
        self.outcomes: list[Outcome] = []
        self.ends = 0  # schedules that were run to their end
        self._numbers: dict[object, int] = {}
        self._seen: dict[tuple[int, int, int | None, bool], Counts] = {}
        self._open: set[tuple[int, int, int | None, bool]] = set()  # states on the way to here
        sys.setrecursionlimit(max(sys.getrecursionlimit(), 20_000))

    @property
    def states(self) -> int:
        """Different states met, counted with who runs and the preemptions left."""
        return len(self._seen)

    def within(self, preemptions: int | None) -> Counts:
        """Runs all schedules with at most that many preemptions (None: any number); how many end how."""
        start = self.stepper.begin()
        total: Counts = Counter()
        for actor in range(len(self.stepper.actors)):
            total += self._from(start, actor, preemptions, ())
        return total

    def _from(self, state: State, actor: int, left: int | None, path: tuple[Segment, ...]) -> Counts:
        """Goes on from `state` with `actor`, to which it has just switched."""
        chain: list[tuple[State, tuple[int, int, int | None, bool] | None]] = []
        fresh = True
        while True:
            key = (state.key, actor, left, fresh) if self.prune else None
            if key and key in self._seen:
                tail = self._seen[key]
                break
            if key in self._open:  # it goes round in a circle
                tail = self._circled(state, actor, left, path) if any(key == k for _, k in chain) else Counter()
                break
            if key:
                self._open.add(key)
            chain.append((state, key))
            before, state = state, self.stepper.step(state, actor, free=self._alone(state, actor, left))
            fresh = False
            if self._done(state, actor) or state.actors[actor].waiting:
                tail = self._switched(before, state, actor, left, path)
                break
        for i, (at, key) in reversed(list(enumerate(chain))):
            tail = self._and_preempted(at, actor, left, path, tail) if i else tail
            if key:
                self._seen[key] = tail
                self._open.discard(key)
        return tail

    def _circled(self, state: State, actor: int, left: int | None, path: tuple[Segment, ...]) -> Counts:
        """The actor spins until somebody else acts: a switch away from it is no preemption."""
        here = (*path, Segment(self._name(actor), state.actors[actor].events))
        return sum((self._from(state, other, left, here) for other in self._others(state, actor)), Counter())

    def _alone(self, state: State, actor: int, left: int | None) -> bool:
        """Nobody can come in between before it ends."""
        return left == 0 or (self.stepper.interrupt and actor > 0) or not self._others(state, actor)

    def _and_preempted(
        self, state: State, actor: int, left: int | None, path: tuple[Segment, ...], counts: Counts
    ) -> Counts:
        if left == 0 or (self.stepper.interrupt and actor > 0):
            return counts
        segment = Segment(self._name(actor), state.actors[actor].events)
        rest = None if left is None else left - 1
        for other in self._others(state, actor):
            counts = counts + self._from(state, other, rest, (*path, segment))
        return counts

    def _switched(self, before: State, state: State, actor: int, left: int | None, path: tuple[Segment, ...]) -> Counts:
        """The actor has ended, or waits: any other goes on."""
        done = self._done(state, actor)
        here = (*path, Segment(self._name(actor), None if done else state.actors[actor].events))
        others = self._others(state, actor)
        if others:
            return sum((self._from(state, other, left, here) for other in others), Counter())
        if not done and state.key != before.key:
            return self._from(state, actor, left, path)
        return Counter({self._end(state, here): 1})

    def _others(self, state: State, actor: int) -> list[int]:
        return [
            other
            for other, progress in enumerate(state.actors)
            if other != actor and not progress.waiting and not self._done(state, other)
        ]

    def _done(self, state: State, actor: int) -> bool:
        return state.actors[actor].operation >= len(self.stepper.actors[actor].work)

    def _name(self, actor: int) -> str:
        return self.stepper.actors[actor].name

    def _end(self, state: State, path: tuple[Segment, ...]) -> int:
        """The number of the outcome that `state` is."""
        self.ends += 1
        stuck = [Note("deadlock", self._name(i), "it waits for ever") for i, p in enumerate(state.actors) if p.waiting]
        notes = (*state.notes, *stuck)
        results = tuple(progress.results for progress in state.actors)
        tables = self.stepper.table_words(state)
        number = self._numbers.setdefault((tables.tobytes(), results, notes), len(self.outcomes))
        if number == len(self.outcomes):
            self.outcomes.append(Outcome(Schedule(path), tables, results, notes))
        return number

    # one schedule

    def random_walk(self, rng: random.Random, chance: float = 0.25) -> int:
        """One schedule that switches at each point with that chance; the number of its outcome."""
        state = self.stepper.begin()
        actor = rng.randrange(len(self.stepper.actors))
        path: list[Segment] = []
        while True:
            before, state = state, self.stepper.step(state, actor)
            done, waiting = self._done(state, actor), state.actors[actor].waiting
            others = self._others(state, actor)
            if not others and (done or (waiting and state.key == before.key)):
                return self._end(state, (*path, Segment(self._name(actor))))
            held = self.stepper.interrupt and actor > 0 and not done
            if others and not held and (done or waiting or rng.random() < chance):
                path.append(Segment(self._name(actor), None if done else state.actors[actor].events))
                actor = rng.choice(others)

    def replay(self, schedule: Schedule) -> int:
        """Runs one schedule; the number of its outcome. Raises ValueError for one that does not fit the actors."""
        state = self.stepper.begin()
        names = [actor.name for actor in self.stepper.actors]
        for segment in schedule:
            state = self._segment(state, names.index(segment.actor), segment)
        left = [name for i, name in enumerate(names) if not self._done(state, i) and not state.actors[i].waiting]
        if left:
            raise ValueError(f"schedule {schedule}: {left[0]} does not run to its end")
        return self._end(state, tuple(schedule))

    def _segment(self, state: State, actor: int, segment: Segment) -> State:
        while not self._done(state, actor):
            progress: Progress = state.actors[actor]
            if segment.until is not None and progress.events >= segment.until:
                break
            state = self.stepper.step(state, actor, free=segment.until is None)
            if state.actors[actor].waiting and segment.until is None:
                break
        if segment.until is not None and state.actors[actor].events != segment.until:
            raise ValueError(f"{segment}: {segment.actor} has no switch point there")
        return state
