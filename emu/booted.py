"""What to look at around a call on a booted kernel: all that its tables map, an area and its alias, KFENCE's pool.

    area = VmArea.allocate(machine, 6)
    before = mapped(machine)
    machine.call("set_memory_ro", area.addr, 2).ok()
    for va in changed(before, mapped(machine)):
        print(area.name(va))                    # "page 0", "alias of page 0" ...

Rules of this file:
- What the kernel has is asked of the kernel: its functions, its variables, its BTF. What it ought to do is not here.
- Nothing is kept: a value is as it was when it was asked for.
Sources: include/linux/vmalloc.h (struct vm_struct), mm/kfence/kfence.h and core.c (struct kfence_metadata, the pool).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from emu.types import Value
from emu.warm import WarmMachine
from pgtable.bits import Words
from pgtable.leaves import Leaves, leaves

OBJECTS = 255  # CONFIG_KFENCE_NUM_OBJECTS, the default and Debian's
GFP_KERNEL = 0xCC0


def mapped(machine: WarmMachine) -> Leaves:
    """Every valid block and page of both halves as it is now."""
    return leaves(machine.memory, machine.registers())


def changed(before: Leaves, after: Leaves) -> dict[int, tuple[int, int]]:
    """The leaves that differ, by VA in ascending order: the descriptors before and after, 0 for none."""
    va = np.union1d(before.va, after.va)
    old, new = _words(before, va), _words(after, va)
    differ = old != new
    pairs = zip(old[differ].tolist(), new[differ].tolist(), strict=True)
    return dict(zip(va[differ].tolist(), pairs, strict=True))


def _words(found: Leaves, va: Words) -> Words:
    """The descriptor of the leaf that begins at each VA, 0 for none."""
    at = np.minimum(np.searchsorted(found.va, va), len(found.va) - 1)
    return np.where(found.va[at] == va, found.word[at], np.uint64(0))


def word_at(machine: WarmMachine, va: int) -> int:
    """The descriptor at which a walk of `va` ends, also an invalid one."""
    return machine.translate(va).steps[-1].word


@dataclass(frozen=True)
class VmArea:
    """A vmalloc area. `addr`: its VA; `size`: bytes with the guard page; `flags`: vm_struct.flags; `linear`: for each
    of its pages, the VA in the linear map; `struct`: the VA of its vm_struct; `page`: bytes."""

    addr: int
    size: int
    flags: int
    linear: tuple[int, ...]
    struct: int
    page: int

    @classmethod
    def at(cls, machine: WarmMachine, va: int) -> VmArea:
        """The area that find_vm_area() finds, all of whose pages are valid. Raises LookupError where there is none."""
        struct = machine.call("find_vm_area", va, record="nothing").ok().value
        if not struct:
            raise LookupError(f"find_vm_area({va:#x}) finds nothing")
        found, page = machine.types["vm_struct"].at(struct), machine.plan.page_size
        addr, size, flags, count = (_number(found, name) for name in ("addr", "size", "flags", "nr_pages"))
        pas = [machine.translate(addr + i * page).pa for i in range(count)]
        return cls(addr, size, flags, tuple(map(machine.plan.linear_va, pas)), struct, page)

    @classmethod
    def allocate(cls, machine: WarmMachine, pages: int) -> VmArea:
        """A new area of that many pages, from vmalloc(). Raises LookupError where the kernel has no room."""
        return cls.at(machine, machine.call("vmalloc", pages * machine.plan.page_size).ok().value)

    def va(self, index: int) -> int:
        """The VA of a page; the one behind the last is the guard page."""
        return self.addr + index * self.page

    def vas(self, first: int = 0, count: int | None = None) -> set[int]:
        """The VAs of `count` of its pages (default: the rest)."""
        return {self.va(i) for i in range(first, len(self.linear) if count is None else first + count)}

    def aliases(self, first: int = 0, count: int | None = None) -> set[int]:
        """The linear map's VAs of `count` of its pages (default: the rest)."""
        return set(self.linear[first : None if count is None else first + count])

    def name(self, va: int) -> str:
        """What a page's VA is to this area: "page 0", "guard page", "alias of page 0"; else the VA in hex."""
        if va in self.linear:
            return f"alias of page {self.linear.index(va)}"
        index = (va - self.addr) // self.page
        if not 0 <= va - self.addr < self.size:
            return f"{va:#x}"
        return f"page {index}" if index < len(self.linear) else "guard page"


class KfenceReport(NamedTuple):
    """A call of kfence_report_error(). `type`: enum kfence_error_type; `object`: its index, None for none; `pc`:
    where the access was made (of struct pt_regs), 0 if KFENCE was not told."""

    addr: int
    is_write: bool
    pc: int
    object: int | None
    type: int


class KfencePool:
    """The pool of a kernel that booted with KFENCE started (kfence.sample_interval=100).

    `va`: __kfence_pool; `size`: bytes; `page`: bytes. Raises SymbolError for a kernel without KFENCE, ValueError for
    one where it has not started.
    """

    def __init__(self, machine: WarmMachine, objects: int = OBJECTS) -> None:
        self.machine = machine
        self.objects = objects
        self.page = machine.plan.page_size
        self.va = machine.word_at(machine.symbol("__kfence_pool"), 8)
        self.size = 2 * (objects + 1) * self.page
        if not self.va or not machine.word_at(machine.symbol("kfence_enabled"), 1):
            raise ValueError("KFENCE has not started: boot with kfence.sample_interval=100")
        self._metadata = machine.word_at(machine.symbol("kfence_metadata"), 8)
        self._type = machine.types["kfence_metadata"]

    def metadata(self, index: int) -> Value:
        """The struct kfence_metadata of an object."""
        return self._type.at(self._metadata + index * self._type.size)

    def state(self, index: int) -> int:
        """The enum kfence_object_state of an object."""
        return _number(self.metadata(index), "state")

    def object_page(self, index: int) -> int:
        """The VA of the page that an object lies in; -1 for the first page of the pool."""
        return self.va + 2 * (index + 1) * self.page

    def guard(self, index: int) -> int:
        """The VA of the guard page on the right of an object; -1 for the one on the left of the first."""
        return self.object_page(index) + self.page

    def index(self, va: int) -> int:
        """Whose page or right guard `va` is in; -1 for the first two pages of the pool."""
        return (va - self.va) // (2 * self.page) - 1

    def allocate(self, size: int) -> int:
        """An object of `size` bytes, made by __kfence_alloc() for a cache of kmalloc(). 0 if KFENCE declines."""
        machine = self.machine
        machine.write(machine.symbol("kfence_allocation_gate"), bytes(4))
        cache = machine.word_at(machine.symbol("kmalloc_caches") + 8 * (size - 1).bit_length(), 8)
        return machine.call("__kfence_alloc", cache, size, GFP_KERNEL, record="nothing").ok().value

    @contextmanager
    def reports(self) -> Iterator[list[KfenceReport]]:
        """What KFENCE reports from now on, as a list that grows; the kernel's own report is made all the same."""
        found: list[KfenceReport] = []

        def note(_: int) -> bool:
            found.append(self._reported())
            return True

        cpu, at = self.machine.cpu, self.machine.symbol("kfence_report_error")
        handle = cpu.on_code(note, at, at)
        cpu.flush_code()
        try:
            yield found
        finally:
            cpu.remove(handle)
            cpu.flush_code()

    def _reported(self) -> KfenceReport:
        addr, is_write, regs, meta, type = (self.machine.argument(n) for n in range(5))
        pc = _number(self.machine.types["pt_regs"].at(regs), "pc") if regs else 0
        object = (meta - self._metadata) // self._type.size if meta else None
        return KfenceReport(addr, bool(is_write & 1), pc, object, type & 0xFFFF_FFFF)


def _number(value: Value, name: str) -> int:
    member = value[name]
    assert isinstance(member, int)
    return member
