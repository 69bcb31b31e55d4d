"""Tables and registers put together by hand.

Shifts, masks and field positions are typed here again, on purpose: what a test expects must not come from the package
that it tests. Only `Registers`, `Features` and `NoMemory` are imported, as containers.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from pgtable.features import CPUS, Features
from pgtable.memory import NoMemory
from pgtable.registers import Registers

SEED = int(os.environ.get("PGTABLE_SEED", "1"))  # printed at the end of every run (tests/conftest.py)
U64 = (1 << 64) - 1
PAGE_SHIFT = {"4K": 12, "16K": 14, "64K": 16}
STRIDE = {"4K": 9, "16K": 11, "64K": 13}
TG0 = {"4K": 0, "64K": 1, "16K": 2}
TG1 = {"4K": 2, "64K": 3, "16K": 1}

# TCR_EL1 (and TCR_EL2 with E2H), TCR_EL2 without, TCR_EL3, TCR2_ELx, SCTLR_ELx: one-bit fields.
TCR_FLAGS = {
    **{"EPD0": 7, "A1": 22, "EPD1": 23, "AS": 36, "TBI0": 37, "TBI1": 38, "HA": 39, "HD": 40, "HPD0": 41, "HPD1": 42},
    **{"TBID0": 51, "TBID1": 52, "NFD0": 53, "NFD1": 54, "E0PD0": 55, "E0PD1": 56, "DS": 59},
}
TCR_ONE_FLAGS = {
    **{"TBI": 20, "HA": 21, "HD": 22, "HPD": 24, "TBID": 29, "DS": 32},
    **{"PIE": 35, "POE": 36, "AIE": 37, "HAFT": 42},
}
TCR2_FLAGS = {"PIE": 1, "E0POE": 2, "POE": 3, "AIE": 4, "HAFT": 11}
SCTLR_FLAGS = {"M": 0, "A": 1, "C": 2, "I": 12, "WXN": 19, "SPAN": 23, "EE": 25, "CMOW": 32, "EPAN": 57}
HCR_FLAGS = {"VM": 0, "DC": 12, "TGE": 27, "RW": 31, "E2H": 34}

# A leaf's one-bit fields, and where its wider ones begin.
LEAF_SHIFTS = {
    **{"AttrIndx": 2, "NS": 5, "AP": 6, "SH": 8, "AF": 10, "nG": 11, "nT": 16, "GP": 50, "DBM": 51, "Contiguous": 52},
    **{"PXN": 53, "UXN": 54, "XN": 54, "AttrIndx3": 59, "POIndex": 60},
}
TABLE_SHIFTS = {"PXNTable": 59, "UXNTable": 60, "XNTable": 60, "APTable": 61, "NSTable": 63, "AF": 10}

# Attributes: 0 Normal write-back, 1 Device-nGnRnE, 2 Normal non-cacheable, 3 Device-GRE, 4 write-through.
MAIR = 0x0000_00BB_0C44_00FF
ROOT = 0x4000_0000
TABLE_STEP = 0x1_0000  # tables are 64 KiB apart, whatever the granule
OUT = 0x8000_0000
VA = 0x0000_1234_5678_9AB8


def flags(shifts: dict[str, int], **values: int) -> int:
    """A word with the named fields set."""
    word = 0
    for name, value in values.items():
        word |= value << shifts[name]
    return word


def sctlr(**values: int) -> int:
    """SCTLR_ELx: MMU and caches on unless said otherwise."""
    return flags(SCTLR_FLAGS, **({"M": 1, "C": 1, "I": 1} | values))


def hcr(**values: int) -> int:
    """HCR_EL2 with EL1 in AArch64."""
    return flags(HCR_FLAGS, RW=1, **values)


def tcr2(**values: int) -> int:
    """TCR2_ELx."""
    return flags(TCR2_FLAGS, **values)


def leaf(pa: int = OUT, *, low: int = 3, **values: int) -> int:
    """A leaf (a page unless `low` is 1) with AF and inner shareable unless said otherwise; `pa` below 2^48."""
    return pa | low | flags(LEAF_SHIFTS, **({"AF": 1, "SH": 3} | values))


def table(pa: int, **values: int) -> int:
    """A table descriptor; `pa` below 2^48."""
    return pa | 3 | flags(TABLE_SHIFTS, **values)


def tcr(
    granule: str = "4K", ia: int = 48, *, ps: int = 5, upper: bool = False, one: bool = False, **values: int
) -> int:
    """TCR_ELx for one half (the other has 48 bits of 4K); `one`: of a regime with one VA range."""
    if one:
        return 64 - ia | 0x3500 | TG0[granule] << 14 | ps << 16 | flags(TCR_ONE_FLAGS, **values)
    here, other = 64 - ia, 16
    t0, t1 = (other, here) if upper else (here, other)
    g0, g1 = (TG0["4K"], TG1[granule]) if upper else (TG0[granule], TG1["4K"])
    return (
        t0 | 0x3500 | g0 << 14 | t1 << 16 | 0x3500 << 16 | g1 << 30 | ps << 32
    ) | flags(TCR_FLAGS, **values)  # fmt: skip


class Words(dict[int, int]):
    """Memory of the words put in; the 64 KiB around each are zero elsewhere, all else is not there.

    `reads`: the PAs fetched, in order.
    """

    def __init__(self, *args: dict[int, int]) -> None:
        super().__init__(*args)
        self.reads: list[int] = []

    def fetch(self, pa: int) -> int:
        self.reads.append(pa)
        if pa in self:
            return self[pa]
        if any(pa >> 16 == there >> 16 for there in self):
            return 0
        raise NoMemory(pa)

    def words(self, pa: int, n: int) -> np.ndarray:
        return np.array([self.fetch(pa + 8 * i) for i in range(n)], np.uint64)

    def swap(self, pa: int, old: int, new: int) -> bool:
        """The compare-and-swap of a hardware update."""
        if self[pa] != old:
            return False
        self[pa] = new
        return True


class Tree(NamedTuple):
    """One leaf in memory, the registers that lead to it, and where each level's descriptor is."""

    memory: Words
    regs: Registers
    va: int
    slots: dict[int, int]

    def with_word(self, level: int, word: int) -> Tree:
        """The same with another descriptor at `level`."""
        return self._replace(memory=Words(self.memory | {self.slots[level]: word}))

    def with_flipped(self, level: int, mask: int) -> Tree:
        """The same with some bits of the descriptor at `level` flipped."""
        return self.with_word(level, self.memory[self.slots[level]] ^ mask)

    def with_regs(self, **values: int) -> Tree:
        """The same with other registers."""
        return self._replace(regs=self.regs.replace(**values))

    def with_features(self, **changes: object) -> Tree:
        """The same on another CPU."""
        regs = self.regs
        return self._replace(regs=Registers(regs.features.replace(**changes), **dict(regs.as_dict())))


def start_level(granule: str, ia: int) -> int:
    """By counting: the level whose entries, one level after the other from the page up, reach `ia` bits."""
    level, covered = 3, PAGE_SHIFT[granule] + STRIDE[granule]
    while covered < ia:
        level, covered = level - 1, covered + STRIDE[granule]
    return level


def slots_of(va: int, granule: str, ia: int, level: int, root: int = ROOT) -> dict[int, int]:
    """The PA of each level's descriptor, tables being `TABLE_STEP` apart from the root on."""
    slots = {}
    offset = va & (1 << ia) - 1
    start = start_level(granule, ia)
    for number, at in enumerate(range(start, level + 1)):
        shift = PAGE_SHIFT[granule] + (3 - at) * STRIDE[granule]
        index = offset >> shift if at == start else offset >> shift & (1 << STRIDE[granule]) - 1
        slots[at] = root + number * TABLE_STEP + 8 * index
    return slots


# A regime's register names: TCR, TTBR0, TTBR1, MAIR, SCTLR.
NAMES = {
    "EL10": ("TCR_EL1", "TTBR0_EL1", "TTBR1_EL1", "MAIR_EL1", "SCTLR_EL1"),
    "EL20": ("TCR_EL2", "TTBR0_EL2", "TTBR1_EL2", "MAIR_EL2", "SCTLR_EL2"),
    "EL2": ("TCR_EL2", "TTBR0_EL2", "TTBR0_EL2", "MAIR_EL2", "SCTLR_EL2"),
    "EL3": ("TCR_EL3", "TTBR0_EL3", "TTBR0_EL3", "MAIR_EL3", "SCTLR_EL3"),
}
REGIME_EL = {"EL10": 1, "EL20": 2, "EL2": 2, "EL3": 3}


def tree(
    word: int | None = None,
    *,
    va: int | None = None,
    granule: str = "4K",
    ia: int = 48,
    level: int = 3,
    upper: bool = False,
    regime: str = "EL10",
    tables: dict[int, dict[str, int]] | None = None,
    ps: int = 5,
    cpu: Features | None = None,
    root: int = ROOT,
    tcr_flags: dict[str, int] | None = None,
    sctlr_flags: dict[str, int] | None = None,
    **registers: int,
) -> Tree:
    """One leaf (default: a plain page) for `va`, with tables from `ROOT` on; `tables` are fields by level."""
    va = VA if va is None else va
    va = va & (1 << ia) - 1 | (U64 ^ (1 << ia) - 1 if upper else 0)
    word = leaf(low=3 if level == 3 else 1) if word is None else word
    slots = slots_of(va, granule, ia, level, root)
    words = {}
    for at, pa in slots.items():
        next_table = root + (at - min(slots) + 1) * TABLE_STEP
        words[pa] = word if at == level else table(next_table, **(tables or {}).get(at, {}))
    one = regime in ("EL2", "EL3")
    tcr_name, ttbr0, ttbr1, mair, sctlr_name = NAMES[regime]
    values = {
        tcr_name: tcr(granule, ia, ps=ps, upper=upper, one=one, **(tcr_flags or {})),
        ttbr1 if upper else ttbr0: root,
        mair: MAIR,
        sctlr_name: sctlr(**(sctlr_flags or {})),
    }
    if regime in ("EL20", "EL2"):
        values["HCR_EL2"] = hcr(E2H=int(regime == "EL20"))
    return Tree(Words(words), Registers(cpu or CPUS["max"], **(values | registers)), va, slots)
