"""mm/memory.c apply_to_page_range: tables are made on the way down, a block is refused, every PTE gets the function.

Rules of this file:
- The end of each loop is `addr != end`, so an unaligned start in a range that crosses a table runs past the table;
  `Runaway` says so.
- An entry is tested for none, leaf and bad, in this order; a bad one is warned of and, where tables are made, cleared
  and replaced. A level that is compiled away is not cleared: what is bad is followed.
- The function is called with the address as it was given, not rounded.
Sources: __apply_to_page_range of Debian 6.1.176, 6.12.107, 7.2.13 and 7.3.4.
"""

from __future__ import annotations

from collections.abc import Callable

from kernel_model.levels import U64, Fold, Level
from kernel_model.mm import EINVAL, ENOMEM, Kernel, Mm
from kernel_model.pagewalk import p4d_offset, pmd_offset, pte_offset, pud_offset
from kernel_model.stores import SET, clear_bad, lazy_mmu_mode_disable, lazy_mmu_mode_enable

Fn = Callable[[int, int], int]  # (PA of the PTE, addr) -> error


def apply_to_page_range(kernel: Kernel, addr: int, size: int, fn: Fn | None, mm: Mm | None = None) -> int:
    """apply_to_page_range(mm, addr, size, fn): every PTE, in tables that are made where there are none.

    `size` is in bytes; `mm` None: init_mm. Returns 0, -EINVAL, -ENOMEM or what `fn` returned.
    """
    return __apply_to_page_range(kernel, mm, addr, size, fn, create=True)


def apply_to_existing_page_range(kernel: Kernel, addr: int, size: int, fn: Fn | None, mm: Mm | None = None) -> int:
    """apply_to_existing_page_range(mm, addr, size, fn): PTEs that are not none; no table is made."""
    return __apply_to_page_range(kernel, mm, addr, size, fn, create=False)


def __apply_to_page_range(kernel: Kernel, mm: Mm | None, addr: int, size: int, fn: Fn | None, *, create: bool) -> int:
    end = addr + size & U64
    if addr >= end:
        kernel.warn("__apply_to_page_range")
        return -EINVAL
    pgd = (mm or kernel.init_mm).pgd + 8 * kernel.levels.pgd.index(addr)
    return _range(kernel, "PGD", pgd, addr, end, fn, create)


_BELOW = {"PGD": "P4D", "P4D": "PUD", "PUD": "PMD", "PMD": "PTE"}
_OFFSET = {"P4D": p4d_offset, "PUD": pud_offset, "PMD": pmd_offset, "PTE": pte_offset}


def _range(kernel: Kernel, name: str, entry: int, addr: int, end: int, fn: Fn | None, create: bool) -> int:
    """apply_to_p4d_range() and its kin: the entries of one table, from `entry` on."""
    level: Level = getattr(kernel.levels, name.lower())
    while True:
        kernel.step(f"apply_to_{name.lower()}_range")
        next = level.addr_end(addr, end)
        err = _entry(kernel, name, entry, addr, next, fn, create)
        entry, addr = entry + 8, next
        if err or addr == end:
            return err


def _entry(kernel: Kernel, name: str, entry: int, addr: int, next: int, fn: Fn | None, create: bool) -> int:
    """One entry: skip a hole, refuse a leaf, clear what is bad, go down."""
    none = _none(kernel, name, entry)
    if none and not create:
        return 0
    if not none and _leaf(kernel, name, entry):
        kernel.warn("__apply_to_page_range")
        return -EINVAL
    if not none and _bad(kernel, name, entry):
        kernel.warn("__apply_to_page_range")
        if not create:
            return 0
        clear_bad(kernel, name, entry)
    below = _BELOW[name]
    if create and not _make_table(kernel, name, entry):
        return -ENOMEM
    first = _OFFSET[below](kernel, entry, addr)
    if below == "PTE":
        return _ptes(kernel, first, addr, next, fn, create)
    return _range(kernel, below, first, addr, next, fn, create)


def _ptes(kernel: Kernel, pte: int, addr: int, end: int, fn: Fn | None, create: bool) -> int:
    """apply_to_pte_range(), in one lazy section."""
    lazy_mmu_mode_enable(kernel)
    err = _each_pte(kernel, pte, addr, end, fn, create) if fn else 0
    lazy_mmu_mode_disable(kernel)
    return err


def _each_pte(kernel: Kernel, pte: int, addr: int, end: int, fn: Fn, create: bool) -> int:
    page = kernel.levels.page_size
    while True:
        kernel.step("apply_to_pte_range")
        err = fn(pte, addr) if create or kernel.read(pte) else 0
        pte, addr = pte + 8, addr + page & U64
        if err or addr == end:
            return err


def _none(kernel: Kernel, name: str, entry: int) -> bool:
    """pXd_none(): constant false above a folded level."""
    return kernel.levels.top_is_none_tested(name) and kernel.read(entry) == 0


def _leaf(kernel: Kernel, name: str, entry: int) -> bool:
    """pXd_leaf(): Linux makes no blocks above PUD."""
    value = kernel.read(entry)
    return {"PUD": kernel.bits.pud_leaf, "PMD": kernel.bits.pmd_leaf}.get(name, lambda _: False)(value)


def _bad(kernel: Kernel, name: str, entry: int) -> bool:
    """pXd_bad()."""
    value = kernel.read(entry)
    if name in ("PUD", "PMD"):
        return not kernel.bits.pxd_table(value)
    return kernel.levels.top_is_none_tested(name) and kernel.bits.upper_bad(value)


def _make_table(kernel: Kernel, name: str, entry: int) -> bool:
    """pXd_alloc_track() below a none entry of level `name`; False when there is no page for a table."""
    below: Level = getattr(kernel.levels, _BELOW[name].lower())
    if below.fold is not Fold.NO or kernel.read(entry) != 0:
        return True
    page = kernel.allocate()
    if page is None:
        return False
    SET[name](kernel, entry, kernel.bits.table.pack(kernel.table_flags, VALID=1, TYPE=1, TA=page))
    return True
