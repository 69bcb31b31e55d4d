"""What races are made of: a scenario as a row, and kernel calls that several scenarios use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from emu import scenarios
from emu.check import stub_allocator
from emu.coldboot import STRUCT_PAGE, protections
from emu.machine import Machine
from emu.race import WAIT, Actor, Call, Race, Scene, Step, call
from emu.races.sites import READER, WRITER
from emu.warm import WarmMachine
from pgtable.descriptors import AP_READ_ONLY, LAST_LEVEL, Format

_PAGE = Format().leaf(LAST_LEVEL)
RDONLY, DBM = _PAGE["AP"].put(0, AP_READ_ONLY), _PAGE["DBM"].mask  # PTE_RDONLY and PTE_WRITE
COUNTERS = ("lruvec_stat_mod_folio", "mod_node_state")  # statistics in memory that a cold machine has not
GFP_KERNEL = 0xCC0
TEST = 0x200_0000  # bytes from the start of RAM: linear addresses that nothing else uses on a cold machine
CALLBACK = (0xF9400009, 0x52800000, 0xD65F03C0)  # ldr x9, [x0]; mov w0, #0; ret
HOLE = (0x52800020, 0xD65F03C0)  # mov w0, #1; ret


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


def give_pages(machine: Machine) -> None:
    """A cold machine's page allocator gives pages of its pool, and nothing is counted."""
    stub_allocator(machine)
    for name in COUNTERS:
        if name in symbols_of(machine):
            machine.stub(name, lambda _: 0)


def symbols_of(machine: Machine) -> set[str]:
    """The names that the kernel has."""
    assert machine.image
    return set(machine.image.symbols)


def one_of(machine: Machine, *names: str) -> str:
    """The first of these functions that the kernel has. Raises ScenarioError."""
    assert machine.image
    symbols = machine.image.symbols
    for name in names:
        if name in symbols or symbols.variants(name):
            return name if name in symbols else symbols.variants(name)[0]
    raise ScenarioError(f"{machine.image.name} has no {' or '.join(names)}")


def change(machine: Machine, name: str, va: int, pages: int, set_mask: int, clear_mask: int) -> Actor:
    """An actor that changes bits of the PTEs of kernel pages, by what set_memory_ro() and its like call."""
    function = one_of(machine, "__change_memory_common", "update_range_prot")
    return call(name, function, va, pages * machine.plan.page_size, set_mask, clear_mask)


def walk_call(machine: Machine, start: int, end: int, *, hole: bool = False) -> Call:
    """The kernel's own walk of its tables, with a callback that reads the PTE; `hole`: it ends with 1 at a hole."""
    assert machine.image
    btf, plan = machine.image.btf, machine.plan
    machine.memory.write(plan.code_pa, b"".join(word.to_bytes(4, "little") for word in CALLBACK))
    ops = plan.spare
    machine.write(ops + btf.offset("mm_walk_ops", "pte_entry"), plan.code.to_bytes(8, "little"))
    if hole:
        machine.memory.write(plan.code_pa + 0x40, b"".join(word.to_bytes(4, "little") for word in HOLE))
        machine.write(ops + btf.offset("mm_walk_ops", "pte_hole"), (plan.code + 0x40).to_bytes(8, "little"))
    if "walk_page_range_novma" in machine.image.symbols:
        return Call("walk_page_range_novma", (machine.symbol("init_mm"), start, end, ops, 0, 0))
    return Call("walk_kernel_page_table_range", (start, end, ops, 0, 0))


def vmap_huge(machine: Machine) -> tuple[int, tuple[Call | Step, ...]]:
    """An empty PTE table, and a mapping of the whole block that takes its place."""
    plan, tables = machine.plan, machine.tables
    va, size = scenarios.test_va(plan), tables.granule.level_size(LAST_LEVEL - 1)
    tables.place(va, LAST_LEVEL, 0)
    prot = protections(tables.fmt).kernel | 3
    shift = size.bit_length() - 1
    return va, (Call("vmap_range_noflush", (va, va + size, size * 16, prot, shift)),)


def freeing(machine: Machine) -> dict[str, Callable[[Machine], int]]:
    """The page allocator's functions that take a page back, and its PA."""
    first = machine.struct_page(machine.plan.ram[0])
    page = machine.plan.page_size

    def of_struct(m: Machine) -> int:
        return (m.argument(0) - first) // STRUCT_PAGE * page + m.plan.ram[0]

    def of_address(m: Machine) -> int:
        return m.plan.linear_pa(m.argument(0))

    found = {"free_pages": of_address, "__free_pages": of_struct, "__free_frozen_pages": of_struct}
    found["free_frozen_pages"] = of_struct
    return {name: address for name, address in found.items() if name in symbols_of(machine)}


def lock(machine: Machine, kind: str) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """Steps that take and give back a lock: init_mm's mmap lock, or a model of mem_hotplug_lock in a spare word."""
    if kind == "none":
        return (), ()
    if kind.startswith("hotplug"):
        at = machine.translate(machine.plan.spare + machine.plan.page_size).pa
        name, count = "mem_hotplug_lock", WRITER if kind == "hotplug-write" else READER
    else:
        assert machine.image
        at = machine.translate(machine.symbol("init_mm") + machine.image.btf.offset("mm_struct", "mmap_lock")).pa
        name, count = "init_mm.mmap_lock", WRITER if kind == "write" else READER
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
