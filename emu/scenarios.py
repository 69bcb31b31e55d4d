"""Prepared tables for set_memory_valid: the situations in which kernels differ, or in which a naive model is wrong.

Each scenario is a `Case`. They use VAs far from everything that a cold boot maps, in a top-level entry of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from emu.check import Call, Case
from emu.coldboot import Plan, protections
from pgtable.build import TableBuilder
from pgtable.descriptors import LAST_LEVEL

TEST_PA = 0x6000_0000  # where the mappings lead; nothing is read or written there


def test_va(plan: Plan) -> int:
    """The start of the VAs used here, aligned to 16 GiB at least."""
    return plan.linear + (1 << plan.va_bits - 4)


Mapper = Callable[[TableBuilder, Plan, int], None]


def _pages(count: int, start: int = 0) -> Mapper:
    """Maps `count` pages from page `start` on."""

    def mapper(tables: TableBuilder, plan: Plan, va: int) -> None:
        page = plan.page_size
        template = protections(tables.fmt).kernel
        at = va + start * page
        tables.map(at, TEST_PA + start * page, count * page, level=LAST_LEVEL, template=template)

    return mapper


def _block(level: int = LAST_LEVEL - 1, at: int = 0) -> Mapper:
    """Maps one block at `level`, `at` entries from the start."""

    def mapper(tables: TableBuilder, plan: Plan, va: int) -> None:
        size = tables.granule.level_size(level)
        pa = size * 4  # aligned to any block
        tables.map(va + at * size, pa, size, level=level, template=protections(tables.fmt).kernel)

    return mapper


def _both(*mappers: Mapper) -> Mapper:
    def mapper(tables: TableBuilder, plan: Plan, va: int) -> None:
        for each in mappers:
            each(tables, plan, va)

    return mapper


def _tables_to(level: int) -> Mapper:
    """Makes the tables down to `level` and leaves the entries empty."""

    def mapper(tables: TableBuilder, plan: Plan, va: int) -> None:
        tables.place(va, level, 0)

    return mapper


def _nothing(tables: TableBuilder, plan: Plan, va: int) -> None:
    """No mapping at all: a hole at the top level."""


def _entries(level: int, *words: int) -> Mapper:
    """Places raw descriptors at `level`, from the start on."""

    def mapper(tables: TableBuilder, plan: Plan, va: int) -> None:
        for i, word in enumerate(words):
            tables.place(va + i * tables.granule.level_size(level), level, word)

    return mapper


def _case(
    name: str,
    mapper: Mapper,
    numpages: int,
    enable: int,
    *,
    start: int = 0,
    offset: int = 0,
    ng: bool = False,
    blocks: int | None = None,
) -> Case:
    """`start`: first page of the call; `offset`: bytes added to its address."""

    def prepare(tables: TableBuilder, plan: Plan) -> Call:
        va = test_va(plan)
        mapper(tables, plan, va)
        return Call(va + start * plan.page_size + offset, numpages, enable)

    return Case(f"{name}, {'valid' if enable else 'invalid'}", prepare, ng=ng, blocks=blocks)


def all_cases(entries: int = 512) -> Iterator[Case]:
    """Every scenario, for a kernel whose tables have `entries` descriptors."""
    n = entries
    for enable in (0, 1):
        yield _case("four pages", _pages(n), 4, enable, start=8)
        yield _case("across a PTE table border", _pages(2 * n), 4, enable, start=n - 2)
        yield _case("none PTE between pages", _both(_pages(3), _pages(3, 4)), 7, enable)
        yield _case("none PTEs only", _both(_pages(1)), 2, enable, start=3)
        yield _case("a whole block", _block(), n, enable)
        yield _case("part of a block", _block(), 1, enable, start=3)
        yield _case("pages, then part of a block", _both(_pages(n), _block(at=1)), 2, enable, start=n - 1)
        yield _case("pages, then a whole block", _both(_pages(n), _block(at=1)), n + 1, enable, start=n - 1)
        yield _case("hole at level 2", _both(_tables_to(2), _pages(2, 2 * n)), 3, enable, start=n - 1)
        yield _case("hole at level 1", _tables_to(1), 2, enable)
        yield _case("hole at the top level", _nothing, 2, enable)
        yield _case("size 0", _pages(4), 0, enable)
        yield _case("size -1", _pages(4), -1, enable)
        yield _case("unaligned inside a table", _pages(8), 2, enable, start=1, offset=0x123)
        yield _case("unaligned across a table", _pages(2 * n), 4, enable, start=n - 2, offset=0x123, blocks=20_000)
        for pages in (n - 1, n, n + 1):
            yield _case(f"{pages} pages", _pages(2 * n), pages, enable)
        yield _case("nG mappings on", _pages(8), 3, enable, ng=True)
        yield _case("nG mappings on, none PTE", _pages(1), 2, enable, start=1, ng=True)
        yield _case("nG mappings on, a whole block", _block(), n, enable, ng=True)
        yield _case("a block that only lost VALID", _entries(2, 0x00E8000040000700), 1, enable)
        yield _case("a page-shaped word without VALID at level 2", _entries(2, 0x00E8000040000702), 1, enable)
        yield _case("a block marked present-invalid", _entries(2, 0x00E8000040000F00), n, enable)
        yield _case("part of a block marked present-invalid", _entries(2, 0x00E8000040000F00), 1, enable)
