"""The copy of the linear map that kexec and hibernation run on must be writable (trans_pgd_create_copy).

pte_mkwrite_novma() makes an entry writable only if its software dirty bit is set. In early 2026 PAGE_KERNEL had lost
that bit: pages that were read-only when the copy was made stayed so in it, and the kexec'd kernel died writing there.
One bit in one descriptor, seen by running the compiled function.
"""

from __future__ import annotations

from emu.booted import VmArea
from emu.warm import WarmMachine
from pgtable import Access, Walk, translate

PTE_DIRTY = 1 << 55  # software; arch/arm64/include/asm/pgtable-prot.h
GFP_KERNEL = 0xCC0


def copied(machine: WarmMachine, va: int) -> Walk:
    """A write to the page of `va` through the copy of the linear map that the kernel makes of it."""
    page = machine.plan.page_size
    scratch = machine.call("vmalloc", page).ok().value
    info = machine.symbol("hibernate_page_alloc").to_bytes(8, "little") + GFP_KERNEL.to_bytes(8, "little")
    machine.write(scratch, bytes(8) + info)  # pgd_t *, then struct trans_pgd_info: the allocator, its argument
    assert machine.call("trans_pgd_create_copy", scratch + 8, scratch, va, va + page).ok().signed == 0
    root = int.from_bytes(machine.read(scratch, 8), "little")
    where = machine.translate(root)
    assert where.ok
    registers = machine.registers().replace(TTBR1_EL1=where.pa)
    return translate(machine.memory, registers, va, Access.write(el=1))


def read_only_alias(machine: WarmMachine) -> int:
    """The linear VA of a page that the kernel has made read-only."""
    found = VmArea.at(machine, machine.call("vmalloc", machine.plan.page_size).ok().value)
    machine.call("set_memory_ro", found.addr, 1).ok()
    (va,) = found.linear
    assert not machine.translate(va, Access.write(el=1)).ok
    return va


def test_the_linear_map_is_mapped_dirty(booted: WarmMachine) -> None:
    found = VmArea.at(booted, booted.call("vmalloc", booted.plan.page_size).ok().value)
    assert booted.translate(found.linear[0]).steps[-1].word & PTE_DIRTY


def test_a_read_only_page_is_writable_in_the_copy(booted: WarmMachine) -> None:
    walk = copied(booted, read_only_alias(booted))
    assert walk.ok, walk


def test_without_the_dirty_bit_it_is_not(booted: WarmMachine) -> None:
    """The bug made again: one bit of the linear map's descriptor is cleared before the copy is made."""
    va = read_only_alias(booted)
    step = booted.translate(va).steps[-1]
    booted.memory.write(step.pa, (step.word & ~PTE_DIRTY).to_bytes(8, "little"))
    walk = copied(booted, va)
    assert walk.fault
    assert walk.fault.type.name == "PERMISSION"
