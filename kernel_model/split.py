"""arch/arm64/mm/mmu.c of 7.x: leaves of the linear map are split where a permission change begins or ends inside one.

Rules of this file:
- Nothing is broken before it is made: these kernels split only what the CPU lets them change in place.
- A boundary that is a multiple of a level's size needs no split at that level, whatever is above or beside it.
- A leaf that is present but invalid is split like a valid one, and its parts stay invalid.
Sources: split_kernel_leaf_mapping and range_split_to_ptes of Debian 7.2.13 and 7.3.4.
"""

from __future__ import annotations

from kernel_model.levels import U64
from kernel_model.mm import EBUSY, EINVAL, ENOMEM, Kernel
from kernel_model.pagewalk import Action, MmWalk, MmWalkOps, p4d_offset, pmd_offset, pte_offset, pud_offset
from kernel_model.stores import lazy_mmu_mode_disable, lazy_mmu_mode_enable, set_pmd, set_pte, set_pud
from kernel_model.walkers import walk_kernel_page_table_range_lockless
from pgtable.descriptors import CONTIGUOUS_RUN, LAST_LEVEL, Granule


def CONT_PTES(kernel: Kernel) -> int:
    """PTEs in a contiguous run."""
    return CONTIGUOUS_RUN[Granule(kernel.levels.page_shift)][LAST_LEVEL]


def CONT_PMDS(kernel: Kernel) -> int:
    """PMD blocks in a contiguous run."""
    return CONTIGUOUS_RUN[Granule(kernel.levels.page_shift)][LAST_LEVEL - 1]


def split_kernel_leaf_mapping(kernel: Kernel, start: int, end: int) -> int:
    """split_kernel_leaf_mapping(start, end): VAs. Returns 0, -EINVAL, -EBUSY or -ENOMEM."""
    settings, page = kernel.settings, kernel.levels.page_size
    if not settings.requires_bbml or is_kfence_address(kernel, start):
        return 0
    if not settings.supports_bbml:
        if settings.caps_finalized:
            return 0
        if not settings.page_alloc_available or settings.online_cpus > 1:
            kernel.warn("split_kernel_leaf_mapping")
            return -EBUSY
    if start % page or end % page:
        return -EINVAL
    kernel.called("mutex_lock")
    lazy_mmu_mode_enable(kernel)
    ret = _split_ends(kernel, start, end)
    lazy_mmu_mode_disable(kernel)
    kernel.called("mutex_unlock")
    return ret


def _split_ends(kernel: Kernel, start: int, end: int) -> int:
    """One page is split out at the less aligned of its ends: the leaf parts there are small enough for both."""
    if (end - start & U64) == kernel.levels.page_size:
        return split_kernel_leaf_mapping_locked(kernel, start if _ffs(start) < _ffs(end) else end)
    return split_kernel_leaf_mapping_locked(kernel, start) or split_kernel_leaf_mapping_locked(kernel, end)


def _ffs(value: int) -> int:
    """__ffs(), and 64 for 0, as RBIT and CLZ give it."""
    return (value & -value).bit_length() - 1 if value else U64.bit_length()


def is_kfence_address(kernel: Kernel, addr: int) -> bool:
    """is_kfence_address(): VA `addr` is in KFENCE's pool."""
    pool = kernel.settings.kfence_pool
    return pool is not None and (addr - pool[0] & U64) < pool[1]


def split_kernel_leaf_mapping_locked(kernel: Kernel, addr: int) -> int:
    """split_kernel_leaf_mapping_locked(addr): makes VA `addr` a boundary between leaves. Returns 0 or -ENOMEM."""
    levels, bits = kernel.levels, kernel.bits
    pgd = kernel.pgd + 8 * levels.pgd.index(addr)
    if addr % levels.pgd.size == 0 or not _present(kernel, "PGD", pgd):
        return 0
    p4d = p4d_offset(kernel, pgd, addr)
    if addr % levels.p4d.size == 0 or not _present(kernel, "P4D", p4d):
        return 0
    pudp = pud_offset(kernel, p4d, addr)
    pud = kernel.read(pudp)
    if addr % levels.pud.size == 0 or not bits.pte_present(pud):
        return 0
    if bits.pud_leaf(pud) and split_pud(kernel, pudp, pud, to_cont=True):
        return -ENOMEM
    return _split_below_pud(kernel, pudp, addr)


def _present(kernel: Kernel, name: str, entry: int) -> bool:
    """pgd_present(), p4d_present()."""
    return not kernel.levels.top_is_none_tested(name) or kernel.read(entry) != 0


def _split_below_pud(kernel: Kernel, pud: int, addr: int) -> int:
    levels, bits = kernel.levels, kernel.bits
    if addr % (CONT_PMDS(kernel) * levels.pmd.size) == 0:
        return 0
    pmdp = pmd_offset(kernel, pud, addr)
    pmd = kernel.read(pmdp)
    if not bits.pmd_present(pmd):
        return 0
    if bits.pmd_leaf(pmd):
        if pmd & bits.CONT:
            split_contpmd(kernel, pmdp)
        if addr % levels.pmd.size == 0:
            return 0
        if split_pmd(kernel, pmdp, pmd, to_cont=True):
            return -ENOMEM
    if addr % (CONT_PTES(kernel) * levels.page_size):
        pte = pte_offset(kernel, pmdp, addr)
        value = kernel.read(pte)
        if bits.pte_present(value) and value & bits.CONT:
            split_contpte(kernel, pte)
    return 0


def split_contpte(kernel: Kernel, pte: int) -> None:
    """split_contpte(): the PTEs of the run around PA `pte` lose CONT."""
    size = 8 * CONT_PTES(kernel)
    for each in range(pte & -size, (pte & -size) + size, 8):
        set_pte(kernel, each, kernel.read(each) & ~kernel.bits.CONT)


def split_contpmd(kernel: Kernel, pmd: int) -> None:
    """split_contpmd(): the PMD entries of the run around PA `pmd` lose CONT."""
    size = 8 * CONT_PMDS(kernel)
    for each in range(pmd & -size, (pmd & -size) + size, 8):
        set_pmd(kernel, each, kernel.read(each) & ~kernel.bits.CONT)


def split_pmd(kernel: Kernel, pmdp: int, pmd: int, *, to_cont: bool) -> int:
    """split_pmd(): the block `pmd` at PA `pmdp` becomes a table of pages, in runs if `to_cont`. 0 or -ENOMEM."""
    bits, levels = kernel.bits, kernel.levels
    table = kernel.allocate()
    if table is None:
        return -ENOMEM
    old = bits.pgprot(pmd, levels.pmd.size)
    prot = old | bits.VALID | bits.TYPE
    if not bits.pte_valid(pmd):
        prot = bits.pgprot(bits.mkinvalid(prot), levels.page_size)
    prot = _cont(kernel, prot, to_cont)
    base = bits.pte_to_phys(pmd) & -levels.pmd.size
    for i in range(levels.pte.ptrs):
        set_pte(kernel, table + 8 * i, bits.phys_to_pte(base + i * levels.page_size) | prot)
    kernel.barrier("dsb ishst")
    set_pmd(kernel, pmdp, _table(kernel, table, old))
    return 0


def split_pud(kernel: Kernel, pudp: int, pud: int, *, to_cont: bool) -> int:
    """split_pud(): the block `pud` at PA `pudp` becomes a table of blocks, in runs if `to_cont`. 0 or -ENOMEM."""
    bits, levels = kernel.bits, kernel.levels
    table = kernel.allocate()
    if table is None:
        return -ENOMEM
    old = bits.pgprot(pud, levels.pud.size)
    prot = old & ~bits.TYPE | bits.VALID
    if not bits.pte_valid(pud):
        prot = bits.pgprot(bits.mkinvalid(prot), levels.pmd.size)
    prot = _cont(kernel, prot, to_cont)
    base = bits.pte_to_phys(pud) & -levels.pud.size
    for i in range(levels.pmd.ptrs):
        set_pmd(kernel, table + 8 * i, bits.phys_to_pte(base + i * levels.pmd.size) | prot)
    kernel.barrier("dsb ishst")
    set_pud(kernel, pudp, _table(kernel, table, old))
    return 0


def _cont(kernel: Kernel, prot: int, to_cont: bool) -> int:
    return prot | kernel.bits.CONT if to_cont else prot & ~kernel.bits.CONT


def _table(kernel: Kernel, pa: int, prot: int) -> int:
    """The descriptor of a table in place of a block with `prot`: as executable as the block was."""
    bits = kernel.bits
    flags = bits.table.pack(VALID=1, TYPE=1, AF=1, UXNTable=1, PXNTable=int(bool(prot & bits.PXN)))
    return flags | bits.phys_to_pte(pa)


def range_split_to_ptes(kernel: Kernel, start: int, end: int) -> int:
    """range_split_to_ptes(start, end): every leaf of the VAs becomes pages without CONT. 0 or a negative error."""
    lazy_mmu_mode_enable(kernel)
    ops = MmWalkOps(
        pud_entry=split_to_ptes_pud_entry, pmd_entry=split_to_ptes_pmd_entry, pte_entry=split_to_ptes_pte_entry
    )
    ret = walk_kernel_page_table_range_lockless(kernel, start, end, ops)
    lazy_mmu_mode_disable(kernel)
    return ret


def split_to_ptes_pud_entry(pudp: int, addr: int, next: int, walk: MmWalk) -> int:
    """split_to_ptes_pud_entry(): the walk goes on into the table that the block became."""
    pud = walk.kernel.read(pudp)
    return split_pud(walk.kernel, pudp, pud, to_cont=False) if walk.kernel.bits.pud_leaf(pud) else 0


def split_to_ptes_pmd_entry(pmdp: int, addr: int, next: int, walk: MmWalk) -> int:
    """split_to_ptes_pmd_entry(): the pages that a block became are not visited."""
    kernel = walk.kernel
    pmd = kernel.read(pmdp)
    if not kernel.bits.pmd_leaf(pmd):
        return 0
    if pmd & kernel.bits.CONT:
        split_contpmd(kernel, pmdp)
    ret = split_pmd(kernel, pmdp, pmd, to_cont=False)
    walk.action = Action.CONTINUE
    return ret


def split_to_ptes_pte_entry(pte: int, addr: int, next: int, walk: MmWalk) -> int:
    """split_to_ptes_pte_entry()."""
    if walk.kernel.read(pte) & walk.kernel.bits.CONT:
        split_contpte(walk.kernel, pte)
    return 0
