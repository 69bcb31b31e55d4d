"""Named maps in pairs: a `good_` one that translates, and its `bad_` twin with exactly one bit wrong.

A twin is a row: how the good map is made, which bit is flipped (of a descriptor by level, of a register by name, or of
the VA), and the fault that comes of it by the Arm ARM. `tests/pgtable/test_maps.py` checks both, and the one bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pgtable.access import Access
from tests.pgtable.hand import Tree, leaf, tcr2, tree

READ, WRITE, FETCH = Access.read(), Access.write(), Access.fetch()
READ_EL0, WRITE_EL0, FETCH_EL0 = Access.read(0), Access.write(0), Access.fetch(0)


class Twins(NamedTuple):
    """`good()` translates for `access`; with bit `bit` of `where` flipped there is fault `type` at `level`.

    `where`: a level's descriptor, a register's name, or "VA".
    """

    good: Callable[[], Tree]
    access: Access
    where: int | str
    bit: int
    type: str
    level: int

    def bad(self) -> Tree:
        """The good map with its one bit flipped."""
        good = self.good()
        if self.where == "VA":
            return good._replace(va=good.va ^ 1 << self.bit)
        if isinstance(self.where, str):
            return good.with_regs(**{self.where: good.regs[self.where] ^ 1 << self.bit})
        return good.with_flipped(self.where, 1 << self.bit)


def good_page() -> Tree:
    """EL1 read/write, nobody executes."""
    return tree(leaf(UXN=1, PXN=1))


def good_code() -> Tree:
    """EL1 reads and executes."""
    return tree(leaf(AP=2, UXN=1))


def good_user_page() -> Tree:
    """EL0 and EL1 read/write, EL0 executes."""
    return tree(leaf(AP=1))


def good_user_code() -> Tree:
    """EL0 and EL1 read, EL0 executes."""
    return tree(leaf(AP=3, PXN=1))


def good_writable_code() -> Tree:
    """EL1 read, write, execute."""
    return tree(leaf(UXN=1))


def good_block() -> Tree:
    """A 2 MiB block."""
    return tree(leaf(low=1, UXN=1, PXN=1), level=2)


def good_large_block() -> Tree:
    """A 512 GiB block, which only DS makes legal."""
    return tree(leaf(0x80_0000_0000, low=1, SH=0), level=0, tcr_flags={"DS": 1}, ps=6)


def good_small_output() -> Tree:
    """44-bit output addresses."""
    return tree(ps=4)


def good_kernel_half() -> Tree:
    """The upper half."""
    return tree(upper=True)


def good_tagged_pointer() -> Tree:
    """An address with a tag, which TBI ignores."""
    plain = tree(tcr_flags={"TBI0": 1})
    return plain._replace(va=plain.va | 0xA5 << 56)


def good_unprivileged_reach() -> Tree:
    """A page of EL0's, EL1 allowed to reach it (PSTATE.PAN is 0)."""
    return tree(leaf(AP=1), PAN=0)


def good_old_page() -> Tree:
    """AF is 0 and hardware sets it."""
    return tree(leaf(AF=0), tcr_flags={"HA": 1})


def good_clean_page() -> Tree:
    """Read-only with DBM, and hardware manages the dirty state."""
    return tree(leaf(AP=2, DBM=1), tcr_flags={"HA": 1, "HD": 1})


def good_indirect() -> Tree:
    """PIIndex 5: EL1 has read/write, EL0 nothing."""
    return tree(leaf(AP=1, PXN=1), TCR2_EL1=tcr2(PIE=1), PIR_EL1=5 << 20)


def good_overlaid() -> Tree:
    """POIndex 3: the overlay leaves EL1 read and write."""
    return tree(leaf(POIndex=3), TCR2_EL1=tcr2(POE=1), POR_EL1=5 << 12)


def good_host() -> Tree:
    """EL2 with VHE."""
    return tree(regime="EL20")


def good_hypervisor() -> Tree:
    """EL2 without VHE."""
    return tree(leaf(XN=0), regime="EL2")


def good_monitor() -> Tree:
    """EL3."""
    return tree(regime="EL3")


def good_identity() -> Tree:
    """The MMU is off: the VA is the PA."""
    return tree(va=0x8000_0000, sctlr_flags={"M": 0})


def good_two_halves() -> Tree:
    """The page's VA has a table in the lower half only."""
    return tree()


TWINS = {
    "valid": Twins(good_page, READ, 3, 0, "translation", 3),
    "page type": Twins(good_page, READ, 3, 1, "translation", 3),
    "access flag": Twins(good_page, READ, 3, 10, "access flag", 3),
    "AP[2]": Twins(good_page, WRITE, 3, 7, "permission", 3),
    "AP[1]": Twins(good_user_page, READ_EL0, 3, 6, "permission", 3),
    "AP[1] runs": Twins(good_writable_code, FETCH, 3, 6, "permission", 3),
    "PXN": Twins(good_code, FETCH, 3, 53, "permission", 3),
    "UXN": Twins(good_user_code, FETCH_EL0, 3, 54, "permission", 3),
    "block valid": Twins(good_block, READ, 2, 0, "translation", 2),
    "block access flag": Twins(good_block, READ, 2, 10, "access flag", 2),
    "table valid L0": Twins(good_page, READ, 0, 0, "translation", 0),
    "table valid L1": Twins(good_page, READ, 1, 0, "translation", 1),
    "table valid L2": Twins(good_page, READ, 2, 0, "translation", 2),
    "L0 type": Twins(good_page, READ, 0, 1, "translation", 0),
    "APTable[0] L0": Twins(good_user_page, READ_EL0, 0, 61, "permission", 3),
    "APTable[0] L1": Twins(good_user_page, READ_EL0, 1, 61, "permission", 3),
    "APTable[0] L2": Twins(good_user_page, READ_EL0, 2, 61, "permission", 3),
    "APTable[1] L0": Twins(good_page, WRITE, 0, 62, "permission", 3),
    "APTable[1] L2": Twins(good_user_page, WRITE_EL0, 2, 62, "permission", 3),
    "UXNTable L0": Twins(good_user_code, FETCH_EL0, 0, 60, "permission", 3),
    "UXNTable L2": Twins(good_user_code, FETCH_EL0, 2, 60, "permission", 3),
    "PXNTable L0": Twins(good_code, FETCH, 0, 59, "permission", 3),
    "PXNTable L1": Twins(good_code, FETCH, 1, 59, "permission", 3),
    "WXN": Twins(good_writable_code, FETCH, "SCTLR_EL1", 19, "permission", 3),
    "PAN": Twins(good_unprivileged_reach, READ, "PAN", 0, "permission", 3),
    "EPD0": Twins(good_page, READ, "TCR_EL1", 7, "translation", 0),
    "EPD1": Twins(good_kernel_half, READ, "TCR_EL1", 23, "translation", 0),
    "E0PD0": Twins(good_user_page, READ_EL0, "TCR_EL1", 55, "translation", 0),
    "T0SZ": Twins(good_page, READ, "TCR_EL1", 5, "translation", 0),
    "TBI0": Twins(good_tagged_pointer, READ, "TCR_EL1", 37, "translation", 0),
    "TBID0": Twins(good_tagged_pointer, FETCH, "TCR_EL1", 51, "translation", 0),
    "VA[48]": Twins(good_page, READ, "VA", 48, "translation", 0),
    "VA[63]": Twins(good_page, READ, "VA", 63, "translation", 0),
    "VA[55]": Twins(good_two_halves, READ, "VA", 55, "translation", 0),
    "VA[48], upper": Twins(good_kernel_half, READ, "VA", 48, "translation", 0),
    "OA[44]": Twins(good_small_output, READ, 3, 44, "address size", 3),
    "TA[44] L1": Twins(good_small_output, READ, 1, 44, "address size", 1),
    "TA[47] L0": Twins(good_small_output, READ, 0, 47, "address size", 0),
    "TTBR[44]": Twins(good_small_output, READ, "TTBR0_EL1", 44, "address size", 0),
    "TA[40] L2": Twins(good_page, READ, 2, 40, "external abort on the walk", 3),
    "TTBR[40]": Twins(good_page, READ, "TTBR0_EL1", 40, "external abort on the walk", 0),
    "EE": Twins(good_page, READ, "SCTLR_EL1", 25, "translation", 0),
    "DS": Twins(good_large_block, READ, "TCR_EL1", 59, "translation", 0),
    "HA": Twins(good_old_page, READ, "TCR_EL1", 39, "access flag", 3),
    "HD": Twins(good_clean_page, WRITE, "TCR_EL1", 40, "permission", 3),
    "DBM": Twins(good_clean_page, WRITE, 3, 51, "permission", 3),
    "Device, unaligned": Twins(good_page, Access(aligned=False), 3, 2, "alignment", 3),
    "PIR, write": Twins(good_indirect, WRITE, "PIR_EL1", 22, "permission", 3),
    "nDirty": Twins(good_indirect, WRITE, 3, 7, "permission", 3),
    "POR, write": Twins(good_overlaid, WRITE, "POR_EL1", 14, "permission", 3),
    "POIndex": Twins(good_overlaid, READ, 3, 60, "permission", 3),
    "EL2&0 AP[2]": Twins(good_host, Access.write(2), 3, 7, "permission", 3),
    "EL2 XN": Twins(good_hypervisor, Access.fetch(2), 3, 54, "permission", 3),
    "EL2 XNTable": Twins(good_hypervisor, Access.fetch(2), 1, 60, "permission", 3),
    "EL2 APTable[1]": Twins(good_hypervisor, Access.write(2), 1, 62, "permission", 3),
    "EL2 VA[55]": Twins(good_hypervisor, Access.read(2), "VA", 55, "translation", 0),
    "EL3 AP[2]": Twins(good_monitor, Access.write(3), 3, 7, "permission", 3),
    "MMU off, VA[52]": Twins(good_identity, READ, "VA", 52, "address size", 0),
}
