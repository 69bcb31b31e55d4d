"""Several CPUs over one memory: what they share, TLB maintenance between them, exclusives and atomics."""

from __future__ import annotations

import pytest

from emu.cpus import MOST_COLD, is_store_exclusive, more_cpus
from emu.machine import Machine
from emu.race import Race, RaceResult, call
from tests.snapshots import booted

RET = 0xD65F03C0
PLAIN = (0xF9400001, 0x91000421, 0xF9000001, RET)  # ldr x1, [x0]; add x1, x1, #1; str x1, [x0]
EXCLUSIVE = (0xC85F7C01, 0x91000421, 0xC8027C01, 0x35FFFFA2, RET)  # 1: ldxr; add; stxr w2, x1, [x0]; cbnz w2, 1b
LSE = (0xD2800021, 0xF8210002, RET)  # mov x1, #1; ldadd x1, x2, [x0]
STORE = (0xF9000001, RET)  # str x1, [x0]
LOAD = (0xF9400000, RET)


def code(machine: Machine, *snippets: tuple[int, ...]) -> list[int]:
    """Where each snippet is, in the page that EL1 may execute."""
    found, at = [], machine.plan.code_pa
    for words in snippets:
        machine.memory.write(at, b"".join(word.to_bytes(4, "little") for word in words))
        found.append(at - machine.plan.code_pa + machine.plan.code)
        at += 4 * len(words)
    return found


def word_pa(machine: Machine) -> int:
    return machine.translate(machine.plan.spare).pa


def counted(snippet: tuple[int, ...]) -> RaceResult:
    """Two CPUs that add one to a word, in all interleavings."""
    machine = Machine.bare()
    (add,) = code(machine, snippet)
    va = machine.plan.spare
    return Race(machine, (call("A", add, va), call("B", add, va)), [(word_pa(machine), 8)]).explore(None)


def final(result: RaceResult) -> set[int]:
    return {int(outcome.tables.max()) for outcome, _ in result.outcomes}


def test_a_plain_increment_loses_one_and_atomics_do_not() -> None:
    plain = counted(PLAIN)
    assert final(plain) == {1, 2}
    assert [finding.kind for finding in plain.findings] == ["lost-update"]
    for snippet in (EXCLUSIVE, LSE):
        result = counted(snippet)
        assert final(result) == {2}
        assert result.findings == ()


@pytest.mark.parametrize(("distance", "loads"), [(0, 2), (8, 2), (16, 1)])
def test_a_store_to_the_granule_ends_a_reservation_even_if_it_changes_nothing(distance: int, loads: int) -> None:
    """Unicorn compares values: the store-exclusive would succeed, and the load-exclusive run once."""
    machine = Machine.bare()
    add, store = code(machine, EXCLUSIVE, STORE)
    va = machine.plan.spare
    race = Race(machine, (call("A", add, va), call("B", store, va + distance, 0)), [(word_pa(machine), 32)])
    _, events = race.replay("A1 B A")
    assert sum(event.kind == "atomic" and event.pc == add for event in events) == loads


def test_store_exclusives_are_told_from_their_neighbours() -> None:
    stores = {0xC8027C01: "stxr", 0xC802FC01: "stlxr", 0xC8220801: "stxp", 0x08027C01: "stxrb"}
    others = {0xC85F7C01: "ldxr", 0x48207C02: "casp", 0xC8A07C01: "cas", 0xC89FFC01: "stlr", 0xF9000001: "str"}
    assert [text for word, text in stores.items() if not is_store_exclusive(word)] == []
    assert [text for word, text in others.items() if is_store_exclusive(word)] == []


@pytest.mark.parametrize(("tlbi", "seen"), [(0xD508831F, True), (0xD508871F, False), (0xD503201F, False)])
def test_tlb_maintenance_reaches_the_other_cpu_if_it_is_broadcast(tlbi: int, seen: bool) -> None:
    """TLBI VMALLE1IS, VMALLE1, and none: the other CPU's load goes on with what its TLB has."""
    machine = Machine.bare()
    (other,) = more_cpus(machine)
    load, maintain = code(machine, LOAD, (tlbi, RET))
    va, pages = machine.plan.spare, [word_pa(machine), word_pa(machine) + machine.plan.page_size]
    for pa, value in zip(pages, (11, 22), strict=True):
        machine.memory.store(pa, value)

    def loads() -> int:
        pc = other.prepare(load, va)
        other.proceed(pc)
        return other.argument(0)

    assert loads() == 11
    step = machine.translate(va).steps[-1]
    machine.memory.store(step.pa, step.word + machine.plan.page_size)
    machine.proceed(machine.prepare(maintain))
    assert loads() == (22 if seen else 11)


def test_cpus_take_pages_from_one_pool() -> None:
    machine = Machine.bare()
    (other,) = more_cpus(machine)
    given = [cpu.give_page() for cpu in (machine, other, other, machine)]
    assert len(set(given)) == 4
    other.take_back()
    assert machine.give_page() == given[0]


def test_a_prepared_call_goes_on_with_the_registers_of_now() -> None:
    """On our MMU, which keeps what it has read of them: between two runs Python gives a table that is empty."""
    machine = Machine.bare(mmu="model")
    (load,) = code(machine, LOAD)
    empty = machine.plan.ram[0] + 0x20_0000
    machine.memory.words(empty, 512)[:] = 0
    assert machine.proceed(machine.prepare(load, machine.plan.user_data))[1] is None
    machine.set_register("TTBR0_EL1", empty)
    stop = machine.proceed(machine.prepare(load, machine.plan.user_data))[1]
    assert stop
    assert stop.kind == "fault"


def test_cold_cpus_have_stacks_and_tasks_of_their_own(machine: Machine) -> None:
    cpus = [machine, *more_cpus(machine, MOST_COLD)]
    va = machine.plan.linear + 0x200_0000
    for i, cpu in enumerate(cpus):
        assert len(cpu.call("set_memory_valid", va, 1, i % 2).ok().changes) == (i > 0 or 1)
    assert len({cpu.plan.stack for cpu in cpus}) == len({cpu.plan.task for cpu in cpus}) == len(cpus)
    with pytest.raises(MemoryError, match="room for 4"):
        more_cpus(machine)


@pytest.mark.qemu
def test_a_booted_kernels_second_cpu_runs_on_a_copy_of_the_current_task() -> None:
    first = booted().machine()
    (second,) = more_cpus(first)
    va = second.call("vmalloc", 3 * first.plan.page_size).ok().value
    assert first.call("find_vm_area", va).ok().value
    assert second.call("set_memory_ro", va, 1).ok().signed == 0
    assert first.translate(va).steps[-1].word >> 7 & 1
    assert second.plan.task != first.plan.task
    btf = first.types.btf
    pid = btf.offset("task_struct", "pid")
    assert first.word_at(second.plan.task + pid) == first.word_at(first.plan.task + pid)
