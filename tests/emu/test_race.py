"""Races of real kernel functions: what is found, that it is found again, and that what is counted is what there is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from emu.machine import Machine
from emu.race import WAIT, Actor, Call, Race, Scene, Step, call
from emu.races.explore import Schedule
from emu.races.parts import DBM, RDONLY, TEST, ScenarioError, change
from emu.races.scenarios import SCENARIOS
from pgtable import Access
from tests.kernels import kernel_image
from tests.snapshots import WARM, booted

pytestmark = pytest.mark.kernels
RACY = [pytest.param(name, id=name) for name in ("debian:6.12", "debian:7.3")]


def race(name: str, kernel: str, **options: str) -> Race:
    return SCENARIOS[name].race(Machine.boot(kernel_image(kernel)), **options)


@pytest.mark.parametrize("kernel", RACY)
def test_lost_update_is_found_with_one_preemption_both_ways(kernel: str) -> None:
    made = race("lost-update", kernel)
    found = made.explore(2).findings
    assert [finding.kind for finding in found] == ["lost-update"] * 2
    lost = [{name for name, _, _ in finding.words[0].fields} for finding in found]
    assert lost[0] >= {"AP", "DBM"}  # B's read-only is gone
    assert "VALID" in lost[1]  # A's invalidation is gone
    for finding in found:
        assert finding.schedule.preemptions == 1
        again, _ = made.replay(str(finding.schedule))
        assert [other.words for other in again] == [finding.words]
        assert made.minimised(finding).schedule == finding.schedule


@pytest.mark.parametrize("kernel", RACY)
def test_what_the_cold_scenarios_change_is_the_right_to_write(kernel: str) -> None:
    machine = Machine.boot(kernel_image(kernel))
    va = machine.plan.linear + TEST
    (work,) = change(machine, "B", va, 1, RDONLY, DBM).work
    assert isinstance(work, Call)
    machine.call(work.function, *work.args).ok()
    assert machine.translate(va).ok
    assert machine.translate(va, Access.write(el=1)).fault
    assert machine.tables.fmt.leaf(3)["DBM"].get(machine.translate(va).steps[-1].word) == 0
    assert machine.translate(va + 4096, Access.write(el=1)).ok


@pytest.mark.parametrize("kernel", RACY)
def test_a_schedule_means_the_same_on_a_fresh_machine(kernel: str) -> None:
    schedules = [str(finding.schedule) for finding in race("lost-update", kernel).explore(1).findings]
    fresh = race("lost-update", kernel)
    for schedule in schedules:
        findings, events = fresh.replay(schedule)
        assert [finding.kind for finding in findings] == ["lost-update"]
        text = fresh.columns(schedule)
        assert "reads 0x00e8000042000707" in text
        assert {event.actor for event in events} == {"A", "B"}
    assert fresh.replay("A B")[0] == fresh.replay("B A")[0] == []


@pytest.mark.parametrize("kernel", RACY)
def test_disjoint_pages_do_not_disturb_each_other_in_any_interleaving(kernel: str) -> None:
    """Their number is that of the ways to merge the events of the two: the binomial coefficient."""
    made = race("disjoint-pages", kernel)
    result = made.explore(None)
    assert result.findings == ()
    _, events = made.replay("A B")
    counts = [max(event.number for event in events if event.actor == name) for name in "AB"]
    assert result.interleavings == math.comb(sum(counts), counts[0]) > 1_000_000
    equal = race("disjoint-pages", kernel, distance="0").explore(None)
    assert {finding.kind for finding in equal.findings} == {"lost-update"}


def test_pruning_changes_what_is_run_and_not_what_is_counted() -> None:
    made = race("lost-update", "debian:6.12")
    pruned, full = made.explore(2), made.explore(2, prune=False)
    assert full.interleavings == pruned.interleavings
    assert full.runs > full.interleavings > pruned.runs
    assert full.findings == pruned.findings
    # 12 and 14 events: at each but the last the other may come in, and at each of those the first once more
    assert pruned.interleavings == 304


def test_random_schedules_find_it_too_and_are_minimised() -> None:
    made = race("lost-update", "debian:6.12")
    result = made.explore(0, walks=150, seed=3)
    assert result.findings
    for finding in result.findings:
        assert made.minimised(finding).schedule.preemptions == 1
    assert made.explore(0, walks=150, seed=3).findings == result.findings


@pytest.mark.parametrize("kernel", RACY)
def test_a_softirq_runs_to_its_end_and_sees_that_it_is_one(kernel: str) -> None:
    """7.3 queues barriers outside interrupts only: in a softirq it makes them at each PTE, or at none if invalid."""
    made = race("kfence-softirq", kernel)
    result = made.explore(2)
    assert result.findings == ()
    _, events = made.replay("A2 KFENCE A")
    names = [event.actor for event in events]
    first = names.index("KFENCE")
    assert names[first : first + names.count("KFENCE")] == ["KFENCE"] * names.count("KFENCE")
    same_page = SCENARIOS["lost-update"].race(Machine.boot(kernel_image(kernel)), mode="interrupt").explore(1)
    assert {finding.kind for finding in same_page.findings} == {"lost-update"}


FREED = [
    ("debian:6.1", "vmap", {"none": True, "read": True, "write": True}),
    ("debian:6.12", "vmap", {"none": True, "read": True, "write": False}),
    ("debian:7.3", "vmap", {"none": True, "read": True, "write": False}),
    *(
        pytest.param(kernel, "unplug", {"none": True, "write": True, "hotplug": False}, marks=pytest.mark.full)
        for kernel in ("debian:6.1", "debian:6.12", "debian:7.3")
    ),
]


@pytest.mark.parametrize(("kernel", "by", "found"), FREED)
def test_a_walk_meets_a_freed_table_unless_the_right_lock_is_held(kernel: str, by: str, found: dict[str, bool]) -> None:
    for lock, meets in found.items():
        result = race("freed-table", kernel, by=by, lock=lock).explore(1)
        kinds = {finding.kind for finding in result.findings}
        assert ("freed-table" in kinds) == meets, lock
        assert "deadlock" not in kinds


def test_python_steps_may_wait_and_a_lock_taken_twice_is_a_deadlock() -> None:
    machine = Machine.bare()
    pa = machine.translate(machine.plan.spare).pa

    def take(scene: Scene) -> int | None:
        if scene.load(pa):
            return WAIT
        scene.store(pa, 1)
        return None

    lock, unlock = Step("lock", take), Step("unlock", lambda scene: scene.store(pa, 0))
    good = Race(machine, (Actor("A", (lock, unlock)), Actor("B", (lock, unlock))), [(pa, 8)]).explore(None)
    assert good.findings == ()
    bad = Race(machine, (Actor("A", (lock, unlock)), Actor("B", (lock,))), [(pa, 8)], serial=False).explore(None)
    assert {finding.kind for finding in bad.findings} == {"deadlock"}


def test_expectations_and_invariants_are_judged_at_the_end() -> None:
    machine = Machine.boot(kernel_image("debian:6.12"))
    va = machine.plan.linear + 0x200_0000
    word = machine.translate(va).steps[-1].word
    race = Race(
        machine,
        (call("A", "set_memory_valid", va, 1, 0), call("B", "set_memory_valid", va, 1, 1)),
        [va],
        expected={va: word},
        invariants=[lambda scene: None if scene.machine.translate(va).ok else "the page is gone"],
    )
    result = race.explore(0)
    assert {(finding.kind, str(finding.schedule)) for finding in result.findings} == {
        ("unexpected", "B A"),
        ("invariant", "B A"),
    }


@pytest.mark.parametrize("text", ["A5 B", "A5 C A", "A5x B A", ""])
def test_a_schedule_that_does_not_fit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="schedule"):
        Schedule.parse(text, ["A", "B"])


def test_scenarios_say_what_they_need() -> None:
    machine = Machine.boot(kernel_image("debian:6.12"))
    with pytest.raises(ScenarioError, match="needs a booted machine"):
        SCENARIOS["ro-rw-alias"].race(machine)
    with pytest.raises(ScenarioError, match="must be one of 1, 0, 2, 8"):
        SCENARIOS["disjoint-pages"].race(machine, distance="3")


@pytest.mark.full
@pytest.mark.qemu
@pytest.mark.parametrize("kernel", WARM[:3])
def test_booted_kernels_lose_updates_and_contradict_aliases(kernel: str) -> None:
    """6.1 and 6.12 change the linear map of the whole area whatever was asked for; 7.3 of the pages asked for."""
    found = SCENARIOS["lost-update"].race(booted(kernel).machine()).explore(1).findings
    assert {finding.kind for finding in found} == {"lost-update"}
    alias = SCENARIOS["ro-rw-alias"].race(booted(kernel).machine()).explore(1).findings
    assert bool(alias) == (kernel != "debian:7.3")
    assert SCENARIOS["kfence-softirq"].race(booted(kernel).machine()).explore(1).findings == ()


OF_16K: list[tuple[str, dict[str, str], set[str]]] = [
    ("lost-update", {}, {"lost-update"}),
    ("disjoint-pages", {}, set()),
    ("kfence-softirq", {}, set()),
    ("freed-table", {"lock": "none"}, {"freed-table", "stop", "warning"}),
    ("freed-table", {"lock": "read"}, {"freed-table", "stop"}),
    ("freed-table", {"lock": "write"}, set()),
    ("split-walk", {"how": "break"}, {"hole", "fault"}),
    ("split-walk", {"how": "direct", "bbm": "1"}, {"bbm"}),
    ("split-walk", {"how": "direct", "bbm": "2"}, set()),
    ("split-walk", {"how": "kernel", "bbm": "2"}, {"bbm"}),
    ("split-walk", {"how": "kernel", "bbm": "3"}, set()),
    ("ptdump-vmalloc", {"by": "map"}, set()),
    ("ptdump-vmalloc", {"by": "unmap"}, set()),
    ("ptdump-vmalloc", {"by": "huge"}, set()),
    ("bad-tlbi", {"wrong": "tlbi"}, {"bbm", "tlb"}),
    ("bad-tlbi", {"wrong": "asid"}, {"bbm", "tlb"}),
    ("bad-tlbi", {"wrong": "nothing"}, set()),
    ("set-memory-bbm", {"noflush": "no"}, set()),
    ("set-memory-bbm", {"noflush": "yes"}, {"bbm", "tlb"}),
]


@pytest.mark.full
@pytest.mark.parametrize(("name", "options", "found"), OF_16K)
def test_races_on_16k_pages_are_those_of_7_3(name: str, options: dict[str, str], found: set[str]) -> None:
    made = race(name, "debian:7.2-16k", **options)
    assert {finding.kind for finding in made.explore(1).findings} == found


def test_what_is_documented_is_there() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "races.md").read_text()
    for name in SCENARIOS:
        assert f"`{name}`" in text
