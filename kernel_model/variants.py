"""Kernel variants: one row each. A difference between kernels is a column here, found by presence in the image.

No version is compared anywhere: `detect` asks for symbols and BTF members. Sources: mm/pagewalk.c, mm/memory.c,
arch/arm64/mm/pageattr.c and arch/arm64/include/asm/{pgtable,tlbflush}.h of Debian 6.1.176, 6.12.107, 7.2.13, 7.3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace


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
    flush_tlb_kernel_range: `flush_rounds`: to whole pages; `flush_limit_inclusive`: PTRS_PER_PTE pages flush all.
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
)
V6_1 = replace(
    V6_12,
    name="6.1",
    pmd_rechecks_pud=False,
    again_after_pte=False,
    present_invalid=False,
    prot_none_58=True,
    addr_high=False,
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
)
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in (V6_1, V6_12, V7)}


class UnknownVariant(ValueError):  # noqa: N818  it is the variant that is unknown
    """No row for a name or an image."""


def by_name(name: str) -> Variant:
    """The row called `name`; raises UnknownVariant, which lists the names."""
    try:
        return VARIANTS[name]
    except KeyError:
        raise UnknownVariant(f"model {name}: there is none, only {', '.join(VARIANTS)}") from None


def detect(symbols: Container[str], has_member: Callable[[str, str], bool]) -> Variant:
    """The row for an image, by what is in it: its symbols, and `has_member(struct, member)` from BTF.

    Raises UnknownVariant for an image without any of the functions that tell.
    """
    # Linux 6.18 gave pageattr.c the lockless walk ("arm64: pageattr: Use pagewalk API", a660194dd101).
    if "walk_kernel_page_table_range_lockless" in symbols:
        return V7
    if "__apply_to_page_range" not in symbols and "apply_to_page_range" not in symbols:
        raise UnknownVariant(
            "no page walk that the model knows: no apply_to_page_range, no walk_kernel_page_table_range"
        )
    # Linux 6.5 gave mm_walk_ops its walk_lock ("mm: enable page walking API to lock vmas during the walk").
    return V6_12 if has_member("mm_walk_ops", "walk_lock") else V6_1
