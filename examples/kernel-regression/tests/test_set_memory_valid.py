"""set_memory_valid() on the linear map: what it changes, and what it tells the TLBs."""

from __future__ import annotations

from emu.assertions import assert_no_bbm_violation, assert_only_changed, assert_same_walk
from emu.machine import Machine
from emu.tracing import Trace
from pgtable.build import TableBuilder

PA = 0x4800_0000


def test_only_the_pages_asked_for_become_invalid(machine: Machine) -> None:
    va, page = machine.plan.linear_va(PA), machine.plan.page_size
    result = machine.call("set_memory_valid", va, 2, 0)
    assert_only_changed(result, {va, va + page})
    assert all(change.fields["VALID"] == (1, 0) for change in result.changes)
    assert {event.va for event in result.maintenance} == {va, va + page}


def test_valid_again_the_walk_is_as_before(machine: Machine) -> None:
    va = machine.plan.linear_va(PA)
    before = machine.translate(va)
    machine.call("set_memory_valid", va, 1, 0).ok()
    machine.call("set_memory_valid", va, 1, 1).ok()
    assert_same_walk(machine, va, before)


def test_its_tlb_maintenance_is_break_before_make(machine: Machine) -> None:
    machine.attach(Trace())
    assert_no_bbm_violation(machine.call("set_memory_valid", machine.plan.linear_va(PA), 1, 0))


def test_a_range_of_its_own_tables(machine: Machine, tables: TableBuilder) -> None:
    va = machine.plan.linear + (1 << machine.plan.va_bits - 4)
    tables.map(va, 0x6000_0000, machine.plan.page_size, level=3)
    assert_only_changed(machine.call("set_memory_valid", va, 1, 0), va)
