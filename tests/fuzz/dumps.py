"""Targets that read memory and machines: cores, kdump, snapshots, raw dumps, VMCOREINFO, gdb and QMP answers."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import zlib
from contextlib import AbstractContextManager, closing
from functools import cache
from unittest.mock import patch

import numpy as np

from tests.emu import dumps as made
from tests.fuzz.files import file
from tests.fuzz.harness import Target

SOME_RAM = 16 << 10
SLOTS = 0x4000_0000


@cache
def ram() -> bytes:
    """Four pages: a root table that leads to itself and to a page, and VMCOREINFO."""
    words = np.zeros(SOME_RAM // 8, np.uint64)
    words[0], words[1], words[511] = SLOTS | 0x1003, SLOTS | 0x703, SLOTS | 0x3
    words[512:516] = [SLOTS | 0x2003, SLOTS | 0x701, SLOTS | 0x1003, 0]
    words[1024:1028] = [SLOTS | 0x3703, SLOTS | 0x1703, 0xDEAD, SLOTS | 0x703]
    text = made.vmcoreinfo(root=SLOTS, page=4096, va_bits=48, voffset=0xFFFF_8000_4000_0000, linear=0xFFFF << 48)
    content = words.tobytes()
    return content[:0x3000] + text.encode().ljust(0x1000, b"\0")


def info() -> str:
    """The text alone."""
    return ram()[0x3000:].rstrip(b"\0").decode()


def use(word: str) -> None:
    """Opens a source and reads it in every way."""
    from emu.sources import found_registers, open_source
    from pgtable import Access, translate
    from pgtable.memory import NoMemory
    from pgtable.tree import Finding  # noqa: F401  what a listing needs is imported before memory is limited

    with open_source(word) as source, source.reading():
        memory = source.memory
        pas = np.array([SLOTS, SLOTS + 0x1000, SLOTS + 0x3FF8, 0, 1 << 51], np.uint64)
        memory.gather(pas)
        memory.tables(pas[:2], 512)
        for pa, n in ((SLOTS, 1024), (SLOTS + 0x2000, 4), (1 << 40, 1)):
            try:
                memory.fetch(pa)
                memory.words(pa, n)
            except NoMemory:
                continue
        registers = found_registers(source)
        for va in (0xFFFF_0000_0000_0000, 0x1000, 0xFFFF_8000_8000_0000):
            translate(memory, registers, va, Access.read())


def any_file(data: bytes) -> None:
    """A file of any kind, opened by its content."""
    use(file(data))


def cores() -> list[bytes]:
    """ELF cores as QEMU and kdump write them, and as /proc/kcore is."""
    notes = made.prstatus(range(34)) + made.note("VMCOREINFO", 0, info().encode())
    high = 0xFFFF_0000_0000_0000
    return [
        made.elf_core([made.Load(SLOTS, ram())], notes),
        made.elf_core([made.Load(SLOTS, ram()[:0x2000]), made.Load(SLOTS + 0x2000, ram()[0x2000:], memsz=0x8000)]),
        made.elf_core([made.Load((1 << 64) - 1, ram(), va=high), made.Load(0, b"x" * 64, va=high + 0x9000)], notes),
        made.elf_core([made.Load(SLOTS, ram())], notes, lead=3),
    ]


def kdumps() -> list[bytes]:
    """kdump-compressed files, each way to pack, and flattened ones."""
    pages = made.pages_of(ram(), base=0x10000)
    plain = [made.kdump(pages, info(), flags=flags) for flags in (0, 1)]
    return [*plain, made.kdump(pages, flags=1), made.flattened(plain[1], 5000)]


def kdump(data: bytes) -> None:
    """A kdump file; drgn, which is another project's, does not get to see it."""
    from emu.sources import SourceError
    from emu.sources import kdump as reader

    if reader.is_kdump(data[:64]):
        with patch.object(reader, "_by_drgn", side_effect=SourceError("for drgn")):
            use(file(data))


def snapshot(data: bytes) -> None:
    """A header in JSON and RAM, joined by a newline, in a file whose lengths and checksum are right."""
    from emu.snapshot import ALIGN, MAGIC, VERSION

    text, _, content = data.partition(b"\n")
    head = struct.pack("<16sIII", MAGIC, VERSION, len(text), zlib.crc32(text)) + text
    use(file(head.ljust(ALIGN, b"\0") + content.ljust(0x1000, b"\0")))


def snapshot_parts() -> list[bytes]:
    """What `snapshot` puts together."""
    origin = dict.fromkeys(("kernel", "release", "sha256", "command_line", "cpu", "at", "when", "qemu"), "none")
    origin |= {"kaslr_offset": "0x0", "base": "0xffff800080000000", "seed": 1}  # type: ignore[dict-item]
    registers = {"TCR_EL1": "0x4f5503510", "TTBR1_EL1": hex(SLOTS), "MAIR_EL1": "0xff", "SCTLR_EL1": "0x1"}
    head = {"origin": origin, "ram": [[SLOTS, SOME_RAM, 1 << 16]], "general": {"x0": "0x1"}, "system": registers}
    return [json.dumps(head).encode() + b"\n" + ram()]


def snapshots() -> list[bytes]:
    """Whole files."""
    text, _, content = snapshot_parts()[0].partition(b"\n")
    head = struct.pack("<16sIII", b"pgtable snapshot", 1, len(text), zlib.crc32(text)) + text
    return [head.ljust(1 << 16, b"\0") + content]


def raw(data: bytes) -> None:
    """A word raw:PATH@PA and the file, from one line and the rest."""
    text, _, content = data.partition(b"\n")
    use("raw:" + text.decode("utf-8", "surrogateescape").replace("FILE", file(content)))


def raws() -> list[bytes]:
    """One file, and one twice."""
    return [b"FILE@0x40000000\n" + ram(), b"FILE@0x40000000,FILE@0x40010000\n" + ram()]


def vmcoreinfo(data: bytes) -> None:
    """The text, and everything that is taken from it."""
    from emu.sources.vmcoreinfo import VmcoreInfo

    found = VmcoreInfo.parse(data.decode("latin-1"))
    found.linear_pa(0xFFFF_0000_1234_5000)
    assert isinstance(found.symbols, dict)
    assert isinstance(found.kaslr_offset, int)
    found.registers()


def vmcoreinfos() -> list[bytes]:
    """Three pages sizes."""
    rows = ((4096, 48), (16384, 47), (65536, 52), (4096, 52))
    return [
        made.vmcoreinfo(root=SLOTS, page=page, va_bits=bits, voffset=1 << 40, linear=0).encode() for page, bits in rows
    ]


# what answers over a socket


@cache
def always_readable() -> int:
    """A file descriptor for select."""
    return os.open(os.devnull, os.O_RDONLY)


class Played:
    """A connected socket whose other end has said `data`, and hears nothing."""

    def __init__(self, data: bytes) -> None:
        self._said = io.BytesIO(data)

    def fileno(self) -> int:
        return always_readable()

    def recv(self, size: int) -> bytes:
        return self._said.read(size)

    def makefile(self, mode: str) -> io.BytesIO:
        return self._said

    def connect(self, *_: object) -> None:
        """There is one."""

    settimeout = sendall = close = connect

    def setsockopt(self, *_: object) -> None:
        """As it likes."""


def answers(data: bytes) -> AbstractContextManager[object]:
    """Inside, every new socket is connected to somebody who says `data`."""
    return patch.object(socket, "socket", lambda *_, **__: Played(data))


def gdb(data: bytes) -> None:
    """The answers of a gdb stub: features, registers, memory."""
    from emu.gdbstub import GdbStub

    with answers(data), GdbStub("socket") as stub:
        stub.read_general()
        stub.memory(0x1000, 16)
        for name in list(stub.registers)[:3]:
            stub.read(name)


def packet(text: str) -> bytes:
    """As the protocol frames it."""
    data = text.encode()
    return b"$%s#%02x" % (data, sum(data) & 0xFF)


def gdb_answers() -> list[bytes]:
    """Those of a small target."""
    xml = (
        '<target><xi:include href="core.xml"/></target>',
        '<feature><reg name="x0" bitsize="64" regnum="0"/><reg name="pc" bitsize="64"/>'
        '<reg name="SCTLR" bitsize="64"/></feature>',
    )
    texts = [
        "PacketSize=4000;qXfer:features:read+",
        *("l" + part for part in xml),
        "00" * 24,
        "0123" * 8,
        *["11" * 8] * 3,
    ]
    return [b"+".join(map(packet, texts)), b"".join(map(packet, [*texts[:2], "m<feature>", "l</feature>", "E01"]))]


def qmp(data: bytes) -> None:
    """The answers of QMP, and the memory tree."""
    from emu.sources.live import ram_ranges
    from emu.sources.qmp import Qmp

    with answers(data), closing(Qmp("socket")) as found:
        ram_ranges(found.monitor("info mtree -f"))
        found.ask("query-status")


def parent(data: bytes) -> None:
    """The answers of the script in gdb."""
    from emu.sources.parent import open_parent

    with answers(data), patch.dict(os.environ, {"PGTABLE_PARENT": "0"}):
        memory, _, symbols = open_parent("parent:gdb")
        memory.gather(np.array([SLOTS, SLOTS + 0x1000], np.uint64))
        symbols.get("init_mm")
        symbols.at(0)


def parent_answers() -> list[bytes]:
    """Registers, ranges, two pages, a symbol, a place."""
    texts = ["TCR_EL1=0x4f5503510\nTTBR1_EL1=0x40000000\n", MTREE, "\1" + "p" * 4096 + "\0", "0x123", "init_mm+0x4"]
    whole = b"".join(b"ok %d\n%s" % (len(text), text.encode()) for text in texts)
    return [whole, b"ok 3\nA=1", b"no 4\ngone"]


MTREE = """FlatView #0
 AS "memory", root: system
 Root memory region: system
  0000000040000000-000000004fffffff (prio 0, ram): mach-virt.ram
  0000000050000000-00000000ffffffff (prio 0, i/o): device
"""


def qmp_answers() -> list[bytes]:
    """Greeting, capabilities, memory tree, status."""
    rows = [{"QMP": {}}, {"return": {}, "id": 1}, {"return": MTREE, "id": 2}, {"return": {"running": True}, "id": 3}]
    rows2 = [*rows[:2], {"event": "STOP"}, {"error": {"class": "x", "desc": "no"}, "id": 2}]
    return [b"".join(json.dumps(row).encode() + b"\n" for row in some) for some in (rows, rows2)]


def dtb(data: bytes) -> None:
    """A device tree as QEMU writes it."""
    from emu import dtb as reader

    reader.packed(reader.replace(data, {"/chosen/rng-seed": b"12345678"})[0])


def dtbs() -> list[bytes]:
    """Two nodes, one property."""
    strings = b"rng-seed\0"
    body = struct.pack(">I", 1) + b"\0\0\0\0" + struct.pack(">I", 1) + b"chosen\0\0"
    body += struct.pack(">III", 3, 4, 0) + b"abcd" + struct.pack(">III", 2, 2, 9)
    at = 40
    head = struct.pack(
        ">10I", 0xD00DFEED, at + len(body) + len(strings), at, at + len(body), 0, 17, 16, 0, len(strings), len(body)
    )
    return [head + body + strings]


ERRORS = ("SourceError",)
SOURCES = ("emu/sources/__init__.py", "emu/sources/ram.py")
TARGETS = (
    Target("core", "ELF cores of QEMU, kdump, /proc/kcore", any_file, cores, ERRORS,
           ("emu/sources/elfcore.py", *SOURCES), 1 << 16),
    Target("kdump", "kdump-compressed and flattened files", kdump, kdumps, ERRORS, ("emu/sources/kdump.py",), 1 << 16),
    Target("snapshot", "snapshots, whole files", any_file, snapshots, ERRORS, ("emu/snapshot.py",), 1 << 18),
    Target("header", "snapshots, checksum right", snapshot, snapshot_parts, ERRORS, ("emu/snapshot.py",), 1 << 16),
    Target("raw", "raw dumps and the word that names them", raw, raws, ERRORS, ("emu/sources/raw.py",), 1 << 16),
    Target("vmcoreinfo", "VMCOREINFO's text", vmcoreinfo, vmcoreinfos, ERRORS, ("emu/sources/vmcoreinfo.py",), 1 << 14),
    Target("gdb", "the answers of a gdb stub", gdb, gdb_answers, ("GdbError",), ("emu/gdbstub.py",), 1 << 14),
    Target("qmp", "the answers of QMP", qmp, qmp_answers, (*ERRORS, "OSError"), ("emu/sources/qmp.py",), 1 << 14),
    Target("parent", "the answers of the script in gdb", parent, parent_answers, ERRORS, ("emu/sources/parent.py",),
           1 << 14),
    Target("dtb", "QEMU's device tree", dtb, dtbs, ("ValueError",), ("emu/dtb.py",), 1 << 14),
)  # fmt: skip
