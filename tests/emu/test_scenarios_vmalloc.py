"""What the mails about lockless page-table walks are about, done to booted kernels: permissions of vmalloc areas.

Every name says what was found, on all of 6.1, 6.12 and 7.3 unless FOUND has a column for it. Before and after each call
all leaves of both halves are compared, so what is not named did not change. The kernels booted with KASLR.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest

from emu.booted import VmArea, changed, mapped, word_at
from emu.check import KernelSubject
from emu.machine import CallResult
from emu.warm import WarmMachine
from kernel_model import pageattr
from kernel_model.levels import Levels
from kernel_model.mm import Kernel
from kernel_model.names import Bits
from kernel_model.vmalloc import VmFlags, VmStruct
from pgtable import Access
from pgtable.leaves import Leaves
from tests.kernels import KERNELS
from tests.snapshots import FAST, booted

pytestmark = [pytest.mark.kernels, pytest.mark.qemu]

EINVAL = -22
PAGES = 6
MODULE_TEXT = 0  # enum execmem_type
BLOCK = 2 << 20
RETURNS_42 = bytes.fromhex("400580d2 c0035fd6")  # mov x0, #42; ret

RO = {"AP": (0, 2), "DBM": (1, 0)}
RW = {"AP": (2, 0), "DBM": (0, 1)}


class Found(NamedTuple):
    """What differs between kernels. `whole_alias`: set_memory_ro and _rw change the linear alias of the whole area
    (else of the pages asked for). `valid_flushes`: making pages valid invalidates TLB entries. `huge_warns`,
    `huge_aliases`: refusing a part of a huge area, set_memory_ro warns, and leaves all its aliases read-only.
    `module_flags`: of an area for module text. `unmapped_head`: what is before _stext has no mapping (else it is
    read-only)."""

    whole_alias: bool
    valid_flushes: bool
    huge_warns: bool
    huge_aliases: bool
    module_flags: VmFlags
    unmapped_head: bool


_RESET = VmFlags.VM_ALLOC | VmFlags.VM_FLUSH_RESET_PERMS
FOUND = {
    "debian:6.1": Found(True, True, True, True, VmFlags.VM_ALLOC, True),
    "debian:6.12": Found(True, True, True, True, _RESET, False),
    "debian:7.3": Found(False, False, False, False, _RESET, False),
}
EACH = [pytest.param(name, marks=[] if name == FAST else pytest.mark.full) for name in KERNELS]


class Bench:
    """A machine of a booted kernel that knows all leaves."""

    def __init__(self, name: str, *, mmu: str = "cpu", vectors: bool = False) -> None:
        self.m = booted(name).machine(mmu=mmu, vectors=vectors)
        self.found = FOUND[name]
        self.leaves = mapped(self.m)

    def call(self, function: str, *args: int) -> CallResult:
        """A call that returns. The leaves that differ are then in `self.changed`: VA -> (before, after)."""
        before, result = self.leaves, self.m.call(function, *args)
        self.leaves = mapped(self.m)
        self.changed = changed(before, self.leaves)
        compared = {c.va for c in result.changes if c.level == 3 and (c.old | c.new) & 1}
        assert self.changed.keys() == compared  # the comparison of all table pages says the same
        return result.ok()

    def area(self, pages: int = PAGES) -> VmArea:
        """A new area; nothing else changes."""
        va = self.call("vmalloc", pages * self.m.plan.page_size).value
        area = VmArea.at(self.m, va)
        assert self.changed.keys() == area.vas()
        assert len(area.linear) == pages
        return area

    def aliases(self, area: VmArea, first: int, count: int) -> set[int]:
        """The linear map's VAs that set_memory_ro or _rw of those pages change."""
        return area.aliases() if self.found.whole_alias else area.aliases(first, count)

    def writable(self, va: int) -> bool:
        return self.m.translate(va, Access.write(el=1)).ok


@pytest.fixture(params=EACH)
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def fields(result: CallResult) -> list[dict[str, tuple[int, int]]]:
    """What differs in the changed descriptors, each kind of difference once."""
    kinds: list[dict[str, tuple[int, int]]] = []
    for change in result.changes:
        if change.fields not in kinds:
            kinds.append(change.fields)
    return kinds


# one area


def test_ro_and_rw_of_two_pages_change_six_aliases_in_6_x_and_two_in_7_x_and_nothing_else(bench: Bench) -> None:
    area = bench.area()
    reached = area.vas(1, 2) | bench.aliases(area, 1, 2)
    assert len(reached) == (8 if bench.found.whole_alias else 4)
    for function, difference in (("set_memory_ro", RO), ("set_memory_rw", RW)):
        result = bench.call(function, area.va(1), 2)
        assert result.signed == 0
        assert bench.changed.keys() == reached
        assert fields(result) == [difference]
        assert {event.va for event in result.maintenance} >= reached


def test_x_nx_and_valid_never_reach_the_alias(bench: Bench) -> None:
    area = bench.area()
    steps = [
        ("set_memory_nx", (), []),  # vmalloc() memory is not executable
        ("set_memory_x", (), [{"PXN": (1, 0)}]),
        ("set_memory_nx", (), [{"PXN": (0, 1)}]),
        ("set_memory_valid", (0,), [{"VALID": (1, 0)}]),
        ("set_memory_valid", (1,), [{"VALID": (0, 1)}]),
    ]
    for function, rest, difference in steps:
        result = bench.call(function, area.va(1), 2, *rest)
        assert result.signed == 0
        assert fields(result) == difference
        assert bench.changed.keys() == (area.vas(1, 2) if difference else set())
        flushed = {event.va for event in result.maintenance} - {None}  # vm_unmap_aliases() may flush all
        assert flushed == (set() if rest == (1,) and not bench.found.valid_flushes else area.vas(1, 2))


def test_the_guard_page_can_be_asked_for_and_vfree_warns_of_what_that_left(bench: Bench) -> None:
    area = bench.area()
    assert bench.call("set_memory_ro", area.va(0), PAGES + 1).signed == 0
    assert bench.changed.keys() == area.vas() | area.aliases()
    assert word_at(bench.m, area.va(PAGES)) == 0x80  # read-only, of nothing
    assert [area.name(area.va(i)) for i in (PAGES - 1, PAGES)] == [f"page {PAGES - 1}", "guard page"]
    freed = bench.call("vfree", area.addr)
    with pytest.raises(LookupError, match=rf"find_vm_area\({area.addr:#x}\) finds nothing"):
        VmArea.at(bench.m, area.addr)
    assert [warning.site.partition("+")[0] for warning in freed.warnings] == ["__vunmap_range_noflush"]


# after vfree()


def test_pages_freed_read_only_come_back_with_a_read_only_alias_and_the_next_vzalloc_dies(bench: Bench) -> None:
    area = bench.area()
    bench.call("set_memory_ro", area.va(1), 2)
    stuck = bench.aliases(area, 1, 2)
    bench.call("vfree", area.addr)
    assert bench.changed.keys() == area.vas()
    assert {va for va in area.linear if not bench.writable(va)} == stuck
    stop = bench.m.call("vzalloc", PAGES * area.page).stop
    assert stop
    assert (stop.kind, stop.symbol.partition("+")[0]) == ("fault", "clear_page")
    assert stop.walk
    assert stop.walk.va & -area.page in stuck
    assert "permission fault, level 3" in stop.message


def test_writable_again_or_marked_to_be_reset_the_pages_come_back_clean(bench: Bench) -> None:
    start = bench.m.save()
    for way in ("set_memory_rw", "VM_FLUSH_RESET_PERMS"):
        bench.m.restore(start)
        bench.leaves = mapped(bench.m)
        area = bench.area()
        bench.call("set_memory_ro", area.va(0), PAGES)
        if way == "set_memory_rw":
            bench.call(way, area.va(0), PAGES)
        else:
            flags = area.flags | VmFlags.VM_FLUSH_RESET_PERMS
            bench.m.write(area.struct + bench.m.types.btf.offset("vm_struct", "flags"), flags.to_bytes(8, "little"))
        bench.call("vfree", area.addr)
        assert all(bench.writable(va) for va in area.linear)
        again = bench.call("vzalloc", PAGES * area.page)
        assert bench.m.read(again.value, PAGES * area.page) == bytes(PAGES * area.page)


# two areas by turns


def model(m: WarmMachine, areas: list[VmArea]) -> Kernel:
    """The model's kernel on the machine's own memory."""
    subject = KernelSubject(m.snapshot.image)
    levels: Levels = subject.levels(m.plan)
    bits = Bits.of(m.tables.fmt, subject.variant(), ng_mappings=True)
    kernel = Kernel(m.memory, m.tables.root, levels, bits, linear_offset=m.plan.linear_va(0))
    for a in areas:
        pas = [va - kernel.linear_offset & (1 << 64) - 1 for va in a.linear]
        kernel.vm_areas.append(VmStruct(a.addr, a.size, a.flags, pas))
    return kernel


Step = tuple[str, VmArea, int, int]
ENABLE: dict[str, tuple[str, tuple[int, ...]]] = {
    **{name: (name, ()) for name in ("set_memory_ro", "set_memory_rw", "set_memory_x", "set_memory_nx")},
    "valid": ("set_memory_valid", (1,)),
    "invalid": ("set_memory_valid", (0,)),
}


def predicted(m: WarmMachine, areas: list[VmArea], step: Step) -> Leaves:
    """All leaves after the model has done the step; memory is then as it was."""
    what, area, first, count = step
    function, rest = ENABLE[what]
    state = m.save()
    do: Callable[..., int] = getattr(pageattr, function)
    assert do(model(m, areas), area.va(first), count, *rest) == 0
    after = mapped(m)
    m.restore(state)
    return after


def test_two_areas_changed_by_turns_leave_their_neighbours_alone_and_the_model_knew(
    bench: Bench, rng: random.Random
) -> None:
    areas = [bench.area() for _ in range(3)]
    for _ in range(15):
        area, first = rng.choice(areas[::2]), rng.randrange(PAGES)  # the one in between is a neighbour of both
        step = rng.choice(list(ENABLE)), area, first, rng.randint(1, PAGES - first)
        expected = predicted(bench.m, areas, step)
        function, rest = ENABLE[step[0]]
        assert bench.call(function, area.va(first), step[3], *rest).signed == 0
        assert changed(expected, bench.leaves) == {}, step
        assert bench.changed.keys() <= area.vas(first, step[3]) | bench.aliases(area, first, step[3])
        assert {word_at(bench.m, a.va(PAGES)) for a in areas} == {0}  # the guard pages


# what is no vmalloc() memory


def test_what_vmalloc_did_not_give_is_refused_without_a_trace(bench: Bench) -> None:
    m = bench.m
    text = VmArea.at(m, m.symbol("_stext"))
    assert (text.flags, text.linear) == (VmFlags.VM_MAP | VmFlags.VM_NO_GUARD, ())
    lowest = m.plan.linear_va(m.plan.ram[0])
    area = bench.area()
    others = [(lowest, 1), (area.linear[0], 1), (m.symbol("_stext"), 1), (m.plan.task & -area.page, 1)]
    for va, count in [*others, (area.va(0), PAGES + 2), (area.va(0) + (1 << 40), 1), (0, 1)]:
        for function in ("set_memory_ro", "set_memory_rw", "set_memory_x", "set_memory_nx"):
            result = m.call(function, va, count).ok()
            assert (result.signed, len(result.changes), result.maintenance) == (EINVAL, 0, ()), (function, hex(va))
    assert changed(bench.leaves, mapped(m)) == {}
    assert bench.call("set_memory_valid", area.linear[0], 1, 0).signed == 0  # which asks no area
    assert bench.changed.keys() == {area.linear[0]}


def huge_area(bench: Bench, size: int) -> VmArea:
    """vmalloc_huge(), where the kernel has not made it a macro over vmalloc_huge_node()."""
    symbols = bench.m.snapshot.image.symbols
    name = next(n for n in ("vmalloc_huge", "vmalloc_huge_node") if n in symbols or symbols.variants(n))
    return VmArea.at(bench.m, bench.m.call(name, size, 0xCC0, -1 & 0xFFFF_FFFF).ok().value)


def test_a_huge_area_is_refused_by_7_x_at_once_and_by_6_x_after_its_aliases_are_read_only(bench: Bench) -> None:
    area = huge_area(bench, BLOCK)
    bench.leaves = mapped(bench.m)
    assert area.flags == VmFlags.VM_ALLOC | VmFlags.VM_ALLOW_HUGE_VMAP
    assert bench.m.translate(area.addr).steps[-1].level == 2
    result = bench.call("set_memory_ro", area.va(0), 1)
    assert result.signed == EINVAL
    assert bool(result.warnings) is bench.found.huge_warns
    assert bench.changed.keys() == (area.aliases() if bench.found.huge_aliases else set())


# text of modules, stacks, W^X


def test_module_text_runs_once_it_is_executable_and_its_alias_is_reset_where_the_area_says_so(bench: Bench) -> None:
    m = bench.m
    new = "execmem_alloc" in m.snapshot.image.symbols
    size = 2 * m.plan.page_size
    area = VmArea.at(m, m.call("execmem_alloc" if new else "module_alloc", *([MODULE_TEXT] if new else []), size).value)
    bench.leaves = mapped(m)
    assert area.flags == bench.found.module_flags
    assert abs(area.addr - m.snapshot.image.base) < 2 << 30  # a branch, or one with a veneer, reaches the kernel
    m.write(area.addr, RETURNS_42)
    refused = m.call(area.addr).stop
    assert refused
    assert "permission fault, level 3" in refused.message
    bench.call("set_memory_ro", area.addr, 2)
    bench.call("set_memory_x", area.addr, 2)
    assert m.call(area.addr).ok().value == 42
    bench.call("execmem_free" if new else "module_memfree", area.addr)
    kept = set() if bench.found.module_flags & VmFlags.VM_FLUSH_RESET_PERMS else area.aliases()
    assert {va for va in area.linear if not bench.writable(va)} == kept


@pytest.mark.parametrize("name", EACH)
def test_a_stack_is_an_area_between_unmapped_pages_and_an_overflow_is_reported(name: str) -> None:
    bench = Bench(name, mmu="model", vectors=True)
    m = bench.m
    stack = VmArea.at(m, m.plan.stack)
    assert stack.addr == m.types["task_struct"].at(m.plan.task)["stack"]
    assert len(stack.linear) * stack.page == 16 << 10
    assert [word_at(m, va) for va in (stack.addr - stack.page, stack.va(4))] == [0, 0]
    m.plan = replace(m.plan, top=stack.addr + 64)  # type: ignore[call-arg]
    overflow = m.call("vmalloc", stack.page)
    assert overflow.printed[0] == "Insufficient stack space to handle exception!"
    far = next(line for line in overflow.printed if line.startswith("FAR: "))
    assert stack.addr - 256 < int(far.split()[1], 16) < stack.addr
    assert overflow.stop
    assert overflow.stop.kind == "panic"


def test_ptdump_check_wx_finds_one_injected_page_also_when_it_is_invalid(bench: Bench) -> None:
    area = bench.area()

    def verdict() -> str:
        result = bench.m.call("ptdump_check_wx").ok()
        assert len(result.changes) == 0
        return result.printed[-1].removeprefix("Checked W+X mappings: ")

    clean, dirty = "passed, no W+X pages found", "FAILED, 1 W+X pages found, 0 non-UXN pages found"
    assert verdict() == clean
    bench.call("set_memory_x", area.va(2), 1)
    first = bench.m.call("ptdump_check_wx")
    assert "arm64/mm: Found insecure W+X mapping at address " in first.printed[-2]
    assert first.printed[-2].endswith(f"{area.va(2):#x}")
    assert [warning.site.partition("+")[0] for warning in first.warnings] == ["note_page"]
    assert verdict() == dirty
    bench.call("set_memory_valid", area.va(2), 1, 0)
    assert verdict() == dirty
    bench.call("set_memory_ro", area.va(2), 1)
    assert verdict() == clean


# traps that only a booted machine has


def test_the_head_of_the_image_is_unmapped_in_6_1_and_read_only_later(bench: Bench) -> None:
    m = bench.m
    head, text = m.symbol("_text"), m.symbol("_stext")
    assert text - head == 64 << 10
    assert m.translate(text, Access.fetch(el=1)).ok
    for va in range(head, text, m.plan.page_size):
        assert m.translate(va).ok is not bench.found.unmapped_head
        assert not bench.writable(va)
        assert not m.translate(va, Access.fetch(el=1)).ok


def test_after_a_panic_the_kernel_prints_no_more_and_the_machine_still_does(bench: Bench) -> None:
    m = bench.m
    behind = 4  # of vprintk_emit and panic: past the hooks on their first instruction (PACIASP)

    def emitted() -> int:
        return m.call(m.symbol("vprintk_emit") + behind, 0, 7, 0, "hello\n", m.plan.stack - 512).ok().value

    start = m.save()
    assert emitted() == len("hello")
    m.restore(start)
    m.write(m.symbol("panic_timeout"), bytes(4))  # no restart: it stays in the loop at its end
    symbols = m.snapshot.image.symbols
    panic, rest = ("vpanic", [m.plan.stack - 512]) if "vpanic" in symbols else ("panic", [])
    ended = m.call(m.symbol(panic) + behind, "the end", *rest, blocks=100_000)
    assert ended.printed[0] == "Kernel panic - not syncing: the end"
    assert ended.printed[-1] == "---[ end Kernel panic - not syncing: the end ]---"
    assert ended.stop
    assert ended.stop.kind == "budget"
    assert m.word_at(m.symbol("oops_in_progress")) == 1
    assert emitted() == 0
    assert m.call("_printk", "hello\n").printed == ("hello",)
