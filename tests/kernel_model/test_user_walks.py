"""The walks of user memory in the model alone, as literal events: what vmas, hugetlb and install_pte add.

Each was seen from the compiled kernels too (tests/emu/test_checks_user.py compares the two, event by event).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kernel_model import huge, walkers
from kernel_model.folio_walk import FolioWalk, Level, folio_walk_start
from kernel_model.levels import Levels
from kernel_model.mm import EINVAL, ENOMEM, Bug, Called, Kernel, Mm, Runaway, Rwsem, Vma, Warn, Write
from kernel_model.names import Bits
from kernel_model.pagewalk import Action, MmWalk, MmWalkOps
from kernel_model.variants import by_name
from pgtable import Format, Granule, PhysicalMemory
from pgtable.build import TableBuilder

PAGE, PMD, PUD = 0x1000, 2 << 20, 1 << 30
RAM = (0x5000_0000, 1 << 20)
V = 0x5555_4000_0000
USER = 0x0020_0000_0000_0F43  # a page that user and kernel may read and write
BLOCK = USER & ~2
BUILDS = {"6.1": Levels(12, 4, 48, 48), "6.12": Levels(12, 5, 52, 48), "7.x": Levels(12, 5, 52, 48)}
ALL = sorted(BUILDS)
UNKNOWN = -1

Seen = tuple[Any, ...]


class User:
    """An mm over tables of its own, and callbacks that say what they saw, addresses from V on."""

    def __init__(self, name: str) -> None:
        self.memory = PhysicalMemory(RAM)
        fmt = Format(Granule.K4)
        self.tables = TableBuilder(self.memory, (RAM[0], RAM[1] // 2), fmt=fmt)
        bits = Bits.of(fmt, by_name(name))
        pages = iter(range(RAM[0] + RAM[1] // 2, sum(RAM), PAGE))
        self.kernel = Kernel(self.memory, 0, BUILDS[name], bits, allocate=lambda: next(pages, None), step_limit=2000)
        self.kernel.table_flags = fmt.table(2).pack(PXNTable=1)
        self.mm = Mm(self.tables.root, Rwsem(1))
        self.seen: list[Seen] = []
        self.returns: dict[str, int] = {}

    def vma(self, start: int, end: int, **more: Any) -> Vma:
        vma = Vma(self.mm, V + start, V + end, **more)
        self.mm.vmas.append(vma)
        return vma

    def word(self, offset: int, level: int, word: int) -> int:
        return self.tables.place(V + offset, level, word).pa

    def ops(self, *names: str, **more: Any) -> MmWalkOps:
        made: dict[str, Any] = {name: self._callback(name) for name in names}
        return MmWalkOps(**made, **more)

    def _callback(self, name: str) -> Callable[..., int]:
        def callback(*args: Any) -> int:
            numbers = [each for each in args if not isinstance(each, MmWalk)]
            numbers = numbers[{"hugetlb_entry": 2}.get(name, int(name.endswith("_entry"))) :]
            self.seen.append((name, *(each - V if each > PAGE else each for each in numbers)))
            return self.returns.get(name, 0)

        return callback

    def range(self, start: int, end: int, ops: MmWalkOps) -> int:
        return walkers.walk_page_range(self.kernel, self.mm, V + start, V + end, ops)

    def called(self) -> list[str]:
        return [event.name for event in self.kernel.events if isinstance(event, Called)]


@pytest.mark.parametrize("name", ALL)
def test_gaps_and_vmas_in_turn(name: str) -> None:
    u = User(name)
    u.word(PAGE, 3, USER)
    u.vma(PAGE, 2 * PAGE)
    u.vma(3 * PAGE, 5 * PAGE)
    assert u.range(0, 4 * PAGE, u.ops("pte_entry", "pte_hole", "pre_vma", "post_vma")) == 0
    assert u.seen == [
        ("pte_hole", 0, PAGE, UNKNOWN),
        ("pre_vma", PAGE, 2 * PAGE),
        ("pte_entry", PAGE, 2 * PAGE),
        ("post_vma",),
        ("pte_hole", 2 * PAGE, 3 * PAGE, UNKNOWN),
        ("pre_vma", 3 * PAGE, 4 * PAGE),
        ("pte_entry", 3 * PAGE, 4 * PAGE),
        ("post_vma",),
    ]


@pytest.mark.parametrize("name", ALL)
def test_a_positive_test_walk_skips_one_vma_of_a_range_but_all_of_a_mapping(name: str) -> None:
    u = User(name)
    vmas = [u.vma(0, PAGE, pgoff=0), u.vma(PAGE, 2 * PAGE, pgoff=1)]
    u.returns["test_walk"] = 1
    ops = u.ops("test_walk", "pte_entry")
    assert u.range(0, 2 * PAGE, ops) == 0
    assert u.seen == [("test_walk", 0, PAGE), ("test_walk", PAGE, 2 * PAGE)]
    u.seen.clear()
    assert walkers.walk_page_mapping(u.kernel, vmas, 0, 2, ops) == 0
    assert u.seen == [("test_walk", 0, PAGE)]
    u.returns["test_walk"] = -7
    assert u.range(0, 2 * PAGE, ops) == walkers.walk_page_mapping(u.kernel, vmas, 0, 2, ops) == -7


def test_a_mapping_tests_the_whole_vma_and_walks_a_part() -> None:
    u = User("7.x")
    u.word(0, 3, USER)
    vma = u.vma(0, 8 * PAGE, pgoff=4)
    assert walkers.walk_page_mapping(u.kernel, [vma], 6, 2, u.ops("test_walk", "pte_entry")) == 0
    assert u.seen == [
        ("test_walk", 0, 8 * PAGE),
        ("pte_entry", 2 * PAGE, 3 * PAGE),
        ("pte_entry", 3 * PAGE, 4 * PAGE),
    ]


@pytest.mark.parametrize("name", ALL)
def test_a_pfnmap_vma_is_one_hole_unless_test_walk_decides(name: str) -> None:
    u = User(name)
    u.vma(0, PMD, pfnmap=True)
    assert u.range(0, 2 * PAGE, u.ops("pte_entry", "pte_hole")) == 0
    assert u.seen == [("pte_hole", 0, 2 * PAGE, UNKNOWN)]
    u.returns["pte_hole"] = 5
    assert u.range(0, 2 * PAGE, u.ops("pte_entry", "pte_hole")) == 0  # positive: the vma is skipped
    u.seen.clear()
    u.word(0, 3, USER)
    assert u.range(0, PAGE, u.ops("test_walk", "pte_entry")) == 0
    assert u.seen == [("test_walk", 0, PAGE), ("pte_entry", 0, PAGE)]


@pytest.mark.parametrize("name", ALL)
def test_post_vma_follows_an_error_but_no_refusal_of_pre_vma(name: str) -> None:
    u = User(name)
    u.word(0, 3, USER)
    u.vma(0, PAGE)
    ops = u.ops("pte_entry", "pre_vma", "post_vma")
    u.returns = {"pte_entry": -5}
    assert u.range(0, PAGE, ops) == -5
    assert [event[0] for event in u.seen] == ["pre_vma", "pte_entry", "post_vma"]
    u.returns = {"pre_vma": 3}
    u.seen.clear()
    assert u.range(0, PAGE, ops) == 3
    assert u.seen == [("pre_vma", 0, PAGE)]


@pytest.mark.parametrize("name", ALL)
def test_only_6_1_tests_in_walk_page_vma(name: str) -> None:
    u = User(name)
    u.word(0, 3, USER)
    vma = u.vma(0, PAGE)
    u.returns["test_walk"] = 1
    assert walkers.walk_page_vma(u.kernel, vma, u.ops("test_walk", "pte_entry")) == 0
    assert u.seen == ([("test_walk", 0, PAGE)] if name == "6.1" else [("pte_entry", 0, PAGE)])


@pytest.mark.parametrize("name", ALL)
def test_a_huge_pmd_is_split_and_a_huge_pud_never(name: str) -> None:
    u = User(name)
    pmd = u.word(0, 2, BLOCK)
    vma = u.vma(0, PAGE)

    def split(entry: int, addr: int) -> int:
        assert (entry, addr) == (pmd, V)
        u.memory.store(entry, 0)
        return 0

    u.kernel.outside["__split_huge_pmd"] = split
    assert walkers.walk_page_vma(u.kernel, vma, u.ops("pte_entry", "pte_hole")) == 0
    assert u.called() == ["__split_huge_pmd"]
    # In 6.12 the action that sent the pmd loop back outlives the hole: the pud loop goes again too.
    assert u.seen == [("pte_hole", 0, PAGE, 3)] * (2 if name == "6.12" else 1)
    u = User(name)
    u.word(0, 1, BLOCK)
    with pytest.raises(LookupError if name == "6.1" else Runaway):  # 6.1 takes the block for a table
        walkers.walk_page_vma(u.kernel, u.vma(0, PAGE), u.ops("pte_entry"))
    assert u.called() == []


@pytest.mark.parametrize(("name", "cleared"), [("6.12", True), ("7.x", False)])
def test_a_pmd_that_is_neither_present_nor_migrating(name: str, cleared: bool) -> None:
    u = User(name)
    pmd = u.word(0, 2, 0x100)
    assert not huge.pte_offset_map(u.kernel, pmd)
    assert u.kernel.events == ([Write(pmd, 0)] if cleared else [])
    u.kernel.events.clear()
    for kind in (28, 29, 30):
        u.memory.store(pmd, kind << 6)
        assert not huge.pte_offset_map(u.kernel, pmd)
    assert u.kernel.events == []


@pytest.mark.parametrize("name", ALL)
def test_hugetlb_passes_the_address_on_as_it_is(name: str) -> None:
    u = User(name)
    u.word(PMD, 2, BLOCK)
    vma = u.vma(0, 3 * PMD, huge_size=PMD)
    ops = u.ops("hugetlb_entry", "pte_hole", "pte_entry", "post_vma")
    assert walkers.walk_page_range_vma(u.kernel, vma, V + PAGE, V + PMD + 5, ops) == 0
    # An empty entry of this size is an entry too: only one above it that is empty makes a hole.
    assert u.seen == [("hugetlb_entry", PAGE, PMD), ("hugetlb_entry", PMD, PMD + 5), ("post_vma",)]
    u.seen.clear()
    vma.start, vma.end = V + PUD, V + PUD + PMD
    assert walkers.walk_page_vma(u.kernel, vma, ops) == 0
    assert u.seen == [("pte_hole", PUD, PUD + PMD, UNKNOWN), ("post_vma",)]
    u.seen.clear()
    assert walkers.walk_page_vma(u.kernel, vma, u.ops("pte_entry", "pte_hole", "pre_vma")) == 0
    assert u.seen == [("pre_vma", PUD, PUD + PMD)]


def test_huge_pte_offset_finds_each_size_where_it_is() -> None:
    u = User("7.x")
    pud, pmd = u.word(PUD, 1, BLOCK), u.word(0, 2, BLOCK)
    last = u.word(PMD + 15 * PAGE, 3, USER)
    runs = u.kernel.levels.contiguous

    def found(offset: int, size: int) -> int | None:
        return huge.huge_pte_offset(u.kernel, u.mm, V + offset, size)

    assert found(PUD, PUD) == pud
    assert found(0, PMD) == pmd
    assert found(0, runs["PMD"]) == pmd
    assert found(PMD, runs["PTE"]) == last - 15 * 8
    assert found(PMD, PUD) is None  # a table where a PUD was wanted
    assert found(2 * PUD, PMD) is None


# install_pte


def installer(u: User, word: int, error: int = 0) -> Callable[[int, int, MmWalk], tuple[int, int]]:
    def install(addr: int, next: int, walk: MmWalk) -> tuple[int, int]:
        u.seen.append(("install_pte", addr - V, next - V))
        return error, word

    return install


def test_install_pte_makes_the_tables_that_are_missing() -> None:
    u = User("7.x")
    u.vma(0, 2 * PAGE)
    ops = u.ops("pte_entry", "pte_hole", install_pte=installer(u, 0x123 << 6))
    assert walkers.walk_page_range_mm_unsafe(u.kernel, u.mm, V, V + PAGE, ops) == 0
    assert u.seen == [("install_pte", 0, PAGE)]
    stores = [event for event in u.kernel.events if isinstance(event, Write)]
    assert [event.value & 3 for event in stores] == [3, 3, 3, 0]
    assert u.range(0, PAGE, ops) == -EINVAL
    assert walkers.walk_page_range_mm_unsafe(u.kernel, u.mm, V, V + 2 * PAGE, ops) == 0
    assert u.seen[1:] == [("pte_entry", 0, PAGE), ("install_pte", PAGE, 2 * PAGE)]


def test_install_pte_without_memory_and_over_a_huge_pmd() -> None:
    u = User("7.x")
    u.kernel.allocate = lambda: None
    u.vma(0, PAGE)
    ops = u.ops(install_pte=installer(u, USER))
    assert walkers.walk_page_range_mm_unsafe(u.kernel, u.mm, V, V + PAGE, ops) == -ENOMEM
    u.word(0, 2, BLOCK)
    assert walkers.walk_page_range_mm_unsafe(u.kernel, u.mm, V, V + PAGE, ops) == 0
    assert u.seen == []
    assert u.called() == []


def test_an_installed_pte_may_need_its_cache_cleaned_or_complete_a_run() -> None:
    u = User("7.x")
    u.kernel.bits = replace(u.kernel.bits, variant=replace(u.kernel.variant, contpte=True))
    contiguous = u.kernel.bits.CONT
    pte = u.word(15 * PAGE, 3, 0)
    huge.set_pte_at(u.kernel, V + 15 * PAGE, pte, USER | 0x6000_F000 | contiguous | u.kernel.bits.UXN)
    assert u.kernel.events[0] == Write(pte, USER | 0x6000_F000 | u.kernel.bits.UXN)
    assert u.called() == ["__contpte_try_fold"]
    huge.set_pte_at(u.kernel, V + 14 * PAGE, pte - 8, USER & ~u.kernel.bits.UXN)
    assert u.called() == ["__contpte_try_fold", "__sync_icache_dcache"]


# locks


@pytest.mark.parametrize("name", ["6.12", "7.x"])
def test_a_wrlock_walk_takes_the_lock_of_each_vma_once(name: str) -> None:
    u = User(name)
    u.vma(0, PAGE)
    for _ in range(2):
        assert u.range(0, PAGE, u.ops("pte_entry", walk_lock=1)) == 0
    assert u.called() == ["__vma_start_write"]
    u.mm.mmap_lock.count = 0x100
    assert u.range(0, PAGE, u.ops("pte_entry", walk_lock=1)) == 0
    warned = [event.function for event in u.kernel.events if isinstance(event, Warn)]
    inner = "walk_page_range_mm_unsafe" if name == "7.x" else "walk_page_range"
    assert warned == [inner, inner]


# folio_walk_start


def found(u: User, offset: int, flags: int = 0, **more: Any) -> tuple[int | None, FolioWalk]:
    fw = FolioWalk()
    return folio_walk_start(u.kernel, fw, u.mm.vmas[0], V + offset, flags, **more), fw


@pytest.mark.parametrize("name", ["6.12", "7.x"])
def test_the_page_behind_each_level(name: str) -> None:
    u = User(name)
    u.vma(0, 2 * PUD)
    normal = {f"vm_normal_page{each}": lambda addr, value: 0x7000_0000 for each in ("", "_pmd", "_pud")}
    u.kernel.outside.update(normal)
    pte, pmd = u.word(0, 3, USER), u.word(PMD, 2, BLOCK)
    pud = u.word(PUD, 1, BLOCK | 1 << 30)
    assert found(u, 5) == (0x7000_0000, FolioWalk(0x7000_0000, Level.PTE, pte, USER, pte & -PAGE))
    assert found(u, PMD + 3 * PAGE)[1] == FolioWalk(0x7000_3000, Level.PMD, pmd, BLOCK, pmd & -PAGE)
    folio, fw = found(u, PUD + PAGE)
    assert (fw.level, fw.entry, fw.lock) == (Level.PUD, pud, None)
    assert folio == (0x7000_0000 if name == "7.x" else 1 << 30)  # 6.12 does not ask what kind of page it is
    assert fw.page == (folio or 0) + PAGE
    assert found(u, PAGE)[0] is None
    assert u.kernel.events[-1] != Warn("folio_walk_start")
    assert found(u, 2 * PUD)[0] is None
    assert u.kernel.events[-1] == Warn("folio_walk_start")


def test_pages_of_zeros_and_migration_entries_are_found_when_asked_for() -> None:
    u = User("6.12")
    u.vma(0, PUD)
    u.kernel.settings.zero_page, u.kernel.settings.huge_zero_page = 0x7000_0000, 0x7020_0000
    u.word(0, 3, USER | 0x7000_0000)
    u.word(PAGE, 3, 0x7000_3000 | 30 << 6)
    u.word(PMD, 2, BLOCK | 0x7020_0000)
    assert [found(u, PAGE, flags)[0] for flags in range(4)] == [None, 0x7000_3000, None, 0x7000_3000]
    assert [found(u, 0, flags)[0] for flags in range(4)] == [None, None, 0x7000_0000, 0x7000_0000]
    assert [found(u, PMD + PAGE, flags)[0] for flags in range(4)] == [None, None, 0x7020_0000, 0x7020_0000]
    assert found(u, 0, 2)[1].page is None
    with pytest.raises(Bug):
        found(u, PAGE, 1, is_locked=lambda page: False)


def test_again_from_a_callback_of_a_vma() -> None:
    u = User("7.x")
    u.word(0, 3, USER)
    vma = u.vma(0, PAGE)
    ops = u.ops("pte_entry")
    left = [Action.AGAIN, Action.SUBTREE]

    def pmd_entry(pmd: int, addr: int, next: int, walk: MmWalk) -> int:
        u.seen.append(("pmd_entry",))
        walk.action = left.pop(0)
        return 0

    ops.pmd_entry = pmd_entry
    assert walkers.walk_page_vma(u.kernel, vma, ops) == 0
    assert [event[0] for event in u.seen] == ["pmd_entry", "pmd_entry", "pte_entry"]
