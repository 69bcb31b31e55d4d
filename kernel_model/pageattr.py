"""arch/arm64/mm/pageattr.c: the permissions of kernel memory, changed in the tables and then in the TLB.

Rules of this file:
- Bits are cleared first and set after, because PRESENT_INVALID and nG are one bit (`masked`).
- Nothing is rolled back: what was changed before an error stays changed.
- What a call does besides is in `Kernel.events`, in order. A struct page is given by the PA of its page.
Sources: that file in Debian 6.1.176, 6.12.107, 7.2.13 and 7.3.4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kernel_model.apply import apply_to_page_range
from kernel_model.levels import U64, Level
from kernel_model.mm import EINVAL, Kernel
from kernel_model.names import Bits
from kernel_model.pagewalk import Action, MmWalk, MmWalkOps, p4d_offset, pmd_offset, pte_offset, pud_offset
from kernel_model.split import split_kernel_leaf_mapping
from kernel_model.stores import lazy_mmu_mode_disable, lazy_mmu_mode_enable, set_pmd, set_pte
from kernel_model.tlbflush import flush_tlb_kernel_range
from kernel_model.variants import Variant
from kernel_model.vmalloc import VmFlags, VmStruct, find_vm_area
from kernel_model.walkers import walk_kernel_page_table_range_lockless


class Masks(NamedTuple):
    """struct page_change_data."""

    set: int
    clear: int


def masked(value: int, masks: Masks) -> int:
    """set_pageattr_masks()."""
    return value & ~masks.clear & U64 | masks.set


# memory of vmalloc areas


def set_memory_ro(kernel: Kernel, addr: int, numpages: int) -> int:
    """set_memory_ro(addr, numpages); returns 0 or a negative error number."""
    return change_memory_common(kernel, addr, numpages, Masks(kernel.bits.RDONLY, kernel.bits.WRITE))


def set_memory_rw(kernel: Kernel, addr: int, numpages: int) -> int:
    """set_memory_rw(addr, numpages); returns 0 or a negative error number."""
    return change_memory_common(kernel, addr, numpages, Masks(kernel.bits.WRITE, kernel.bits.RDONLY))


def set_memory_nx(kernel: Kernel, addr: int, numpages: int) -> int:
    """set_memory_nx(addr, numpages); returns 0 or a negative error number."""
    return change_memory_common(kernel, addr, numpages, Masks(kernel.bits.PXN, _maybe_gp(kernel)))


def set_memory_x(kernel: Kernel, addr: int, numpages: int) -> int:
    """set_memory_x(addr, numpages); returns 0 or a negative error number."""
    return change_memory_common(kernel, addr, numpages, Masks(_maybe_gp(kernel), kernel.bits.PXN))


def _maybe_gp(kernel: Kernel) -> int:
    """PTE_MAYBE_GP: branch targets are guarded in a kernel built for it."""
    return kernel.bits.GP if kernel.settings.bti_kernel else 0


def change_memory_common(kernel: Kernel, addr: int, numpages: int, masks: Masks) -> int:
    """change_memory_common(): only inside one area of vmalloc(); its linear alias first, where that follows."""
    page, size = kernel.levels.page_size, _size(kernel, numpages)
    start = addr & -page
    if start != addr:
        kernel.warn("change_memory_common")
    area = find_vm_area(kernel, addr)
    if not area or (start + size & U64) > area.end or not _may_change(kernel, area):
        return -EINVAL
    if not numpages:
        return 0
    if kernel.settings.rodata_full and kernel.bits.RDONLY in masks:
        ret = _change_alias(kernel, area, (start - area.addr & U64) // page, numpages, masks)
        if ret:
            return ret
    kernel.called("vm_unmap_aliases")
    return __change_memory_common(kernel, start, size, masks)


def _may_change(kernel: Kernel, area: VmStruct) -> bool:
    """The area's pages are its own, one by one."""
    tested = VmFlags.VM_ALLOC | (VmFlags.VM_ALLOW_HUGE_VMAP if kernel.variant.refuses_huge_vmap else 0)
    return area.flags & tested == VmFlags.VM_ALLOC


def _change_alias(kernel: Kernel, area: VmStruct, first: int, numpages: int, masks: Masks) -> int:
    """The linear map of the area's pages: all of them and errors forgotten, or only those asked for."""
    whole, count = kernel.variant.alias_whole_area, numpages & (1 << 32) - 1
    for i in range(area.nr_pages) if whole else range(first, first + count):
        kernel.step("change_memory_common")
        alias = kernel.page_address(area.page(i))
        ret = __change_memory_common(kernel, alias, kernel.levels.page_size, masks)
        if ret and not whole:
            return ret
    return 0


# any kernel memory


def set_memory_valid(kernel: Kernel, addr: int, numpages: int, enable: int) -> int:
    """set_memory_valid(addr, numpages, enable); returns 0 or a negative error number."""
    return __change_memory_common(kernel, addr, _size(kernel, numpages), valid_masks(kernel.bits, enable))


def valid_masks(bits: Bits, enable: int) -> Masks:
    """What set_memory_valid sets and clears."""
    if not bits.variant.invalid_keeps_present:
        return Masks(bits.VALID, 0) if enable else Masks(0, bits.VALID)
    if enable:
        return Masks(bits.PRESENT_VALID_KERNEL, bits.NG)
    return Masks(bits.NG, bits.PRESENT_VALID_KERNEL)


def _size(kernel: Kernel, numpages: int) -> int:
    """PAGE_SIZE * numpages: an int, sign-extended, times an unsigned long."""
    signed = numpages & (1 << 32) - 1
    signed -= 1 << 32 if signed >> 31 else 0
    return kernel.levels.page_size * signed & U64


def __change_memory_common(kernel: Kernel, start: int, size: int, masks: Masks) -> int:
    """__change_memory_common(): the change of `size` bytes from VA `start` on, then the TLB."""
    ret = _change(kernel, start, size, masks)
    if kernel.variant.flush_always or masks != valid_masks(kernel.bits, 1):
        flush_tlb_kernel_range(kernel, start, start + size & U64)
    return ret


def _change(kernel: Kernel, start: int, size: int, masks: Masks) -> int:
    if kernel.variant.walks:
        return update_range_prot(kernel, start, size, masks)
    return apply_to_page_range(kernel, start, size, lambda pte, _: change_page_range(kernel, pte, masks))


def change_page_range(kernel: Kernel, pte: int, masks: Masks) -> int:
    """change_page_range(): one PTE of 6.x, at PA `pte`."""
    set_pte(kernel, pte, masked(kernel.read(pte), masks))
    return 0


def update_range_prot(kernel: Kernel, start: int, size: int, masks: Masks) -> int:
    """update_range_prot() of 7.x: leaves are split at both ends where that is allowed, then the range is walked."""
    end = start + size & U64
    ret = split_kernel_leaf_mapping(kernel, start, end)
    if ret:
        kernel.warn("update_range_prot")
        return ret
    lazy_mmu_mode_enable(kernel)
    ops = MmWalkOps(pud_entry=pageattr_pud_entry, pmd_entry=pageattr_pmd_entry, pte_entry=pageattr_pte_entry)
    ret = walk_kernel_page_table_range_lockless(kernel, start, end, ops, private=masks)
    lazy_mmu_mode_disable(kernel)
    return ret


def pageattr_pud_entry(pud: int, addr: int, next: int, walk: MmWalk) -> int:
    """pageattr_pud_entry(): a whole leaf is changed, a part of one is refused. `walk.private`: the masks."""
    return _change_leaf(walk, pud, next - addr & U64, walk.kernel.levels.pud, walk.kernel.bits.pud_leaf)


def pageattr_pmd_entry(pmd: int, addr: int, next: int, walk: MmWalk) -> int:
    """pageattr_pmd_entry(): as pageattr_pud_entry()."""
    return _change_leaf(walk, pmd, next - addr & U64, walk.kernel.levels.pmd, walk.kernel.bits.pmd_leaf)


def _change_leaf(walk: MmWalk, entry: int, size: int, level: Level, is_leaf: Callable[[int], bool]) -> int:
    kernel = walk.kernel
    value = kernel.read(entry)
    if not is_leaf(value):
        return 0
    if size != level.size:
        kernel.warn(f"pageattr_{level.name.lower()}_entry")
        return -EINVAL
    set_pmd(kernel, entry, masked(value, walk.private))  # set_pud() is the same
    walk.action = Action.CONTINUE
    return 0


def pageattr_pte_entry(pte: int, addr: int, next: int, walk: MmWalk) -> int:
    """pageattr_pte_entry(): any PTE, none ones and those of a contiguous run too."""
    set_pte(walk.kernel, pte, masked(walk.kernel.read(pte), walk.private))
    return 0


# the linear map


def can_set_direct_map(kernel: Kernel) -> bool:
    """can_set_direct_map(): the linear map is, or can be made, of pages."""
    settings = kernel.settings
    realm = kernel.variant.knows_realms and settings.realm
    return settings.rodata_full or settings.debug_pagealloc or arm64_kfence_can_set_direct_map(kernel) or realm


def arm64_kfence_can_set_direct_map(kernel: Kernel) -> bool:
    """arm64_kfence_can_set_direct_map(): the pool may still be made late, so every page must be changeable."""
    return kernel.settings.kfence and not kernel.settings.kfence_early


def set_direct_map_invalid_noflush(kernel: Kernel, page: int) -> int:
    """set_direct_map_invalid_noflush(page): the page's linear alias, without its TLB entry."""
    return _set_direct_map(kernel, page, valid_masks(kernel.bits, 0))


def set_direct_map_default_noflush(kernel: Kernel, page: int) -> int:
    """set_direct_map_default_noflush(page): valid and writable."""
    bits, valid = kernel.bits, valid_masks(kernel.bits, 1)
    return _set_direct_map(kernel, page, Masks(valid.set | bits.WRITE, valid.clear | bits.RDONLY))


def _set_direct_map(kernel: Kernel, page: int, masks: Masks) -> int:
    if not can_set_direct_map(kernel):
        return 0
    return _change(kernel, kernel.page_address(page), kernel.levels.page_size, masks)


def set_direct_map_valid_noflush(kernel: Kernel, page: int, nr: int, valid: int) -> int:
    """set_direct_map_valid_noflush(page, nr, valid): it does flush when it invalidates."""
    if not can_set_direct_map(kernel):
        return 0
    return set_memory_valid(kernel, kernel.page_address(page), nr, valid)


def __kernel_map_pages(kernel: Kernel, page: int, numpages: int, enable: int) -> None:
    """__kernel_map_pages(page, numpages, enable), of a kernel with DEBUG_PAGEALLOC."""
    if can_set_direct_map(kernel):
        set_memory_valid(kernel, kernel.page_address(page), numpages, enable)


def kernel_page_present(kernel: Kernel, page: int) -> bool:
    """kernel_page_present(page): the linear map has the page. What is no block is followed as a table."""
    addr, levels = kernel.page_address(page), kernel.levels
    pgd = kernel.pgd + 8 * levels.pgd.index(addr)
    if levels.top_is_none_tested("PGD") and kernel.read(pgd) == 0:
        return False
    p4d = p4d_offset(kernel, pgd, addr)
    if levels.top_is_none_tested("P4D") and kernel.read(p4d) == 0:
        return False
    pud = pud_offset(kernel, p4d, addr)
    value = kernel.read(pud)
    if value == 0 or _is_block(kernel, value):
        return kernel.bits.pte_valid(value)
    pmd = pmd_offset(kernel, pud, addr)
    value = kernel.read(pmd)
    if value == 0 or _is_block(kernel, value):
        return kernel.bits.pte_valid(value)
    return kernel.bits.pte_valid(kernel.read(pte_offset(kernel, pmd, addr)))


def _is_block(kernel: Kernel, value: int) -> bool:
    """pud_leaf(), pmd_leaf(), where an invalid leaf is one; else pud_sect(), pmd_sect()."""
    return kernel.bits.pmd_leaf(value) if kernel.variant.leaf_may_be_invalid else kernel.bits.pxd_sect(value)


class Rodata(NamedTuple):
    """rodata_enabled and rodata_full."""

    enabled: bool
    full: bool


# What rodata= may say, by `Variant.rodata_on_is_full`.
RODATA = {
    False: {"full": Rodata(True, True), "on": Rodata(True, False), "off": Rodata(False, False)},
    True: {"on": Rodata(True, True), "noalias": Rodata(True, False), "off": Rodata(False, False)},
}


def parse_rodata(variant: Variant, word: str) -> Rodata | None:
    """What `rodata=word` on the command line sets; None for a word that the kernel does not know."""
    return RODATA[variant.rodata_on_is_full].get(word)
