"""Memory in files and by pages, against memory in RAM."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from emu.sources.ram import FileMemory, PagedMemory, Segment, disjoint
from pgtable import PhysicalMemory
from pgtable.memory import PAGE
from tests.emu.dumps import (
    outcome,
    same,
    sparse,
)


def some_memory(rng: random.Random, path: Path) -> tuple[FileMemory, PagedMemory, PhysicalMemory]:
    """The same random content three times: in a file, unaligned there; by pages; in RAM."""
    truth = PhysicalMemory()
    segments: list[Segment] = []
    data = bytearray(rng.randbytes(rng.randrange(1, 16)))
    pa = 0x1000 * rng.randrange(8)
    for _ in range(rng.randrange(1, 6)):
        size = PAGE * rng.randrange(1, 5)
        content = rng.randbytes(size) if rng.random() < 0.8 else None
        truth.add(pa, size)
        if content is None:
            segments.append(Segment(pa, size, 0, None))
        else:
            truth.write(pa, content)
            segments.append(Segment(pa, size, len(data)))
            data += content
        data += rng.randbytes(rng.randrange(9))
        pa += size + PAGE * rng.choice((0, 0, 1, 3))
    path.write_bytes(data)
    file = FileMemory(segments, [os.open(path, os.O_RDONLY)], "test")
    paged = PagedMemory(lambda at: truth.read(at, PAGE) if at in truth else None)
    return file, paged, truth


def test_memory_in_files_reads_as_memory_in_ram(tmp_path: Path, rng: random.Random) -> None:
    for round_number in range(60):
        file, paged, truth = some_memory(rng, tmp_path / f"{round_number}")
        end = truth.regions[-1].base + truth.regions[-1].size
        pas = np.array([8 * rng.randrange((end + 2 * PAGE) // 8) for _ in range(50)], np.uint64)
        bases = pas & np.uint64((1 << 64) - 128)
        for memory in (file, paged):
            assert same(memory.gather(pas), truth.gather(pas))
            assert same(memory.gather(pas.reshape(5, 10)), truth.gather(pas.reshape(5, 10)))
            for n in (16, 512):
                assert same(memory.tables(bases, n), truth.tables(bases, n)), (truth, bases)
            for pa in pas.tolist():
                assert outcome(memory.fetch, pa) == outcome(truth.fetch, pa)
        for pa in pas.tolist():
            n = rng.randrange(1, 1200)
            found = outcome(lambda: paged.words(pa, n).tobytes())  # noqa: B023
            assert outcome(lambda: file.words(pa, n).tobytes()) == found  # noqa: B023
            assert isinstance(found, str) or found == truth.read(pa, 8 * n)
        read = {pa + i: words.tobytes() for pa, words in file.chunks(3 * PAGE) for i in (0,)}
        assert all(truth.read(pa, len(data)) == data for pa, data in read.items())
        assert sum(map(len, read.values())) == sum(s.size for s in file.segments if s.file is not None)
        with pytest.raises(ValueError, match="not 8-byte aligned"):
            file.fetch(4)
        file.close()


def test_the_holes_of_a_file_are_gone_around(tmp_path: Path) -> None:
    path = sparse(tmp_path / "holes", 1 << 30, {PAGE * 5: b"\1" * PAGE, (1 << 30) - PAGE: b"\2" * PAGE})
    memory = FileMemory([Segment(0, 1 << 30, 0)], [os.open(path, os.O_RDONLY)], "holes")
    found = {pa + i * PAGE for pa, words in memory.chunks() for i in np.flatnonzero(words.reshape(-1, 512).any(1))}
    assert found == {PAGE * 5, (1 << 30) - PAGE}
    assert sum(8 * len(words) for _, words in memory.chunks()) < 1 << 20
    memory.close()


def test_of_overlapping_rows_the_first_counts() -> None:
    rows = [Segment(0x3000, 0x3000, 100), Segment(0, 0x4000, 0), Segment(0x1000, 0x1000, 7)]
    assert disjoint(rows) == [Segment(0, 0x4000, 0), Segment(0x4000, 0x2000, 0x1000 + 100)]
