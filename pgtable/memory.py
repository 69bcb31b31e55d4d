"""Physical memory: RAM regions that numpy, the walkers and Unicorn see at once.

Rules of this file:
- The truth is one page-aligned `mmap` buffer per region, seen as `uint64` words; nothing here keeps a second copy
  except a `Mark`, which is one on purpose.
- `fetch` and `words` are all that a walk needs (`Memory`); both raise `NoMemory`, which only a walk turns into an
  external abort.
- Words are little-endian, as the host's: a big-endian tree (SCTLR.EE = 1) is swapped by the walk, not here.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pgtable.bits import Flags, Words

# A dump may be larger than this host's memory: only what is read or written of it takes any (Linux mmap(2)).
NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)
PAGE = 4096  # RAM regions start and end at multiples of this: the smallest page that Unicorn maps


class NoMemory(LookupError):  # noqa: N818  what happened is the absence, an external abort to a walk
    """There is no RAM at `pa`."""

    def __init__(self, pa: int) -> None:
        super().__init__(f"no memory at PA {pa:#x}")
        self.pa = pa


@runtime_checkable
class Memory(Protocol):
    """What a walk reads: physical memory by 8-byte words at 8-byte aligned addresses."""

    def fetch(self, pa: int) -> int:
        """The 64-bit word at `pa`; raises NoMemory."""
        ...

    def words(self, pa: int, n: int) -> Words:
        """The `n` words from `pa` on, as uint64 of shape (n,); raises NoMemory."""
        ...


class TableMemory(Memory, Protocol):
    """What a listing reads besides: many words and many tables at once."""

    def gather(self, pas: Words) -> tuple[Words, Flags]:
        """The word at each of `pas` (8-byte aligned) and whether there is RAM, in the shape of `pas`."""
        ...

    def tables(self, pas: Words, n: int) -> tuple[Words, Flags]:
        """Tables of `n` words at each of `pas`: uint64 (len(pas), n), and whether each begins in RAM."""
        ...


class Region(NamedTuple):
    """One RAM region: PAs [base, base + size)."""

    base: int
    size: int
    words: Words  # the region's bytes, uint64 of shape (size / 8,)
    raw: memoryview  # the same bytes as unsigned 64-bit ints: reads give int, not a numpy scalar
    buffer: mmap.mmap  # the same bytes as bytes
    private: bool = False  # thawed: a page is its own only once it is written
    file: int = -1  # staged: the file that holds the content

    @property
    def address(self) -> int:
        """Where the buffer is in this process (page-aligned), for an engine that shares it."""
        return int(self.words.ctypes.data)


@dataclass(frozen=True)
class Mark:
    """The words of some PA ranges at one moment."""

    ranges: tuple[tuple[int, int], ...]  # (pa, number of words)
    copies: tuple[Words, ...]

    def same_as(self, other: Mark) -> bool:
        """The same words of the same ranges."""
        return self.ranges == other.ranges and all(
            np.array_equal(a, b) for a, b in zip(self.copies, other.copies, strict=True)
        )


class WordChanges(NamedTuple):
    """Words that differ from a mark, in address order; each array is uint64 of shape (n,)."""

    pa: Words
    old: Words
    new: Words


def difference(before: Mark, after: Mark) -> WordChanges:
    """The words that differ between two marks, in address order; what only `after` has was 0 before."""
    earlier = {pa: copy for (pa, _), copy in zip(before.ranges, before.copies, strict=True)}
    pas, olds, news = [], [], []
    for (pa, n), now in zip(after.ranges, after.copies, strict=True):
        old = earlier.get(pa, _NONE)
        old = old if len(old) == n else np.concatenate((old[:n], np.zeros(n - min(n, len(old)), np.uint64)))
        where = np.flatnonzero(now != old)
        pas.append(where.astype(np.uint64) * np.uint64(8) + np.uint64(pa))
        olds.append(old[where])
        news.append(now[where])
    found = WordChanges(*(_joined(part) for part in (pas, olds, news)))
    if (found.pa[1:] >= found.pa[:-1]).all():
        return found
    order = np.argsort(found.pa, kind="stable")
    return WordChanges(*(part[order] for part in found))


_NONE = np.zeros(0, np.uint64)


class PhysicalMemory:
    """RAM at the given (base, size) pairs, zero-filled. Zero-copy shared with numpy and Unicorn.

    Raises ValueError for a region that is not page-aligned, is empty, overlaps another or lies above 2^56.
    """

    def __init__(self, *regions: tuple[int, int]) -> None:
        self.regions: tuple[Region, ...] = ()
        for base, size in regions:
            self.add(base, size)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, origin: int = 0) -> PhysicalMemory:
        """A raw dump whose first byte is PA `origin`, memory-mapped: changes stay private to this process."""
        size = os.path.getsize(path)
        if not size or size % PAGE:
            raise ValueError(f"{path}: {size} bytes is not a whole number of {PAGE}-byte pages")
        memory = cls()
        with open(path, "rb") as file:
            memory._adopt(origin, mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE | NO_RESERVE))
        return memory

    @classmethod
    def staged(cls, *regions: tuple[int, int]) -> PhysicalMemory:
        """Zero-filled RAM to be filled and then frozen: `freeze` copies nothing. Not to be written after that."""
        memory = cls()
        for base, size in regions:
            memory._check(base, size)
            file = _file(base, size)
            memory._adopt(base, mmap.mmap(file, size), file=file)
        return memory

    @classmethod
    def of_file(cls, path: str | os.PathLike[str], parts: Sequence[tuple[int, int, int]]) -> PhysicalMemory:
        """RAM whose content is in a file, each part (base, size, offset in the file): shared with everybody until it
        is written, as after `Frozen.thaw`. Raises ValueError for offsets that cannot be mapped."""
        memory = cls()
        with open(path, "rb") as file:
            for base, size, offset in parts:
                flags = mmap.MAP_PRIVATE
                memory._adopt(base, mmap.mmap(file.fileno(), size, flags=flags, offset=offset), private=True)
        return memory

    def add(self, base: int, size: int) -> None:
        """Adds zero-filled RAM at PAs [base, base + size)."""
        self._check(base, size)
        self._adopt(base, mmap.mmap(-1, size))

    def _check(self, base: int, size: int) -> None:
        if base % PAGE or size % PAGE or size <= 0:
            raise ValueError(f"RAM at {base:#x}, {size:#x} bytes: both must be multiples of {PAGE:#x}")
        if base < 0 or base + size > 1 << 56:
            raise ValueError(f"RAM at {base:#x}, {size:#x} bytes: physical addresses end at 2^56")
        for region in self.regions:
            if base < region.base + region.size and region.base < base + size:
                raise ValueError(f"RAM at {base:#x}, {size:#x} bytes overlaps the region at {region.base:#x}")

    def _adopt(self, base: int, buffer: mmap.mmap, *, private: bool = False, file: int = -1) -> None:
        self._check(base, len(buffer))
        region = Region(
            base, len(buffer), np.frombuffer(buffer, np.uint64), memoryview(buffer).cast("Q"), buffer, private, file
        )
        self.regions = tuple(sorted((*self.regions, region), key=lambda r: r.base))
        self._bases = [r.base for r in self.regions]

    def freeze(self) -> Frozen:
        """The content of all RAM now, for any number of `Frozen.thaw()` copies that cost nothing until written."""
        return Frozen(tuple(_saved(region) for region in self.regions))

    def region_of(self, pa: int) -> Region:
        """The region that holds `pa`; raises NoMemory."""
        i = bisect_right(self._bases, pa) - 1 if self.regions else -1
        if i < 0 or pa >= self.regions[i].base + self.regions[i].size:
            raise NoMemory(pa)
        return self.regions[i]

    def __contains__(self, pa: int) -> bool:
        try:
            self.region_of(pa)
        except NoMemory:
            return False
        return True

    def fetch(self, pa: int) -> int:
        """The 64-bit word at `pa`; raises NoMemory, or ValueError for an unaligned `pa`."""
        for base, size, _, raw, *_ in self.regions:
            if base <= pa < base + size:
                if pa & 7:
                    raise ValueError(f"PA {pa:#x} is not 8-byte aligned")
                word: int = raw[(pa - base) >> 3]
                return word
        raise NoMemory(pa)

    def store(self, pa: int, word: int) -> None:
        """Writes the 64-bit word at `pa`; raises NoMemory, or ValueError for an unaligned `pa`."""
        region = self.region_of(pa)
        if pa & 7:
            raise ValueError(f"PA {pa:#x} is not 8-byte aligned")
        region.raw[(pa - region.base) >> 3] = word

    def words(self, pa: int, n: int) -> Words:
        """The `n` words from `pa` on as a view: writes to it are writes to memory. Raises NoMemory."""
        region = self.region_of(pa)
        if pa & 7:
            raise ValueError(f"PA {pa:#x} is not 8-byte aligned")
        start = (pa - region.base) >> 3
        if start + n > len(region.words):
            raise NoMemory(region.base + region.size)
        return region.words[start : start + n]

    def tables(self, pas: Words, n: int) -> tuple[Words, Flags]:
        """Tables of `n` words at each of `pas` (8-byte aligned): uint64 of shape (len(pas), n), and bool of shape
        (len(pas),), False where the table does not begin in RAM. Words outside RAM are 0. To be read: tables that
        follow one another are a view of the memory."""
        for region in self.regions:
            rows = _rows_of(region, pas, n)
            if rows is not None:
                return rows, np.ones(len(pas), np.bool_)
        out = np.zeros((len(pas), n), np.uint64)
        there = np.zeros(len(pas), np.bool_)
        index = np.arange(n)
        for base, size, words, *_ in self.regions:
            offset = pas - np.uint64(base)  # wraps far above `size` below the base
            inside = offset <= np.uint64(size - 8 * n) if size >= 8 * n else np.zeros_like(there)
            if inside.any():
                start = (offset[inside] >> np.uint64(3)).astype(np.int64)
                out[inside] = words[start[:, None] + index]
                there |= inside
        for row in np.flatnonzero(~there & self.gather(pas)[1]):  # tables that leave their region
            out[row] = self.gather(pas[row] + index.astype(np.uint64) * np.uint64(8))[0]
            there[row] = True
        return out, there

    def gather(self, pas: Words) -> tuple[Words, Flags]:
        """The word at each of `pas` (8-byte aligned) and whether there is RAM, in the shape of `pas`."""
        out = np.zeros(pas.shape, np.uint64)
        there = np.zeros(pas.shape, np.bool_)
        for base, size, words, *_ in self.regions:
            offset = pas - np.uint64(base)  # wraps far above `size` below the base
            inside = offset < np.uint64(size)
            out[inside] = words[(offset[inside] >> np.uint64(3)).astype(np.int64)]
            there |= inside
        return out, there

    def read(self, pa: int, n: int) -> bytes:
        """`n` bytes from `pa` on, across adjacent regions; raises NoMemory at the first missing byte."""
        return b"".join(bytes(part) for part in self._parts(pa, n))

    def write(self, pa: int, data: bytes | memoryview) -> None:
        """Writes bytes from `pa` on; raises NoMemory, with nothing written, if a part has no RAM."""
        done = 0
        for part in list(self._parts(pa, len(data))):
            part[:] = data[done : done + len(part)]
            done += len(part)

    def _parts(self, pa: int, n: int) -> Iterator[memoryview]:
        while n > 0:
            region = self.region_of(pa)
            start = pa - region.base
            size = min(n, region.size - start)
            yield memoryview(region.buffer)[start : start + size]
            pa, n = pa + size, n - size

    def written(self) -> Pages:
        """The pages written since `thaw`. Raises ValueError for memory that was not thawed."""
        parts = tuple(self._written(region) for region in self.regions)
        gaps = (_gaps(numbers, r.size) for (numbers, _), r in zip(parts, self.regions, strict=True))
        return Pages(parts, tuple(gaps))

    def _written(self, region: Region) -> tuple[npt.NDArray[np.int64], Words]:
        if not region.private:
            raise ValueError(f"RAM at {region.base:#x} was not thawed from a frozen content")
        numbers = _private_pages(region)
        return numbers, region.words.reshape(-1, PAGE // 8)[numbers]

    def rewind(self, pages: Pages | None = None) -> None:
        """Back to the content thawed, with `pages` (from `written`) put on top. Views and addresses stay valid."""
        for i, region in enumerate(self.regions):
            if not region.private:
                raise ValueError(f"RAM at {region.base:#x} was not thawed from a frozen content")
            for start, size in pages.gaps[i] if pages else ((0, region.size),):
                region.buffer.madvise(mmap.MADV_DONTNEED, start, size)
            if pages:
                numbers, words = pages.parts[i]
                region.words.reshape(-1, PAGE // 8)[numbers] = words

    def mark(self, ranges: Sequence[tuple[int, int]] | None = None) -> Mark:
        """Copies the words of PA ranges (pa, bytes), by default all RAM, for `changes`."""
        spans = [(r.base, r.size) for r in self.regions] if ranges is None else ranges
        words = tuple((pa, size // 8) for pa, size in spans)
        return Mark(words, tuple(self.words(pa, n).copy() for pa, n in words))

    def changes(self, since: Mark) -> WordChanges:
        """The words of a mark's ranges that are different now, in address order."""
        return difference(since, Mark(since.ranges, tuple(self.words(pa, n) for pa, n in since.ranges)))

    def restore(self, mark: Mark) -> None:
        """Puts a mark's words back."""
        for (pa, n), copy in zip(mark.ranges, mark.copies, strict=True):
            self.words(pa, n)[:] = copy

    def __repr__(self) -> str:
        parts = ", ".join(f"({r.base:#x}, {r.size:#x})" for r in self.regions)
        return f"PhysicalMemory({parts})"


class Frozen(NamedTuple):
    """RAM content kept in unlinked files: (base, size, file descriptor) of each region."""

    regions: tuple[tuple[int, int, int], ...]

    def thaw(self) -> PhysicalMemory:
        """RAM with this content, shared with every other copy until it is written (copy on write)."""
        memory = PhysicalMemory()
        for base, size, file in self.regions:
            memory._adopt(base, mmap.mmap(file, size, flags=mmap.MAP_PRIVATE), private=True)
        return memory

    def close(self) -> None:
        """Gives the files back; copies that were thawed stay."""
        for _, _, file in self.regions:
            os.close(file)


# /proc/self/pagemap, one 64-bit word a page (Linux Documentation/admin-guide/mm/pagemap.rst).
_PRESENT, _SWAPPED, _FILE_OR_SHARED = 1 << 63, 1 << 62, 1 << 61


def _private_pages(region: Region) -> npt.NDArray[np.int64]:
    """The numbers of the region's pages that are copies of its own."""
    host_page = mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        words = np.frombuffer(
            os.pread(file.fileno(), region.size // host_page * 8, region.address // host_page * 8), np.uint64
        )
    own = (words & np.uint64(_PRESENT | _SWAPPED) != 0) & (words & np.uint64(_FILE_OR_SHARED) == 0)
    return np.flatnonzero(np.repeat(own, host_page // PAGE))


def _rows_of(region: Region, pas: Words, n: int) -> Words | None:
    """Tables of `n` words that are all in `region`, each at a multiple of its size there; None for others."""
    if not len(pas):
        return None
    number, rest = np.divmod(pas - np.uint64(region.base), np.uint64(8 * n))
    count = region.size // (8 * n)
    if rest.any() or int(number.max()) >= count:
        return None
    tables = region.words[: count * n].reshape(count, n)
    first = int(number[0])
    if (number == np.arange(first, first + len(pas), dtype=np.uint64)).all():
        return tables[first : first + len(pas)]
    return tables[number.astype(np.int64)]


def _file(base: int, size: int) -> int:
    file = os.memfd_create(f"ram-{base:x}")
    os.truncate(file, size)
    return file


def _saved(region: Region) -> tuple[int, int, int]:
    """A region's content in an anonymous file; pages of zeros stay holes in it."""
    if region.file >= 0:
        return region.base, region.size, region.file
    file = _file(region.base, region.size)
    pages = region.words.reshape(-1, PAGE // 8)
    used = np.flatnonzero(pages.any(axis=1))
    for run in np.split(used, np.flatnonzero(np.diff(used) != 1) + 1) if len(used) else []:
        os.pwrite(file, pages[run[0] : run[-1] + 1].tobytes(), int(run[0]) * PAGE)
    return region.base, region.size, file


class Pages(NamedTuple):
    """Pages written since a thaw: for each region, their numbers (int64) and their words (uint64, a row a page).

    `gaps`: for each region, where there are none: (offset, bytes), whole pages of the host. A page that is written over
    need not be dropped before, which would make it a copy of the file's once more.
    """

    parts: tuple[tuple[npt.NDArray[np.int64], Words], ...]
    gaps: tuple[tuple[tuple[int, int], ...], ...]


def _gaps(numbers: npt.NDArray[np.int64], size: int) -> tuple[tuple[int, int], ...]:
    """What is between pages, as (offset, bytes), in whole pages of the host."""
    host = mmap.PAGESIZE
    own = np.unique(numbers * PAGE // host)
    starts, ends = np.append(0, own + 1) * host, np.append(own * host, size)
    return tuple((int(a), int(b - a)) for a, b in zip(starts, ends, strict=True) if a < b)


def _joined(parts: list[Words]) -> Words:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)
