"""An arm64 vmlinux: its loadable bytes at their link addresses, and its symbol table.

Reading the headers is pyelftools' work; the symbol table, which has a quarter of a million entries, is read here
as one array.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu.relocate import R_AARCH64_RELATIVE, put_words
from emu.symbols import Entries

U8 = NDArray[np.uint8]

MAGIC = b"\x7fELF"
LARGEST = 1 << 30
EM_AARCH64 = "EM_AARCH64"
SYMBOL = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("shndx", "<u2"), ("value", "<u8"), ("size", "<u8")]
)
RELA = np.dtype([("offset", "<u8"), ("info", "<u8"), ("addend", "<u8")])
SHN_UNDEF, SHN_LORESERVE = 0, 0xFF00
STT_SECTION, STT_FILE = 3, 4
STB_LOCAL, STB_WEAK = 0, 2
SHF_WRITE, SHF_EXECINSTR = 1, 4

# What pyelftools raises on headers that make no sense depends on where it stumbles.
_STUMBLES = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


class ElfError(ValueError):
    """An ELF file that is no arm64 kernel; the message goes behind the file's name ("is ...")."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """`data` (uint8) are the bytes from `base` on; `memory_size` counts bss too; `entries` are its symbols."""

    base: int
    data: U8
    memory_size: int
    entries: Entries


def load(content: bytes) -> Loaded:
    """Place the segments of the ELF file `content`. Raises ElfError."""
    # pyelftools imports much; only ELF input needs it.
    from elftools.common.exceptions import ELFError
    from elftools.construct.core import ConstructError
    from elftools.elf.elffile import ELFFile

    try:
        file = ELFFile(io.BytesIO(content))
        _check(file)
        base, data, size = _place(file, content)
        _relocate(file, content, base, data)
        return Loaded(base, data, size, _entries(file, content))
    except ElfError:
        raise
    except (ELFError, ConstructError, *_STUMBLES) as error:
        raise ElfError(f"is a damaged ELF file ({error})") from None


def read_symbols(content: bytes) -> Entries:
    """Only the symbols of the ELF file `content`, of any kind. Raises ElfError."""
    from elftools.common.exceptions import ELFError
    from elftools.construct.core import ConstructError
    from elftools.elf.elffile import ELFFile

    try:
        file = ELFFile(io.BytesIO(content))
        return _entries(file, content)
    except (ELFError, ConstructError, *_STUMBLES) as error:
        raise ElfError(f"is a damaged ELF file ({error})") from None


def _check(file: Any) -> None:
    machine = file["e_machine"]
    if machine != EM_AARCH64:
        raise ElfError(f"is an ELF file for {str(machine).removeprefix('EM_')}")
    if file.elfclass != 64:
        raise ElfError("is a 32-bit ELF file")
    if not file.little_endian:
        raise ElfError("is a big-endian ELF file")
    if file["e_type"] not in ("ET_EXEC", "ET_DYN"):
        kind = {"ET_CORE": "a core dump", "ET_REL": "an object file or module"}.get(file["e_type"], "no program")
        raise ElfError(f"is an ELF file, but {kind}")


def _place(file: Any, content: bytes) -> tuple[int, U8, int]:
    loads = [s.header for s in file.iter_segments("PT_LOAD") if s["p_filesz"]]
    if not loads:
        raise ElfError("is an ELF file without loadable segments")
    base = min(s["p_vaddr"] for s in loads)
    length = max(s["p_vaddr"] + s["p_filesz"] for s in loads) - base
    memory = max(s["p_vaddr"] + s["p_memsz"] for s in loads) - base
    if max(memory, length) > LARGEST:
        raise ElfError(f"is an ELF file whose segments span {max(memory, length):#x} bytes")
    if sum(s["p_filesz"] for s in loads) > 2 * LARGEST:
        raise ElfError("is an ELF file whose segments lie over each other")
    data = np.zeros(length, np.uint8)
    for s in loads:
        part = np.frombuffer(content, np.uint8)[s["p_offset"] : s["p_offset"] + s["p_filesz"]]
        if len(part) < s["p_filesz"]:
            raise ElfError("is a truncated ELF file")
        data[s["p_vaddr"] - base : s["p_vaddr"] - base + len(part)] = part
    return base, data, memory


def _relocate(file: Any, content: bytes, base: int, data: U8) -> None:
    """Write the RELATIVE rows of the file's sections, which need not be inside a segment (vmlinux-to-elf)."""
    for section in file.iter_sections("SHT_RELA"):
        start, size = section["sh_offset"], section["sh_size"]
        rows = np.frombuffer(content[start : start + size - size % RELA.itemsize], RELA)
        offsets = rows["offset"] - np.uint64(base)  # wraps to something huge below the base
        rows = rows[(rows["info"] == R_AARCH64_RELATIVE) & (offsets <= len(data) - 8)]
        put_words(data, (rows["offset"] - np.uint64(base)).astype(np.int64), rows["addend"])


def _entries(file: Any, content: bytes) -> Entries:
    table = file.get_section_by_name(".symtab")
    if table is None:
        return Entries.empty()
    start, size = table["sh_offset"], table["sh_size"]
    rows = np.frombuffer(content[start : start + size // SYMBOL.itemsize * SYMBOL.itemsize], SYMBOL)
    kinds = rows["info"] & 15
    keep = (rows["name"] != 0) & (rows["shndx"] != SHN_UNDEF) & (kinds != STT_SECTION) & (kinds != STT_FILE)
    rows = rows[keep]
    strings = file.get_section(table["sh_link"])
    text = content[strings["sh_offset"] : strings["sh_offset"] + strings["sh_size"]]
    names = [text[at : text.index(b"\0", at)].decode("latin-1") for at in rows["name"].tolist()]
    return Entries(names, _letters(file, rows), rows["value"].astype(np.uint64)).without_marks()


def _letters(file: Any, rows: NDArray[Any]) -> U8:
    """The nm letter of each symbol: by its section, in capitals where it is not local."""
    by_section = np.full(1 << 16, ord("a"), np.uint8)
    for k, section in enumerate(file.iter_sections()):
        flags = section["sh_flags"]
        if flags & SHF_EXECINSTR:
            letter = "t"
        elif section["sh_type"] == "SHT_NOBITS":
            letter = "b"
        else:
            letter = "d" if flags & SHF_WRITE else "r"
        by_section[k] = ord(letter)
    letters = by_section[rows["shndx"]]
    binding = rows["info"] >> 4
    letters = np.where(binding == STB_LOCAL, letters, letters - 32).astype(np.uint8)
    return np.where(binding == STB_WEAK, np.uint8(ord("W")), letters)
