"""emu.changes: which descriptors differ, where they are and in which fields, against a comparison word by word."""

from __future__ import annotations

import random

import pytest

from emu.changes import Change, Changes
from emu.machine import Machine
from pgtable import Granule
from pgtable.memory import Mark

MACHINES = {
    "4K": lambda: Machine.bare(),
    "4K, 39 bits": lambda: Machine.bare(va_bits=39),
    "16K": lambda: Machine.bare(granule=Granule.K16, va_bits=47),
    "64K": lambda: Machine.bare(granule=Granule.K64, va_bits=42),
}


def between(m: Machine, before: Mark) -> Changes:
    """What differs from `before` on."""
    return Changes(before, mark(m), m.tables.fmt, m.registers())


def mark(m: Machine) -> Mark:
    return m.memory.mark([m.tables.used, m.user.used])


@pytest.mark.parametrize("name", MACHINES)
def test_changes_equal_a_comparison_word_by_word(name: str, rng: random.Random) -> None:
    m = MACHINES[name]()
    leaves = [m.tables.slot(m.plan.linear + i * m.plan.page_size).pa for i in range(len_of_linear(m))]
    leaves += [m.user.slot(m.plan.user_data + i * m.plan.page_size).pa for i in range(16)]
    before = mark(m)
    expected: dict[int, tuple[int, int]] = {}
    for pa in sorted(rng.sample(leaves, 40)):
        old = m.memory.fetch(pa)
        new = old ^ 1 << rng.choice((0, 6, 7, 10, 53, 54, 55))
        m.memory.store(pa, new)
        expected[pa] = (old, new)

    changes = between(m, before)
    assert {c.pa: (c.old, c.new) for c in changes} == expected
    assert [c.pa for c in changes] == sorted(expected)
    for c in changes:
        assert c.va is not None
        builder = m.tables if c.va >> 63 else m.user
        assert builder.slot(c.va, c.level).pa == c.pa
        assert sum(1 for a, b in c.fields.values() if a != b) == len(c.fields) == 1
    assert (changes.va.tolist(), changes.level.tolist()) == ([c.va for c in changes], [c.level for c in changes])


def len_of_linear(m: Machine) -> int:
    return m.plan.ram[1] // m.plan.page_size


@pytest.mark.parametrize("name", MACHINES)
def test_a_change_of_an_upper_level_has_its_level_and_the_lowest_va(name: str) -> None:
    m = MACHINES[name]()
    slot = m.tables.slot(m.plan.linear, m.tables.start_level)
    before = mark(m)
    m.memory.store(slot.pa, m.memory.fetch(slot.pa) | 1 << 59)
    (change,) = between(m, before)
    assert (change.va, change.level, change.pa) == (m.plan.linear, m.tables.start_level, slot.pa)
    assert change.fields == {"PXNTable": (0, 1)}


def changed(word: int, new: int, level: int = 3) -> Change:
    m = Machine.bare()
    va = m.plan.linear + (1 << 40)
    pa = m.tables.place(va, level, word).pa
    before = mark(m)
    m.memory.store(pa, new)
    (change,) = between(m, before)
    return change


def test_fields_are_named_by_the_layout_of_the_side_that_is_valid() -> None:
    assert changed(0x00E8000040000703, 0x00E8000040000F02).fields == {"VALID": (1, 0), "nG": (0, 1)}
    assert changed(0x00E8000040000F02, 0x00E8000040000703).fields == {"VALID": (0, 1), "nG": (1, 0)}
    assert changed(0x0000000040000003, 0x1800000040000003, level=2).fields == {"UXNTable": (0, 1), "PXNTable": (0, 1)}
    assert changed(0x0000000040000003, 0x0000000040000002, level=2).fields == {"VALID": (1, 0)}
    assert changed(0, 0x1).fields == {"VALID": (0, 1)}


def test_a_change_as_text_and_as_json() -> None:
    change = Change(0xFFFF000008000000, 3, 0x4F045000, 0x00E8000048000707, 0x00E8000048000F06, {"VALID": (1, 0)})
    assert str(change) == "0xffff000008000000 L3 0x00e8000048000707 -> 0x00e8000048000f06  VALID 0x1->0x0"
    assert change.as_json() == {
        "va": "0xffff000008000000",
        "level": 3,
        "pa": "0x000000004f045000",
        "old": "0x00e8000048000707",
        "new": "0x00e8000048000f06",
        "fields": {"VALID": ["0x1", "0x0"]},
    }
    nowhere = Change(None, None, 0x4F045008, 0, 1, {})
    assert str(nowhere).startswith("PA 0x4f045008 0x0000000000000000 -> 0x0000000000000001")
    assert nowhere.as_json()["va"] is None


def test_changes_are_a_sequence() -> None:
    m = Machine.bare()
    before = mark(m)
    assert len(between(m, before)) == 0
    assert list(between(m, before)) == []
    m.tables.protect(m.plan.spare, 3 * m.plan.page_size, AP=2)
    changes = between(m, before)
    assert repr(changes) == "<3 changed descriptors>"
    assert changes[-1] == changes[2] == list(changes)[2]
    assert changes[:2] == [changes[0], changes[1]]
    assert changes[::-1] == list(changes)[::-1]
    assert changes[0] in changes
    with pytest.raises(IndexError):
        changes[3]


def test_a_word_that_no_tree_reaches_has_no_place() -> None:
    m = Machine.bare()
    lonely = m.tables.allocate()
    before = mark(m)
    m.memory.store(lonely + 8, 0x703)
    (change,) = between(m, before)
    assert change == Change(None, None, lonely + 8, 0, 0x703, {})


def test_a_page_given_in_between_counts_only_where_the_tree_reaches_it() -> None:
    m = Machine.bare()
    before = mark(m)
    lonely = m.tables.allocate()
    m.memory.store(lonely, 0x703)
    va = m.plan.linear + (1 << 40)
    m.tables.map(va, 0x4000_0000, 4096)
    changes = between(m, before)
    assert [c.level for c in changes if c.pa not in range(lonely, lonely + 4096)] == [c.level for c in changes]
    assert sorted(c.level or 0 for c in changes) == [0, 1, 2, 3]
    assert {c.va for c in changes} == {va}


def test_the_comparison_is_made_when_it_is_asked_for_and_keeps() -> None:
    m = Machine.bare()
    before = mark(m)
    m.tables.protect(m.plan.spare, m.plan.page_size, AP=2)
    changes = between(m, before)
    m.tables.protect(m.plan.spare, 2 * m.plan.page_size, AP=3)
    assert [c.fields["AP"] for c in changes] == [(0, 2)]


def grouped(changes: Changes, m: Machine) -> list[tuple[int | None, int | None, int, int, int]]:
    """Runs by the words: (va, level, pa, n, flips)."""
    found: list[tuple[int | None, int | None, int, int, int]] = []
    for c in changes:
        flips = c.old ^ c.new
        if found:
            va, level, pa, n, same = found[-1]
            size = 0 if level is None else m.tables.granule.level_size(level)
            if pa + 8 * n == c.pa and same == flips and level == c.level and (va is None or c.va == va + n * size):
                found[-1] = (va, level, pa, n + 1, flips)
                continue
        found.append((c.va, c.level, c.pa, 1, flips))
    return found


@pytest.mark.parametrize("name", MACHINES)
def test_runs_are_the_changes_joined(name: str, rng: random.Random) -> None:
    """Judge: the changes one by one. Stretches over the borders of table pages, neighbours with other flips, tables."""
    m = MACHINES[name]()
    slots = [m.tables.slot(m.plan.linear + i * m.plan.page_size).pa for i in range(len_of_linear(m))]
    per_table = m.plan.page_size // 8
    before = mark(m)
    for _ in range(12):
        first = rng.choice([rng.randrange(len(slots)), per_table - 2, 2 * per_table - 1])
        flip = 1 << rng.choice((0, 6, 7, 54))
        for pa in slots[first : first + rng.choice((1, 2, 40, 2 * per_table))]:
            m.memory.store(pa, m.memory.fetch(pa) ^ flip)
    m.memory.store(m.tables.root, 0x1234_5670)  # a word that is no leaf
    m.memory.store(m.tables.used[0] + m.tables.used[1] - 8, 8)
    changes = between(m, before)
    runs = [(r.va, r.level, r.pa, r.n, r.flips) for r in changes.runs]
    assert runs == grouped(changes, m)
    assert [(r.old, r.new) for r in changes.runs] == [(m_old(before, r.pa), m.memory.fetch(r.pa)) for r in changes.runs]
    assert sum(r.n for r in changes.runs) == len(changes) > 0


def m_old(before: Mark, pa: int) -> int:
    return next(
        int(words[(pa - base) // 8])
        for (base, n), words in zip(before.ranges, before.copies, strict=True)
        if base <= pa < base + 8 * n
    )


def test_neighbouring_table_pages_whose_vas_do_not_go_on_are_two_runs() -> None:
    m = Machine.bare()
    va = m.plan.linear + (1 << 41)
    last = m.tables.place(va + (511 << 12), 3, 0x703).pa
    first = m.tables.place(va + (2 << 20), 3, 0x703).pa
    assert first == last + 8
    slots = [m.tables.slot(at, 2).pa for at in (va, va + (2 << 20))]
    words = [m.memory.fetch(pa) for pa in slots]
    for pa, word in zip(slots, reversed(words), strict=True):  # each table translates the other's 2 MiB
        m.memory.store(pa, word)
    before = mark(m)
    for pa in (last, first):
        m.memory.store(pa, 0x702)
    assert [(r.va, r.n) for r in between(m, before).runs] == [(va + (2 << 20) + (511 << 12), 1), (va, 1)]


def test_neighbouring_table_pages_of_different_levels_are_two_runs() -> None:
    m = Machine.bare()
    va = m.plan.linear + (1 << 41)
    m.tables.place(va + (1 << 30), 2, 0)
    last = m.tables.place(va + (511 << 21), 2, 0x701).pa
    first = m.tables.place(va + (1 << 30), 3, 0x703).pa
    assert first == last + 8
    before = mark(m)
    for pa in (last, first):
        m.memory.store(pa, m.memory.fetch(pa) ^ 1 << 11)
    runs = [(r.va, r.level, r.n) for r in between(m, before).runs]
    assert runs == [(va + (511 << 21), 2, 1), (va + (1 << 30), 3, 1)]


def test_a_table_that_moved_between_two_calls_is_looked_up_again() -> None:
    """What is kept of the tree is dropped when a descriptor above the last level is another one."""
    m = Machine.bare()
    code = b"".join(word.to_bytes(4, "little") for word in (0xF9000020,))  # str x0, [x1]
    va = m.plan.linear + (1 << 41)
    leaf = m.tables.place(va, 3, 0x703)
    level2 = m.tables.slot(va, 2)
    linear = m.plan.linear_va(leaf.pa)
    (change,) = m.run(code, 0x702, linear).ok().changes
    assert change.va == va
    m.memory.store(level2.pa + 8, m.memory.fetch(level2.pa))  # the table now translates the next 2 MiB as well
    m.memory.store(level2.pa, 0)
    result = m.run(code, 0x703, linear).ok()
    assert [c.va for c in result.changes] == [r.va for r in result.changes.runs] == [va + (2 << 20)]
