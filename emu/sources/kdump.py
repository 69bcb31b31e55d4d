"""kdump-compressed files: what makedumpfile writes, and QEMU's dump-guest-memory with a kdump-* format.

A page is found through the file's second bitmap (which pages are there) and a table of page descriptors, one for each
bit that is set. Pages packed with zlib or zstd, and unpacked ones, are read here; lzo and snappy need drgn, whose
wheel brings libkdumpfile (the extra `vmcore`). A "flattened" file (QEMU before 8.2 writes only that) is a list of
pieces, each with its place in the real file.
Sources: makedumpfile's diskdump_mod.h and makedumpfile.h, IMPLEMENTATION; QEMU dump/dump.c.
"""

from __future__ import annotations

import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from emu.sources.errors import SourceError
from emu.sources.ram import PagedMemory, read_at
from emu.sources.vmcoreinfo import VmcoreInfo
from pgtable.memory import PAGE

MAGIC, FLATTENED = b"KDUMP   ", b"makedumpfile\0"
HEADER = struct.Struct("<8si390s6x16xIiiII")  # signature, version, utsname, ..., status, block size, ...
SUB_HEADER = struct.Struct("<32xqQ")  # offset and size of VMCOREINFO
MAX_PFN_64_AT = 96  # in the sub-header, since version 6
DESCRIPTOR = struct.Struct("<qIIQ")  # offset, size, flags, page flags
PIECE = struct.Struct(">qq")  # flattened: offset in the real file, bytes
FLATTENED_HEADER = 4096
ZLIB, LZO, SNAPPY, ZSTD = 1, 2, 4, 0x20
BLOCKS = (4096, 16384, 65536)
MACHINE_AT = 4 * 65  # utsname.machine
LARGEST_TEXT = 1 << 20
LARGEST_BITMAPS = 1 << 30  # bytes of both: 16 TiB of pages of 4 KiB
GROUP = 4096  # bytes of a bitmap that are looked at together
Read = Callable[[int, int], bytes]


@dataclass(frozen=True)
class Kdump:
    """An open dump: its RAM, and the VMCOREINFO that its header points to."""

    memory: PagedMemory
    info: VmcoreInfo | None


def is_kdump(head: bytes) -> bool:
    """Whether a file that begins with `head` is one of these."""
    return head.startswith((MAGIC, FLATTENED))


def open_kdump(path: str, file: int) -> Kdump:
    """The dump `path`, open as `file`. Raises SourceError."""
    flattened = os.pread(file, len(FLATTENED), 0) == FLATTENED
    read = _Pieces(path, file).read if flattened else lambda at, n: read_at(file, n, at)
    dump = _Dump(path, read)
    if dump.needs_library():
        return Kdump(_by_drgn(path, dump), dump.info)
    return Kdump(PagedMemory(dump.page, dump.ranges), dump.info)


class _Pieces:
    """The real file behind a flattened one; of two pieces with the same place the later one counts."""

    def __init__(self, path: str, file: int) -> None:
        self.file = file
        rows: dict[int, tuple[int, int]] = {}
        at = FLATTENED_HEADER
        while True:
            head = read_at(file, PIECE.size, at)
            if len(head) < PIECE.size:
                raise SourceError(f"{path} is a truncated flattened kdump file: its end mark is missing")
            offset, size = PIECE.unpack(head)
            if offset < 0 or size < 0:
                break
            at += PIECE.size
            rows[offset] = at, size
            at += size
        self.starts = sorted(rows)
        self.rows = [rows[start] for start in self.starts]

    def read(self, at: int, n: int) -> bytes:
        """`n` bytes of the real file; zeros where no piece is."""
        out = bytearray()
        while n > 0:
            i = bisect_right(self.starts, at) - 1
            place, size = self.rows[i] if i >= 0 else (0, 0)
            skip = at - self.starts[i] if i >= 0 else 0
            if skip < size:
                part = read_at(self.file, min(n, size - skip), place + skip)
            else:
                following = self.starts[i + 1] - at if i + 1 < len(self.starts) else n
                part = bytes(min(n, following))
            if not part:
                break
            out += part
            at, n = at + len(part), n - len(part)
        return bytes(out)


class _Dump:
    """The tables of one dump, and its pages. `read(offset, n)` reads the file. Raises SourceError."""

    def __init__(self, path: str, read: Read) -> None:
        self.path = path
        self.read = read
        head = read(0, HEADER.size)
        if len(head) < HEADER.size:
            raise self.error("is a truncated kdump file: not even its header is there")
        _, version, names, _, self.block, sub, bitmaps, max_pfn = HEADER.unpack(head)
        machine = names[MACHINE_AT : MACHINE_AT + 65].split(b"\0")[0]
        if machine not in (b"aarch64", b"Unknown", b""):
            raise self.error(f"is a kdump file of another architecture ({machine.decode('latin-1')})")
        if self.block not in BLOCKS or sub < 1 or bitmaps < 1:
            raise self.error("is a damaged kdump file: its header makes no sense")
        second = read(self.block, self.block * min(sub, 4))
        self.info = self._info(second) if len(second) >= SUB_HEADER.size else None
        if version >= 6 and len(second) >= MAX_PFN_64_AT + 8:
            max_pfn = int.from_bytes(second[MAX_PFN_64_AT : MAX_PFN_64_AT + 8], "little") or max_pfn
        self._read_tables(1 + sub, bitmaps, max_pfn)
        self.block_at = lru_cache(64)(self._block)

    def error(self, text: str) -> SourceError:
        """An error about this file."""
        return SourceError(f"{self.path} {text}")

    def _info(self, second: bytes) -> VmcoreInfo | None:
        at, size = SUB_HEADER.unpack_from(second)
        if not 0 < size <= LARGEST_TEXT:
            return None
        return VmcoreInfo.parse(self.read(at, size).decode("latin-1"))

    def _read_tables(self, first: int, bitmaps: int, max_pfn: int) -> None:
        size = bitmaps * self.block
        if size > LARGEST_BITMAPS:
            raise self.error(f"is a damaged kdump file: its header says {size} bytes of bitmaps")
        data = self.read(first * self.block, size)
        if len(data) < size or max_pfn < 1:
            raise self.error("is a truncated kdump file: its bitmaps are not all there")
        self.dumped = np.frombuffer(data, np.uint8)[size // 2 :][: -(-max_pfn // 8)]
        # How many pages are there before each GROUP bytes of the bitmap.
        counts = np.add.reduceat(np.bitwise_count(self.dumped), self._groups, dtype=np.int64)
        self.before = np.cumsum(counts) - counts
        self.descriptors = (first + bitmaps) * self.block
        n = int(counts.sum())
        last = self.read(self.descriptors + (n - 1) * DESCRIPTOR.size, DESCRIPTOR.size) if n else b""
        if len(last) < DESCRIPTOR.size:
            raise self.error("is a truncated kdump file: its page descriptors are not all there")

    @cached_property
    def ranges(self) -> list[tuple[int, int]]:
        """(PA, bytes) of the pages that are there, in order."""
        found: list[tuple[int, int]] = []
        for at in self._groups.tolist():
            group = self.dumped[at : at + GROUP]
            if not group.any():
                continue
            there = np.unpackbits(group, bitorder="little")
            for start, end in (np.flatnonzero(np.diff(there, prepend=0, append=0)).reshape(-1, 2) + 8 * at).tolist():
                if found and sum(found[-1]) == start * self.block:
                    start = found.pop()[0] // self.block
                found.append((start * self.block, (end - start) * self.block))
        return found

    @property
    def _groups(self) -> npt.NDArray[np.int64]:
        return np.arange(0, len(self.dumped), GROUP)

    def _descriptor(self, pfn: int) -> tuple[int, int, int] | None:
        byte, bit = divmod(pfn, 8)
        if byte >= len(self.dumped) or not self.dumped[byte] >> bit & 1:
            return None
        group = byte // GROUP
        number = int(self.before[group]) + int(np.bitwise_count(self.dumped[group * GROUP : byte]).sum(dtype=np.int64))
        number += (int(self.dumped[byte]) & ((1 << bit) - 1)).bit_count()
        data = self.read(self.descriptors + number * DESCRIPTOR.size, DESCRIPTOR.size)
        offset, size, flags, _ = DESCRIPTOR.unpack(data)
        return offset, size, flags

    def needs_library(self) -> bool:
        """Whether the first pages are packed in a way that only drgn reads."""
        base = self.ranges[0][0] // self.block if self.ranges else 0
        found = (self._descriptor(pfn) for pfn in range(base, base + 512))
        return any(row and row[2] & (LZO | SNAPPY) for row in found)

    def page(self, pa: int) -> bytes | None:
        """The 4096 bytes at `pa`; None where the dump has none."""
        block = self.block_at(pa // self.block)
        return None if block is None else block[pa % self.block : pa % self.block + PAGE]

    def _block(self, pfn: int) -> bytes | None:
        row = self._descriptor(pfn)
        if row is None:
            return None
        offset, size, flags = row
        packed = self.read(offset, size)
        if len(packed) < size:
            raise self.error(f"is a truncated kdump file: the page at PA {pfn * self.block:#x} is not there")
        try:
            data = _unpacked(packed, flags)
        except Exception as error:  # each library has its own class for damaged data
            raise self.error(f"is a damaged kdump file: the page at PA {pfn * self.block:#x}: {error}") from None
        if len(data) != self.block:
            raise self.error(f"is a damaged kdump file: the page at PA {pfn * self.block:#x} has {len(data)} bytes")
        return data


def _unpacked(packed: bytes, flags: int) -> bytes:
    if flags & ZLIB:
        return zlib.decompress(packed)
    if flags & ZSTD:
        try:
            from compression.zstd import decompress  # Python 3.14
        except ImportError:
            from backports.zstd import decompress
        return bytes(decompress(packed))
    if flags & (LZO | SNAPPY):
        raise ValueError("it is packed with lzo or snappy, unlike the first ones")
    return packed


def _by_drgn(path: str, dump: _Dump) -> PagedMemory:
    """The same pages, read by drgn."""
    try:
        import drgn
    except ImportError:
        raise dump.error("is packed with lzo or snappy, which drgn reads: pip install 'pgtable[vmcore]'") from None
    program = drgn.Program()
    try:
        program.set_core_dump(path)
    except Exception as error:
        raise dump.error(f"cannot be read by drgn ({error})") from None

    def read(pa: int) -> bytes | None:
        try:
            return bytes(program.read(pa, PAGE, physical=True))
        except drgn.FaultError:
            return None

    return PagedMemory(read, dump.ranges)
