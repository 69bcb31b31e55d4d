"""VMCOREINFO: what a running Linux says about itself for whoever reads its memory later.

It is the text of a note in kdump's ELF files and /proc/kcore, and it lies in the RAM of every kernel with
CONFIG_VMCORE_INFO: a page of its own, and a copy inside the note that a crash kernel would be given.
Sources: kernel/vmcore_info.c (crash_core.c before 6.9), arch/arm64/kernel/vmcore_info.c;
Documentation/admin-guide/kdump/vmcoreinfo.rst.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from emu.coldboot import LINUX_MAIR
from emu.sources.errors import SourceError
from emu.sources.ram import Scannable, scannable
from pgtable.memory import NoMemory, TableMemory
from pgtable.registers import PA_BITS, TCR_EL1, TTBR, TTBR_52, Registers

NOTE = "VMCOREINFO"
FIRST = b"OSRELEASE="
LONGEST = 8192
_START = np.uint64(int.from_bytes(FIRST[:8], "little"))
_TEXT = re.compile(rb"OSRELEASE=\d[^\0]*?\nPAGESIZE=\d+\n[^\0]*")
_U64 = (1 << 64) - 1
_TG = {4096: (0, 2), 16384: (2, 1), 65536: (1, 3)}  # TG0, TG1


@dataclass(frozen=True)
class VmcoreInfo:
    """The lines KEY=VALUE of one VMCOREINFO."""

    rows: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> VmcoreInfo:
        """From the text; lines without `=` are left out."""
        pairs = (line.partition("=") for line in text.rstrip("\0").splitlines())
        return cls({key: value for key, equals, value in pairs if equals})

    @property
    def release(self) -> str:
        """The kernel's release, as uname says it."""
        return self.rows.get("OSRELEASE", "")

    @property
    def page_size(self) -> int:
        """Bytes of a page."""
        return self._integer("PAGESIZE", "4096", 10)

    @property
    def kaslr_offset(self) -> int:
        """How far above its link address the kernel runs."""
        return self._integer("KERNELOFFSET", "0", 16)

    @cached_property
    def symbols(self) -> dict[str, int]:
        """Run-time addresses of the symbols that it names."""
        names = [key for key in self.rows if key.startswith("SYMBOL(") and key.endswith(")")]
        return {key[7:-1]: self._integer(key, "0", 16) & _U64 for key in names}

    def number(self, name: str) -> int | None:
        """`NUMBER(name)`, modulo 2^64; None where it is not there."""
        key = f"NUMBER({name})"
        return self._integer(key, "0", 0) & _U64 if key in self.rows else None

    def _integer(self, key: str, default: str, base: int) -> int:
        value = self.rows.get(key, default)
        try:
            return int(value, base)
        except ValueError:
            raise SourceError(f"the VMCOREINFO says {key}={value[:40]!r}, which is no number") from None

    def _bits(self, name: str) -> int | None:
        """`NUMBER(name)`, an amount of VA bits."""
        value = self.number(name)
        if value is not None and not 16 <= value <= 64:
            raise SourceError(f"the VMCOREINFO says {name}={value}, which is no size of an address")
        return value

    @property
    def va_bits(self) -> int | None:
        """The VA bits that this boot runs with (T1SZ), else those it was built for; None where it says neither."""
        size = self.number("TCR_EL1_T1SZ")
        return self._bits("VA_BITS") if size is None else 64 - (size & 63)

    @property
    def root(self) -> int | None:
        """The PA of swapper_pg_dir; None where the text does not tell."""
        va, offset = self.symbols.get("swapper_pg_dir"), self.number("kimage_voffset")
        return None if va is None or offset is None else va - offset & _U64

    def linear_pa(self, va: int) -> int | None:
        """The PA of a linear map address; None for another one, or where the text does not tell.

        The linear map is the lower half of the kernel's addresses, as built (VA_BITS), from PHYS_OFFSET on.
        """
        built, start = self._bits("VA_BITS"), self.number("PHYS_OFFSET")
        if built is None or start is None or not (1 << 64) - (1 << built) <= va < (1 << 64) - (1 << built - 1):
            return None
        return (va - ((1 << 64) - (1 << built)) + start) & _U64

    def registers(self) -> Registers:
        """The registers of this kernel's own half, with Linux's MAIR; its lower half is off (EPD0), nobody knows it.

        Raises SourceError where the text lacks what is needed.
        """
        root, bits = self.root, self.va_bits
        if root is None or bits is None or self.page_size not in _TG:
            needed = "swapper_pg_dir, kimage_voffset and VA_BITS of an arm64 kernel are needed"
            raise SourceError(f"the VMCOREINFO of {self.release or 'this kernel'} does not say enough: {needed}")
        try:
            return linux_registers(root, self.page_size, bits, wide=self.number("MAX_PHYSMEM_BITS") == 52)
        except ValueError as error:
            raise SourceError(f"the VMCOREINFO of {self.release or 'this kernel'} makes no sense: {error}") from None


def linux_registers(root: int, page_size: int, va_bits: int, *, wide: bool = False, upper: bool = True) -> Registers:
    """Registers of an arm64 Linux whose tables of the upper (else lower) half begin at PA `root`; the other is off.

    `wide`: output addresses of 52 bits with 64 KiB pages.
    """
    ds = va_bits > 48 and page_size != 65536
    ips = PA_BITS.index(52 if ds or (wide and page_size == 65536) else 48)
    tg0, tg1 = _TG[page_size]
    shared = {"SH0": 3, "SH1": 3, "IRGN0": 1, "ORGN0": 1, "IRGN1": 1, "ORGN1": 1}
    size = 64 - va_bits
    tcr = TCR_EL1.pack(
        T0SZ=size, T1SZ=size, TG0=tg0, TG1=tg1, IPS=ips, EPD0=int(upper), EPD1=int(not upper), DS=int(ds), **shared
    )
    ttbr = TTBR_52 if PA_BITS[ips] == 52 else TTBR
    name = "TTBR1_EL1" if upper else "TTBR0_EL1"
    return Registers(None, TCR_EL1=tcr, MAIR_EL1=LINUX_MAIR, **{name: ttbr.pack(BADDR=root)})


def find(ram: TableMemory) -> VmcoreInfo | None:
    """The VMCOREINFO of a kernel whose RAM this is; None where there is none. Reads all of RAM."""
    memory = scannable(ram)
    for pa, words in memory.chunks():
        for at in np.flatnonzero(words == _START).tolist():
            text = _text(memory, pa + 8 * at)
            if text:
                return VmcoreInfo.parse(text)
    return None


def _text(memory: Scannable, pa: int) -> str | None:
    """The text at `pa`, if it is one and names this kernel's tables."""
    size = LONGEST
    while size:
        try:
            match = _TEXT.match(memory.words(pa, size // 8).tobytes())
        except NoMemory:
            size //= 2
            continue
        text = match.group().decode("latin-1") if match else ""
        return text if "SYMBOL(swapper_pg_dir)" in text else None
    return None
