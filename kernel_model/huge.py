"""Huge pages of user memory, as far as the walk meets them: splitting, transparent huge pages, hugetlb.

Rules of this file:
- The split of a huge PMD is outside the model: `Kernel.call_out` says that it was called, and what stands for it may
  rewrite the entry. So are the cache maintenance for new code, and the folding of a full contiguous run.
- arm64 has no transparent huge PUDs (no HAVE_ARCH_TRANSPARENT_HUGEPAGE_PUD), so split_huge_pud() is nothing: a walk of
  a vma that is to go below a block at that level looks at it for ever.
Sources: include/linux/huge_mm.h, mm/pgtable-generic.c __pte_offset_map, include/linux/pgtable.h pmd_trans_unstable
(6.1), arch/arm64/include/asm/pgtable.h set_ptes, contpte_try_fold, arch/arm64/mm/hugetlbpage.c huge_pte_offset.
"""

from __future__ import annotations

from kernel_model.mm import Kernel, Mm
from kernel_model.stores import set_pte


class NullCall(Exception):  # noqa: N818  what the kernel does: it calls a NULL pointer
    """The kernel would have called a callback that is not there."""


def split_huge_pmd(kernel: Kernel, pmd: int, addr: int) -> None:
    """split_huge_pmd(): huge, device-mapped and non-present entries."""
    value, bits = kernel.read(pmd), kernel.bits
    if not kernel.variant.thp:
        return
    if (value and not bits.pmd_present(value)) or bits.pmd_trans_huge(value) or bits.devmap(value):
        kernel.call_out("__split_huge_pmd", pmd, addr)


def pmd_trans_unstable(kernel: Kernel, pmd: int) -> bool:
    """pmd_trans_unstable() of 6.1: the entry is not a table; a bad one is cleared. PTE_DEVMAP is not asked for."""
    value, bits = kernel.read(pmd), kernel.bits
    if not kernel.variant.thp:
        return False
    if value == 0 or bits.pmd_trans_huge(value) or not bits.pmd_present(value):
        return True
    return _cleared_if_bad(kernel, pmd, value)


def pte_offset_map(kernel: Kernel, pmd: int) -> bool:
    """pte_offset_map(), pte_offset_map_lock(): whether there is a PTE table; a bad entry is cleared."""
    value, bits = kernel.read(pmd), kernel.bits
    absent = not bits.pmd_present(value)
    if kernel.variant.clears_absent_pmd:
        absent = absent and kernel.variant.thp and bits.is_migration_entry(value)
    if value == 0 or absent or bits.pmd_trans_huge(value) or bits.devmap(value):
        return False
    return not _cleared_if_bad(kernel, pmd, value)


def _cleared_if_bad(kernel: Kernel, pmd: int, value: int) -> bool:
    """pmd_bad(), pmd_clear_bad()."""
    if kernel.bits.pxd_table(value):
        return False
    kernel.write(pmd, 0)
    return True


def set_pte_at(kernel: Kernel, addr: int, ptep: int, value: int) -> None:
    """set_pte_at() of a user page on an empty entry: new code is made visible, and a run that is full may be folded."""
    bits, levels = kernel.bits, kernel.levels
    if kernel.variant.contpte:
        value &= ~bits.CONT
    special = bool(value & bits.SPECIAL)
    if bits.pte_present(value) and not value & bits.UXN and not special:
        kernel.call_out("__sync_icache_dcache", value)
    set_pte(kernel, ptep, value)
    last = levels.contiguous["PTE"] - levels.page_size
    ends_run = addr & last == last and bits.pte_to_phys(value) & last == last
    if kernel.variant.contpte and ends_run and bits.pte_valid(value) and not special:
        kernel.call_out("__contpte_try_fold", ptep, addr)


def huge_pte_offset(kernel: Kernel, mm: Mm, addr: int, size: int) -> int | None:
    """huge_pte_offset(): PA of the entry that maps a huge page of `size` bytes at `addr`, or None."""
    from kernel_model import pagewalk

    levels, bits = kernel.levels, kernel.bits
    pgd = mm.pgd + 8 * levels.pgd.index(addr)
    if levels.top_is_none_tested("PGD") and not kernel.read(pgd):
        return None
    p4d = pagewalk.p4d_offset(kernel, pgd, addr)
    if levels.top_is_none_tested("P4D") and not kernel.read(p4d):
        return None
    pud = pagewalk.pud_offset(kernel, p4d, addr)
    value = kernel.read(pud)
    if size != levels.pud.size and value == 0:
        return None
    if bits.pxd_huge(value) or not bits.pte_present(value):
        return pud
    runs = levels.contiguous
    pmd = pagewalk.pmd_offset(kernel, pud, addr & -runs["PMD"] if size == runs["PMD"] else addr)
    value = kernel.read(pmd)
    if size not in (levels.pmd.size, runs["PMD"]) and value == 0:
        return None
    if bits.pxd_huge(value) or not bits.pmd_present(value):
        return pmd
    return pagewalk.pte_offset(kernel, pmd, addr & -size) if size == runs["PTE"] else None
