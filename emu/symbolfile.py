"""A kernel's symbols from a file beside it: ELF, System.map, or the text of /proc/kallsyms.

The text of a running kernel shows the addresses of that boot: they are moved back to the link address by `_text`
or `_stext`. Symbols of modules and absolute values are left out, as they are not in the image.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from emu import elf, relocate
from emu.container import ImageError
from emu.symbols import Entries

NEEDED = "symbols are needed as ELF, System.map or /proc/kallsyms text"
_LINE = re.compile(rb"^([0-9a-fA-F]{16}) ([A-Za-z?]) (\S+)", re.MULTILINE)


class SymbolFileError(ValueError):
    """Symbols that do not belong to the image."""


def parse(name: str, content: bytes) -> Entries:
    """The symbols in `content`, the bytes of the file `name`. Raises ImageError."""
    if content.startswith(elf.MAGIC):
        try:
            entries = elf.read_symbols(content)
        except elf.ElfError as error:
            raise ImageError(f"{name} {error}; {NEEDED}") from None
    else:
        entries = _parse_text(content)
    if not len(entries):
        raise ImageError(f"{name} has no symbols; {NEEDED}")
    if not entries.addresses.any():
        raise ImageError(f"{name} has only zeros for addresses (only root sees those of /proc/kallsyms); {NEEDED}")
    return entries


def _parse_text(content: bytes) -> Entries:
    rows = _LINE.findall(content)
    addresses = np.array([int(address, 16) for address, _, _ in rows], np.uint64)
    types = np.frombuffer(b"".join(letter for _, letter, _ in rows), np.uint8)
    return Entries([name.decode("latin-1") for _, _, name in rows], types, addresses).without_marks()


def link_base(entries: Entries, image: NDArray[np.uint8], size: int) -> int:
    """The link address of an `image` (uint8, `size` bytes with bss) that has no symbols of its own.

    The one for which its pointers hit the symbols; `_text` as the file has it may be that of a KASLR boot.
    Raises SymbolFileError.
    """
    text = _address(entries, "_text")
    if text is None:
        raise SymbolFileError("the file with its symbols has no _text")
    offsets = np.sort(entries.addresses - np.uint64(text))
    try:
        return relocate.base_by_vote(image, offsets[offsets < size].astype(np.int64))
    except relocate.RelocationError:
        raise SymbolFileError("the file with its symbols is for another kernel") from None


def at_link_address(entries: Entries, base: int, size: int, own: Entries | None) -> Entries:
    """`entries` moved to where the image is linked, and only those inside it.

    `own` are the image's own symbols, needed where the file has no `_text`. Raises SymbolFileError.
    """
    moved = entries.shifted(-_displacement(entries, base, own))
    inside = moved.select(moved.addresses - np.uint64(base) <= np.uint64(size))
    if not len(inside):
        raise SymbolFileError("no address in the file with its symbols is inside the image")
    return inside


def _displacement(entries: Entries, base: int, own: Entries | None) -> int:
    text = _address(entries, "_text")
    if text is not None:
        return text - base
    # Without CONFIG_KALLSYMS_ALL the table begins at _stext, 64 KiB above _text.
    theirs, ours = _address(entries, "_stext"), _address(own, "_stext") if own else None
    if theirs is None or ours is None:
        return 0
    return theirs - ours


def _address(entries: Entries, name: str) -> int | None:
    return int(entries.addresses[entries.names.index(name)]) if name in entries.names else None
