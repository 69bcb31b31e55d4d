"""arch/arm64/include/asm/tlbflush.h: flush_tlb_kernel_range, by page, by range (FEAT_TLBIRANGE) or all.

Rules of this file: operands are made by layouts, Arm ARM C5.5 (TLBI VAALE1IS, TLBI RVAALE1IS).
"""

from __future__ import annotations

from kernel_model.levels import U64
from kernel_model.mm import Kernel, Tlbi
from pgtable.bits import Layout, bits

SHIFT = 12  # an operand counts in 4 KiB whatever the page size
BY_VA = Layout(
    "TLBI by VA",
    (bits("ASID", 63, 48), bits("TTL", 47, 44, "translation table level hint"), bits("VA", 43, 0, "VA[55:12]")),
)
BY_RANGE = Layout(
    "TLBI by range of VAs",
    (
        bits("ASID", 63, 48),
        bits("TG", 47, 46, "granule", {1: "4K", 2: "16K", 3: "64K"}),
        bits("SCALE", 45, 44, "exponent of the size"),
        bits("NUM", 43, 39, "multiplier of the size"),
        bits("TTL", 38, 37, "translation table level hint"),
        bits("BaseADDR", 36, 0, "first page"),
    ),
)
SCALES = BY_RANGE["SCALE"].value_mask
LPA2_SHIFT = 16  # BaseADDR counts in 64 KiB where TCR_EL1.DS is set


def flush_tlb_kernel_range(kernel: Kernel, start: int, end: int) -> None:
    """flush_tlb_kernel_range(start, end): VAs; the end is outside."""
    page = kernel.levels.page_size
    if kernel.variant.flush_rounds:
        start, end = start & -page, end + page - 1 & -page & U64
    if _limit_excess(kernel, end - start & U64):
        _flush_tlb_all(kernel)
        return
    kernel.barrier("dsb ishst")
    if kernel.variant.flush_rounds:
        _flush_tlb_range_op(kernel, start, end)
    else:
        _each_page(kernel, start, end)
    kernel.barrier("dsb ish", "isb")


def _limit_excess(kernel: Kernel, size: int) -> bool:
    """Whether `size` bytes are too many to flush by page (PTRS_PER_PTE) or by range (MAX_TLBI_RANGE_PAGES)."""
    if _by_range(kernel):
        return size > range_pages(BY_RANGE["NUM"].value_mask, SCALES) * kernel.levels.page_size
    limit = kernel.levels.pte.ptrs * kernel.levels.page_size
    return size > limit or (size == limit and kernel.variant.flush_limit_inclusive)


def _flush_tlb_all(kernel: Kernel) -> None:
    """flush_tlb_all()."""
    kernel.barrier("dsb ishst")
    kernel.events.append(Tlbi("VMALLE1IS"))
    kernel.barrier("dsb ish", "isb")


def _each_page(kernel: Kernel, start: int, end: int) -> None:
    """Operands, not addresses, are compared: an unaligned start costs no TLBI more."""
    operand, last = (BY_VA.pack(VA=_vaddr(va)) for va in (start, end))
    while operand < last:
        kernel.events.append(Tlbi("VAALE1IS", operand))
        operand += kernel.levels.page_size >> SHIFT


def _vaddr(va: int) -> int:
    return va >> SHIFT & BY_VA["VA"].value_mask


def _flush_tlb_range_op(kernel: Kernel, start: int, end: int) -> None:
    """__flush_tlb_range_op() with vaale1is: ranges from the largest scale down, an odd page alone."""
    shift, scale = kernel.levels.page_shift, SCALES
    while start != end:
        pages = (end - start & U64) >> shift
        if not _by_range(kernel) or pages == 1 or (_lpa2(kernel) and start % (1 << LPA2_SHIFT)):
            kernel.events.append(Tlbi("VAALE1IS", BY_VA.pack(VA=_vaddr(start))))
            start = start + (1 << shift) & U64
            continue
        num = pages // range_pages(0, scale) - 1
        if num >= 0:
            kernel.events.append(Tlbi("RVAALE1IS", _vaddr_range(kernel, start, scale, num)))
            start = start + (range_pages(num, scale) << shift) & U64
        scale -= 1


def range_pages(num: int, scale: int) -> int:
    """Pages that one range operation covers, by its NUM and SCALE."""
    return num + 1 << 5 * scale + 1


def _vaddr_range(kernel: Kernel, start: int, scale: int, num: int) -> int:
    """__TLBI_VADDR_RANGE()."""
    shift = kernel.levels.page_shift
    unit = LPA2_SHIFT if _lpa2(kernel) else shift
    base = start >> unit & BY_RANGE["BaseADDR"].value_mask
    return BY_RANGE.pack(TG={12: 1, 14: 2, 16: 3}[shift], SCALE=scale, NUM=num, BaseADDR=base)


def _by_range(kernel: Kernel) -> bool:
    return kernel.variant.flush_rounds and kernel.settings.tlb_range


def _lpa2(kernel: Kernel) -> bool:
    """lpa2_is_enabled(): no layout of a leaf has SH then."""
    return "SH" not in kernel.bits.leaf
