"""Code that a booted kernel has patched and a cold image has not: alternatives of CPU features, and static keys.

A `Patch` is a word of code with the feature on and off. They are read from the image's own tables: __alt_instructions
(arch/arm64/include/asm/alternative.h) with the descriptions of arm64_features, and __jump_table.

Rules of this file:
- Alternatives are found by what the kernel calls the feature, never by number.
- Only sites inside the functions that are asked for, and only replacements that are one branch or no-ops, are known:
  that is how the kernel asks whether it has a feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emu.image import KernelImage
from emu.machine import Machine

NOP, B, B_MASK, IMM26 = 0xD503201F, 0x14000000, 0xFC000000, 0x03FFFFFF
JUMP_ENTRY = np.dtype([("code", "<i4"), ("target", "<i4"), ("key", "<i8")])
ALT_INSTR = np.dtype([("orig", "<i4"), ("alt", "<i4"), ("cap", "<u2"), ("orig_len", "u1"), ("alt_len", "u1")])
CALLBACK = 0x8000  # in `cap`: `alt` is a function that makes the replacement
NOPS = "alt_cb_patch_nops"
ALWAYS = "has_always"  # what matches the capabilities that stand for boot CPU and system being known


class Patch(NamedTuple):
    """One instruction: its address, and what it is with the feature on and off."""

    at: int
    on: int
    off: int


def static_key(image: KernelImage, key: str, functions: Sequence[str]) -> list[Patch]:
    """The branches of a static key inside `functions`; [] for a kernel without it.

    Members of struct jump_entry are relative to themselves; bit 0 of the key: the branch is taken while it is false.
    """
    if key not in image.symbols:
        return []
    at, rows = _table(image, "__start___jump_table", "__stop___jump_table", JUMP_ENTRY)
    mine = np.flatnonzero((rows["key"] & ~3) + 16 * np.arange(len(rows)) == image.symbols[key] - at - 8)
    ranges = _ranges(image, functions)
    found = []
    for i in mine.tolist():
        code, target = at + 16 * i + int(rows["code"][i]), at + 16 * i + 4 + int(rows["target"][i])
        words = _branch(code, target), NOP
        if any(start <= code < end for start, end in ranges):
            found.append(Patch(code, *(words[::-1] if rows["key"][i] & 1 else words)))
    return found


def alternatives(image: KernelImage, capability: int | None, functions: Sequence[str]) -> list[Patch]:
    """The sites of a capability inside `functions`; [] for None."""
    if capability is None or "__alt_instructions" not in image.symbols:
        return []
    at, rows = _table(image, "__alt_instructions", "__alt_instructions_end", ALT_INSTR)
    ranges = _ranges(image, functions)
    found: list[Patch] = []
    for i in np.flatnonzero((rows["cap"] & CALLBACK - 1) == capability).tolist():
        orig = at + 12 * i + int(rows["orig"][i])
        if any(start <= orig < end for start, end in ranges):
            found += _alternative(image, orig, at + 12 * i + 4 + int(rows["alt"][i]), rows[i])
    return found


def capability(image: KernelImage, description: str) -> int | None:
    """The number of the feature whose description begins so, or of the last that always matches ("has_always")."""
    numbers = [number for text, matches, number in _features(image) if (text or matches).startswith(description)]
    return max(numbers, default=None)


def ensure(machine: Machine, patches: Sequence[Patch], on: bool) -> None:
    """Makes the code what it is with the feature on or off, if it is not."""
    assert machine.image
    changed = False
    for at, with_it, without in patches:
        pa, word = at - machine.image.base + machine.plan.image_pa, (with_it if on else without).to_bytes(4, "little")
        if machine.memory.read(pa, 4) != word:
            machine.memory.write(pa, word)
            changed = True
    if changed:
        machine.cpu.flush_code()


def _alternative(image: KernelImage, orig: int, alt: int, row: Any) -> Iterator[Patch]:
    if row["cap"] & CALLBACK:
        if alt in image.symbols.all(NOPS):
            for at in range(orig, orig + int(row["orig_len"]), 4):
                yield Patch(at, NOP, _word(image, at))
        return
    word = _word(image, alt)
    if row["orig_len"] == 4 and word & B_MASK == B:
        offset = (word & IMM26) - (IMM26 + 1 if word >> 25 & 1 else 0)
        yield Patch(orig, _branch(orig, alt + 4 * offset), _word(image, orig))


def _features(image: KernelImage) -> Iterator[tuple[str, str, int]]:
    """(description, name of the matching function, number) of arm64_features."""
    btf, struct = image.btf, "arm64_cpu_capabilities"
    size = btf.size(struct)
    at = image.symbols["arm64_features"]
    while matches := _word(image, at + btf.offset(struct, "matches"), 8):
        text = _word(image, at + btf.offset(struct, "desc"), 8)
        name = image.data[text - image.base :][:80].tobytes().split(b"\0")[0].decode("latin-1") if text else ""
        yield name, str(image.symbols.at(matches)), _word(image, at + btf.offset(struct, "capability"), 2)
        at += size


def _table(image: KernelImage, start: str, end: str, row: np.dtype[Any]) -> tuple[int, NDArray[Any]]:
    at = image.symbols[start]
    return at, np.frombuffer(image.data[at - image.base : image.symbols[end] - image.base].tobytes(), row)


def find_words(image: KernelImage, word: int, free: int, functions: Sequence[str]) -> list[int]:
    """Addresses of an instruction inside `functions`; bits in `free` may be any."""
    found = []
    for start, end in _ranges(image, functions):
        words = np.frombuffer(image.data[start - image.base : end - image.base].tobytes(), "<u4")
        found += [start + 4 * i for i in np.flatnonzero(words & (2**32 - 1 ^ free) == word).tolist()]
    return found


def _ranges(image: KernelImage, functions: Sequence[str]) -> list[tuple[int, int]]:
    """Start and end of every function of these names, and of the parts that the compiler made of it."""
    symbols = image.symbols
    names = [each for name in functions for each in (name, *symbols.variants(name))]
    return [(at, at + _size(image, at)) for name in names for at in symbols.all(name)]


def _size(image: KernelImage, address: int) -> int:
    """Bytes to the next symbol."""
    addresses = image.symbols.entries.addresses
    k = int(np.searchsorted(addresses, np.uint64(address), side="right"))
    return int(addresses[k]) - address if k < len(addresses) else 0


def _branch(at: int, target: int) -> int:
    return B | (target - at >> 2) & IMM26


def _word(image: KernelImage, at: int, size: int = 4) -> int:
    return int.from_bytes(image.data[at - image.base : at - image.base + size].tobytes(), "little")
