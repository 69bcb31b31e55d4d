"""mm/vmalloc.c as far as permission changes look at it: areas, the guard page behind each, and how one is found.

Rules of this file:
- `size` counts the guard page, as vm_struct's does; VM_NO_GUARD has none.
- A struct page is known by the PA of its page; `Kernel.page_address` gives the linear map's VA.
Sources: include/linux/vmalloc.h (struct vm_struct, the VM_ flags, get_vm_area_size), mm/vmalloc.c (find_vm_area).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING

from kernel_model.levels import U64

if TYPE_CHECKING:
    from kernel_model.mm import Kernel


class VmFlags(IntFlag):
    """vm_struct.flags, those that a permission change or the size of the area depends on."""

    VM_IOREMAP = 0x1
    VM_ALLOC = 0x2
    VM_MAP = 0x4
    VM_NO_GUARD = 0x40
    VM_FLUSH_RESET_PERMS = 0x100
    VM_ALLOW_HUGE_VMAP = 0x400


class PagesOverrun(LookupError):  # noqa: N818  what the kernel does
    """vm_struct.pages[] was read behind what is known of it: the kernel would use whatever is there as a page."""


@dataclass(frozen=True)
class VmStruct:
    """struct vm_struct: VA, bytes with the guard page, flags, and the PAs that its pages[] leads to.

    `pages` may go on behind the area's own pages: what the kernel finds there when it reads too far.
    `nr_pages`: by default all of `pages`.
    """

    addr: int
    size: int
    flags: int = VmFlags.VM_ALLOC
    pages: Sequence[int] = ()
    nr_pages: int = -1

    def __post_init__(self) -> None:
        if self.nr_pages < 0:
            object.__setattr__(self, "nr_pages", len(self.pages))

    @property
    def end(self) -> int:
        """The VA behind the guard page; 64 bits, may wrap to 0."""
        return self.addr + self.size & U64

    def page(self, index: int) -> int:
        """The PA of pages[index]; raises PagesOverrun behind what is known."""
        if index < len(self.pages):
            return self.pages[index]
        raise PagesOverrun(f"pages[{index}] of the area at {self.addr:#x}: {len(self.pages)} are known")


def get_vm_area_size(area: VmStruct, page_size: int) -> int:
    """get_vm_area_size(): bytes without the guard page."""
    return area.size if area.flags & VmFlags.VM_NO_GUARD else area.size - page_size


def find_vm_area(kernel: Kernel, addr: int) -> VmStruct | None:
    """find_vm_area(): the area that holds VA `addr`, its guard page included; None where there is none."""
    return next((area for area in kernel.vm_areas if area.addr <= addr < area.end), None)
