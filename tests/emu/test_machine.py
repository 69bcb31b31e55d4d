"""emu.machine and emu.engine: what a call reports, what stops it, and that nothing lingers afterwards."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable

import numpy as np
import pytest

from emu import snippets
from emu.check import stub_allocator
from emu.coldboot import BootError
from emu.engine import Cpu
from emu.image import KernelImage, SymbolError
from emu.machine import Machine
from emu.watchdog import Watchdog
from pgtable import Access, Granule, PhysicalMemory, at
from pgtable.registers import PAR_OK
from tests.kernels import KERNELS, MORE, kernel_image, kernel_path

LOOP = [0x14000000]  # b .
UDF, BRK = 0x00000000, 0xD4200000  # udf #0, brk #0
RET = 0xD65F03C0
MOV_X0_7 = 0xD28000E0
EINVAL = -22


def code(name: str) -> bytes:
    return bytes(snippets.load(name))


def middle(m: Machine) -> int:
    """The linear address of the middle of RAM: pages that nothing else uses."""
    return m.plan.linear_va(m.plan.ram[0] + m.plan.ram[1] // 2)


def words(m: Machine) -> np.ndarray:
    """A copy of all RAM."""
    return m.memory.words(m.plan.ram[0], m.plan.ram[1] // 8).copy()


@pytest.fixture
def bare() -> Machine:
    return Machine.bare()


# cold boot

EVERY = [pytest.param(name, marks=pytest.mark.kernels, id=name) for name in (*KERNELS, *MORE)]


@pytest.mark.parametrize("name", EVERY)
def test_every_kernel_boots_cold_and_runs_its_own_functions(name: str) -> None:
    image = kernel_image(name)
    m = Machine.boot(image)
    plan = m.plan
    assert m.read(image.base, 0x1000) == image.bytes_at(image.base, 0x1000)
    assert m.translate(image.base).pa == plan.ram[0]
    assert m.translate(plan.linear).pa == plan.ram[0]
    m.write(plan.spare, b"page tables\0")
    assert m.call("strlen", plan.spare).ok().value == 11
    assert m.call("vmalloc_to_page", plan.window).ok().value == m.struct_page(plan.window_pa)

    off = m.call("set_memory_valid", middle(m), 3, 0).ok()
    assert (off.value, len(off.changes), off.warnings) == (0, 3, ())
    assert [c.va for c in off.changes] == [middle(m) + i * plan.page_size for i in range(3)]
    assert all(c.level == 3 and c.fields["VALID"] == (1, 0) for c in off.changes)
    on = m.call("set_memory_valid", middle(m), 3, 1).ok()
    assert on.changes.new.tolist() == off.changes.old.tolist()


@pytest.mark.kernels
def test_a_second_boot_of_a_kernel_takes_milliseconds() -> None:
    image = kernel_image(KERNELS[0])
    Machine.boot(image)
    began = time.process_time()
    for _ in range(5):
        Machine.boot(image)
    assert (time.process_time() - began) / 5 < 0.1


def _files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.kernels
def test_an_image_that_is_gone_takes_its_cold_boots_with_it() -> None:
    before = _files()
    images: weakref.WeakSet[KernelImage] = weakref.WeakSet()
    for _ in range(3):
        image = KernelImage.load(kernel_path(KERNELS[0]))
        images.add(image)
        Machine.boot(image)
    assert _files() > before
    del image
    end = time.monotonic() + 10
    while images and time.monotonic() < end:  # a watchdog keeps its machine until it has been idle for a second
        time.sleep(0.1)
        gc.collect()
    assert len(images) == 0
    assert _files() <= before


@pytest.mark.kernels
def test_a_machine_outlives_its_image() -> None:
    m = Machine.boot(KernelImage.load(kernel_path(KERNELS[0])))
    gc.collect()
    m.write(m.plan.spare, b"still here\0")
    assert m.call("strlen", m.plan.spare).ok().value == 10


@pytest.mark.kernels
def test_a_boot_that_cannot_be_says_what_is_wrong() -> None:
    image = kernel_image("debian:6.12")
    with pytest.raises(BootError, match="runs with 48 or 52 VA bits, not 39"):
        Machine.boot(image, va_bits=39)
    with pytest.raises(BootError, match="52 VA bits need FEAT_LPA2"):
        Machine.boot(image, va_bits=52)
    with pytest.raises(BootError, match=r"ram 0x1000: must be a multiple of 0x200000 and at least 0x"):
        Machine.boot(image, ram=4096)
    with pytest.raises(BootError, match="52 VA bits need FEAT_LPA2"):
        Machine.bare(va_bits=52)
    with pytest.raises(BootError, match=r"ram 0x300000: must be a multiple of 0x200000"):
        Machine.bare(ram=3 << 20)


# a call that the caller got wrong


def test_a_wrong_call_is_refused_before_anything_runs(machine: Machine) -> None:
    with pytest.raises(SymbolError, match="no symbol set_memory_walid"):
        machine.call("set_memory_walid")
    with pytest.raises(SymbolError, match=r"gic_handle_irq stands for 2 addresses: 0xffff\w+, 0xffff\w+") as caught:
        machine.call("gic_handle_irq")
    assert len(caught.value.addresses) == 2
    with pytest.raises(ValueError, match="9 arguments: a call passes at most 8"):
        machine.call("strlen", *range(9))
    with pytest.raises(ValueError, match="record='everything': must be 'changes', 'order', 'events' or 'nothing'"):
        machine.call("strlen", machine.plan.spare, record="everything")
    with pytest.raises(ValueError, match="blocks=0: must be more than 0"):
        machine.call("strlen", machine.plan.spare, blocks=0)


def test_a_machine_without_a_kernel_has_no_symbols(bare: Machine) -> None:
    with pytest.raises(ValueError, match="strlen: a machine without a kernel has no symbols"):
        bare.call("strlen")
    with pytest.raises(ValueError, match="no struct pages"):
        bare.struct_page(bare.plan.ram[0])


def test_arguments_arrive_in_x0_to_x7_and_the_value_both_ways(bare: Machine) -> None:
    result = bare.run([UDF], *range(10, 18))
    assert result.x[:8] == tuple(range(10, 18))
    assert bare.run([0x92800000]).signed == -1  # mov x0, #-1
    assert bare.run([0x92800000]).value == (1 << 64) - 1
    assert bare.run([0x128002A0]).signed == EINVAL  # mov w0, #-22
    assert bare.run([0x128002A0]).value == 0xFFFFFFEA


def test_barriers_without_order_are_an_error_not_an_empty_list(bare: Machine) -> None:
    with pytest.raises(ValueError, match='record="order"'):
        _ = bare.run([RET]).barriers


def test_ok_raises_with_the_report_of_the_stop(bare: Machine) -> None:
    assert bare.run([RET]).ok().stop is None
    with pytest.raises(RuntimeError, match="undefined instruction"):
        bare.run([UDF]).ok()


# what ends a call that does not return


@pytest.mark.parametrize("limit", [0.0, 0.3])
def test_the_timeout_ends_an_endless_loop_in_time(bare: Machine, limit: float) -> None:
    began = time.thread_time()
    result = bare.run(LOOP, timeout=limit)
    assert time.thread_time() - began < limit + 1
    assert result.stop
    assert (result.stop.kind, result.stop.pc) == ("timeout", bare.plan.code)
    assert bare.run([MOV_X0_7]).ok().value == 7


def test_a_machine_that_stands_still_ends_no_call(bare: Machine) -> None:
    bare.cpu.on_code(lambda _: time.sleep(0.5) or True, bare.plan.code, bare.plan.code)
    assert bare.run([MOV_X0_7, *[0xD503201F] * 8], timeout=0.2).ok().value == 7


def test_the_watchdog_stops_again_until_it_is_heard() -> None:
    calls: list[float] = []
    dog = Watchdog(lambda: calls.append(time.monotonic()))
    dog.arm(0.0)
    time.sleep(10 * Watchdog.POLL)
    assert dog.disarm()
    count = len(calls)
    assert count > 1
    time.sleep(5 * Watchdog.POLL)
    assert len(calls) == count


def test_the_block_budget_ends_an_endless_loop(bare: Machine) -> None:
    result = bare.run(LOOP, blocks=1000)
    assert result.stop
    assert (result.stop.kind, result.stop.message) == ("budget", "1000 basic blocks ran without an end")
    assert bare.run([MOV_X0_7], blocks=1000).ok().value == 7


@pytest.mark.parametrize("record", ["changes", "order", "nothing"])
def test_an_undefined_instruction_stops_whatever_is_recorded(bare: Machine, record: str) -> None:
    stop = bare.run([MOV_X0_7, UDF, RET], record=record).stop
    assert stop
    assert (stop.kind, stop.pc) == ("undefined", bare.plan.code + 4)
    assert [line[:2] for line in stop.disassembly] == ["  ", "=>", "  "]
    assert "udf #0" in stop.disassembly[1]
    assert stop.backtrace == ()


def test_a_brk_that_is_no_bug_stops(bare: Machine) -> None:
    stop = bare.run([BRK]).stop
    assert stop
    assert (stop.kind, stop.message) == ("exception", "brk #0x0")


def test_a_system_call_stops_at_the_instruction_that_made_it(bare: Machine) -> None:
    for el in (0, 1):
        stop = bare.run(code("svc"), el=el).stop
        assert stop
        assert (stop.kind, stop.message) == ("exception", "svc #0x2a")
        assert stop.pc == (bare.plan.code if el else bare.plan.user_code)


def test_a_snippet_leaves_nothing_behind_for_the_next(bare: Machine) -> None:
    bare.run([MOV_X0_7] * 8)
    stop = bare.run([UDF]).stop
    assert stop
    assert len(stop.disassembly) == 1


# errors in Python


class MyError(Exception):
    pass


def test_an_error_in_a_stub_comes_out_as_itself_and_the_machine_goes_on(machine: Machine) -> None:
    m = machine
    m.stub("strlen", lambda _: 1 // 0)
    for record in ("changes", "order", "nothing"):
        with pytest.raises(ZeroDivisionError):
            m.call("strlen", m.plan.spare, record=record)
    assert m.call("set_memory_valid", middle(m), 2, 0).ok().value == 0
    m.stub("strlen", lambda machine: machine.argument(0) + 1)
    assert m.call("strlen", 41).ok().value == 42


@pytest.mark.parametrize("error", [MyError, KeyboardInterrupt, SystemExit])
def test_an_error_in_a_hook_comes_out_as_itself(bare: Machine, error: type[BaseException]) -> None:
    def hook(*_: object) -> bool:
        raise error

    handle = bare.cpu.on_block(hook)
    bare.cpu.flush_code()
    with pytest.raises(error):
        bare.run(LOOP)
    bare.cpu.remove(handle)
    bare.cpu.flush_code()
    assert bare.run([MOV_X0_7]).ok().value == 7


@pytest.mark.parametrize("hook", ["on_new_block", "on_system", "on_interrupt", "on_block"])
def test_an_error_in_any_kind_of_hook_comes_out_as_itself(hook: str) -> None:
    memory = PhysicalMemory((0x4000_0000, 0x10000))
    memory.write(0x4000_1000, b"".join(w.to_bytes(4, "little") for w in (0xD508871F, BRK, 0x14000000)))  # tlbi vmalle1

    def raising(*_: object) -> bool:
        raise MyError

    cpu = Cpu(memory)
    getattr(cpu, hook)(raising)
    for _ in range(2):
        with pytest.raises(MyError):
            cpu.run(0x4000_1000, 0x4000_1010, timeout=5)
        cpu.flush_code()


def test_a_stub_that_gives_nothing_leaves_x0_alone(machine: Machine) -> None:
    seen: list[int] = []
    machine.stub("strlen", lambda m: seen.append(m.argument(1)))
    assert machine.call("strlen", 5, 6).ok().value == 5
    assert seen == [6]


# WARN and BUG


def test_a_warn_is_recorded_with_its_line_and_the_call_goes_on(machine: Machine) -> None:
    m = machine
    m.tables.map(m.plan.linear + (1 << 44), 0x4000_0000, 2 << 20, level=2, AF=1, UXN=1)
    first = m.call("set_memory_valid", m.plan.linear + (1 << 44), 1, 0).ok()
    again = m.call("set_memory_valid", m.plan.linear + (1 << 44), 1, 0).ok()
    assert first.signed == again.signed == EINVAL
    (warn,), (repeat,) = first.warnings, again.warnings
    assert warn.file in ("mm/memory.c", "arch/arm64/mm/pageattr.c")
    assert warn.line > 0
    assert warn.site.startswith(("__apply_to_page_range+0x", "pageattr_pmd_entry+0x"))
    assert str(warn) == f"WARN at {warn.site}, {warn.file}:{warn.line} (once)"
    assert warn.once
    assert not warn.repeat
    assert repeat == warn._replace(repeat=True)
    assert "(again, once)" in str(repeat)


@pytest.mark.kernels
def test_a_warn_that_is_not_once_never_is_a_repeat() -> None:
    m = Machine.boot(kernel_image("debian:6.12"))
    for _ in range(2):
        (warn,) = m.call("set_memory_valid", middle(m), 0, 1).ok().warnings
        assert (warn.once, warn.repeat) == (False, False)


def test_restore_forgets_the_warnings_that_came_after_save(machine: Machine) -> None:
    m = machine
    m.tables.map(m.plan.linear + (1 << 44), 0x4000_0000, 2 << 20, level=2, AF=1, UXN=1)
    state = m.save()
    for _ in range(2):
        assert not m.call("set_memory_valid", m.plan.linear + (1 << 44), 1, 0).warnings[0].repeat
        m.restore(state)


def test_a_bug_stops(machine: Machine) -> None:
    assert machine.image
    bugs = machine.image.bugs
    sites = [machine.image.base + int(offset) for offset in bugs.rows[:, 0]]
    site = next(at for at in sites if (bug := bugs.get(at)) and not bug.warn)
    result = machine.call(site)
    bug = bugs.get(site)
    assert bug
    assert result.stop
    assert (result.stop.kind, result.stop.pc) == ("bug", site)
    assert result.stop.message == f"BUG at {bug.file}:{bug.line}"
    assert result.warnings == ()


# faults


def test_a_fault_names_the_walk_the_instruction_and_who_called(machine: Machine) -> None:
    m = machine
    page_table = 0x7000_0000  # where no RAM is
    va = m.plan.linear + (1 << 44)
    m.tables.place(va, 2, page_table | 3)
    stop = m.call("set_memory_valid", va, 1, 0).stop
    assert stop
    assert stop.kind == "fault"
    assert stop.walk
    assert stop.walk.fault
    assert stop.walk.va == m.plan.linear_va(page_table)
    assert f"at {stop.walk.va:#x}: translation fault, level {stop.walk.fault.level}" in stop.message
    assert "because VALID (bit 0) is 0" in str(stop.walk)
    (marked,) = [line for line in stop.disassembly if line.startswith("=>")]
    assert marked == f"=> {stop.symbol}: {marked.partition(': ')[2]}"
    assert marked.partition(": ")[2].startswith("ldr x")
    assert len(stop.disassembly) == 8
    assert stop.symbol.startswith(("change_page_range+0x", "pageattr_pte_entry+0x"))
    assert [line.partition("+")[0] for line in stop.backtrace][-1] == "set_memory_valid"
    text = str(stop)
    assert all(part in text for part in ("fault: EL1 read", "L0 ", "=> ", "  called from set_memory_valid+0x"))


@pytest.mark.parametrize(("function", "access"), [("strlen", "read"), ("memset", "write")])
def test_a_bad_pointer_is_a_fault_with_its_address(machine: Machine, function: str, access: str) -> None:
    bad = machine.plan.spare + (1 << 30)
    stop = machine.call(function, bad, 0, 64).stop
    assert stop
    assert stop.message.startswith(f"EL1 {access} at {bad:#x}: translation fault, level ")
    assert machine.call("strlen", 0xDEAD << 48).stop


@pytest.mark.parametrize(
    ("snippet", "va", "el", "said"),
    [
        ("load", "unmapped", 1, "EL1 read at {va:#x}: translation fault, level 3"),
        ("store", "unmapped", 1, "EL1 write at {va:#x}: translation fault, level 3"),
        ("store", "read_only", 1, "EL1 write at {va:#x}: permission fault, level 3"),
        ("load", "no_access_flag", 1, "EL1 read at {va:#x}: access flag fault, level 3"),
        ("fetch", "spare", 1, "instruction fetch from {va:#x}: permission fault, level 3"),
        ("fetch", "unmapped", 1, "instruction fetch from {va:#x}: translation fault, level 3"),
        ("load", "spare", 0, "EL0 read at {va:#x}: permission fault, level 3"),
        ("store", "user_code", 0, "EL0 write at {va:#x}: permission fault, level 3"),
        ("fetch", "user_data", 0, "instruction fetch from {va:#x}: permission fault, level 3"),
        ("load", "low", 0, "EL0 read at {va:#x}: translation fault, level 3"),
        ("misaligned", "last", 1, "EL1 read at {next:#x}: translation fault, level 3"),
    ],
)
def test_each_refused_access_says_which_level_and_why(bare: Machine, snippet: str, va: str, el: int, said: str) -> None:
    plan, page = bare.plan, bare.plan.page_size
    where = {
        "spare": plan.spare,
        "unmapped": plan.spare + page,
        "read_only": plan.spare + 2 * page,
        "no_access_flag": plan.spare + 3 * page,
        "last": plan.spare + page - 8,
        "user_code": plan.user_code,
        "user_data": plan.user_data,
        "low": plan.user_code + page,
    }
    bare.tables.unmap(plan.spare + page, page)
    bare.tables.protect(plan.spare + 2 * page, page, AP=2)
    bare.tables.protect(plan.spare + 3 * page, page, AF=0)
    stop = bare.run(code(snippet), where[va], el=el).stop
    assert stop
    assert stop.kind == "fault"
    assert stop.message == said.format(va=where[va], next=plan.spare + page)
    assert stop.walk
    assert str(stop.walk.result) in stop.message
    assert bare.cpu.el == 1


def test_an_access_beyond_ram_is_an_external_abort(bare: Machine) -> None:
    va = bare.plan.linear + (1 << 40)
    bare.tables.map(va, 0x9000_0000, bare.plan.page_size, UXN=1, PXN=0)
    for snippet, access in (("load", "read"), ("store", "write"), ("fetch", "fetch")):
        stop = bare.run(code(snippet), va).stop
        assert stop
        assert (stop.kind, stop.message) == (
            "fault",
            f"EL1 {access} at {va:#x}: external abort, no RAM at 0x90000000",
        )
    bare.tables.place(va + (2 << 20), 2, 0x9000_0003)
    stop = bare.run(code("load"), va + (2 << 20)).stop
    assert stop
    assert "external abort on the walk, level 3" in stop.message


def test_a_fault_after_a_barrier_in_the_same_block_is_reported_once(bare: Machine) -> None:
    result = bare.run([0xD5033B9F, 0xF9400000], 8, record="order")  # dsb ish; ldr x0, [x0]
    assert result.barriers == ("dsb ish",)
    assert result.stop
    assert result.stop.kind == "fault"


# TLB

# ldr x3, [x0] fills the TLB; then VALID of the descriptor at [x1] is cleared.
CLEAR = [0xF9400003, 0xF9400024, 0x927FF884, 0xF9000024, 0xD5033A9F]
TLBI = [0xD50883E5]  # tlbi vaale1is, x5
LOAD_AGAIN = [0xD5033B9F, 0xD5033FDF, 0xF9400000]


def _page(m: Machine) -> tuple[int, int]:
    """A page's VA, and the VA of its descriptor."""
    va = middle(m)
    m.memory.store(m.plan.linear_pa(va), 0x1234)
    return va, m.plan.linear_va(m.tables.slot(va).pa)


def test_without_tlbi_the_old_translation_is_still_used(bare: Machine) -> None:
    va, descriptor = _page(bare)
    result = bare.run(CLEAR + LOAD_AGAIN, va, descriptor).ok()
    assert result.value == 0x1234
    (change,) = result.changes
    assert change.fields == {"VALID": (1, 0)}
    assert not bare.translate(va).ok
    assert bare.run(code("load"), va).ok().value == 0x1234  # the next run has the same TLB


def test_with_tlbi_the_load_faults(bare: Machine) -> None:
    va, descriptor = _page(bare)
    result = bare.run(CLEAR + TLBI + LOAD_AGAIN, va, descriptor, 0, 0, 0, va >> 12 & (1 << 44) - 1)
    (maintenance,) = result.maintenance
    assert (maintenance.operation, maintenance.va) == ("VAALE1IS", va)
    assert result.stop
    assert result.stop.message == f"EL1 read at {va:#x}: translation fault, level 3"


@pytest.mark.parametrize("record", ["changes", "order", "nothing"])
def test_what_python_changes_between_runs_is_seen_at_once(bare: Machine, record: str) -> None:
    va, descriptor = _page(bare)
    pa = bare.plan.linear_pa(descriptor)
    valid = bare.memory.fetch(pa)
    for _ in range(2):
        assert bare.run(code("load"), va, record=record).ok().value == 0x1234
        bare.memory.store(pa, valid & ~1)
        assert bare.run(code("load"), va, record=record).stop
        bare.memory.store(pa, valid)


def test_a_page_table_taken_by_python_is_seen_too(bare: Machine) -> None:
    va = bare.plan.linear + (1 << 40)
    assert bare.run(code("load"), va).stop
    bare.tables.map(va, bare.plan.ram[0], bare.plan.page_size, AF=1, UXN=1)
    bare.run(code("load"), va).ok()


def test_instructions_written_by_python_are_run(machine: Machine) -> None:
    m = machine
    m.write(m.plan.spare, b"four\0")
    assert m.call("strlen", m.plan.spare).value == 4
    state = m.save()
    m.write(m.symbol("strlen"), b"".join(word.to_bytes(4, "little") for word in (MOV_X0_7, RET)))
    assert m.call("strlen", m.plan.spare).value == 7
    m.restore(state)
    assert m.call("strlen", m.plan.spare).value == 4


# translate() against Unicorn's own MMU

GRANULES = [
    pytest.param(lambda: Machine.bare(), id="4K"),
    pytest.param(lambda: Machine.bare(va_bits=39), id="4K, 39 bits"),
    pytest.param(lambda: Machine.bare(granule=Granule.K16, va_bits=47), id="16K"),
    pytest.param(lambda: Machine.bare(granule=Granule.K64, va_bits=42), id="64K"),
    *(
        pytest.param(lambda name=name: Machine.boot(kernel_image(name)), marks=pytest.mark.kernels, id=name)
        for name in KERNELS
    ),
]


@pytest.mark.parametrize("make", GRANULES)
def test_translate_says_what_the_at_instruction_of_unicorn_says(make: Callable[[], Machine]) -> None:
    m = make()
    plan, tables, size = m.plan, m.tables, m.tables.granule.level_size
    base, block, page = plan.linear + (1 << plan.va_bits - 3), size(2), plan.page_size
    tables.map(base, block * 8, block, level=2, AF=1, AP=2)
    tables.map(base + block, block * 9, 2 * page, level=3, AF=0)
    tables.map(base + 2 * block, block * 10, 2 * page, level=3, AF=1, AP=3, AttrIndx=3)
    tables.map(base + 3 * block, block * 11, page, level=3, AF=1, AP=1, AttrIndx=2, SH=2)
    vas = [
        *(plan.linear, plan.linear + 0x12345, plan.window, plan.stack - 8, plan.stack - 17 * page, plan.code),
        *(plan.user_code, plan.user_data + 8, plan.user_code - page, 0, 1 << 47, plan.linear - 8, (1 << 64) - 8),
        *(base, base + block - 8, base + block, base + block + 3 * page, base + 2 * block, base + 3 * block),
        0xDEAD << 48,
    ]
    for va in vas:
        result = m.run(code("at"), va).ok()
        regs = m.registers()
        for real, operation in ((result.value, "S1E1R"), (result.x[1], "S1E0W")):
            said = at(m.memory, regs, operation, va)
            assert f"{va:#x} {_judged(real):#x}" == f"{va:#x} {_judged(said):#x}"
        walk = m.translate(va, Access.read(el=1))
        assert walk.ok == (not result.value & 1)


def _judged(par: int) -> int:
    """PAR_EL1 without what Unicorn's answer has differently: it is in Secure state (SCR_EL3.NS = 0), the model's
    registers are not; and it gives the descriptor's SH for Device and Non-cacheable memory, where the Arm ARM says
    Outer Shareable (pseudocode EncodePARAttrs: PAR_EL1.SH is the effective shareability)."""
    if par & 1:
        return par
    forced = PAR_OK["ATTR"].get(par) in (0x00, 0x44)
    return par & ~PAR_OK.mask("NS", *(["SH"] if forced else []))


# state


def test_restore_puts_every_word_and_register_back(machine: Machine) -> None:
    m = machine
    stub_allocator(m)
    before, state = words(m), m.save()
    m.call("set_memory_valid", middle(m), 600, 0).ok()
    m.run(code("store"), m.plan.spare, 0x55).ok()
    m.tables.map(m.plan.linear + (1 << 44), 0x4000_0000, 4096)
    m.give_page()
    m.cpu["TTBR0_EL1"] = 0x1234000
    assert (words(m) != before).any()

    m.restore(state)
    assert (words(m) == before).all()
    assert m.save().registers == state.registers
    assert m.save().system == state.system
    m.tables.map(m.plan.linear + (1 << 44), 0x4000_0000, 4096)  # the pool page is free again
    assert m.call("set_memory_valid", middle(m), 2, 0).ok().changes[0].fields["VALID"] == (1, 0)


def test_two_machines_of_one_image_do_not_see_each_other(machine: Machine) -> None:
    other = Machine.boot(machine.image) if machine.image else Machine.bare()
    before = words(other)
    machine.call("set_memory_valid", middle(machine), 4, 0).ok()
    machine.write(machine.plan.spare, b"mine")
    assert (words(other) == before).all()
    assert other.translate(middle(machine)).ok
    other.run(code("load"), middle(machine)).ok()
    assert machine.run(code("load"), middle(machine)).stop


def test_pages_are_given_once_zeroed_and_have_struct_pages(machine: Machine) -> None:
    m = machine
    first, second = m.give_page(), m.give_page()
    assert second == first + m.plan.page_size
    assert m.plan.pages[0] <= first < sum(m.plan.pages)
    assert not m.memory.words(first, m.plan.page_size // 8).any()
    assert m.struct_page(second) == m.struct_page(first) + 64
    assert m.translate(m.struct_page(first)).ok
    virtual = m.call("vmalloc_to_page", m.plan.window).ok().value
    assert virtual == m.struct_page(m.plan.window_pa)


def test_the_page_pool_ends_with_an_error(bare: Machine) -> None:
    given = [bare.give_page() for _ in range(256)]
    assert len(set(given)) == 256
    with pytest.raises(MemoryError, match="page pool of 0x100000 bytes is empty"):
        bare.give_page()


def test_pages_given_to_the_kernel_are_found_as_its_tables(machine: Machine) -> None:
    m = machine
    stub_allocator(m)
    va = m.plan.linear + (1 << 44)
    m.tables.place(va, 1, 0)
    result = m.call("set_memory_valid", va, 2, 1).ok()
    made = [c for c in result.changes if c.level is not None and c.level < 3]
    if m.image and "walk_kernel_page_table_range_lockless" in m.image.symbols:
        assert len(result.changes) == 0  # 7.x skips holes
    else:
        assert sorted(c.level or 0 for c in made) == [1, 2]
        assert [c.va for c in result.changes if c.level == 3] == [va, va + 4096]


# snippets


def test_a_snippet_must_be_whole_instructions_that_fit_a_page(bare: Machine) -> None:
    limit = bare.plan.page_size - 8
    for bad in (b"", b"\0\0\0", bytes(limit + 4)):
        with pytest.raises(
            ValueError, match=rf"snippet of {len(bad)} bytes: must be whole instructions, at most {limit}"
        ):
            bare.run(bad)
    nop = (0xD503201F).to_bytes(4, "little")
    assert bare.run(nop * (limit // 4)).ok()
    assert bare.run(nop * (limit // 4), el=0).ok()
    for el in (2, 3, -1):
        with pytest.raises(ValueError, match=f"el {el}: a snippet runs at EL0 or EL1"):
            bare.run(nop, el=el)


@pytest.mark.parametrize("el", [0, 1])
def test_a_snippet_ends_at_its_end_or_by_ret(bare: Machine, el: int) -> None:
    assert bare.run([MOV_X0_7], el=el).ok().value == 7
    assert bare.run([MOV_X0_7, RET, UDF], el=el).ok().value == 7
    current = bare.run([0xD5384240], el=1).ok().value  # mrs x0, CurrentEL
    assert current >> 2 == 1
    assert bare.run([0xD5384240], el=0).stop  # undefined at EL0


def test_el0_has_its_own_stack_and_memory(bare: Machine) -> None:
    plan = bare.plan
    assert bare.run([0x910003E0], el=0).ok().value == plan.user_stack  # mov x0, sp
    assert bare.run([0x910003E0], el=1).ok().value == plan.stack
    bare.run(code("store"), plan.user_data, 77, el=0).ok()
    assert bare.memory.fetch(plan.user_data_pa) == 77
    bare.run([0xF81F0FE0], el=0).ok()  # str x0, [sp, #-16]!


@pytest.mark.parametrize("el", [0, 1])
def test_the_guard_page_below_the_stack_is_not_mapped(bare: Machine, el: int) -> None:
    assert not bare.translate(bare.plan.stack - 17 * bare.plan.page_size).ok
    assert not bare.translate(bare.plan.user_data - 8, Access.write(el=0)).ok


def test_read_and_write_cross_pages_and_refuse_what_is_not_mapped(bare: Machine) -> None:
    va = bare.plan.spare + bare.plan.page_size - 3
    bare.write(va, b"abcdef")
    assert bare.read(va, 6) == b"abcdef"
    assert bare.word_at(va, 4) == int.from_bytes(b"abcd", "little")
    with pytest.raises(ValueError, match=r"VA 0x8: translation fault, level 2"):
        bare.read(8, 1)
