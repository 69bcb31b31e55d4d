"""Any source's tables as Linux's own dump would show them: kernel_model.ptdump over the source's memory.

Rules of this file: the source is never written; what the kernel would clear is cleared in an overlay. What a build is
(levels, markers, which variant) comes from the kernel image where the source has one, else from the registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kernel_model import ptdump
from kernel_model.levels import U64, Levels
from kernel_model.mm import Kernel
from kernel_model.names import Bits
from kernel_model.ptdump_text import AddrMarker, address_markers, fixaddr_top, text
from kernel_model.variants import Variant, detect
from pgtable import Memory, NoMemory, Registers, WalkParams, translate
from pgtable.tree import halves

if TYPE_CHECKING:
    from emu.image import KernelImage

MIB = 1 << 20


class Overlay:
    """Memory that can be written while what is below stays as it is. `words`: PA and word of what was written."""

    def __init__(self, below: Memory) -> None:
        self.below = below
        self.written: dict[int, int] = {}

    def fetch(self, pa: int) -> int:
        """The word at `pa`; raises NoMemory."""
        found = self.written.get(pa)
        return self.below.fetch(pa) if found is None else found

    def store(self, pa: int, word: int) -> None:
        """Writes the word at `pa` here only."""
        self.written[pa] = word


class LinuxTables:
    """The upper half of a source's tables, as a Linux kernel of that build sees it.

    Raises ValueError where the upper half is off.
    """

    def __init__(self, memory: Memory, regs: Registers, image: KernelImage | None, variant: Variant) -> None:
        found = [p for p in halves(regs) if p.upper]
        if not found:
            raise ValueError("the upper half is off: there are no kernel tables")
        self.memory, self.regs, self.image, self.params = memory, regs, image, found[0]
        self.levels = levels_of(self.params, image)
        ng = bool(self._word(self._symbol("arm64_use_ng_mappings")) & 1)
        self.bits = Bits.of(self.params.fmt, variant, ng_mappings=ng)
        self.own_markers = self._own_markers()
        self.markers = address_markers(self.levels, variant, self._fixmap_start())

    @classmethod
    def of(cls, memory: Memory, regs: Registers, image: KernelImage) -> LinuxTables:
        """With everything from the kernel's image, whose symbols are where the kernel runs."""
        return cls(memory, regs, image, detect(image.symbols, image.btf.has))

    def kernel(self) -> Kernel:
        """A kernel whose init_mm has these tables, on an overlay of its own."""
        return Kernel(Overlay(self.memory), self.params.base, self.levels, self.bits)

    def text(self) -> str:
        """/sys/kernel/debug/kernel_page_tables. Raises Runaway where the kernel's dump has no end."""
        state = ptdump.ptdump_state(self.kernel(), self.markers, base=self.params.half_base)
        ptdump.ptdump_walk_pgd(state, self.params.half_base, state.end_address)
        return text(state.notes, self.bits, self.levels)

    def _symbol(self, name: str) -> int:
        symbols: Mapping[str, int] = self.image.symbols if self.image else {}
        return symbols.get(name, 0)

    def _word(self, va: int) -> int:
        """Eight bytes at `va`; 0 for VA 0 and for what is not mapped."""
        walk = translate(self.memory, self.regs, va & -8)
        if not va or not walk.ok:
            return 0
        try:
            return self.memory.fetch(walk.pa) >> va % 8 * 8
        except NoMemory:
            return 0

    def _own_markers(self) -> tuple[AddrMarker, ...]:
        """The kernel's address_markers[] as it is in RAM; () without such a symbol, or where it was not filled yet."""
        at, image = marker_table(self.image) if self.image else 0, self.image
        rows: list[AddrMarker] = []
        while at and image and len(rows) < _MOST and (not rows or rows[-1].start_address != U64):
            start = self._word(at + image.btf.offset("addr_marker", "start_address"))
            name = self._word(at + image.btf.offset("addr_marker", "name"))
            rows.append(AddrMarker(start, self._string(name) if name else ""))
            at += image.btf.size("addr_marker")
        return tuple(rows) if rows and rows[-1].start_address == U64 else ()

    def _string(self, va: int) -> str:
        data = b""
        while b"\0" not in data and len(data) < 256:
            data += self._word(va + len(data) & -8).to_bytes(8, "little")[(va + len(data)) % 8 :]
        return data.split(b"\0")[0].decode("latin-1")

    def _fixmap_start(self) -> int:
        """From the kernel's own table, which is all that says it; else 4 MiB below the top."""
        ours = fixaddr_top(self.levels, self.bits.variant) - 4 * MIB
        return next((m.start_address for m in self.own_markers if m.name == "Fixmap start"), ours)


_MOST = 64  # rows of a marker table


def levels_of(params: WalkParams, image: KernelImage | None) -> Levels:
    """The levels of a build: the image's; without one, of a build for the VA size that runs."""
    va_bits, granule = params.ia_bits, params.fmt.granule
    if image is None:
        count = -(-(va_bits - granule.page_shift) // granule.stride)
        return Levels(granule.page_shift, count, va_bits, va_bits)
    layout = image.layout
    return Levels(layout.page_shift, layout.levels, layout.va_bits, va_bits)


def marker_table(image: KernelImage) -> int | None:
    """The VA of the kernel's own address_markers[]; None where it has no such symbol."""
    found = [s for s in image.symbols if s == "address_markers" or s.startswith("address_markers.")]
    return image.symbols[found[0]] if found else None
