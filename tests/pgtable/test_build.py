"""TableBuilder against a dict of pages. Judge: a model of three dicts and the walk; refusals leave memory as it was."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgtable import Access, Format, Granule, Kind, PhysicalMemory, Registers, Translation, translate, translate_many
from pgtable.build import MapError, TableBuilder
from pgtable.leaves import leaves
from pgtable.params import Regime
from tests.pgtable.hand import PAGE_SHIFT, REGIME_EL, STRIDE, U64, leaf, tcr, tree

POOL = 0x4000_0000
OUT = 0x10_0000_0000


class Shape(NamedTuple):
    """A kind of tree: its format, size, half and regime."""

    granule: str
    ia: int
    upper: bool = False
    regime: str = "EL10"
    ds: bool = False

    @property
    def page(self) -> int:
        return 1 << PAGE_SHIFT[self.granule]

    @property
    def block_pages(self) -> int:
        """Pages of a level 2 block."""
        return 1 << STRIDE[self.granule]

    @property
    def base(self) -> int:
        """Where the tests map: one block below a level 1 border, so that three blocks lie in two level 2 tables."""
        half = U64 ^ (1 << self.ia) - 1 if self.upper else 0
        return half + (self.page * self.block_pages << STRIDE[self.granule]) - self.page * self.block_pages

    def builder(self, pages: int = 24) -> TableBuilder:
        memory = PhysicalMemory((POOL, pages * self.page))
        fmt = Format(Granule.named(self.granule), ds=self.ds, el0=self.regime != "EL2")
        return TableBuilder(memory, (POOL, pages * self.page), fmt=fmt, va_bits=self.ia, upper=self.upper)

    def regs(self, root: int) -> Registers:
        el, one = REGIME_EL[self.regime], self.regime == "EL2"
        flags = {"DS": 1} if self.ds else {}
        code = tcr(self.granule, self.ia, ps=6, upper=self.upper, one=one, **flags)
        return Registers(**{f"TCR_EL{el}": code, f"TTBR{int(self.upper)}_EL{el}": root})


SHAPES = [
    Shape("4K", 48),
    Shape("4K", 39, upper=True),
    Shape("4K", 52, ds=True),
    Shape("4K", 40, regime="EL2"),
    Shape("16K", 47, upper=True),
    Shape("64K", 48),
]
IDS = [" ".join(str(part) for part in shape if part) for shape in SHAPES]


class Model:
    """What the tree must map: pages by number, which of them are in blocks, which blocks have a level 3 table."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.pages: dict[int, tuple[int, int]] = {}  # page number: PA, AP
        self.in_block: set[int] = set()
        self.tables: set[int] = set()

    def block(self, page: int) -> int:
        return page // self.shape.block_pages

    def pieces(self, first: int, pa: int, count: int, level: int | None) -> list[tuple[int, int]]:
        """(page number, pages) of each leaf that a mapping makes."""
        n, found, at = self.shape.block_pages, [], first
        while at < first + count:
            aligned = at % n == 0 and (pa // self.shape.page + at - first) % n == 0 and first + count - at >= n
            size = n if level != 3 and aligned else 1
            found.append((at, size))
            at += size
        return found

    def map(self, first: int, pa: int, count: int, level: int | None, ap: int) -> bool:
        """Whether the mapping may be made; makes it."""
        n = self.shape.block_pages
        if level == 2 and (first % n or count % n or pa // self.shape.page % n):
            return False
        pieces = self.pieces(first, pa, count, level)
        if any(at in self.pages for at in range(first, first + count)):
            return False
        if any(size == n and self.block(at) in self.tables for at, size in pieces):
            return False  # an empty level 3 table is there
        for at, size in pieces:
            if size == 1:
                self.tables.add(self.block(at))
            else:
                self.in_block.update(range(at, at + size))
        for i in range(count):
            self.pages[first + i] = (pa + i * self.shape.page, ap)
        return True

    def cuts_a_block(self, first: int, count: int) -> bool:
        n = self.shape.block_pages
        ends = (first, first + count)
        return any(at % n and at in self.in_block and at - 1 in self.in_block for at in ends)

    def unmap(self, first: int, count: int) -> bool:
        if self.cuts_a_block(first, count):
            return False
        for at in range(first, first + count):
            self.pages.pop(at, None)
            self.in_block.discard(at)
        return True

    def protect(self, first: int, count: int, ap: int) -> bool:
        if self.cuts_a_block(first, count):
            return False
        for at in range(first, first + count):
            if at in self.pages:
                self.pages[at] = (self.pages[at][0], ap)
        return True

    def split(self, page: int) -> bool:
        if page not in self.in_block:
            return False
        n = self.shape.block_pages
        self.in_block.difference_update(range(self.block(page) * n, (self.block(page) + 1) * n))
        self.tables.add(self.block(page))
        return True


class Op(NamedTuple):
    """One call. Numbers are in sixteenths of a block, and pages off from there, so that borders are hit often."""

    name: str
    sixteenth: int
    off: int
    length: int
    more: int
    pa_off: int
    level: int | None
    ap: int


OPS = st.builds(
    Op,
    name=st.sampled_from(["map", "map", "map", "unmap", "protect", "split"]),
    sixteenth=st.sampled_from([0, 0, 1, 8, 15, 16, 16, 17, 31, 32, 32, 40]),
    off=st.sampled_from([0, 0, 0, 1, 2]),
    length=st.sampled_from([0, 0, 1, 8, 16, 16, 32]),
    more=st.sampled_from([0, 0, 1, 3]),
    pa_off=st.sampled_from([0, 0, 0, 1, 16]),
    level=st.sampled_from([None, None, None, 3, 2]),
    ap=st.sampled_from([0, 2]),
)


def run(shape: Shape, ops: list[Op]) -> tuple[TableBuilder, Model, set[int]]:
    """Makes the calls on a builder and the model, which must agree on what is refused; pages at every border."""
    builder, model = shape.builder(), Model(shape)
    n, page = shape.block_pages, shape.page
    borders = {0, 3 * n - 1}
    for op in ops:
        first = op.sixteenth * n // 16 + op.off
        count = max(1, min(op.length * n // 16 + op.more, 3 * n - first))
        va, size = shape.base + first * page, count * page
        pa = OUT + (first + op.pa_off) * page
        before = builder.memory.read(POOL, builder.pool[1]), builder.next_free
        fields: dict[str, int | None] = {}
        if op.name == "map":
            allowed = model.map(first, pa, count, op.level, op.ap)
            call, arguments, fields = builder.map, (va, pa, size), {"AP": op.ap, "level": op.level}
        elif op.name == "unmap":
            allowed = model.unmap(first, count)
            call, arguments = builder.unmap, (va, size)
        elif op.name == "protect":
            allowed = model.protect(first, count, op.ap)
            call, arguments, fields = builder.protect, (va, size), {"AP": op.ap}
        else:
            allowed = model.split(first)
            call, arguments = builder.split, (va,)
        if allowed:
            call(*arguments, **fields)
        else:
            with pytest.raises(MapError, match=r"^(va|pa|size) 0x[0-9a-f]+"):
                call(*arguments, **fields)
            assert (builder.memory.read(POOL, builder.pool[1]), builder.next_free) == before, f"{op}: memory changed"
        borders |= {first - 1, first, first + 1, first + count - 2, first + count - 1, first + count}
    return builder, model, borders


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@settings(deadline=None, derandomize=True, max_examples=30)
@given(ops=st.lists(OPS, min_size=1, max_size=10))
@example(
    ops=[Op("map", 0, 0, 32, 0, 0, None, 0), Op("split", 17, 0, 0, 1, 0, None, 0), Op("unmap", 16, 0, 1, 0, 0, None, 0)]
)
def test_sequences_of_calls_do_what_a_dict_of_pages_does(shape: Shape, ops: list[Op]) -> None:
    builder, model, borders = run(shape, ops)
    regs, regime, el = shape.regs(builder.root), Regime(shape.regime), REGIME_EL[shape.regime]
    for number in sorted(borders):
        va = shape.base + number * shape.page + 0x128
        found = translate(builder.memory, regs, va, Access.read(el), regime=regime)
        if number not in model.pages:
            assert found.fault is not None, number
            assert found.fault.type.value == "translation"
            continue
        pa, ap = model.pages[number]
        assert isinstance(found.result, Translation), number
        assert found.result.pa == pa + 0x128
        assert found.result.level == (2 if number in model.in_block else 3)
        assert translate(builder.memory, regs, va, Access.write(el), regime=regime).ok is (ap == 0)


# What is refused, and how it is said.


def built(**more) -> TableBuilder:
    builder = Shape("4K", 48, **more).builder()
    half = builder.base
    builder.map(half + 0x20_0000, 0x8020_0000, 0x20_0000)  # a block
    builder.map(half + 0x40_0000, 0x8000_0000, 0x3000)  # three pages
    return builder


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.map(0x1234, 0x8000_0000, 0x1000), r"^va 0x1234 is not a multiple of 0x1000 \(level 3\)$"),
        (lambda b: b.map(0x1000, 0x8000_0800, 0x1000), r"^pa 0x80000800 is not a multiple of 0x1000 \(level 3\)$"),
        (lambda b: b.map(0x1000, 0x8000_0000, 0x1800), r"^size 0x1800 is not a multiple of 0x1000 \(level 3\)$"),
        (lambda b: b.map(0x10_0000, 0, 0x20_0000, level=2), r"^va 0x100000 is not a multiple of 0x200000 \(level 2\)$"),
        (lambda b: b.map(0, 0x1000, 0x20_0000, level=2), r"^pa 0x1000 is not a multiple of 0x200000 \(level 2\)$"),
        (lambda b: b.map(0x1000, 0, 0), r"^va 0x1000 size 0x0: must be more than 0 bytes$"),
        (lambda b: b.unmap(0x1000, -0x1000), r"^va 0x1000 size -0x1000: must be more than 0 bytes$"),
        (lambda b: b.map(1 << 48, 0, 0x1000), r"^va 0x1000000000000 size 0x1000: outside the lower 48-bit range$"),
        (
            lambda b: b.map((1 << 48) - 0x1000, 0, 0x2000),
            r"^va 0xfffffffff000 size 0x2000: outside the lower 48-bit range$",
        ),
        (lambda b: b.protect(-0x1000, 0x1000, AP=2), r"outside the lower 48-bit range$"),
        (
            lambda b: b.map(0x1000, 1 << 48, 0x1000),
            r"^pa 0x1000000000000 size 0x1000: beyond the 48 bits that a descriptor holds$",
        ),
        (
            lambda b: b.map(0, 0, 1 << 39, level=0),
            r"^level 0: blocks and pages of this tree are at levels \[1, 2, 3\]$",
        ),
        (lambda b: b.map(0, 0, 0x1000, level=4), r"^level 4: blocks and pages of this tree are at levels"),
        (
            lambda b: b.map(0x20_1000, 0, 0x1000),
            r"^va 0x201000: inside a live block at level 2 \(0x0060000080200701\); split it first$",
        ),
        (
            lambda b: b.map(0x3F_F000, 0, 0x3000),
            r"^va 0x3ff000: inside a live block at level 2 \(0x[0-9a-f]{16}\); split it first$",
        ),
        (
            lambda b: b.map(0x40_1000, 0, 0x1000),
            r"^va 0x401000: overlaps a live page at level 3 \(0x0060000080001703\)$",
        ),
        (
            lambda b: b.map(0x40_0000, 0, 0x20_0000),
            r"^va 0x400000: overlaps a live table at level 2 \(0x[0-9a-f]{16}\)$",
        ),
        (
            lambda b: b.map(0, 0x2000_0000, 0x4000_0000, level=2),
            r"^va 0x200000: overlaps a live block at level 2 \(0x0060000080200701\)$",
        ),
        (
            lambda b: b.unmap(0x20_0000, 0x1000),
            r"^va 0x200000 size 0x1000: part of a live block at level 2 \(split it first\)$",
        ),
        (
            lambda b: b.protect(0x3F_F000, 0x2000, AP=2),
            r"^va 0x3ff000 size 0x2000: part of a live block at level 2 \(split it first\)$",
        ),
        (lambda b: b.split(0x40_0000), r"^va 0x400000: no block there to split \(level 3: 0x0060000080000703\)$"),
        (lambda b: b.split(0x8000_0000), r"^va 0x80000000: no block there to split \(level 1: 0x0000000000000000\)$"),
        (lambda b: b.slot(0x8000_0000, 3), r"^va 0x80000000: no table at level 1, so no level 3 descriptor$"),
        (lambda b: b.slot(0x40_0000, 7), r"^va 0x400000: level 7 is not a level of this tree$"),
        (lambda b: b.slot(0x40_0000, -1), r"^va 0x400000: level -1 is not a level of this tree$"),
        (lambda b: b.place(0x40_0000, 4, 0), r"^va 0x400000: level 4 is not a level of this tree$"),
        (lambda b: b.place(0x40_0000, -1, 0), r"^va 0x400000: level -1 is not a level of this tree$"),
        (lambda b: b.place(0x20_0000, 3, 0), r"^va 0x200000: inside a live block at level 2 .*; split it first$"),
    ],
)
def test_what_cannot_be_is_refused_with_the_address_the_size_and_the_limit(call, message: str) -> None:
    builder = built()
    before, free = builder.memory.read(*builder.pool), builder.next_free
    with pytest.raises(MapError, match=message):
        call(builder)
    assert builder.memory.read(*builder.pool) == before
    assert builder.next_free == free


def test_the_upper_half_is_named_in_a_refusal() -> None:
    with pytest.raises(MapError, match=r"^va 0x1000 size 0x1000: outside the upper 48-bit range$"):
        built(upper=True).map(0x1000, 0, 0x1000)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"AP": 4}, ValueError, "^AP cannot hold 0x4$"),
        ({"APTable": 1}, KeyError, "4K level 3 page has no field APTable"),
    ],
)
def test_attributes_that_a_leaf_does_not_have_are_refused(
    fields: dict[str, int], error: type[Exception], message: str
) -> None:
    builder = built()
    before = builder.memory.read(*builder.pool)
    with pytest.raises(error, match=message):
        builder.map(0x60_0000, 0x9000_0000, 0x3000, **fields)
    with pytest.raises(error, match=message):
        builder.protect(0x40_0000, 0x3000, **fields)
    assert builder.memory.read(*builder.pool) == before


def test_an_empty_pool_is_named() -> None:
    builder = Shape("4K", 48).builder(pages=4)
    builder.map(0, 0x8000_0000, 0x1000)
    with pytest.raises(MapError, match=r"^no table page left in the pool at 0x40000000, 0x4000 bytes$"):
        builder.map(0x20_0000, 0x8020_0000, 0x1000)
    assert builder.used == (POOL, 0x4000)
    regs = Shape("4K", 48).regs(builder.root)
    assert translate(builder.memory, regs, 0x123).pa == 0x8000_0123
    assert not translate(builder.memory, regs, 0x20_0000).ok


def test_a_pool_that_is_not_aligned_to_a_table_is_refused() -> None:
    memory = PhysicalMemory((POOL, 0x10_0000))
    with pytest.raises(MapError, match=r"^pool at 0x40001000: must be a multiple of 0x4000$"):
        TableBuilder(memory, (POOL + 0x1000, 0x8000), fmt=Format(Granule.K16), va_bits=47)


# What is written.


def test_the_default_leaf_and_table_words() -> None:
    builder = Shape("4K", 48).builder()
    builder.map(0, 0x8000_0000, 0x1000)
    slots = [builder.slot(0, level) for level in range(4)]
    assert [(s.level, s.pa) for s in slots] == [(n, POOL + n * 0x1000) for n in range(4)]
    words = [builder.memory.fetch(s.pa) for s in slots]
    assert [hex(w) for w in words] == ["0x40001003", "0x40002003", "0x40003003", "0x60000080000703"]


def test_templates_and_fields_make_the_leaf() -> None:
    builder = Shape("4K", 48).builder()
    builder.map(0, 0x8000_0000, 0x1000, template=0x00E8_0000_1234_5707, AP=2)
    assert hex(builder.memory.fetch(builder.slot(0).pa)) == hex(0x00E8_0000_8000_0787)
    builder.map(0x20_0000, 0x8020_0000, 0x20_0000, template=0x00E8_0000_1234_5707)
    assert hex(builder.memory.fetch(builder.slot(0x20_0000).pa)) == hex(0x00E8_0000_8020_0705)


def test_table_fields_go_into_every_table() -> None:
    memory = PhysicalMemory((POOL, 0x10000))
    builder = TableBuilder(memory, (POOL, 0x10000), UXNTable=1, PXNTable=1)
    builder.map(0, 0x8000_0000, 0x1000)
    words = [memory.fetch(builder.slot(0, level).pa) for level in range(3)]
    assert [w >> 59 for w in words] == [3, 3, 3]


@pytest.mark.parametrize(
    ("granule", "ia", "ds", "size", "levels"),
    [
        ("4K", 48, False, 1 << 30, [1]),
        ("4K", 48, False, (1 << 30) + (2 << 20) + 4096, [1, 2, 3]),
        ("4K", 52, True, 1 << 39, [0]),
        ("16K", 47, False, 32 << 20, [2]),
        ("16K", 52, True, 1 << 36, [1]),
        ("64K", 48, False, 512 << 20, [2]),
        ("64K", 48, False, 1 << 42, [1]),
    ],
)
def test_the_largest_legal_blocks_are_used(granule: str, ia: int, ds: bool, size: int, levels: list[int]) -> None:
    builder = Shape(granule, ia, ds=ds).builder(pages=6)
    builder.map(0, 0, size)
    regs = Shape(granule, ia, ds=ds).regs(builder.root)
    at = [0, size - (2 << 20), size - 1] if len(levels) == 3 else [0]
    for va, level in zip(at, levels, strict=True):
        found = translate(builder.memory, regs, va)
        assert (found.result.level, found.pa) == (level, va)


def test_a_mapping_whose_va_and_pa_never_line_up_is_all_pages() -> None:
    builder = Shape("4K", 48).builder()
    builder.map(0x20_0000, 0x8000_1000, 0x40_0000)
    assert {builder.slot(va).level for va in range(0x20_0000, 0x60_0000, 0x8_0000)} == {3}


def test_the_head_and_the_tail_of_a_large_mapping_are_pages() -> None:
    builder = Shape("4K", 48).builder()
    builder.map(0x1F_F000, 0x801F_F000, 0x20_2000)
    assert [builder.slot(va).level for va in (0x1F_F000, 0x20_0000, 0x3F_F000, 0x40_0000)] == [3, 2, 2, 3]


@pytest.mark.parametrize(
    ("granule", "level", "run"),
    [("4K", 3, 16), ("4K", 2, 16), ("16K", 3, 128), ("16K", 2, 32), ("64K", 3, 32), ("64K", 2, 32)],
)
@pytest.mark.parametrize("pa_shift", [0, 1])
def test_contiguous_is_set_in_every_whole_aligned_run_and_nowhere_else(
    granule: str, level: int, run: int, pa_shift: int
) -> None:
    shape = Shape(granule, 47 if granule == "16K" else 48)
    builder = shape.builder()
    unit = shape.page if level == 3 else shape.page * shape.block_pages
    first, count = run - 3, 3 * run  # three pieces: a tail of 3, two whole runs, a head
    pa = (1 << 44) + (first + pa_shift) * unit
    builder.map(first * unit, pa, count * unit, level=level, contiguous=True)
    for entry in range(first, first + count):
        word = builder.memory.fetch(builder.slot(entry * unit).pa)
        whole = run <= entry < first + count - (first + count) % run
        assert word >> 52 & 1 == (whole and not pa_shift), entry


def test_level_0_blocks_and_16k_level_1_blocks_have_no_contiguous_runs() -> None:
    for granule, ia, level in (("4K", 52, 0), ("16K", 52, 1)):
        shape = Shape(granule, ia, ds=True)
        builder = shape.builder(pages=4)
        size = 1 << PAGE_SHIFT[granule] + (3 - level) * STRIDE[granule]
        builder.map(0, 0, 32 * size if granule == "16K" else 16 * size, contiguous=True, level=level)
        assert not builder.memory.fetch(builder.slot(0).pa) >> 52 & 1


# split, slot, place, on.


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_a_split_block_maps_the_same_with_the_same_attributes(shape: Shape) -> None:
    builder = shape.builder()
    n, size = shape.block_pages, shape.page * shape.block_pages
    fields = {"nG": 1, "AttrIndx": 5, "AP": 2} if shape.regime != "EL2" else {"AttrIndx": 5, "AP": 2}
    builder.map(shape.base, OUT, size, level=2, **fields)
    old = builder.memory.fetch(builder.slot(shape.base).pa)
    builder.split(shape.base + 5 * shape.page)
    regs, regime, el = shape.regs(builder.root), Regime(shape.regime), REGIME_EL[shape.regime]
    address = builder.fmt.leaf(3)["OA"].mask
    for i in (0, 1, n // 2, n - 1):
        found = translate(builder.memory, regs, shape.base + i * shape.page, Access.read(el), regime=regime)
        assert (found.pa, found.result.level) == (OUT + i * shape.page, 3)
        assert found.result.word & ~address == old & ~address | 2
    with pytest.raises(MapError, match="no block there to split"):
        builder.split(shape.base)


def test_a_1g_block_is_split_into_2m_blocks() -> None:
    builder = Shape("4K", 48).builder()
    builder.map(0, 0x4000_0000, 1 << 30)
    builder.split(0x1234_5678)
    slot = builder.slot(0x1234_5678)
    assert (slot.level, slot.entry, slot.va) == (2, 0x91, 0x1220_0000)
    assert builder.fmt.kind(builder.memory.fetch(slot.pa), 2) is Kind.BLOCK
    assert translate(builder.memory, Shape("4K", 48).regs(builder.root), 0x1234_5678).pa == 0x5234_5678


def test_splitting_does_not_carry_the_nt_bit_into_a_pages_address() -> None:
    builder = Shape("4K", 48).builder()
    builder.map(0, 0x8000_0000, 0x20_0000, nT=1)
    builder.split(0)
    assert translate(builder.memory, Shape("4K", 48).regs(builder.root), 0x5123).pa == 0x8000_5123


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_slot_says_where_the_walk_reads(shape: Shape) -> None:
    builder = shape.builder()
    builder.map(shape.base, OUT, 3 * shape.page)
    va = shape.base + shape.page + 0x10
    found = translate(
        builder.memory, shape.regs(builder.root), va, Access.read(REGIME_EL[shape.regime]), regime=Regime(shape.regime)
    )
    for step in found.steps:
        slot = builder.slot(va, step.level)
        assert (slot.pa, slot.entry, slot.level) == (step.pa, step.entry, step.level)
    assert builder.slot(va) == builder.slot(va, 3)
    assert builder.slot(va).va == shape.base + shape.page
    hole = builder.slot(shape.base + 100 * shape.page)
    assert (hole.level, builder.memory.fetch(hole.pa)) == (3, 0)


def test_place_writes_any_word_and_makes_the_tables_above() -> None:
    builder = Shape("4K", 48).builder()
    slot = builder.place(0x1234_5678, 3, 0xDEAD_BEEF)
    assert builder.memory.fetch(slot.pa) == 0xDEAD_BEEF
    assert (slot.va, slot.entry) == (0x1234_5000, 0x145)
    before = builder.next_free
    assert builder.place(0x1234_6000, 3, 2).table == slot.table
    assert builder.next_free == before
    assert builder.place(0, 0, 0).pa == builder.root


def test_the_same_tree_in_a_copy_of_memory_is_its_own() -> None:
    builder = Shape("4K", 48).builder()
    builder.map(0, 0x8000_0000, 0x1000)
    frozen = builder.memory.freeze()
    other = builder.on(frozen.thaw())
    other.map(0x1000, 0x8000_1000, 0x1000)
    regs = Shape("4K", 48).regs(builder.root)
    assert translate(other.memory, regs, 0x1000).ok
    assert not translate(builder.memory, regs, 0x1000).ok
    frozen.close()


def test_protect_sets_fields_in_leaves_only_and_passes_over_holes() -> None:
    builder = built()
    builder.unmap(0x40_1000, 0x1000)
    builder.protect(0x20_0000, 0x40_0000, AP=2, nG=1)
    words = [builder.memory.fetch(builder.slot(va).pa) for va in (0x20_0000, 0x40_0000, 0x40_1000, 0x40_2000)]
    assert [w >> 7 & 1 for w in words] == [1, 1, 0, 1]
    assert words[2] == 0
    assert [w >> 11 & 1 for w in words] == [1, 1, 0, 1]


def test_unmap_of_a_hole_is_nothing() -> None:
    builder = built()
    before = builder.memory.read(*builder.pool)
    builder.unmap(0x8000_0000, 1 << 40)
    assert builder.memory.read(*builder.pool) == before


def test_what_the_builder_makes_is_what_a_hand_made_tree_has() -> None:
    made = tree(leaf(0x8000_0000, UXN=1, PXN=1))
    builder = Shape("4K", 48).builder()
    builder.map(made.va & ~0xFFF, 0x8000_0000, 0x1000)
    assert builder.memory.fetch(builder.slot(made.va).pa) == made.memory[made.slots[3]]
    assert [builder.slot(made.va, level).entry for level in range(4)] == [
        (pa & 0xFFFF) // 8 for pa in made.slots.values()
    ]


def test_a_table_is_zeroed_when_it_is_taken_from_the_pool() -> None:
    memory = PhysicalMemory((POOL, 0x10000))
    memory.words(POOL, 0x2000)[:] = np.uint64(U64)
    builder = TableBuilder(memory, (POOL, 0x10000))
    builder.map(0, 0x8000_0000, 0x1000)
    assert np.count_nonzero(memory.words(POOL, 4 * 512)) == 4


def test_a_tree_may_have_its_root_and_tables_at_pa_0_and_in_two_regions() -> None:
    memory = PhysicalMemory((0, 0x6000), (0x6000, 0x1_0000))
    builder = TableBuilder(memory, (0, 0x1_6000), upper=True)
    base = builder.base
    for i in range(8):
        builder.map(base + (i << 20), i << 30, 1 << 20, level=3)
    regs = Shape("4K", 48, upper=True).regs(builder.root)
    for i in range(8):
        assert translate(memory, regs, base + (i << 20) + 0x1_2345).pa == (i << 30) + 0x1_2345
    assert builder.used == (0, 7 * 0x1000)


def test_one_call_may_fill_tables_of_two_regions() -> None:
    memory = PhysicalMemory((0, 0x5000), (0x5000, 0x1_0000))
    builder = TableBuilder(memory, (0, 0x1_5000))
    builder.map(0, 1 << 40, 16 << 20, level=3)  # its tables are at 0x3000 to 0xb000
    found = translate_many(memory, Shape("4K", 48).regs(0), np.arange(0, 16 << 20, 0x1000, dtype=np.uint64))
    assert np.array_equal(found.pa, np.arange(1 << 40, (1 << 40) + (16 << 20), 0x1000, dtype=np.uint64))


@pytest.mark.parametrize(("level", "missing"), [(1, "0x90000000"), (2, "0x90000008")])
def test_a_table_that_is_not_in_ram_is_no_hole(level: int, missing: str) -> None:
    builder = Shape("4K", 48).builder()
    builder.place(0, level, 0x9000_0003)
    before = builder.memory.read(*builder.pool)
    with pytest.raises(LookupError, match=f"no memory at PA {missing}$"):
        builder.map(0x1000, 0x8000_0000, 0x1000, level=3)
    assert builder.memory.read(*builder.pool) == before


@pytest.mark.parametrize("pa", [0, 0xFFFF_FFFF_0000, 0x3_FFFF_FFF0_0000], ids=hex)
def test_many_tables_at_once_are_those_that_page_after_page_makes(pa: int) -> None:
    """3 GiB less a few pages, over holes, old tables and borders of level 1: every descriptor and every table."""
    va, size = 0x3FFF_F000, (3 << 30) - 0x5000
    fmt = Format(Granule.K4, ds=pa > 1 << 47)
    shape = Shape("4K", 48, ds=fmt.ds)
    memory = PhysicalMemory((POOL, 16 << 20))
    builder = TableBuilder(memory, (POOL, 16 << 20), fmt=fmt)
    memory.words(POOL + 0x1000, (16 << 17) - 512)[:] = 0xDEAD_BEEF_DEAD_BEEF  # what an earlier owner left
    builder.map(va - 0x3000, 0x7000_0000, 0x1000, level=3)
    builder.map(va + (1 << 30) + size, 0x7000_0000, 0x1000, level=3)
    builder.map(va, pa, size, level=3, AP=2)
    pages = np.arange(0, size, 0x1000, dtype=np.uint64)
    found = translate_many(memory, shape.regs(builder.root), pages + np.uint64(va))
    assert found.ok.all()
    assert np.array_equal(found.pa, pages + np.uint64(pa))
    listed = leaves(memory, shape.regs(builder.root))
    assert len(listed.va) == len(pages) + 2
    assert np.array_equal(np.sort(listed.slot), np.unique(listed.slot))
