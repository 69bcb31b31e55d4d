"""TableBuilder against a dict of pages: any order of map, unmap, protect, split and place, of any granule.

The dict has, for each page that is mapped, its PA, its AP and the leaf that it came with, and it knows where tables are
in the way of a block: so it says too which change must be refused, with nothing written.

    PGTABLE_HYPOTHESIS=long pytest tests/pgtable/test_build_stateful.py       many more, other ones each time
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pgtable import Access, Format, Granule, PhysicalMemory, translate
from pgtable.build import MapError, TableBuilder
from pgtable.listing import listing
from tests.pgtable.hand import tcr
from tests.stateful import settings_of

RAM, POOL, SPACE = 0x4000_0000, 400, 0x8000_0000
SHAPES = ((Granule.K4, 39), (Granule.K4, 48), (Granule.K16, 36), (Granule.K16, 47), (Granule.K64, 42))


class Page(NamedTuple):
    """A page that is mapped. `block`: the level, VA of the leaf that maps it, for rules about parts of blocks."""

    pa: int
    ap: int
    block: tuple[int, int]


class Pages(RuleBasedStateMachine):
    """The tree in memory, and what must be in it."""

    @initialize(shape=st.sampled_from(SHAPES), upper=st.booleans())
    def begin(self, shape: tuple[Granule, int], upper: bool) -> None:
        self.granule, self.bits = shape
        self.page = self.granule.page_size
        self.memory = PhysicalMemory((RAM, POOL * self.page))
        fmt = Format(self.granule, lpa=False)
        self.builder = TableBuilder(self.memory, (RAM, POOL * self.page), fmt=fmt, va_bits=self.bits, upper=upper)
        self.upper = upper
        self.pages: dict[int, Page] = {}
        self.tables: set[tuple[int, int]] = set()  # (level, VA) of the descriptors that lead to tables

    # addresses: near the borders of tables and blocks

    @property
    def sizes(self) -> dict[int, int]:
        """The size of a leaf by level, those that are legal."""
        levels = [at for at in (*self.builder.fmt.block_levels, 3) if at >= self.builder.start_level]
        return {at: self.granule.level_size(at) for at in levels}

    def va(self, where: int, page: int) -> int:
        """A page's VA: `page` pages from the border `where` of level 2 blocks."""
        block = self.granule.level_size(2)
        return (self.builder.base + where * block + page * self.page) & -self.page

    def leaves(self, va: int, pa: int, size: int) -> Iterator[tuple[int, int]]:
        """(level, VA) of the leaves of a mapping by the largest legal blocks."""
        end = va + size
        while va < end:
            fits = (at for at, n in sorted(self.sizes.items()) if not va % n and not pa % n and va + n <= end)
            level = next(fits)
            yield level, va
            va, pa = va + self.sizes[level], pa + self.sizes[level]

    def remember_tables(self, level: int, va: int) -> None:
        """The tables above a leaf are there from now on, mapped in or not."""
        self.tables |= {(at, va & -self.granule.level_size(at)) for at in range(level)}

    def run(self, va: int, size: int) -> list[int]:
        """The mapped pages' VAs in a range."""
        return [at for at in self.pages if va <= at < va + size]

    def cuts(self, va: int, size: int) -> bool:
        """Whether the range has a part of a block, and not all of it."""
        for at in self.run(va, size):
            level, start = self.pages[at].block
            if level < 3 and not (va <= start and start + self.granule.level_size(level) <= va + size):
                return True
        return False

    # what is done

    @rule(
        where=st.integers(1, 3), page=st.integers(0, 3), count=st.integers(1, 6), blocks=st.integers(0, 2),
        shift=st.integers(0, 2), ap=st.sampled_from((0, 2)),
    )  # fmt: skip
    def map(self, where: int, page: int, count: int, blocks: int, shift: int, ap: int) -> None:
        va = self.va(where, page)
        size = min(count * self.page + blocks * self.granule.level_size(2), 9000 * self.page)
        pa = SPACE + where * self.granule.level_size(2) + (page + shift // 2) * self.page
        leaves = list(self.leaves(va, pa, size))
        taken = bool(self.run(va, size)) or any(leaf in self.tables for leaf in leaves)
        if self.refused(taken, lambda: self.builder.map(va, pa, size, AP=ap)):
            return
        for level, start in leaves:
            self.remember_tables(level, start)
            for one in range(start, start + self.granule.level_size(level), self.page):
                self.pages[one] = Page(pa + one - va, ap, (level, start))

    @rule(where=st.integers(1, 3), page=st.integers(0, 4), count=st.sampled_from((1, 2, 5, 512, 2048)))
    def unmap(self, where: int, page: int, count: int) -> None:
        va, size = self.va(where, page), count * self.page
        cuts = self.cuts(va, size)
        if self.refused(cuts, lambda: self.builder.unmap(va, size)):
            return
        for at in self.run(va, size):
            del self.pages[at]

    @rule(where=st.integers(1, 3), page=st.integers(0, 4), count=st.sampled_from((1, 2, 5, 512)), ap=st.integers(0, 3))
    def protect(self, where: int, page: int, count: int, ap: int) -> None:
        va, size = self.va(where, page), count * self.page
        cuts = self.cuts(va, size)
        if self.refused(cuts, lambda: self.builder.protect(va, size, AP=ap)):
            return
        for at in self.run(va, size):
            self.pages[at] = self.pages[at]._replace(ap=ap)

    def refused(self, due: bool, change: Callable[[], None]) -> bool:
        """Whether a change was refused, which it must be where that is due and nowhere else, changing nothing."""
        before = self.memory.read(*self.builder.used)
        error = None
        try:
            change()
        except MapError as refusal:
            error = refusal
        assert due == (error is not None), error or "what is there was taken or cut"
        assert not due or before == self.memory.read(RAM, len(before))
        return due

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def split(self, data: st.DataObject) -> None:
        va = data.draw(st.sampled_from(sorted(self.pages)[:50]))
        level, start = self.pages[va].block
        if self.refused(level == 3, lambda: self.builder.split(va)):
            return
        self.remember_tables(level + 1, start)
        size = self.granule.level_size(level + 1)
        for at in range(start, start + self.granule.level_size(level), self.page):
            self.pages[at] = self.pages[at]._replace(block=(level + 1, at & -size))

    @rule(where=st.integers(1, 3), page=st.integers(0, 4))
    def place_nothing(self, where: int, page: int) -> None:
        """An invalid word with content, put at level 3, is a hole."""
        va = self.va(where, page)
        inside = va in self.pages and self.pages[va].block[0] < 3
        if self.refused(inside, lambda: self.builder.place(va, 3, 0xDEAD_0000) and None):
            return
        self.remember_tables(3, va)
        self.pages.pop(va, None)

    # what must be so

    @invariant()
    def all_pages_are_there_and_nothing_else(self) -> None:
        if not hasattr(self, "builder"):
            return
        regs = self.registers()
        rows = listing(self.memory, regs).runs
        pas: dict[int, int] = {}
        for va, size, pa in zip(rows.va.tolist(), rows.size.tolist(), rows.pa.tolist(), strict=True):
            pas |= {va + at: pa + at for at in range(0, size, self.page)}
        assert pas == {va: page.pa for va, page in self.pages.items()}

    @invariant()
    def walks_agree(self) -> None:
        if not hasattr(self, "builder"):
            return
        regs = self.registers()
        for va in [*sorted(self.pages)[:3], *sorted(self.pages)[-3:], self.va(2, 0), self.va(2, 5)]:
            page = self.pages.get(va)
            read, write = (translate(self.memory, regs, va + 8, kind) for kind in (Access.read(), Access.write()))
            assert read.ok == (page is not None)
            assert write.ok == (page is not None and page.ap in (0, 1))
            assert not read.ok or read.pa == page.pa + 8  # type: ignore[union-attr]

    def registers(self) -> object:
        from pgtable import Registers

        name = {Granule.K4: "4K", Granule.K16: "16K", Granule.K64: "64K"}[self.granule]
        root = {"TTBR1_EL1" if self.upper else "TTBR0_EL1": self.builder.root}
        other = 1 << 7 if self.upper else 1 << 23  # EPD: the other half is off
        code = tcr(name, self.bits, upper=self.upper) | other
        return Registers(None, TCR_EL1=code, SCTLR_EL1=1, MAIR_EL1=0xFF, **root)


TestPages = Pages.TestCase
TestPages.settings = settings_of(examples=25, steps=20)
TestPages.pytestmark = [pytest.mark.timeout(600)]
