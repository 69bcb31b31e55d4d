"""Linux's names for descriptor bits, as masks over pgtable's layouts: no bit number is written here.

Sources: arch/arm64/include/asm/pgtable-hwdef.h, pgtable-prot.h, pgtable.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kernel_model.variants import Variant
from pgtable.bits import Layout
from pgtable.descriptors import LAST_LEVEL, Format


@dataclass(frozen=True)
class Bits:
    """The masks and predicates of one kernel variant over one descriptor format."""

    leaf: Layout
    block: Layout
    table: Layout
    variant: Variant
    ng_mappings: bool = False  # arm64_use_ng_mappings

    @classmethod
    def of(cls, fmt: Format, variant: Variant, *, ng_mappings: bool = False) -> Bits:
        """The bits of a hardware format."""
        return cls(fmt.leaf(LAST_LEVEL), fmt.leaf(LAST_LEVEL - 1), fmt.table(LAST_LEVEL - 1), variant, ng_mappings)

    @cached_property
    def VALID(self) -> int:
        """PTE_VALID."""
        return self.leaf["VALID"].mask

    @cached_property
    def TYPE(self) -> int:
        """The bit that makes a descriptor a table or a page (PTE_TABLE_BIT)."""
        return self.leaf["TYPE"].mask

    @cached_property
    def NG(self) -> int:
        """PTE_NG; with VALID clear PTE_PRESENT_INVALID."""
        return self.leaf["nG"].mask

    @cached_property
    def USER(self) -> int:
        """PTE_USER: AP[1]."""
        return self.leaf["AP"].put(0, 1)

    @cached_property
    def RDONLY(self) -> int:
        """PTE_RDONLY: AP[2]."""
        return self.leaf["AP"].put(0, 2)

    @cached_property
    def WRITE(self) -> int:
        """PTE_WRITE: DBM."""
        return self.leaf["DBM"].mask

    @cached_property
    def PXN(self) -> int:
        """PTE_PXN."""
        return self.leaf["PXN"].mask

    @cached_property
    def UXN(self) -> int:
        """PTE_UXN."""
        return self.leaf["UXN"].mask

    @cached_property
    def CONT(self) -> int:
        """PTE_CONT."""
        return self.leaf["Contiguous"].mask

    @cached_property
    def PRESENT_VALID_KERNEL(self) -> int:
        """PTE_PRESENT_VALID_KERNEL: what a valid kernel mapping has."""
        return self.VALID | (self.NG if self.ng_mappings else 0)

    # predicates, by the kernel's names

    def pte_valid(self, val: int) -> bool:
        """pte_valid()."""
        return bool(val & self.VALID)

    def pte_present_invalid(self, val: int) -> bool:
        """pte_present_invalid()."""
        return self.variant.present_invalid and val & (self.VALID | self.NG) == self.NG

    def pte_present(self, val: int) -> bool:
        """pte_present()."""
        return self.pte_valid(val) or self.pte_present_invalid(val) or bool(val & self.PROT_NONE)

    def pmd_present(self, val: int) -> bool:
        """pmd_present(): 6.1 counts PMD_PRESENT_INVALID too."""
        return self.pte_present(val) or bool(val & self.PMD_PRESENT_INVALID)

    @cached_property
    def PROT_NONE(self) -> int:
        """6.1's PTE_PROT_NONE, the highest bit for software; 0 where the kernel has none."""
        return self.leaf["IGNORED_58_55"].put(0, 8) if self.variant.prot_none_58 else 0

    @cached_property
    def PMD_PRESENT_INVALID(self) -> int:
        """6.1's PMD_PRESENT_INVALID; 0 where the kernel has none."""
        return self.leaf["IGNORED_59"].mask if self.variant.prot_none_58 else 0

    def pxd_table(self, val: int) -> bool:
        """pmd_table(), pud_table()."""
        return val & (self.VALID | self.TYPE) == self.VALID | self.TYPE

    def pmd_leaf(self, val: int) -> bool:
        """pmd_leaf()."""
        return self.pmd_present(val) and not self.pxd_table(val)

    def pud_leaf(self, val: int) -> bool:
        """pud_leaf(): pud_present() is pte_present()."""
        return self.pte_present(val) and not self.pxd_table(val)

    def upper_bad(self, val: int) -> bool:
        """pgd_bad(), p4d_bad()."""
        return not self.pxd_table(val) if self.variant.bad_is_type else not val & self.TYPE

    def valid_kernel(self, val: int) -> bool:
        """A store of `val` must be ordered for the walker: VALID, not user, UXN (pte_valid_not_user)."""
        return val & (self.VALID | self.USER | self.UXN) == self.VALID | self.UXN
