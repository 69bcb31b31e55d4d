"""mm/kfence/core.c: the pool of guarded pages, and what a fault in it means.

    page  0      1      2         3      4         5      ...
          guard  guard  object 0  guard  object 1  guard  ...

Rules of this file:
- Metadata is named by its index. The pool is where `Settings.kfence_pool` says; no pool is a NULL __kfence_pool.
- The page tables are changed by set_memory_valid, a page at a time. On arm64 nobody looks at what it returns: a page
  that could not be changed counts as changed.
- A report is an event, `Called("kfence_report_error", ...)`; whether the kernel goes on is for 7.x to say (`fault`).
Sources: that file, mm/kfence/kfence.h, include/linux/kfence.h and arch/arm64/include/asm/kfence.h of Debian 6.12.117,
6.12.95, 7.2.13 and 7.3.4; arch_kfence_init_pool is in arch/arm64/mm/mmu.c.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from kernel_model.levels import U64
from kernel_model.mm import Bug, Kernel
from kernel_model.pageattr import arm64_kfence_can_set_direct_map, set_memory_valid
from kernel_model.split import is_kfence_address, range_split_to_ptes

__all__ = ["arm64_kfence_can_set_direct_map", "is_kfence_address"]

NUM_OBJECTS = 255  # CONFIG_KFENCE_NUM_OBJECTS, the default and Debian's


class ObjectState(IntEnum):
    """enum kfence_object_state."""

    UNUSED = 0
    ALLOCATED = 1
    RCU_FREEING = 2
    FREED = 3


class ErrorType(IntEnum):
    """enum kfence_error_type."""

    OOB = 0
    UAF = 1
    CORRUPTION = 2
    INVALID = 3
    INVALID_FREE = 4


class Fault(IntEnum):
    """enum kfence_fault of 7.x: what a report does to the kernel, by kfence.fault= (NONE: nothing was reported)."""

    NONE = 0
    REPORT = 1
    OOPS = 2
    PANIC = 3


class Panic(Exception):  # noqa: N818  the kernel's name: panic() does not come back
    """The kernel would have called panic()."""


@dataclass
class Metadata:
    """What is judged of a struct kfence_metadata. `addr`: VA of the object, `size` its bytes. `unprotected_page`: the
    address of the last access that a guard was opened for, 0 for none."""

    state: ObjectState = ObjectState.UNUSED
    addr: int = 0
    size: int = 0
    unprotected_page: int = 0


@dataclass
class Kfence:
    """The variables of core.c. `freelist`: indexes of free objects, the next one first. `counters`: how much each of
    enum kfence_counter_id has gone up, by its name without the prefix."""

    kernel: Kernel
    num_objects: int = NUM_OBJECTS
    objects: list[Metadata] = field(default_factory=list)
    freelist: list[int] = field(default_factory=list)
    enabled: bool = True  # kfence_enabled
    disabled_by_warn: bool = False
    counters: Counter[str] = field(default_factory=Counter)
    fault: Fault = Fault.REPORT

    @property
    def pool(self) -> int:
        """__kfence_pool: a VA, 0 before there is a pool."""
        placed = self.kernel.settings.kfence_pool
        return placed[0] if placed else 0

    @property
    def page(self) -> int:
        """PAGE_SIZE."""
        return self.kernel.levels.page_size

    @property
    def stride(self) -> int:
        """Bytes from one object's page to the next one's: a page and its guard."""
        return 2 * self.page


def kfence_pool_size(num_objects: int, page_size: int) -> int:
    """KFENCE_POOL_SIZE in bytes: two pages more than the objects need, so that the first has a guard on its left."""
    return (num_objects + 1) * 2 * page_size


# between addresses and metadata


def addr_to_metadata(kfence: Kfence, addr: int) -> int | None:
    """addr_to_metadata(): the index of the object whose page or right guard VA `addr` is in; None for the first two
    pages and outside the pool, and for the first object while there is no metadata: a null pointer."""
    if not is_kfence_address(kfence.kernel, addr):
        return None
    index = (addr - kfence.pool) // kfence.stride - 1
    return index if (0 if kfence.objects else 1) <= index < kfence.num_objects else None


def metadata_to_pageaddr(kfence: Kfence, meta: int) -> int:
    """metadata_to_pageaddr(): VA of the object's page; 0, with a warning, for a wrong index or a wrong `addr` in it."""
    if KFENCE_WARN_ON(kfence, not 0 <= meta < kfence.num_objects, "metadata_to_pageaddr"):
        return 0
    pageaddr = kfence.pool + (meta + 1) * kfence.stride
    wrong = kfence.objects[meta].addr & -kfence.page != pageaddr
    return 0 if KFENCE_WARN_ON(kfence, wrong, "metadata_to_pageaddr") else pageaddr


def KFENCE_WARN_ON(kfence: Kfence, condition: bool, function: str) -> bool:
    """KFENCE_WARN_ON(): a WARN that also turns KFENCE off, since its own state is broken. Returns `condition`."""
    if condition:
        kfence.kernel.warn(function)
        kfence.enabled, kfence.disabled_by_warn = False, True
    return condition


def kfence_obj_allocated(meta: Metadata) -> bool:
    """kfence_obj_allocated(): also between kfree() and the end of an RCU grace period."""
    return meta.state in (ObjectState.ALLOCATED, ObjectState.RCU_FREEING)


# pages


def kfence_protect_page(kernel: Kernel, addr: int, protect: bool) -> bool:
    """kfence_protect_page() of arm64: always true."""
    set_memory_valid(kernel, addr, 1, not protect)
    return True


def kfence_protect(kfence: Kfence, addr: int) -> bool:
    """kfence_protect(): no access to the page of `addr` from now on."""
    return kfence_protect_page(kfence.kernel, addr & -kfence.page & U64, True)


def kfence_unprotect(kfence: Kfence, addr: int) -> bool:
    """kfence_unprotect(): the page of `addr` may be accessed."""
    return kfence_protect_page(kfence.kernel, addr & -kfence.page & U64, False)


def kfence_init_pool(kfence: Kfence, get_random_u32_below: Callable[[int], int]) -> int:
    """kfence_init_pool(): guards from left to right, then the free list in random order. Returns 0, or the VA from
    which on the pool is not protected."""
    addr = kfence.pool
    if not arch_kfence_init_pool(kfence):
        return addr
    for _ in range(2):
        kfence_protect(kfence, addr)
        addr += kfence.page
    first = addr
    kfence.objects = [Metadata(addr=first + i * kfence.stride) for i in range(kfence.num_objects)]
    for _ in kfence.objects:
        kfence_protect(kfence, addr + kfence.page)
        addr += kfence.stride
    kfence.freelist = _shuffled(kfence.num_objects, get_random_u32_below)
    return 0


def _shuffled(count: int, get_random_u32_below: Callable[[int], int]) -> list[int]:
    """From the last place to the first, each is exchanged with one that is not behind it."""
    order = list(range(count))
    for i in range(count, 0, -1):
        other = get_random_u32_below(i)
        order[i - 1], order[other] = order[other], order[i - 1]
    return order


def arch_kfence_init_pool(kfence: Kfence) -> bool:
    """arch_kfence_init_pool(): the pool is mapped by pages. 7.x splits it now where nothing did so at boot."""
    kernel = kfence.kernel
    if not kernel.variant.kfence_splits_pool or _force_pte_mapping(kernel) or kernel.settings.kfence_early:
        return True
    kernel.called("mutex_lock")
    size = kfence_pool_size(kfence.num_objects, kfence.page)
    ret = range_split_to_ptes(kernel, kfence.pool, kfence.pool + size)
    kernel.called("mutex_unlock")
    return ret == 0


def _force_pte_mapping(kernel: Kernel) -> bool:
    """force_pte_mapping() of arch/arm64/mm/mmu.c."""
    settings = kernel.settings
    if settings.debug_pagealloc:
        return True
    if settings.supports_bbml:
        return False
    return settings.rodata_full or arm64_kfence_can_set_direct_map(kernel) or settings.realm


# faults


def kfence_handle_page_fault(kfence: Kfence, addr: int, *, is_write: bool) -> bool:
    """kfence_handle_page_fault(): true if the access to VA `addr`, which faulted, is to be made again.

    Raises Bug or Panic where a report ends the kernel (`Kfence.fault`, 7.x).
    """
    if not is_kfence_address(kfence.kernel, addr):
        return False
    if not kfence.enabled:
        return kfence_unprotect(kfence, addr)
    kfence.counters["BUGS"] += 1
    guard = (addr - kfence.pool) // kfence.page % 2
    meta = _neighbour(kfence, addr) if guard else addr_to_metadata(kfence, addr)
    error = ErrorType.INVALID if meta is None else ErrorType.OOB if guard else ErrorType.UAF
    if meta is not None and (guard or kfence.kernel.variant.kfence_fault):
        kfence.objects[meta].unprotected_page = addr if guard else 0
    kfence.kernel.called("kfence_report_error", addr, is_write, -1 if meta is None else meta, error)
    kfence_handle_fault(kfence)
    return kfence_unprotect(kfence, addr)


def _neighbour(kfence: Kfence, addr: int) -> int | None:
    """Whose guard was hit: the allocated object that is nearer, the left one where both are as near.

    The distance to the left is an int there, and is compared as an unsigned long: an object that reaches into its
    guard is at a negative distance, which counts as far away.
    """
    left, right = (_allocated_at(kfence, addr + by & U64) for by in (-kfence.page, kfence.page))
    if left is None or right is None:
        return right if left is None else left
    before, behind = kfence.objects[left], kfence.objects[right]
    distance = _int_as_unsigned_long(addr - (before.addr + before.size))
    return right if distance > (behind.addr - addr & U64) else left


def _allocated_at(kfence: Kfence, addr: int) -> int | None:
    meta = addr_to_metadata(kfence, addr)
    return meta if meta is not None and kfence_obj_allocated(kfence.objects[meta]) else None


_INT_SIGN = 1 << 31


def _int_as_unsigned_long(value: int) -> int:
    return ((value & 2 * _INT_SIGN - 1) ^ _INT_SIGN) - _INT_SIGN & U64


def kfence_handle_fault(kfence: Kfence) -> None:
    """kfence_handle_fault() of 7.x: raises Bug for an oops, Panic for a panic, which turns KFENCE off first."""
    if not kfence.kernel.variant.kfence_fault:
        return
    if kfence.fault is Fault.OOPS:
        raise Bug("kfence_handle_fault")
    if kfence.fault is Fault.PANIC:
        kfence.enabled = False
        raise Panic("kfence.fault=panic")


# freeing


def kfence_guarded_free(kfence: Kfence, addr: int, meta: int, *, zombie: bool) -> None:
    """kfence_guarded_free(), without init_on_free: a guard that a report has opened is emptied and closed, then the
    object's own page is closed. `zombie`: the object outlives its cache and is not to be used again.

    Raises Bug or Panic as kfence_handle_page_fault does, for an object that is not allocated at VA `addr`.
    """
    kernel, found = kfence.kernel, kfence.objects[meta]
    if not kfence_obj_allocated(found) or found.addr != addr:
        kfence.counters["BUGS"] += 1
        kernel.called("kfence_report_error", addr, False, meta, ErrorType.INVALID_FREE)
        return kfence_handle_fault(kfence)
    if found.unprotected_page:
        kernel.called("memzero_explicit", found.unprotected_page & -kfence.page & U64, kfence.page)
        kfence_protect(kfence, found.unprotected_page)
        found.unprotected_page = 0
    kernel.called("metadata_update_state", meta, ObjectState.FREED)
    found.state = ObjectState.FREED
    kernel.called("check_canary", meta)
    kfence_protect(kfence, addr)
    if zombie:
        kfence.counters["ZOMBIES"] += 1
        return None
    kfence.freelist.append(meta)
    kfence.counters.update(ALLOCATED=-1, FREES=1)
    return None
