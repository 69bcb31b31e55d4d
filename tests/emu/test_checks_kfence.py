"""KFENCE's compiled functions against the model, and the model broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from emu.checks import kfence as check
from emu.checks import kfence_cases as cases
from emu.checks.kfence_cases import Pool
from emu.image import SymbolError
from kernel_model import kfence
from kernel_model.kfence import Kfence, ObjectState
from kernel_model.variants import detect
from tests.kernels import kernel_image

NAMES = ("debian:6.12", "debian:7.3")
MORE = ("debian:6.12.95", "debian:7.2-16k")
SEED = 1

EVERY = [*NAMES, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)]


@pytest.mark.kernels
@pytest.mark.parametrize("name", EVERY)
def test_real_kfence_does_what_the_model_predicted(name: str) -> None:
    report = check.run(kernel_image(name), 100, SEED)
    assert (report.differences, report.unreached) == ([], [])
    assert (report.cases, report.events > 1500) == (100 + check.PREPARED, True)
    # What is left are tests that the compiler repeats, of which one side cannot happen.
    assert sum(len(row.unexplained) for row in report.coverage) <= 6


@pytest.mark.kernels
@pytest.mark.full
@pytest.mark.parametrize("name", [*NAMES, *MORE])
@pytest.mark.parametrize("seed", range(2, 6))
def test_real_kfence_does_what_the_model_predicted_many_times(name: str, seed: int) -> None:
    assert check.run(kernel_image(name), 5000, seed).differences == []


@pytest.mark.kernels
def test_few_cases_leave_kinds_unreached_and_a_seed_gives_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    image = kernel_image("debian:6.12")
    monkeypatch.setattr(check, "PREPARED", 0)
    report = check.run(image, 3, SEED)
    assert {"first page", "disabled", "no pool"} <= set(report.unreached)
    assert check.run(image, 3, SEED) == report


@pytest.mark.kernels
def test_a_kernel_without_kfence_is_refused() -> None:
    with pytest.raises((SymbolError, LookupError), match="kfence"):
        check.run(kernel_image("debian:6.1"), 1, SEED)


# cases


def test_every_kind_is_where_it_says() -> None:
    pool, rng = Pool(0xFFFF_0000_0800_0000, 4096, 255), Random(SEED)
    for kind in cases.kinds(fault=True):
        for _ in range(20):
            case = cases.make(kind, rng, pool)
            page, inside = (case.addr - pool.va) // pool.page, 0 <= case.addr - pool.va < pool.size
            if "guard" in kind:
                assert inside
                assert page % 2 == 1
            if "page of" in kind:
                assert inside
                assert page % 2 == 0
                assert page >= 2
            if kind in ("below the pool", "behind the pool"):
                assert not inside
            assert case.placed is (kind != "no pool")
            assert case.enabled is (kind != "disabled")
    assert set(cases.kinds(fault=True)) - set(cases.kinds(fault=False)) == {"oops", "panic"}


def test_objects_lie_on_their_own_page() -> None:
    pool, rng = Pool(0xFFFF_0000_0800_0000, 4096, 255), Random(SEED)
    for _ in range(200):
        index = rng.randrange(255)
        meta = cases.an_object(rng, pool, index, tuple(ObjectState))
        assert pool.object_page(index) <= meta.addr
        assert meta.addr + meta.size <= pool.guard(index)


# the model is wrong

Breaking = Callable[[pytest.MonkeyPatch], None]


def _set(name: str, value: Any) -> Breaking:
    return lambda patch: patch.setattr(f"kernel_model.kfence.{name}", value)


def _flip(column: str) -> Breaking:
    def breaking(patch: pytest.MonkeyPatch) -> None:
        def wrong(*found: Any) -> Any:
            row: Any = detect(*found)
            return replace(row, **{column: not getattr(row, column)})

        patch.setattr("emu.check.detect", wrong)

    return breaking


_FREE = kfence.kfence_guarded_free
_METADATA, _PROTECT, _SHUFFLED = kfence.addr_to_metadata, kfence.kfence_protect, kfence._shuffled


def _next_object(pool: Kfence, addr: int) -> int | None:
    found = _METADATA(pool, addr)
    return found if found is None else min(found + 1, pool.num_objects - 1)


def _unaligned(pool: Kfence, addr: int) -> bool:
    return kfence.kfence_protect_page(pool.kernel, addr, False)


def _nothing_done(pool: Kfence, addr: int) -> bool:
    return True


def _not_compared(pool: Kfence, addr: int, meta: int, *, zombie: bool) -> None:
    _FREE(pool, pool.objects[meta].addr, meta, zombie=zombie)


def _guard_stays_open(pool: Kfence, addr: int, meta: int, *, zombie: bool) -> None:
    pool.objects[meta].unprotected_page = 0
    _FREE(pool, addr, meta, zombie=zombie)


def _zombies_come_back(pool: Kfence, addr: int, meta: int, *, zombie: bool) -> None:
    _FREE(pool, addr, meta, zombie=False)


def _left_to_right(count: int, below: Callable[[int], int]) -> list[int]:
    return list(reversed(_SHUFFLED(count, below)))


def _first_guard_later(pool: Kfence, addr: int) -> bool:
    return _PROTECT(pool, addr + pool.page if addr == pool.pool else addr)


BROKEN: dict[str, tuple[Breaking, str]] = {
    "the distance is signed": (_set("_int_as_unsigned_long", lambda value: max(0, value)), "debian:6.12"),
    "the distance is an int": (_set("_int_as_unsigned_long", lambda value: value & (1 << 64) - 1), "debian:7.3"),
    "freeing counts as allocated": (
        _set("kfence_obj_allocated", lambda meta: meta.state is ObjectState.ALLOCATED),
        "debian:6.12",
    ),
    "which object a page belongs to": (_set("addr_to_metadata", _next_object), "debian:7.3"),
    "use after free clears unprotected_page": (_flip("kfence_fault"), "debian:7.3"),
    "use after free leaves unprotected_page": (_flip("kfence_fault"), "debian:6.12"),
    "the pool is split late": (_flip("kfence_splits_pool"), "debian:7.3"),
    "the page is opened by its first address": (_set("kfence_unprotect", _unaligned), "debian:7.3"),
    "the page is opened": (_set("kfence_unprotect", _nothing_done), "debian:6.12"),
    "a free is of an object's address": (_set("kfence_guarded_free", _not_compared), "debian:6.12"),
    "an opened guard is closed": (_set("kfence_guarded_free", _guard_stays_open), "debian:7.3"),
    "zombies are not used again": (_set("kfence_guarded_free", _zombies_come_back), "debian:7.3"),
    "the free list": (_set("_shuffled", _left_to_right), "debian:6.12"),
    "the order of guards": (_set("kfence_protect", _first_guard_later), "debian:6.12"),
    "bbml decides before rodata": (_set("_force_pte_mapping", lambda kernel: True), "debian:7.3"),
    "the size of the pool": (_set("kfence_pool_size", lambda n, page: (n + 2) * 2 * page), "debian:7.3"),
}


@pytest.mark.kernels
@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_of_the_model_is_seen(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking, name = BROKEN[rule]
    image = kernel_image(name)
    breaking(monkeypatch)
    assert is_seen(check.World(image))


def is_seen(world: check.World) -> bool:
    """Some case finds a difference; no more are run then."""
    for case in world.cases(90, SEED):
        world.judge(case)
        if world.differences:
            return True
    world.init_pool(Random(SEED))
    world.arch_init_pool()
    return world.differences != []
