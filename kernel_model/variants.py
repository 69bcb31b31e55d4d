"""Kernel variants: one row each. A difference between kernels is a column here, found by presence in the image.

No version is compared anywhere: `detect` asks for symbols and BTF members. Sources: mm/pagewalk.c, mm/memory.c,
arch/arm64/mm/pageattr.c and arch/arm64/include/asm/{pgtable,tlbflush}.h of Debian 6.1.176, 6.12.107, 7.2.13, 7.3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace

from kernel_model.locks import L_6_1, L_7, L_NOVMA, L_SPLIT, Locks


@dataclass(frozen=True)
class Variant:
    """What one kernel does where kernels differ.

    Walk: `bad_is_type`: pgd_bad/p4d_bad look at the whole type (else at bit 1 only). `pmd_rechecks_pud`: walk_pmd_range
    re-reads the pud and asks for AGAIN. `reset_before_none`: the action is reset before an entry is tested for none.
    `again_after_pte`: an AGAIN left by a pte callback redoes the pmd entry. `install_pte`: the callback exists.
    Descriptors: `present_invalid`: VALID = 0 with nG = 1 is present. `prot_none_58`: 6.1's bits 58 and 59 mean present.
    `addr_high`: bits 49:48 belong to the address whatever TCR.DS says.
    pageattr: `walks`: set_memory_* walk the tables (else apply_to_page_range). `invalid_keeps_present`:
    set_memory_valid marks with PRESENT_INVALID. `flush_always`: the TLB is flushed even on error and for
    invalid -> valid. `lazy_barriers`: one DSB, ISB for a whole range.
    `alias_whole_area`: set_memory_ro and _rw change the linear alias of the whole area and go on when that fails.
    `refuses_huge_vmap`: VM_ALLOW_HUGE_VMAP is refused. `leaf_may_be_invalid`: kernel_page_present asks a leaf whether
    it is valid (else a block always is). `knows_realms`: memory of a realm can be shared, and that needs the direct
    map. `rodata_on_is_full`: what rodata=on means, and which other words there are.
    flush_tlb_kernel_range: `flush_rounds`: to whole pages, and by range where the CPU can; `flush_limit_inclusive`:
    PTRS_PER_PTE pages flush all.
    User memory: `locks`: see locks.py. `devmap`: PTE_DEVMAP exists. `thp`: CONFIG_TRANSPARENT_HUGEPAGE,
    which PREEMPT_RT excludes.
    `clears_absent_pmd`: pte_offset_map() clears a pmd that is neither present nor a migration entry, as a bad one.
    `fw_migration`: folio_walk_start() knows FW_MIGRATION. `has_normal_page_pud`: it asks vm_normal_page_pud().
    ptdump: `ptdump_folds`: a level folded at run time is named PGD (else names follow the configured levels).
    `ptdump_ends`: the last line ends where the range does (else at 0). `ptdump_block_type`: BLK looks at the whole
    type (else at bit 1 only). `contpte`: the build gathers AF and dirty over a contiguous run (CONFIG_ARM64_CONTPTE);
    `ptdump_lockless`: the dump does so by ptep_get_lockless, which waits for the run to fit.
    `fixmap_on_top`: vmemmap, PCI I/O and fixmap are in this order, up to the end.
    KFENCE: `kfence_fault`: a report says whether the kernel goes on, and one of use after free clears
    unprotected_page. `kfence_splits_pool`: the pool is split into pages when it is set up late.
    """

    name: str
    bad_is_type: bool
    pmd_rechecks_pud: bool
    reset_before_none: bool
    again_after_pte: bool
    install_pte: bool
    present_invalid: bool
    prot_none_58: bool
    addr_high: bool
    walks: bool
    invalid_keeps_present: bool
    flush_always: bool
    lazy_barriers: bool
    flush_rounds: bool
    flush_limit_inclusive: bool
    alias_whole_area: bool
    refuses_huge_vmap: bool
    leaf_may_be_invalid: bool
    knows_realms: bool
    rodata_on_is_full: bool
    ptdump_folds: bool
    ptdump_ends: bool
    ptdump_block_type: bool
    fixmap_on_top: bool
    contpte: bool
    ptdump_lockless: bool
    locks: Locks = L_SPLIT
    devmap: bool = True
    thp: bool = True
    clears_absent_pmd: bool = False
    fw_migration: bool = False
    has_normal_page_pud: bool = False
    kfence_fault: bool = False
    kfence_splits_pool: bool = False


V6_12 = Variant(
    name="6.12",
    bad_is_type=False,
    pmd_rechecks_pud=True,
    reset_before_none=False,
    again_after_pte=True,
    install_pte=False,
    present_invalid=True,
    prot_none_58=False,
    addr_high=True,
    walks=False,
    invalid_keeps_present=False,
    flush_always=True,
    lazy_barriers=False,
    flush_rounds=False,
    flush_limit_inclusive=False,
    alias_whole_area=True,
    refuses_huge_vmap=False,
    leaf_may_be_invalid=False,
    knows_realms=False,
    rodata_on_is_full=False,
    ptdump_folds=True,
    ptdump_ends=True,
    ptdump_block_type=False,
    fixmap_on_top=True,
    contpte=True,
    ptdump_lockless=True,
    clears_absent_pmd=True,
    fw_migration=True,
)
# 6.12 before its stable update split walk_page_range_novma(): what the thread's first mail patches.
V6_12_NOVMA = replace(V6_12, name="6.12-novma", locks=L_NOVMA, ptdump_ends=False)
V6_1 = replace(
    V6_12,
    name="6.1",
    pmd_rechecks_pud=False,
    again_after_pte=False,
    present_invalid=False,
    prot_none_58=True,
    addr_high=False,
    ptdump_folds=False,
    ptdump_ends=False,
    fixmap_on_top=False,
    contpte=False,
    ptdump_lockless=False,
    clears_absent_pmd=False,
    fw_migration=False,
    locks=L_6_1,
)
V7 = replace(
    V6_12,
    name="7.x",
    bad_is_type=True,
    reset_before_none=True,
    install_pte=True,
    walks=True,
    invalid_keeps_present=True,
    flush_always=False,
    lazy_barriers=True,
    flush_rounds=True,
    flush_limit_inclusive=True,
    alias_whole_area=False,
    refuses_huge_vmap=True,
    leaf_may_be_invalid=True,
    knows_realms=True,
    rodata_on_is_full=True,
    ptdump_block_type=True,
    ptdump_lockless=False,
    clears_absent_pmd=False,
    fw_migration=False,
    has_normal_page_pud=True,
    locks=L_7,
    devmap=False,
    kfence_fault=True,
    kfence_splits_pool=True,
)
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in (V6_1, V6_12_NOVMA, V6_12, V7)}


class UnknownVariant(ValueError):  # noqa: N818  it is the variant that is unknown
    """No row for a name or an image."""


def by_name(name: str) -> Variant:
    """The row called `name`, of a release or of the thread; raises UnknownVariant, which lists the names."""
    from kernel_model.thread import THREAD

    known = VARIANTS | {each: reading.variant for each, reading in THREAD.items()}
    try:
        return known[name]
    except KeyError:
        raise UnknownVariant(f"model {name}: there is none, only {', '.join(known)}") from None


def detect(symbols: Container[str], has_member: Callable[[str, str], bool]) -> Variant:
    """The row for an image, by what is in it: its symbols, and `has_member(struct, member)` from BTF.

    Raises UnknownVariant for an image without any of the functions that tell.
    """
    thp = "__split_huge_pmd" in symbols
    # Linux 6.18 gave pageattr.c the lockless walk ("arm64: pageattr: Use pagewalk API", a660194dd101).
    if "walk_kernel_page_table_range_lockless" in symbols:
        return replace(
            V7,
            thp=thp,
            contpte="contpte_ptep_get" in symbols,
            kfence_fault="kfence_handle_fault" in symbols,
            kfence_splits_pool="arch_kfence_init_pool" in symbols,
        )
    if "__apply_to_page_range" not in symbols and "apply_to_page_range" not in symbols:
        raise UnknownVariant(
            "no page walk that the model knows: no apply_to_page_range, no walk_kernel_page_table_range"
        )
    # Linux 6.5 gave mm_walk_ops its walk_lock ("mm: enable page walking API to lock vmas during the walk").
    if not has_member("mm_walk_ops", "walk_lock"):
        return replace(V6_1, thp=thp)
    # 6.12's stable updates brought note_page_flush() of "mm/ptdump: split note_page() into level specific callbacks".
    variant = V6_12_NOVMA if "walk_page_range_novma" in symbols else V6_12
    ends = has_member("ptdump_pg_state", "end_address")
    return replace(variant, thp=thp, ptdump_ends=ends, contpte="contpte_ptep_get" in symbols)
