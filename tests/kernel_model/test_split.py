"""Splitting the leaves of the linear map: measured values of 7.3.4 for the model and for the compiled functions.

Words are written as attributes; where a leaf leads is checked to go on from the block that it came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pytest

from emu.checks.surroundings import Surroundings
from kernel_model import split
from kernel_model.compare import Outcome
from kernel_model.mm import Context, Write
from pgtable.descriptors import CONTIGUOUS_RUN, Granule
from tests.kernel_model.bench import SEVEN, Bench, benches, called, order, tlbis, warns

VA, PAGE, PMD, PUD = 0xFFFF_8001_0000_0000, 0x1000, 2 << 20, 1 << 30
PHYS = 0x1_0000_0000
CONT = 1 << 52
P, C, INVALID, C_INVALID = 0x00E8_0000_0000_0703, 0x00F8_0000_0000_0703, 0x00E8_0000_0000_0F02, 0x00F8_0000_0000_0F02
BLOCK, C_BLOCK, INVALID_BLOCK = 0x00E8_0000_0000_0701, 0x00F8_0000_0000_0701, 0x00E8_0000_0000_0F00
C_INVALID_BLOCK = 0x00F8_0000_0000_0F00
TABLE = 0x1800_0000_0000_0403
ADDRESS = 0x0000_FFFF_FFFF_F000
SYNC = ["dsb ishst", "isb"]

Runs = list[tuple[int, int]]  # (attributes, how many entries in a row)


@dataclass(frozen=True)
class Row:
    """Words of one level from VA on, a call of set_memory_valid, and what there was after it.

    `ptes`, `pmds`: runs of equal attributes from the start of the table that VA is in; `second`: PTEs of the table
    behind it. `tables`: how many were made.
    """

    level: str
    words: list[int]
    page: int
    pages: int
    enable: int = 0
    requires: bool = True
    offset: int = 0
    pmds: Runs = field(default_factory=list)
    ptes: Runs = field(default_factory=list)
    second: Runs = field(default_factory=list)
    value: int = 0
    tlbi: int = -1
    tables: int = 0
    warned: tuple[str, ...] = ()


TWO_RUNS = [C] * 48
SPLIT = [(P, 3), (INVALID, 1), (P, 12), (C, 496)]  # page 3 of a block
ROWS = {
    "one page of a run": Row("PTE", TWO_RUNS, 3, 1, ptes=[(P, 3), (INVALID, 1), (P, 12), (C, 32)], tlbi=1),
    "parts of two runs": Row("PTE", TWO_RUNS, 8, 16, ptes=[(P, 8), (INVALID, 16), (P, 8), (C, 16)], tlbi=16),
    "a run and both neighbours": Row(
        "PTE", [C] * 64, 15, 18, ptes=[(P, 15), (INVALID, 1), (C_INVALID, 16), (INVALID, 1), (P, 15), (C, 16)], tlbi=18
    ),
    "a whole run": Row("PTE", TWO_RUNS, 16, 16, ptes=[(C, 16), (C_INVALID, 16), (C, 16)], tlbi=16),
    "no splitting": Row("PTE", TWO_RUNS, 3, 1, requires=False, ptes=[(C, 3), (C_INVALID, 1), (C, 44)], tlbi=1),
    "unaligned": Row(
        "PTE", TWO_RUNS, 3, 1, offset=0x123, ptes=[(C, 48)], value=-22, tlbi=2, warned=("update_range_prot",)
    ),
    "a whole run of blocks": Row(
        "PMD", [C_BLOCK] * 48, 16 * 512, 16 * 512, pmds=[(C_BLOCK, 16), (C_INVALID_BLOCK, 16), (C_BLOCK, 16)]
    ),
    "a block of a run": Row(
        "PMD",
        [C_BLOCK] * 48,
        18 * 512,
        512,
        pmds=[(C_BLOCK, 16), (BLOCK, 2), (INVALID_BLOCK, 1), (BLOCK, 13), (C_BLOCK, 16)],
    ),
    "a page of a block": Row("PMD", [BLOCK], 3, 1, pmds=[(TABLE, 1)], ptes=SPLIT, tlbi=1, tables=1),
    "a page of a block of a run": Row(
        "PMD",
        [C_BLOCK] * 32,
        16,
        1,
        pmds=[(TABLE, 1), (BLOCK, 15), (C_BLOCK, 16)],
        ptes=[(C, 16), (INVALID, 1), (P, 15), (C, 480)],
        tlbi=1,
        tables=1,
    ),
    "the last page of a block": Row(
        "PMD", [BLOCK], 511, 1, pmds=[(TABLE, 1)], ptes=[(C, 496), (P, 15), (INVALID, 1)], tlbi=1, tables=1
    ),
    "a page of a block of a PUD": Row(
        "PUD", [BLOCK], 3, 1, pmds=[(TABLE, 1), (BLOCK, 15), (C_BLOCK, 496)], ptes=SPLIT, tlbi=1, tables=2
    ),
    "a PMD of a block of a PUD": Row(
        "PUD", [BLOCK], 512, 512, pmds=[(BLOCK, 1), (INVALID_BLOCK, 1), (BLOCK, 14), (C_BLOCK, 496)], tables=1
    ),
    "a page of an invalid block, made valid": Row(
        "PMD",
        [INVALID_BLOCK],
        3,
        1,
        enable=1,
        pmds=[(TABLE, 1)],
        ptes=[(INVALID, 3), (P, 1), (INVALID, 12), (C_INVALID, 496)],
        tlbi=0,
        tables=1,
    ),
    "pages of two blocks": Row(
        "PMD",
        [BLOCK] * 2,
        500,
        24,
        pmds=[(TABLE, 2)],
        ptes=[(C, 496), (P, 4), (INVALID, 12)],
        second=[(INVALID, 12), (P, 4), (C, 496)],
        tlbi=24,
        tables=2,
    ),
}
SIZE = {"PTE": PAGE, "PMD": PMD, "PUD": PUD}


def lay(bench: Bench, level: str, words: list[int]) -> None:
    bench.lay(VA, level, *(word | PHYS + i * SIZE[level] for i, word in enumerate(words)))


def splitting(bench: Bench, requires: bool = True, **changed: Any) -> Surroundings:
    return Surroundings(bench.settings(requires_bbml=requires, **changed))


def call(bench: Bench, row: Row) -> Outcome:
    lay(bench, row.level, row.words)
    around = splitting(bench, row.requires)
    return bench.run("set_memory_valid", VA + row.page * PAGE + row.offset, row.pages, row.enable, around=around)


def runs(bench: Bench, table: int, size: int) -> Runs:
    """Attributes of a table's entries up to the last that is not none; leaves must lead to one range in a row."""
    words = [bench.fetch(table + 8 * i) for i in range(512)]
    leaves = [(word & ADDRESS) - i * size for i, word in enumerate(words) if word and word & ~ADDRESS != TABLE]
    assert len(set(leaves)) <= 1
    found = [(attributes, len(list(group))) for attributes, group in groupby(word & ~ADDRESS for word in words)]
    return found[:-1] if found[-1][0] == 0 else found


def table_at(bench: Bench, entry: int) -> int:
    return bench.fetch(entry) & ADDRESS


def below(bench: Bench, level: str, index: int = 0) -> int:
    """The table under entry `index` of the table that VA is in at `level`."""
    if level == "PUD":
        return table_at(bench, bench.entry(VA, "PUD"))
    return table_at(bench, below(bench, "PUD") + 8 * index)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("made", benches(*SEVEN))
def test_splits_are_as_measured(made: tuple[type[Bench], str], row: Row) -> None:
    bench = made[0](made[1])
    got = call(bench, row)
    assert (got.value, tlbis(got), tuple(warns(got))) == (row.value, row.tlbi, row.warned)
    pmds = below(bench, "PUD")
    if row.pmds:
        assert runs(bench, pmds, PMD) == row.pmds
    if row.ptes:
        assert runs(bench, below(bench, "PMD"), PAGE) == row.ptes
    if row.second:
        assert runs(bench, below(bench, "PMD", 1), PAGE) == row.second
    made_tables = {e.pa & ~0xFFF for e in got.events if isinstance(e, Write)} - arena_pages(bench)
    assert len(made_tables) == row.tables


def arena_pages(bench: Bench) -> set[int]:
    start, size = bench.space.arena
    return set(range(start, start + size, PAGE))


@pytest.mark.parametrize("made", benches(*SEVEN))
def test_a_split_orders_the_new_table_before_the_entry(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    got = call(bench, ROWS["a page of a block"])
    assert order(got) == ["dsb ishst", *SYNC, "dsb ishst", "tlbi vaale1is, 0xff800100003", "dsb ish", "isb"]
    assert called(got) == ["mutex_lock", "mutex_unlock"]


@pytest.mark.parametrize("made", benches(*SEVEN))
def test_one_page_is_split_out_at_its_less_aligned_end_only(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    lay(bench, "PTE", [C] * 48)
    bench.run("split_kernel_leaf_mapping", VA + 15 * PAGE, VA + 16 * PAGE, around=splitting(bench))
    assert runs(bench, below(bench, "PMD"), PAGE) == [(P, 16), (C, 32)]
    bench.run("split_kernel_leaf_mapping", VA + 16 * PAGE, VA + 17 * PAGE, around=splitting(bench))
    assert runs(bench, below(bench, "PMD"), PAGE) == [(C, 16), (P, 16), (C, 16)]


REFUSALS: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "not required": ({"requires_bbml": False}, 0, []),
    "in KFENCE's pool": ({"kfence_pool": (VA, 2 << 20)}, 0, []),
    "no page allocator yet": ({"page_alloc_available": False}, -16, ["split_kernel_leaf_mapping"]),
    "two CPUs too early": ({"online_cpus": 2}, -16, ["split_kernel_leaf_mapping"]),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("made", benches(*SEVEN))
def test_when_nothing_is_split(made: tuple[type[Bench], str], case: tuple[dict[str, Any], int, list[str]]) -> None:
    bench = made[0](made[1])
    lay(bench, "PTE", [C] * 16)
    changed, value, warned = case
    around = Surroundings(bench.settings(**{"requires_bbml": True, **changed}))
    got = bench.run("split_kernel_leaf_mapping", VA + PAGE, VA + 2 * PAGE, around=around)
    assert (got.value, warns(got), called(got)) == (value, warned, [])
    assert runs(bench, below(bench, "PMD"), PAGE) == [(C, 16)]


def test_a_cpu_that_can_change_block_sizes_splits_at_any_time() -> None:
    bench = Bench("debian:7.3")
    for finalized, supports, left in ((True, False, C), (True, True, P)):
        lay(bench, "PTE", [C] * 16)
        changed: dict[str, Any] = {"caps_finalized": finalized, "supports_bbml": supports, "online_cpus": 4}
        bench.run("split_kernel_leaf_mapping", VA + PAGE, VA + 2 * PAGE, around=splitting(bench, **changed))
        assert runs(bench, below(bench, "PMD"), PAGE) == [(left, 16)]


def test_without_a_page_nothing_is_split() -> None:
    bench = Bench("debian:7.3")
    for level in ("PMD", "PUD"):
        bench.new()
        lay(bench, level, [BLOCK])
        bench.run("can_set_direct_map", around=splitting(bench))
        kernel = splitting(bench).apply_to(bench._kernel())
        kernel.allocate = lambda: None
        assert split.split_kernel_leaf_mapping(kernel, VA + PAGE, VA + 2 * PAGE) == -12
        assert split.range_split_to_ptes(kernel, VA, VA + PUD) == -12


# range_split_to_ptes


@pytest.mark.parametrize("made", benches(*SEVEN))
def test_range_split_to_ptes_leaves_pages_without_runs(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    lay(bench, "PMD", [C_BLOCK] * 16)
    got = bench.run("range_split_to_ptes", VA, VA + 2 * PMD, around=splitting(bench))
    assert got.value == 0
    assert runs(bench, below(bench, "PUD"), PMD) == [(TABLE, 2), (BLOCK, 14)]
    assert runs(bench, below(bench, "PMD"), PAGE) == runs(bench, below(bench, "PMD", 1), PAGE) == [(P, 512)]


@pytest.mark.parametrize("made", benches(*SEVEN))
def test_range_split_to_ptes_goes_into_the_table_that_a_block_became(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    lay(bench, "PUD", [BLOCK])
    bench.run("range_split_to_ptes", VA, VA + PMD, around=splitting(bench))
    assert runs(bench, below(bench, "PUD"), PMD) == [(TABLE, 1), (BLOCK, 511)]
    assert runs(bench, below(bench, "PMD"), PAGE) == [(P, 512)]


@pytest.mark.parametrize("made", benches(*SEVEN))
def test_range_split_to_ptes_takes_cont_from_the_runs_it_meets(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    lay(bench, "PTE", [C] * 48)
    bench.run("range_split_to_ptes", VA + 15 * PAGE, VA + 17 * PAGE, around=splitting(bench))
    assert runs(bench, below(bench, "PMD"), PAGE) == [(P, 32), (C, 16)]


@pytest.mark.parametrize("made", benches(*SEVEN))
def test_an_executable_block_becomes_a_table_without_pxn(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    lay(bench, "PMD", [BLOCK & ~(1 << 53)])
    bench.run("range_split_to_ptes", VA, VA + PMD, around=splitting(bench))
    assert runs(bench, below(bench, "PUD"), PMD) == [(0x1000_0000_0000_0403, 1)]


@pytest.mark.parametrize("made", benches(*SEVEN))
def test_in_an_interrupt_every_entry_of_a_split_has_its_barriers(made: tuple[type[Bench], str]) -> None:
    bench = made[0](made[1])
    lay(bench, "PMD", [BLOCK])
    around = Surroundings(bench.settings(requires_bbml=True), Context.SOFTIRQ)
    got = bench.run("range_split_to_ptes", VA, VA + PMD, around=around)
    assert order(got) == SYNC * 512 + ["dsb ishst"] + SYNC


def test_linux_counts_runs_as_the_architecture_does() -> None:
    bench = Bench("debian:7.3")
    kernel = bench._kernel()
    assert (split.CONT_PTES(kernel), split.CONT_PMDS(kernel)) == (16, 16)
    assert CONTIGUOUS_RUN[Granule.K16] == {3: 128, 2: 32}
