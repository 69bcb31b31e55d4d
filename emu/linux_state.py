"""What a Linux kernel in memory says about itself: variables by symbol, members by BTF, the list of vmalloc areas.

Rules of this file:
- Everything is asked of the kernel that runs; what it does not tell is `Unknown`, with a sentence.
- Lists in RAM are followed for `MOST` steps: memory may hold anything.
Sources: mm/vmalloc.c (vmap_nodes, before 6.9 vmap_area_list), include/linux/vmalloc.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from emu.btf import BtfError
from emu.context import Regions, regions
from emu.image import KernelImage
from pgtable import NoMemory, translate
from pgtable.audit_places import Subject
from pgtable.bits import Flags, Words
from pgtable.listing import Listing, Runs
from pgtable.memory import TableMemory

MOST = 1 << 16  # areas of a list
_U64 = (1 << 64) - 1

# vm_struct.flags
VM_DMA_COHERENT, VM_NO_GUARD = 0x10, 0x40


class Area(NamedTuple):
    """A vmalloc area. `addr`: its VA; `size`: bytes, with the guard page unless VM_NO_GUARD is in `flags`."""

    addr: int
    size: int
    flags: int


class Unknown(LookupError):  # noqa: N818  what happened: this kernel does not tell
    """The kernel does not say what a rule needs; the message says what."""


@dataclass(frozen=True)
class Kernel:
    """A Linux kernel in memory: `image` with symbols at run-time addresses, `subject` its tables as audited."""

    image: KernelImage
    memory: TableMemory
    subject: Subject

    @property
    def rows(self) -> Runs:
        """What can be accessed, in VA order."""
        return self.subject.rows

    @property
    def listing(self) -> Listing:
        """All that is mapped."""
        return self.subject.listing

    def word(self, va: int, size: int = 8) -> int:
        """The little-endian word of `size` bytes at `va`. Raises Unknown where nothing is mapped."""
        walk = translate(self.memory, self.listing.regs, va, regime=self.listing.regime)
        try:
            raw = self.memory.fetch(walk.pa & -8) if walk.ok else None
        except NoMemory:
            raw = None
        if raw is None:
            raise Unknown(f"the kernel's memory at {va:#x} is not there")
        return raw >> 8 * (va & 7) & (1 << 8 * size) - 1

    def value(self, name: str, size: int = 8) -> int:
        """The variable `name`. Raises Unknown for one without a symbol."""
        if name not in self.image.symbols:
            raise Unknown(f"this kernel has no symbol {name}")
        return self.word(self.image.symbols[name], size)

    def offset(self, type: str, member: str) -> int:
        """offsetof(type, member). Raises Unknown."""
        try:
            return self.image.btf.offset(type, member)
        except BtfError as error:
            raise Unknown(str(error)) from None

    @cached_property
    def pool(self) -> int:
        """__kfence_pool; 0 before KFENCE has started. Raises Unknown for a kernel without KFENCE."""
        return self.value("__kfence_pool")

    @cached_property
    def regions(self) -> Regions:
        """Which address belongs to what. Raises Unknown."""
        upper = [tree.params for tree in self.listing.trees if tree.params.upper]
        if not upper:
            raise Unknown("the upper half is off")
        pool = self.pool if "__kfence_pool" in self.image.symbols else 0
        try:
            return regions(self.image, 0, upper[0].ia_bits, pool)
        except BtfError as error:
            raise Unknown(str(error)) from None

    def within(self, *names: str) -> Flags:
        """The rows that begin in regions of these names."""
        starts = np.array(self.regions.starts, np.uint64)
        wanted = np.array([name in names for name in self.regions.names])
        at = np.searchsorted(starts, self.rows.va, side="right") - 1
        return wanted[np.maximum(at, 0)] & (at >= 0)

    def mapped(self, vas: Words) -> Flags:
        """Whether each VA is in a row."""
        if not len(self.rows.va):
            return np.zeros(len(vas), bool)
        at = np.maximum(np.searchsorted(self.rows.va, vas, side="right") - 1, 0)
        return vas - self.rows.va[at] < self.rows.size[at]

    @cached_property
    def areas(self) -> list[Area]:
        """The vmalloc areas that have a vm_struct. Raises Unknown."""
        found = []
        link, vm = self.offset("vmap_area", "list"), self.offset("vmap_area", "vm")
        members = [self.offset("vm_struct", name) for name in ("addr", "size", "flags")]
        for head in self._heads():
            for at in self._links(head):
                struct = self.word(at - link + vm & _U64)
                if struct:
                    found.append(Area(*(self.word(struct + offset) for offset in members)))
        return found

    def _links(self, head: int) -> Iterator[int]:
        """The entries of a list. Raises Unknown for one without an end."""
        at = self.word(head)
        for _ in range(MOST):
            if at == head:
                return
            yield at
            at = self.word(at)
        raise Unknown(f"the list at {head:#x} has no end")

    def _heads(self) -> Iterator[int]:
        """The list heads of areas in use: one of each node, or a single list."""
        if "vmap_nodes" in self.image.symbols:
            base, size = self.value("vmap_nodes"), self.image.btf.size("vmap_node")
            if not base:
                raise Unknown("vmalloc has not started")
            inside = self.offset("vmap_node", "busy.head")
            yield from (base + i * size + inside for i in range(min(self.value("nr_vmap_nodes", 4), MOST)))
        else:
            yield self._area_list()

    def _area_list(self) -> int:
        """vmap_area_list, which VMCOREINFO names where the symbols do not."""
        from emu.sources.vmcoreinfo import find

        if "vmap_area_list" in self.image.symbols:
            return self.image.symbols["vmap_area_list"]
        info = find(self.memory)
        if info is None or "vmap_area_list" not in info.symbols:
            raise Unknown("this kernel does not say where its list of vmalloc areas is")
        return info.symbols["vmap_area_list"]
