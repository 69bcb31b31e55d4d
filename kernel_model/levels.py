"""How Linux sees the levels: five names, of which some are folded at compile time and some at run time.

Sources: include/asm-generic/pgtable-nop4d.h and -nopud.h, arch/arm64/include/asm/pgtable.h and pgtable-hwdef.h,
mm/pagewalk.c real_depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

U64 = (1 << 64) - 1


class Fold(Enum):
    """What became of a level."""

    NO = "a table of its own"
    COMPILE = "compiled away: its entry is the one above"
    RUN = "not in the tables of this run: its entry is found from the page of the one above"


@dataclass(frozen=True)
class Level:
    """One of PGD, P4D, PUD, PMD, PTE."""

    name: str
    shift: int
    ptrs: int
    fold: Fold

    @property
    def size(self) -> int:
        """Bytes that one entry covers."""
        return 1 << self.shift

    def index(self, addr: int) -> int:
        """pXd_index()."""
        return addr >> self.shift & self.ptrs - 1

    def addr_end(self, addr: int, end: int) -> int:
        """pXd_addr_end(): the end of the entry that holds `addr`, or `end` if that is nearer; 64-bit, may wrap to 0."""
        boundary = (addr + self.size) & -self.size & U64
        return boundary if (boundary - 1 & U64) < (end - 1 & U64) else end


@dataclass(frozen=True)
class Levels:
    """The levels of one build, run with one VA size.

    `page_shift`, `config_levels` (CONFIG_PGTABLE_LEVELS) and `config_va_bits` are the build's; `va_bits` the run's.
    """

    page_shift: int
    config_levels: int
    config_va_bits: int
    va_bits: int

    @cached_property
    def rows(self) -> tuple[Level, ...]:
        """PGD, P4D, PUD, PMD, PTE."""
        stride = self.page_shift - 3
        hardware = -(-(self.va_bits - self.page_shift) // stride)
        rows = []
        for i, name in enumerate(("PGD", "P4D", "PUD", "PMD", "PTE")):
            height = 5 - i  # tables from this level down
            compiled = 1 < height < 5 and height >= self.config_levels
            top = min(height, self.config_levels)
            shift = self.page_shift + (top - 1) * stride
            bits = self.config_va_bits - shift if name == "PGD" or compiled else stride
            fold = Fold.COMPILE if compiled else Fold.RUN if self._run_folded(height, hardware) else Fold.NO
            rows.append(Level(name, shift, 1 if compiled else 1 << bits, fold))
        return tuple(rows)

    def _run_folded(self, height: int, hardware: int) -> bool:
        """The level below the compiled top that this run's top table really is."""
        return hardware < self.config_levels and height == hardware

    pgd = property(lambda self: self.rows[0])
    p4d = property(lambda self: self.rows[1])
    pud = property(lambda self: self.rows[2])
    pmd = property(lambda self: self.rows[3])
    pte = property(lambda self: self.rows[4])

    @property
    def page_size(self) -> int:
        """PAGE_SIZE."""
        return 1 << self.page_shift

    @property
    def half(self) -> int:
        """Bytes of one half of the address space in this run; user addresses are below it."""
        return 1 << self.va_bits

    @property
    def contiguous(self) -> dict[str, int]:
        """CONT_PTE_SIZE and CONT_PMD_SIZE in bytes, by level (arch/arm64/Kconfig's shifts)."""
        pte, pmd = {12: (4, 4), 14: (7, 5), 16: (5, 5)}[self.page_shift]
        return {"PTE": self.pte.size << pte, "PMD": self.pmd.size << pmd}

    @property
    def va_bits_min(self) -> int:
        """VA_BITS_MIN: what a build for 52 bits falls back to."""
        if self.config_va_bits <= 48:
            return self.config_va_bits
        return 47 if self.page_shift == 14 else 48

    def real_depth(self, depth: int) -> int:
        """The depth that a hole is reported with: compile-time folds only (mm/pagewalk.c real_depth)."""
        for at, level in ((3, self.pmd), (2, self.pud), (1, self.p4d)):
            if depth == at and level.ptrs == 1:
                depth -= 1
        return depth

    def top_is_none_tested(self, name: str) -> bool:
        """Whether pXd_none() looks at the entry: constant 0 for a level whose child is folded."""
        child = {"PGD": self.p4d, "P4D": self.pud}.get(name)
        return child is None or child.fold is Fold.NO
