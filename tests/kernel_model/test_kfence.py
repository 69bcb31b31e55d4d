"""The model of KFENCE by itself: the layout of the pool, and decisions that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kernel_model import kfence
from kernel_model.kfence import (
    NUM_OBJECTS,
    ErrorType,
    Fault,
    Kfence,
    Metadata,
    ObjectState,
    Panic,
    addr_to_metadata,
    arch_kfence_init_pool,
    arm64_kfence_can_set_direct_map,
    is_kfence_address,
    kfence_guarded_free,
    kfence_handle_page_fault,
    kfence_init_pool,
    kfence_pool_size,
    kfence_protect,
    kfence_unprotect,
    metadata_to_pageaddr,
)
from kernel_model.levels import Levels
from kernel_model.mm import Bug, Called, Kernel, Settings, Tlbi, Warn
from kernel_model.names import Bits
from kernel_model.variants import by_name
from pgtable import Format, Granule, PhysicalMemory
from pgtable.build import TableBuilder

POOL = 0xFFFF_0000_0800_0000
PAGE = 4096
OBJECTS = 5  # a small pool: 12 pages
PA = 0x6000_0000
ALLOCATED, FREED = ObjectState.ALLOCATED, ObjectState.FREED
VALID = 0x00E8_0000_6000_0707  # a page of the linear map
ROWS = ("6.12", "7.x")


def made(row: str = "6.12") -> Kfence:
    """A pool of five objects, all pages accessible, all objects unused."""
    memory = PhysicalMemory((0x4000_0000, 1 << 20))
    tables = TableBuilder(memory, (0x4000_0000, 1 << 20), fmt=Format(Granule.K4), va_bits=48, upper=True)
    size = kfence_pool_size(OBJECTS, PAGE)
    tables.map(POOL, PA, size, level=3, template=VALID & ~0xFFFF_FFFF_F000)
    kernel = Kernel(memory, tables.root, Levels(12, 5, 52, 48), Bits.of(Format(Granule.K4), by_name(row)))
    kernel.settings = Settings(kfence_pool=(POOL, size))
    objects = [Metadata(addr=page(2 * i + 2)) for i in range(OBJECTS)]
    return Kfence(kernel, OBJECTS, objects)


def page(n: int) -> int:
    return POOL + n * PAGE


def ptes(pool: Kfence) -> list[int]:
    """The PTEs of the pool, without their addresses."""
    memory = pool.kernel.memory
    words = memory.words(0x4000_0000, 5 * 512)
    leaves = [int(w) for w in words if int(w) & 0xFFFF_FFFF_F000 >= PA and int(w) & 0xFFFF_FFFF_F000 < PA + 12 * PAGE]
    return [w & ~0xFFFF_FFFF_F000 for w in sorted(leaves, key=lambda w: w & 0xFFFF_FFFF_F000)]


def report(pool: Kfence) -> tuple[int, ...]:
    """What the one report of `pool` was about: address, write, object, error."""
    (called,) = (e for e in pool.kernel.events if isinstance(e, Called))
    assert called.name == "kfence_report_error"
    return called.args


# the layout


def test_the_pool_has_two_pages_more_than_its_objects_need() -> None:
    assert kfence_pool_size(NUM_OBJECTS, 4096) == 2 << 20
    assert kfence_pool_size(NUM_OBJECTS, 16384) == 8 << 20
    assert kfence_pool_size(OBJECTS, PAGE) == 12 * PAGE


def test_each_page_has_the_metadata_of_its_object() -> None:
    pool = made()
    owners = [None, None, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [addr_to_metadata(pool, page(i)) for i in range(12)] == owners
    assert [addr_to_metadata(pool, page(i) + PAGE - 1) for i in range(12)] == owners
    assert addr_to_metadata(pool, POOL - 1) is addr_to_metadata(pool, page(12)) is None
    assert [metadata_to_pageaddr(pool, i) for i in range(OBJECTS)] == [page(2 * i + 2) for i in range(OBJECTS)]
    assert pool.kernel.events == []


@pytest.mark.parametrize("wrong", [-1, OBJECTS])
def test_metadata_that_does_not_exist_turns_kfence_off(wrong: int) -> None:
    pool = made()
    assert metadata_to_pageaddr(pool, wrong) == 0
    assert pool.kernel.events == [Warn("metadata_to_pageaddr")]
    assert (pool.enabled, pool.disabled_by_warn) == (False, True)


def test_metadata_with_a_wrong_address_turns_kfence_off() -> None:
    pool = made()
    pool.objects[2].addr += PAGE - 1
    assert metadata_to_pageaddr(pool, 2) == page(6)
    pool.objects[2].addr += 1
    assert metadata_to_pageaddr(pool, 2) == 0
    assert not pool.enabled


def test_the_pool_begins_and_ends_where_it_says() -> None:
    pool = made()
    inside = [is_kfence_address(pool.kernel, a) for a in (POOL - 1, POOL, page(12) - 1, page(12), 0, (1 << 64) - 1)]
    assert inside == [False, True, True, False, False, False]
    pool.kernel.settings.kfence_pool = None
    assert not is_kfence_address(pool.kernel, POOL)
    assert not is_kfence_address(pool.kernel, 0)
    assert addr_to_metadata(pool, page(2)) is None


# protection


@pytest.mark.parametrize(("row", "invalid"), [("6.12", 0x00E8_0000_0000_0706), ("7.x", 0x00E8_0000_0000_0F06)])
def test_a_protected_page_is_not_valid_and_comes_back_as_it_was(row: str, invalid: int) -> None:
    pool, valid = made(row), VALID & ~0xFFFF_FFFF_F000
    assert kfence_protect(pool, page(3) + 0x123)
    assert ptes(pool) == [valid] * 3 + [invalid] + [valid] * 8
    assert [e for e in pool.kernel.events if isinstance(e, Tlbi)] == [Tlbi("VAALE1IS", page(3) >> 12 & (1 << 44) - 1)]
    assert kfence_unprotect(pool, page(3) + PAGE - 1)
    assert ptes(pool) == [valid] * 12


def test_nobody_hears_that_a_page_could_not_be_protected() -> None:
    pool = made("7.x")
    pool.kernel.memory.store(pool.kernel.pgd, 0)
    index = POOL >> 39 & 511
    pool.kernel.memory.store(pool.kernel.pgd + 8 * index, 0)  # a hole where the pool was
    assert kfence_protect(pool, page(3))


@pytest.mark.parametrize("row", ROWS)
def test_guards_are_protected_from_left_to_right(row: str) -> None:
    pool = made(row)
    assert kfence_init_pool(pool, lambda limit: limit - 1) == 0
    flushed = [e.operand & 0xFFFF for e in pool.kernel.events if isinstance(e, Tlbi)]
    first = POOL >> 12 & 0xFFFF
    assert [operand - first for operand in flushed] == [0, 1, 3, 5, 7, 9, 11]
    protected = [i for i, pte in enumerate(ptes(pool)) if not pte & 1]
    assert protected == [0, 1, 3, 5, 7, 9, 11]
    assert [meta.addr for meta in pool.objects] == [page(i) for i in (2, 4, 6, 8, 10)]
    assert {meta.state for meta in pool.objects} == {ObjectState.UNUSED}


def test_the_free_list_is_shuffled_from_its_end() -> None:
    pool = made()
    assert kfence_init_pool(pool, lambda limit: limit - 1) == 0
    assert pool.freelist == [0, 1, 2, 3, 4]  # everything stays where it is
    limits: list[int] = []
    assert kfence_init_pool(pool, lambda limit: limits.append(limit) or 0) == 0  # type: ignore[func-returns-value]
    assert limits == [5, 4, 3, 2, 1]
    assert pool.freelist == [1, 2, 3, 4, 0]


@pytest.mark.parametrize("early", [False, True])
def test_the_direct_map_can_be_changed_as_long_as_the_pool_was_not_made_at_boot(early: bool) -> None:
    pool = made()
    pool.kernel.settings.kfence_early = early
    assert arm64_kfence_can_set_direct_map(pool.kernel) is not early


def test_only_a_late_pool_on_a_cpu_with_bbml_is_split() -> None:
    pool = made("7.x")
    pool.kernel.settings = replace(pool.kernel.settings, supports_bbml=True)
    assert arch_kfence_init_pool(pool)
    assert [str(e) for e in pool.kernel.events] == ["mutex_lock()", "mutex_unlock()"]
    split = pool.kernel.settings
    others = (
        replace(split, supports_bbml=False),
        replace(split, kfence_early=True),
        replace(split, debug_pagealloc=True),
    )
    for settings in others:
        pool.kernel.events.clear()
        pool.kernel.settings = settings
        assert arch_kfence_init_pool(pool)
        assert pool.kernel.events == []


# faults: the object and its guards


def allocated(pool: Kfence, index: int, *, left: bool, size: int = 32) -> None:
    """An object at the left or the right end of its page."""
    start = page(2 * index + 2)
    pool.objects[index] = Metadata(ALLOCATED, start if left else start + PAGE - size, size)


@pytest.mark.parametrize("row", ROWS)
def test_behind_an_object_at_the_right_end_is_its_own(row: str) -> None:
    pool = made(row)
    allocated(pool, 1, left=False)
    allocated(pool, 2, left=False)
    assert kfence_handle_page_fault(pool, page(5), is_write=True)
    assert report(pool) == (page(5), 1, 1, ErrorType.OOB)
    assert (pool.objects[1].unprotected_page, pool.objects[2].unprotected_page) == (page(5), 0)
    assert pool.counters["BUGS"] == 1


def test_before_an_object_at_the_left_end_is_its_own() -> None:
    pool = made()
    allocated(pool, 1, left=True)
    allocated(pool, 2, left=True)
    addr = page(6) - 1
    assert kfence_handle_page_fault(pool, addr, is_write=False)
    assert report(pool) == (addr, 0, 2, ErrorType.OOB)
    assert pool.objects[2].unprotected_page == addr


@pytest.mark.parametrize(("offset", "index"), [(2047, 1), (2048, 1), (2049, 2)])
def test_the_nearer_of_two_is_blamed_and_the_left_one_of_two_as_near(offset: int, index: int) -> None:
    pool = made()
    allocated(pool, 1, left=False)
    allocated(pool, 2, left=True)
    kfence_handle_page_fault(pool, page(5) + offset, is_write=False)
    assert report(pool)[2:] == (index, ErrorType.OOB)


def test_an_object_that_reaches_into_its_guard_counts_as_far_away() -> None:
    pool = made()
    pool.objects[1] = Metadata(ALLOCATED, page(4), PAGE + 64)
    allocated(pool, 2, left=False)
    kfence_handle_page_fault(pool, page(5), is_write=False)
    assert report(pool)[2] == 2


def test_an_object_between_kfree_and_the_grace_period_is_still_one() -> None:
    pool = made()
    allocated(pool, 1, left=False)
    pool.objects[1].state = ObjectState.RCU_FREEING
    kfence_handle_page_fault(pool, page(5), is_write=False)
    assert report(pool)[2:] == (1, ErrorType.OOB)


def test_a_guard_between_free_objects_is_nobodys() -> None:
    pool = made()
    pool.objects[1].state = FREED
    kfence_handle_page_fault(pool, page(5), is_write=False)
    assert report(pool)[2:] == (-1, ErrorType.INVALID)
    assert {meta.unprotected_page for meta in pool.objects} == {0}


def test_the_first_guard_has_a_right_neighbour_only_and_the_last_a_left_one() -> None:
    pool = made()
    for i in (0, OBJECTS - 1):
        allocated(pool, i, left=True)
    kfence_handle_page_fault(pool, page(1), is_write=False)
    assert report(pool)[2:] == (0, ErrorType.OOB)
    pool.kernel.events.clear()
    kfence_handle_page_fault(pool, page(11) + PAGE - 1, is_write=False)
    assert report(pool)[2:] == (OBJECTS - 1, ErrorType.OOB)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("state", ObjectState)
def test_a_fault_on_an_objects_page_is_use_after_free_whatever_its_state(row: str, state: ObjectState) -> None:
    pool = made(row)
    pool.objects[1] = Metadata(state, page(4), 32, unprotected_page=page(5) + 8)
    kfence_handle_page_fault(pool, page(4) + 1, is_write=False)
    assert report(pool)[2:] == (1, ErrorType.UAF)
    assert pool.objects[1].unprotected_page == (0 if row == "7.x" else page(5) + 8)


def test_the_first_page_has_no_metadata() -> None:
    pool = made()
    allocated(pool, 0, left=True)
    kfence_handle_page_fault(pool, POOL + 10, is_write=False)  # kfence_test.c, test_invalid_access
    assert report(pool)[2:] == (-1, ErrorType.INVALID)


# what comes after


@pytest.mark.parametrize("row", ROWS)
def test_after_a_report_the_page_is_accessible(row: str) -> None:
    pool = made(row)
    kfence_init_pool(pool, lambda limit: limit - 1)
    assert not ptes(pool)[5] & 1
    assert kfence_handle_page_fault(pool, page(5), is_write=False)
    assert ptes(pool)[5] & 1
    assert kfence_handle_page_fault(pool, page(5), is_write=False)  # once more: nothing is remembered
    assert pool.counters["BUGS"] == 2


def test_outside_the_pool_it_is_not_kfences_fault() -> None:
    pool = made()
    for addr in (POOL - 1, page(12), 0):
        assert not kfence_handle_page_fault(pool, addr, is_write=False)
    assert (pool.kernel.events, pool.counters) == ([], {})


def test_once_disabled_pages_are_opened_in_silence() -> None:
    pool = made()
    kfence_protect(pool, page(5))
    pool.enabled = False
    pool.kernel.events.clear()
    assert kfence_handle_page_fault(pool, page(5), is_write=False)
    assert ptes(pool)[5] & 1
    assert not any(isinstance(e, Called) for e in pool.kernel.events)
    assert pool.counters["BUGS"] == 0


def test_only_7_x_may_end_the_kernel_and_the_page_stays_closed_then() -> None:
    for fault, error in ((Fault.OOPS, Bug), (Fault.PANIC, Panic)):
        pool = made("7.x")
        kfence_protect(pool, page(5))
        pool.fault = fault
        with pytest.raises(error):
            kfence_handle_page_fault(pool, page(5), is_write=False)
        assert not ptes(pool)[5] & 1
        assert pool.enabled is (fault is Fault.OOPS)
        pool = made("6.12")
        pool.fault = fault
        assert kfence_handle_page_fault(pool, page(5), is_write=False)


# freeing


@pytest.mark.parametrize("row", ROWS)
def test_a_guard_that_was_opened_is_emptied_and_closed_when_the_object_is_freed(row: str) -> None:
    pool = made(row)
    kfence_init_pool(pool, lambda limit: limit - 1)
    allocated(pool, 1, left=False)
    kfence_handle_page_fault(pool, page(5) + 9, is_write=True)
    assert ptes(pool)[5] & 1
    pool.kernel.events.clear()
    kfence_guarded_free(pool, pool.objects[1].addr, 1, zombie=False)
    assert not ptes(pool)[5] & 1
    assert not ptes(pool)[4] & 1
    assert pool.objects[1].unprotected_page == 0
    assert pool.objects[1].state is FREED
    assert next(e for e in pool.kernel.events if isinstance(e, Called)).args == (page(5), PAGE)
    assert pool.freelist[-1] == 1


def test_a_zombie_is_closed_and_not_used_again() -> None:
    pool = made()
    allocated(pool, 1, left=True)
    kfence_guarded_free(pool, page(4), 1, zombie=True)
    assert not ptes(pool)[4] & 1
    assert (pool.freelist, pool.counters) == ([], {"ZOMBIES": 1})


@pytest.mark.parametrize(("state", "offset"), [(FREED, 0), (ObjectState.UNUSED, 0), (ALLOCATED, 1)])
def test_freeing_what_is_not_an_object_changes_nothing(state: ObjectState, offset: int) -> None:
    pool = made()
    pool.objects[1] = Metadata(state, page(4), 32, unprotected_page=page(5))
    before = ptes(pool)
    kfence_guarded_free(pool, page(4) + offset, 1, zombie=False)
    assert report(pool) == (page(4) + offset, 0, 1, ErrorType.INVALID_FREE)
    assert ptes(pool) == before
    assert pool.objects[1] == Metadata(state, page(4), 32, unprotected_page=page(5))
    assert pool.counters == {"BUGS": 1}


def test_the_names_of_other_files_are_here_too() -> None:
    assert set(kfence.__all__) == {"arm64_kfence_can_set_direct_map", "is_kfence_address"}
