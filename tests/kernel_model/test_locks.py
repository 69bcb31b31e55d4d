"""The lock rules: every cell that the thread of June 2025 is about, as it was agreed, posted or merged."""

from __future__ import annotations

import pytest

from kernel_model import walkers
from kernel_model.levels import Levels
from kernel_model.locks import Check, Config, Need
from kernel_model.locktable import BUG, EINVAL, OWNER, PROCEEDS, UNSAFE, WARNS, cells, freed_by, lock_names
from kernel_model.mm import Kernel, Mm, Rwsem, Vma, Warn
from kernel_model.names import Bits
from kernel_model.pagewalk import MmWalk, MmWalkOps, walk_page_test
from kernel_model.thread import MAIL_REVIEW_ASSERT, THREAD, with_range_check
from kernel_model.variants import VARIANTS, Variant, by_name
from pgtable.descriptors import Format
from pgtable.memory import PhysicalMemory

PAGE = 4096
NOLOCK = 3


def table(variant: Variant, config: Config = Config.SHIPPED) -> dict[tuple[str, str, str, str], str]:
    return {(c.entry, c.walk_lock, c.mm, c.held): c.outcome for c in cells(variant, config)}


def row(name: str, entry: str, lock: str, mm: str, config: Config = Config.SHIPPED) -> list[str]:
    found = table(by_name(name), config)
    return [outcome for (e, w, m, _), outcome in found.items() if (e, w, m) == (entry, lock, mm)]


NOVMA = "walk_page_range_novma"
KERNEL = "walk_kernel_page_table_range"


@pytest.mark.parametrize(
    ("name", "lock", "mm", "outcomes"),
    [  # held: nothing, read, write
        ("mail-base", "any", "init_mm", [WARNS, PROCEEDS, PROCEEDS]),
        ("mail-base", "any", "user", [WARNS, WARNS, PROCEEDS]),
        ("mail-v1", "RDLOCK", "init_mm", [WARNS, PROCEEDS, PROCEEDS]),
        ("mail-v1", "RDLOCK", "user", [WARNS, WARNS, PROCEEDS]),
        ("mail-v1", "NOLOCK", "init_mm", [OWNER, PROCEEDS, PROCEEDS]),
        ("mail-v1", "NOLOCK", "user", [UNSAFE, UNSAFE, PROCEEDS]),
        ("mail-review/assert", "RDLOCK", "init_mm", [WARNS, PROCEEDS, PROCEEDS]),
        ("mail-review/assert", "NOLOCK", "init_mm", [OWNER, PROCEEDS, PROCEEDS]),
        ("mail-review/assert", "NOLOCK", "user", [WARNS, WARNS, PROCEEDS]),
        ("mail-review/refuse", "RDLOCK", "user", [WARNS, WARNS, PROCEEDS]),
        ("mail-review/refuse", "NOLOCK", "init_mm", [OWNER, PROCEEDS, PROCEEDS]),
        ("mail-review/refuse", "NOLOCK", "user", [EINVAL, EINVAL, EINVAL]),
    ],
)
def test_the_novma_walk_of_the_thread(name: str, lock: str, mm: str, outcomes: list[str]) -> None:
    assert row(name, NOVMA, lock, mm) == outcomes


@pytest.mark.parametrize("entry", ["walk_page_range", "walk_page_range_vma", "walk_page_vma"])
@pytest.mark.parametrize(
    ("name", "outcomes"),
    [  # held: nothing, mm read, mm write, vma read, vma write and mm write
        ("mail-v1", [WARNS, WARNS, PROCEEDS, WARNS, PROCEEDS]),  # the else branch of process_mm_walk_lock
        ("mail-review/assert", [EINVAL] * 5),
        ("mail-review/refuse", [EINVAL] * 5),
        ("v2", [EINVAL] * 5),
    ],
)
def test_nolock_on_walks_of_vmas(name: str, entry: str, outcomes: list[str]) -> None:
    assert row(name, entry, "NOLOCK", "user") == outcomes


@pytest.mark.parametrize(
    ("name", "outcomes"),
    [("mail-v1", [UNSAFE, PROCEEDS]), ("mail-review/assert", [EINVAL] * 2), ("v2", [UNSAFE, PROCEEDS])],
)
def test_nolock_on_walk_page_mapping(name: str, outcomes: list[str]) -> None:
    assert row(name, "walk_page_mapping", "NOLOCK", "user") == outcomes


def test_kernel_walks_of_v2_and_of_what_was_merged() -> None:
    assert row("v2", KERNEL, "NOLOCK", "init_mm") == [OWNER, PROCEEDS, PROCEEDS]
    assert row("v2", KERNEL, "RDLOCK", "init_mm") == [WARNS, PROCEEDS, PROCEEDS]
    assert row("v3", KERNEL, "any", "init_mm") == [WARNS, PROCEEDS, PROCEEDS]
    assert row("v3", f"{KERNEL}_lockless", "any", "init_mm") == [OWNER, PROCEEDS, PROCEEDS]
    for name in ("v2", "v3"):  # one lock, and init_mm's walk is the kernel's: a reader is enough for it
        assert row(name, "walk_page_range_debug", "any", "init_mm") == [WARNS, PROCEEDS, PROCEEDS]
        assert row(name, "walk_page_range_debug", "any", "user") == [WARNS, WARNS, PROCEEDS, WARNS, PROCEEDS]


def test_releases() -> None:
    assert row("6.1", NOVMA, "any", "init_mm") == [OWNER, PROCEEDS, PROCEEDS], "its assertion is compiled out"
    assert row("6.1", NOVMA, "any", "init_mm", Config.DEBUG) == [BUG, BUG, PROCEEDS, BUG]
    assert row("6.12", KERNEL, "any", "init_mm") == [WARNS, PROCEEDS, PROCEEDS]
    debug = {
        held: outcome
        for (e, _, m, held), outcome in table(VARIANTS["7.x"]).items()
        if e.endswith("debug") and m == "user"
    }
    assert debug == {
        "nothing": WARNS,
        "mm read": WARNS,
        "mm write": WARNS,
        "init_mm write": WARNS,
        "both write": PROCEEDS,
    }


def test_only_lockdep_knows_whose_lock_it_is() -> None:
    assert row("6.12", KERNEL, "any", "init_mm", Config.DEBUG) == [WARNS, PROCEEDS, PROCEEDS, WARNS]


def test_the_third_value_of_walk_lock() -> None:
    assert lock_names(VARIANTS["7.x"])[3] == "VMA_RDLOCK_VERIFY"
    assert lock_names(VARIANTS["6.12"])[3] == "3 (unknown)"
    assert lock_names(by_name("mail-v1"))[3] == "NOLOCK"
    assert lock_names(VARIANTS["6.1"]) == {0: "-"}


def test_every_cell_of_every_variant_says_something() -> None:
    for variant in (*VARIANTS.values(), *(reading.variant for reading in THREAD.values())):
        for config in Config:
            found = list(cells(variant, config))
            assert {cell.entry for cell in found} == set(variant.locks.entries)
            assert {cell.outcome for cell in found} <= {PROCEEDS, EINVAL, WARNS, BUG, OWNER, UNSAFE}
        assert set(freed_by(variant)) == {"memory hot-unplug", "huge vmap"}


def test_the_readings_say_what_they_are() -> None:
    assert len({reading.sentence for reading in THREAD.values()}) == len(THREAD) == 6


# the pieces of the review


def kernel_of(variant: Variant, config: Config = Config.SHIPPED) -> Kernel:
    memory = PhysicalMemory((0x4000_0000, PAGE))
    kernel = Kernel(memory, 0x4000_0000, Levels(12, 4, 48, 48), Bits.of(Format(), variant), config=config)
    kernel.vmalloc_or_module = (0xFFFF_8000_0000_0000, 0xFFFF_FC00_0000_0000)
    return kernel


@pytest.mark.parametrize(("start", "value"), [(0xFFFF_8000_0000_0000, 0), (0xFFFF_0000_0800_0000, -22)])
def test_the_range_condition_refuses_the_linear_map(start: int, value: int) -> None:
    kernel = kernel_of(with_range_check(MAIL_REVIEW_ASSERT))
    call = (kernel, kernel.init_mm, start, start + PAGE)
    assert walkers.walk_page_range_novma(*call, MmWalkOps(walk_lock=NOLOCK)) == value
    kernel.init_mm.mmap_lock = Rwsem(1)
    assert walkers.walk_page_range_novma(*call, MmWalkOps()) == 0, "without NOLOCK it is not asked"


def test_a_vma_under_nolock_warns_once_for_the_switch_and_once_for_debug_vm() -> None:
    """Nothing reaches a vma with the mode set; if it did, the switch and the DEBUG_VM assertion would both say so."""
    kernel = kernel_of(MAIL_REVIEW_ASSERT, Config.DEBUG)
    user = Mm(kernel.pgd, Rwsem(1))
    vma = Vma(user, 0, PAGE)
    walk = MmWalk(kernel, MmWalkOps(walk_lock=NOLOCK), vma=vma, no_vma=False, mm=user)
    walkers.process_vma_walk_lock(walk, "walk_page_range", vma)
    assert walk_page_test(0, PAGE, walk) == 0
    assert kernel.events == [Warn("walk_page_range"), Warn("walk_vma_nolock")]
    shipped = kernel_of(MAIL_REVIEW_ASSERT)
    walk_page_test(0, PAGE, MmWalk(shipped, walk.ops, vma=vma, no_vma=False, mm=user))
    assert shipped.events == []


def test_checks_are_made_in_the_order_of_the_row() -> None:
    """6.12 refuses an empty range before it asserts, 7.x asserts first (facts: trap 12)."""
    for name, events in (("6.12", []), ("7.x", [Warn(KERNEL)])):
        kernel = kernel_of(VARIANTS[name])
        assert walkers.walk_kernel_page_table_range(kernel, PAGE, PAGE, MmWalkOps()) == -22
        assert kernel.events == events


def test_an_entry_that_a_kernel_has_not_is_no_walk() -> None:
    with pytest.raises(walkers.NotInKernel, match="walk_kernel_page_table_range: not in"):
        walkers.walk_kernel_page_table_range(kernel_of(VARIANTS["6.1"]), 0, PAGE, MmWalkOps())


def test_the_mode_means_nothing_elsewhere() -> None:
    assert not VARIANTS["7.x"].locks.is_nolock(NOLOCK)
    assert Check.NOLOCK_REFUSED not in VARIANTS["7.x"].locks.entries["walk_page_range"]
    assert Need.WARN not in VARIANTS["7.x"].locks.vma_lock.values()
