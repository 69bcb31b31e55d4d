"""What the page and the drawing show, as plain values: rows with rights, memory types and walks; of one source or two.

Rules of this file:
- A row is a range of the listing, or a part of it where two sources are compared. Its walk is that of its first VA, by
  `translate`; table descriptors, which many walks share, are kept once.
- In JSON addresses and words are hexadecimal without 0x, since JavaScript's numbers end at 53 bits; texts that repeat
  are numbers into a list.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from emu.map.areas import Area, Half, areas, halves
from emu.sources import Source
from pgtable import Access, AccessType, Walk, translate
from pgtable.attributes import MemoryAttributes
from pgtable.diff import diff
from pgtable.listing import Listing, listing
from pgtable.listing_stage2 import nested_listing
from pgtable.nested import deciders
from pgtable.params import Regime, stage2_on
from pgtable.permissions import PR, PW, PX, UR, UW, UX
from pgtable.registers import SH
from pgtable.why import rights

SAME, REMOVED = "same", "removed"  # and "added", "changed"


class Kind(NamedTuple):
    """A class of permissions: what it is called, its colour on white and on black."""

    key: str
    name: str
    light: str
    dark: str


KINDS = (
    Kind("wx", "writable and executable", "#d3303a", "#f0525c"),
    Kind("x", "executable", "#e08a1e", "#f0a03c"),
    Kind("w", "read/write", "#4b7fd0", "#5f93e6"),
    Kind("r", "read-only", "#52a69a", "#58b8aa"),
    Kind("ux", "EL0 may execute", "#b8438c", "#d961ab"),
    Kind("uw", "EL0 may write", "#7d58c6", "#9a78e2"),
    Kind("ur", "EL0 may read", "#b09ae0", "#c3b1ec"),
    Kind("none", "no access", "#9a9fa8", "#7d838d"),
)


def kind_of(perms: int) -> int:
    """The number of the kind in KINDS that permission bits belong to."""
    if perms & (PW | UW) and perms & (PX | UX):
        name = "wx"
    elif perms & (UR | UW | UX):
        name = "ux" if perms & UX else "uw" if perms & UW else "ur"
    else:
        name = "x" if perms & PX else "w" if perms & PW else "r" if perms & PR else "none"
    return next(i for i, kind in enumerate(KINDS) if kind.key == name)


def pattern_of(attr: int) -> str:
    """How a memory type is drawn over the colour: "device", "uncached" (Normal), or "" for cacheable memory."""
    memory = MemoryAttributes.of(attr)
    if memory.type != "Normal":
        return "device"
    return "uncached" if "non-cacheable" in (memory.inner, memory.outer) else ""


class Row(NamedTuple):
    """A range: VAs [va, va + size) to PAs from `pa` on, `leaves` descriptors of `level`; attributes as text.

    `kind`: of KINDS. `name`: the symbol there. `status`: of a comparison. `fields`: what changed: name, old, new.
    `walks`: of the first VA, in the second source or the only one, then in the first; None where it is not mapped.
    """

    va: int
    size: int
    pa: int
    level: int
    leaves: int
    kind: int
    rights: str
    memory: str
    pattern: str
    name: str
    status: str
    fields: tuple[tuple[str, int, int], ...]
    walks: tuple[Walk | None, ...]

    @property
    def fault(self) -> str:
        """Why every access faults, "" if none does."""
        walk = next(walk for walk in self.walks if walk)
        return "; ".join([str(walk.fault), *(decider.text for decider in deciders(walk))]) if walk.fault else ""


@dataclass(frozen=True)
class Mapped:
    """A source and what it maps."""

    source: Source
    listing: Listing

    @classmethod
    def of(cls, source: Source, regime: Regime | None) -> Mapped:
        """The listing of an opened source with registers, through both stages where stage 2 is on."""
        regs = source.registers
        assert regs is not None
        if stage2_on(regs) and regime in (None, Regime.EL10):
            return cls(source, nested_listing(source.memory, regs).both)
        return cls(source, listing(source.memory, regs, regime=regime))

    def walk(self, va: int) -> Walk:
        """The walk of an access that no permission refuses."""
        found, access = self.listing, Access(AccessType.AT_ANY, self.listing.regime.el)
        return translate(self.source.memory, found.regs, va, access, regime=found.regime)

    def row(self, number: int, va: int, size: int, **more: Any) -> Row:
        """VAs [va, va + size) of row `number` of the listing."""
        runs, regime = self.listing.runs, self.listing.regime
        level, perms, attr = int(runs.level[number]), int(runs.perms[number]), int(runs.attr[number])
        entry = self.listing.params(va).fmt.granule.level_size(level)
        symbol = getattr(self.source.symbols, "at", lambda _: None)(va)
        return Row(
            va=va,
            size=size,
            pa=int(runs.pa[number]) + va - int(runs.va[number]),
            level=level,
            leaves=-(-size // entry),
            kind=kind_of(perms),
            rights=rights(perms, regime),
            memory=f"{MemoryAttributes.of(attr)}, {SH[int(runs.sh[number])]}",
            pattern=pattern_of(attr),
            name=symbol.name if symbol and not symbol.offset else "",
            **{"status": SAME, "fields": (), "walks": (self.walk(va),)} | more,
        )

    def part(self, va: int, size: int, **more: Any) -> Row:
        """VAs [va, va + size), which one row of the listing has."""
        number = self.listing.at(va)
        assert number is not None
        return self.row(number, va, size, **more)


@dataclass(frozen=True)
class MapData:
    """All that is drawn. `old` is what the first source has, where two are compared."""

    title: str
    now: Mapped
    old: Mapped | None = None
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def of(cls, title: str, now: Mapped, old: Mapped | None = None) -> MapData:
        """The rows of one source; of two, what both have and what differs."""
        rows = _compared(old, now) if old else _all(now)
        return cls(title, now, old, sorted(rows, key=lambda row: row.va))

    @property
    def areas(self) -> list[Area]:
        """The parts of the VA space."""
        return areas(self.now.source, self.now.listing)

    @property
    def halves(self) -> list[Half]:
        """The halves of the VA space."""
        return halves(self.now.listing)


def _all(mapped: Mapped) -> Iterator[Row]:
    runs = mapped.listing.runs
    for i, (va, size) in enumerate(zip(runs.va.tolist(), runs.size.tolist(), strict=True)):
        yield mapped.row(i, va, size)


def _compared(old: Mapped, now: Mapped) -> Iterator[Row]:
    changes = diff(old.listing, now.listing)
    for change in changes:
        walks = tuple(m.walk(change.va) if side else None for m, side in ((now, change.new), (old, change.old)))
        side = old if change.kind == REMOVED else now
        yield side.part(change.va, change.size, status=change.kind, fields=change.fields, walks=walks)
    differs = [(change.va, change.va + change.size) for change in changes]
    runs = now.listing.runs
    for i, (va, size) in enumerate(zip(runs.va.tolist(), runs.size.tolist(), strict=True)):
        for start, end in _without(va, va + size, differs):
            yield now.row(i, start, end - start)


def _without(start: int, end: int, others: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of [start, end) that are in none of `others`, which are in order."""
    for other, other_end in others[max(bisect_right(others, (start, 0)) - 1, 0) :]:
        if other >= end:
            break
        if start < other:
            yield start, other
        start = max(start, other_end)
    if start < end:
        yield start, end
