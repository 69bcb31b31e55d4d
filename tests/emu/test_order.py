"""record="order" against a hook on every instruction, which needs none of its tricks and costs 100 times as much."""

from __future__ import annotations

import functools

import pytest

from emu.exceptions import disassemble, touches
from emu.machine import Machine
from emu.trace import Barrier, Event, Maintenance, TableWrite, barrier_name, tlbi_name
from pgtable import AccessType
from tests.kernels import kernel_image


class EveryInstruction:
    """A hook on the whole image: barriers and TLBI by their words, table writes by decoding each store.

    What a store left in memory is looked at when the next instruction comes.
    """

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.events: list[Event] = []
        self._stores: list[tuple[int, int]] = []  # (PA, PC)
        self._words = functools.cache(m.word_at)
        assert m.image
        m.cpu.on_code(self._before, m.image.base, m.image.base + m.image.size)
        m.cpu.flush_code()
        start, size = m.tables.used
        self._tables = range(start, start + size)

    def _before(self, pc: int) -> bool:
        self._finish_stores()
        word = self._words(pc)
        if word & 0xFFC00000 == 0xD5000000:  # system instructions
            name = barrier_name(word)
            if name:
                self.events.append(Barrier(name, pc))
        if word & 0xFFF80000 == 0xD5080000:  # SYS
            op1, crn, crm, op2, rt = (word >> at & mask for at, mask in ((16, 7), (12, 15), (8, 15), (5, 7), (0, 31)))
            name = tlbi_name(op1, crn, crm, op2)
            if name:
                self.events.append(Maintenance(name, self.m.argument(rt) if rt < 31 else 0, pc))
        if _stores(word):
            for part in touches(word, pc, self.m.address_register, 1):
                pa = self.m.translate(part.va).pa
                if pa in self._tables:
                    self._stores.append((pa, pc))
        return True

    def _finish_stores(self) -> None:
        self.events += [TableWrite(pa, self.m.memory.fetch(pa), pc) for pa, pc in self._stores]
        self._stores = []


@functools.cache
def _stores(word: int) -> bool:
    """The instruction is a store or an atomic."""
    if not disassemble(word, 0).partition(" ")[0].startswith(("st", "cas", "swp", "ld", "dc")):
        return False
    return any(part.access.type is not AccessType.READ for part in touches(word, 0, lambda _: 0, 1))


@pytest.mark.parametrize("pages", [4, 1024])
def test_order_equals_a_hook_on_every_instruction(machine: Machine, pages: int) -> None:
    image = machine.image
    assert image
    judge = Machine.boot(image)
    every = EveryInstruction(judge)
    va = machine.plan.linear_va(machine.plan.ram[0] + machine.plan.ram[1] // 2)
    for enable in (0, 1):
        every.events.clear()
        judge.call("set_memory_valid", va, pages, enable, timeout=60).ok()
        for attempt in range(2):  # with sites unknown, then known
            if attempt:
                machine.call("set_memory_valid", va, pages, 1 - enable).ok()
            result = machine.call("set_memory_valid", va, pages, enable, record="order").ok()
            assert result.events is not None
            assert list(result.events) == every.events
        kinds = {type(event) for event in every.events}
        skips_flush = enable and "walk_kernel_page_table_range_lockless" in image.symbols
        assert kinds == {Barrier, TableWrite} | (set() if skips_flush else {Maintenance})
        assert sum(isinstance(event, TableWrite) for event in every.events) == pages


def test_the_tlb_log_is_the_same_without_order(machine: Machine) -> None:
    va = machine.plan.linear_va(machine.plan.ram[0] + machine.plan.ram[1] // 2)
    state = machine.save()
    for enable in (0, 1):
        plain = machine.call("set_memory_valid", va, 20, enable).ok()
        machine.restore(state)
        ordered = machine.call("set_memory_valid", va, 20, enable, record="order").ok()
        machine.restore(state)
        assert plain.events is None
        assert plain.maintenance == ordered.maintenance
        assert plain.maintenance == tuple(e for e in ordered.events or () if isinstance(e, Maintenance))
        assert list(plain.changes) == list(ordered.changes)


def test_a_call_without_order_after_one_with_it_has_no_hooks_left(machine: Machine) -> None:
    va = machine.plan.linear_va(machine.plan.ram[0] + machine.plan.ram[1] // 2)
    first = machine.call("set_memory_valid", va, 4, 0, record="order").ok()
    machine.call("set_memory_valid", va, 4, 1).ok()
    assert len(machine._order.events) == len(first.events or ())  # nothing is kept of a call that did not ask
    assert machine.call("set_memory_valid", va, 4, 0, record="order").ok().events == first.events


# dsb ish; isb; b .+8; dmb ish (jumped over); dmb ishst; tlbi vmalle1; dsb sy
BARRIERS = [0xD5033B9F, 0xD5033FDF, 0x14000002, 0xD5033BBF, 0xD5033ABF, 0xD508871F, 0xD5033F9F]
EXPECTED = ["dsb ish", "isb", "dmb ishst", "tlbi vmalle1", "dsb sy"]


@pytest.mark.parametrize("el", [0, 1])
def test_the_very_first_run_of_a_machine_has_every_barrier(el: int) -> None:
    m = Machine.bare()
    words = BARRIERS if el else [w for w in BARRIERS if w != 0xD508871F]
    wanted = [e for e in EXPECTED if el or "tlbi" not in e]
    for _ in range(3):
        assert [str(e) for e in m.run(words, el=el, record="order").ok().events or ()] == wanted


def test_a_site_whose_instruction_has_changed_is_not_believed() -> None:
    m = Machine.bare()
    m.run([0xD5033B9F], record="order").ok()
    assert m.run([0xD503201F], record="order").ok().events == ()  # nop
    assert m.run([0xD5033FDF], record="order").ok().barriers == ("isb",)


def test_a_barrier_in_a_loop_counts_each_time_and_in_place() -> None:
    m = Machine.bare()
    loop = [0xD28000A1, 0xD5033FDF, 0xF1000421, 0x54FFFFC1]  # mov x1, #5; 1: isb; subs x1, x1, #1; b.ne 1b
    assert m.run(loop, record="order").ok().barriers == ("isb",) * 5


def test_a_timeout_counts_over_all_the_pieces_of_a_run() -> None:
    m = Machine.bare()
    result = m.run([0xD5033FDF, 0x17FFFFFF], record="order", timeout=0.3)  # 1: isb; b 1b
    assert result.stop
    assert result.stop.kind == "timeout"
    assert set(result.barriers) == {"isb"}


@pytest.mark.kernels
def test_writes_to_tables_that_the_call_itself_made_are_in_the_order() -> None:
    from emu.check import stub_allocator

    m = Machine.boot(kernel_image("debian:6.12"))
    stub_allocator(m)
    va = m.plan.linear + (1 << 44)
    m.tables.place(va, 1, 0)
    result = m.call("set_memory_valid", va, 1, 1, record="order").ok()
    last = {e.pa: e.value for e in result.events or () if isinstance(e, TableWrite) and e.value}
    assert last == {c.pa: c.new for c in result.changes}
