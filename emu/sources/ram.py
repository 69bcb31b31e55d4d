"""Physical memory that lies in files or behind a connection, read where it is asked for.

Rules of this file:
- Nothing is copied when a source is opened. `FileMemory` maps its files (read only, so that a file larger than RAM is
  no promise of RAM); `PagedMemory` fetches 4 KiB pages through a function and keeps them.
- Both are `TableMemory`, that is `Memory` with the `gather` and `tables` that pgtable's listings want.
- `chunks` is for whoever looks at everything once: it goes around the holes of a sparse file and does not go through
  the map, so that a scan does not fill this process.
"""

from __future__ import annotations

import errno
import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from emu.sources.errors import SourceError
from pgtable.bits import Flags, Words
from pgtable.memory import PAGE, NoMemory, PhysicalMemory, TableMemory

CHUNK = 16 << 20
WORD = 8
PHYSICAL = 1 << 52  # physical addresses end here

Numbers = npt.NDArray[np.int64]


class Scannable(TableMemory, Protocol):
    """Memory that can be looked at as a whole."""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(PA, bytes) of what is there, in order."""
        ...

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[int, Words]]:
        """(PA, words) of everything, whole 4 KiB pages, at most `size` bytes at a time."""
        ...


def scannable(memory: TableMemory) -> Scannable:
    """`memory`, or what makes it so. Raises SourceError for memory that cannot be looked at as a whole."""
    if isinstance(memory, PhysicalMemory):
        return _Resident(memory)
    if isinstance(memory, FileMemory | PagedMemory):
        return memory
    raise SourceError(f"a {type(memory).__name__} cannot be searched")


class _Resident:
    """RAM of this process, as Scannable."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self.memory = memory
        self.fetch, self.words = memory.fetch, memory.words
        self.gather, self.tables = memory.gather, memory.tables

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return [(region.base, region.size) for region in self.memory.regions]

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[int, Words]]:
        for region in self.memory.regions:
            for at in range(0, region.size, size):
                yield region.base + at, region.words[at // WORD : (at + size) // WORD]


class Segment(NamedTuple):
    """PAs [pa, pa + size) are the bytes of file number `file` from `offset` on; zeros where `file` is None."""

    pa: int
    size: int
    offset: int
    file: int | None = 0


def disjoint(segments: Iterable[Segment]) -> list[Segment]:
    """Sorted by PA, empty ones left out; where two overlap, the one that starts first has the common part."""
    found: list[Segment] = []
    end = 0
    for pa, size, offset, file in sorted(segments, key=lambda s: (s.pa, -s.size)):
        cut = max(end - pa, 0)
        if size > cut:
            found.append(Segment(pa + cut, size - cut, offset + cut, file))
            end = pa + size
    return found


class FileMemory:
    """RAM in files. `segments` (disjoint) say where; the `files` are open for reading and are closed by `close`.

    Raises SourceError for a file that cannot be mapped.
    """

    def __init__(self, segments: Iterable[Segment], files: Sequence[int], name: str) -> None:
        self.segments = disjoint(segments)
        self.files = tuple(files)
        self._maps = [_map(file, name) for file in files]
        self._starts = [s.pa for s in self.segments]
        self._views: dict[tuple[int, int], Words] = {}

    def close(self) -> None:
        """Gives the files back; arrays that came out stay."""
        for file in self.files:
            os.close(file)
        self.files = ()

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(PA, bytes) of what is there, in order."""
        return [(s.pa, s.size) for s in self.segments]

    def _segment(self, pa: int) -> Segment:
        i = bisect_right(self._starts, pa) - 1
        if i < 0 or pa >= self.segments[i].pa + self.segments[i].size:
            raise NoMemory(pa)
        return self.segments[i]

    def fetch(self, pa: int) -> int:
        """The 64-bit word at `pa`; raises NoMemory, or ValueError for an unaligned `pa`."""
        if pa % WORD:
            raise ValueError(f"PA {pa:#x} is not 8-byte aligned")
        segment = self._segment(pa)
        start = pa - segment.pa + segment.offset
        if segment.file is None:
            return 0
        if pa + WORD > segment.pa + segment.size:
            raise NoMemory(segment.pa + segment.size)
        return int.from_bytes(self._maps[segment.file][start : start + WORD], "little")

    def words(self, pa: int, n: int) -> Words:
        """The `n` words from `pa` on, read-only, across adjacent segments; raises NoMemory at the first missing one."""
        if pa % WORD:
            raise ValueError(f"PA {pa:#x} is not 8-byte aligned")
        parts: list[Words] = []
        while n > 0:
            segment = self._segment(pa)
            size = min(n, (segment.pa + segment.size - pa) // WORD)
            if not size:
                raise NoMemory(segment.pa + segment.size)
            parts.append(self._part(segment, pa, size))
            pa, n = pa + WORD * size, n - size
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.uint64), *parts])

    def _part(self, segment: Segment, pa: int, n: int) -> Words:
        if segment.file is None:
            return np.zeros(n, np.uint64)
        return np.frombuffer(self._maps[segment.file], np.uint64, n, pa - segment.pa + segment.offset)

    def gather(self, pas: Words) -> tuple[Words, Flags]:
        """The word at each of `pas` (8-byte aligned) and whether there is RAM, in the shape of `pas`."""
        row, offset = self._located(pas)
        out = np.zeros(pas.shape, np.uint64)
        there = self._holds(row, offset, WORD)
        self._read(row, offset, there, out, np.zeros(1, np.int64))
        return out, there

    def tables(self, pas: Words, n: int) -> tuple[Words, Flags]:
        """Tables of `n` words at each of `pas`, as `PhysicalMemory.tables`: words outside RAM are 0."""
        row, offset = self._located(pas)
        out = np.zeros((len(pas), n), np.uint64)
        there = self._holds(row, offset, WORD)
        whole = self._holds(row, offset, WORD * n)
        self._read(row, offset, whole, out, np.arange(n))
        for i in np.flatnonzero(there & ~whole):  # tables that leave their segment
            out[i] = self.gather(pas[i] + np.arange(n, dtype=np.uint64) * np.uint64(WORD))[0]
        return out, there

    @cached_property
    def _sizes(self) -> Words:
        return np.array([s.size for s in self.segments] or [0], np.uint64)

    @cached_property
    def _bases(self) -> Words:
        return np.array(self._starts or [0], np.uint64)

    def _located(self, pas: Words) -> tuple[Numbers, Words]:
        """The segment of each PA, and how far behind its start; far above its size where there is none."""
        row = np.maximum(np.searchsorted(self._bases, pas, side="right") - 1, 0)
        return row, pas - self._bases[row]

    def _holds(self, row: Numbers, offset: Words, size: int) -> Flags:
        """Where a segment has `size` bytes from `offset` on; an offset of what lies before it is huge."""
        left = self._sizes[row] - offset
        return np.asarray((offset < self._sizes[row]) & (left >= np.uint64(size)))

    def _read(self, row: Numbers, offset: Words, wanted: Flags, out: Words, index: Numbers) -> None:
        for i in np.unique(row[wanted]).tolist():
            segment = self.segments[i]
            if segment.file is not None:
                here = wanted & (row == i)
                view = self._view(segment.file, segment.offset % WORD)
                start = (offset[here] >> np.uint64(3)).astype(np.int64) + segment.offset // WORD
                out[here] = view[start[:, None] + index] if out.ndim > offset.ndim else view[start]

    def _view(self, file: int, phase: int) -> Words:
        """A file's words from byte `phase` on: segments need not be aligned in it."""
        key = file, phase
        if key not in self._views:
            buffer = self._maps[file]
            self._views[key] = np.frombuffer(buffer, np.uint64, (len(buffer) - phase) // WORD, phase)
        return self._views[key]

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[int, Words]]:
        """(PA, words) of everything that is not a hole, 4 KiB pages of it, at most `size` bytes at a time."""
        for segment in self.segments:
            if segment.file is None:
                continue
            lead = -segment.pa % PAGE
            start, end = segment.offset + lead, segment.offset + segment.size
            for at, n in _data(self.files[segment.file], start, end, size):
                data = os.pread(self.files[segment.file], n, at)
                yield at - segment.offset + segment.pa, np.frombuffer(data[: len(data) & -PAGE], np.uint64)


def read_at(file: int, n: int, at: int) -> bytes:
    """`n` bytes of a file from `at` on, fewer where it ends first: what a header says costs no memory."""
    there = os.fstat(file).st_size - at
    return os.pread(file, min(n, there), at) if n > 0 and at >= 0 and there > 0 else b""


def _map(file: int, name: str) -> mmap.mmap:
    try:
        return mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise SourceError(f"{name} cannot be mapped ({error})") from None


def _data(file: int, start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the parts of [start, end) that are no holes, whole pages counted from `start`."""
    at = start
    while end - at >= PAGE:
        at += (_seek(file, at, os.SEEK_DATA, end) - at) & -PAGE
        stop = min(at + ((_seek(file, at, os.SEEK_HOLE, end) - at + PAGE - 1) & -PAGE), end)
        for piece in range(at, stop, size):
            yield piece, min(size, stop - piece)
        at = max(stop, at + PAGE)


def _seek(file: int, at: int, what: int, end: int) -> int:
    """Where the next data or hole begins; `end` where there is none before it."""
    try:
        return min(os.lseek(file, at, what), end)
    except OSError as error:
        if error.errno == errno.ENXIO:  # only a hole follows
            return end
        return at if what == os.SEEK_DATA else end  # a file system without holes


class PagedMemory:
    """RAM that `read(pa) -> 4096 bytes` gives page by page, None where there is none; `ranges` are its bounds.

    Pages are kept until `forget`.
    """

    def __init__(self, read: Callable[[int], bytes | None], ranges: Sequence[tuple[int, int]] = ()) -> None:
        self._read = read
        self.ranges = list(ranges)
        self.kept: dict[int, Words | None] = {}

    def close(self) -> None:
        """Forgets the pages."""
        self.forget()

    def forget(self) -> None:
        """Drops the pages kept."""
        self.kept.clear()

    def page(self, pa: int) -> Words | None:
        """The words of the page at `pa` (a multiple of 4096); None where there is no RAM."""
        if pa not in self.kept:
            data = self._read(pa) if not self.ranges or any(b <= pa < b + n for b, n in self.ranges) else None
            self.kept[pa] = None if data is None else np.frombuffer(data, np.uint64)
        return self.kept[pa]

    def _there(self, pa: int) -> Words:
        if pa % WORD:
            raise ValueError(f"PA {pa:#x} is not 8-byte aligned")
        page = self.page(pa & -PAGE)
        if page is None:
            raise NoMemory(pa)
        return page

    def fetch(self, pa: int) -> int:
        """The 64-bit word at `pa`; raises NoMemory, or ValueError for an unaligned `pa`."""
        return int(self._there(pa)[pa % PAGE // WORD])

    def words(self, pa: int, n: int) -> Words:
        """The `n` words from `pa` on; raises NoMemory at the first missing one."""
        parts: list[Words] = [np.zeros(0, np.uint64)]
        while n > 0:
            start = pa % PAGE // WORD
            parts.append(self._there(pa)[start : start + n])
            pa, n = pa + WORD * len(parts[-1]), n - len(parts[-1])
        return np.concatenate(parts)

    def gather(self, pas: Words) -> tuple[Words, Flags]:
        """The word at each of `pas` (8-byte aligned) and whether there is RAM, in the shape of `pas`."""
        numbers, inverse = np.unique(pas.ravel() // np.uint64(PAGE), return_inverse=True)
        pages = [self.page(number * PAGE) for number in numbers.tolist()]
        nothing = np.zeros(PAGE // WORD, np.uint64)
        words = np.stack([nothing if page is None else page for page in pages]) if pages else nothing[None]
        there = np.array([page is not None for page in pages], np.bool_)
        start = (pas.ravel() % np.uint64(PAGE) // np.uint64(WORD)).astype(np.int64)
        return words[inverse, start].reshape(pas.shape), there[inverse].reshape(pas.shape)

    def tables(self, pas: Words, n: int) -> tuple[Words, Flags]:
        """Tables of `n` words at each of `pas`, as `PhysicalMemory.tables`: words outside RAM are 0."""
        there = self.gather(pas)[1]
        out = self.gather(pas[:, None] + np.arange(n, dtype=np.uint64) * np.uint64(WORD))[0]
        out[~there] = 0  # a table that does not begin in RAM is not there
        return out, there

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[int, Words]]:
        """(PA, words) of everything in `ranges`, page by page; nothing is kept."""
        for base, length in self.ranges:
            for pa in range(-(-base // PAGE) * PAGE, base + length - PAGE + 1, PAGE):
                data = self._read(pa)
                if data is not None:
                    yield pa, np.frombuffer(data, np.uint64)
