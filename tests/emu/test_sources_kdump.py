"""kdump-compressed files, made here and judged by drgn."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from emu.sources import (
    SourceError,
    open_source,
)
from pgtable import NoMemory
from pgtable.leaves import leaves
from pgtable.memory import PAGE
from tests.emu.dumps import (
    RAM,
    SIZE,
    Guest,
    flattened,
    guest,
    kdump,
    outcome,
    pages_of,
    refused,
    registers_of,
    same,
    write,
)
from tests.kernels import lack


@pytest.fixture(scope="module")
def made() -> Guest:
    return guest()


@pytest.mark.parametrize("flags", [0, 1])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("block", [4096, 16384])
def test_kdump_files_list_as_the_ram(tmp_path: Path, made: Guest, flags: int, flat: bool, block: int) -> None:
    content = kdump(pages_of(made.content, block=block), made.info, flags=flags, block=block)
    name = write(tmp_path / "dump", flattened(content) if flat else content)
    with open_source(name) as source:
        assert source.registers == registers_of(made)
        assert same(leaves(source.memory, registers_of(made)), leaves(made.memory, registers_of(made)))
        assert source.memory.words(RAM, SIZE // 8).tobytes() == made.content
        with pytest.raises(NoMemory):
            source.memory.fetch(RAM - 8)


def test_pages_that_a_kdump_leaves_out_are_no_memory(tmp_path: Path, made: Guest) -> None:
    pages = {pa: page for pa, page in pages_of(made.content).items() if pa // PAGE % 3}
    with open_source(write(tmp_path / "dump", kdump(pages))) as source:
        assert source.registers is None
        for pa in pages_of(made.content):
            assert outcome(lambda: source.memory.words(pa, 512).tobytes()) == pages.get(pa, f"no memory at {pa:#x}")  # noqa: B023


def test_a_kdump_cut_or_damaged_is_one_sentence(tmp_path: Path) -> None:
    rng = random.Random(1)
    content = kdump({pa * PAGE: rng.randbytes(PAGE) for pa in range(30)}, "OSRELEASE=6\n")
    for length in (20, 4000, 5000, 9000, 16384, 16384 + 24 * 29):
        refused(write(tmp_path / "cut", content[:length]), "truncated")
    with (
        open_source(write(tmp_path / "cut", content[:-5000])) as source,
        pytest.raises(SourceError, match="truncated kdump file: the page at PA 0x1d000"),
    ):
        source.memory.fetch(29 * PAGE)
    damaged = content[:-3000] + bytes(3000)
    with (
        open_source(write(tmp_path / "damaged", damaged)) as source,
        pytest.raises(SourceError, match="damaged kdump file"),
    ):
        source.memory.fetch(29 * PAGE)
    flat = flattened(content)
    refused(write(tmp_path / "flat", flat[: len(flat) // 2]), "truncated")


def test_drgn_reads_the_same_pages(tmp_path: Path, made: Guest) -> None:
    """Judge: libkdumpfile, as drgn brings it, on the file that our writer made and our reader reads."""
    try:
        import drgn
    except ImportError:
        lack("drgn", "drgn is not installed")
    name = write(tmp_path / "dump", kdump(pages_of(made.content), made.info))
    program = drgn.Program()
    program.set_core_dump(name)
    with open_source(name) as source:
        for pa in range(RAM, RAM + SIZE, 37 * PAGE):
            assert program.read(pa, PAGE, physical=True) == source.memory.words(pa, PAGE // 8).tobytes()


def test_snappy_pages_are_read_by_drgn_or_named(tmp_path: Path, made: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = dict(list(pages_of(made.content).items())[:64])
    name = write(tmp_path / "dump", kdump(pages, made.info, flags=4))
    try:
        import drgn  # noqa: F401
    except ImportError:
        lack("drgn", "drgn is not installed")
    with open_source(name) as source:
        assert source.memory.words(RAM, 64 * 512).tobytes() == b"".join(pages.values())
    monkeypatch.setitem(sys.modules, "drgn", None)
    refused(name, "lzo or snappy", "pgtable[vmcore]")
