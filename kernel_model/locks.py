"""The lock rules of mm/pagewalk.c as tables: what each entry point looks at, in its order, and what becomes of it.

A kernel variant has one `Locks` row. Its `entries` say which checks an entry point makes, in order; `mm_lock` and
`vma_lock` are process_mm_walk_lock() and process_vma_walk_lock(); `effects` says what a failed assertion does in a
kernel as Debian builds it (no lockdep, no DEBUG_VM) and in a debug build. An entry point that is not in `entries`
does not exist in that kernel.

Rules of this file:
- A `Check` either refuses (-EINVAL) or asserts (and the walk goes on); nothing else decides about locks.
- Shipped kernels can only ask whether *somebody* holds a lock; lockdep asks whether the caller does.
Sources: mm/pagewalk.c, mm/internal.h, include/linux/mmap_lock.h and rwsem.h of Debian 6.1.176, 6.12.95, 6.12.107,
7.2.13, 7.3.4; the thread's variants are in thread.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum


class WalkLock(IntEnum):
    """enum page_walk_lock. The thread's NOLOCK was to have the value that VMA_RDLOCK_VERIFY has today."""

    RDLOCK = 0
    WRLOCK = 1
    WRLOCK_VERIFY = 2
    THIRD = 3  # VMA_RDLOCK_VERIFY in 7.x, NOLOCK in the thread, nothing elsewhere


class Check(Enum):
    """A question that an entry point asks; its text is what refuses, or what is asserted."""

    EMPTY = "start >= end: -EINVAL"
    NO_MM = "no mm: -EINVAL"
    OUTSIDE_VMA = "range not inside the vma: -EINVAL"
    INSTALL = "install_pte is set: -EINVAL"
    NOLOCK_REFUSED = "walk_lock is NOLOCK: -EINVAL"
    NOT_INIT_MM = "NOLOCK and mm is not init_mm: -EINVAL"
    NOT_VMALLOC = "NOLOCK and start is neither a vmalloc nor a module address: -EINVAL"
    MM_LOCK = "mm's lock as walk_lock asks (process_mm_walk_lock)"
    VMA_LOCK = "the vma's lock as walk_lock asks (process_vma_walk_lock)"
    MM_READ = "mm is locked"
    MM_WRITE = "mm is write-locked"
    INIT_READ = "init_mm is locked"
    INIT_WRITE = "init_mm is write-locked"
    NOVMA = "init_mm: locked; another mm: write-locked"
    NOVMA_UNLESS_NOLOCK = "unless NOLOCK: init_mm locked, another mm write-locked"
    NOVMA_REVIEWED = "init_mm: locked unless NOLOCK; another mm: write-locked"
    INIT_UNLESS_NOLOCK = "unless NOLOCK: init_mm is locked"
    I_MMAP = "i_mmap_rwsem is held (lockdep only)"


class Need(Enum):
    """What walk_lock asks of a lock."""

    NOTHING = "nothing"
    READ = "held"
    WRITE = "held for writing"
    TAKE = "taken for writing (vma_start_write)"
    REFUSE = "-EINVAL"
    WARN = "WARN_ON_ONCE(vma)"


class Effect(Enum):
    """What a failed assertion does."""

    NOTHING = "proceeds"
    WARN = "WARN, proceeds"
    BUG = "assertion fails: BUG"


class Config(Enum):
    """How the kernel was built."""

    SHIPPED = "as Debian ships it"
    DEBUG = "CONFIG_DEBUG_VM and lockdep"


@dataclass(frozen=True)
class Locks:
    """The rules of one variant; see the module. `third`: what walk_lock 3 is called.

    `no_vma_asserts`: with DEBUG_VM, each place that looks at walk->vma asserts that the walk is not NOLOCK.
    `walk_test_in_page_vma`: walk_page_vma() asks walk_page_test(). `debug_walks_kernel`: walk_page_range_debug() of
    init_mm is walk_kernel_page_table_range(). `vmap_trylock`: a huge vmap() takes a read trylock of init_mm's lock
    before it frees a table (vmap_try_huge_pmd).
    """

    entries: Mapping[str, tuple[Check, ...]]
    mm_lock: Mapping[WalkLock, Need]
    vma_lock: Mapping[WalkLock, Need]
    effects: Mapping[Config, Effect]
    third: str = ""
    no_vma_asserts: bool = False
    walk_test_in_page_vma: bool = False
    debug_walks_kernel: bool = False
    vmap_trylock: bool = False

    @property
    def has_walk_lock(self) -> bool:
        """struct mm_walk_ops has the member."""
        return bool(self.mm_lock)

    def is_nolock(self, walk_lock: int) -> bool:
        """`walk_lock` is the thread's PGWALK_NOLOCK."""
        return self.third == "NOLOCK" and walk_lock == WalkLock.THIRD


C = Check

# walk_page_vma() of 6.1 has no range of its own; the two *_unsafe entries are 7.x's, without the install_pte check.
E_6_1: dict[str, tuple[Check, ...]] = {
    "walk_page_range": (C.EMPTY, C.NO_MM, C.MM_READ),
    "walk_page_range_novma": (C.EMPTY, C.NO_MM, C.MM_WRITE),
    "walk_page_range_vma": (C.EMPTY, C.NO_MM, C.OUTSIDE_VMA, C.MM_READ),
    "walk_page_vma": (C.NO_MM, C.MM_READ),
    "walk_page_mapping": (C.I_MMAP,),
}
_E_USER: dict[str, tuple[Check, ...]] = {
    "walk_page_range": (C.EMPTY, C.NO_MM, C.MM_LOCK),
    "walk_page_range_vma": (C.EMPTY, C.NO_MM, C.OUTSIDE_VMA, C.MM_LOCK, C.VMA_LOCK),
    "walk_page_vma": (C.NO_MM, C.MM_LOCK, C.VMA_LOCK),
    "walk_page_mapping": (C.I_MMAP,),
}
E_NOVMA = {**_E_USER, "walk_page_range_novma": (C.EMPTY, C.NO_MM, C.NOVMA)}
E_SPLIT = {
    **_E_USER,
    "walk_kernel_page_table_range": (C.EMPTY, C.INIT_READ),
    "walk_page_range_debug": (C.MM_WRITE, C.INIT_WRITE, C.EMPTY),
}
E_7: dict[str, tuple[Check, ...]] = {
    "walk_page_range": (C.INSTALL, C.EMPTY, C.NO_MM, C.MM_LOCK),
    "walk_page_range_mm_unsafe": (C.EMPTY, C.NO_MM, C.MM_LOCK),
    "walk_page_range_vma": (C.INSTALL, C.EMPTY, C.NO_MM, C.OUTSIDE_VMA, C.MM_LOCK, C.VMA_LOCK),
    "walk_page_range_vma_unsafe": (C.EMPTY, C.NO_MM, C.OUTSIDE_VMA, C.MM_LOCK, C.VMA_LOCK),
    "walk_page_vma": (C.NO_MM, C.INSTALL, C.MM_LOCK, C.VMA_LOCK),
    "walk_page_mapping": (C.INSTALL, C.I_MMAP),
    "walk_kernel_page_table_range": (C.INIT_READ, C.EMPTY, C.INSTALL),
    "walk_kernel_page_table_range_lockless": (C.EMPTY, C.INSTALL),
    "walk_page_range_debug": (C.MM_WRITE, C.INIT_WRITE, C.EMPTY, C.INSTALL),
}

W = WalkLock
MM_6_12 = {W.RDLOCK: Need.READ, W.WRLOCK: Need.WRITE, W.WRLOCK_VERIFY: Need.WRITE, W.THIRD: Need.WRITE}
MM_7 = {**MM_6_12, W.THIRD: Need.NOTHING}
VMA_6_12 = {W.RDLOCK: Need.NOTHING, W.WRLOCK: Need.TAKE, W.WRLOCK_VERIFY: Need.WRITE, W.THIRD: Need.NOTHING}
VMA_7 = {**VMA_6_12, W.THIRD: Need.READ}

# 6.1 asserts by lockdep and VM_BUG_ON_MM, which are nothing in a Debian kernel; later kernels by rwsem_assert_held.
WARNS = {Config.SHIPPED: Effect.WARN, Config.DEBUG: Effect.WARN}
SILENT = {Config.SHIPPED: Effect.NOTHING, Config.DEBUG: Effect.BUG}

L_6_1 = Locks(E_6_1, {}, {}, SILENT, walk_test_in_page_vma=True)
L_NOVMA = Locks(E_NOVMA, MM_6_12, VMA_6_12, WARNS)
L_SPLIT = Locks(E_SPLIT, MM_6_12, VMA_6_12, WARNS, vmap_trylock=True)
L_7 = Locks(E_7, MM_7, VMA_7, WARNS, third="VMA_RDLOCK_VERIFY", vmap_trylock=True)
