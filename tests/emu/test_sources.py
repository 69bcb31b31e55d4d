"""Sources: the word, raw dumps, ELF cores, snapshots, kernels; all on small files made here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from emu.snapshot import Origin, save
from emu.sources import (
    open_source,
)
from emu.sources.find import find_roots
from pgtable import NoMemory, translate, translate_many
from pgtable.leaves import leaves, tables
from pgtable.memory import PAGE
from tests.emu.dumps import (
    RAM,
    SIZE,
    Guest,
    Load,
    elf_core,
    guest,
    kdump,
    note,
    prstatus,
    refused,
    registers_of,
    same,
    sparse,
    write,
)
from tests.kernels import kernel_path


@pytest.fixture(scope="module")
def made() -> Guest:
    return guest()


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
    notes = note("QEMU", 7, b"three") + note("VMCOREINFO", 0, made.info.encode())
    name = write(tmp_path / "core", elf_core([Load(RAM, made.content)], notes))
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
    for number, only in enumerate((None, 0, (1 << 64) - 1)):  # of old kernels; where nothing is known
        loads = [Load(pa if only is None else only, content, va) for pa, va, content in rows]
        with open_source(write(tmp_path / f"kcore{number}", elf_core(loads, notes))) as source:
            assert source.registers is not None
            assert same(leaves(source.memory, source.registers), leaves(made.memory, registers_of(made)))
            with pytest.raises(NoMemory):
                source.memory.fetch(RAM + SIZE)
    old_rows = [Load(0, content, va) for _, va, content in rows]
    refused(write(tmp_path / "without", elf_core(old_rows)), "only virtual addresses and no VMCOREINFO")


def test_ram_that_begins_at_pa_0_is_there(tmp_path: Path) -> None:
    loads = [Load(0, b"\1" * PAGE, 0xFFFF_0000_0000_0000), Load(0x8000, b"\2" * PAGE, 0xFFFF_0000_0000_8000)]
    for rows in (loads, loads[:1]):
        with open_source(write(tmp_path / "core", elf_core(rows))) as source:
            assert source.memory.fetch(0) == 0x0101010101010101


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
        (elf_core([Load(0, bytes(PAGE))], kind=2), "no kernel starts in its first segment"),
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


# ---- snapshots and kernels


def test_a_snapshot_is_known_by_its_content(tmp_path: Path, made: Guest) -> None:
    ram = tmp_path / "ram"
    ram.write_bytes(made.content)
    origin = Origin(**{f.name: 0 if f.type == "int" else "none" for f in fields(Origin)})  # type: ignore[arg-type]
    system = {name: value for name, value in registers_of(made).as_dict().items() if "EL1" in name}
    save(tmp_path / "vmlinuz", origin, {}, system, [(RAM, ram)])
    with open_source(str(tmp_path / "vmlinuz")) as source:
        assert source.kind == "snapshot"
        assert source.image is None  # its kernel is not at hand
        assert source.registers is not None
        assert same(leaves(source.memory, source.registers), leaves(made.memory, registers_of(made)))
        assert find_roots(source.memory)[0].pa == made.root


@pytest.mark.kernels
def test_a_kernel_stands_for_its_cold_booted_tables() -> None:
    by_name, by_path = open_source("debian:6.12"), open_source(str(kernel_path("debian:6.12")))
    for source in (by_name, by_path):
        assert source.registers is not None
        va = source.symbols["_text"]
        assert translate(source.memory, source.registers, va).pa == 0x4000_0000
        assert source.kind == "cold-booted kernel"
    assert by_name.registers == by_path.registers
    refused("debian:nonsense", "debian:")
