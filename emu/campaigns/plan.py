"""What a campaign consists of: units, chunks of cases, their results as plain data.

Rules of this file:
- The identity and the seed of a case depend on the campaign's seed, its unit and its number, and on nothing else: not
  on how many cases there are, which worker runs it, or what was run before.
- Everything here is pickled between processes: named tuples of plain values.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

TRANSLATION, COMPARISON, RACE = "translation", "comparison", "race"
CHUNK = {TRANSLATION: 10, COMPARISON: 25, RACE: 1}  # cases that a worker gets at once: about a second's work
SEED_BITS = 48
REPLAY_HERE = "pgtable fuzz {store} --case {case}"  # for what no other command can be told
_NUMBER = re.compile(r"0x[0-9a-f]+|\b\d+\b")


class CampaignError(Exception):
    """A campaign cannot go on; one sentence."""


class Unit(NamedTuple):
    """A sort of cases. `work`: one of the three above; `subject`: the QEMU or the kernel, as a worker finds it, and
    `release` what the coordinator found there; `part`: the kind, function or scenario; `variant`: what else is chosen.
    """

    work: str
    subject: str
    release: str
    part: str
    granule: str
    variant: str = ""

    def case_id(self, number: int) -> str:
        """What the case of that number is called in the store."""
        return f"{' '.join(filter(None, self))} #{number}"


class Chunk(NamedTuple):
    """Cases `first` to `first + size - 1` of a unit, of a campaign with that seed."""

    unit: Unit
    seed: int
    first: int
    size: int

    @property
    def ids(self) -> list[str]:
        """The identities of its cases."""
        return [self.unit.case_id(self.first + i) for i in range(self.size)]


def case_seed(seed: int, case_id: str) -> int:
    """The seed of one case, of SEED_BITS bits."""
    digest = hashlib.sha256(f"{seed} {case_id}".encode()).digest()
    return int.from_bytes(digest[: SEED_BITS // 8])


class Row(NamedTuple):
    """What came of one case. `judged` = `agree` + `known` + `differ`; `detail`: counts, or counts by name."""

    id: str
    judged: int
    agree: int
    known: int
    differ: int
    detail: dict[str, Any]


class Found(NamedTuple):
    """A finding of one case. `signature`: the same for what seems to be the same; `replay`: the command line that
    gives it again alone, in which "{file}" is a file with the text `file`, "{store}" and "{case}" what they say."""

    signature: str
    case: str
    text: str
    replay: str
    file: str = ""


class Result(NamedTuple):
    """What came of a chunk."""

    rows: list[Row]
    found: list[Found]


def without_numbers(text: str) -> str:
    """A text with N for each number, for signatures."""
    return _NUMBER.sub("N", text)


@dataclass(frozen=True)
class Plan:
    """A campaign: what it was asked for, as JSON can hold it, and how many cases of which units that makes."""

    parameters: dict[str, Any]
    seed: int
    shares: Sequence[tuple[Unit, int]]

    @property
    def cases(self) -> int:
        """Cases in all."""
        return sum(count for _, count in self.shares)

    def chunks(self, done: Collection[str] = ()) -> Iterator[Chunk]:
        """All chunks in order, without those whose cases are all in `done`."""
        for unit, count in self.shares:
            size = CHUNK[unit.work]
            for first in range(0, count, size):
                chunk = Chunk(unit, self.seed, first, min(size, count - first))
                if not all(case_id in done for case_id in chunk.ids):
                    yield chunk


def dealt(units: Sequence[Unit], cases: int) -> list[tuple[Unit, int]]:
    """`cases` shared out evenly; units without any are left out."""
    each, rest = divmod(cases, len(units)) if units else (0, 0)
    return [(unit, share) for i, unit in enumerate(units) if (share := each + (i < rest))]
