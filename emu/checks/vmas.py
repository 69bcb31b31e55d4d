"""A user mm with its vmas in the guest's memory: mm_struct, vm_area_struct and what hangs on a hugetlb vma.

Every member is where this kernel's BTF has it; lock words are set so that each lock is really held as a case says.
What is outside the walk is a stub: find_vma, the tree of a file's vmas, the hugetlb lock, taking a vma's lock, and the
splitting of huge pages, whose effect a case decides.

Rules of this file:
- All objects are in one block of memory that is written anew for each case: nothing is left from an earlier one.
- A stub notes `Called` under the name and with the arguments that the model uses; what it stores is no event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from emu.check import ALLOCATORS
from emu.checks.world import World
from emu.coldboot import STRUCT_PAGE
from emu.machine import Machine
from kernel_model.mm import READER_BIAS, Called, Kernel, Mm, Rwsem, Vma, WordMemory

VM_PFNMAP, VM_HUGETLB = 0x400, 0x400000  # include/linux/mm.h
LOCK_SEQUENCE = 6  # mm_lock_seq, and vm_lock_seq of a vma that is locked for writing
SPLITS = ("__split_huge_pud", "__split_huge_pmd")
TREES = ("vma_interval_tree_iter", "mapping_rmap_tree_iter")  # names of the iterator over a file's vmas
SILENT = (
    *("hugetlb_vma_lock_read", "hugetlb_vma_unlock_read", "preempt_schedule", "up_write"),
    *("lruvec_stat_mod_folio", "mod_node_page_state", "pagetable_free"),
)
CHAIN = (("file", "f_inode"), ("inode", "i_sb"), ("super_block", "s_fs_info"), ("hugetlbfs_sb_info", "hstate"))
VMAS = 4
SIZE = 0x6000  # bytes of the block
RECORD = 0x200  # bytes for one vma with its lock
ROOM = 64 << 14  # bytes of the page pool that a case may take
HUGE = 0x1000  # bytes for the objects behind one size of hugetlb page


class Area(NamedTuple):
    """One vma; see kernel_model.mm.Vma."""

    start: int
    end: int
    huge_size: int = 0
    pfnmap: bool = False
    pgoff: int = 0
    locked: str = ""


@dataclass(frozen=True)
class Space:
    """The mm of a case. `count`: of its mmap lock. `splits`: what calls of __split_huge_* store to the entry, in
    order, None: nothing; 0 once they run out. `has_mm`: the vmas belong to it. `pages`: what the allocator has left."""

    areas: tuple[Area, ...]
    count: int = 1
    splits: tuple[int | None, ...] = ()
    has_mm: bool = True
    pages: int | None = None


class Objects:
    """The structures of a user mm in one world, and the stubs that answer for it."""

    def __init__(self, world: World) -> None:
        self.world = world
        pool, size = world.plan.user_pool
        self._pa = pool + size // 2
        self.base = world.linear(self._pa)
        self._sequence = world.own.locks.has_walk_lock
        self._refcnt = world.image.btf.has("vm_area_struct", "vm_refcnt")
        self._lock = world.image.btf.has("vma_lock", "lock")
        self._struct_pages = [self._struct_pages_of(*pages) for pages in (world.arena, (world.plan.pages[0], ROOM))]
        self.huge_sizes = _huge_sizes(world)
        self._static = bytes(self._huge_objects())
        self.space, self._active = Space(()), False
        self._split = self._given = 0
        self._set_up_stubs()

    def forget(self) -> None:
        """The stubs answer for no case any more; the allocator has all pages."""
        self.space, self._active = Space(()), False

    # ---- addresses

    @property
    def mm(self) -> int:
        """VA of the mm_struct."""
        return self.base

    @property
    def mapping(self) -> int:
        """VA of the address_space that the vmas map."""
        return self.base + 0xC00

    @property
    def other(self) -> int:
        """VA of room for a structure of the caller's."""
        return self.base + 0xE00

    def vma(self, index: int) -> int:
        """VA of a vm_area_struct."""
        return self.base + 0x1000 + RECORD * index

    def _huge(self, size: int) -> int:
        return 0x2000 + HUGE * self.huge_sizes.index(size)

    def _struct_pages_of(self, pa: int, size: int) -> NDArray[np.uint64]:
        """The struct pages of some RAM, in which the locks of page tables are."""
        plan = self.world.plan
        first = (pa - plan.ram[0]) // plan.page_size * STRUCT_PAGE
        return self.world.machine.memory.words(plan.vmemmap_pa + first, size // plan.page_size * STRUCT_PAGE // 8)

    # ---- objects

    def _huge_objects(self) -> bytearray:
        """For each size: file, inode, super_block, hugetlbfs_sb_info and hstate, each as far as it is read."""
        block = bytearray(SIZE)
        for size in self.huge_sizes:
            at = self._huge(size)
            places = [at, at + 0x200, at + 0x500, at + 0xA00, at + 0xA80]
            for i, (struct, member) in enumerate(CHAIN):
                self._put(block, places[i], struct, member, self.base + places[i + 1])
            self._put(block, places[4], "hstate", "mask", -size)
            self._put(block, places[4], "hstate", "order", (size // self.world.levels.page_size).bit_length() - 1, 4)
        return block

    def _put(self, block: bytearray, at: int, struct: str, member: str, value: int, size: int = 8) -> None:
        at += self.world.offset(struct, member)
        block[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def write(self, space: Space) -> None:
        """Puts the mm of a case into the guest; nothing is called or split yet."""
        world = self.world
        self.space, self._active, self._split, self._given = space, True, 0, 0
        block = bytearray(self._static)
        self._put(block, 0, "mm_struct", "pgd", world.linear(world.root))
        if self._sequence:
            self._put(block, 0, "mm_struct", "mm_lock_seq", LOCK_SEQUENCE, 4)
        for i, area in enumerate(space.areas):
            self._write_area(block, self.vma(i) - self.base, area)
        world.machine.memory.write(self._pa, bytes(block))
        for struct_pages in self._struct_pages:
            struct_pages[:] = 0
        world.set_lock(self.mm + world.offset("mm_struct", "mmap_lock"), Rwsem(space.count))
        for i, area in enumerate(space.areas):
            if self._lock:
                world.set_lock(self._vma_lock(i), Rwsem(READER_BIAS * (area.locked == "read")))
        # The need_resched word is inverted: 0 would have preempt_enable() schedule.
        world.store(world.plan.task + world.offset("thread_info", "preempt.count"), 1 << 32)

    def _write_area(self, block: bytearray, at: int, area: Area) -> None:
        put = self._put
        flags = VM_PFNMAP * area.pfnmap | VM_HUGETLB * bool(area.huge_size)
        put(block, at, "vm_area_struct", "vm_start", area.start)
        put(block, at, "vm_area_struct", "vm_end", area.end)
        put(block, at, "vm_area_struct", "vm_mm", self.mm if self.space.has_mm else 0)
        put(block, at, "vm_area_struct", "vm_flags", flags)
        put(block, at, "vm_area_struct", "vm_pgoff", area.pgoff)
        if area.huge_size:
            put(block, at, "vm_area_struct", "vm_file", self.base + self._huge(area.huge_size))
        if self._sequence:
            sequence = LOCK_SEQUENCE - 2 * (area.locked != "write")
            put(block, at, "vm_area_struct", "vm_lock_seq", sequence, 4)
        if self._refcnt:
            put(block, at, "vm_area_struct", "vm_refcnt", 1 + (area.locked == "read"), 4)
        if self._lock:
            put(block, at, "vm_area_struct", "vm_lock", self.base + at + 0x100)

    def _vma_lock(self, index: int) -> int:
        return self.vma(index) + 0x100 + self.world.offset("vma_lock", "lock")

    # ---- stubs

    def _set_up_stubs(self) -> None:
        stub = self.world.stub
        stub("find_vma", lambda m: self._first(lambda area: m.argument(1) < area.end))
        for tree in TREES:
            stub(f"{tree}_first", lambda m: self._in_file(0, m.argument(1), m.argument(2)))
            stub(f"{tree}_next", lambda m: self._in_file(self._index(m.argument(0)) + 1, m.argument(1), m.argument(2)))
        for name in SPLITS:
            stub(name, self._splitter(name))
        stub("__vma_start_write", lambda m: self._start_write(m.argument(0)))
        for name in ALLOCATORS:
            stub(name, self._allocate)
        stub("__sync_icache_dcache", lambda m: self._called("__sync_icache_dcache", m.argument(0)))
        stub("__contpte_try_fold", lambda m: self._called("__contpte_try_fold", self._pte(m), m.argument(1)))
        for name in SILENT:
            stub(name, lambda _: 0)
        if self._lock:
            stub("down_write", self._down_write)

    def _called(self, name: str, *args: int) -> int:
        if self._active:
            self.world.note(Called(name, args))
        return 0

    def _pte(self, machine: Machine) -> int:
        return self.world.physical(machine.argument(2))

    def _index(self, vma: int) -> int:
        return (vma - self.vma(0)) // RECORD

    def _first(self, wanted: Callable[[Area], bool], start: int = 0) -> int:
        found = (i for i, area in enumerate(self.space.areas) if i >= start and wanted(area))
        return next((self.vma(i) for i in found), 0)

    def _in_file(self, start: int, first: int, last: int) -> int:
        page = self.world.levels.page_size
        return self._first(lambda area: maps(area, page, first, last), start)

    def _start_write(self, vma: int) -> int:
        """__vma_start_write(), or what 6.12 has inline: the vma is then locked."""
        self.world.note(Called("__vma_start_write"))
        at = vma + self.world.offset("vm_area_struct", "vm_lock_seq")
        self.world.store(at, LOCK_SEQUENCE, 4)
        return 0

    def _allocate(self, machine: Machine) -> int:
        self._given += 1
        if self.space.pages is not None and self._given > self.space.pages:
            return 0
        return self.world.give(machine)

    def _down_write(self, machine: Machine) -> int:
        """down_write() of a vma's lock in vma_start_write() of 6.12; any other is free."""
        vma = machine.argument(0) & -RECORD
        return self._start_write(vma) if 0 <= vma - self.vma(0) < RECORD * VMAS else 0

    def _splitter(self, name: str) -> Callable[[Machine], int]:
        def split(machine: Machine) -> int:
            entry = self.world.physical(machine.argument(1))
            self.world.note(Called(name, (entry, machine.argument(2))))
            self._split += 1
            self._store(machine.memory, self._split - 1, entry)
            return 0

        return split

    def _store(self, memory: WordMemory, count: int, entry: int) -> None:
        """What call number `count` of a split does to the entry."""
        word = self.space.splits[count] if count < len(self.space.splits) else 0
        arena, size = self.world.arena
        if word is not None and 0 <= entry - arena < size:
            memory.store(entry, word)

    # ---- the model's side

    def model(self, kernel: Kernel) -> Mm:
        """The same mm for the model, with what stands for the splits."""
        space, count = self.space, 0

        def split(entry: int, addr: int) -> int:
            nonlocal count
            count += 1
            self._store(kernel.memory, count - 1, entry)
            return 0

        kernel.allocate = _at_most(kernel.allocate, space.pages)
        kernel.table_flags = self.world.made.tables.fmt.table(2).pack(PXNTable=1, AF=int(kernel.variant.walks))
        kernel.outside.update(dict.fromkeys(SPLITS, split))
        mm = Mm(self.world.root, Rwsem(space.count))
        mm.vmas = [Vma(mm if space.has_mm else None, *area) for area in space.areas]
        return mm


def _at_most(allocate: Callable[[], int | None], pages: int | None) -> Callable[[], int | None]:
    given = 0

    def limited() -> int | None:
        nonlocal given
        given += 1
        return allocate() if pages is None or given <= pages else None

    return limited


def maps(area: Area, page: int, first: int, last: int) -> bool:
    """Whether a vma maps one of the page offsets `first` to `last` of its file, as the tree of vmas finds it."""
    return area.pgoff <= last and first <= area.pgoff + (area.end - area.start) // page - 1


def _huge_sizes(world: World) -> tuple[int, ...]:
    """Bytes of each hugetlb page size of the granule (arch/arm64/mm/hugetlbpage.c)."""
    levels = world.levels
    top = (levels.pud.size,) if levels.page_shift == 12 else ()
    return (levels.contiguous["PTE"], levels.pmd.size, levels.contiguous["PMD"], *top)


@lru_cache(maxsize=1)
def objects_of(world: World) -> Objects:
    """The structures in `world`: made once for the cases that follow each other."""
    return Objects(world)
