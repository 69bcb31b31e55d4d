"""The addresses of one call: in chunks, by half, by region of the VA space; and the sheet that their answers go to.

Rules of this file:
- Addresses are worked on in chunks that stay in the cache; the only arrays as long as the call are its results and,
  where regions lie far apart, the number of each address's region.
- What is distinct is found by marking a table where the values are close enough, not by sorting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pgtable.bits import Words
from pgtable.classes import NO_WORDS, Numbers, Table
from pgtable.memory import WordChanges
from pgtable.params import WalkParams

NONE_STOPPED = (np.zeros(0, np.intp), NO_WORDS)

CHUNK = 1 << 15  # addresses worked on at a time: four arrays of them fit a second-level cache of 1 MiB
FEW = 1 << 11  # addresses that are not worth sorting by region, values that are not worth it by table
DENSE = 8  # with this many addresses per region, finding out which regions are meant costs more than walking all
LONELY = 4  # with fewer addresses than this per region, and regions far apart, each is walked on its own
SPARSE = 1 << 16  # distinct values are found by marking them in a table of at least this size
DIGIT = 1 << 12  # and, where they lie further apart, part by part: this many at a time
_U64 = (1 << 64) - 1


class Bounds(NamedTuple):
    """The lowest and the highest of n VAs."""

    low: int
    high: int
    n: int


class Addresses:
    """The VAs of a call that are in the range of one half, chunk by chunk.

    Those are the ones with all (upper half) or none of the VA bits `mask` set; they are given without a tag. With
    `bounds` (from `untagged_bounds`) it is known that every VA of the call is in its half's range and has no tag.
    """

    def __init__(self, flat: Words, p: WalkParams, mask: int, bounds: Bounds | None = None) -> None:
        self.flat = flat
        self.upper = p.upper
        self.mask = np.uint64(mask)
        self.keep = np.uint64((1 << p.ia_bits if p.mmu_on else 1 << p.features.pa_bits) - 1)
        self.base = np.uint64(p.half_base)
        self.untagged = bounds is not None
        self.bounds = bounds or self._bounds()
        self.everything = self.untagged and self.bounds.n == flat.size

    def _bounds(self) -> Bounds:
        chunks = (self._chosen(start)[0] for start in range(0, self.flat.size, CHUNK))
        found = [Bounds(int(va.min()), int(va.max()), va.size) for va in chunks if va.size]
        if not found:
            return Bounds(0, 0, 0)
        return Bounds(min(b.low for b in found), max(b.high for b in found), sum(b.n for b in found))

    def chunks(self) -> Iterator[tuple[int, Words, slice | Numbers]]:
        """Each chunk's first number among these addresses, the VAs, and their positions in the call."""
        n = 0
        for start in range(0, self.flat.size, CHUNK):
            if self.everything:
                va = self.flat[start : start + CHUNK]
                yield start, va, slice(start, start + va.size)
            else:
                va, where = self._chosen(start)
                if va.size:
                    yield n, va, where
                n += va.size

    def _chosen(self, start: int) -> tuple[Words, Numbers]:
        """The addresses in the chunk from `start` on, and their positions."""
        va = self.flat[start : start + CHUNK]
        if self.untagged:
            signed = va.view(np.int64)
            some = np.flatnonzero(signed < 0 if self.upper else signed >= 0)
            return va.take(some, mode="clip"), some + start
        some = np.flatnonzero(va & self.mask == (self.mask if self.upper else np.uint64(0)))
        return va.take(some, mode="clip") & self.keep | self.base, some + start


def untagged_bounds(flat: Words, halves: tuple[WalkParams, ...]) -> dict[bool, Bounds] | None:
    """The bounds of the VAs of each half (`WalkParams.upper`), if each VA is in the range of one and has no tag."""
    if not flat.size:
        return None
    signed, upper = flat.view(np.int64), int(np.count_nonzero(flat.view(np.int64) < 0))  # the upper half: top bit set
    found = {
        False: Bounds(int(flat.min()), int(signed.max()), flat.size - upper),
        True: Bounds(int(signed.min()) & _U64, int(flat.max()), upper),
    }
    here = {p.upper: found[p.upper] for p in halves}
    inside = [b.n == 0 or _holds(p, b) for p, b in zip(halves, here.values(), strict=True)]
    return here if all(inside) and sum(b.n for b in here.values()) == flat.size else None


def _holds(p: WalkParams, bounds: Bounds) -> bool:
    return p.half_base <= bounds.low and bounds.high - p.half_base < 1 << p.ia_bits


class Sheet:
    """The answers for n addresses, while they are filled in. `refused`: what those that nobody fills in get.

    `pa`: 0 for faults. `number`: of each address's class in `tables`, one after the other; None: all 0. `stopped`:
    positions of faults and the last descriptor read there. `updates`: what hardware changes, with repetitions.
    """

    def __init__(self, n: int, refused: Table | None = None) -> None:
        self.some_refused = refused is not None
        self.pa = np.zeros(n, np.uint64) if self.some_refused else np.empty(n, np.uint64)
        self.ok = np.full(n, not self.some_refused)
        self.number: npt.NDArray[np.int32] | None = None
        self.tables: list[Table] = [] if refused is None else [refused]
        self.stopped: list[tuple[Numbers, Words]] = [NONE_STOPPED]
        self.updates: list[WordChanges] = []

    def put(self, where: slice | Numbers, number: int | Numbers) -> None:
        """Notes classes of the table to come. As long as all are 0 there is no array: its first touch costs."""
        before = sum(len(table) for table in self.tables)
        number = number + before if before else number
        if self.some_refused:
            self.ok[where] = True
        if self.number is None:
            if isinstance(number, int) and number == 0:
                return
            self.number = np.zeros(self.pa.size, np.int32)
        self.number[where] = number

    def stop(self, where: Numbers, words: Words) -> None:
        """Notes faults."""
        self.ok[where] = False
        self.stopped.append((where, words))


# Regions of the VA space, one for each last-level table.


def distinct(keys: Words) -> tuple[Words, Numbers]:
    """The distinct keys in order, and the place of each key among them, without sorting where that can be helped."""
    if keys.size <= FEW:
        return _sorted(keys)
    low, high = int(keys.min()), int(keys.max())
    limit = max(SPARSE, keys.size)
    if high - low < limit:
        return _marked(keys, low, high)
    upper, inverse = distinct(keys // np.uint64(DIGIT))
    if len(upper) * DIGIT > limit:
        return _sorted(keys)
    packed, places = _marked(inverse.astype(np.uint64) * np.uint64(DIGIT) + keys % np.uint64(DIGIT), 0, limit)
    return upper[packed // np.uint64(DIGIT)] * np.uint64(DIGIT) + packed % np.uint64(DIGIT), places


def _sorted(keys: Words) -> tuple[Words, Numbers]:
    found, places = np.unique(keys, return_inverse=True)
    return found, places.reshape(keys.shape)


def _marked(keys: Words, low: int, high: int) -> tuple[Words, Numbers]:
    """`distinct` by a table of all possible keys."""
    place = (keys - np.uint64(low)).view(np.int64)
    lookup, found = _numbered([place], high - low + 1)
    return found.astype(np.uint64) + np.uint64(low), lookup[place]


def _numbered(places: Iterable[npt.NDArray[np.int64]], n: int) -> tuple[Numbers, Numbers]:
    """Which of 0..n-1 occur in `places`: their numbers by value, and the values in order."""
    seen = np.zeros(n, np.bool_)
    for some in places:
        seen[some] = True
    found = np.flatnonzero(seen)
    lookup = np.zeros(n, np.intp)
    lookup[found] = np.arange(len(found))
    return lookup, found


class Index(NamedTuple):
    """Which of the distinct regions `keys` (VA >> shift) each address is in.

    `lookup`: a region's number by key - low; None: that is the number. `inverse`: each address's, where the keys are
    too far apart for a table.
    """

    keys: Words
    shift: int
    low: int
    lookup: Numbers | None = None
    inverse: Numbers | None = None

    @classmethod
    def of(cls, addresses: Addresses, shift: int, dense: bool) -> Index | None:
        """The regions of the addresses; with `dense`, also regions between them where that is quicker.

        None: there are few addresses, or few in each region, and sorting them is not worth it.
        """
        low, high, size = addresses.bounds
        if size <= FEW:
            return None
        low, high = low >> shift, high >> shift
        n = high - low + 1
        if dense and n * DENSE <= size:
            return cls(np.arange(low, high + 1, dtype=np.uint64), shift, low)
        if n <= max(SPARSE, size):
            index = cls(NO_WORDS, shift, low)
            scratch = np.empty(CHUNK, np.uint64)
            lookup, found = _numbered((index.rows(at, va, scratch) for at, va, _ in addresses.chunks()), n)
            return cls(found.astype(np.uint64) + np.uint64(low), shift, low, lookup)
        _, sample, _ = next(addresses.chunks())
        if np.unique(sample >> np.uint64(shift)).size * LONELY > sample.size:
            return None
        keys, inverse = distinct(np.concatenate([va >> np.uint64(shift) for _, va, _ in addresses.chunks()]))
        return cls(keys, shift, low, inverse=inverse)

    def rows(self, start: int, va: Words, scratch: Words) -> npt.NDArray[np.int64]:
        """The regions' numbers for the addresses `va` from position `start` on."""
        if self.inverse is not None:
            return self.inverse[start : start + va.size]
        out = scratch[: va.size]
        np.right_shift(va, self.shift, out=out)
        np.subtract(out, self.low, out=out)
        place = out.view(np.int64)
        return place if self.lookup is None else self.lookup.take(place, mode="clip")
