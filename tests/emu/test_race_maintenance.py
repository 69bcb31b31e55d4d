"""Scenarios under the checkers of TLB maintenance: splits, ptdump, wrong TLBIs, set_memory_* as shipped."""

from __future__ import annotations

import pytest

from emu.machine import Machine
from emu.race import Actor, Call, Race, Scene, Step
from emu.races.parts import ScenarioError
from emu.races.scenarios import SCENARIOS
from emu.races.sites import READER, WRITER
from pgtable import Access
from pgtable.tlb import Policy, TlbModel
from tests.kernels import kernel_image
from tests.snapshots import WARM, booted

pytestmark = pytest.mark.kernels
EACH = [pytest.param(name, id=name) for name in ("debian:6.1", "debian:6.12", "debian:7.3")]


def kinds(name: str, kernel: str, preemptions: int = 1, **options: str) -> set[str]:
    made = SCENARIOS[name].race(Machine.boot(kernel_image(kernel)), **options)
    return {finding.kind for finding in made.explore(preemptions).findings}


# (e) a block is split


@pytest.mark.parametrize("kernel", EACH)
def test_break_before_make_is_clean_and_leaves_a_hole_for_walkers_and_loads(kernel: str) -> None:
    """Who reads meanwhile finds nothing: why 7.3 does not break kernel blocks, and why 6.x maps by pages."""
    assert kinds("split-walk", kernel, how="break", flush="yes", bbm="0") == {"hole", "fault"}


@pytest.mark.parametrize("kernel", EACH)
def test_a_break_without_a_flush_is_no_break(kernel: str) -> None:
    assert kinds("split-walk", kernel, how="break", flush="no", bbm="0") == {"hole", "bbm"}


@pytest.mark.parametrize("flush", ["yes", "no"])
@pytest.mark.parametrize("bbm", [0, 1, 2, 3])
@pytest.mark.parametrize("kernel", EACH)
def test_a_table_over_a_block_is_a_matter_of_the_feature(kernel: str, bbm: int, flush: str) -> None:
    """Level 1 wants nT, which is not set here. Level 2 wants a TLBI afterwards, level 3 wants nothing."""
    wrong = bbm < 2 or (bbm == 2 and flush == "no")
    found = kinds("split-walk", kernel, how="direct", flush=flush, bbm=str(bbm))
    assert found == ({"bbm"} if wrong else set())


@pytest.mark.parametrize("bbm", [0, 1, 2, 3])
def test_the_split_of_7_3_is_right_with_the_feature_that_it_asks_for(bbm: int) -> None:
    """split_pmd() stores the table over the block and leaves no TLBI to anybody: FEAT_BBM 3 alone allows that."""
    found = kinds("split-walk", "debian:7.3", how="kernel", bbm=str(bbm))
    assert found == (set() if bbm == 3 else {"bbm"})


def test_older_kernels_do_not_split_kernel_blocks() -> None:
    with pytest.raises(ScenarioError, match="no split_pmd"):
        kinds("split-walk", "debian:6.12", how="kernel")


# (f) ptdump


@pytest.mark.parametrize("by", ["map", "unmap"])
@pytest.mark.parametrize("kernel", EACH)
def test_ptdump_is_not_disturbed_by_pages_that_come_and_go(kernel: str, by: str) -> None:
    assert kinds("ptdump-vmalloc", kernel, 2, by=by) == set()


@pytest.mark.parametrize("kernel", EACH)
def test_ptdump_reads_a_table_that_a_huge_mapping_freed_on_6_1(kernel: str) -> None:
    """6.1 frees the PTE table under no lock; later ones try init_mm's lock, which ptdump holds, and map pages."""
    assert kinds("ptdump-vmalloc", kernel, 2, by="huge") == ({"freed-table"} if kernel == "debian:6.1" else set())


# (g) one thing wrong


@pytest.mark.parametrize("kernel", EACH)
@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ("tlbi", "no TLBI"),
        ("dsb", "no DSB after the TLBI"),
        ("asid", "TLBI of another ASID"),
        ("early", "no TLBI"),
    ],
)
def test_each_wrong_program_is_caught_by_both_checkers(kernel: str, wrong: str, cause: str) -> None:
    made = SCENARIOS["bad-tlbi"].race(Machine.boot(kernel_image(kernel)), wrong=wrong)
    found = made.explore(2).findings
    assert {finding.kind for finding in found} == {"bbm", "tlb"}
    assert f"make before clean ({cause})" in next(str(f) for f in found if f.kind == "bbm")
    for finding in found:
        again, _ = made.replay(str(finding.schedule))
        assert finding.text in [other.text for other in again]


@pytest.mark.parametrize("kernel", EACH)
def test_the_right_program_is_clean(kernel: str) -> None:
    assert kinds("bad-tlbi", kernel, 2, wrong="nothing") == set()


# (h) set_memory_*


@pytest.mark.parametrize("kernel", EACH)
def test_what_is_shipped_is_clean_and_noflush_is_what_it_says(kernel: str) -> None:
    assert kinds("set-memory-bbm", kernel) == set()
    assert kinds("set-memory-bbm", kernel, noflush="yes") == {"bbm", "tlb"}


@pytest.mark.full
@pytest.mark.qemu
@pytest.mark.parametrize("kernel", WARM[:3])
def test_set_memory_of_a_booted_kernel_is_clean(kernel: str) -> None:
    """set_memory_ro, x, nx, rw of a vmalloc area with its alias, set_memory_valid of the alias."""
    made = SCENARIOS["set-memory-bbm"].race(booted(kernel).machine())
    assert made.explore(0).findings == ()


# the checkers in a search


def test_without_the_tlb_the_search_finds_no_stale_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TLB that keeps nothing: the findings of its model are gone, those of the other checker stay."""
    assert kinds("bad-tlbi", "debian:6.12", wrong="tlbi") == {"bbm", "tlb"}
    monkeypatch.setattr(TlbModel, "insert", lambda *_, **__: None)
    assert kinds("bad-tlbi", "debian:6.12", wrong="tlbi") == {"bbm"}


def test_states_that_the_checkers_tell_apart_are_not_pruned_into_one() -> None:
    """One CPU breaks a page, another makes the TLBI: after both, memory is the same whichever came first."""
    machine = Machine.boot(kernel_image("debian:6.12"))
    va = machine.plan.linear + 0x200_0000
    pa = machine.translate(va).steps[-1].pa

    def clear(scene: Scene) -> None:
        scene.store(pa, 0)
        scene.barrier("dsb ishst")

    def clean(scene: Scene) -> None:
        scene.tlbi("vaae1is", va)
        scene.barrier("dsb ish")

    changes = Actor("A", (Step("break", clear), Step("return", Scene.returns)))
    actors = (changes, Actor("B", (Step("TLBI", clean),)), Actor("C", (Step("nothing", lambda scene: None),)))
    made = Race(machine, actors, [(pa, 8)], serial=False, judge=Policy())
    results = [made.explore(None, prune=prune) for prune in (True, False)]
    for result in results:  # right is break, TLBI, return, with C anywhere
        assert (result.interleavings, [(f.kind, f.count) for f in result.findings]) == (12, [("bbm", 8)])


def test_a_stale_use_that_the_make_puts_right_is_no_finding() -> None:
    """A page is broken, read by another CPU through what its TLB has, and made again as it was."""
    machine = Machine.boot(kernel_image("debian:6.12"))
    va = machine.plan.linear + 0x200_0000
    step = machine.translate(va).steps[-1]

    def read(scene: Scene) -> None:
        scene.access(va, Access.read(el=1))

    def race(word: int) -> set[str]:
        store = Step("break", lambda scene: scene.store(step.pa, 0))
        make = Step("make", lambda scene: scene.store(step.pa, word))
        done = Step("return", Scene.returns)
        actors = (Actor("A", (store, make, done)), Actor("B", (Step("read", read),)))
        made = Race(machine, actors, [(step.pa, 8)], serial=False, judge=Policy())
        return {f.kind for f in made.explore(2).findings}

    assert "tlb" not in race(step.word)
    assert "tlb" in race(step.word + 4096)


@pytest.mark.parametrize(("clean", "found"), [(True, set()), (False, {"bbm"})])
def test_a_step_that_frees_a_table_is_judged(clean: bool, found: set[str]) -> None:
    """It is unlinked first; without a TLBI the checkers object."""
    machine = Machine.bare()
    va = machine.plan.linear + 0x10_0000
    link, entry = machine.translate(va).steps[-2:]

    def free(scene: Scene) -> None:
        scene.store(link.pa, 0)
        scene.barrier("dsb ishst")
        if clean:
            scene.tlbi("vaae1is", va)
            scene.barrier("dsb ish")
        scene.free(entry.pa)

    made = Race(machine, (Actor("A", (Step("free", free),)),), [(link.pa, 8)], serial=False, judge=Policy())
    findings = made.explore(None).findings
    assert {f.kind for f in findings} == found
    assert all("table freed before invalidation (no TLBI)" in f.text for f in findings)


@pytest.mark.parametrize("count", [READER, WRITER], ids=["reader", "writer"])
@pytest.mark.parametrize(("gives", "found"), [(True, set()), (False, {"deadlock"})])
def test_an_actor_waits_for_an_rwsem_that_another_holds(gives: bool, found: set[str], count: int) -> None:
    """down_write() of a lock that another has: it is not entered, and goes on when the other is gone."""
    machine = Machine.boot(kernel_image("debian:6.12"))
    lock = machine.plan.spare
    machine.write(lock, bytes(64))
    pa = machine.translate(lock).pa
    take = Step("take", lambda scene: scene.store(pa, count))
    give = Step("give", lambda scene: scene.store(pa, 0))
    holder = Actor("H", (take, give) if gives else (take,))
    writer = Actor("W", (Call("down_write", (lock,)), Call("up_write", (lock,))))
    result = Race(machine, (holder, writer), [(pa & -4096, 4096)], serial=False).explore(0)
    assert {f.kind for f in result.findings} == found
