"""ELF core files of a machine: QEMU's dump-guest-memory, kdump's /proc/vmcore, /proc/kcore.

What a PT_LOAD row holds differs: QEMU and kdump give physical addresses (p_paddr); kcore gives virtual ones, and
p_paddr for the linear map only (all ones, or 0 throughout in old kernels, elsewhere). Rows without a physical address
are placed by the VMCOREINFO note where they are in the linear map, and left out otherwise.
A row's tail that is not in the file (p_memsz above p_filesz) is zeros: makedumpfile leaves such pages out.
Sources: ELF-64 object file format; QEMU dump/dump.c; fs/proc/kcore.c, fs/proc/vmcore.c.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass, field

import numpy as np

from emu.sources.errors import SourceError
from emu.sources.ram import PHYSICAL, FileMemory, PagedMemory, Segment, disjoint, read_at
from emu.sources.vmcoreinfo import NOTE, VmcoreInfo
from pgtable.memory import PAGE

MAGIC = b"\x7fELF"
HEADER = struct.Struct("<16xHHIQQQIHHHHHH")
PROGRAM = np.dtype(
    {
        "names": ("type", "flags", "offset", "vaddr", "paddr", "filesz", "memsz", "align"),
        "formats": ("<u4", "<u4", *["<u8"] * 6),
    }
)
SECTION_INFO_AT = 44  # sh_info: the number of program headers where e_phnum cannot hold it
PN_XNUM = 0xFFFF
ET_CORE, EM_AARCH64, PT_LOAD, PT_NOTE = 4, 183, 1, 4
NT_PRSTATUS = 1
LARGEST_NOTES = LARGEST_TABLE = 64 << 20
PRSTATUS_REGS = 112  # pr_reg's place in an arm64 prstatus: X0 to X30, SP, PC, PSTATE
GENERAL = (*(f"X{i}" for i in range(31)), "SP", "PC", "PSTATE")
NEEDED = "an arm64 memory dump (ELF core of QEMU or kdump) is needed"
NO_PA = (1 << 64) - 1


@dataclass(frozen=True)
class ElfCore:
    """An open core: its RAM, the general registers of each CPU, what VMCOREINFO it has."""

    memory: FileMemory | PagedMemory
    cpus: tuple[dict[str, int], ...] = ()
    info: VmcoreInfo | None = None
    left_out: int = field(default=0)  # PT_LOAD rows that have no physical address


def open_core(path: str, file: int) -> ElfCore:
    """The core `path`, open as `file`, which it keeps. Raises SourceError."""
    size = os.fstat(file).st_size
    programs = _programs(path, file)
    notes = [note for row in programs[programs["type"] == PT_NOTE] for note in _notes(path, file, row)]
    info = next((VmcoreInfo.parse(text.decode("latin-1")) for name, _, text in notes if name == NOTE), None)
    cpus = tuple(_general(data) for name, kind, data in notes if name == "CORE" and kind == NT_PRSTATUS)
    loads = programs[programs["type"] == PT_LOAD]
    segments, left_out = _segments(path, loads, info)
    regular = stat.S_ISREG(os.fstat(file).st_mode) and not path.startswith("/proc/")
    missing = max((s.offset + s.size for s in segments if s.file is not None), default=0) - size
    if regular and missing > 0:
        raise SourceError(f"{path} is a truncated ELF core: {missing} bytes of its memory are missing at the end")
    memory = FileMemory(segments, [file], path) if regular else _unmapped(segments, file)
    return ElfCore(memory, cpus, info, left_out)


def _programs(path: str, file: int) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    head = os.pread(file, HEADER.size, 0)
    if len(head) < HEADER.size:
        raise SourceError(f"{path} is a truncated ELF file: not even its header is there; {NEEDED}")
    if head[4:6] != b"\2\1":
        raise SourceError(f"{path} is a 32-bit or big-endian ELF file; {NEEDED}")
    kind, machine, _, _, start, sections, _, _, entry, count, *_ = HEADER.unpack(head)
    if kind != ET_CORE:
        raise SourceError(f"{path} is an ELF file, but no core; {NEEDED}")
    if machine != EM_AARCH64:
        raise SourceError(f"{path} is a core of another architecture (ELF machine {machine}); {NEEDED}")
    if count == PN_XNUM:
        count = int.from_bytes(read_at(file, 4, sections + SECTION_INFO_AT), "little")
    table = read_at(file, min(count * PROGRAM.itemsize, LARGEST_TABLE), start)
    if entry != PROGRAM.itemsize or len(table) < count * PROGRAM.itemsize:
        raise SourceError(f"{path} is a truncated or damaged ELF core: its {count} program headers are not all there")
    return np.frombuffer(table, PROGRAM)


def _notes(path: str, file: int, row: np.void) -> list[tuple[str, int, bytes]]:
    """(name, type, content) of the notes in a PT_NOTE row."""
    size = int(row["filesz"])
    data = read_at(file, min(size, LARGEST_NOTES), int(row["offset"]))
    if len(data) < size:
        raise SourceError(f"{path} is a truncated or damaged ELF core: its notes are not all there")
    found, at = [], 0
    while at + 12 <= len(data):
        name_size, size, kind = struct.unpack_from("<III", data, at)
        start = at + 12 + (name_size + 3 & -4)
        if start + size > len(data):
            raise SourceError(f"{path} is a damaged ELF core: a note goes beyond its segment")
        name = data[at + 12 : at + 12 + name_size].split(b"\0")[0].decode("latin-1")
        found.append((name, kind, data[start : start + size]))
        at = start + (size + 3 & -4)
    return found


def _general(status: bytes) -> dict[str, int]:
    """The general registers in an NT_PRSTATUS note."""
    words = struct.unpack_from(
        f"<{len(GENERAL)}Q", status.ljust(PRSTATUS_REGS + 8 * len(GENERAL), b"\0"), PRSTATUS_REGS
    )
    return dict(zip(GENERAL, words, strict=True))


def _segments(
    path: str, loads: np.ndarray[tuple[int], np.dtype[np.void]], info: VmcoreInfo | None
) -> tuple[list[Segment], int]:
    """The PAs of the PT_LOAD rows, and how many have none."""
    virtual = len(loads) > 1 and not loads["paddr"].any() and (loads["vaddr"] >> np.uint64(55)).any()
    found: list[Segment] = []
    left_out = 0
    for row in loads.tolist():
        _, _, offset, va, pa, in_file, size, _ = row
        place = pa if not virtual and pa != NO_PA else None
        if place is None and info:
            place = info.linear_pa(va)
        if place is None or place + size > PHYSICAL:
            left_out += 1
            continue
        found.append(Segment(place, min(in_file, size), offset))
        if size > in_file:
            found.append(Segment(place + in_file, size - in_file, 0, None))
    if not found:
        why = "no memory at all" if not len(loads) else "only virtual addresses and no VMCOREINFO to place them"
        raise SourceError(f"{path} is an ELF core with {why}; {NEEDED}")
    return found, left_out


def _unmapped(segments: list[Segment], file: int) -> PagedMemory:
    """Memory of a file that only `pread` reads (/proc/kcore)."""
    rows = disjoint(segments)

    def read(pa: int) -> bytes | None:
        for row in rows:
            if row.pa <= pa and pa + PAGE <= row.pa + row.size:
                data = bytes(PAGE) if row.file is None else os.pread(file, PAGE, pa - row.pa + row.offset)
                return data if len(data) == PAGE else None
        return None

    return PagedMemory(read, [(s.pa, s.size) for s in rows])
