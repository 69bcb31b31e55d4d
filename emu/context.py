"""What a booted kernel is doing where it was stopped, and what of its address space an address belongs to.

Rules of this file:
- The context is what the kernel itself goes by: preempt_count of the current task, DAIF, system_state.
- KFENCE's pool is as large as with its default number of objects, which is Debian's; no symbol tells it.
Sources: include/linux/preempt.h, arch/arm64/include/asm/memory.h, include/asm-generic/sections.h.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container
from dataclasses import dataclass
from enum import Enum

from emu.image import KernelImage
from kernel_model.kfence import NUM_OBJECTS, kfence_pool_size
from kernel_model.levels import Levels
from kernel_model.ptdump_text import MIB, address_markers, fixaddr_top, page_offset
from kernel_model.variants import detect

_IRQ_OFF = 1 << 7  # PSTATE.I
_U64 = (1 << 64) - 1


class Context(Enum):
    """What a function was called in, the strictest first; only in the last it may sleep."""

    NMI = "NMI"
    HARDIRQ = "hardirq"
    SOFTIRQ = "softirq"
    BOOTING = "before init"
    IRQS_OFF = "irqs off"
    BH_OFF = "BH off"
    PREEMPTION_OFF = "preemption off"
    PROCESS = "process"


_BITS = 0xF  # of the count of hard interrupts, and of that of NMIs above
_SERVING_SOFTIRQ, _BH_DISABLED, _PREEMPTION = 0x0100, 0xFE00, 0x00FF  # disabling counts by twos


def hardirq_shift(symbols: Container[str]) -> int:
    """Where preempt_count counts hard interrupts: from bit 16 on or, where it also counts how often interrupts have
    been disabled, above that."""
    return 24 if "local_interrupt_disable_state" in symbols else 16


def context(preempt_count: int, pstate: int, *, hardirq: int, booting: bool) -> Context:
    """What a task with that preempt_count is in; `hardirq`: hardirq_shift() of the kernel; `booting`: system_state is
    SYSTEM_BOOTING."""
    asked = (
        (preempt_count & _BITS << hardirq + 4, Context.NMI),
        (preempt_count & _BITS << hardirq, Context.HARDIRQ),
        (preempt_count & _SERVING_SOFTIRQ, Context.SOFTIRQ),
        (booting, Context.BOOTING),
        (pstate & _IRQ_OFF, Context.IRQS_OFF),
        (preempt_count & _BH_DISABLED, Context.BH_OFF),
        (preempt_count & _PREEMPTION, Context.PREEMPTION_OFF),
    )
    return next((found for is_so, found in asked if is_so), Context.PROCESS)


# regions


@dataclass(frozen=True)
class Regions:
    """Where addresses are: `starts` in ascending order, each with the name of what begins there; `kfence`: the pool,
    (0, 0) for none. The linear map begins at `linear`, its struct pages of `struct_page` bytes at `vmemmap`."""

    starts: tuple[int, ...]
    names: tuple[str, ...]
    kfence: tuple[int, int]
    linear: int
    vmemmap: int
    struct_page: int
    page_size: int

    def of(self, va: int) -> str:
        """The name of the region that `va` is in."""
        if self.kfence[0] <= va < self.kfence[1]:
            return "KFENCE pool"
        at = bisect_right(self.starts, va) - 1
        return self.names[at] if at >= 0 else "user"

    def address(self, page: int) -> int:
        """page_address(): where the linear map has the page of a struct page."""
        return self.linear + (page - self.vmemmap) // self.struct_page * self.page_size & _U64


# Where parts of the image begin; what a kernel's symbols do not tell belongs to the part before.
SECTIONS = {
    "_text": "kernel text",
    "_etext": "kernel rodata",
    "__init_begin": "kernel init",
    "_sdata": "kernel data",
    "__bss_start": "kernel bss",
    "_end": "vmalloc",
}
AREAS = {
    "Linear Mapping start": "linear map",
    "Modules start": "modules",
    "vmalloc() area": "vmalloc",
    "Fixmap start": "fixmap",
    "PCI I/O start": "PCI I/O",
    "vmemmap start": "vmemmap",
}


def regions(image: KernelImage, offset: int, va_bits: int, kfence: int) -> Regions:
    """The regions of a kernel that runs `offset` above its link address with `va_bits`; `kfence`: __kfence_pool."""
    layout, variant = image.layout, detect(image.symbols, image.btf.has)
    levels = Levels(layout.page_shift, layout.levels, layout.va_bits, va_bits)
    # Only a kernel with ptdump in debugfs says where fixmap starts; nothing else is in the 8 MiB below its end.
    markers = address_markers(levels, variant, fixaddr_top(levels, variant) - 8 * MIB)
    starts = {mark.start_address: "a gap" for mark in markers}
    starts |= {mark.start_address: AREAS[mark.name] for mark in markers if mark.name in AREAS}
    starts |= {image.symbols[name] + offset: title for name, title in SECTIONS.items() if name in image.symbols}
    if "_sdata" not in image.symbols and "__init_begin" in image.symbols:
        starts[image.symbols["__init_begin"] + offset] = "kernel init or data"
    rows = sorted(starts.items())
    return Regions(
        starts=tuple(start for start, _ in rows),
        names=tuple(name for _, name in rows),
        kfence=(kfence, kfence + kfence_pool_size(NUM_OBJECTS, layout.page_size) if kfence else 0),
        linear=page_offset(va_bits),
        vmemmap=next(mark.start_address for mark in markers if mark.name == "vmemmap start"),
        struct_page=image.btf.size("page"),
        page_size=layout.page_size,
    )
