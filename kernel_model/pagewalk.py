"""mm/pagewalk.c for kernel ranges (no_vma): the walk, function for function, under the kernel's names.

Rules of this file:
- A callback gets what the kernel's gets (entry pointer, addr, next, walk; addr, next, depth, walk for pte_hole) and
  returns an int: 0 goes on, anything else ends the walk and is returned.
- Entries are read again for every test, as in C, so that a callback that rewrites one is seen at once.
- Addresses are 64-bit and wrap; the loops end on equality, as in C. `Kernel.step` ends one that would not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from kernel_model.levels import U64, Fold
from kernel_model.mm import EINVAL, Kernel


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
    install_pte: Callable[[int, int, MmWalk], tuple[int, int]] | None = None  # (addr, next, walk) -> (error, pte)


@dataclass
class MmWalk:
    """struct mm_walk of a walk without a vma."""

    kernel: Kernel
    ops: MmWalkOps
    pgd: int | None = None  # a private root, by PA
    private: Any = None
    action: Action = Action.SUBTREE


def walk_kernel_page_table_range_lockless(
    kernel: Kernel, start: int, end: int, ops: MmWalkOps, pgd: int | None = None, private: Any = None
) -> int:
    """The walk that 7.x's pageattr makes: no lock is looked at. Returns 0, -EINVAL or what a callback returned."""
    if start >= end or ops.install_pte:
        return -EINVAL
    return walk_pgd_range(start, end, MmWalk(kernel, ops, pgd, private))


def walk_page_range_novma(
    kernel: Kernel, start: int, end: int, ops: MmWalkOps, pgd: int | None = None, private: Any = None
) -> int:
    """6.1's walk of a kernel range; its lock assertion is compiled out of Debian's kernels."""
    if start >= end:
        return -EINVAL
    return walk_pgd_range(start, end, MmWalk(kernel, ops, pgd, private))


def walk_pgd_range(addr: int, end: int, walk: MmWalk) -> int:
    """walk_pgd_range()."""
    kernel, ops = walk.kernel, walk.ops
    level = kernel.levels.pgd
    pgd = (kernel.pgd if walk.pgd is None else walk.pgd) + 8 * level.index(addr)
    while True:
        kernel.step("walk_pgd_range")
        next = level.addr_end(addr, end)
        err = 0
        if none_or_clear_bad(kernel, "PGD", pgd):
            err = _hole(walk, addr, next, 0)
        else:
            if ops.pgd_entry:
                err = ops.pgd_entry(pgd, addr, next, walk)
            if not err and (ops.p4d_entry or ops.pud_entry or ops.pmd_entry or ops.pte_entry):
                err = walk_p4d_range(pgd, addr, next, walk)
        pgd, addr = pgd + 8, next
        if err or addr == end:
            return err


def walk_p4d_range(pgd: int, addr: int, end: int, walk: MmWalk) -> int:
    """walk_p4d_range()."""
    kernel, ops = walk.kernel, walk.ops
    level, depth = kernel.levels.p4d, kernel.levels.real_depth(1)
    p4d = p4d_offset(kernel, pgd, addr)
    while True:
        kernel.step("walk_p4d_range")
        next = level.addr_end(addr, end)
        err = 0
        if none_or_clear_bad(kernel, "P4D", p4d):
            err = _hole(walk, addr, next, depth)
        else:
            if ops.p4d_entry:
                err = ops.p4d_entry(p4d, addr, next, walk)
            if not err and (ops.pud_entry or ops.pmd_entry or ops.pte_entry):
                err = walk_pud_range(p4d, addr, next, walk)
        p4d, addr = p4d + 8, next
        if err or addr == end:
            return err


def walk_pud_range(p4d: int, addr: int, end: int, walk: MmWalk) -> int:
    """walk_pud_range()."""
    kernel = walk.kernel
    level, depth = kernel.levels.pud, kernel.levels.real_depth(2)
    pud = pud_offset(kernel, p4d, addr)
    while True:
        next = level.addr_end(addr, end)
        err = _pud(pud, addr, next, depth, walk)
        pud, addr = pud + 8, next
        if err or addr == end:
            return err


def _pud(pud: int, addr: int, next: int, depth: int, walk: MmWalk) -> int:
    """One entry of walk_pud_range's loop, as often as AGAIN asks for it."""
    kernel, ops, bits = walk.kernel, walk.ops, walk.kernel.bits
    while True:
        kernel.step("walk_pud_range")
        if kernel.variant.reset_before_none:
            walk.action = Action.SUBTREE
        if kernel.read(pud) == 0:
            return _hole(walk, addr, next, depth)
        walk.action = Action.SUBTREE
        err = ops.pud_entry(pud, addr, next, walk) if ops.pud_entry else 0
        if err:
            return err
        if _action(walk) is Action.AGAIN:
            continue
        leaf = bits.pud_leaf(kernel.read(pud)) or not bits.pte_present(kernel.read(pud))
        if leaf or walk.action is Action.CONTINUE or not (ops.pmd_entry or ops.pte_entry):
            return 0
        err = walk_pmd_range(pud, addr, next, walk)
        if err or not (kernel.variant.pmd_rechecks_pud and _action(walk) is Action.AGAIN):
            return err


def walk_pmd_range(pud: int, addr: int, end: int, walk: MmWalk) -> int:
    """walk_pmd_range()."""
    kernel, bits = walk.kernel, walk.kernel.bits
    if kernel.variant.pmd_rechecks_pud:
        value = kernel.read(pud)
        if not bits.pte_present(value) or bits.pud_leaf(value):
            walk.action = Action.AGAIN
            return 0
    level, depth = kernel.levels.pmd, kernel.levels.real_depth(3)
    pmd = pmd_offset(kernel, pud, addr)
    while True:
        next = level.addr_end(addr, end)
        err = _pmd(pmd, addr, next, depth, walk)
        pmd, addr = pmd + 8, next
        if err or addr == end:
            return err


def _pmd(pmd: int, addr: int, next: int, depth: int, walk: MmWalk) -> int:
    """One entry of walk_pmd_range's loop, as often as AGAIN asks for it."""
    kernel, ops, bits = walk.kernel, walk.ops, walk.kernel.bits
    while True:
        kernel.step("walk_pmd_range")
        if kernel.variant.reset_before_none:
            walk.action = Action.SUBTREE
        if kernel.read(pmd) == 0:
            return _hole(walk, addr, next, depth)
        walk.action = Action.SUBTREE
        err = ops.pmd_entry(pmd, addr, next, walk) if ops.pmd_entry else 0
        if err:
            return err
        if _action(walk) is Action.AGAIN:
            continue
        leaf = bits.pmd_leaf(kernel.read(pmd)) or not bits.pmd_present(kernel.read(pmd))
        if leaf or walk.action is Action.CONTINUE or not ops.pte_entry:
            return 0
        err = walk_pte_range(pmd, addr, next, walk)
        if err or not (kernel.variant.again_after_pte and _action(walk) is Action.AGAIN):
            return err


def walk_pte_range(pmd: int, addr: int, end: int, walk: MmWalk) -> int:
    """walk_pte_range() of a kernel range: pte_offset_kernel, no lock."""
    return walk_pte_range_inner(pte_offset(walk.kernel, pmd, addr), addr, end, walk)


def walk_pte_range_inner(pte: int, addr: int, end: int, walk: MmWalk) -> int:
    """walk_pte_range_inner(): the last page is the one with addr >= end - PAGE_SIZE, unsigned."""
    kernel, ops, page = walk.kernel, walk.ops, walk.kernel.levels.page_size
    assert ops.pte_entry
    while True:
        kernel.step("walk_pte_range")
        err = ops.pte_entry(pte, addr, addr + page & U64, walk)
        if err or addr >= (end - page & U64):
            return err
        addr, pte = addr + page, pte + 8


def _hole(walk: MmWalk, addr: int, next: int, depth: int) -> int:
    return walk.ops.pte_hole(addr, next, depth, walk) if walk.ops.pte_hole else 0


def _action(walk: MmWalk) -> Action:
    """The action as a callback left it."""
    return walk.action


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
    level = levels.pgd if name == "PGD" else levels.p4d
    if level.fold is not Fold.COMPILE:
        kernel.write(entry, 0)
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


def _offset(kernel: Kernel, level: Any, entry: int, addr: int) -> int:
    if level.fold is Fold.COMPILE:
        return entry
    if level.fold is Fold.RUN:
        return (entry & -kernel.levels.page_size) + 8 * level.index(addr)  # type: ignore[no-any-return]
    table = kernel.bits.table["TA"].get(kernel.read(entry))
    return table + 8 * level.index(addr)  # type: ignore[no-any-return]
