"""KFENCE on booted kernels: its pool, its guards, and how it judges a fault; 6.12 and 7.3 (6.1 of Debian has none).

What a fault is taken for is judged by three witnesses: the arguments of the kernel's own kfence_report_error(), the
text that it prints, and the descriptor afterwards. kernel_model.kfence says before what they will say. The faults are
real: the kernel's memcpy() or memset() touches the address, and its own exception vectors do the rest.
"""

from __future__ import annotations

import random
import re
from copy import copy

import pytest

from emu.booted import KfencePool, KfenceReport, changed, mapped, word_at
from emu.check import KernelSubject
from emu.image import SymbolError
from emu.machine import CallResult
from kernel_model.kfence import ErrorType, Kfence, Metadata, ObjectState, kfence_handle_page_fault, kfence_pool_size
from kernel_model.mm import Called, Kernel, Settings
from kernel_model.names import Bits
from tests.snapshots import FAST, booted

pytestmark = [pytest.mark.kernels, pytest.mark.qemu]

STARTED = "kfence.sample_interval=100"
# Whether making a page valid invalidates its TLB entry: 6.12 does so always, 7.3 never needs to.
FLUSHES_VALID = {"debian:6.12": True, "debian:7.3": False}
EACH = [pytest.param(name, marks=[] if name == FAST else pytest.mark.full) for name in FLUSHES_VALID]
SIZE = 200
HEADLINE = {
    ErrorType.OOB: "out-of-bounds",
    ErrorType.UAF: "use-after-free",
    ErrorType.INVALID: "invalid",
}


class Bench:
    """A kernel whose KFENCE has started, on a CPU that takes exceptions to the kernel's vectors."""

    def __init__(self, name: str) -> None:
        self.flushes_valid = FLUSHES_VALID[name]
        self.m = booted(name, command_line=STARTED).machine(mmu="model", vectors=True)
        self.pool = KfencePool(self.m)
        subject = KernelSubject(self.m.snapshot.image)
        bits = Bits.of(self.m.tables.fmt, subject.variant(), ng_mappings=True)
        settings = Settings(kfence_pool=(self.pool.va, self.pool.size), kfence_early=True)
        self.kernel = Kernel(self.m.memory, self.m.tables.root, subject.levels(self.m.plan), bits, settings=settings)

    def valid(self, va: int) -> bool:
        return self.m.translate(va).ok

    def alone(self, size: int = SIZE) -> int:
        """The index of a new object with none in use on either side."""
        while True:
            i = self.pool.index(self.pool.allocate(size))
            sides = [self.pool.state(j) for j in (i - 1, i + 1) if 0 <= j < self.pool.objects]
            if ObjectState.ALLOCATED not in sides:
                return i

    def start(self, i: int) -> int:
        """Where an object begins."""
        addr = self.pool.metadata(i)["addr"]
        assert isinstance(addr, int)
        return addr

    def touch(self, va: int, *, write: bool = False) -> CallResult:
        """One byte is read or written by the kernel's own code."""
        if write:
            return self.m.call("memset", va, 0, 1)
        return self.m.call("memcpy", self.m.plan.stack - 512, va, 1)

    def objects(self) -> list[Metadata]:
        """All metadata as it is now, as the model has it."""
        found = []
        for i in range(self.pool.objects):
            meta = self.pool.metadata(i)
            state, *rest = (meta[name] for name in ("state", "addr", "size", "unprotected_page"))
            found.append(Metadata(ObjectState(state), *rest))  # type: ignore[arg-type]
        return found

    def predicted(self, objects: list[Metadata], va: int, *, write: bool) -> tuple[Called, int]:
        """What the model reports, and the descriptor that it leaves; memory is then as it was."""
        state = self.m.save()
        self.kernel.events.clear()
        kfence = Kfence(self.kernel, objects=list(map(copy, objects)))
        assert kfence_handle_page_fault(kfence, va, is_write=write)
        word = word_at(self.m, va)
        self.m.restore(state)
        return next(event for event in self.kernel.events if isinstance(event, Called)), word


@pytest.fixture(params=EACH)
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def as_model(report: KfenceReport) -> Called:
    index = -1 if report.object is None else report.object
    return Called("kfence_report_error", (report.addr, report.is_write, index, report.type))


# the pool


def test_a_booted_pool_is_mapped_by_pages_and_every_second_one_is_invalid(bench: Bench) -> None:
    pool = bench.pool
    assert pool.size == kfence_pool_size(pool.objects, pool.page)
    assert not bench.valid(pool.va)
    states = [pool.state(i) for i in range(pool.objects)]
    assert {ObjectState.ALLOCATED, ObjectState.FREED, ObjectState.UNUSED} <= set(states)  # of the boot
    assert not [i for i in range(-1, pool.objects) if bench.valid(pool.guard(i))]
    assert [bench.valid(pool.object_page(i)) for i in range(pool.objects)] == [s != ObjectState.FREED for s in states]
    levels = {bench.m.translate(va).steps[-1].level for va in range(pool.va, pool.va + pool.size, pool.page)}
    assert levels == {3}
    assert bench.valid(pool.va - pool.page)


def test_protecting_a_page_clears_valid_in_one_descriptor_and_nothing_else(bench: Bench) -> None:
    # kfence_protect() and kfence_unprotect() are inlined everywhere: what they call is left.
    page = bench.pool.object_page(bench.alone())
    for enable in (0, 1):
        before = mapped(bench.m)
        result = bench.m.call("set_memory_valid", page, 1, enable).ok()
        assert [change.fields for change in result.changes] == [{"VALID": (1 - enable, enable)}]
        assert changed(before, mapped(bench.m)).keys() == {page}
        assert [event.va for event in result.maintenance] == ([page] if not enable or bench.flushes_valid else [])


def test_freeing_makes_the_objects_page_invalid_and_allocating_it_again_valid(bench: Bench) -> None:
    pool, i = bench.pool, bench.alone()
    page, addr = pool.object_page(i), bench.start(i)
    freed = bench.m.call("__kfence_free", addr).ok()
    assert [(change.va, change.fields) for change in freed.changes] == [(page, {"VALID": (1, 0)})]
    assert pool.state(i) == ObjectState.FREED
    while pool.index(other := pool.allocate(SIZE)) != i:  # the free list is a queue
        bench.m.call("__kfence_free", other, record="nothing").ok()
    assert bench.valid(page)
    assert pool.state(i) == ObjectState.ALLOCATED


# faults


def test_an_access_to_the_guard_on_the_right_is_told_as_such_and_opens_it(bench: Bench) -> None:
    i = bench.alone()
    start, guard = bench.start(i), bench.pool.guard(i)
    with bench.pool.reports() as reports:
        result = bench.touch(guard, write=True).ok()
    assert [(r.addr, r.is_write, r.object, r.type) for r in reports] == [(guard, True, i, ErrorType.OOB)]
    assert "memset" in bench.m.describe(reports[0].pc)
    assert [(change.va, change.fields) for change in result.changes] == [(guard, {"VALID": (0, 1)})]
    text = "\n".join(result.printed)
    assert re.search(r"BUG: KFENCE: out-of-bounds write in \w*memset", text)
    assert f"({guard - start}B right of kfence-#{i})" in text  # counted from where the object begins
    assert f"size={SIZE}, cache=kmalloc-256" in text
    assert bench.touch(guard, write=True).printed == ()  # it is open now


def test_an_access_to_the_guard_on_the_left_is_told_as_such(bench: Bench) -> None:
    i = bench.alone()
    start, last = bench.start(i), bench.pool.object_page(i) - 1
    with bench.pool.reports() as reports:
        result = bench.touch(last).ok()
    assert [(r.addr, r.is_write, r.object, r.type) for r in reports] == [(last, False, i, ErrorType.OOB)]
    assert f"({start - last}B left of kfence-#{i})" in "\n".join(result.printed)


def test_only_the_last_of_two_opened_guards_is_closed_when_the_object_is_freed(bench: Bench) -> None:
    pool, i = bench.pool, bench.alone()
    left, right = pool.object_page(i) - pool.page, pool.guard(i)
    for guard in (right, left):
        bench.touch(guard, write=True)
        bench.m.write(guard, b"overflow")
    freed = bench.m.call("__kfence_free", bench.start(i)).ok()
    assert {change.va for change in freed.changes} == {left, pool.object_page(i)}
    assert (bench.valid(left), bench.valid(right)) == (False, True)
    assert bench.m.read(right, 8) == b"overflow"
    assert bench.m.memory.read(bench.m.translate(right).pa - 2 * pool.page, 8) == bytes(8)  # the left one is emptied


def test_a_freed_object_and_the_first_page_are_told_apart(bench: Bench) -> None:
    i = bench.alone()
    addr = bench.start(i)
    bench.m.call("__kfence_free", addr).ok()
    with bench.pool.reports() as reports:
        freed, first = bench.touch(addr).ok(), bench.touch(bench.pool.va + 8).ok()
    assert [(r.object, r.type) for r in reports] == [(i, ErrorType.UAF), (None, ErrorType.INVALID)]
    assert "BUG: KFENCE: use-after-free read in " in freed.printed[1]
    assert f"(in kfence-#{i}):" in freed.printed[2]
    assert "\nfreed by task 1 on cpu 0" in "\n".join(freed.printed)
    assert "BUG: KFENCE: invalid read in " in first.printed[1]
    assert bench.valid(addr)
    assert bench.valid(bench.pool.va)


def test_many_faults_in_a_used_pool_are_judged_as_the_model_predicted(bench: Bench, rng: random.Random) -> None:
    pool = bench.pool
    used = [pool.allocate(rng.randrange(9, 2048)) for _ in range(60)]
    for addr in rng.sample([addr for addr in used if addr], 20):
        bench.m.call("__kfence_free", addr, record="nothing").ok()
    closed = [va for va in range(pool.va, pool.va + pool.size, pool.page) if not bench.valid(va)]
    state, objects, kinds = bench.m.save(), bench.objects(), set()
    by_state = [(page, objects[pool.index(page)].state) for page in closed[2:]]
    guards = [page for page, found in by_state if found == ObjectState.ALLOCATED]
    freed = [page for page, found in by_state if found == ObjectState.FREED]
    with pool.reports() as reports:
        for page in [pool.va, *(page for some in (closed, guards, freed) for page in rng.sample(some, 12))]:
            va, write = page + rng.randrange(pool.page), rng.random() < 0.5
            expected, word = bench.predicted(objects, va, write=write)
            reports.clear()
            result = bench.touch(va, write=write).ok()
            assert [as_model(report) for report in reports] == [expected]
            kind = ErrorType(expected.args[3])
            assert re.search(rf"BUG: KFENCE: {HEADLINE[kind]} {'write' if write else 'read'} in", result.printed[1])
            assert [(change.va, change.new) for change in result.changes] == [(page, word)]
            kinds.add(kind)
            bench.m.restore(state)
    assert kinds == set(HEADLINE)


# without it


@pytest.mark.parametrize("name", [pytest.param("debian:6.1", marks=pytest.mark.full), FAST])
def test_without_kfence_or_before_it_starts_an_invalid_page_of_the_linear_map_is_an_oops(name: str) -> None:
    m = booted(name).machine(mmu="model", vectors=True)
    if "__kfence_pool" in m.snapshot.image.symbols:
        with pytest.raises(ValueError, match="KFENCE has not started"):
            KfencePool(m)
    else:
        with pytest.raises(SymbolError, match="__kfence_pool"):
            KfencePool(m)
    va = m.plan.linear_va(m.translate(m.call("vmalloc", 4096).ok().value).pa)
    m.call("set_memory_valid", va, 1, 0).ok()
    oops = m.call("memset", va, 0, 1)
    assert oops.printed[0] == f"Unable to handle kernel paging request at virtual address {va:016x}"
    assert oops.stop
    assert oops.stop.kind == "panic"  # the task is init
    assert not m.translate(va).ok
