"""Small memory dumps, made by hand: ELF cores, kdump-compressed files, VMCOREINFO."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emu.sources import SourceError, open_source
from pgtable import Format, Granule, NoMemory, PhysicalMemory, Registers
from pgtable.bits import Words
from pgtable.build import TableBuilder

RAM = 0x4000_0000
SIZE = 4 << 20
PT_LOAD, PT_NOTE = 1, 4


@dataclass
class Guest:
    """RAM with the tables of a made-up Linux: a linear map of all RAM, an image window, VMCOREINFO."""

    memory: PhysicalMemory
    root: int
    linear: int
    info: str

    @property
    def content(self) -> bytes:
        return self.memory.read(RAM, SIZE)


def guest(*, page: int = 4096, va_bits: int = 48, voffset: int = 0xFFFF_8000_4000_0000) -> Guest:
    """A guest of 4 MiB at RAM; its VMCOREINFO lies in the last page but one."""
    memory = PhysicalMemory((RAM, SIZE))
    fmt = Format(Granule(page.bit_length() - 1), ds=va_bits > 48 and page != 65536)
    builder = TableBuilder(memory, (RAM + (1 << 20), 2 << 20), fmt=fmt, va_bits=va_bits, upper=True, UXNTable=1)
    leaf = fmt.leaf(3)
    attributes = leaf.pack(AF=1, UXN=1, PXN=1, DBM=1, AttrIndx=1, **({} if fmt.lpa2 else {"SH": 3}))
    linear = (1 << 64) - (1 << va_bits)
    builder.map(linear, RAM, SIZE, level=3, template=attributes)
    builder.map(RAM + voffset & (1 << 64) - 1, RAM, 1 << 20, level=3, template=attributes & ~leaf["PXN"].mask)
    text = vmcoreinfo(root=builder.root, page=page, va_bits=va_bits, voffset=voffset, linear=linear)
    memory.write(RAM + SIZE - 2 * 4096, text.encode())
    return Guest(memory, builder.root, linear, text)


def vmcoreinfo(*, root: int, page: int, va_bits: int, voffset: int, linear: int) -> str:
    rows = {
        "OSRELEASE": "6.99.0-test",
        "PAGESIZE": str(page),
        "SYMBOL(swapper_pg_dir)": f"{root + voffset & (1 << 64) - 1:x}",
        "SYMBOL(_stext)": f"{RAM + voffset & (1 << 64) - 1:x}",
        "NUMBER(VA_BITS)": str(va_bits),
        "NUMBER(kimage_voffset)": f"{voffset:#x}",
        "NUMBER(PHYS_OFFSET)": f"{RAM:#x}",
        "NUMBER(TCR_EL1_T1SZ)": f"{64 - va_bits:#x}",
        "KERNELOFFSET": "0",
    }
    return "".join(f"{key}={value}\n" for key, value in rows.items())


def note(name: str, kind: int, content: bytes) -> bytes:
    label = name.encode() + b"\0"
    head = struct.pack("<III", len(label), len(content), kind)
    return head + label.ljust(-(-len(label) // 4) * 4, b"\0") + content.ljust(-(-len(content) // 4) * 4, b"\0")


def prstatus(registers: Sequence[int]) -> bytes:
    return note("CORE", 1, bytes(112) + struct.pack("<34Q", *registers) + bytes(8))


@dataclass
class Load:
    """A PT_LOAD row; `memsz` above the content's length is a tail that the file does not hold."""

    pa: int
    content: bytes
    va: int = 0
    memsz: int = 0


def elf_core(loads: Sequence[Load], notes: bytes = b"", *, machine: int = 183, kind: int = 4, lead: int = 0) -> bytes:
    """A core whose content begins `lead` bytes behind its headers: alignment is not promised."""
    rows = len(loads) + 1
    at = 64 + 56 * rows
    table = struct.pack("<IIQQQQQQ", PT_NOTE, 0, at, 0, 0, len(notes), len(notes), 4)
    at += len(notes) + lead
    for load in loads:
        size = max(load.memsz, len(load.content))
        table += struct.pack("<IIQQQQQQ", PT_LOAD, 7, at, load.va, load.pa, len(load.content), size, 0)
        at += len(load.content)
    head = b"\x7fELF\2\1\1".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, 0, 64, 0, 0, 64, 56, rows, 0, 0, 0)
    return head + table + notes + bytes(lead) + b"".join(load.content for load in loads)


def snappy(data: bytes) -> bytes:
    """As literals: what a packer may do with what it cannot make smaller."""
    return _varint(len(data)) + b"\xf4" + struct.pack("<H", len(data) - 1) + data


def _varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + _varint(n >> 7)


PACK = {0: bytes, 1: zlib.compress, 4: snappy}


def kdump(
    pages: Mapping[int, bytes], info: str = "", *, flags: int = 1, block: int = 4096, machine: str = "aarch64"
) -> bytes:
    """A kdump-compressed file of `pages` (by PA)."""
    numbers = sorted(pa // block for pa in pages)
    top = numbers[-1] + 1
    half = (top // 8 // block + 1) * block
    bitmap = np.zeros(half * 8, np.uint8)
    bitmap[numbers] = 1
    there = np.packbits(np.ones_like(bitmap)).tobytes()  # RAM, in the file or not
    packed = np.packbits(bitmap, bitorder="little").tobytes()
    names = b"".join(n.encode().ljust(65, b"\0") for n in ("Linux", "host", "6.99", "#1", machine, ""))
    head = struct.pack(
        "<8si390s6x16xIiiIIIIIIii", b"KDUMP   ", 6, names, 0, block, 1, 2 * half // block, top, *[0] * 5, 1
    )
    text = note("VMCOREINFO", 0, info.encode()) if info else b""  # libkdumpfile wants the note, others its content
    at, where = block + 512, text.find(b"OSRELEASE")
    sub = struct.pack("<qiiQQ", 0, 0, 0, 0, 0)
    sub += struct.pack("<qQqQqQ", at + where if info else 0, len(info), at if info else 0, len(text), 0, 0)
    sub += struct.pack("<QQQ", 0, 0, top)
    blocks = head.ljust(block, b"\0") + (sub.ljust(512, b"\0") + text).ljust(block, b"\0") + there + packed
    at = len(blocks) + 24 * len(numbers)
    descriptors, data = b"", b""
    for number in numbers:
        content = PACK[flags](pages[number * block])
        descriptors += struct.pack("<qIIQ", at + len(data), len(content), flags, 0)
        data += content
    return blocks + descriptors + data


def flattened(content: bytes, piece: int = 5000) -> bytes:
    """The same file as makedumpfile writes it to a pipe; the pieces in no order."""
    head = (b"makedumpfile".ljust(16, b"\0") + struct.pack(">qq", 1, 1)).ljust(4096, b"\0")
    starts = list(range(0, len(content), piece))
    pieces = [struct.pack(">qq", at, len(content[at : at + piece])) + content[at : at + piece] for at in starts]
    return head + b"".join(reversed(pieces)) + struct.pack(">qq", -1, -1)


def pages_of(content: bytes, base: int = RAM, block: int = 4096) -> dict[int, bytes]:
    return {base + at: content[at : at + block] for at in range(0, len(content), block)}


def sparse(path: Path, size: int, parts: Mapping[int, bytes]) -> Path:
    """A file of `size` bytes that is a hole but for `parts`."""
    with open(path, "wb") as file:
        os.truncate(file.fileno(), size)
        for at, data in parts.items():
            os.pwrite(file.fileno(), data, at)
    return path


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


def same(a: Sequence[Words], b: Sequence[Words]) -> bool:
    """The same listings."""
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def registers_of(made: Guest, va_bits: int = 48, page: int = 4096) -> Registers:
    from emu.sources.vmcoreinfo import linux_registers

    return linux_registers(made.root, page, va_bits)


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a read gives, NoMemory as text."""
    try:
        return function(*arguments)
    except NoMemory as error:
        return f"no memory at {error.pa:#x}"
