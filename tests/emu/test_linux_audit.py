"""The rules for Linux on booted kernels: clean as they boot, and each broken by one descriptor; kernels judge too.

Outside judges: find_vm_area() for the list of areas, vm_zone_stat for free pages, KFENCE's own pool, and what
set_memory_ro() followed by vfree() really leaves behind.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from emu import linux_audit
from emu.booted import KfencePool, VmArea
from emu.linux_audit import LINUX_RULES, _free_blocks
from emu.linux_state import Kernel, Unknown
from emu.snapshot import Snapshot
from pgtable import Access, PhysicalMemory, translate
from pgtable.audit import RULES, Place, Status, Verdict
from pgtable.audit_places import Subject
from pgtable.listing import listing
from pgtable.params import Regime
from pgtable.permissions import PX
from pgtable.registers import Registers
from pgtable.tree import ROOT
from tests.snapshots import FAST, WARM, booted

pytestmark = [pytest.mark.kernels, pytest.mark.qemu]

EACH = [pytest.param(name, marks=[] if name == FAST else pytest.mark.full) for name in WARM]
STARTED = "kfence.sample_interval=100"
AP1, AP2 = 1 << 6, 1 << 7


class Booted(NamedTuple):
    """A snapshot and a memory of the test's own."""

    snapshot: Snapshot
    memory: PhysicalMemory

    @property
    def page(self) -> int:
        return self.snapshot.image.layout.page_size

    @property
    def regs(self) -> Registers:
        return self.snapshot.registers

    def verdicts(self) -> dict[str, Verdict]:
        found = listing(self.memory, self.regs)
        return {v.rule: v for v in linux_audit.audit(found, self.memory, self.snapshot.image)}

    def kernel(self) -> Kernel:
        return Kernel(self.snapshot.image, self.memory, Subject(listing(self.memory, self.regs), self.memory))

    def slot(self, va: int) -> tuple[int, int]:
        """PA and word of the descriptor where a walk of `va` ends."""
        _, pa, word = translate(self.memory, self.regs, va).raw[-1]
        return pa, word

    def flip(self, va: int, mask: int) -> None:
        pa, word = self.slot(va)
        self.memory.store(pa, word ^ mask)

    def linear(self, va: int) -> int:
        """The linear map's VA of what is at `va`."""
        kernel = self.kernel()
        rows = kernel.rows.pick(kernel.within("linear map"))
        pa = translate(self.memory, self.regs, va).pa
        at = int(np.flatnonzero((rows.pa <= pa) & (pa - rows.pa < rows.size))[0])
        return int(rows.va[at]) + pa - int(rows.pa[at])


def fresh(name: str = FAST, **options: str) -> Booted:
    snapshot = booted(name, **options)
    return Booted(snapshot, snapshot.fresh_memory())


def failed(verdicts: dict[str, Verdict]) -> dict[str, list[Place]]:
    return {name: list(v.places) for name, v in verdicts.items() if v.status is Status.FAIL}


@pytest.mark.parametrize("name", EACH)
def test_a_booted_kernel_passes_and_what_it_does_on_purpose_is_named(name: str) -> None:
    verdicts = fresh(name).verdicts()
    assert list(verdicts) == [rule.name for rule in (*RULES, *LINUX_RULES)]
    assert failed(verdicts) == {}
    skipped = {v.rule for v in verdicts.values() if v.status is Status.SKIP}
    assert skipped == {"kfence-guards"}
    expected = {v.rule: {place.text.partition(":")[0] for place in v.expected} for v in verdicts.values()}
    assert {rule: texts for rule, texts in expected.items() if texts} == {
        "alias-attributes": {"coherent DMA memory"},
        "global": {"the entry trampoline of KPTI"},
    }


# what must be found


def test_writable_rodata_in_the_image() -> None:
    made = fresh()
    va = made.snapshot.image.symbols["__start_rodata"] + made.page
    made.flip(va, AP2)
    found = failed(made.verdicts())
    assert found.keys() == {"kernel-text"}
    assert [(p.va, p.size, p.text) for p in found["kernel-text"]] == [(va, made.page, "EL1 rw- EL0 ---")]


@pytest.mark.parametrize(
    ("symbol", "rules"), [("_stext", {"kernel-text-alias", "alias-rwx"}), ("__start_rodata", {"kernel-text-alias"})]
)
def test_text_or_rodata_writable_in_the_linear_map(symbol: str, rules: set[str]) -> None:
    made = fresh()
    va = made.snapshot.image.symbols[symbol]
    alias = made.linear(va)
    made.flip(alias, AP2)
    found = failed(made.verdicts())
    assert found.keys() == rules
    (place,) = found["kernel-text-alias"]
    assert (place.va, place.size, place.alias) == (alias, made.page, va)
    assert (
        place.text
        == "EL1 rw- EL0 ---, and " + ("EL1 r-x" if symbol == "_stext" else "EL1 r--") + " EL0 --- at the alias"
    )


def test_kernel_text_that_el0_reaches() -> None:
    made = fresh()
    va = made.snapshot.image.symbols["_text"]
    made.flip(va, AP1)
    assert {rule: [p.va for p in places] for rule, places in failed(made.verdicts()).items()} == {
        "el0-reaches-upper": [va]
    }


def test_code_in_vmalloc_that_the_linear_map_can_write() -> None:
    made = fresh()
    kernel = made.kernel()
    code = kernel.rows.pick(kernel.within("vmalloc") & kernel.subject.having(PX))
    va = int(code.va[0]) + made.page
    alias = made.linear(va)
    made.flip(alias, AP2)
    found = failed(made.verdicts())
    assert found.keys() == {"read-only-alias", "alias-rwx"}
    assert [(p.va, p.size, p.alias) for p in found["read-only-alias"]] == [(alias, made.page, va)]


def test_read_only_data_in_vmalloc_that_the_linear_map_can_write() -> None:
    made = fresh()
    area = next(a for a in made.kernel().areas if a.size == 5 * made.page)
    made.flip(area.addr, AP2)
    found = failed(made.verdicts())
    assert found.keys() == {"read-only-alias"}
    (place,) = found["read-only-alias"]
    assert (place.va, place.size, place.alias) == (made.linear(area.addr), made.page, area.addr)


def test_the_alias_need_not_be_read_only_without_rodata_full() -> None:
    made = fresh()
    pa = translate(made.memory, made.regs, made.snapshot.image.symbols["rodata_full"]).pa
    made.memory.store(pa & -8, made.memory.fetch(pa & -8) & ~(0xFF << 8 * (pa & 7)))
    verdict = made.verdicts()["read-only-alias"]
    assert (verdict.status, verdict.text) == (Status.SKIP, "rodata_full is off: the linear map stays writable")


def test_a_guard_page_behind_an_area() -> None:
    made = fresh()
    area = next(a for a in made.kernel().areas if a.size == 5 * made.page)
    guard = area.addr + area.size - made.page
    pa, _ = made.slot(guard)
    made.memory.store(pa, made.slot(guard - made.page)[1])
    found = failed(made.verdicts())
    assert found == {
        "vmalloc-guards": [(guard, made.page, None, None, "the guard page behind a vmalloc area is mapped")]
    }


@pytest.mark.parametrize(
    ("mask", "text"), [(AP2, "free, and read-only in the linear map"), (1, "free, and not in the linear map")]
)
def test_a_free_page_that_cannot_be_written(mask: int, text: str) -> None:
    made = fresh()
    va, size = _free_blocks(made.kernel())
    page = int(va[size > made.page][0]) + made.page
    made.flip(page, mask)
    assert failed(made.verdicts()) == {"free-pages": [(page, made.page, None, None, text)]}


@pytest.mark.parametrize("name", [FAST, pytest.param("debian:6.12", marks=pytest.mark.full)])
def test_guards_of_kfences_pool(name: str) -> None:
    """The pool is where the kernel's own functions use it; each guard that is opened is found, no object page is."""
    made = fresh(name, command_line=STARTED)
    verdict = made.verdicts()["kfence-guards"]
    assert verdict.status is Status.PASS
    pool = KfencePool(made.snapshot.machine())
    assert (pool.va, pool.va + pool.size) == made.kernel().regions.kfence
    guards = [pool.va, pool.guard(-1), pool.guard(17), pool.guard(pool.objects - 1)]
    for va in (*guards, pool.object_page(3)):
        pa, word = made.slot(va)
        made.memory.store(pa, word | 1 & ~(1 << 11))
    found = failed(made.verdicts())
    first = [(pool.va, 2 * pool.page)]  # neighbours are one range
    assert [(p.va, p.size) for p in found["kfence-guards"]] == first + [(va, pool.page) for va in guards[2:]]


# judged by the kernel


@pytest.mark.parametrize("name", EACH)
def test_areas_are_those_that_find_vm_area_finds(name: str) -> None:
    made = fresh(name)
    machine = made.snapshot.machine()
    new = VmArea.allocate(machine, 3)
    areas = Booted(made.snapshot, machine.memory).kernel().areas
    assert len(areas) > 40
    assert (new.addr, new.size, new.flags) in areas
    for area in areas:
        struct = machine.call("find_vm_area", area.addr, record="nothing").ok().value
        found = machine.types["vm_struct"].at(struct)
        assert (found["addr"], found["size"], found["flags"]) == area


@pytest.mark.parametrize("name", EACH)
def test_free_pages_are_as_many_as_the_kernel_counts(name: str) -> None:
    """NR_FREE_PAGES is the first of vm_zone_stat; free pages on per-CPU lists are not counted there either."""
    made = fresh(name)
    kernel = made.kernel()
    if "vm_zone_stat" not in made.snapshot.image.symbols:
        pytest.skip("this kernel's symbols do not name vm_zone_stat")
    counted = kernel.value("vm_zone_stat")
    pages = int(_free_blocks(kernel)[1].sum()) // made.page
    assert pages > 20_000 // (made.page >> 12)
    assert abs(pages - counted) < 200  # differences that CPUs have not added yet


@pytest.mark.parametrize("name", EACH)
def test_vfree_after_set_memory_ro_leaves_free_pages_read_only(name: str) -> None:
    made = fresh(name)
    machine = made.snapshot.machine()
    area = VmArea.allocate(machine, 4)
    machine.call("set_memory_ro", area.addr, 2).ok()
    after = Booted(made.snapshot, machine.memory)
    assert failed(after.verdicts()) == {}
    machine.call("vfree", area.addr).ok()
    machine.call("drain_all_pages", 0).ok()
    stuck = {va for va in area.linear if not translate(machine.memory, after.regs, va, Access.write()).ok}
    found = failed(after.verdicts())
    pages = {va for p in found["free-pages"] for va in range(p.va, p.va + p.size, made.page)}
    assert found.keys() == {"free-pages"}
    assert pages == stuck != set()


# what the kernel does not tell


def test_a_damaged_list_or_another_regime_is_skipped_with_a_sentence() -> None:
    made = fresh()
    symbols = made.snapshot.image.symbols
    head = translate(made.memory, made.regs, symbols["vmap_nodes"]).pa
    made.memory.store(head, 0)
    assert made.verdicts()["vmalloc-guards"].text == "vmalloc has not started"
    with pytest.raises(Unknown, match="no symbol nosuch"):
        made.kernel().value("nosuch")
    found = linux_audit.audit(listing(made.memory, made.regs, regime=Regime.EL2), made.memory, made.snapshot.image)
    assert {v.text for v in found if v.rule == "free-pages"} == {"EL2 is not a kernel's regime"}


@pytest.mark.parametrize("seed", range(3))
def test_a_corrupted_kernel_is_judged(seed: int) -> None:
    """Random words in its tables and in its data: there is a verdict for every rule."""
    made = fresh()
    rng = np.random.default_rng(seed)
    tables = listing(made.memory, made.regs).tables
    for pa in rng.choice(tables.pa[tables.slot != ROOT], 20):
        made.memory.store(int(pa) + 8 * int(rng.integers(512)), int(rng.integers(1 << 63)))
    for pa in rng.integers(made.memory.regions[0].base >> 3, made.memory.regions[0].base + (64 << 20) >> 3, 100_000):
        made.memory.store(int(pa) << 3, int(rng.integers(1 << 63)))
    assert len(made.verdicts()) == len(RULES) + len(LINUX_RULES)
