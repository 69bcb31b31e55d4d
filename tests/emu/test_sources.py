"""Sources: the word, raw dumps, ELF cores, kdump files, VMCOREINFO, registers; all on small files made here."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emu.sources import (
    SourceError,
    found_registers,
    open_source,
    overridden,
    parse_register,
    parse_registers,
    read_registers,
)
from emu.sources.ram import FileMemory, PagedMemory, Segment, disjoint
from emu.sources.vmcoreinfo import VmcoreInfo
from pgtable import NoMemory, PhysicalMemory, Registers, translate, translate_many
from pgtable.leaves import leaves, tables
from pgtable.memory import PAGE
from tests.emu.dumps import (
    RAM,
    SIZE,
    Guest,
    Load,
    elf_core,
    flattened,
    guest,
    kdump,
    note,
    pages_of,
    prstatus,
    registers_of,
    same,
    sparse,
)
from tests.kernels import lack


@pytest.fixture(scope="module")
def made() -> Guest:
    return guest()


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def refused(word: str, *says: str) -> str:
    """The one sentence that opening `word` ends in."""
    with pytest.raises(SourceError) as error:
        open_source(word)
    text = str(error.value)
    assert "\n" not in text
    for part in says:
        assert part in text, text
    return text


# ---- raw dumps


def test_a_raw_dump_lists_as_the_memory_that_it_was(tmp_path: Path, made: Guest) -> None:
    name = write(tmp_path / "ram", made.content)
    with open_source(f"raw:{name}@{RAM:#x}", given=["TTBR1_EL1=0"]) as source:
        assert source.registers is not None
        regs = registers_of(made)
        assert same(leaves(source.memory, regs), leaves(made.memory, regs))
        assert same(tables(source.memory, regs), tables(made.memory, regs))
        va = made.linear + 0x123458
        assert translate(source.memory, regs, va).pa == RAM + 0x123458
        many = translate_many(source.memory, regs, made.linear + np.arange(0, SIZE, PAGE, dtype=np.uint64))
        assert many.ok.all()


def test_several_files_are_one_memory(tmp_path: Path, made: Guest) -> None:
    half = SIZE // 2
    low = write(tmp_path / "low", made.content[:half])
    high = write(tmp_path / "high@2", made.content[half:])
    with open_source(f"raw:{high}@{RAM + half},{low}@{RAM:#x}") as source:
        assert source.memory.words(RAM + half - 8, 2).tobytes() == made.content[half - 8 : half + 8]
        assert source.registers is None


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("raw:/no/such@0x0", "cannot be read"),
        ("raw:file", "raw:PATH@PA"),
        ("raw:file@", "raw:PATH@PA"),
        ("raw:@0x1000", "raw:PATH@PA"),
        ("raw:file@-4096", "raw:PATH@PA"),
        ("raw:{file}@0x40000001", "whole number"),
        ("raw:{odd}@0", "cut short"),
        ("raw:{empty}@0", "0 bytes"),
        ("raw:{file}@0,{file}@0x1000", "overlaps"),
        ("raw:{file}@0xffffffffff000", "2^52"),
        ("raw:{folder}@0", "directory"),
    ],
)
def test_raw_dumps_that_cannot_be(tmp_path: Path, word: str, says: str) -> None:
    names = {
        "file": write(tmp_path / "file", bytes(2 * PAGE)),
        "odd": write(tmp_path / "odd", bytes(PAGE + 5)),
        "empty": write(tmp_path / "empty", b""),
        "folder": str(tmp_path),
    }
    refused(word.format(**names), says)


def test_64_gib_open_and_walk_in_milliseconds_and_little_memory(tmp_path: Path, made: Guest) -> None:
    size = 64 << 30
    for core in (False, True):
        head = elf_core([Load(RAM, b"", memsz=0)]) if core else b""
        parts = {len(head): made.content, len(head) + size - PAGE: bytes([7]) * PAGE}
        if core:  # the row's sizes say 64 GiB
            row = 64 + 56
            head = head[: row + 32] + size.to_bytes(8, "little") * 2 + head[row + 48 :]
            parts[0] = head
        path = sparse(tmp_path / f"big{core}", size + len(head), parts)
        word = str(path) if core else f"raw:{path}@{RAM:#x}"
        code = f"""
import resource, time
from emu.sources import open_source, found_registers
import emu.sources.elfcore, emu.sources.raw, emu.sources.find
from pgtable.leaves import leaves
rss = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() >> 20
before, start = rss(), time.perf_counter()
source = open_source({word!r})
opened = time.perf_counter() - start
regs = found_registers(source)
n = len(leaves(source.memory, regs).va)
assert source.memory.fetch({RAM + size - 8:#x}) == 0x0707070707070707
print(opened, n, rss() - before)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        opened, n, grown = done.stdout.split()
        assert float(opened) < 0.1
        assert int(n) == len(leaves(made.memory, registers_of(made)).va)
        assert int(grown) < 200
        os.unlink(path)


# ---- memory in files, against memory in RAM


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


def outcome(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except NoMemory as error:
        return f"no memory at {error.pa:#x}"


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


# ---- ELF cores


def test_an_elf_core_lists_as_its_ram_wherever_it_lies_in_the_file(tmp_path: Path, made: Guest) -> None:
    regs = registers_of(made)
    for lead in (0, 3, 8):
        notes = prstatus(range(34)) + prstatus([9] * 34)
        core = elf_core([Load(RAM + SIZE // 2, made.content[SIZE // 2 :]), Load(RAM, made.content[: SIZE // 2])], notes)
        name = write(tmp_path / f"a{lead}.vmlinuz", core)
        with open_source(name) as source:
            assert source.kind == "ELF core"
            assert source.registers is None
            assert [cpu["X30"] for cpu in source.cpus] == [30, 9]
            assert source.cpus[0]["PSTATE"] == 33
            assert same(leaves(source.memory, regs), leaves(made.memory, regs))


def test_the_vmcoreinfo_note_gives_registers_and_symbols(tmp_path: Path, made: Guest) -> None:
    name = write(tmp_path / "core", elf_core([Load(RAM, made.content)], note("VMCOREINFO", 0, made.info.encode())))
    with open_source(name) as source:
        assert source.registers == registers_of(made)
        assert source.origin == "the VMCOREINFO note of 6.99.0-test"
        assert source.symbols["_stext"] == 0xFFFF_8000_8000_0000
        assert translate(source.memory, source.registers, made.linear + 8).pa == RAM + 8
    with open_source(name, given=["SCTLR_EL1=0x80001"]) as source:
        assert source.registers == registers_of(made).replace(SCTLR_EL1=0x80001)
        assert "command line" in source.origin


def test_a_kcore_is_placed_by_its_physical_addresses_or_by_the_linear_map(tmp_path: Path, made: Guest) -> None:
    image = 0xFFFF_8000_8000_0000
    rows = [  # the image's row repeats RAM that the linear map has, the last one is vmalloc
        (RAM, made.linear, made.content),
        (RAM, image, made.content[: 1 << 20]),
        ((1 << 64) - 1, 0xFFFF_8000_9000_0000, b"\xff" * PAGE),
    ]
    notes = note("VMCOREINFO", 0, made.info.encode())
    for number, old in enumerate((False, True)):
        loads = [Load(0 if old else pa, content, va) for pa, va, content in rows]
        with open_source(write(tmp_path / f"kcore{number}", elf_core(loads, notes))) as source:
            assert source.registers is not None
            assert same(leaves(source.memory, source.registers), leaves(made.memory, registers_of(made)))
            with pytest.raises(NoMemory):
                source.memory.fetch(RAM + SIZE)
    old_rows = [Load(0, content, va) for _, va, content in rows]
    refused(write(tmp_path / "without", elf_core(old_rows)), "only virtual addresses and no VMCOREINFO")


def test_what_a_core_leaves_out_of_its_file_is_zeros(tmp_path: Path) -> None:
    name = write(tmp_path / "core", elf_core([Load(RAM, b"\1" * PAGE, memsz=3 * PAGE)]))
    with open_source(name) as source:
        assert source.memory.fetch(RAM) == 0x0101010101010101
        assert source.memory.words(RAM + PAGE - 8, 2).tolist() == [0x0101010101010101, 0]
        assert source.memory.tables(np.array([RAM + PAGE], np.uint64), 512)[1].all()
        with pytest.raises(NoMemory):
            source.memory.fetch(RAM + 3 * PAGE)


def test_a_core_cut_anywhere_is_one_sentence(tmp_path: Path, made: Guest) -> None:
    whole = elf_core([Load(RAM, made.content[: 8 * PAGE])], note("VMCOREINFO", 0, made.info.encode()))
    for length in [*range(20, 64), *range(64, 400, 7), 600, 2000, len(whole) - PAGE, len(whole) - 1]:
        refused(write(tmp_path / "cut", whole[:length]), "cut")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (elf_core([Load(0, bytes(PAGE))], machine=62), "another architecture"),
        (b"\x7fELF\1\1\1".ljust(16, b"\0") + b"\4\0" + bytes(100), "32-bit"),
        (elf_core([]), "no memory at all"),
        (elf_core([Load(RAM, bytes(PAGE))], b"\1\0\0\0\xff\xff\0\0\1\0\0\0"), "damaged"),
        (b"just some text" * 100, "kernel"),
        (b"KDUMP   " + bytes(20), "truncated"),
        (b"KDUMP   " + bytes(10000), "makes no sense"),
        (kdump({0: bytes(PAGE)}, machine="x86_64"), "another architecture"),
        (b"makedumpfile\0" + bytes(5000), "truncated"),
        (b"pgtable snapshot" + bytes(100), "version 0"),
    ],
)
def test_foreign_files_are_one_sentence(tmp_path: Path, content: bytes, says: str) -> None:
    refused(write(tmp_path / "foreign", content), "foreign", says)


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    refused(str(tmp_path / "none"), "cannot be read")
    refused(str(tmp_path), "directory")


# ---- kdump-compressed


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


# ---- VMCOREINFO and found registers


@pytest.mark.parametrize(("page", "va_bits"), [(4096, 48), (4096, 39), (4096, 52), (16384, 47), (65536, 48)])
def test_vmcoreinfo_in_ram_gives_registers_for_every_granule(tmp_path: Path, page: int, va_bits: int) -> None:
    one = guest(page=page, va_bits=va_bits, voffset=((1 << 64) - (1 << va_bits - 1)) + 0x4000_0000)
    name = write(tmp_path / "ram", one.content)
    with open_source(f"raw:{name}@{RAM}") as source:
        regs = found_registers(source)
        assert source.origin == "VMCOREINFO found in RAM of 6.99.0-test"
        assert translate(source.memory, regs, one.linear + 0x12340).pa == RAM + 0x12340
        assert len(leaves(source.memory, regs).va) == (SIZE + (1 << 20)) // page
        lower = translate(source.memory, regs, 0x1000)
        assert lower.fault
        assert lower.fault.cause == "EPD"


def test_vmcoreinfo_without_t1sz_has_the_va_bits_of_the_build(made: Guest) -> None:
    text = "".join(line for line in made.info.splitlines(True) if "T1SZ" not in line)
    assert VmcoreInfo.parse(text).registers() == registers_of(made)
    info = VmcoreInfo.parse("OSRELEASE=5.4\nPAGESIZE=4096\nnonsense\n")
    assert info.va_bits is None
    assert info.release == "5.4"
    assert info.linear_pa(1 << 63) is None
    with pytest.raises(SourceError, match="does not say enough"):
        info.registers()


def test_text_that_only_begins_like_vmcoreinfo_is_passed_over(tmp_path: Path, made: Guest) -> None:
    content = bytearray(made.content)
    content[:10] = b"OSRELEASE="
    content[PAGE : PAGE + 14] = b"OSRELEASE=%s\n\0"
    content[SIZE - PAGE : SIZE - PAGE + 40] = b"OSRELEASE=6.1\nCRASHTIME=1\nPAGESIZE=4096\n"
    name = write(tmp_path / "ram", bytes(content))
    with open_source(f"raw:{name}@{RAM}") as source:
        assert found_registers(source) == registers_of(made)


def test_without_vmcoreinfo_the_root_is_found(tmp_path: Path, made: Guest) -> None:
    name = write(tmp_path / "ram", made.content.replace(b"OSRELEASE", b"osrelease"))
    with open_source(f"raw:{name}@{RAM}") as source:
        regs = found_registers(source)
        assert made.root == regs.TTBR1_EL1
        assert source.origin.startswith(f"the root found at PA {made.root:#x}: 4K, 48 VA bits")
    empty = write(tmp_path / "zeros", bytes(64 * PAGE))
    with open_source(f"raw:{empty}@0") as source, pytest.raises(SourceError, match="no root table was found"):
        found_registers(source)


# ---- registers by the user


def test_registers_from_lines_and_from_json(tmp_path: Path) -> None:
    lines = "TTBR1_EL1 = 0x41000000  # root\n\n# nothing\nSCTLR=5\n"
    want = {"TTBR1_EL1": 0x4100_0000, "SCTLR_EL1": 5}
    assert parse_registers(lines) == want
    assert parse_registers('{"TTBR1_EL1": "0x41000000", "SCTLR_EL1": 5}') == want
    (tmp_path / "regs").write_text(lines)
    assert read_registers(tmp_path / "regs") == want
    assert parse_register("TCR_EL1=0b101") == ("TCR_EL1", 5)


def test_the_command_line_overrides_the_file_and_the_file_the_source(tmp_path: Path) -> None:
    path = tmp_path / "regs"
    path.write_text("TTBR1_EL1=1\nTCR_EL1=2")
    base = Registers(TTBR1_EL1=9, MAIR_EL1=9)
    assert overridden(base, path, ["TCR_EL1=3"]) == Registers(TTBR1_EL1=1, TCR_EL1=3, MAIR_EL1=9)
    assert overridden(base) is base
    assert overridden(None) is None
    assert overridden(None, None, ["TTBR0_EL1=4"]) == Registers(TTBR0_EL1=4)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("TTBR1_EL1", "not NAME=VALUE"),
        ("TTBR9_EL1=0", "not a register that a translation reads"),
        ("TTBR1_EL1=red", "not a number"),
        ("TTBR1_EL1=-1", "64 bits"),
        (f"TTBR1_EL1={1 << 64}", "64 bits"),
        ("{not json", "begins like JSON"),
        ('{"TTBR1_EL1": [1]}', "must be a number"),
        ('{"TTBR1_EL1": true}', "must be a number"),
        ('{"X9": 1}', "not a register"),
    ],
)
def test_register_texts_that_cannot_be(text: str, says: str) -> None:
    with pytest.raises(SourceError, match=says) as error:
        parse_registers(text)
    assert "\n" not in str(error.value)


def test_register_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        read_registers(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\0\1\2")
    with pytest.raises(SourceError, match="no text"):
        read_registers(tmp_path / "binary")
    start = time.perf_counter()
    with pytest.raises(SourceError, match="no text"):
        read_registers("/dev/zero")
    assert time.perf_counter() - start < 1
