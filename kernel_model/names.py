"""Linux's names for descriptor bits, as masks over pgtable's layouts: no bit number is written here.

Sources: arch/arm64/include/asm/pgtable-hwdef.h, pgtable-prot.h, pgtable.h.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from kernel_model.variants import Variant
from pgtable.bits import Field, Layout, Span
from pgtable.descriptors import LAST_LEVEL, Format

MIGRATION_TYPES = range(28, 31)  # SWP_MIGRATION_READ, _READ_EXCLUSIVE, _WRITE as Debian configures 6.12


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
        """The bits of a hardware format; with indirect permissions too, PTE_USER and PTE_RDONLY are AP's."""
        fmt = replace(fmt, pie=False, poe=False)
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
    def AF(self) -> int:
        """PTE_AF."""
        return self.leaf["AF"].mask

    @cached_property
    def DIRTY(self) -> int:
        """PTE_DIRTY, the lowest bit for software."""
        return self.leaf["IGNORED_58_55"].put(0, 1)

    @cached_property
    def SPECIAL(self) -> int:
        """PTE_SPECIAL, the bit above PTE_DIRTY."""
        return self.leaf["IGNORED_58_55"].put(0, 2)

    @cached_property
    def GP(self) -> int:
        """PTE_GP."""
        return self.leaf["GP"].mask

    @cached_property
    def SHARED(self) -> int:
        """PTE_SHARED: a constant of the build, also where TCR_EL1.DS makes address bits of these."""
        return self.leaf["SH"].mask if "SH" in self.leaf else self.leaf["OA"].spans[-1].mask

    @cached_property
    def ATTRINDX_MASK(self) -> int:
        """PTE_ATTRINDX_MASK."""
        return self.leaf["AttrIndx"].mask

    def ATTRINDX(self, index: int) -> int:
        """PTE_ATTRINDX()."""
        return self.leaf["AttrIndx"].put(0, index)

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

    def pxd_huge(self, val: int) -> bool:
        """pmd_huge() and pud_huge() of 6.1, which ask for no table bit; pmd_leaf() and pud_leaf() later."""
        if self.variant.prot_none_58:
            return val != 0 and not val & self.TYPE
        return self.pud_leaf(val)

    def pxd_sect(self, val: int) -> bool:
        """pmd_sect(), pud_sect() of 6.x: a valid block."""
        return val & (self.VALID | self.TYPE) == self.VALID

    def _address(self, layout: Layout, name: str) -> Field:
        """PTE_ADDR_LOW: the format's address, and bits 49:48 in a build for 52 bits whatever TCR_EL1.DS says."""
        field = layout[name]
        if not self.variant.addr_high or "RES0_49_48" not in layout:
            return field
        top = field.value_mask.bit_length()
        more = tuple(Span(span.lo, span.width, top + span.at) for span in layout["RES0_49_48"].spans)
        return Field(name, field.spans + more)

    @cached_property
    def _leaf_address(self) -> Field:
        return self._address(self.leaf, "OA")

    @cached_property
    def _table_address(self) -> Field:
        return self._address(self.table, "TA")

    def pte_to_phys(self, val: int) -> int:
        """__pte_to_phys()."""
        return self._leaf_address.get(val)

    def phys_to_pte(self, phys: int) -> int:
        """__phys_to_pte_val(): the address bits of an entry for `phys`."""
        return self._leaf_address.put(0, phys & self._leaf_address.value_mask)

    def pgprot(self, val: int, size: int) -> int:
        """pte_pgprot(), pmd_pgprot(), pud_pgprot(): all but the address of an entry that covers `size` bytes."""
        return val ^ self.phys_to_pte(self.pte_to_phys(val) & -size)

    def mkinvalid(self, val: int) -> int:
        """pte_mkinvalid(), pmd_mkinvalid()."""
        return val & ~self.VALID | self.NG

    def pmd_trans_huge(self, val: int) -> bool:
        """pmd_trans_huge(): 6.1 asks for a word without the table bit, later kernels for what would be no table."""
        if not self.variant.thp:
            return False
        if self.variant.prot_none_58:
            return self.pmd_present(val) and not val & self.TYPE
        return self.pmd_present(val) and not self.pxd_table(val | self.VALID)

    def devmap(self, val: int) -> bool:
        """pmd_devmap()."""
        return self.variant.devmap and self.variant.thp and bool(val & self.leaf["IGNORED_58_55"].put(0, 4))

    def is_migration_entry(self, val: int) -> bool:
        """is_migration_entry() of 6.12, for a word that is not present: __swp_type() is one of the three kinds."""
        field = self.leaf["AP"].mask | self.SHARED | self.AF
        return (val & field) // (field & -field) in MIGRATION_TYPES

    def swp_offset_phys(self, val: int, page_size: int) -> int:
        """PA of the page that a migration entry names: swp_offset_pfn(), the bits above nG within the PA size."""
        pages = 1 << self.leaf["OA"].value_mask.bit_length()
        return val // (self.NG << 1) * page_size % pages

    def table_address(self, val: int) -> int:
        """__pmd_to_phys() and its kin: PA of the table."""
        return self._table_address.get(val)

    def upper_bad(self, val: int) -> bool:
        """pgd_bad(), p4d_bad()."""
        return not self.pxd_table(val) if self.variant.bad_is_type else not val & self.TYPE

    def valid_kernel(self, val: int) -> bool:
        """A store of `val` must be ordered for the walker: VALID, not user, UXN (pte_valid_not_user)."""
        return val & (self.VALID | self.USER | self.UXN) == self.VALID | self.UXN
