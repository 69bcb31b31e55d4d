"""The races that are shipped: what runs against what on which kernel, made ready on a cold or a booted machine.

Each scenario is a row of SCENARIOS. Functions differ from kernel to kernel; which one is taken is asked of the symbols.
Sources: arch/arm64/mm/pageattr.c, mm/pagewalk.c, mm/vmalloc.c (vmap_try_huge_pmd), arch/arm64/mm/mmu.c (hot-unplug),
mm/kfence/core.c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from emu import scenarios
from emu.check import stub_allocator
from emu.coldboot import protections
from emu.machine import Machine
from emu.race import WAIT, Actor, Call, Race, Scene, Step, call
from emu.warm import WarmMachine
from pgtable.descriptors import LAST_LEVEL

RDONLY, DBM = 1 << 7, 1 << 51  # PTE_RDONLY and PTE_WRITE
GFP_KERNEL = 0xCC0
TEST = 0x200_0000  # bytes from the start of RAM: linear addresses that nothing else uses on a cold machine
CALLBACK = (0xF9400009, 0x52800000, 0xD65F03C0)  # ldr x9, [x0]; mov w0, #0; ret


class ScenarioError(ValueError):
    """A scenario that this kernel, machine or option does not allow; one sentence."""


@dataclass(frozen=True)
class Scenario:
    """A race by name. `make(machine, options)`; `options`: the values that each may have, the default first."""

    name: str
    text: str
    make: Callable[[Machine, Mapping[str, str]], Race]
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    booted: bool | None = None  # needs a booted machine (True), a cold one (False), or takes either
    interrupt: bool = False
    preemptions: int | None = 2

    def race(self, machine: Machine, *, mode: str | None = None, **options: str) -> Race:
        """The race on a fresh machine, which is its own from now on. Raises ScenarioError."""
        if self.booted is not None and self.booted != isinstance(machine, WarmMachine):
            kind = "a booted machine (--snapshot)" if self.booted else "a cold machine (--kernel)"
            raise ScenarioError(f"{self.name} needs {kind}")
        for name, value in options.items():
            allowed = self.options.get(name)
            if allowed is None:
                raise ScenarioError(f"{self.name} has no option {name}: it has {', '.join(self.options) or 'none'}")
            if value not in allowed:
                raise ScenarioError(f"{self.name}: {name}={value}: must be one of {', '.join(allowed)}")
        chosen = {name: options.get(name, allowed[0]) for name, allowed in self.options.items()}
        return self.make(machine, {**chosen, "mode": mode or ("interrupt" if self.interrupt else "smp")})


def _symbols(machine: Machine) -> set[str]:
    assert machine.image
    return set(machine.image.symbols)


def _one_of(machine: Machine, *names: str) -> str:
    """The first of these functions that the kernel has. Raises ScenarioError."""
    assert machine.image
    symbols = machine.image.symbols
    for name in names:
        if name in symbols or symbols.variants(name):
            return name if name in symbols else symbols.variants(name)[0]
    raise ScenarioError(f"{machine.image.name} has no {' or '.join(names)}")


def _change(machine: Machine, name: str, va: int, pages: int, set_mask: int, clear_mask: int) -> Actor:
    """An actor that changes bits of the PTEs of kernel pages, by what set_memory_ro() and its like call."""
    function = _one_of(machine, "__change_memory_common", "update_range_prot")
    return call(name, function, va, pages * machine.plan.page_size, set_mask, clear_mask)


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
        actors = (call("A", "set_memory_valid", va, 1, 0), _change(machine, "B", other, 1, RDONLY, DBM))
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
        pool = machine.word_at(machine.symbol("__kfence_pool"), 8) if "__kfence_pool" in _symbols(machine) else 0
        guard = pool + 3 * page if pool else machine.call("alloc_pages_exact", page, GFP_KERNEL).ok().value
        area = machine.call("vmalloc", 2 * page).ok().value
        aliases = [machine.plan.linear_va(machine.translate(area + i * page).pa) for i in range(2)]
        main = call("A", "set_memory_ro", area, 2)
    else:
        guard, area, aliases = machine.plan.linear + TEST, machine.plan.linear + TEST + page, []
        main = _change(machine, "A", area, 2, RDONLY, DBM)
    softirq = call("KFENCE", "set_memory_valid", guard, 1, 0)
    return Race(machine, (main, softirq), [guard, area, *aliases], mode=options["mode"])


# walks and freed tables


def _walk(machine: Machine, start: int, end: int) -> Call:
    """The kernel's own walk of its tables, with a callback that reads the PTE."""
    assert machine.image
    btf, plan = machine.image.btf, machine.plan
    machine.memory.write(plan.code_pa, b"".join(word.to_bytes(4, "little") for word in CALLBACK))
    ops = plan.spare
    machine.write(ops + btf.offset("mm_walk_ops", "pte_entry"), plan.code.to_bytes(8, "little"))
    if "walk_page_range_novma" in machine.image.symbols:
        return Call("walk_page_range_novma", (machine.symbol("init_mm"), start, end, ops, 0, 0))
    return Call("walk_kernel_page_table_range", (start, end, ops, 0, 0))


def _freed_table(machine: Machine, options: Mapping[str, str]) -> Race:
    stub_allocator(machine)
    for name in {"lruvec_stat_mod_folio", "mod_node_state"} & _symbols(machine):
        machine.stub(name, lambda _: 0)
    va, work = _vmap_huge(machine) if options["by"] == "vmap" else _unplug(machine)
    take, give = _lock(machine, options["lock"])
    page = machine.plan.page_size
    walker = Actor("walk", (*take, _walk(machine, va, va + page), *give))
    if options["lock"] == "hotplug":
        take, give = _lock(machine, "hotplug-write")
        work = (*take, *work, *give)
    walks = machine.translate(va).steps
    watch = [(step.pa, 8) for step in walks]
    return Race(
        machine, (walker, Actor("free", work)), watch, mode=options["mode"], serial=False, frees=_frees(machine)
    )


def _vmap_huge(machine: Machine) -> tuple[int, tuple[Call | Step, ...]]:
    """An empty PTE table, and a mapping of the whole block that takes its place."""
    plan, tables = machine.plan, machine.tables
    va, size = scenarios.test_va(plan), tables.granule.level_size(LAST_LEVEL - 1)
    tables.place(va, LAST_LEVEL, 0)
    prot = protections(tables.fmt).kernel | 3
    shift = size.bit_length() - 1
    return va, (Call("vmap_range_noflush", (va, va + size, size * 16, prot, shift)),)


def _unplug(machine: Machine) -> tuple[int, tuple[Call | Step, ...]]:
    """A PTE table with one page, and what arch_remove_memory() does to the block."""
    plan, tables = machine.plan, machine.tables
    va = scenarios.test_va(plan)
    tables.map(va, scenarios.TEST_PA, plan.page_size, level=LAST_LEVEL, template=protections(tables.fmt).kernel)
    end = va + tables.granule.level_size(LAST_LEVEL - 1)
    unmap, free = _one_of(machine, "unmap_hotplug_range"), _one_of(machine, "free_empty_tables")
    return va, (Call(unmap, (va, end, 0, 0)), Call(free, (va, end, va, end)))


def _frees(machine: Machine) -> dict[str, Callable[[Machine], int]]:
    """The page allocator's functions that take a page back, and its PA."""
    first = machine.struct_page(machine.plan.ram[0])
    page = machine.plan.page_size

    def of_struct(m: Machine) -> int:
        return (m.argument(0) - first) // 64 * page + m.plan.ram[0]

    def of_address(m: Machine) -> int:
        return m.plan.linear_pa(m.argument(0))

    found = {"free_pages": of_address, "__free_pages": of_struct, "__free_frozen_pages": of_struct}
    found["free_frozen_pages"] = of_struct
    return {name: address for name, address in found.items() if name in _symbols(machine)}


READER, WRITER = 0x100, 1  # of struct rw_semaphore.count


def _lock(machine: Machine, lock: str) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """Steps that take and give back a lock: init_mm's mmap lock, or a model of mem_hotplug_lock in a spare word."""
    if lock == "none":
        return (), ()
    if lock.startswith("hotplug"):
        at = machine.translate(machine.plan.spare + machine.plan.page_size).pa
        name, count = "mem_hotplug_lock", WRITER if lock == "hotplug-write" else READER
    else:
        assert machine.image
        at = machine.translate(machine.symbol("init_mm") + machine.image.btf.offset("mm_struct", "mmap_lock")).pa
        name, count = "init_mm.mmap_lock", WRITER if lock == "write" else READER
    how = "write" if count == WRITER else "read"

    def take(scene: Scene) -> int | None:
        held = scene.load(at)
        if held & WRITER or (held and count == WRITER):
            return WAIT
        scene.store(at, held + count)
        return None

    def give(scene: Scene) -> None:
        scene.store(at, scene.load(at) - count)

    return (Step(f"{how} lock of {name}", take),), (Step(f"{how} unlock of {name}", give),)


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
    )
}
