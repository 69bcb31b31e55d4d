"""Predicted against real: one call's value, memory, TLB maintenance and order, as differences with names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from kernel_model.mm import Barrier, Event, Tlbi, Warn, Write
from pgtable.bits import Layout


class Word(NamedTuple):
    """A descriptor's place and value before and after. `va`, `level`: None where no tree reaches it."""

    va: int | None
    level: int | None
    pa: int
    old: int
    new: int


@dataclass(frozen=True)
class Outcome:
    """What a call did, predicted or real.

    `value`: what it returned. `words`: changed descriptors by PA. `events`: descriptor writes, TLBI, DSB and ISB in
    order, and WARNs. `stop`: why it did not return ("" if it did). `cut`: it was stopped, and would have gone on.
    """

    value: int
    words: dict[int, Word]
    events: tuple[Event, ...]
    stop: str = ""
    cut: bool = False

    @property
    def maintenance(self) -> tuple[Tlbi, ...]:
        """The TLB maintenance, in order."""
        return tuple(e for e in self.events if isinstance(e, Tlbi))

    @property
    def warnings(self) -> tuple[Warn, ...]:
        """The WARNs, in order."""
        return tuple(e for e in self.events if isinstance(e, Warn))

    @property
    def order(self) -> tuple[Event, ...]:
        """Writes, TLBI and barriers, in order."""
        return tuple(e for e in self.events if isinstance(e, Write | Tlbi | Barrier))


class Difference(NamedTuple):
    """One thing that is not as predicted. `va` and `level` say where, for a descriptor; `field` its field."""

    what: str
    field: str
    predicted: str
    real: str
    va: int | None = None
    level: int | None = None
    bits: str = ""

    def __str__(self) -> str:
        field = f"{self.field} (bit {self.bits})" if self.bits else self.field
        where = f" at {self.va:#018x} level {self.level}" if self.va is not None else ""
        return f"{self.what}{where}: {field} predicted {self.predicted}, real {self.real}"

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "what": self.what,
            "va": None if self.va is None else f"{self.va:#018x}",
            "level": self.level,
            "field": self.field,
            "bits": self.bits,
            "predicted": self.predicted,
            "real": self.real,
        }


RUNAWAY = "runaway"  # `Outcome.stop` of a loop without an end


def comparable(one: Outcome, two: Outcome) -> tuple[Outcome, Outcome]:
    """Two outcomes as far as they can be compared: of calls that never end, what was cut is a beginning of the other.

    The memory of one that was cut is that of some moment.
    """
    cut = [len(side.events) for side in (one, two) if side.cut]
    if not cut or not one.stop == two.stop == RUNAWAY:
        return one, two
    n = min(cut)
    return replace(one, words={}, events=one.events[:n]), replace(two, words={}, events=two.events[:n])


LayoutOf = Callable[[int, int], Layout]  # (word, level) -> layout


def compare(predicted: Outcome, real: Outcome, layout: LayoutOf) -> list[Difference]:
    """Every difference between two outcomes of one call; [] when the prediction was right."""
    if predicted.cut or real.cut:  # where its WARNs are among the others is not known
        predicted, real = (replace(outcome, events=outcome.order) for outcome in (predicted, real))
    predicted, real = comparable(predicted, real)
    return [*_values(predicted, real), *_words(predicted, real, layout), *_order(predicted, real)]


def _values(predicted: Outcome, real: Outcome) -> Iterator[Difference]:
    if predicted.stop != real.stop:
        yield Difference("stop", "reason", predicted.stop or "returned", real.stop or "returned")
    elif not real.stop and predicted.value != real.value:
        yield Difference("return value", "X0", str(predicted.value), str(real.value))


def _words(predicted: Outcome, real: Outcome, layout: LayoutOf) -> Iterator[Difference]:
    for pa in sorted(predicted.words.keys() | real.words.keys()):
        mine, theirs = predicted.words.get(pa), real.words.get(pa)
        known = theirs or mine
        assert known
        new = mine.new if mine else known.old
        actual = theirs.new if theirs else known.old
        if new == actual:
            continue
        if known.level is None:
            yield Difference("descriptor", f"PA {pa:#x}", f"{new:#018x}", f"{actual:#018x}")
            continue
        fields = layout(actual, known.level)
        for name, (a, b) in fields.changed(new, actual).items():
            yield Difference("descriptor", name, f"{a:#x}", f"{b:#x}", known.va, known.level, fields[name].bits)


def _order(predicted: Outcome, real: Outcome) -> Iterator[Difference]:
    """The first place where each sequence departs, and how many there are in it."""
    for what, mine, theirs in (
        ("TLB maintenance", predicted.maintenance, real.maintenance),
        ("warning", predicted.warnings, real.warnings),
        ("order of writes, TLBI and barriers", predicted.order, real.order),
    ):
        if mine == theirs:
            continue
        i = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
        a, b = (str(seq[i]) if i < len(seq) else "nothing more" for seq in (mine, theirs))
        yield Difference(what, f"event {i}", f"{a} (of {len(mine)})", f"{b} (of {len(theirs)})")
