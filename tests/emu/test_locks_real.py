"""The lock table against the compiled functions, cell by cell."""

from __future__ import annotations

import pytest

from emu.checks.walks import KernelWalk, WalkCase, simple
from emu.checks.world import World
from kernel_model.locktable import HELD_BOTH, HELD_KERNEL, HELD_USER, WARNS, Cell, cells
from kernel_model.mm import Warn
from kernel_model.thread import MAIL_BASE
from tests.kernels import KERNELS, MORE, kernel_image

WALKS = (
    "walk_page_range_novma",
    "walk_kernel_page_table_range",
    "walk_kernel_page_table_range_lockless",
    "walk_page_range_debug",
)
HELD = {held.name: held for held in (*HELD_KERNEL, *HELD_USER, *HELD_BOTH)}


def real(world: World, cell: Cell, walk_lock: int) -> tuple[int, int]:
    """What the compiled function returns in this cell, and its WARNs."""
    tree, va = simple(world)
    held = HELD[cell.held]
    counts = (held.init_mm if cell.mm == "init_mm" else held.mm, held.init_mm)
    case = WalkCase(tree, va, va + world.plan.page_size, ("pte_entry",), walk_lock=walk_lock, mm=cell.mm, counts=counts)
    outcome = KernelWalk(cell.entry).run(world, case).real
    return outcome.value, sum(isinstance(event, Warn) for event in outcome.events)


@pytest.mark.kernels
@pytest.mark.parametrize("name", [*KERNELS, *MORE])
def test_every_cell_of_the_table_walks_is_what_the_kernel_does(name: str) -> None:
    world = World(kernel_image(name))
    found = [cell for cell in cells(world.variant) if cell.entry in WALKS]
    assert found
    for cell in found:
        for walk_lock in (0, 1, 2, 3) if world.variant.locks.has_walk_lock else (0,):
            assert real(world, cell, walk_lock) == (0, cell.warnings), (cell, walk_lock)


@pytest.mark.kernels
def test_mail_base_is_what_debian_6_12_95_has() -> None:
    """The function that the mail of 6 June patches: it ignores walk_lock, and WARNs; it never refuses."""
    world = World(kernel_image("debian:6.12.95"))
    assert world.variant.locks == MAIL_BASE.locks
    found = [cell for cell in cells(MAIL_BASE) if cell.entry == "walk_page_range_novma"]
    assert len(found) == 6
    assert sum(cell.outcome == WARNS for cell in found) == 3
    for cell in found:
        assert real(world, cell, 3) == (0, int(cell.outcome == WARNS)), cell


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["debian:6.12", "debian:7.3"])
def test_the_warning_of_the_kernel_walk(name: str) -> None:
    """Without the lock one WARN in the real code, with a reader or a writer none; lockless none."""
    world = World(kernel_image(name))
    entry = "walk_kernel_page_table_range"
    for count, warnings in ((0, 1), (1, 0), (0x100, 0)):
        held = {0: "nothing", 1: "init_mm write", 0x100: "init_mm read"}[count]
        assert real(world, Cell(entry, "any", "init_mm", held, "", 0), 0) == (0, warnings)
    if name == "debian:7.3":
        assert real(world, Cell(f"{entry}_lockless", "any", "init_mm", "nothing", "", 0), 0) == (0, 0)
