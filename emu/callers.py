"""Who calls a function of a compiled kernel, and where its address is taken: one scan of the image for each question.

Rules of this file:
- A call is a branch to the function's first instruction; one by register is not seen, but where the register may have
  its value from is: words of data, and pairs of ADRP and ADD in code.
- Only code is searched for instructions: from `_text` to `_etext`, and the init text.
- Lists that the linker makes of all functions are no evidence that anybody calls one, and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from emu.branches import FORMS, LINK, B, sites
from emu.image import KernelImage
from emu.relocate import R_AARCH64_RELATIVE

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]

CALL, TAIL, CONDITIONAL, JUMP = "call", "tail call", "conditional tail call", "jump"
POINTER, RELATIVE, CODE = "pointer", "relative", "code"


class Site(NamedTuple):
    """One place: its link-time `address`, the same as symbol+offset, and what is there.

    `kind` of a branch: "call" (BL), "tail call" (B), "conditional tail call" (B.cond, CBZ, TBZ), or "jump" for one
    inside the function itself. Of an address: "pointer" (64 bits), "relative" (32 bits, counted from their own
    place), "code" (ADRP and ADD, or ADR).
    """

    address: int
    place: str
    kind: str

    @property
    def function(self) -> str:
        """The symbol that `place` is in."""
        return self.place.partition("+")[0]


class Callers(NamedTuple):
    """All of a function: its `address`, the branches to it and where its address is taken, each in address order."""

    address: int
    calls: tuple[Site, ...]
    pointers: tuple[Site, ...]


def find(image: KernelImage, function: str | int) -> Callers:
    """Who calls `function`, a symbol or a link-time address. Raises SymbolError for a name that is not there or not
    one, ValueError for an address outside the image."""
    address = image.symbols[function] if isinstance(function, str) else function
    if not image.base <= address < image.base + image.size:
        raise ValueError(
            f"{address:#x}: outside {image.name}, which is {image.base:#x} to {image.base + image.size:#x}"
        )
    code = code_ranges(image)
    calls = [site for start, end in code for site in _branches(image, start, end, address)]
    taken = [Site(at, image.symbols.describe(at), kind) for at, kind in _taken(image, code, address)]
    return Callers(address, tuple(calls), tuple(sorted(taken)))


def code_ranges(image: KernelImage) -> list[tuple[int, int]]:
    """(first address, address behind) of the image's code; all of the image where symbols do not tell."""
    symbols = image.symbols
    end = image.base + len(image.data)
    spans = [(image.base, symbols.get("_etext", end))]
    if "_sinittext" in symbols:
        behind = symbols.get("__exittext_end") or symbols.get("_einittext", end)
        spans.append((symbols["_sinittext"], behind))
    return spans


def words_of(image: KernelImage, start: int, end: int) -> U32:
    """The instructions at link-time addresses [start, end), uint32."""
    return np.frombuffer(image.data.data, "<u4", (end - start) // 4, start - image.base)


# branches


def _branches(image: KernelImage, start: int, end: int, address: int) -> Iterator[Site]:
    words = words_of(image, start, end)
    found = [(int(i), form) for form in FORMS for i in sites(words, form, (address - start) // 4)]
    for i, form in sorted(found):
        site = image.symbols.at(start + 4 * i)
        own = site is not None and start + 4 * i - site.offset == address
        yield Site(start + 4 * i, image.symbols.describe(start + 4 * i), _kind(int(words[i]), form is B, own))


def _kind(word: int, plain: bool, own: bool) -> str:
    if plain and word & LINK:
        return CALL
    if own:
        return JUMP
    return TAIL if plain else CONDITIONAL


# addresses


def _taken(image: KernelImage, code: list[tuple[int, int]], address: int) -> Iterator[tuple[int, str]]:
    """(place, kind) wherever the address is in data, or made by code."""
    for start, end in code:
        made = _made(words_of(image, start, end), start - image.base, address - image.base)
        yield from ((start + 4 * i, CODE) for i in made)
    for at in _pointers(image, code, address):
        yield at, POINTER
    for at in _relatives(image, address):
        if not any(start <= at < end for start, end in code):
            yield at, RELATIVE


def _pointers(image: KernelImage, code: list[tuple[int, int]], address: int) -> list[int]:
    words: U64 = np.frombuffer(image.data.data, "<u8", len(image.data) // 8)
    found = np.flatnonzero(words == address).tolist()
    return [image.base + 8 * k for k in found if not _is_row(words, k) and not _is_listed(words, k, code)]


def _is_row(words: U64, k: int) -> bool:
    """The addend of a relocation, which is the same pointer once more."""
    return k >= 2 and int(words[k - 1]) == R_AARCH64_RELATIVE


_LISTED = 64  # words looked at on either side


def _is_listed(words: U64, k: int, code: list[tuple[int, int]]) -> bool:
    """In a list of all functions, as ftrace has: only pointers to code around, and most greater than the one before.

    No structure of functions is that long and has its members in the order of the code.
    """
    near = words[max(0, k - _LISTED) : k + _LISTED + 1]
    in_code = np.any([(near >= start) & (near < end) for start, end in code], axis=0)
    return len(near) > _LISTED and bool(in_code.all()) and float((near[1:] > near[:-1]).mean()) > 0.8


def _relatives(image: KernelImage, address: int) -> list[int]:
    """32-bit words that give the distance from their own place (exports, initcalls, the exception table)."""
    words = words_of(image, image.base, image.base + len(image.data) // 4 * 4)
    here = np.arange(0, 4 * len(words), 4, dtype=np.uint32)
    here += words
    found = (4 * np.flatnonzero(here == address - image.base)).tolist()
    names = _kallsyms(image)
    return [at for at in (image.base + offset for offset in found) if at not in names]


def _kallsyms(image: KernelImage) -> range:
    """The table of all symbols, which 7.x counts from their own place."""
    if "kallsyms_offsets" not in image.symbols:
        return range(0)
    start = image.symbols["kallsyms_offsets"]
    return range(start, start + image.symbols.size_of("kallsyms_offsets"))


# ADRP, ADR and ADD (immediate), Arm ARM C4.1, "PC-rel. addressing" and "Add/subtract (immediate)"
_ADR, _ADRP, _PC_RELATIVE = 0x1000_0000, 0x9000_0000, 0x9F00_0000
_ADD, _ADD_MASK = 0x9100_0000, 0xFFC0_0000
_WITHIN = 16  # instructions between ADRP and its ADD


def _made(words: U32, first: int, offset: int) -> list[int]:
    """Indexes of the ADRP or ADR that begin to make `offset` from `_text` in a register; `words` begin at `first`."""
    adr = np.flatnonzero((words & np.uint32(_PC_RELATIVE)) == _ADR)
    near = adr[first + 4 * adr + _immediate(words[adr]) == offset]
    adrp = np.flatnonzero((words & np.uint32(_PC_RELATIVE)) == _ADRP)
    begun = adrp[(first + 4 * adrp >> 12) + _immediate(words[adrp]) == offset >> 12]  # _text is at a page's start
    return sorted([*near.tolist(), *(i for i in begun.tolist() if _is_completed(words, i, offset & 0xFFF))])


def _immediate(words: U32) -> NDArray[np.int64]:
    """The signed 21-bit immediate of ADR and ADRP."""
    wide = words.astype(np.int64)
    value = (wide >> 5 & (1 << 19) - 1) << 2 | wide >> 29 & 3
    return value - (value >> 20 << 21)


def _is_completed(words: U32, i: int, low: int) -> bool:
    """An ADD of `low` to the register of the ADRP at index `i` follows before another ADRP takes that register."""
    register = int(words[i]) & 31
    for word in words[i + 1 : i + 1 + _WITHIN].tolist():
        if word & _PC_RELATIVE == _ADRP and word & 31 == register:
            return False
        if word & _ADD_MASK == _ADD and word >> 5 & 31 == register and word >> 10 & 0xFFF == low:
            return True
    return False
