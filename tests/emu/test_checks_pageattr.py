"""pageattr.c, mem_encrypt.c, the splitting of mmu.c and apply_to_page_range: compiled functions against the model.

Random tables, ranges, settings and contexts; events, values and memory are compared. Then the model is broken on
purpose, and some case must tell.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

from emu.checks import apply as apply_checks
from emu.checks import pageattr as pageattr_checks
from emu.checks.campaign import Worlds
from emu.checks.harness import Harness, differences
from emu.checks.patches import alternatives, capability, static_key
from emu.checks.surroundings import CAPABILITIES, PATCHED, REALM, requires_bbml
from emu.checks.world import World
from kernel_model import apply, pageattr, split, stores
from kernel_model.mm import Kernel
from kernel_model.pagewalk import MmWalk
from tests.kernels import KERNELS, MORE, kernel_image

HARNESSES: dict[str, Any] = {h.function: h for h in (*pageattr_checks.HARNESSES, *apply_checks.HARNESSES)}
ALL = [pytest.param(name, marks=pytest.mark.kernels, id=name) for name in KERNELS]
EVERY = [pytest.param(name, marks=[pytest.mark.kernels, pytest.mark.full], id=name) for name in (*KERNELS, *MORE)]
_WORLDS: dict[str, Worlds] = {}


def worlds(name: str) -> Worlds:
    return _WORLDS.setdefault(name, Worlds(kernel_image(name)))


def cases(harness: Any, world: World, seed: int = 1) -> Iterator[Any]:
    rng = random.Random(seed)
    while True:
        yield harness.random(world, rng)


def failed(harness: Harness, world: World, some: Iterator[Any]) -> list[str]:
    """What the first case that differs says."""
    for case in some:
        found = differences(harness.run(world, case))
        if found:
            return [str(case), *map(str, found[:3])]
    return []


@pytest.mark.parametrize("name", ALL)
def test_compiled_functions_do_what_the_model_says(name: str) -> None:
    world = worlds(name)["plain"]
    present = [h for function, h in HARNESSES.items() if function in world.image.symbols]
    assert len(present) >= 12
    for harness in present:
        assert failed(harness, world, islice(cases(harness, world), 8)) == []


@pytest.mark.parametrize("function", HARNESSES)
@pytest.mark.parametrize("name", EVERY)
def test_prepared_cases_agree_and_reach_every_row(name: str, function: str) -> None:
    harness = HARNESSES[function]
    if function not in kernel_image(name).symbols:
        return
    for flavour in worlds(name).flavours(harness):
        world, missing = worlds(name)[flavour], set(harness.rows(worlds(name)[flavour]))
        for case in harness.prepared(world):
            checked = harness.run(world, case)
            assert [str(d) for d in differences(checked)] == [], (flavour, str(case))
            missing -= checked.rows
        assert missing == set()


# the model is wrong


def wrong(target: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(target, value)


def flip(column: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A column of the kernel's row the other way round."""

    def breaking(patch: pytest.MonkeyPatch) -> None:
        kernel = World.kernel

        def flipped(world: World, *args: Any) -> Kernel:
            made = kernel(world, *args)
            row = made.bits.variant
            made.bits = replace(made.bits, variant=replace(row, **{column: not getattr(row, column)}))
            return made

        patch.setattr(World, "kernel", flipped)

    return breaking


def _cont_stays(kernel: Kernel, pte: int) -> None:
    stores.set_pte(kernel, pte, kernel.read(pte) & ~kernel.bits.CONT)


def _split_at_start(kernel: Kernel, start: int, end: int) -> int:
    return split.split_kernel_leaf_mapping_locked(kernel, start)


def _no_block(pmd: int, addr: int, next: int, walk: MmWalk) -> int:
    return 0


_SEVEN = "debian:7.3"
BROKEN: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = {
    "split at both ends": (wrong("kernel_model.split._split_ends", _split_at_start), _SEVEN, "set_memory_valid"),
    "a run loses CONT as a whole": (
        wrong("kernel_model.split.split_contpte", _cont_stays),
        _SEVEN,
        "range_split_to_ptes",
    ),
    "the new table is ordered": (wrong("kernel_model.split.set_pmd", stores.set_pte), _SEVEN, "range_split_to_ptes"),
    "KFENCE's pool is not split": (
        wrong("kernel_model.split.is_kfence_address", lambda *_: False),
        _SEVEN,
        "split_kernel_leaf_mapping",
    ),
    "lazy mode is not seen in an interrupt": (
        wrong("kernel_model.stores._lazy", lambda kernel: kernel.variant.lazy_barriers),
        _SEVEN,
        "set_memory_valid",
    ),
    "-EBUSY": (wrong("kernel_model.split.EBUSY", 11), _SEVEN, "update_range_prot"),
    "whole blocks change": (wrong("kernel_model.pageattr.pageattr_pud_entry", _no_block), _SEVEN, "update_range_prot"),
    "clear, then set": (
        wrong("kernel_model.pageattr.masked", lambda value, masks: (value | masks.set) & ~masks.clear),
        _SEVEN,
        "update_range_prot",
    ),
    "a flush is rounded": (flip("flush_rounds"), _SEVEN, "set_memory_valid"),
    "aliases are changed": (wrong("kernel_model.pageattr._change_alias", lambda *_: 0), "debian:6.12", "set_memory_ro"),
    "the whole area's alias": (flip("alias_whole_area"), _SEVEN, "set_memory_ro"),
    "huge vmap": (flip("refuses_huge_vmap"), _SEVEN, "set_memory_nx"),
    "an invalid leaf is not there": (flip("leaf_may_be_invalid"), _SEVEN, "kernel_page_present"),
    "realms set the direct map": (flip("knows_realms"), _SEVEN, "can_set_direct_map"),
    "unaligned WARN": (wrong("kernel_model.mm.Kernel.warn", lambda *_: None), "debian:6.1", "set_memory_x"),
    "the area is asked": (
        wrong("kernel_model.pageattr.find_vm_area", lambda kernel, addr: next(iter(kernel.vm_areas), None)),
        "debian:6.1",
        "set_memory_x",
    ),
    "VM_ALLOC": (wrong("kernel_model.pageattr._may_change", lambda *_: True), "debian:6.12", "set_memory_x"),
    "aliases are unmapped": (wrong("kernel_model.mm.Kernel.called", lambda *_: None), "debian:6.12", "set_memory_nx"),
    "no direct map without leave": (
        wrong("kernel_model.pageattr.can_set_direct_map", lambda _: True),
        "debian:6.12",
        "set_direct_map_invalid_noflush",
    ),
    "KFENCE's leave": (
        wrong("kernel_model.pageattr.arm64_kfence_can_set_direct_map", lambda _: False),
        "debian:6.12",
        "can_set_direct_map",
    ),
    "made writable": (
        wrong("kernel_model.pageattr.valid_masks", lambda bits, _: pageattr.Masks(0, 0)),
        "debian:6.1",
        "set_direct_map_default_noflush",
    ),
    "the monitor's answer": (
        wrong("kernel_model.mem_encrypt.rsi_set_memory_range", lambda *_: 0),
        _SEVEN,
        "realm_set_memory_encrypted",
    ),
    "what is asked of the monitor": (
        wrong("kernel_model.mem_encrypt.RSI_CHANGE_DESTROYED", 0),
        _SEVEN,
        "realm_set_memory_decrypted",
    ),
    "only the linear map": (
        wrong("kernel_model.mem_encrypt.is_lm_address", lambda *_: True),
        _SEVEN,
        "realm_set_memory_decrypted",
    ),
    "bad entries are cleared": (
        wrong("kernel_model.apply.clear_bad", lambda *_: None),
        "debian:6.12",
        "apply_to_page_range",
    ),
    "tables are made": (wrong("kernel_model.apply._make_table", lambda *_: True), "debian:6.1", "apply_to_page_range"),
    "existing PTEs only": (
        wrong("kernel_model.apply._each_pte", lambda k, pte, addr, end, fn, _: _EACH(k, pte, addr, end, fn, True)),
        "debian:7.3",
        "apply_to_existing_page_range",
    ),
}
_EACH = apply._each_pte


@pytest.mark.kernels
@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_of_the_model_is_seen(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking, name, function = BROKEN[rule]
    world, harness = worlds(name)["plain"], HARNESSES[function]
    breaking(monkeypatch)
    assert failed(harness, world, islice(cases(harness, world), 200))


# what is around a function


@pytest.mark.kernels
def test_a_cold_7_3_has_the_places_that_a_booted_one_patches() -> None:
    image = kernel_image(_SEVEN)
    for name, text in CAPABILITIES.items():
        assert alternatives(image, capability(image, text), PATCHED), name
    assert len(static_key(image, "rsi_present", REALM)) > 3
    assert requires_bbml(image) == "linear_map_requires_bbml3"
    assert capability(image, "no such feature") is None


@pytest.mark.kernels
def test_rodata_of_the_command_line_is_what_the_kernel_makes_of_it() -> None:
    for name in KERNELS:
        world = worlds(name)["plain"]
        machine, words = world.machine, ("full", "on", "off", "noalias", "other")
        for word in words:
            before = (False, True)
            _set_rodata(world, *before)
            machine.write(world.scratch, word.encode() + b"\0")
            machine.call("set_debug_rodata", world.scratch).ok()
            expected = pageattr.parse_rodata(world.variant, word)
            assert _rodata(world) == (_known(world, before) if expected is None else _known(world, expected)), word


def _known(world: World, values: tuple[bool, bool]) -> tuple[bool | None, bool]:
    """6.1 does not tell where rodata_enabled is."""
    return (values[0] if "rodata_enabled" in world.image.symbols else None, values[1])


def _rodata(world: World) -> tuple[bool | None, bool]:
    symbols = world.image.symbols
    enabled = bool(world.machine.word_at(symbols["rodata_enabled"], 1)) if "rodata_enabled" in symbols else None
    return enabled, bool(world.machine.word_at(symbols["rodata_full"], 1))


def _set_rodata(world: World, enabled: bool, full: bool) -> None:
    for name, value in (("rodata_enabled", enabled), ("rodata_full", full)):
        if name in world.image.symbols:
            world.poke(name, int(value), size=1)
