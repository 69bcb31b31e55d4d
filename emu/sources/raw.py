"""Raw dumps: files whose bytes are RAM from a given PA on, as `pmemsave` and `dd` of memory leave them.

The word is `PATH@PA[,PATH@PA...]`; PA is what int(x, 0) reads.
"""

from __future__ import annotations

import os
import stat
from itertools import pairwise

from emu.sources.errors import SourceError
from emu.sources.ram import PHYSICAL, FileMemory, Segment
from pgtable.memory import PAGE

NEEDED = "a raw dump is raw:PATH@PA[,PATH@PA...] (PA: 0x... or decimal)"


def open_raw(text: str) -> FileMemory:
    """The memory that `text` (PATH@PA[,PATH@PA...]) names, mapped. Raises SourceError."""
    parts = [_part(part) for part in text.split(",")]
    files: list[int] = []
    try:
        segments = []
        for number, (path, pa) in enumerate(parts):
            files.append(open_file(path))
            segments.append(_segment(path, files[-1], pa, number))
        _check_overlap(parts, segments)
        return FileMemory(segments, files, text)
    except BaseException:
        for file in files:
            os.close(file)
        raise


def _part(part: str) -> tuple[str, int]:
    path, at, number = part.rpartition("@")
    try:
        pa = int(number, 0) if at and path else -1
    except ValueError:
        pa = -1
    if pa < 0:
        raise SourceError(f"{part!r} does not say where its RAM begins; {NEEDED}")
    return path, pa


def open_file(path: str) -> int:
    """A file descriptor for reading the regular file `path`. Raises SourceError."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise SourceError(f"{path} cannot be read ({getattr(error, 'strerror', error)})") from None
    if stat.S_ISDIR(os.fstat(file).st_mode):
        os.close(file)
        raise SourceError(f"{path} is a directory, a memory dump is needed")
    return file


def _segment(path: str, file: int, pa: int, number: int) -> Segment:
    size = os.fstat(file).st_size
    if not size or size % PAGE or pa % PAGE:
        what = f"begins at {pa:#x}" if pa % PAGE else f"has {size} bytes"
        raise SourceError(f"{path} {what}, which is no whole number of {PAGE}-byte pages: cut short, or no raw dump")
    if pa + size > PHYSICAL:
        raise SourceError(f"{path} would end at PA {pa + size:#x}; physical addresses end at 2^52")
    return Segment(pa, size, 0, number)


def _check_overlap(parts: list[tuple[str, int]], segments: list[Segment]) -> None:
    order = sorted(segments)
    for a, b in pairwise(order):
        if a.pa + a.size > b.pa:
            raise SourceError(f"{parts[b.file or 0][0]} at {b.pa:#x} overlaps {parts[a.file or 0][0]} at {a.pa:#x}")
