"""set_memory_valid as Debian's compiled kernels did it: every row of facts/kernel.md 9.3, as literal data.

Measured once on 6.1.176, 6.12.107, 7.2.13-16k and 7.3.4. Nothing in this file comes from the code under test: words,
TLBI operands, return values and WARN counts are written out. tests/kernel_model/test_goldens.py holds the model
against them, tests/emu/test_golden.py the compiled functions of the kernels that are fetched today.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pgtable.build import TableBuilder

# Kernel: where the tables of its vectors hang, and the TLBI operand of that VA: (VA >> 12) & (2**44 - 1).
VA_4K, OPERAND_4K = 0xFFFF_1000_0000_0000, 0xFF1_0000_0000
VA_16K, OPERAND_16K = 0xFFFF_8800_0000_0000, 0xFF8_8000_0000

PAGES_6X = ("debian:6.1", "debian:6.12")
PAGES_7X = ("debian:7.3",)
PAGES_16K = ("debian:7.2-16k",)

VALID_PTE, VALID_NG = 0x00E8_0000_4000_0703, 0x00E8_0000_4000_0F03
INVALID_6X, INVALID_7X = 0x00E8_0000_4000_0702, 0x00E8_0000_4000_0F02
BLOCK, BLOCK_NG, BLOCK_INVALID = 0x00E8_0000_4000_0701, 0x00E8_0000_4000_0F01, 0x00E8_0000_4000_0F00

ORDERED = ("dsb ishst", "isb")  # a valid kernel entry, made visible to the walker
EINVAL, ENOMEM = -22, -12


def flush(count: int, first: int = OPERAND_4K, step: int = 1) -> tuple[str, ...]:
    """flush_tlb_kernel_range: `count` single invalidations."""
    return ("dsb ishst", *(f"tlbi vaale1is, {first + i * step:#x}" for i in range(count)), "dsb ish", "isb")


FLUSH_ALL = ("dsb ishst", "tlbi vmalle1is", "dsb ish", "isb")


def ptes(word: int, count: int, *, first: int = 0, page: int = 0x1000) -> dict[tuple[int, int], int]:
    """Level 3 entries `first`..., each leading to its own page."""
    return {(3, i): word + i * page for i in range(first, first + count)}


@dataclass(frozen=True)
class Vector:
    """One measured call. `before` and `after`: descriptors by (level, entry from the VA on); `after` holds those that
    differ. `order`: TLBI, DSB and ISB in order. `tables`: the level down to which tables are made beforehand."""

    name: str
    kernels: tuple[str, ...]
    pages: int
    enable: int
    before: dict[tuple[int, int], int] = field(default_factory=dict)
    after: dict[tuple[int, int], int] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    value: int = 0
    warns: int = 0
    page: int = 0  # first page of the call
    offset: int = 0  # bytes added to its address
    ng: bool = False
    tables: int = 3
    allocates: bool = False  # it asks the page allocator, which has nothing

    def each(self) -> Iterator[tuple[str, Vector]]:
        """(kernel, vector) for the kernels it was measured on."""
        return ((kernel, self) for kernel in self.kernels)


def _pages() -> Iterator[Vector]:
    """Rows "invalid 1" to "invalid on a none PTE"."""
    for ng, valid in ((False, VALID_PTE), (True, VALID_NG)):
        rows = [
            Vector("invalid 1", PAGES_7X, 1, 0, ptes(valid, 4), ptes(INVALID_7X, 1), flush(1)),
            Vector("invalid again", PAGES_7X, 1, 0, ptes(INVALID_7X, 1), {}, flush(1)),
            Vector("valid 1", PAGES_7X, 1, 1, ptes(INVALID_7X, 4), ptes(valid, 1), ORDERED),
            Vector("valid 3", PAGES_7X, 3, 1, ptes(INVALID_7X, 4), ptes(valid, 3), ORDERED),
            Vector("valid on a none PTE", PAGES_7X, 1, 1, {}, {(3, 0): 0x801 if ng else 0x1}, ()),
            Vector("invalid on a none PTE", PAGES_7X, 1, 0, {}, {(3, 0): 0x800}, flush(1)),
        ]
        yield from (replace(row, name=f"{row.name}, nG {int(ng)}", ng=ng) for row in rows)
    yield Vector("invalid 1", PAGES_6X, 1, 0, ptes(VALID_PTE, 4), ptes(INVALID_6X, 1), flush(1))
    yield Vector("invalid again", PAGES_6X, 1, 0, ptes(INVALID_6X, 1), {}, flush(1))
    yield Vector("valid 1", PAGES_6X, 1, 1, ptes(INVALID_6X, 4), ptes(VALID_PTE, 1), ORDERED + flush(1))
    yield Vector("valid 3", PAGES_6X, 3, 1, ptes(INVALID_6X, 4), ptes(VALID_PTE, 3), 3 * ORDERED + flush(3))
    yield Vector("valid on a none PTE", PAGES_6X, 1, 1, {}, {(3, 0): 0x1}, flush(1))
    yield Vector("invalid on a none PTE", PAGES_6X, 1, 0, {}, {}, flush(1))


def _sizes() -> Iterator[Vector]:
    """Rows "n = 0", "n = -1", "unaligned", "512 pages"."""
    some = ptes(VALID_PTE, 4)
    empty = ("dsb ishst", "dsb ish", "isb")
    for enable in (0, 1):
        yield Vector(f"n = 0, enable {enable}", PAGES_6X, 0, enable, some, {}, empty, EINVAL, 1)
        yield Vector(f"n = -1, enable {enable}", PAGES_6X, -1, enable, some, {}, FLUSH_ALL, EINVAL, 1)
    yield Vector("n = 0, enable 1", PAGES_7X, 0, 1, some, {}, (), EINVAL)
    yield Vector("n = -1, enable 1", PAGES_7X, -1, 1, some, {}, (), EINVAL)
    yield Vector("unaligned, invalid 1", PAGES_6X, 1, 0, some, ptes(INVALID_6X, 1), flush(1), offset=0x123)
    yield Vector("unaligned, invalid 1", PAGES_7X, 1, 0, some, ptes(INVALID_7X, 1), flush(2), offset=0x123)
    full = ptes(VALID_PTE, 512)
    yield Vector("512 pages of PTEs", PAGES_6X, 512, 0, full, ptes(INVALID_6X, 512), flush(512))
    yield Vector("512 pages of PTEs", PAGES_7X, 512, 0, full, ptes(INVALID_7X, 512), FLUSH_ALL)


def _blocks() -> Iterator[Vector]:
    """Rows "2M block", "part of block", "last PTE + first page of block"."""
    for ng, valid in ((False, BLOCK), (True, BLOCK_NG)):
        to_invalid = Vector("2M block, invalid", PAGES_7X, 512, 0, {(2, 0): valid}, {(2, 0): BLOCK_INVALID}, FLUSH_ALL)
        to_valid = Vector("2M block, valid", PAGES_7X, 512, 1, {(2, 0): BLOCK_INVALID}, {(2, 0): valid}, ORDERED)
        yield from (replace(row, name=f"{row.name}, nG {int(ng)}", ng=ng) for row in (to_invalid, to_valid))
    refused = Vector("2M block, invalid", PAGES_6X, 512, 0, {(2, 0): BLOCK}, {}, flush(512), EINVAL, 1)
    yield refused
    yield replace(refused, name="2M block, valid", enable=1)
    both = PAGES_6X + PAGES_7X
    yield Vector("part of a block", both, 1, 0, {(2, 0): BLOCK}, {}, flush(1, OPERAND_4K + 3), EINVAL, 1, page=3)
    pages = ptes(VALID_PTE, 512) | {(2, 1): BLOCK + (2 << 20)}
    for kernels, word in ((PAGES_6X, INVALID_6X), (PAGES_7X, INVALID_7X)):
        changed = ptes(word, 1, first=511)
        order = flush(2, OPERAND_4K + 511)
        yield Vector("last PTE and first page of a block", kernels, 2, 0, pages, changed, order, EINVAL, 1, page=511)


def _holes() -> Iterator[Vector]:
    """Row "hole at pmd"."""
    for enable in (0, 1):
        yield Vector(
            f"hole at pmd, enable {enable}", PAGES_6X, 1, enable, {}, {}, flush(1), ENOMEM, tables=2, allocates=True
        )
    yield Vector("hole at pmd, enable 1", PAGES_7X, 1, 1, {}, {}, (), tables=2)
    yield Vector("hole at pmd, enable 0", PAGES_7X, 1, 0, {}, {}, flush(1), tables=2)


def _16k() -> Iterator[Vector]:
    """Row "16K 7.2"."""
    full, invalid = ptes(VALID_PTE, 2048, page=0x4000), ptes(INVALID_7X, 2048, page=0x4000)
    some = {place: word for place, word in invalid.items() if place[1] < 2047}
    yield Vector("2047 pages of 16K", PAGES_16K, 2047, 0, full, some, flush(2047, OPERAND_16K, step=4))
    yield Vector("2048 pages of 16K", PAGES_16K, 2048, 0, full, invalid, FLUSH_ALL)


VECTORS = (*_pages(), *_sizes(), *_blocks(), *_holes(), *_16k())
ROWS = [pair for vector in VECTORS for pair in vector.each()]
IDS = [f"{kernel}: {vector.name}" for kernel, vector in ROWS]


def base_va(kernel: str) -> int:
    """The VA that the vectors of `kernel` begin at."""
    return VA_16K if kernel in PAGES_16K else VA_4K


def page_size(kernel: str) -> int:
    """Bytes of a page."""
    return 0x4000 if kernel in PAGES_16K else 0x1000


def prepare(vector: Vector, tables: TableBuilder, va: int) -> dict[int, int]:
    """Writes the vector's descriptors into `tables` from `va` on; the words that shall have changed, by PA."""
    size = tables.granule.level_size
    tables.place(va, vector.tables, 0)
    for (level, entry), word in vector.before.items():
        tables.place(va + entry * size(level), level, word)
    return {tables.slot(va + entry * size(level), level).pa: word for (level, entry), word in vector.after.items()}
