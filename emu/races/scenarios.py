"""The races that are shipped: what runs against what on which kernel, made ready on a cold or a booted machine.

Each scenario is a row of SCENARIOS. Functions differ from kernel to kernel; which one is taken is asked of the symbols.
Sources: arch/arm64/mm/pageattr.c, mm/pagewalk.c, mm/vmalloc.c (vmap_try_huge_pmd), arch/arm64/mm/mmu.c (hot-unplug),
mm/kfence/core.c.
"""

from __future__ import annotations

from collections.abc import Mapping

from emu import scenarios
from emu.coldboot import protections
from emu.machine import Machine
from emu.race import Actor, Call, Race, Scene, Step, call
from emu.races.maintenance import bad_tlbi, ptdump_vmalloc, set_memory_bbm, split_walk
from emu.races.parts import (
    DBM,
    GFP_KERNEL,
    RDONLY,
    TEST,
    Scenario,
    change,
    freeing,
    give_pages,
    lock,
    one_of,
    symbols_of,
    vmap_huge,
    walk_call,
)
from emu.warm import WarmMachine
from pgtable.descriptors import LAST_LEVEL

# set_memory_*


def _lost_update(machine: Machine, options: Mapping[str, str]) -> Race:
    return _two_calls(machine, 0, options["mode"])


def _disjoint_pages(machine: Machine, options: Mapping[str, str]) -> Race:
    return _two_calls(machine, int(options["distance"]), options["mode"])


def _two_calls(machine: Machine, distance: int, mode: str) -> Race:
    """Cold: one is made invalid, the other read-only. Booted: set_memory_ro and set_memory_nx in a vmalloc area."""
    page = machine.plan.page_size
    if isinstance(machine, WarmMachine):
        va = machine.call("vmalloc", 4 * page).ok().value
        machine.call("set_memory_x", va, 4).ok()
        other = va + distance * page
        actors = (call("A", "set_memory_ro", va, 1), call("B", "set_memory_nx", other, 1))
    else:
        va = machine.plan.linear + TEST
        other = va + distance * page
        actors = (call("A", "set_memory_valid", va, 1, 0), change(machine, "B", other, 1, RDONLY, DBM))
    return Race(machine, actors, [va, other], mode=mode)


def _ro_rw(machine: Machine, options: Mapping[str, str]) -> Race:
    """Each asks for one page of an area of its own; the linear map must end as both asked."""
    page = machine.plan.page_size
    area = machine.call("vmalloc", 4 * page).ok().value
    aliases = [machine.plan.linear_va(machine.translate(area + i * page).pa) for i in range(4)]

    def agrees(scene: Scene) -> str | None:
        for i, wanted in enumerate(("read-only", "writable")):
            pages = {where: _writable(machine, va) for where, va in (("page", area + i * page), ("alias", aliases[i]))}
            wrong = [where for where, writable in pages.items() if writable != (wanted == "writable")]
            if wrong:
                return f"page {i} was made {wanted}: not so its {' and '.join(wrong)}"
        return None

    actors = (call("A", "set_memory_ro", area, 1), call("B", "set_memory_rw", area + page, 1))
    return Race(machine, actors, [area, *aliases], mode=options["mode"], invariants=[agrees])


def _writable(machine: Machine, va: int) -> bool:
    return not machine.translate(va).steps[-1].word & RDONLY


def _kfence_softirq(machine: Machine, options: Mapping[str, str]) -> Race:
    """KFENCE protects a page of its pool in a softirq, while a vmalloc area is made read-only."""
    page = machine.plan.page_size
    if isinstance(machine, WarmMachine):
        pool = machine.word_at(machine.symbol("__kfence_pool"), 8) if "__kfence_pool" in symbols_of(machine) else 0
        guard = pool + 3 * page if pool else machine.call("alloc_pages_exact", page, GFP_KERNEL).ok().value
        area = machine.call("vmalloc", 2 * page).ok().value
        aliases = [machine.plan.linear_va(machine.translate(area + i * page).pa) for i in range(2)]
        main = call("A", "set_memory_ro", area, 2)
    else:
        guard, area, aliases = machine.plan.linear + TEST, machine.plan.linear + TEST + page, []
        main = change(machine, "A", area, 2, RDONLY, DBM)
    softirq = call("KFENCE", "set_memory_valid", guard, 1, 0)
    return Race(machine, (main, softirq), [guard, area, *aliases], mode=options["mode"])


# walks and freed tables


def _freed_table(machine: Machine, options: Mapping[str, str]) -> Race:
    give_pages(machine)
    va, work = vmap_huge(machine) if options["by"] == "vmap" else _unplug(machine)
    take, give = lock(machine, options["lock"])
    page = machine.plan.page_size
    walker = Actor("walk", (*take, walk_call(machine, va, va + page), *give))
    if options["lock"] == "hotplug":
        take, give = lock(machine, "hotplug-write")
        work = (*take, *work, *give)
    walks = machine.translate(va).steps
    watch = [(step.pa, 8) for step in walks]
    return Race(
        machine, (walker, Actor("free", work)), watch, mode=options["mode"], serial=False, frees=freeing(machine)
    )


def _unplug(machine: Machine) -> tuple[int, tuple[Call | Step, ...]]:
    """A PTE table with one page, and what arch_remove_memory() does to the block."""
    plan, tables = machine.plan, machine.tables
    va = scenarios.test_va(plan)
    tables.map(va, scenarios.TEST_PA, plan.page_size, level=LAST_LEVEL, template=protections(tables.fmt).kernel)
    end = va + tables.granule.level_size(LAST_LEVEL - 1)
    unmap, free = one_of(machine, "unmap_hotplug_range"), one_of(machine, "free_empty_tables")
    return va, (Call(unmap, (va, end, 0, 0)), Call(free, (va, end, va, end)))


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "lost-update", "two changes of one page's PTE: a load, a store, and between them the other's", _lost_update
        ),
        Scenario(
            "disjoint-pages",
            "the same on two pages of one table, in all interleavings",
            _disjoint_pages,
            options={"distance": ("1", "0", "2", "8")},
            preemptions=None,
        ),
        Scenario(
            "kfence-softirq",
            "set_memory_valid of KFENCE in a softirq, at each point of a set_memory_ro",
            _kfence_softirq,
            interrupt=True,
        ),
        Scenario(
            "freed-table",
            "a walk of kernel tables while a PTE table is freed, under a lock or none",
            _freed_table,
            options={"by": ("vmap", "unplug"), "lock": ("none", "read", "write", "hotplug")},
            booted=False,
        ),
        Scenario(
            "ro-rw-alias", "set_memory_ro and set_memory_rw on different pages of one vmalloc area", _ro_rw, booted=True
        ),
        Scenario(
            "split-walk",
            "a block is split into pages under a walk and a load: break-before-make or not, with TLBI or without",
            split_walk,
            options={"how": ("break", "direct", "kernel"), "flush": ("yes", "no"), "bbm": ("0", "1", "2", "3")},
            booted=False,
        ),
        Scenario(
            "ptdump-vmalloc",
            "ptdump_walk_pgd() of an area that is being mapped or unmapped",
            ptdump_vmalloc,
            options={"by": ("map", "unmap", "huge")},
            booted=False,
        ),
        Scenario(
            "bad-tlbi",
            "a page is unmapped and mapped again by a small program with one thing wrong, while another CPU reads it",
            bad_tlbi,
            options={"wrong": ("tlbi", "dsb", "asid", "early", "nothing")},
            booted=False,
        ),
        Scenario(
            "set-memory-bbm",
            "set_memory_* as shipped, under the checkers of TLB maintenance",
            set_memory_bbm,
            options={"noflush": ("no", "yes")},
        ),
    )
}
