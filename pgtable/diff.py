"""Two listings compared: what is mapped in one only, and what is mapped otherwise, merged.

Rules of this file: addresses are compared, not rows. Where a range was mapped and still is, what changed is told by
the fields' names: those of the leaf, the table attributes above it, the level, the PA.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pgtable.bits import Words
from pgtable.descriptors import LAST_LEVEL
from pgtable.listing import Listing, Runs
from pgtable.tree import Index


class Side(NamedTuple):
    """What one listing has at a range's first VA."""

    pa: int
    level: int
    word: int
    inherited: int
    perms: int
    fault: int
    attributes: int


class Change(NamedTuple):
    """A range of VAs that differs. `kind`: "added", "removed" or "changed"; `fields`: name, value before and after."""

    kind: str
    va: int
    size: int
    old: Side | None
    new: Side | None
    fields: tuple[tuple[str, int, int], ...]


def diff(old: Listing, new: Listing) -> list[Change]:
    """The ranges that differ between two listings, in VA order."""
    points = _points(old.runs, new.runs)
    if not len(points):
        return []
    a, b = _rows_at(old.runs, points), _rows_at(new.runs, points)
    pa_a, pa_b = _pas(old.runs, points, a), _pas(new.runs, points, b)
    differs = ((a < 0) != (b < 0)) | ((a >= 0) & (b >= 0) & _unlike(old.runs, a, new.runs, b, pa_a, pa_b))
    size = np.append(points[1:], np.uint64(0)) - points
    changes: list[Change] = []
    for i in np.flatnonzero(differs).tolist():
        change = _change(old, new, int(points[i]), int(size[i]), int(a[i]), int(b[i]))
        if changes and _continues(changes[-1], change):
            changes[-1] = changes[-1]._replace(size=changes[-1].size + change.size)
        else:
            changes.append(change)
    return changes


def _points(*listings: Runs) -> Words:
    """Every VA where a row of any listing begins, or ends before the top."""
    ends = [runs.va + runs.size for runs in listings]
    return np.unique(np.concatenate([*(runs.va for runs in listings), *(end[end != 0] for end in ends)]))


def _rows_at(runs: Runs, points: Words) -> Index:
    """The row that each point is in, -1 for none."""
    if not len(runs.va):
        return np.full(len(points), -1, np.int64)
    row = np.searchsorted(runs.va, points, side="right") - 1
    inside = (row >= 0) & (points - runs.va[row] < runs.size[row])
    return np.where(inside, row, -1)


def _pas(runs: Runs, points: Words, row: Index) -> Words:
    return runs.pa[row] + (points - runs.va[row]) if len(runs.va) else np.zeros(len(points), np.uint64)


def _unlike(a: Runs, i: Index, b: Runs, j: Index, pa_a: Words, pa_b: Words) -> npt.NDArray[np.bool_]:
    unlike: npt.NDArray[np.bool_] = pa_a != pa_b
    if len(a.va) and len(b.va):
        for name in ("level", "attributes", "inherited", "perms", "fault", "attr", "sh"):
            unlike = unlike | (getattr(a, name)[i] != getattr(b, name)[j])
    return unlike


def _change(old: Listing, new: Listing, va: int, size: int, a: int, b: int) -> Change:
    before, after = _side(old, va, a), _side(new, va, b)
    if before is None or after is None:
        return Change("added" if before is None else "removed", va, size, before, after, ())
    return Change("changed", va, size, before, after, tuple(_fields(old, new, va, before, after)))


def _side(listing: Listing, va: int, row: int) -> Side | None:
    if row < 0:
        return None
    runs = listing.runs
    level, shift = int(runs.level[row]), va - int(runs.va[row])
    entry = listing.params(va).fmt.granule.level_size(level)
    return Side(
        pa=int(runs.pa[row]) + shift,
        level=level,
        word=int(runs.word[row]) + (shift & -entry),
        inherited=int(runs.inherited[row]),
        perms=int(runs.perms[row]),
        fault=int(runs.fault[row]),
        attributes=int(runs.attributes[row]),
    )


def _fields(old: Listing, new: Listing, va: int, a: Side, b: Side) -> list[tuple[str, int, int]]:
    """What is not the same, by name."""
    found = []
    if a.level != b.level:
        found.append(("level", a.level, b.level))
    if a.pa != b.pa:
        found.append(("PA", a.pa, b.pa))
    before, after = old.params(va).fmt.leaf(a.level), new.params(va).fmt.leaf(b.level)
    for row in before:
        if row.name not in ("OA", "TYPE") and row.name in after:
            values = row.get(a.word), after[row.name].get(b.word)
            found += [(row.name, *values)] if values[0] != values[1] else []
    table = old.params(va).fmt.table(LAST_LEVEL - 1)
    for row in table:
        values = row.get(a.inherited), row.get(b.inherited)
        found += [(row.name, *values)] if values[0] != values[1] else []
    if not found and a.perms != b.perms:
        found.append(("permissions", a.perms, b.perms))
    if not found and a.fault != b.fault:
        found.append(("fault", a.fault, b.fault))
    return found


def _continues(before: Change, after: Change) -> bool:
    """The same difference at the addresses that follow."""
    if before.kind != after.kind or before.va + before.size != after.va:
        return False
    for a, b in ((before.old, after.old), (before.new, after.new)):
        if a and b and (b.pa - a.pa != before.size or a.level != b.level or a[3:] != b[3:]):
            return False
    return True
