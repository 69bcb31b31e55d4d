"""mm/pagewalk.c below the entry points: the descent, function for function, under the kernel's names.

Rules of this file:
- A callback gets what the kernel's gets (entry pointer, addr, next, walk; addr, next, depth, walk for pte_hole) and
  returns an int: 0 goes on, anything else ends the walk and is returned.
- Entries are read again for every test, as in C, so that a callback that rewrites one is seen at once.
- Addresses are 64-bit and wrap; the loops end on equality, as in C. `Kernel.step` ends one that would not.
- Page-table locks of user tables are not modelled: one CPU runs here.
The entry points and their checks are in walkers.py, what user tables add (huge pages, hugetlb) in huge.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from kernel_model import huge
from kernel_model.levels import U64, Fold, Level
from kernel_model.mm import EINVAL, ENOMEM, Kernel, Mm, Vma
from kernel_model.stores import clear_bad


class Action(IntEnum):
    """enum page_walk_action: what the pud and pmd loops do next."""

    SUBTREE = 0
    CONTINUE = 1
    AGAIN = 2


Entry = Callable[[int, int, int, "MmWalk"], int]


@dataclass
class MmWalkOps:
    """struct mm_walk_ops; None: no callback."""

    pgd_entry: Entry | None = None
    p4d_entry: Entry | None = None
    pud_entry: Entry | None = None
    pmd_entry: Entry | None = None
    pte_entry: Entry | None = None
    pte_hole: Entry | None = None  # (addr, next, depth, walk)
    hugetlb_entry: Callable[[int, int, int, int, MmWalk], int] | None = None  # (pte, hmask, addr, next, walk)
    test_walk: Callable[[int, int, MmWalk], int] | None = None  # (addr, next, walk)
    pre_vma: Callable[[int, int, MmWalk], int] | None = None  # (start, end, walk)
    post_vma: Callable[[MmWalk], None] | None = None
    install_pte: Callable[[int, int, MmWalk], tuple[int, int]] | None = None  # (addr, next, walk) -> (error, pte)
    walk_lock: int = 0


@dataclass
class MmWalk:
    """struct mm_walk. `pgd`: a private root, by PA. `mm`: None for init_mm."""

    kernel: Kernel
    ops: MmWalkOps
    pgd: int | None = None
    private: Any = None
    action: Action = Action.SUBTREE
    vma: Vma | None = None
    no_vma: bool = True
    mm: Mm | None = None

    @property
    def space(self) -> Mm:
        """walk->mm."""
        return self.mm or self.kernel.init_mm


def vma_of(walk: MmWalk) -> Vma | None:
    """walk->vma. The thread's review wanted each place that looks at it to assert that the walk is not NOLOCK."""
    kernel = walk.kernel
    if walk.vma and kernel.lockdep and kernel.locks.no_vma_asserts and kernel.locks.is_nolock(walk.ops.walk_lock):
        kernel.warn("walk_vma_nolock")
    return walk.vma


def walk_pgd_range(addr: int, end: int, walk: MmWalk) -> int:
    """walk_pgd_range()."""
    level = walk.kernel.levels.pgd
    pgd = (walk.space.pgd if walk.pgd is None else walk.pgd) + 8 * level.index(addr)
    while True:
        walk.kernel.step("walk_pgd_range")
        next = level.addr_end(addr, end)
        err = _upper(walk, "PGD", pgd, addr, next)
        pgd, addr = pgd + 8, next
        if err or addr == end:
            return err


def walk_p4d_range(pgd: int, addr: int, end: int, walk: MmWalk) -> int:
    """walk_p4d_range()."""
    level = walk.kernel.levels.p4d
    p4d = p4d_offset(walk.kernel, pgd, addr)
    while True:
        walk.kernel.step("walk_p4d_range")
        next = level.addr_end(addr, end)
        err = _upper(walk, "P4D", p4d, addr, next)
        p4d, addr = p4d + 8, next
        if err or addr == end:
            return err


def _upper(walk: MmWalk, name: str, entry: int, addr: int, next: int) -> int:
    """One entry of the pgd or p4d loop; the action is not looked at here."""
    kernel, ops = walk.kernel, walk.ops
    if none_or_clear_bad(kernel, name, entry):
        depth = 0 if name == "PGD" else kernel.levels.real_depth(1)
        err = make_table(walk, "P4D" if name == "PGD" else "PUD", entry) or _hole(walk, addr, next, depth)
        if err or not ops.install_pte:
            return err
    callback = ops.pgd_entry if name == "PGD" else ops.p4d_entry
    err = callback(entry, addr, next, walk) if callback else 0
    below = ops.pud_entry or ops.pmd_entry or ops.pte_entry or ops.install_pte
    if err or not (below or (name == "PGD" and ops.p4d_entry)):
        return err
    return (walk_p4d_range if name == "PGD" else walk_pud_range)(entry, addr, next, walk)


def walk_pud_range(p4d: int, addr: int, end: int, walk: MmWalk) -> int:
    """walk_pud_range()."""
    pud = pud_offset(walk.kernel, p4d, addr)
    while True:
        next = walk.kernel.levels.pud.addr_end(addr, end)
        err = _pud(pud, addr, next, walk)
        pud, addr = pud + 8, next
        if err or addr == end:
            return err


def _pud(pud: int, addr: int, next: int, walk: MmWalk) -> int:
    """One entry of walk_pud_range's loop, as often as AGAIN asks for it."""
    kernel, bits = walk.kernel, walk.kernel.bits
    again = True
    while again:
        kernel.step("walk_pud_range")
        err, below = _tested(walk, "PUD", pud, addr, next)
        if err or below is not Action.SUBTREE:
            again = not err and below is Action.AGAIN
            continue
        if vma_of(walk):
            if not kernel.variant.pmd_rechecks_pud and kernel.read(pud) == 0:
                continue
        elif bits.pud_leaf(kernel.read(pud)) or not bits.pte_present(kernel.read(pud)):
            return 0
        err = walk_pmd_range(pud, addr, next, walk)
        again = not err and kernel.variant.pmd_rechecks_pud and _action(walk) is Action.AGAIN
    return err


def _tested(walk: MmWalk, name: str, entry: int, addr: int, next: int) -> tuple[int, Action]:
    """What the pud and pmd loops do before they go down: the hole or the callback, and what comes of the entry."""
    kernel, ops = walk.kernel, walk.ops
    if kernel.variant.reset_before_none:
        walk.action = Action.SUBTREE
    if kernel.read(entry) == 0:
        err = _none(walk, name, entry, addr, next)
        if err or not ops.install_pte:
            return err, Action.CONTINUE
    if not kernel.variant.reset_before_none:
        walk.action = Action.SUBTREE
    callback = ops.pud_entry if name == "PUD" else ops.pmd_entry
    err = callback(entry, addr, next, walk) if callback else 0
    if err or _action(walk) is not Action.SUBTREE:
        return err, walk.action
    handler = ops.pte_entry or (name == "PUD" and ops.pmd_entry)
    is_huge = name == "PMD" and kernel.bits.pmd_trans_huge(kernel.read(entry))
    if not handler and (not ops.install_pte or is_huge):
        return 0, Action.CONTINUE
    return 0, Action.SUBTREE


def _none(walk: MmWalk, name: str, entry: int, addr: int, next: int) -> int:
    """An empty pud or pmd entry: a table is put there for install_pte, else it is a hole."""
    depth = walk.kernel.levels.real_depth(2 if name == "PUD" else 3)
    below = "PMD" if name == "PUD" else "PTE"
    return make_table(walk, below, entry) if walk.ops.install_pte else _hole(walk, addr, next, depth)


def walk_pmd_range(pud: int, addr: int, end: int, walk: MmWalk) -> int:
    """walk_pmd_range()."""
    kernel, bits = walk.kernel, walk.kernel.bits
    if kernel.variant.pmd_rechecks_pud:
        value = kernel.read(pud)
        if not bits.pte_present(value) or bits.pud_leaf(value):
            walk.action = Action.AGAIN
            return 0
    pmd = pmd_offset(kernel, pud, addr)
    while True:
        next = kernel.levels.pmd.addr_end(addr, end)
        err = _pmd(pmd, addr, next, walk)
        pmd, addr = pmd + 8, next
        if err or addr == end:
            return err


def _pmd(pmd: int, addr: int, next: int, walk: MmWalk) -> int:
    """One entry of walk_pmd_range's loop, as often as AGAIN asks for it."""
    kernel, bits = walk.kernel, walk.kernel.bits
    again = True
    while again:
        kernel.step("walk_pmd_range")
        err, below = _tested(walk, "PMD", pmd, addr, next)
        if err or below is not Action.SUBTREE:
            again = not err and below is Action.AGAIN
            continue
        if vma_of(walk):
            huge.split_huge_pmd(kernel, pmd, addr)
            if not kernel.variant.again_after_pte and huge.pmd_trans_unstable(kernel, pmd):
                continue
        elif bits.pmd_leaf(kernel.read(pmd)) or not bits.pmd_present(kernel.read(pmd)):
            return 0
        err = walk_pte_range(pmd, addr, next, walk)
        again = not err and kernel.variant.again_after_pte and _action(walk) is Action.AGAIN
    return err


def walk_pte_range(pmd: int, addr: int, end: int, walk: MmWalk) -> int:
    """walk_pte_range(): a PTE table that went away meanwhile makes the pmd loop look again."""
    kernel = walk.kernel
    of_kernel = walk.no_vma and (walk.space is kernel.init_mm or addr >= kernel.task_size)
    if not of_kernel and kernel.variant.again_after_pte and not huge.pte_offset_map(kernel, pmd):
        walk.action = Action.AGAIN
        return 0
    return walk_pte_range_inner(pte_offset(kernel, pmd, addr), addr, end, walk)


def walk_pte_range_inner(pte: int, addr: int, end: int, walk: MmWalk) -> int:
    """walk_pte_range_inner(): the last page is the one with addr >= end - PAGE_SIZE, unsigned."""
    kernel, page = walk.kernel, walk.kernel.levels.page_size
    while True:
        kernel.step("walk_pte_range")
        err = _pte(pte, addr, addr + page & U64, walk)
        if err or addr >= (end - page & U64):
            return err
        addr, pte = addr + page, pte + 8


def _pte(pte: int, addr: int, next: int, walk: MmWalk) -> int:
    """One PTE: install_pte for an empty one where it is set, else pte_entry."""
    ops, kernel = walk.ops, walk.kernel
    if ops.install_pte and kernel.read(pte) == 0:
        err, new = ops.install_pte(addr, next, walk)
        if err:
            return err
        huge.set_pte_at(kernel, addr, pte, new)
        if walk.no_vma:
            kernel.warn("walk_pte_range_inner")
        return 0
    if ops.pte_entry is None:
        raise huge.NullCall("walk_pte_range_inner calls pte_entry, which is not set")
    return ops.pte_entry(pte, addr, next, walk)


def _hole(walk: MmWalk, addr: int, next: int, depth: int) -> int:
    return walk.ops.pte_hole(addr, next, depth, walk) if walk.ops.pte_hole and not walk.ops.install_pte else 0


def _action(walk: MmWalk) -> Action:
    """The action as a callback left it."""
    return walk.action


def make_table(walk: MmWalk, below: str, entry: int) -> int:
    """__p4d_alloc(), __pud_alloc(), __pmd_alloc(), __pte_alloc() for install_pte: 0 or -ENOMEM."""
    kernel = walk.kernel
    level: Level = getattr(kernel.levels, below.lower())
    if not walk.ops.install_pte or level.fold is not Fold.NO:
        return 0
    if kernel.read(entry):  # a bad entry of a level that is compiled away is kept: the new page is given back
        return -ENOMEM if kernel.allocate() is None else 0
    return 0 if kernel.new_table(entry, kernel.table_flags) else -ENOMEM


def walk_hugetlb_range(addr: int, end: int, walk: MmWalk) -> int:
    """walk_hugetlb_range(): one call for each huge page; the address is passed on as it is."""
    kernel, ops, vma = walk.kernel, walk.ops, walk.vma
    assert vma
    assert ops.hugetlb_entry
    hmask = -vma.huge_size & U64
    while True:
        kernel.step("walk_hugetlb_range")
        next = min((addr & hmask) + vma.huge_size, end)
        pte = huge.huge_pte_offset(kernel, walk.space, addr & hmask, vma.huge_size)
        if pte is not None:
            err = ops.hugetlb_entry(pte, hmask, addr, next, walk)
        else:
            err = ops.pte_hole(addr, next, -1, walk) if ops.pte_hole else 0
        addr = next
        if err or addr == end:
            return err


def walk_page_test(start: int, end: int, walk: MmWalk) -> int:
    """walk_page_test(): 0 walk, positive skip, negative error. test_walk decides alone if there is one."""
    ops, vma = walk.ops, vma_of(walk)
    assert vma
    if ops.test_walk:
        return ops.test_walk(start, end, walk)
    if vma.pfnmap:
        err = ops.pte_hole(start, end, -1, walk) if ops.pte_hole else 1
        return err or 1
    return 0


def __walk_page_range(start: int, end: int, walk: MmWalk) -> int:
    """__walk_page_range(): one vma. post_vma is called whatever the walk returned, unless pre_vma refused."""
    ops, vma = walk.ops, vma_of(walk)
    if vma and vma.huge_size and ops.install_pte:
        return -EINVAL
    if vma and ops.pre_vma:
        err = ops.pre_vma(start, end, walk)
        if err:
            return err
    if vma and vma.huge_size:
        err = walk_hugetlb_range(start, end, walk) if ops.hugetlb_entry else 0
    else:
        err = walk_pgd_range(start, end, walk)
    if vma and ops.post_vma:
        ops.post_vma(walk)
    return err


def none_or_clear_bad(kernel: Kernel, name: str, entry: int) -> bool:
    """pgd_none_or_clear_bad(), p4d_none_or_clear_bad(): a bad entry is zeroed, unless its level is compiled away."""
    levels = kernel.levels
    if not levels.top_is_none_tested(name):
        return False
    value = kernel.read(entry)
    if value == 0:
        return True
    if not kernel.bits.upper_bad(value):
        return False
    clear_bad(kernel, name, entry)
    return True


def p4d_offset(kernel: Kernel, pgd: int, addr: int) -> int:
    """p4d_offset(): the PA of the P4D entry for `addr` under the PGD entry at `pgd`."""
    return _offset(kernel, kernel.levels.p4d, pgd, addr)


def pud_offset(kernel: Kernel, p4d: int, addr: int) -> int:
    """pud_offset()."""
    return _offset(kernel, kernel.levels.pud, p4d, addr)


def pmd_offset(kernel: Kernel, pud: int, addr: int) -> int:
    """pmd_offset()."""
    return _offset(kernel, kernel.levels.pmd, pud, addr)


def pte_offset(kernel: Kernel, pmd: int, addr: int) -> int:
    """pte_offset_kernel()."""
    return _offset(kernel, kernel.levels.pte, pmd, addr)


def _offset(kernel: Kernel, level: Level, entry: int, addr: int) -> int:
    if level.fold is Fold.COMPILE:
        return entry
    if level.fold is Fold.RUN:
        return (entry & -kernel.levels.page_size) + 8 * level.index(addr)
    return kernel.bits.table_address(kernel.read(entry)) + 8 * level.index(addr)
