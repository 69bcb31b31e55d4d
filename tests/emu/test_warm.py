"""Machines of booted kernels: the kernel's own functions, what stops them, printing, and going back."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from emu.btf import BtfError
from emu.coldboot import BootError
from emu.image import SymbolError
from emu.machine import CallResult
from emu.warm import WarmMachine
from pgtable import Access
from pgtable.build import MapError
from pgtable.leaves import leaves
from tests.snapshots import FAST, WARM, booted

pytestmark = [pytest.mark.kernels, pytest.mark.qemu]

EACH = [pytest.param(name, marks=[] if name == FAST else pytest.mark.full) for name in WARM]
EFAULT = -14
Record = Callable[[str, object], None]


@pytest.fixture(params=EACH)
def m(request: pytest.FixtureRequest) -> WarmMachine:
    return booted(request.param).machine()


@pytest.fixture
def fast() -> WarmMachine:
    return booted(FAST).machine()


def area(m: WarmMachine, pages: int = 2) -> int:
    """Some pages from the kernel's own vmalloc()."""
    va = m.call("vmalloc", pages * m.plan.page_size).ok().value
    assert va >> 47 == 0x1FFFF
    return va


def ram(m: WarmMachine) -> np.ndarray:
    return m.memory.regions[0].words.copy()


# the kernel's functions


def test_pages_are_allocated_protected_found_and_freed(m: WarmMachine) -> None:
    page = m.plan.page_size
    va = area(m)
    assert m.call("memset", va, 0x5A, 2 * page).ok().value == va
    assert m.read(va + page - 1, 2) == b"ZZ"

    found = m.types["vm_struct"].at(m.call("find_vm_area", va).ok().value)
    assert (found["addr"], found["nr_pages"]) == (va, 2)

    ro = m.call("set_memory_ro", va, 2).ok()
    assert ro.signed == 0
    assert va in [change.va for change in ro.changes]
    assert any(event.va == va for event in ro.maintenance)
    refused = m.call("memset", va, 0, 8)
    assert refused.stop
    assert refused.stop.kind == "fault"
    assert refused.stop.message == f"EL1 write at {va:#x}: permission fault, level 3"
    assert m.call("set_memory_rw", va, 2).ok().signed == 0
    m.call("memset", va, 0, 8).ok()

    assert not m.translate(va, Access.fetch(el=1)).ok
    m.call("set_memory_x", va, 1).ok()
    assert m.translate(va, Access.fetch(el=1)).ok
    m.call("set_memory_nx", va, 1).ok()
    m.call("set_memory_valid", va, 1, 0).ok()
    assert not m.translate(va).ok
    m.call("set_memory_valid", va, 1, 1).ok()

    freed = m.call("vfree", va).ok()
    assert {int(new) for new in freed.changes.new} == {0}
    assert m.call("find_vm_area", va).ok().value == 0
    assert not m.translate(va).ok


def test_the_linear_map_is_where_the_kernel_thinks_it_is(m: WarmMachine) -> None:
    va = area(m, 1)
    pa = m.translate(va).pa
    m.write(va, b"twice")
    assert m.read(m.plan.linear_va(pa), 5) == b"twice"
    assert m.translate(m.plan.linear_va(pa)).pa == pa
    assert m.call("is_vmalloc_addr", va).ok().value == 1


def test_record_order_sees_barriers_and_table_writes(m: WarmMachine) -> None:
    va = area(m, 1)
    result = m.call("set_memory_valid", va, 1, 0, record="order").ok()
    assert result.events
    kinds = [type(event).__name__ for event in result.events]
    assert kinds.index("TableWrite") < kinds.index("Maintenance") < len(kinds) - 1
    assert "dsb ish" in result.barriers


def test_new_tables_count_as_changes(fast: WarmMachine) -> None:
    page = fast.plan.page_size
    result = fast.call("vmalloc", 600 * page).ok()
    pages = [change for change in result.changes if change.level == 3 and (change.va or 0) - result.value >= 0]
    assert len([change for change in pages if (change.va or 0) < result.value + 600 * page]) == 600
    assert {change.level for change in result.changes} <= {2, 3}


# names and arguments


def test_a_renamed_function_is_found_and_said(fast: WarmMachine) -> None:
    found = fast.resolve("vmalloc")
    assert found.found == "vmalloc_noprof"
    assert found.address == fast.symbol("vmalloc_noprof")
    assert fast.resolve("vfree").found == "vfree"
    with pytest.raises(SymbolError, match="this kernel has no symbol vmallok"):
        fast.resolve("vmallok")


def test_strings_are_put_on_the_stack(fast: WarmMachine) -> None:
    assert fast.call("strlen", "hello").ok().value == 5
    assert fast.call("strcmp", "abc", b"abd").ok().signed < 0
    assert fast.call("strlen", "").ok().value == 0
    with pytest.raises(ValueError, match="strings of more than 4096 bytes do not fit the stack"):
        fast.call("strlen", "x" * 5000)
    with pytest.raises(ValueError, match="9 arguments"):
        fast.call("strlen", *range(9))


def test_what_a_booted_kernel_has_not_is_refused(fast: WarmMachine) -> None:
    with pytest.raises(ValueError, match=r"a snippet runs on Machine\.bare"):
        fast.run([0xD503201F])
    with pytest.raises(MapError, match="the tables of a booted kernel are its own"):
        fast.tables.map(0xFFFF_9000_0000_0000, fast.plan.ram[0], fast.plan.page_size)
    with pytest.raises(ValueError, match='must be "cpu" or "model"'):
        booted(FAST).machine(mmu="none")


# stops


def stopped(result: CallResult, kind: str) -> str:
    assert result.stop, f"it returned {result.value:#x}"
    assert result.stop.kind == kind, str(result.stop)
    return result.stop.message


def test_sleeping_idling_and_panic_are_told_apart(m: WarmMachine) -> None:
    assert "__schedule() is called" in stopped(m.call("schedule"), "sleep")
    sleeping = m.call("msleep", 10)
    assert "the task would sleep" in stopped(sleeping, "sleep")
    assert sleeping.stop
    assert any(line.startswith("schedule_timeout") for line in sleeping.stop.backtrace)
    idle = m.call("cpu_do_idle")
    assert stopped(idle, "idle").startswith("WFI")
    assert idle.stop
    assert [line for line in idle.stop.disassembly if line.startswith("=>") and line.endswith("wfi")]
    assert stopped(m.call("panic", "that was %s", "it"), "panic") == "that was %s"
    assert m.call("strlen", "and it goes on").ok().value == 14


def test_a_device_and_an_interrupt_for_a_cpu_are_reported(m: WarmMachine) -> None:
    mapped = leaves(m.memory, m.registers())
    device = int(mapped.va[mapped.pa < 0x4000_0000][0])
    assert "a device at PA 0x" in stopped(m.call("strlen", device), "device")
    senders = m.snapshot.image.symbols.all("gic_ipi_send_mask")
    assert senders
    for sender in senders:
        assert "a CPU would be interrupted" in stopped(m.call(sender, 0, 0), "ipi")


def test_a_fault_names_where_it_was(fast: WarmMachine) -> None:
    result = fast.call("strlen", 0x1234)
    assert stopped(result, "fault").startswith("EL1 read at 0x1234: translation fault")
    assert result.stop
    assert result.stop.symbol.startswith("strlen+")


# printing


def test_printed_text_is_formatted_by_the_kernel(m: WarmMachine) -> None:
    before = ram(m)
    result = m.call("_printk", "\x016%s is %d, %ps\n", "it", 42, m.symbol("vfree")).ok()
    assert result.printed == ("it is 42, vfree",)
    assert result.value == len("\x016it is 42, vfree\n")
    words = np.flatnonzero(before != ram(m))
    stack = m.translate(m.plan.stack - 8).pa - m.memory.regions[0].base
    assert len(words)
    assert (np.abs(words * 8 - stack) < 16384).all()


def test_lines_in_parts_are_joined(m: WarmMachine) -> None:
    result = m.call("vmalloc", 1 << 40)
    assert result.value == 0
    assert any("vmalloc error: size 1099511627776" in line for line in result.printed)
    assert not [line for line in result.printed if line.startswith(",cpuset")]
    assert m.call("strlen", "x").printed == ()


def test_a_warning_is_found_at_its_run_time_address(m: WarmMachine) -> None:
    result = m.call("vfree", area(m) + 8)
    assert "Trying to vfree() bad address" in "\n".join(result.printed) or not result.printed
    assert result.warnings, str(result.stop)
    assert result.warnings[0].file == "mm/vmalloc.c"


# going back


def test_restore_puts_all_of_memory_back(m: WarmMachine) -> None:
    start, state = ram(m), m.save()
    va = area(m, 64)
    middle_ram, middle = ram(m), m.save()
    m.call("memset", va, 1, 64 * m.plan.page_size).ok()
    m.call("vfree", va).ok()
    m.restore(middle)
    assert np.array_equal(ram(m), middle_ram)
    assert m.call("find_vm_area", va).ok().value
    m.restore(state)
    assert np.array_equal(ram(m), start)
    assert m.call("find_vm_area", va).ok().value == 0
    assert area(m, 64) == va


def test_code_that_was_changed_is_run_as_it_was_after_a_restore(fast: WarmMachine) -> None:
    state = fast.save()
    assert fast.call("strlen", "hello").ok().value == 5
    fast.write(fast.symbol("strlen"), b"".join(w.to_bytes(4, "little") for w in (0xD28000E0, 0xD65F03C0)))
    assert fast.call("strlen", "hello").ok().value == 7
    fast.restore(state)
    assert fast.call("strlen", "hello").ok().value == 5


def test_code_that_the_kernel_patched_is_run_as_it_was_after_a_restore(m: WarmMachine) -> None:
    state, target = m.save(), m.symbol("strlen")
    assert m.call("strlen", "hello").ok().value == 5
    for i, word in enumerate((0xD28000E0, 0xD65F03C0)):
        assert m.call("aarch64_insn_patch_text_nosync", target + 4 * i, word).ok().signed == 0
    assert m.call("strlen", "hello").ok().value == 7
    m.restore(state)
    assert m.call("strlen", "hello").ok().value == 5


def test_what_the_tlb_held_is_gone_after_a_restore(fast: WarmMachine) -> None:
    va = area(fast)
    fast.call("set_memory_valid", va, 1, 0).ok()
    state = fast.save()
    fast.call("set_memory_valid", va, 1, 1).ok()
    fast.call("memset", va, 0, 8, record="events").ok()
    fast.restore(state)
    stopped(fast.call("memset", va, 0, 8, record="events"), "fault")


def test_a_state_after_a_stop_can_be_left(fast: WarmMachine) -> None:
    state, before = fast.save(), ram(fast)
    stopped(fast.call("mutex_lock", fast.call("vzalloc", 4096).ok().value + (1 << 40)), "fault")
    stopped(fast.call("schedule"), "sleep")
    fast.restore(state)
    assert np.array_equal(ram(fast), before)
    assert area(fast)


def test_restoring_and_calling_again_is_quick(fast: WarmMachine, record_property: Record) -> None:
    page = fast.plan.linear_va(fast.translate(area(fast, 1)).pa)
    fast = booted(FAST).machine()
    state, before = fast.save(), ram(fast)

    def once() -> None:
        fast.restore(state)
        fast.call("set_memory_valid", page, 1, 0, record="nothing").ok()

    once()
    start = time.process_time()
    for _ in range(500):
        once()
    rate = 500 / (time.process_time() - start)
    record_property("restore and call", f"{rate:.0f} a second")
    assert not fast.translate(page).ok
    fast.restore(state)
    assert np.array_equal(ram(fast), before)
    assert rate > 800  # some thousands where nothing else runs


# the model's MMU


def test_on_the_models_mmu_the_kernel_handles_its_own_faults(m: WarmMachine) -> None:
    model = m.snapshot.machine(mmu="model", vectors=True)
    va = area(model, 1)
    assert model.call("copy_from_kernel_nofault", model.plan.stack - 512, va, 8).ok().signed == 0
    model.call("set_memory_valid", va, 1, 0).ok()
    assert model.call("copy_from_kernel_nofault", model.plan.stack - 512, va, 8).ok().signed == EFAULT
    crashed = model.call("strlen", 0x1234)
    assert crashed.printed[0].startswith("Unable to handle kernel")
    assert "0000000000001234" in crashed.printed[0]
    stopped(crashed, "panic")


@pytest.mark.full
def test_a_kernel_with_52_bit_addresses_needs_the_models_mmu() -> None:
    snapshot = booted(FAST, cpu="max")
    with pytest.raises(BootError, match="has LPA2 tables, which Unicorn's MMU has not"):
        snapshot.machine()
    m = snapshot.machine(mmu="model")
    va = area(m)
    result = m.call("set_memory_ro", va, 2).ok()
    assert "RVAALE1IS" in {event.operation for event in result.maintenance}
    m.call("vfree", va).ok()


# types


def test_a_structure_is_read_by_its_btf(fast: WarmMachine) -> None:
    task = fast.types["task_struct"].at(fast.plan.task)
    text = str(task)
    assert "  comm = 'init'" in text
    assert task["pid"] == 1
    assert task["prio"] == 120
    assert "struct task_struct at 0x" in text
    mm = fast.types["mm_struct"].at(fast.symbol("init_mm"))
    assert fast.translate(int(mm["pgd"])).pa == fast.tables.root  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="task_struct has no member nonsense"):
        _ = task["nonsense"]
    with pytest.raises(BtfError, match="no type nonsense"):
        _ = fast.types["nonsense"]


def test_bit_fields_enums_arrays_and_pointers_are_shown_by_type(fast: WarmMachine) -> None:
    va = area(fast)
    fast.write(va, bytes(range(1, 256)) * 8)
    value, at = fast.types["vm_struct"].at(va), fast.types.btf.offset("vm_struct", "size")
    assert value["size"] == int.from_bytes(bytes(range(at + 1, at + 9)), "little")
    page, at = fast.types["page"].at(va), fast.types.btf.offset("page", "mapping")  # in a structure in a union
    assert page["mapping"] == int.from_bytes(bytes(range(at + 1, at + 9)), "little")
    returned = fast.types.returned("find_vm_area")
    assert returned
    assert returned.name == "vm_struct"
    assert fast.types.returned("vfree") is None
    assert fast.types.returned("nonsense") is None
    fops = fast.types["mm_walk_ops"].at(va)
    fast.write(va, fast.symbol("vfree").to_bytes(8, "little"))
    assert "pgd_entry = " in str(fops)
    assert "(vfree)" in str(fast.types["mm_walk_ops"].at(va))
