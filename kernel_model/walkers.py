"""The entry points of mm/pagewalk.c: what each checks (locks.py), and which ranges it walks.

Rules of this file:
- An entry point begins with `_refused`: the checks of its row, in order. What is not in the row is not checked.
- A failed assertion is an event (`Warn`), never an error number: the walk goes on.
- An entry point that the variant has not raises `NotInKernel`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kernel_model.locks import Check, Effect, Need, WalkLock
from kernel_model.mm import EINVAL, Bug, Kernel, Mm, Rwsem, Vma
from kernel_model.pagewalk import MmWalk, MmWalkOps, __walk_page_range, walk_page_test, walk_pgd_range


class NotInKernel(LookupError):  # noqa: N818  the function is not in the kernel
    """The variant has no such function; names both."""


def walk_page_range(
    kernel: Kernel,
    mm: Mm | None,
    start: int,
    end: int,
    ops: MmWalkOps,
    private: Any = None,
    *,
    name: str = "walk_page_range",
) -> int:
    """walk_page_range(): the vmas of a range and the gaps between them. Returns 0, -EINVAL or a callback's value."""
    walk = MmWalk(kernel, ops, private=private, mm=mm, no_vma=False)
    if _refused(name, walk, start, end, mm=mm):
        return -EINVAL
    assert mm
    vma = mm.find_vma(start)
    err = 0
    while not err and start < end:
        kernel.step("walk_page_range")
        if vma is None or start < vma.start:
            walk.vma, next = None, end if vma is None else min(end, vma.start)
            err = ops.pte_hole(start, next, -1, walk) if ops.pte_hole else 0
        else:
            next = min(end, vma.end)
            err = _walk_vma_of_range(walk, name, vma, start, next)
            vma = mm.find_vma(vma.end)
        start = next
    return err


def _walk_vma_of_range(walk: MmWalk, name: str, vma: Vma, start: int, end: int) -> int:
    """One vma of walk_page_range(): a positive answer of the test skips it."""
    if walk.kernel.locks.has_walk_lock:
        process_vma_walk_lock(walk, _asserting(walk.kernel, name), vma)
    walk.vma = vma
    err = walk_page_test(start, end, walk)
    if err:
        return min(err, 0)
    return __walk_page_range(start, end, walk)


def walk_page_range_mm_unsafe(
    kernel: Kernel, mm: Mm | None, start: int, end: int, ops: MmWalkOps, private: Any = None
) -> int:
    """walk_page_range_mm_unsafe(): walk_page_range() that may install PTEs."""
    return walk_page_range(kernel, mm, start, end, ops, private, name="walk_page_range_mm_unsafe")


def walk_page_range_novma(
    kernel: Kernel,
    mm: Mm | None,
    start: int,
    end: int,
    ops: MmWalkOps,
    pgd: int | None = None,
    private: Any = None,
) -> int:
    """walk_page_range_novma() of 6.1 and early 6.12: tables of any mm, without regard to vmas."""
    return _walk_tables("walk_page_range_novma", kernel, mm, start, end, ops, pgd, private)


def walk_kernel_page_table_range(
    kernel: Kernel, start: int, end: int, ops: MmWalkOps, pgd: int | None = None, private: Any = None
) -> int:
    """walk_kernel_page_table_range(): kernel tables, under init_mm's lock."""
    return _walk_tables("walk_kernel_page_table_range", kernel, kernel.init_mm, start, end, ops, pgd, private)


def walk_kernel_page_table_range_lockless(
    kernel: Kernel, start: int, end: int, ops: MmWalkOps, pgd: int | None = None, private: Any = None
) -> int:
    """walk_kernel_page_table_range_lockless(): the caller owns the range; no lock is looked at."""
    return _walk_tables("walk_kernel_page_table_range_lockless", kernel, kernel.init_mm, start, end, ops, pgd, private)


def walk_page_range_debug(
    kernel: Kernel,
    mm: Mm | None,
    start: int,
    end: int,
    ops: MmWalkOps,
    pgd: int | None = None,
    private: Any = None,
) -> int:
    """walk_page_range_debug(): ptdump's walk of any mm's tables."""
    if mm is kernel.init_mm and kernel.locks.debug_walks_kernel:
        return walk_kernel_page_table_range(kernel, start, end, ops, pgd, private)
    return _walk_tables("walk_page_range_debug", kernel, mm, start, end, ops, pgd, private)


def _walk_tables(
    name: str, kernel: Kernel, mm: Mm | None, start: int, end: int, ops: MmWalkOps, pgd: int | None, private: Any
) -> int:
    walk = MmWalk(kernel, ops, pgd, private, mm=mm)
    if _refused(name, walk, start, end, mm=mm):
        return -EINVAL
    return walk_pgd_range(start, end, walk)


def walk_page_range_vma(
    kernel: Kernel,
    vma: Vma,
    start: int,
    end: int,
    ops: MmWalkOps,
    private: Any = None,
    *,
    name: str = "walk_page_range_vma",
) -> int:
    """walk_page_range_vma(): a part of one vma, without walk_page_test()."""
    walk = MmWalk(kernel, ops, private=private, vma=vma, no_vma=False, mm=vma.mm)
    if _refused(name, walk, start, end, mm=vma.mm, vma=vma):
        return -EINVAL
    return __walk_page_range(start, end, walk)


def walk_page_range_vma_unsafe(
    kernel: Kernel, vma: Vma, start: int, end: int, ops: MmWalkOps, private: Any = None
) -> int:
    """walk_page_range_vma_unsafe(): walk_page_range_vma() that may install PTEs."""
    return walk_page_range_vma(kernel, vma, start, end, ops, private, name="walk_page_range_vma_unsafe")


def walk_page_vma(kernel: Kernel, vma: Vma, ops: MmWalkOps, private: Any = None) -> int:
    """walk_page_vma(): one whole vma; only 6.1 asks walk_page_test()."""
    walk = MmWalk(kernel, ops, private=private, vma=vma, no_vma=False, mm=vma.mm)
    if _refused("walk_page_vma", walk, vma.start, vma.end, mm=vma.mm, vma=vma):
        return -EINVAL
    if kernel.locks.walk_test_in_page_vma:
        err = walk_page_test(vma.start, vma.end, walk)
        if err:
            return min(err, 0)
    return __walk_page_range(vma.start, vma.end, walk)


def walk_page_mapping(
    kernel: Kernel, vmas: Iterable[Vma], first: int, nr: int, ops: MmWalkOps, private: Any = None
) -> int:
    """walk_page_mapping(): page offsets [first, first + nr) of a file in each of its `vmas`, in the tree's order.

    test_walk is given the whole vma, and a positive answer ends the walk of all of them.
    """
    walk = MmWalk(kernel, ops, private=private, no_vma=False)
    if _refused("walk_page_mapping", walk, 0, 1):
        return -EINVAL
    page = kernel.levels.page_size
    for vma in vmas:
        cut = [_clip(offset, vma, page) for offset in (first, first + nr)]
        if cut[0] == cut[1]:
            continue
        walk.vma, walk.mm = vma, vma.mm
        err = walk_page_test(vma.start, vma.end, walk)
        if err:
            return min(err, 0)
        err = __walk_page_range(cut[0], cut[1], walk)
        if err:
            return err
    return 0


def _clip(offset: int, vma: Vma, page: int) -> int:
    """The address in `vma` of a page offset of its file, clipped to it."""
    pages = (vma.end - vma.start) // page
    return vma.start + min(max(offset - vma.pgoff, 0), pages) * page


# locks

# Where the assertions of an entry point are, in kernels that have both: the outer one only refuses install_pte.
INNER = {"walk_page_range": "walk_page_range_mm_unsafe", "walk_page_range_vma": "walk_page_range_vma_unsafe"}


def _refused(name: str, walk: MmWalk, start: int, end: int, *, mm: Mm | None = None, vma: Vma | None = None) -> bool:
    """Makes the checks of an entry point's row; True: it returns -EINVAL."""
    checks = walk.kernel.locks.entries.get(name)
    if checks is None:
        raise NotInKernel(f"{name}: not in {walk.kernel.variant.name}")
    return any(_check(check, name, walk, start, end, mm, vma) for check in checks)


def _check(check: Check, name: str, walk: MmWalk, start: int, end: int, mm: Mm | None, vma: Vma | None) -> bool:
    """One check: True refuses; an assertion that fails is an event."""
    kernel, ops = walk.kernel, walk.ops
    nolock = kernel.locks.is_nolock(ops.walk_lock)
    name = _asserting(kernel, name)
    match check:
        case Check.EMPTY:
            return start >= end
        case Check.NO_MM:
            return mm is None
        case Check.OUTSIDE_VMA:
            return vma is not None and not (vma.start <= start and end <= vma.end)
        case Check.INSTALL:
            return ops.install_pte is not None
        case Check.NOLOCK_REFUSED:
            return nolock
        case Check.NOT_INIT_MM:
            return nolock and mm is not kernel.init_mm
        case Check.NOT_VMALLOC:
            return nolock and not kernel.is_vmalloc_or_module(start)
        case Check.VMA_LOCK:
            assert vma
            process_vma_walk_lock(walk, name, vma)
        case Check.MM_LOCK:
            return process_mm_walk_lock(walk, name, mm)
        case Check.I_MMAP:
            _assert(kernel, name, kernel.i_mmap_rwsem, Need.READ, lockdep_only=True)
        case _:
            lock, need = _asserted(check, kernel, mm, nolock)
            _assert(kernel, name, lock, need)
    return False


def _asserting(kernel: Kernel, name: str) -> str:
    """The function that asserts for an entry point."""
    return INNER[name] if INNER.get(name) in kernel.locks.entries else name


def _asserted(check: Check, kernel: Kernel, mm: Mm | None, nolock: bool) -> tuple[Rwsem, Need]:
    """Which lock an assertion asks for, and how."""
    init, own = kernel.init_mm, mm or kernel.init_mm
    of_kernel = own is init
    rows = {
        Check.MM_READ: (own, Need.READ),
        Check.MM_WRITE: (own, Need.WRITE),
        Check.INIT_READ: (init, Need.READ),
        Check.INIT_WRITE: (init, Need.WRITE),
        Check.NOVMA: (own, Need.READ if of_kernel else Need.WRITE),
        Check.NOVMA_UNLESS_NOLOCK: (own, Need.NOTHING if nolock else Need.READ if of_kernel else Need.WRITE),
        Check.NOVMA_REVIEWED: (own, Need.WRITE if not of_kernel else Need.NOTHING if nolock else Need.READ),
        Check.INIT_UNLESS_NOLOCK: (init, Need.NOTHING if nolock else Need.READ),
    }
    space, need = rows[check]
    return space.mmap_lock, need


def process_mm_walk_lock(walk: MmWalk, name: str, mm: Mm | None) -> bool:
    """process_mm_walk_lock(); True refuses (the thread's v2)."""
    assert mm
    need = walk.kernel.locks.mm_lock[WalkLock(walk.ops.walk_lock)]
    if need is Need.REFUSE:
        return True
    _assert(walk.kernel, name, mm.mmap_lock, need)
    return False


def process_vma_walk_lock(walk: MmWalk, name: str, vma: Vma) -> None:
    """process_vma_walk_lock(), inlined into the function `name`."""
    kernel = walk.kernel
    need = kernel.locks.vma_lock[WalkLock(walk.ops.walk_lock)]
    if need is Need.TAKE:
        vma.start_write(kernel, name)
    elif need is Need.WARN:
        kernel.warn(name)
    elif kernel.lockdep and need is not Need.NOTHING and vma.locked not in (need.name.lower(), "write"):
        raise Bug("process_vma_walk_lock: the vma is not locked")


def _assert(kernel: Kernel, name: str, lock: Rwsem, need: Need, *, lockdep_only: bool = False) -> None:
    """mmap_assert_locked(), mmap_assert_write_locked(): an event, or BUG, when the lock is not held so."""
    if lockdep_only and not kernel.lockdep:
        return
    if need is Need.NOTHING or lock.held(need is Need.WRITE, by_me=kernel.lockdep):
        return
    effect = kernel.locks.effects[kernel.config]
    if effect is Effect.WARN or lockdep_only:
        kernel.warn(name)
    elif effect is Effect.BUG:
        raise Bug(f"{name}: the mmap lock is not held")
