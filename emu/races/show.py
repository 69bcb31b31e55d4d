"""Interleavings for people: which descriptor a table word is, and what each actor did, in columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from emu.exceptions import disassemble
from emu.machine import Machine
from emu.races.actors import Actor, Event
from pgtable import NoMemory
from pgtable.leaves import tables as tables_of

INDENT = 44  # columns from one actor to the next


@dataclass(frozen=True)
class Word:
    """A table word that is not as it should be: where it is, `right` as in a serial order, `found` as it is.

    `fields`: by name, (as it should be, as found). `va`, `level`: None for a word outside the tree.
    """

    pa: int
    va: int | None
    level: int | None
    right: int
    found: int
    fields: tuple[tuple[str, int, int], ...]

    def __str__(self) -> str:
        where = f"PA {self.pa:#x}" if self.va is None else f"{self.va:#018x} L{self.level}"
        lost = ", ".join(f"{name} is {found:#x}, not {right:#x}" for name, right, found in self.fields)
        return f"{where} is {self.found:#018x}, not {self.right:#018x}" + (f": {lost}" if lost else "")


class Places:
    """Which descriptor each word of the tables is, by the tree as it is when this is made."""

    def __init__(self, machine: Machine) -> None:
        self._page = machine.plan.page_size
        self._fmt = machine.tables.fmt
        found = tables_of(machine.memory, machine.registers())
        rows = zip(found.pa.tolist(), found.va.tolist(), found.level.tolist(), strict=True)
        self._tables = {pa & -self._page: (va, level) for pa, va, level in rows}

    def of(self, pa: int) -> tuple[int, int] | None:
        """(VA, level) of the descriptor at `pa`, None outside the tree."""
        table = self._tables.get(pa & -self._page)
        if table is None:
            return None
        va, level = table
        return va + (pa % self._page >> 3) * self._fmt.granule.level_size(level), level

    def changed(self, pa: int, old: int, new: int) -> Mapping[str, tuple[int, int]]:
        """The fields in which two words at `pa` differ, by the names of its level."""
        place = self.of(pa)
        return self._fmt.layout(new if new & 1 else old, place[1]).changed(old, new) if place else {}

    def word(self, pa: int, right: int, found: int) -> Word:
        """A word that is not as it should be."""
        va, level = self.of(pa) or (None, None)
        fields = tuple((name, *pair) for name, pair in self.changed(pa, right, found).items())
        return Word(pa, va, level, right, found, fields)


def table_ranges(machine: Machine, va: int) -> list[tuple[int, int]]:
    """The table pages that a walk of `va` reads: (PA, bytes)."""
    page = machine.plan.page_size
    return [(step.pa & -page, page) for step in machine.translate(va).steps]


def columns(events: Sequence[Event], actors: Sequence[Actor], machine: Machine, places: Places) -> str:
    """One column for each actor, time downwards. Shown in full: accesses to words that anyone writes, TLB maintenance,
    steps; of the rest only how many there were."""
    return "\n".join(_lines(events, [actor.name for actor in actors], machine, places))


def _lines(events: Sequence[Event], names: list[str], machine: Machine, places: Places) -> Iterator[str]:
    written = {event.pa for event in events if event.kind == "write"}
    yield "".join(name.ljust(INDENT) for name in names).rstrip()
    skipped, last = 0, ""
    for event in [*events, None]:
        full = event and (event.kind in ("tlbi", "step", "end") or event.pa in written)
        if skipped and (full or event is None or event.actor != last):
            yield _at(names, last, f"... {skipped} other event{'' if skipped == 1 else 's'}")
            skipped = 0
        if event is None:
            return
        last = event.actor
        if not full:
            skipped += 1
            continue
        for line in _described(event, machine, places):
            yield _at(names, event.actor, line)


def _at(names: list[str], actor: str, text: str) -> str:
    return " " * (INDENT * names.index(actor)) + text


def _described(event: Event, machine: Machine, places: Places) -> list[str]:
    if not event.pc:
        return [f"{event.number:3} {event.text}"]
    code = f"{event.number:3} {machine.describe(event.pc)}: {_instruction(machine, event.pc)}"
    return [code, "    " + _access(event, places)] if event.kind in ("read", "write") else [code]


def _instruction(machine: Machine, pc: int) -> str:
    try:
        return disassemble(machine.word_at(pc), pc)
    except (ValueError, NoMemory):
        return "?"


def _access(event: Event, places: Places) -> str:
    place = places.of(event.pa)
    where = f"L{place[1]} of {place[0]:#018x}" if place else f"PA {event.pa:#x}"
    if event.kind == "read":
        return f"{where} reads {event.old:#018x}"
    fields = places.changed(event.pa, event.old, event.new)
    changes = ", ".join(f"{name} {old:#x}->{new:#x}" for name, (old, new) in fields.items())
    return f"{where} = {event.new:#018x}  {changes or 'unchanged'}"
