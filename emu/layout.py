"""How a kernel was built to lay out its address space: page size, levels, VA bits; from evidence in its image.

    page size       Image header, flags bits 2:1
    VA_BITS_MIN     the link address: modules start at -2^(VA_BITS_MIN - 1), the kernel 128 MiB or 2 GiB above
    PGTABLE_LEVELS  a level folded at compile time has no type of its own: p4d_t, pud_t, pmd_t then hold the level
                    above (include/asm-generic/pgtable-nop4d.h); without BTF: whether __p4d_alloc and so on exist
    VA_BITS         the one configuration with these three; where two are left (64K pages: 48 or 52), the
                    PAGE_OFFSET that the code itself uses in `orr x, x, #PAGE_OFFSET` (__phys_to_virt)

Source: arch/arm64/Kconfig (PGTABLE_LEVELS), arch/arm64/include/asm/memory.h and pgtable-hwdef.h.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emu.btf import Btf, BtfError

U8 = NDArray[np.uint8]

_TOP = 1 << 64
_LEVELS = ("pmd", "pud", "p4d")  # optional levels, from the leaf up
_LARGE_VA = 52


class LayoutError(ValueError):
    """The image does not tell how its address space is laid out."""


@dataclass(frozen=True)
class KernelLayout:
    """The compile-time layout, in the names of Linux.

    `va_bits` is CONFIG_ARM64_VA_BITS and `va_bits_min` what the kernel falls back to on hardware without LVA or
    LPA2; `levels` is CONFIG_PGTABLE_LEVELS. `page_offset` is PAGE_OFFSET for `va_bits`, `page_end` where the
    linear map must end (a kernel with KASAN ends it below that), `kimage_vaddr` the link address of `_text`.
    """

    page_shift: int
    va_bits: int
    va_bits_min: int
    levels: int
    page_offset: int
    page_end: int
    kimage_vaddr: int

    @property
    def page_size(self) -> int:
        """PAGE_SIZE in bytes."""
        return 1 << self.page_shift

    @property
    def pgdir_shift(self) -> int:
        """PGDIR_SHIFT."""
        return self._shift(self.levels)

    @property
    def p4d_shift(self) -> int:
        """P4D_SHIFT; PGDIR_SHIFT where the level is folded."""
        return self._shift(min(self.levels, 4))

    @property
    def pud_shift(self) -> int:
        """PUD_SHIFT; PGDIR_SHIFT where the level is folded."""
        return self._shift(min(self.levels, 3))

    @property
    def pmd_shift(self) -> int:
        """PMD_SHIFT; PGDIR_SHIFT where the level is folded."""
        return self._shift(min(self.levels, 2))

    def _shift(self, levels: int) -> int:
        """Bits below the index of a table that is `levels` tables high (ARM64_HW_PGTABLE_LEVEL_SHIFT)."""
        return (self.page_shift - 3) * levels + 3


def derive(image: U8, base: int, page_shift: int | None, btf: Btf | None, names: Container[str]) -> KernelLayout:
    """The layout of `image` (uint8), linked at `base`, whose symbols are `names`. Raises LayoutError."""
    if page_shift is None:
        raise LayoutError("its header does not tell the page size")
    va_bits_min = (_TOP - base).bit_length() + 1
    levels = _levels(btf, names)
    va_bits = _va_bits(image, base, page_shift, levels, va_bits_min)
    page_offset, page_end = _TOP - (1 << va_bits), _TOP - (1 << va_bits_min - 1)
    return KernelLayout(page_shift, va_bits, va_bits_min, levels, page_offset, page_end, base)


def _levels(btf: Btf | None, names: Container[str]) -> int:
    try:
        own = [_has_own_type(btf, level) for level in _LEVELS] if btf else []
    except BtfError:
        own = []
    own = own or [f"__{level}_alloc" in names for level in _LEVELS]
    return 2 + sum(own)


def _has_own_type(btf: Btf, level: str) -> bool:
    return [m.name for m in btf.members(f"{level}_t")] == [level]


def _va_bits(image: U8, base: int, page_shift: int, levels: int, va_bits_min: int) -> int:
    # 52 bits fall back to 47 with 16K pages, else to 48.
    falls_back_to = 47 if page_shift == 14 else 48
    possible = [va_bits_min, _LARGE_VA] if va_bits_min == falls_back_to else [va_bits_min]
    fitting = [bits for bits in possible if levels_for(bits, page_shift) == levels]
    if not fitting:
        raise LayoutError(f"{levels} levels of {1 << page_shift}-byte pages do not go with a link address of {base:#x}")
    return max(fitting, key=lambda bits: count_page_offset(image, bits)) if len(fitting) > 1 else fitting[0]


def levels_for(va_bits: int, page_shift: int) -> int:
    """How many levels of tables translate `va_bits` (ARM64_HW_PGTABLE_LEVELS)."""
    return (va_bits - 4) // (page_shift - 3)


def count_page_offset(image: U8, va_bits: int) -> int:
    """How many instructions `orr xd, xn, #-2^va_bits` are in `image` (uint8)."""
    ones = 64 - va_bits  # a logical immediate: `ones` ones, rotated right by as many
    orr = 0xB240_0000 | ones << 16 | ones - 1 << 10
    words = np.frombuffer(image.data, "<u4", len(image) // 4)
    return int(np.count_nonzero(words & 0xFFFF_FC00 == orr))
