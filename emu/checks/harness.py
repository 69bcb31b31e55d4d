"""What the harness of one compiled function offers, and the differences of a case.

A harness makes cases (prepared ones first, then random ones), runs one case on the model and on the real function, and
says which rows of the model's table a case reached. campaign.py drives them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from emu.checks.world import World
from kernel_model.compare import Difference, Outcome, comparable
from kernel_model.mm import Event


class Checked(NamedTuple):
    """A case that ran: what the model said, what the kernel did, and the rows of the table that it reached."""

    predicted: Outcome
    real: Outcome
    rows: frozenset[str]


class Harness(Protocol):
    """One function of a kernel image."""

    function: str

    @property
    def case(self) -> type:
        """The dataclass of its cases."""
        ...

    def prepared(self, world: World) -> Iterator[Any]:
        """Cases that are always run: one for each situation that matters."""
        ...

    def random(self, world: World, rng: random.Random) -> Any:
        """One random case."""
        ...

    def run(self, world: World, case: Any) -> Checked:
        """The case on the model and on the real function."""
        ...

    def rows(self, world: World) -> frozenset[str]:
        """Every row that cases can reach."""
        ...

    def smaller(self, case: Any) -> Iterator[Any]:
        """Simpler cases, for shrinking one that fails."""
        ...


def differences(checked: Checked) -> list[Difference]:
    """Every difference of a case; [] when the model was right."""
    mine, real = comparable(checked.predicted, checked.real)
    found = [*_ends(mine, real), *_words(mine, real)]
    for i in range(max(len(mine.events), len(real.events))):
        a, b = (side.events[i] if i < len(side.events) else None for side in (mine, real))
        if a != b:
            found.append(Difference("events", f"event {i}", _shown(a, mine), _shown(b, real)))
            break
    return found


def _shown(event: Event | None, side: Outcome) -> str:
    return f"{event or 'nothing more'} (of {len(side.events)})"


def _ends(mine: Outcome, real: Outcome) -> Iterator[Difference]:
    if mine.stop != real.stop:
        yield Difference("stop", "reason", mine.stop or "returned", real.stop or "returned")
    elif not mine.stop and mine.value != real.value:
        yield Difference("return value", "X0", str(mine.value), str(real.value))


def _words(mine: Outcome, real: Outcome) -> Iterator[Difference]:
    for pa in sorted(mine.words.keys() | real.words.keys()):
        known = mine.words.get(pa) or real.words[pa]
        a, b = (side.words[pa].new if pa in side.words else known.old for side in (mine, real))
        if a != b:
            yield Difference("descriptor", f"PA {pa:#x}", f"{a:#018x}", f"{b:#018x}")
