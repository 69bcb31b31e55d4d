"""kernel_model.pagewalk against the walks that real kernels made: facts/kernel.md 9.1 and 9.2, as literal events.

Measured on 6.1.176, 6.12.107, 7.3.4 and 7.2.13-16k with all six callbacks set, unless a test says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kernel_model.levels import Levels
from kernel_model.mm import EINVAL, Kernel, Runaway
from kernel_model.names import Bits
from kernel_model.pagewalk import (
    Action,
    MmWalk,
    MmWalkOps,
    walk_pgd_range,
)
from kernel_model.variants import by_name
from kernel_model.walkers import (
    walk_kernel_page_table_range,
    walk_kernel_page_table_range_lockless,
    walk_page_range_novma,
)
from pgtable import Format, Granule, PhysicalMemory
from pgtable.build import TableBuilder

KP = 0x00E8_0000_0000_0703  # PAGE_KERNEL
PAGE, PMD, PUD, PGD = 0x1000, 2 << 20, 1 << 30, 512 << 30
RAM = (0x5000_0000, 1 << 20)

# Row: its V, and how its build counts levels.
BUILDS = {
    "6.1": (0xFFFF_8000_0A00_0000, Levels(12, 4, 48, 48)),
    "6.12": (0xFFFF_8000_9000_0000, Levels(12, 5, 52, 48)),
    "7.x": (0xFFFF_8000_9000_0000, Levels(12, 5, 52, 48)),
}
ALL = sorted(BUILDS)
NEW = ["6.12", "7.x"]  # their levels are folded at run time
KINDS = ("pgd", "p4d", "pud", "pmd", "pte", "hole")

Event = tuple[Any, ...]


class Walker:
    """One variant over tables of its own; `events` is what its callbacks saw, addresses from V on."""

    def __init__(self, name: str, build: tuple[int, Levels] | None = None) -> None:
        self.v, levels = build or BUILDS[name]
        self.name = name
        self.memory = PhysicalMemory(RAM)
        fmt = Format(Granule(levels.page_shift), ds=levels.va_bits > 48)
        self.tables = TableBuilder(self.memory, RAM, fmt=fmt, va_bits=levels.va_bits, upper=True)
        bits = Bits.of(fmt, by_name(name))
        self.kernel = Kernel(self.memory, self.tables.root, levels, bits, step_limit=3000)
        self.events: list[Event] = []
        self.returns: dict[str, list[int]] = {}
        self.actions: dict[str, list[Action | None]] = {}  # None: left as it is
        self.before: Callable[[str, int], None] = lambda kind, pa: None

    def pages(self, count: int = 4) -> Walker:
        """L3[i] = 0x40000000 + i * 4096 | KP."""
        for i in range(count):
            self.tables.place(self.v + i * PAGE, 3, 0x4000_0000 + i * PAGE | KP)
        return self

    def word(self, va: int, level: int, word: int) -> Walker:
        self.tables.place(va, level, word)
        return self

    def ops(self, kinds: tuple[str, ...]) -> MmWalkOps:
        def entry(kind: str) -> Callable[[int, int, int, MmWalk], int]:
            def callback(pa: int, start: int, end: int, walk: MmWalk) -> int:
                value = self.memory.fetch(pa)
                seen = (kind, start - self.v, end - self.v, *([value] if kind == "pte" else []))
                return self._answer(kind, seen, pa, walk)

            return callback

        def hole(start: int, end: int, depth: int, walk: MmWalk) -> int:
            return self._answer("hole", ("hole", start - self.v, end - self.v, depth), 0, walk)

        made: dict[str, Any] = {f"{kind}_entry": entry(kind) for kind in kinds if kind != "hole"}
        return MmWalkOps(**made, pte_hole=hole if "hole" in kinds else None)

    def _answer(self, kind: str, seen: Event, pa: int, walk: MmWalk) -> int:
        self.events.append(seen)
        self.before(kind, pa)
        action = self.actions[kind].pop(0) if self.actions.get(kind) else None
        if action is not None:
            walk.action = action
        return self.returns[kind].pop(0) if self.returns.get(kind) else 0

    def __call__(self, start: int, end: int, *kinds: str) -> int:
        """Walks [V + start, V + end); returns what the walk does."""
        self.events.clear()
        mask = (1 << 64) - 1
        span = self.v + start & mask, self.v + end & mask
        self.kernel.init_mm.mmap_lock.count = 1
        if "walk_kernel_page_table_range" in self.kernel.locks.entries:
            return walk_kernel_page_table_range(self.kernel, *span, self.ops(kinds or KINDS))
        return walk_page_range_novma(self.kernel, self.kernel.init_mm, *span, self.ops(kinds or KINDS))

    def names(self) -> list[str]:
        return [event[0] for event in self.events]


def upper(start: int, end: int, *kinds: str) -> list[Event]:
    return [(kind, start, end) for kind in kinds or ("pgd", "p4d", "pud", "pmd")]


@pytest.mark.parametrize("name", ALL)
def test_a_two_pages(name: str) -> None:
    w = Walker(name).pages()
    assert w(0, 2 * PAGE) == 0
    assert w.events == [
        *upper(0, 2 * PAGE),
        ("pte", 0, PAGE, 0x00E8_0000_4000_0703),
        ("pte", PAGE, 2 * PAGE, 0x00E8_0000_4000_1703),
    ]


def test_b_empty_top_slots_are_counted_by_the_size_that_the_build_has() -> None:
    empty = 0xFFFF_9000_0000_0000
    for name in ALL:
        w = Walker(name).pages()
        start, end = empty - w.v, empty + 2 * PGD - w.v
        middle = start + PGD
        assert w(start, end) == 0
        if name == "6.1":
            assert w.events == [
                ("pgd", start, middle),
                ("hole", start, middle, 0),
                ("pgd", middle, end),
                ("hole", middle, end, 0),
            ]
        else:
            assert w.events == [("pgd", start, end), ("hole", start, middle, 1), ("hole", middle, end, 1)]


@pytest.mark.parametrize("name", ALL)
def test_c_d_holes_at_level_1_and_2(name: str) -> None:
    w = Walker(name).pages()
    down = w.v % PUD
    assert w(PUD - down, 3 * PUD - down) == 0
    assert w.events == [
        *upper(PUD - down, 3 * PUD - down, "pgd", "p4d"),
        ("hole", PUD - down, 2 * PUD - down, 2),
        ("hole", 2 * PUD - down, 3 * PUD - down, 2),
    ]
    assert w(PMD, 0x500000) == 0
    assert w.events == [
        *upper(PMD, 0x500000, "pgd", "p4d", "pud"),
        ("hole", PMD, 2 * PMD, 3),
        ("hole", 2 * PMD, 0x500000, 3),
    ]


@pytest.mark.parametrize("name", ALL)
def test_e_an_empty_range(name: str) -> None:
    w = Walker(name).pages()
    assert w(0, 0) == w(PAGE, 0) == -EINVAL
    assert w.events == []


@pytest.mark.parametrize("name", ALL)
def test_g_an_unaligned_range_keeps_its_offset(name: str) -> None:
    w = Walker(name).pages()
    assert w(0x234, 0x2001) == 0
    assert w.events == [
        *upper(0x234, 0x2001),
        ("pte", 0x234, 0x1234, 0x00E8_0000_4000_0703),
        ("pte", 0x1234, 0x2234, 0x00E8_0000_4000_1703),
    ]


def test_h_the_end_of_the_address_space() -> None:
    w = Walker("6.1").pages()
    start, end = 0xFFFF_FFFF_FFFF_E000 - w.v, 0xFFFF_FFFF_FFFF_FFFF - w.v
    assert w(start, end) == 0
    assert w.events == [("pgd", start, end), ("hole", start, end, 0)]


def test_i_j_a_bad_top_entry_is_cleared_or_kept_or_passes() -> None:
    for name in ALL:
        for word, level in ((0x4000_0001, 0), (0x4000_0002, 0)):
            w = Walker(name).word(Walker(name).v, level, word)
            slot = w.tables.slot(w.v, 0).pa
            assert w(0, PAGE, "pgd", "p4d", "hole") == 0
            depth = 0 if name == "6.1" else 1
            if word & 3 == 2 and name != "7.x":
                assert w.names() == ["pgd", "p4d"]
                assert w.memory.fetch(slot) == word
            else:
                assert w.events == [("pgd", 0, PAGE), ("hole", 0, PAGE, depth)]
                assert w.memory.fetch(slot) == (word if name == "6.1" else 0)


@pytest.mark.parametrize("name", ALL)
def test_k_entries_at_level_2_that_are_no_tables(name: str) -> None:
    w = Walker(name)
    words = (0xE8_0000_4020_0701, 0xE8_0000_4040_0700, 0xE8_0000_4060_0702, 0xE8_0000_4080_0F00)
    for i, word in enumerate(words):
        w.word(w.v + i * PMD, 2, word)
    assert w(0, 4 * PMD) == 0
    assert w.events == [
        *upper(0, 4 * PMD, "pgd", "p4d", "pud"),
        *(("pmd", i * PMD, (i + 1) * PMD) for i in range(4)),
    ]


def test_l_entries_at_level_1_that_are_no_tables() -> None:
    w = Walker("6.1", (0xFFFF_8000_0000_0000, BUILDS["6.1"][1]))
    w.word(w.v, 1, 0xE8_0000_8000_0701).word(w.v + PUD, 1, 0xE8_0000_C000_0700)
    assert w(0, 2 * PUD) == 0
    assert w.names() == ["pgd", "p4d", "pud", "pud"]


@pytest.mark.parametrize("name", ALL)
def test_m_to_p_continue_counts_in_pmd_and_pud_only(name: str) -> None:
    for kind, seen in (("pmd", 4), ("pud", 3), ("p4d", 6), ("pgd", 6)):
        w = Walker(name).pages()
        w.actions[kind] = [Action.CONTINUE]
        assert w(0, 2 * PAGE) == 0
        assert len(w.events) == seen


@pytest.mark.parametrize("name", ALL)
def test_q_again_calls_the_pmd_again(name: str) -> None:
    w = Walker(name).pages()
    w.actions["pmd"] = [Action.AGAIN, Action.AGAIN, Action.SUBTREE]
    assert w(0, PAGE) == 0
    assert w.names() == ["pgd", "p4d", "pud", "pmd", "pmd", "pmd", "pte"]


def test_q2_again_from_a_pte_repeats_the_pmd_where_the_kernel_looks() -> None:
    for name in ALL:
        w = Walker(name).pages()
        w.actions["pte"] = [Action.AGAIN, None, Action.AGAIN, None]  # the second page leaves what the first said
        assert w(0, 2 * PAGE) == 0
        repeated = ["pmd", "pte", "pte"]
        assert w.names() == ["pgd", "p4d", "pud", *repeated * (1 if name == "6.1" else 3)]


def test_q3_a_pmd_that_the_callback_zeroes_and_asks_for_again() -> None:
    for name in NEW:
        w = Walker(name).pages()
        w.actions["pmd"] = [Action.AGAIN]

        def zero(kind: str, pa: int, w: Walker = w) -> None:
            if kind == "pmd":
                w.memory.store(pa, 0)

        w.before = zero
        assert w(0, PAGE) == 0
        more = ["pud", "hole"] if name == "6.12" else []
        assert w.names() == ["pgd", "p4d", "pud", "pmd", "hole", *more]


@pytest.mark.parametrize("name", ALL)
def test_r_s_t_what_a_callback_returns_ends_the_walk(name: str) -> None:
    w = Walker(name).pages()
    w.returns["pte"] = [7]
    assert w(0, 2 * PAGE) == 7
    assert w.names().count("pte") == 1
    w.returns["pte"] = [0, -5]
    assert w(0, 4 * PAGE) == -5
    assert w.names().count("pte") == 2
    w.returns["hole"] = [3]
    assert w(PMD, 3 * PMD) == 3
    assert w.names().count("hole") == 1


@pytest.mark.parametrize("name", ALL)
def test_u_to_z_callbacks_that_are_not_set(name: str) -> None:
    w = Walker(name).pages().word(BUILDS[name][0] + PMD, 2, 0xE8_0000_4020_0701)
    assert (w(0, 2 * PAGE, "pte"), w.names()) == (0, ["pte", "pte"])
    assert (w(0, 2 * PMD, "pmd"), w.names()) == (0, ["pmd", "pmd"])
    assert (w(0, 2 * PAGE, "pgd"), w.names()) == (0, ["pgd"])
    assert (w(0, 1 << 46, "hole"), w.names()) == (0, [])
    assert walk_pgd_range(w.v, w.v + PAGE, MmWalk(w.kernel, MmWalkOps())) == 0


def test_y_pages_then_a_block() -> None:
    w = Walker("6.1").pages().word(BUILDS["6.1"][0] + PMD, 2, 0xE8_0000_4020_0701)
    assert w(PMD - PAGE, PMD + PAGE) == 0
    assert w.events[3:] == [
        ("pmd", PMD - PAGE, PMD),
        ("pte", PMD - PAGE, PMD, 0),
        ("pmd", PMD, PMD + PAGE),
    ]


@pytest.mark.parametrize("name", ALL)
def test_none_ptes_are_no_holes(name: str) -> None:
    w = Walker(name).pages()
    assert w(3 * PAGE, 6 * PAGE) == 0
    assert [event[3] for event in w.events if event[0] == "pte"] == [0x00E8_0000_4000_3703, 0, 0]


def test_bit_58_makes_a_leaf_of_6_1() -> None:
    w = Walker("6.1").word(BUILDS["6.1"][0], 2, 0x0400_0000_4080_0700)
    assert w(0, PAGE) == 0
    assert w.names() == ["pgd", "p4d", "pud", "pmd"]


def test_install_pte_is_refused_by_the_kernel_walk_of_7_x() -> None:
    w = Walker("7.x").pages()
    ops = w.ops(KINDS)
    ops.install_pte = lambda addr, next, walk: (0, 0)
    assert walk_kernel_page_table_range_lockless(w.kernel, w.v, w.v + PAGE, ops) == -EINVAL
    assert w.events == []


@pytest.mark.parametrize("name", ["6.1", "7.x"])
def test_an_end_below_one_page_runs_away(name: str) -> None:
    memory = PhysicalMemory(RAM)
    low = TableBuilder(memory, RAM)
    low.place(0, 3, KP)
    for end, runs in ((0x1000, False), (0xFFF, True), (0x100, True)):
        w = Walker(name)
        w.memory, w.kernel.memory, w.v = memory, memory, 0
        w.kernel.steps = 0
        walk = MmWalk(w.kernel, w.ops(("pte",)), pgd=low.root)
        if runs:
            with pytest.raises((Runaway, LookupError)):
                walk_pgd_range(0, end, walk)
            assert len(w.events) > 500
        else:
            assert walk_pgd_range(0, end, walk) == 0
            assert len(w.events) == 1


# five levels, and 16K


@pytest.mark.parametrize("name", NEW)
def test_with_52_bits_an_empty_top_entry_is_a_hole_of_depth_0_and_pgd_is_not_called(name: str) -> None:
    w = Walker(name, (0xFFF1_0000_0000_0000, Levels(12, 5, 52, 52)))
    assert w(0, PAGE) == 0
    assert w.events == [("hole", 0, PAGE, 0)]
    w.pages()
    assert w(0, PAGE) == 0
    assert w.names() == ["pgd", "p4d", "pud", "pmd", "pte"]


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("word", [0x4000_0001, 0x4000_0002])
def test_with_52_bits_a_bad_top_entry_is_cleared(name: str, word: int) -> None:
    w = Walker(name, (0xFFF1_0000_0000_0000, Levels(12, 5, 52, 52)))
    w.word(w.v, -1, word)
    slot = w.tables.slot(w.v, -1).pa
    assert w(0, PAGE, "pgd", "hole") == 0
    passes = name == "6.12" and word & 3 == 2
    assert w.events == ([("pgd", 0, PAGE)] if passes else [("hole", 0, PAGE, 0)])
    assert w.memory.fetch(slot) == (word if passes else 0)


V_16K = 0xFFFF_C000_9000_0000
SIZE_16K = 0x4000


def test_16k_with_47_bits_folds_the_pud_at_run_time() -> None:
    w = Walker("7.x", (V_16K, Levels(14, 4, 52, 47)))
    w.tables.place(w.v, 3, 0x4000_0000 | KP)
    assert w(0, 2 * SIZE_16K) == 0
    assert [event[:3] for event in w.events] == [
        *upper(0, 2 * SIZE_16K),
        ("pte", 0, SIZE_16K),
        ("pte", SIZE_16K, 2 * SIZE_16K),
    ]
    top = 1 << 36
    away = 4 * top - w.v % top
    assert w(away, away + SIZE_16K) == 0
    assert w.events == [*upper(away, away + SIZE_16K, "pgd", "p4d"), ("hole", away, away + SIZE_16K, 2)]
    pmd = 1 << 25
    assert w(pmd, pmd + SIZE_16K) == 0
    assert w.events[-1] == ("hole", pmd, pmd + SIZE_16K, 3)


def test_16k_with_52_bits_has_its_pgd_for_p4d() -> None:
    w = Walker("7.x", (0xFFF9_0000_0000_0000, Levels(14, 4, 52, 52)))
    assert w(0, SIZE_16K) == 0
    assert w.events == [("pgd", 0, SIZE_16K), ("hole", 0, SIZE_16K, 0)]


@pytest.mark.parametrize("name", ALL)
def test_a_walk_without_end_is_ended_by_the_step_limit(name: str) -> None:
    w = Walker(name).pages()
    w.actions["pmd"] = [Action.AGAIN] * 10_000
    with pytest.raises(Runaway, match="walk_pmd_range: no end after 3000 steps"):
        w(0, PAGE)
