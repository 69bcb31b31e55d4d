"""Symbols that kallsyms lacks: a kernel without CONFIG_KALLSYMS_ALL (Debian 6.1) lists functions only.

Exported variables are in the table for modules (__ksymtab), found by shape: rows of three s32, each relative to
itself (value, name, namespace), around the row that names `memstart_addr`, which arm64 always exports. The few
that are not exported are read from a function known to use them, and from memory that is known to point at them:

    init_mm         what __change_memory_common hands to apply_to_page_range, and init_task.active_mm: must agree
    swapper_pg_dir  init_mm.pgd
    rodata_full     the first byte that can_set_direct_map loads
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from emu.btf import Btf, BtfError

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]

ROW = 3  # words of a struct kernel_symbol
LEAST = 8  # rows; a chance hit has no neighbours that are rows too
STRINGS = 1 << 20  # bytes around the anchor's name where all other names are
ANCHOR = b"\0memstart_addr\0"
FUNCTION_LIMIT = 256  # instructions looked at in a function that is known to be short


# the table of exported symbols


def ksymtab(image: U8, base: int, size: int) -> dict[str, int]:
    """Exported names and their link-time addresses; empty where no such table is found.

    `image` (uint8) starts at `base`; `size` is the memory it takes with bss.
    """
    words = np.frombuffer(image.data, "<i4", len(image) // 4)
    for hit in re.finditer(re.escape(ANCHOR), image.data):
        for k in _words_that_point_at(words, hit.start() + 1):
            rows = _rows_around(image, words, k, size)
            if len(rows) > LEAST:
                return _named(image, words, rows, base)
    return {}


def _words_that_point_at(words: NDArray[np.int32], target: int) -> list[int]:
    here = np.arange(0, 4 * len(words), 4, dtype=np.uint32)
    found: list[int] = np.flatnonzero(words.view(np.uint32) + here == target).tolist()
    return found


def _rows_around(image: U8, words: NDArray[np.int32], name_word: int, size: int) -> I64:
    """Indexes of the first word of each row of the table that holds this name."""
    first = np.arange((name_word - 1) % ROW, len(words) - ROW, ROW)
    values = words[first] + 4 * first
    names = words[first + 1] + 4 * (first + 1)
    anchor = int(words[name_word]) + 4 * name_word
    # The linker lets a name end inside a longer one, so the byte before a name can be anything.
    inside = (values >= 0) & (values < size) & (abs(names - anchor) < STRINGS) & (names < len(image))
    names = np.where(inside, names, 0)
    good = inside & (image[names] > ord(" ")) & (image[names] < 0x7F)
    me = (name_word - 1) // ROW
    bad = np.flatnonzero(~good)
    low = int(np.searchsorted(bad, me))
    start = int(bad[low - 1]) + 1 if low else 0
    end = int(bad[low]) if low < len(bad) else len(good)
    return first[start:end] if good[me] else first[:0]


def _named(image: U8, words: NDArray[np.int32], rows: I64, base: int) -> dict[str, int]:
    values = (words[rows] + 4 * rows).tolist()
    names = (words[rows + 1] + 4 * (rows + 1)).tolist()
    text = image[min(names) : max(names) + 512].tobytes()
    low = min(names)
    return {
        text[at - low : text.index(b"\0", at - low)].decode("latin-1"): base + value
        for at, value in zip(names, values, strict=True)
    }


# the few that are not exported


class Reader:
    """The relocated image as instructions and pointers, and the symbols that are known so far."""

    def __init__(self, image: U8, base: int, known: Callable[[str], int | None], btf: Btf | None) -> None:
        self.image = image
        self.base = base
        self.known = known
        self.btf = btf

    def pointer(self, address: int) -> int | None:
        """The u64 at `address`; None outside the image."""
        at = address - self.base
        word = self.image[at : at + 8].tobytes() if at >= 0 else b""
        return int.from_bytes(word, "little") if len(word) == 8 else None

    def member(self, symbol: str, struct: str, path: str) -> int | None:
        """The pointer in `symbol`, a `struct`, at member `path`."""
        address = self.known(symbol)
        if address is None or self.btf is None:
            return None
        try:
            return self.pointer(address + self.btf.offset(struct, path)) or None
        except BtfError:
            return None

    def code(self, function: str) -> list[tuple[int, int]]:
        """(address, instruction word) for the first words of `function`."""
        start = self.known(function)
        if start is None:
            return []
        at = start - self.base
        words = np.frombuffer(self.image[at : at + 4 * FUNCTION_LIMIT].tobytes(), "<u4").tolist()
        return [(start + 4 * k, word) for k, word in enumerate(words)]


def unexported(reader: Reader) -> dict[str, int]:
    """init_mm, swapper_pg_dir and rodata_full where the image shows them beyond doubt."""
    found: dict[str, int] = {}
    handed = _first_argument(reader, "__change_memory_common", "apply_to_page_range")
    active = reader.member("init_task", "task_struct", "active_mm")
    init_mm = {a for a in (handed, active) if a}
    if len(init_mm) == 1:
        found["init_mm"] = init_mm.pop()
        inner = Reader(reader.image, reader.base, found.get, reader.btf)
        swapper = inner.member("init_mm", "mm_struct", "pgd")
        if swapper:
            found["swapper_pg_dir"] = swapper
    rodata_full = _first_byte_loaded(reader, "can_set_direct_map")
    if rodata_full:
        found["rodata_full"] = rodata_full
    return found


def _first_argument(reader: Reader, function: str, callee: str) -> int | None:
    """What `adrp x0; add x0, x0` puts into x0 before `function` calls `callee`."""
    target = reader.known(callee)
    pages: dict[int, int] = {}
    x0 = None
    for pc, word in reader.code(function):
        if (page := _adrp(word, pc)) is not None:
            pages[word & 31] = page
        elif (added := _add(word)) and added[0] == 0 and added[1] in pages:
            x0 = pages[added[1]] + added[2]
        elif target and _bl(word, pc) == target:
            return x0
    return None


def _first_byte_loaded(reader: Reader, function: str) -> int | None:
    pages: dict[int, int] = {}
    for pc, word in reader.code(function):
        if (page := _adrp(word, pc)) is not None:
            pages[word & 31] = page
        elif word & 0xFFC0_0000 == 0x3940_0000 and (word >> 5 & 31) in pages:  # ldrb wt, [xn, #imm]
            return pages[word >> 5 & 31] + (word >> 10 & 0xFFF)
        elif word == 0xD65F_03C0:  # ret
            break
    return None


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


def _adrp(word: int, pc: int) -> int | None:
    if word & 0x9F00_0000 != 0x9000_0000:
        return None
    return (pc & ~0xFFF) + (_signed((word >> 5 & 0x7_FFFF) << 2 | word >> 29 & 3, 21) << 12)


def _add(word: int) -> tuple[int, int, int] | None:
    """(destination, source, immediate) of `add xd, xn, #imm`."""
    if word & 0xFFC0_0000 != 0x9100_0000:
        return None
    return word & 31, word >> 5 & 31, word >> 10 & 0xFFF


def _bl(word: int, pc: int) -> int | None:
    return pc + 4 * _signed(word & 0x3FF_FFFF, 26) if word & 0xFC00_0000 == 0x9400_0000 else None
