"""folio_walk_start() of mm/pagewalk.c: the page that a user address is mapped to, at whichever level it is.

Rules of this file:
- A struct page is the PA of its page, and every page is its own folio: compound pages are not modelled.
- vm_normal_page() and its kin are outside the model (`Kernel.call_out`): what stands for them returns a PA, 0 for none.
- One CPU runs: an entry that is read again under the lock is what it was.
Sources: mm/pagewalk.c folio_walk_start of 6.12 and 7.x, include/linux/leafops.h, swapops.h, huge_mm.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from kernel_model import huge, pagewalk
from kernel_model.contpte import ptep_get
from kernel_model.mm import Bug, Kernel, Rwsem, Vma


class Level(IntEnum):
    """enum folio_walk_level."""

    PTE = 0
    PMD = 1
    PUD = 2


@dataclass
class FolioWalk:
    """struct folio_walk as a walk that found something leaves it.

    `page`: the exact page, None for the zero page and a migration entry. `entry`: PA of the entry, `value`: what it
    is. `lock`: PA of the table whose lock is held, None for the mm's page_table_lock.
    """

    page: int | None = None
    level: Level = Level.PTE
    entry: int = 0
    value: int = 0
    lock: int | None = None


class _Wanted(NamedTuple):
    """What a call asks for besides normal pages, and which pages are locked."""

    migration: bool
    zeropage: bool
    is_locked: Callable[[int], bool]

    @classmethod
    def of(cls, kernel: Kernel, flags: int, is_locked: Callable[[int], bool]) -> _Wanted:
        """FW_MIGRATION and FW_ZEROPAGE are bits 0 and 1 in 6.12; later there is only FW_ZEROPAGE, bit 0."""
        if kernel.variant.fw_migration:
            return cls(bool(flags & 1), bool(flags & 2), is_locked)
        return cls(False, bool(flags & 1), is_locked)


class _Found(NamedTuple):
    """A page, and whether `fw->page` tells it."""

    page: int
    expose: bool = True


def folio_walk_start(
    kernel: Kernel, fw: FolioWalk, vma: Vma, addr: int, flags: int, is_locked: Callable[[int], bool] = lambda page: True
) -> int | None:
    """folio_walk_start(): the folio of the page that `addr` of `vma` is mapped to, None if there is none.

    `fw` gets the result. `is_locked(page)`: PageLocked(). Raises Bug for a migration entry whose page is not locked.
    """
    wanted = _Wanted.of(kernel, flags, is_locked)
    lock = vma.mm.mmap_lock if vma.mm else Rwsem()
    if not lock.is_locked:
        kernel.warn("folio_walk_start")
    if not vma.start <= addr < vma.end:
        kernel.warn("folio_walk_start")
        return None
    pud = _pud_of(kernel, vma, addr)
    if pud is None:
        return None
    found, below = _pud(kernel, fw, pud, addr)
    if below is not None:
        found, below = _pmd(kernel, fw, below, addr, wanted)
    if below is not None:
        found = _pte(kernel, fw, below, addr, wanted)
    if found is None:
        return None
    offset = addr & _size(kernel, fw.level) - 1 & -kernel.levels.page_size
    fw.page = found.page + offset if found.expose else None
    return found.page


def _pud_of(kernel: Kernel, vma: Vma, addr: int) -> int | None:
    """The PUD entry of `addr`; entries above it that are bad are cleared."""
    assert vma.mm
    pgd = vma.mm.pgd + 8 * kernel.levels.pgd.index(addr)
    if pagewalk.none_or_clear_bad(kernel, "PGD", pgd):
        return None
    p4d = pagewalk.p4d_offset(kernel, pgd, addr)
    if pagewalk.none_or_clear_bad(kernel, "P4D", p4d):
        return None
    return pagewalk.pud_offset(kernel, p4d, addr)


def _size(kernel: Kernel, level: Level) -> int:
    """Bytes that an entry of `level` maps."""
    size: int = {Level.PTE: kernel.levels.pte, Level.PMD: kernel.levels.pmd, Level.PUD: kernel.levels.pud}[level].size
    return size


def _note(kernel: Kernel, fw: FolioWalk, level: Level, entry: int) -> int:
    """Puts an entry into `fw` with the lock that is taken for it; the entry's value."""
    fw.level, fw.entry, fw.value = level, entry, kernel.read(entry)
    fw.lock = None if level is Level.PUD else entry & -kernel.levels.page_size
    return fw.value


def _pud(kernel: Kernel, fw: FolioWalk, pud: int, addr: int) -> tuple[_Found | None, int | None]:
    """The PUD level: a page, or the PMD entry to look at, or neither."""
    value, bits = kernel.read(pud), kernel.bits
    if bits.pxd_table(value):
        return None, pagewalk.pmd_offset(kernel, pud, addr)
    if value == 0:
        return None, None
    _note(kernel, fw, Level.PUD, pud)
    if not bits.pte_present(value):
        return None, None
    if not kernel.variant.has_normal_page_pud:
        return _Found(bits.pte_to_phys(value)), None
    return _normal(kernel, "vm_normal_page_pud", addr, value), None


def _pmd(kernel: Kernel, fw: FolioWalk, pmd: int, addr: int, wanted: _Wanted) -> tuple[_Found | None, int | None]:
    """The PMD level: a page, or the PMD entry again for the table below it, or neither."""
    value, bits = kernel.read(pmd), kernel.bits
    if bits.pxd_table(value):
        return None, pmd
    if value == 0:
        return None, None
    _note(kernel, fw, Level.PMD, pmd)
    if not bits.pmd_present(value):
        return _migrating(kernel, value, wanted) if kernel.variant.thp else None, None
    found = _normal(kernel, "vm_normal_page_pmd", addr, value)
    page = bits.pte_to_phys(value) & -kernel.levels.pmd.size
    if not found and wanted.zeropage and page == kernel.settings.huge_zero_page:
        found = _Found(page, expose=False)
    return found, None


def _pte(kernel: Kernel, fw: FolioWalk, pmd: int, addr: int, wanted: _Wanted) -> _Found | None:
    """The PTE level."""
    bits = kernel.bits
    if not huge.pte_offset_map(kernel, pmd):
        return None
    pte = pagewalk.pte_offset(kernel, pmd, addr)
    _note(kernel, fw, Level.PTE, pte)
    value = fw.value = ptep_get(kernel, pte)
    if not bits.pte_present(value):
        return _migrating(kernel, value, wanted)
    found = _normal(kernel, "vm_normal_page", addr, value)
    page = bits.pte_to_phys(value)
    if not found and wanted.zeropage and page == kernel.settings.zero_page:
        found = _Found(page, expose=False)
    return found


def _normal(kernel: Kernel, name: str, addr: int, value: int) -> _Found | None:
    """What vm_normal_page() or its kin says of an entry's value."""
    page = kernel.call_out(name, addr, value)
    return _Found(page) if page else None


def _migrating(kernel: Kernel, value: int, wanted: _Wanted) -> _Found | None:
    """The page of a migration entry, where 6.12 is asked for it; pfn_swap_entry_to_page() wants it locked."""
    if not wanted.migration or value == 0 or not kernel.bits.is_migration_entry(value):
        return None
    page = kernel.bits.swp_offset_phys(value, kernel.levels.page_size)
    if not wanted.is_locked(page):
        raise Bug("pfn_swap_entry_to_page: the page of a migration entry is not locked")
    return _Found(page, expose=False)
