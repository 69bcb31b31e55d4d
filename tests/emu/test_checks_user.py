"""The compiled walks of user memory against the model, event by event: a part of the cases of each function."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import islice
from random import Random
from typing import Any

import pytest

from emu.checks.folio_walk import FolioWalkStart, HugePteOffset
from emu.checks.harness import differences
from emu.checks.trees import Kind
from emu.checks.user_cases import FUNCTIONS, UserCase, plain
from emu.checks.user_walks import UserWalk
from emu.checks.vmas import Area, Space, objects_of
from emu.checks.world import Reaction, World
from kernel_model import huge, pagewalk
from kernel_model.mm import Called, Kernel
from tests.kernels import KERNELS, MORE, kernel_image

pytestmark = pytest.mark.kernels


@cache
def world(name: str) -> World:
    return World(kernel_image(name))


def some(harness: Any, where: World, *, every: int, count: int, seed: int = 1) -> Iterator[Any]:
    """Every so many prepared cases, and some random ones."""
    yield from islice(harness.prepared(where), seed, None, every)
    rng = Random(seed)
    yield from (harness.random(where, rng) for _ in range(count))


def failing(harness: Any, where: World, cases: Iterator[Any]) -> list[str]:
    found = []
    for case in cases:
        found += [f"{case}: {each}" for each in differences(harness.run(where, case))]
    return found


@pytest.mark.parametrize("name", [*KERNELS, *MORE])
def test_the_compiled_walks_do_what_the_model_says(name: str) -> None:
    where = world(name)
    harnesses: list[Any] = [*map(UserWalk, FUNCTIONS), FolioWalkStart(), HugePteOffset()]
    run = [harness for harness in harnesses if harness.exists(where)]
    for harness in run:
        assert failing(harness, where, some(harness, where, every=61, count=15)) == []
    assert len(run) == {"debian:6.1": 5, "debian:6.12": 6, "debian:6.12.95": 6}.get(name, 8)


def test_prepared_cases_reach_every_row() -> None:
    where, walk = world("debian:6.1"), UserWalk("walk_page_range")
    rows: set[str] = set()
    for case in walk.prepared(where):
        checked = walk.run(where, case)
        assert differences(checked) == []
        rows |= checked.rows
    assert walk.rows(where) - rows == set()


# rules that are broken on purpose are noticed


def one_huge(name: str, function: str, **more: Any) -> tuple[World, UserWalk, UserCase]:
    """A vma over a block at the level of PMDs, and what is below it."""
    where = world(name)
    tree, va = plain(where, [level.name for level in where.space.tables].index("PMD"), Kind.LEAF)
    area = Area(va, va + 2 * where.levels.page_size)
    return where, UserWalk(function), UserCase(tree, Space((area,), **more), area.start, area.end)


@pytest.mark.parametrize("name", KERNELS)
def test_a_split_that_is_forgotten(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, walk, case = one_huge(name, "walk_page_vma")
    checked = walk.run(where, case)
    assert differences(checked) == []
    assert [event.name for event in checked.real.events if isinstance(event, Called)] == ["__split_huge_pmd"]
    monkeypatch.setattr(huge, "split_huge_pmd", lambda kernel, pmd, addr: None)
    assert differences(walk.run(where, case))


def test_a_pmd_that_is_neither_present_nor_migrating_is_cleared_by_6_12_only(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = 0x0060_0000_0000_0100  # not valid, and no kind of swap entry that migration has
    for name, stored in (("debian:6.12", 1), ("debian:7.3", 0)):
        where, walk, case = one_huge(name, "walk_page_vma", splits=(absent,))
        checked = walk.run(where, case)
        assert differences(checked) == []
        assert sum("= 0x0000000000000000" in str(event) for event in checked.real.events) == stored
    where, walk, case = one_huge("debian:6.12", "walk_page_vma", splits=(absent,))
    monkeypatch.setattr(type(where.bits), "is_migration_entry", lambda bits, value: True)
    assert differences(walk.run(where, case))


def test_post_vma_that_is_left_out_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    where = world("debian:7.3")
    tree, va = plain(where, 3, Kind.LEAF)
    page = where.levels.page_size
    case = UserCase(tree, Space((Area(va, va + page),)), va, va + page, script={1: Reaction(-5)})
    walk = UserWalk("walk_page_vma")
    assert differences(walk.run(where, case)) == []

    def without(addr: int, end: int, walk: pagewalk.MmWalk) -> int:
        walk.ops.post_vma = None
        return -5

    monkeypatch.setattr(pagewalk, "walk_pgd_range", without)
    assert differences(walk.run(where, case))


def test_an_endless_walk_of_a_block_at_the_level_of_puds_ends_by_time() -> None:
    """Nothing splits a huge PUD on arm64: without a callback that sees it, the walk looks at it for ever."""
    where = world("debian:7.3")
    tree, va = plain(where, [level.name for level in where.space.tables].index("PUD"), Kind.LEAF)
    case = UserCase(tree, Space((Area(va, va + 0x2000),)), va, va + 0x2000, ("pte_entry",))
    checked = UserWalk("walk_page_vma").run(where, case)
    assert checked.predicted.stop == checked.real.stop == "runaway"
    assert checked.predicted.cut
    assert checked.real.cut
    assert differences(checked) == []


# objects


def test_locks_of_a_case_are_in_the_guest() -> None:
    where = world("debian:6.12")
    objects = objects_of(where)
    objects.write(Space((Area(0x1000, 0x3000, locked="write"), Area(0x3000, 0x5000, locked="read")), 0x100))
    word = where.machine.word_at
    sequence = word(objects.mm + where.offset("mm_struct", "mm_lock_seq"))
    at = where.offset("vm_area_struct", "vm_lock_seq")
    assert word(objects.vma(0) + at) == sequence != word(objects.vma(1) + at)
    lock = word(objects.vma(1) + where.offset("vm_area_struct", "vm_lock"), 8)
    assert word(lock + where.offset("rw_semaphore", "count"), 8) == 0x100
    kernel: Kernel = where.kernel()
    mm = objects.model(kernel)
    assert [vma.locked for vma in mm.vmas] == ["write", "read"]
    assert mm.mmap_lock.is_locked
    assert mm.find_vma(0x3000) is mm.vmas[1]
    objects.forget()
