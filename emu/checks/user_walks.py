"""The walks of user memory: walk_page_range, walk_page_range_vma, their unsafe forms, walk_page_vma, walk_page_mapping.

Each case is a tree, the vmas over it, a range, the callbacks that are set and what they do, the locks that are held,
and what splitting a huge page leaves behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

from emu.checks import user_cases
from emu.checks.harness import Checked
from emu.checks.rows import walk_rows, walk_universe
from emu.checks.script import Recorder
from emu.checks.user_cases import OF_MM, OF_VMA, UserCase
from emu.checks.vmas import maps, objects_of
from emu.checks.world import World
from emu.machine import TIMEOUT, CallResult
from kernel_model import walkers
from kernel_model.compare import Outcome
from kernel_model.mm import EINVAL, ENOMEM, Callback, Called, Kernel, Warn, Write
from pgtable.descriptors import LAST_LEVEL

ENDLESS = 0.1  # seconds for a call that the model says has no end
UNKNOWN = (1 << 32) - 1  # depth -1, as the recorder has it
STEPS = 6000  # loop iterations of the model


class UserWalk:
    """The harness of one of the functions."""

    worlds = ("plain", "wide")
    case = UserCase
    stubs = "vmas"

    def __init__(self, function: str) -> None:
        self.function = function

    def exists(self, world: World) -> bool:
        """The kernel has the function."""
        return self.function in world.image.symbols

    # ---- cases

    def prepared(self, world: World) -> Iterator[UserCase]:
        """Each kind of entry at each level with each reaction; locks; kinds of vma; refusals."""
        yield from user_cases.prepared(self.function, world)

    def random(self, world: World, rng: Random) -> UserCase:
        """A random mm over a random tree, a range near one of its borders, random callbacks and reactions."""
        return user_cases.random_case(self.function, world, rng)

    # ---- running

    def run(self, world: World, case: UserCase) -> Checked:
        """On the model, then for real."""
        objects = objects_of(world)
        world.load(case.tree, case.script)
        objects.write(case.space)
        kernel = world.kernel()
        kernel.step_limit = STEPS
        predicted = world.predicted(kernel, lambda: self._model(world, kernel, case))
        real = world.real(self._real(world, case, ENDLESS if predicted.stop else TIMEOUT), keeps=True)
        objects.forget()
        return Checked(predicted, real, user_rows(world, predicted, case))

    def _model(self, world: World, kernel: Kernel, case: UserCase) -> int:
        mm = objects_of(world).model(kernel)
        kernel.lazy.enable_count = int(case.lazy)
        ops = Recorder(kernel, case.script, world.arena).ops(case.callbacks, case.walk_lock)
        function: Callable[..., int] = getattr(walkers, self.function)
        if self.function in OF_MM:
            return function(kernel, mm if case.space.has_mm else None, case.start, case.end, ops)
        if self.function == "walk_page_mapping":
            page, last = world.levels.page_size, case.end - 1
            pairs = zip(case.space.areas, mm.vmas, strict=True)
            vmas = [vma for area, vma in pairs if maps(area, page, case.start, last)]
            return function(kernel, vmas, case.start, case.end - case.start, ops)
        vma = mm.vmas[case.vma]
        range_ = () if self.function == "walk_page_vma" else (case.start, case.end)
        return function(kernel, vma, *range_, ops)

    def _real(self, world: World, case: UserCase, timeout: float) -> CallResult:
        objects = objects_of(world)
        ops = world.ops_table(objects.other, case.callbacks, case.walk_lock)
        args: tuple[int, ...]
        if self.function in OF_MM:
            args = (objects.mm if case.space.has_mm else 0, case.start, case.end)
        elif self.function == "walk_page_mapping":
            args = (objects.mapping, case.start, case.end - case.start)
        else:
            args = (objects.vma(case.vma), *((case.start, case.end) if self.function != "walk_page_vma" else ()))
        if case.lazy:
            world.store(world.plan.task + world.offset("task_struct", "lazy_mmu_state.enable_count"), 1, 1)
        result = world.call(self.function, *args, ops, 0, timeout=timeout)
        if case.lazy:  # what is pending is a flag of the thread
            world.store(world.plan.task + world.offset("task_struct", "lazy_mmu_state.enable_count"), 0, 1)
            world.store(world.plan.task + world.offset("task_struct", "thread_info.flags"), 0)
        return result

    # ---- rows, shrinking

    def rows(self, world: World) -> frozenset[str]:
        """What walks of this kernel's levels show to callbacks, and what vmas add to that."""
        return walk_universe(world) | _universe(self.function, world)

    def smaller(self, case: UserCase) -> Iterator[UserCase]:
        """Fewer words, vmas, callbacks, reactions; a shorter range."""
        for name in case.callbacks:
            yield replace(case, callbacks=tuple(n for n in case.callbacks if n != name))
        for at in case.script:
            yield replace(case, script={i: r for i, r in case.script.items() if i != at})
        for i in range(len(case.space.areas)):
            if i != case.vma or self.function not in OF_VMA:
                areas = case.space.areas[:i] + case.space.areas[i + 1 :]
                yield replace(case, space=replace(case.space, areas=areas), vma=case.vma - (case.vma > i))
        yield from (replace(case, tree=tree) for tree in case.tree.smaller())
        middle = (case.start + case.end) // 2
        yield replace(case, end=middle)
        yield replace(case, start=middle)


# ---- rows


def user_rows(world: World, outcome: Outcome, case: UserCase) -> frozenset[str]:
    """The rows that a walk reached: those of every walk, and those of vmas."""
    found = set(walk_rows(world, outcome, case.script)) | _made_rows(world, outcome)
    number, failed = -1, False
    for event in outcome.events:
        if isinstance(event, Called):
            found.add(event.name)
        elif isinstance(event, Warn):
            found.add("assertion")
        elif isinstance(event, Callback):
            number += 1
            value = case.script[number].value if number in case.script else 0
            found |= _callback_rows(event.name, value, failed) | _hole_rows(event, case)
            failed |= value != 0
    errors = {-EINVAL: "-EINVAL", -ENOMEM: "-ENOMEM"}
    return frozenset(found | {errors[outcome.value]} if outcome.value in errors and not outcome.stop else found)


def _made_rows(world: World, outcome: Outcome) -> set[str]:
    """How many tables install_pte made; the arena begins where the pages for them end."""
    layout, pool = world.space.fmt.table(LAST_LEVEL - 1), world.plan.pages[0]
    words = [event.value for event in outcome.events if isinstance(event, Write)]
    made = {word for word in words if word & 3 == 3 and pool <= layout["TA"].get(word) < world.arena[0]}
    return {f"{min(len(made), len(world.space.tables) - 1)} tables made"} if made else set()


def _hole_rows(event: Callback, case: UserCase) -> set[str]:
    """Where a hole of unknown depth is: between vmas, in a VM_PFNMAP one or in a hugetlb one."""
    if event.name != "pte_hole" or event.args[2] != UNKNOWN:
        return set()
    area = next((area for area in case.space.areas if area.start <= event.args[0] < area.end), None)
    if area is None:
        return {"hole between vmas"}
    return {"hole in a hugetlb vma" if area.huge_size else "hole of a VM_PFNMAP vma"}


def _callback_rows(name: str, value: int, failed: bool) -> set[str]:
    if name == "test_walk":
        return {f"test_walk {'walks' if not value else 'skips' if value > 0 else 'refuses'}"}
    if name == "post_vma":
        return {f"post_vma {'after an error' if failed else 'after the walk'}"}
    if name in ("pre_vma", "hugetlb_entry", "install_pte"):
        return {f"{name} {'stop' if value else 'goes on'}"}
    return set()


def _universe(function: str, world: World) -> frozenset[str]:
    """What vmas add to the rows of a walk."""
    variant = world.own
    rows = {f"{name} {did}" for name in ("pre_vma", "hugetlb_entry") for did in ("goes on", "stop")}
    rows |= {"post_vma after an error", "post_vma after the walk"} | ({"__split_huge_pmd"} if variant.thp else set())
    rows |= {"pte_hole depth -1 goes on", "pte_hole depth -1 stop"}
    rows.add("hole in a hugetlb vma")
    if function in OF_MM:
        rows.add("hole between vmas")
    if function not in OF_VMA or (function == "walk_page_vma" and variant.locks.walk_test_in_page_vma):
        rows |= {f"test_walk {did}" for did in ("walks", "skips", "refuses")} | {"hole of a VM_PFNMAP vma"}
    if function != "walk_page_mapping" or variant.install_pte:
        rows.add("-EINVAL")
    if "unsafe" in function:
        rows |= {"-ENOMEM", "install_pte goes on", "install_pte stop", "__sync_icache_dcache"}
        rows |= {"__contpte_try_fold"} if world.own.contpte else set()
        rows |= {f"{count} tables made" for count in range(1, len(world.space.tables))}
    if variant.locks.has_walk_lock and function != "walk_page_mapping":
        rows |= {"assertion", "__vma_start_write"}
    return frozenset(rows)
