"""arch/arm64/mm/pageattr.c: set_memory_valid and what it stands on.

Rules of this file: bits are cleared first and set after, because PRESENT_INVALID and nG are one bit. What a call does
besides is in `Kernel.events`, in order.
"""

from __future__ import annotations

from typing import NamedTuple

from kernel_model.apply import apply_to_page_range
from kernel_model.levels import U64
from kernel_model.mm import EINVAL, Kernel, Tlbi
from kernel_model.names import Bits
from kernel_model.pagewalk import Action, MmWalk, MmWalkOps, walk_kernel_page_table_range_lockless

ASID_BITS_BELOW = 44  # bits of a TLBI operand that hold VA[55:12]


class Masks(NamedTuple):
    """struct page_change_data."""

    set: int
    clear: int


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
    """__change_memory_common(): the change, then the TLB."""
    end = start + size & U64
    if kernel.variant.walks:
        ret = update_range_prot(kernel, start, size, masks)
    else:
        ret = apply_to_page_range(kernel, start, size, lambda pte, _: change_page_range(kernel, pte, masks))
    if kernel.variant.flush_always or masks != valid_masks(kernel.bits, 1):
        flush_tlb_kernel_range(kernel, start, end)
    return ret


def change_page_range(kernel: Kernel, pte: int, masks: Masks) -> int:
    """change_page_range(): one PTE of 6.x."""
    _set(kernel, pte, masked(kernel.read(pte), masks))
    return 0


def masked(value: int, masks: Masks) -> int:
    """set_pageattr_masks()."""
    return value & ~masks.clear & U64 | masks.set


def update_range_prot(kernel: Kernel, start: int, size: int, masks: Masks) -> int:
    """update_range_prot() of 7.x, where nothing needs splitting (linear_map_requires_bbml3 is 0)."""
    pending = _Pending()
    ops = MmWalkOps(
        pud_entry=lambda pud, addr, next, walk: _block(kernel, pud, addr, next, walk, masks, pending, "pud"),
        pmd_entry=lambda pmd, addr, next, walk: _block(kernel, pmd, addr, next, walk, masks, pending, "pmd"),
        pte_entry=lambda pte, addr, next, walk: _page(kernel, pte, masks, pending),
    )
    ret = walk_kernel_page_table_range_lockless(kernel, start, start + size & U64, ops)
    if pending.barriers:  # lazy_mmu_mode_disable()
        kernel.barrier("dsb ishst", "isb")
    return ret


class _Pending:
    """TIF_LAZY_MMU_PENDING: a barrier is owed when lazy mode ends."""

    barriers = False


def _block(
    kernel: Kernel, entry: int, addr: int, next: int, walk: MmWalk, masks: Masks, pending: _Pending, name: str
) -> int:
    """pageattr_pud_entry(), pageattr_pmd_entry(): a whole leaf is changed, a part of one is refused."""
    value = kernel.read(entry)
    leaf = kernel.bits.pud_leaf if name == "pud" else kernel.bits.pmd_leaf
    if not leaf(value):
        return 0
    if (next - addr & U64) != getattr(kernel.levels, name).size:
        kernel.warn(f"pageattr_{name}_entry")
        return -EINVAL
    new = masked(value, masks)
    kernel.write(entry, new)
    pending.barriers |= kernel.bits.pte_valid(new)
    walk.action = Action.CONTINUE
    return 0


def _page(kernel: Kernel, pte: int, masks: Masks, pending: _Pending) -> int:
    """pageattr_pte_entry()."""
    new = masked(kernel.read(pte), masks)
    kernel.write(pte, new)
    pending.barriers |= kernel.bits.valid_kernel(new)
    return 0


def _set(kernel: Kernel, pte: int, value: int) -> None:
    """__set_pte() of a kernel without lazy MMU mode."""
    kernel.write(pte, value)
    if kernel.bits.valid_kernel(value):
        kernel.barrier("dsb ishst", "isb")


def flush_tlb_kernel_range(kernel: Kernel, start: int, end: int) -> None:
    """flush_tlb_kernel_range() on hardware without range TLBI."""
    page = kernel.levels.page_size
    if kernel.variant.flush_rounds:
        start, end = start & -page, end + page - 1 & -page & U64
    size = end - start & U64
    limit = (page // 8) * page
    if size > limit or (size == limit and kernel.variant.flush_limit_inclusive):
        kernel.barrier("dsb ishst")
        kernel.events.append(Tlbi("VMALLE1IS"))
        kernel.barrier("dsb ish", "isb")
        return
    kernel.barrier("dsb ishst")
    operand, last = (va >> 12 & (1 << ASID_BITS_BELOW) - 1 for va in (start, end))
    while operand < last:
        kernel.events.append(Tlbi("VAALE1IS", operand))
        operand += page >> 12
    kernel.barrier("dsb ish", "isb")
