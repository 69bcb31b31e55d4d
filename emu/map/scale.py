"""Where ranges go on a drawing: to scale, with a least height, long gaps cut, and small neighbours drawn as one.

Rules of this file:
- A drawing is a window of VAs from top to bottom. Its pieces are ranges, clusters of ranges, and gaps, in VA order.
- Neighbours of one area become a cluster while there is no room, the smallest first.
- One number of pixels per byte is used for all; a range has at least ITEM pixels, a gap at most GAP.
- map.js does the same for the page.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from emu.map.areas import Area

ITEM = 19.0  # pixels: a line of text
GAP = 19.0  # a cut gap
SLIVER = 2.0  # the least of a gap


class Piece(NamedTuple):
    """VAs [start, end): `ranges` of them from number `first` on; 0 for a gap. `empty`: a whole area without a range."""

    start: int
    end: int
    first: int = 0
    ranges: int = 0
    empty: bool = False


class Placed(NamedTuple):
    """A piece with its place, in pixels from the top; `cut`: a gap that is not to scale."""

    piece: Piece
    top: float
    height: float
    cut: bool


def pieces(start: int, end: int, ranges: Sequence[tuple[int, int]], areas: Sequence[Area], room: float) -> list[Piece]:
    """The pieces of the window [start, end); `ranges`: (start, end) in VA order; `room` in pixels."""
    borders = [area.start for area in areas]
    shown = [Piece(max(a, start), min(b, end), i, 1) for i, (a, b) in enumerate(ranges) if a < end and start < b]
    size = 1 << 12
    found = _with_gaps(start, end, shown, areas) if len(shown) * ITEM <= room else []
    while size <= end - start and (len(shown) * ITEM > room or least(found) > room):
        shown = _clustered(shown, size, borders)
        found = _with_gaps(start, end, shown, areas) if len(shown) * ITEM <= room else []
        size += size // 4
    return found or _with_gaps(start, end, shown, areas)


def least(found: Sequence[Piece]) -> float:
    """Pixels that are enough for every piece."""
    return sum(ITEM if piece.ranges or piece.empty else GAP for piece in found)


def _clustered(shown: list[Piece], size: int, borders: list[int]) -> list[Piece]:
    """Neighbours of one area that together are no larger than `size` made one."""
    found = shown[:1]
    for piece in shown[1:]:
        last = found[-1]
        together = bisect_right(borders, last.start) == bisect_right(borders, piece.start)
        if together and piece.end - last.start <= size:
            found[-1] = Piece(last.start, piece.end, last.first, last.ranges + piece.ranges)
        else:
            found.append(piece)
    return found


def _with_gaps(start: int, end: int, shown: list[Piece], areas: Sequence[Area]) -> list[Piece]:
    found: list[Piece] = []
    at = start
    for piece in [*shown, Piece(end, end)]:
        found += _gap(at, piece.start, areas)
        found += [piece] if piece.ranges else []
        at = max(at, piece.end)
    return found


def _gap(start: int, end: int, areas: Sequence[Area]) -> list[Piece]:
    """A gap; areas with a name that are wholly inside are pieces of their own."""
    found, at = [], start
    for area in areas:
        if area.name and start <= area.start and area.end <= end:
            found += [Piece(at, area.start)] if at < area.start else []
            found.append(Piece(area.start, area.end, empty=True))
            at = area.end
    return found + ([Piece(at, end)] if at < end else [])


def height(piece: Piece, scale: float) -> float:
    """The pixels of a piece with `scale` pixels per byte."""
    size = (piece.end - piece.start) * scale
    if piece.ranges:
        return max(ITEM, size)
    return ITEM if piece.empty else min(max(SLIVER, size), GAP)


def place(found: Sequence[Piece], room: float) -> list[Placed]:
    """The pieces one below the other, filling `room` where there is any range."""
    low, high = 0.0, room / min((p.end - p.start for p in found), default=1)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(height(p, middle) for p in found) > room else (middle, high)
    placed, top = [], 0.0
    for piece in found:
        tall = height(piece, low)
        placed.append(Placed(piece, top, tall, not piece.ranges and (piece.end - piece.start) * low > tall + 0.5))
        top += tall
    return placed
