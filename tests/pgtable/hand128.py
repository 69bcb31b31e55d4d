"""Trees of 128-bit descriptors put together by hand: shifts and positions are typed here again, on purpose.

Only `Registers`, `Features` and `NoMemory` are imported, as containers. A tree is a list of descriptors, the first
table's first: each is put where the walk must look for it, by its own arithmetic here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgtable.features import CPUS
from pgtable.memory import NoMemory
from pgtable.registers import Registers
from tests.pgtable import hand

CPU = CPUS["max"].replace(d128=True, lva3=True, pa_bits=56, the=True, mec=True)
U64 = (1 << 64) - 1
ROOT = 0x40_0000_0000
STEP = 0x1000_0000  # between tables: more than any here is large
OUT = 0x80_0000_0000
PIR = 0x0000_0000_0000_0E85  # PIIndex 0 RW, 1 R, 2 RWX, others nothing
MAIR = hand.MAIR

# A descriptor's one-bit fields, and where its wider ones begin.
SHIFTS = {
    **{"AttrIndx": 2, "MemAttr": 2, "nT": 6, "nDirty": 7, "Dirty": 7, "SH": 8, "AF": 10, "nG": 11, "FnXS": 11},
    **{"AMEC": 108, "SKL": 109, "Contiguous": 111, "DisCH": 112, "GP": 113, "Protected": 114, "AssuredOnly": 114},
    **{"PIIndex": 115, "POIndex": 121, "NS": 127, "NSTable": 127},
}
TCR2 = {"PIE": 1, "E0POE": 2, "POE": 3, "AIE": 4, "D128": 5, "HAFT": 11, "AMEC0": 12, "AMEC1": 13, "DisCH0": 14}
TCR_EL3 = {"PIE": 35, "POE": 36, "AIE": 37, "D128": 38, "HAFT": 42, "DisCH0": 43}
VTCR = {
    **{"HA": 21, "HD": 22, "DS": 32, "TL1": 35, "S2POE": 37, "D128": 38, "GCSH": 40, "TL0": 41, "HAFT": 44},
    **{"T0SZ": 0, "SH0": 12, "TG0": 14, "PS": 16},
}


def leaf(pa: int = OUT, skl: int = 0, **fields: int) -> int:
    """A page, or with `skl` a block: AF, inner shareable, PIIndex 0 unless said otherwise."""
    return pa | 1 | hand.flags(SHIFTS, **({"SKL": skl, "AF": 1, "SH": 3} | fields))


def table(pa: int, skl: int = 0, **fields: int) -> int:
    """A table descriptor that skips `skl` levels."""
    return pa | 1 | hand.flags(SHIFTS, **({"SKL": skl} | fields))


def ttbr(base: int = ROOT, skl: int = 0) -> int:
    """TTBRn_EL1, TTBRn_EL2 or VTTBR_EL2 of 128 bits."""
    return base & (1 << 48) - 1 | skl << 1 | base >> 48 << 80


class Ram(dict[int, int]):
    """Memory of the 128-bit words put in, and nothing else. `reads`: the PAs asked for, in order."""

    def __init__(self, *args: dict[int, int]) -> None:
        super().__init__(*args)
        self.reads: list[int] = []

    def fetch16(self, pa: int) -> int:
        self.reads.append(pa)
        if pa in self:
            return self[pa]
        raise NoMemory(pa)

    def fetch(self, pa: int) -> int:
        return self.fetch16(pa & ~15) >> 64 * (pa >> 3 & 1) & U64

    def words(self, pa: int, n: int) -> np.ndarray:
        return np.array([self.fetch(pa), self[pa & ~15] >> 64][:n] if n <= 2 else [], np.uint64)

    def swap(self, pa: int, old: int, new: int) -> bool:
        """The compare-and-swap of a hardware update: of 128 bits."""
        if self[pa] != old:
            return False
        self[pa] = new
        return True


class Tree(NamedTuple):
    """A tree in memory, the registers that lead to it, the VA, and where each descriptor is."""

    memory: Ram
    regs: Registers
    va: int
    at: list[int]


def offset(va: int, granule: str, level: int, width: int) -> int:
    """Where in a table at `level` that resolves `width` bits the entry for `va` is."""
    shift = {"4K": 36, "16K": 44, "64K": 52}[granule] - {"4K": 8, "16K": 10, "64K": 12}[granule] * level
    return (va >> shift & (1 << width) - 1) * 16


def placed(words: list[int], va: int, granule: str, ia: int, start: int, root: int) -> dict[int, int]:
    """The descriptors at the addresses where a walk from `start` down reads them; tables follow their own address."""
    stride = {"4K": 8, "16K": 10, "64K": 12}[granule]
    width, level, base = ia - {"4K": 12, "16K": 14, "64K": 16}[granule] - stride * (3 - start), start, root
    found: dict[int, int] = {}
    for word in words:
        found[base + offset(va, granule, level, width)] = word
        skl = word >> 109 & 3
        width, level = stride * (skl + 1), level + skl + 1
        base = word & (1 << 56) - (1 << max(width + 4, 12))
    return found


def tree(
    words: list[int],
    *,
    va: int = 0,
    granule: str = "4K",
    ia: int = 44,
    start: int = 0,
    skl: int = 0,
    regime: str = "EL10",
    upper: bool = False,
    ps: int = 7,
    cpu: Any = CPU,
    root: int = ROOT,
    tcr: dict[str, int] | None = None,
    tcr2: dict[str, int] | None = None,
    sctlr: dict[str, int] | None = None,
    **registers: int,
) -> Tree:
    """A tree of stage 1 and its registers. `ia`: input bits; `start`: the first table's level."""
    va = va & (1 << ia) - 1 | (U64 ^ (1 << ia) - 1 if upper else 0)
    memory = placed(words, va, granule, ia, start, root)
    name, ttbr0, ttbr1, mair, control = hand.NAMES[regime]
    el, one = hand.REGIME_EL[regime], regime == "EL3"
    values = {
        name: hand.tcr(granule, ia, ps=ps, upper=upper, one=one, **(tcr or {})),
        ttbr1 if upper else ttbr0: root | skl << 1 if one else ttbr(root, skl),
        mair: MAIR,
        control: hand.sctlr(**(sctlr or {})),
        f"PIR_EL{el}": PIR,
    }
    extra = hand.flags(TCR_EL3 if one else TCR2, D128=1, **(tcr2 or {}))
    values |= {name: values[name] | extra} if one else {f"TCR2_EL{el}": extra}
    if regime == "EL20":
        values["HCR_EL2"] = hand.hcr(E2H=1)
    return Tree(Ram(memory), Registers(cpu, **(values | registers)), va, list(memory))


# Both stages: stage 1 has 4K, 36 bits, blocks of 256 MiB in one table at level 1; so has stage 2.

GUEST, GUEST_OUT = 0x4000_0000, 0x8000_0000  # IPAs: of stage 1's table, and of what it maps
HOST = 0x1_0000_0000  # PA of stage 2's table
GUEST_PA, OUT_PA = 0x2_4000_0000, 0x2_8000_0000
S2PIR = 0x0000_0000_0002_8FC6  # by PIIndex: 0 MRO-TL0, 1 RW, 2 RW and execute, 3 read, 4 MRO


def s2leaf(pa: int, **fields: int) -> int:
    """A block of 256 MiB of stage 2: write-back, readable and writable (PIIndex 1), dirty."""
    return leaf(pa, 2, **({"MemAttr": 15, "PIIndex": 1, "Dirty": 1} | fields))


def nested(
    first: int | None = None,
    of_table: int | None = None,
    of_result: int | None = None,
    *,
    upper: bool = False,
    vtcr: dict[str, int] | None = None,
    hcr: dict[str, int] | None = None,
    tcr: dict[str, int] | None = None,
    tcr2: dict[str, int] | None = None,
    cpu: Any = CPU,
    skl: int = 0,
    **registers: int,
) -> Tree:
    """One block of stage 1, and stage 2's blocks for its table and for its result."""
    first = leaf(GUEST_OUT, 2) if first is None else first
    made = tree(
        [first],
        ia=36,
        start=1,
        root=GUEST,
        upper=upper,
        cpu=cpu,
        tcr=tcr,
        tcr2=tcr2,
        HCR_EL2=hand.hcr(**({"VM": 1} | (hcr or {}))),
    )
    words = {
        made.at[0] - GUEST + GUEST_PA: first,
        HOST + 4 * 16: s2leaf(GUEST_PA) if of_table is None else of_table,
        HOST + 8 * 16: s2leaf(OUT_PA) if of_result is None else of_result,
    }
    control = hand.flags(VTCR, **({"T0SZ": 28, "PS": 7, "SH0": 3, "D128": 1} | (vtcr or {})))
    values = {"VTCR_EL2": control, "VTTBR_EL2": ttbr(HOST, skl), "S2PIR_EL2": S2PIR} | registers
    return Tree(Ram(words), made.regs.replace(**values), made.va, list(words))
