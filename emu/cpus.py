"""Several CPUs over one physical memory: machines that share every byte, each with registers, stack and task its own.

    first = Machine.boot(image)
    second, = more_cpus(first)
    second.call("set_memory_valid", va, 1, 0)      # on the tables of `first`, which sees the change

Rules of this file:
- CPUs take turns; nothing runs at the same time. Instructions are atomic, so LSE atomics are.
- A TLBI of the IS and OS forms drops the TLB of all CPUs, another form that of its own CPU only.
- A store-exclusive can fail because of other CPUs only if it is made to: see `fail_exclusive`.
What the CPUs of a booted kernel share: the kernel's per-CPU area. A snapshot has one online CPU, so TPIDR_EL1 is the
same on all; per-CPU data that a real second CPU would have for itself (page lists, lazily freed areas) is common.
"""

from __future__ import annotations

from dataclasses import fields, replace

from emu import coldboot, engine
from emu.coldboot import PlacedPlan, Plan, SetUp
from emu.machine import Machine
from emu.warm import WarmMachine, WarmPlan

STACK_PAGES = 4
TASK_PAGES = 2
MOST_COLD = 3  # further CPUs of a cold machine
GFP_KERNEL_ZERO = 0xDC0
# Load/store exclusive (Arm ARM C4.1.94): bits [29:24] = 001000; o2 (bit 23) and, for a store, L (bit 22) are 0.
_EXCLUSIVE_MASK, _STORE_EXCLUSIVE = 0x3FC0_0000, 0x0800_0000
_PAIR_OF_CAS = 1 << 21, 0x8000_0000  # o1 without the 64-bit size: CASP, not STXP


def more_cpus(first: Machine, count: int = 1) -> tuple[Machine, ...]:
    """`count` further CPUs on the memory of `first`, with its registers of translation and its stubs.

    Cold: stack and task are pages of zeros, six for each CPU from the end of the window. Booted: pages given by the
    kernel's own alloc_pages_exact(), the task a copy of the current one. Raises MemoryError for more than the window
    has room for, RuntimeError where the kernel gives no pages.
    """
    added: list[Machine] = []
    for _ in range(count):
        added.append(_warm(first) if isinstance(first, WarmMachine) else _cold(first, added))
    for machine in added:
        for address, action in first.stubs.items():
            machine.stub(address, action)
    everyone = [*_known(first), *added]
    for machine in everyone:
        machine.first = first.first
        machine.siblings = [other for other in everyone if other is not machine]
    if first.trace:
        for machine in added:
            machine.trace = first.trace.also(machine)
    return tuple(added)


def _known(first: Machine) -> list[Machine]:
    return [first, *first.siblings]


def _cold(first: Machine, added: list[Machine]) -> Machine:
    page = first.plan.page_size
    number = len(_known(first)) + len(added)
    if number > MOST_COLD:
        raise MemoryError(f"{number + 1} CPUs: the window of a cold machine has room for {MOST_COLD + 1}")
    end = first.plan.window + (coldboot.WINDOW_PAGES - (number - 1) * (STACK_PAGES + TASK_PAGES)) * page
    own = {f.name: getattr(first.plan, f.name) for f in fields(Plan)}
    plan = PlacedPlan(**own, top=end - TASK_PAGES * page, current=end - TASK_PAGES * page)
    features = first.mmu.features if first.mmu else None
    machine = Machine(_shared(first, plan), first.image, features=features)
    machine._struct_pages = first._struct_pages
    return machine


def _warm(first: WarmMachine) -> Machine:
    types, page = first.types, first.plan.page_size
    stack = kernel_pages(first, STACK_PAGES * page)
    size = types["task_struct"].size
    task = kernel_pages(first, size)
    first.write(task, first.read(first.plan.task, size))
    first.write(task + types.btf.offset("task_struct", "stack"), stack.to_bytes(8, "little"))
    assert isinstance(first.plan, WarmPlan)
    plan = replace(first.plan, top=stack + STACK_PAGES * page, current=task)
    machine = WarmMachine(first.snapshot, mmu="model" if first.mmu else "cpu", made=_shared(first, plan))
    machine.cpu["SP_EL0"] = task
    return machine


def kernel_pages(first: Machine, size: int) -> int:
    """The VA of `size` bytes of a booted kernel's own pages, zeros; its linear map has them already, so that no table
    changes. Raises RuntimeError where it has none to give."""
    va = first.call("alloc_pages_exact", size, GFP_KERNEL_ZERO).ok().value
    if not va:
        raise RuntimeError(f"alloc_pages_exact({size:#x}) gives nothing: this kernel has no memory left for it")
    return va


def _shared(first: Machine, plan: Plan) -> SetUp:
    return SetUp(plan, first.memory, first.tables, first.user, first.registers())


def is_store_exclusive(word: int) -> bool:
    """STXR, STLXR, STXP and STLXP of any size; not CASP, which shares the encoding space."""
    o1, wide = _PAIR_OF_CAS
    return word & _EXCLUSIVE_MASK == _STORE_EXCLUSIVE and bool(not word & o1 or word & wide)


def fail_exclusive(machine: Machine, pc: int) -> None:
    """The store-exclusive at `pc` is done and has failed, because another CPU has written since the load-exclusive.

    Unicorn's monitor is a comparison: it stores if the word is what was loaded, also where another CPU wrote the same
    word anew, or changed it and changed it back. Hardware's is lost by any write to the granule.
    """
    status = machine.word_at(pc) >> 16 & 31
    if status != 31:
        machine.cpu.write(engine.X[status], 1)
    machine.cpu.write(engine.PC, pc + 4)
