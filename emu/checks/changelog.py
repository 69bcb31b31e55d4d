"""The same random cases through two kernel binaries, with no model between: what changed in behaviour.

Rules of this file:
- Cases are made in A's world. What only says where things are (the events' PCs) is in neither outcome.
- Differences are grouped by what differs; each group keeps one case, shrunk as long as it stays in the group.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from emu.checks.campaign import Worlds, cases_of
from emu.checks.harness import Harness
from emu.checks.world import World
from kernel_model.compare import Outcome, comparable
from kernel_model.mm import Callback, Event, Warn, Write

SHRINK_TRIES = 60  # for each way in which two kernels differ


@dataclass
class Group:
    """Cases that differ in the same way: `what`, how many, and the smallest with both outcomes."""

    what: str
    count: int
    case: Any
    a: Outcome
    b: Outcome
    at: int | None = None  # the first event that differs


@dataclass
class Changelog:
    """What two kernels did with the same cases."""

    functions: tuple[str, str]
    kernels: tuple[str, str]
    seed: int
    cases: int = 0
    events: int = 0
    differ: int = 0
    groups: list[Group] = field(default_factory=list)
    seconds: float = 0.0


def compare(
    worlds: tuple[Worlds, Worlds],
    harnesses: tuple[Harness, Harness],
    cases: int,
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Changelog:
    """Runs `cases` random cases, and the prepared ones, through both kernels."""
    a, b = (each.of(harness, "plain") for each, harness in zip(worlds, harnesses, strict=True))
    log = Changelog((harnesses[0].function, harnesses[1].function), (a.image.release, b.image.release), seed)
    start, groups = time.monotonic(), dict[str, Group]()
    for i, case in enumerate(cases_of(a, harnesses[0], "plain", cases, seed)):
        if i % 50 == 0:
            progress(f"case {i}, {log.differ} differ")
        pair = _pair(a, b, harnesses, case)
        log.cases += 1
        log.events += len(pair[0].events)
        what = signature(a, b, *pair)
        if not what:
            continue
        log.differ += 1
        if what in groups:
            groups[what].count += 1
        else:
            groups[what] = _shrunk(a, b, harnesses, case, what)
    log.groups = sorted(groups.values(), key=lambda group: -group.count)
    log.seconds = time.monotonic() - start
    return log


def _pair(a: World, b: World, harnesses: tuple[Harness, Harness], case: Any) -> tuple[Outcome, Outcome]:
    return harnesses[0].run(a, case).real, harnesses[1].run(b, case).real


def _shrunk(a: World, b: World, harnesses: tuple[Harness, Harness], case: Any, what: str) -> Group:
    """The smallest case found that differs in the same way."""
    tries = SHRINK_TRIES
    while tries > 0:
        for smaller in islice(harnesses[0].smaller(case), tries):
            tries -= 1
            if signature(a, b, *_pair(a, b, harnesses, smaller)) == what:
                case = smaller
                break
        else:
            break
    pair = _pair(a, b, harnesses, case)
    return Group(what, 1, case, *pair, at=_first(*pair))


def signature(a: World, b: World, one: Outcome, two: Outcome) -> str:
    """How two outcomes differ, in a line without addresses; "" if they do not."""
    one, two = comparable(one, two)
    parts = []
    if one.stop != two.stop:
        parts.append(f"{one.stop or 'returns'} -> {two.stop or 'returns'}")
    elif not one.stop and one.value != two.value:
        parts.append(f"returns {one.value} -> {two.value}")
    parts += _word_signature(a, one, two)
    at = _first(one, two)
    if at is not None:
        parts.append(f"events: {_kind(one, at)} -> {_kind(two, at)}")
    return "; ".join(parts)


def _word_signature(world: World, one: Outcome, two: Outcome) -> list[str]:
    """The fields of descriptors that end up different, by name."""
    found = set()
    for pa in one.words.keys() | two.words.keys():
        known = one.words.get(pa) or two.words[pa]
        x, y = (side.words[pa].new if pa in side.words else known.old for side in (one, two))
        if x != y and x and y:
            found |= set(world.space.fmt.layout(x, 3).changed(x, y))
        elif x != y:
            found.add("cleared" if x else "not cleared" if known.old else "set")
    return [f"descriptors: {', '.join(sorted(found))}"] if found else []


def _first(one: Outcome, two: Outcome) -> int | None:
    """The first event that differs. A WARN is a WARN wherever a compiler inlined its function."""
    n = max(len(one.events), len(two.events))
    for i in range(n):
        x, y = (side.events[i] if i < len(side.events) else None for side in (one, two))
        if x != y and not (isinstance(x, Warn) and isinstance(y, Warn)):
            return i
    return None


def _kind(side: Outcome, at: int) -> str:
    event: Event | None = side.events[at] if at < len(side.events) else None
    if event is None:
        return "nothing more"
    if isinstance(event, Callback):
        return f"{event.name}" + (f" depth {event.args[2]}" if event.name == "pte_hole" else "")
    if isinstance(event, Write):
        return "a store"
    return str(event).partition(",")[0] if not isinstance(event, Warn) else "WARN"


__all__ = ["Changelog", "Group", "compare", "signature"]
