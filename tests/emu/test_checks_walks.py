"""The walks of the compiled kernels against the model, event by event, and the machinery that does it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from emu.checks.campaign import Worlds, run_function, shrink
from emu.checks.changelog import compare, signature
from emu.checks.harness import differences
from emu.checks.walks import ALL, KernelWalk, WalkCase, simple
from emu.checks.world import LIMIT, Reaction, World
from kernel_model.mm import Barrier, Callback, Write
from tests.kernels import KERNELS, MORE, kernel_image

WALKS = (
    "walk_page_range_novma",
    "walk_kernel_page_table_range",
    "walk_kernel_page_table_range_lockless",
    "walk_page_range_debug",
)

pytestmark = pytest.mark.kernels


@cache
def worlds(name: str) -> Worlds:
    return Worlds(kernel_image(name))


def walk_of(world: World) -> KernelWalk:
    return KernelWalk(next(name for name in WALKS if name in world.image.symbols))


@pytest.mark.parametrize("name", [*KERNELS, *MORE])
@pytest.mark.parametrize("function", WALKS)
def test_the_compiled_walk_does_what_the_model_says(name: str, function: str) -> None:
    if function not in kernel_image(name).symbols:
        return  # that kernel has another of them
    report = run_function(worlds(name), KernelWalk(function), 150, 1)
    assert [(f.flavour, str(f.case), [str(d) for d in f.differences]) for f in report.failures] == []
    assert report.unreached == []
    assert report.cases > 1000
    assert report.events > 20_000


def test_every_kernel_has_one_of_the_walks() -> None:
    for name in (*KERNELS, *MORE):
        assert walk_of(worlds(name)["plain"])


# the recorder


def real(world: World, case: WalkCase) -> tuple[int, str, list[str]]:
    """What the compiled function did: value, stop, and its events."""
    outcome = walk_of(world).run(world, case).real
    return outcome.value, outcome.stop, [str(event) for event in outcome.events]


def test_a_walk_of_two_pages_as_it_was_measured() -> None:
    """Facts 9.1 A: five upper callbacks, two PTEs."""
    world = worlds("debian:6.1")["plain"]
    tree, va = simple(world)
    outcome = walk_of(world).run(world, WalkCase(tree, va, va + 0x2000)).real
    assert [event.name for event in outcome.events if isinstance(event, Callback)] == [
        "pgd_entry",
        "p4d_entry",
        "pud_entry",
        "pmd_entry",
        "pte_entry",
        "pte_entry",
    ]
    pte = outcome.events[-1]
    assert isinstance(pte, Callback)
    assert pte.args[1:] == (va + 0x1000, va + 0x2000)
    assert pte.value == tree.words[pte.args[0]]


def test_reactions_stop_set_the_action_and_store() -> None:
    world = worlds("debian:7.3")["plain"]
    tree, va = simple(world)
    plain = WalkCase(tree, va, va + 0x4000, ("pmd_entry", "pte_entry"))
    value, _, events = real(world, replace(plain, script={2: Reaction(7)}))
    assert (value, len(events)) == (7, 3)
    assert len(real(world, replace(plain, script={0: Reaction(action=1)}))[2]) == 1
    assert len(real(world, replace(plain, script={0: Reaction(action=2)}))[2]) == 6
    stored_word = walk_of(world).run(world, replace(plain, script={1: Reaction(store=0x123)})).real
    assert isinstance(stored_word.events[2], Write)
    assert [word.new for word in stored_word.words.values()] == [0x123]


def test_what_a_walk_clears_is_in_its_place_among_the_callbacks() -> None:
    """A bad entry at the top is cleared, with barriers, before the hole is told of."""
    world = worlds("debian:7.3")["plain"]
    va = world.image.base + (1 << 28)
    top = world.space.tables[0]
    word = world.space.fmt.leaf(1).pack(VALID=1, AF=1)
    tree = replace(simple(world)[0], words={world.root + 8 * world.space.index(top, va): word})
    outcome = walk_of(world).run(world, WalkCase(tree, va, va + 0x1000)).real
    assert [type(event) for event in outcome.events] == [Callback, Write, Barrier, Barrier, Callback]


def test_an_endless_walk_ends_at_the_recorders_limit_on_both_sides() -> None:
    world = worlds("debian:7.3")["plain"]
    tree, va = simple(world)
    again = {i: Reaction(action=2) for i in range(LIMIT)}
    checked = walk_of(world).run(world, WalkCase(tree, va, va + 0x1000, ("pmd_entry",), again))
    assert checked.real.stop == checked.predicted.stop == "runaway"
    assert len(checked.real.events) == len(checked.predicted.events) == LIMIT
    assert differences(checked) == []
    assert real(world, WalkCase(tree, va, va + 0x1000, ALL))[1] == "", "the next case is not disturbed"


def test_an_endless_walk_of_which_the_model_says_less_is_a_difference() -> None:
    """Both sides stop at the recorder's limit: neither was cut, so that all events are compared."""
    world = worlds("debian:7.3")["plain"]
    tree, va = simple(world)
    again = {i: Reaction(action=2) for i in range(LIMIT)}
    checked = walk_of(world).run(world, WalkCase(tree, va, va + 0x1000, ("pmd_entry",), again))
    assert not checked.real.cut
    nothing = replace(checked.predicted, events=())
    assert [d.field for d in differences(checked._replace(predicted=nothing))] == ["event 0"]
    assert signature(world, world, checked.real, nothing) == "events: pmd_entry -> nothing more"
    assert signature(world, world, checked.real, checked.predicted) == ""


def test_a_probe_that_sees_too_little_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """6.12 is asked what its loops do: an answer of less than two callbacks is none."""
    image, call = kernel_image("debian:6.12"), World.call
    monkeypatch.setattr(World, "call", lambda world, name, start, end, *more: call(world, name, start, start, *more))
    with pytest.raises(ValueError, match=r"walk_kernel_page_table_range made 0 calls of callbacks, not 2"):
        World(image)


# finding, shrinking, keeping


def wrong_world(name: str) -> World:
    """A world whose model believes that an entry is bad by its whole type, as 7.x does."""
    image = kernel_image(name)
    right = worlds(name)["plain"].variant
    return World(image, variant=replace(right, bad_is_type=not right.bad_is_type))


def test_a_wrong_rule_is_found_and_its_case_shrunk_to_one_word(request: pytest.FixtureRequest) -> None:
    world = wrong_world("debian:6.12")
    walk = walk_of(world)
    failing = next(case for case in walk.prepared(world) if differences(walk.run(world, case)))
    smallest = shrink(world, walk, failing)
    assert differences(walk.run(world, smallest))
    assert len(smallest.tree.words) <= 2
    assert smallest.script == {}
    assert not differences(walk.run(worlds("debian:6.12")["plain"], smallest))


def test_the_same_seed_gives_the_same_cases() -> None:
    import random

    world = worlds("debian:6.1")["plain"]
    walk = walk_of(world)
    first, second = ([walk.random(world, random.Random(5)) for _ in range(20)] for _ in range(2))
    assert first == second


# two kernels, no model


def test_a_kernel_behaves_as_itself() -> None:
    walk = KernelWalk("walk_kernel_page_table_range_lockless")
    log = compare((worlds("debian:7.3"), worlds("debian:7.3")), (walk, walk), 50, 1)
    assert (log.differ, log.groups) == (0, [])
    assert log.events > 10_000


def test_the_changelog_of_6_12_to_7_x_names_what_changed() -> None:
    """Known from the sources: who is bad at the top, and what a hole sees of the action."""
    walk = KernelWalk("walk_kernel_page_table_range")
    log = compare((worlds("debian:6.12"), worlds("debian:7.3")), (walk, walk), 50, 1)
    assert log.differ
    what = [group.what for group in log.groups]
    assert any("p4d_entry -> pte_hole depth 1" in text or "p4d_entry -> a store" in text for text in what), what
    assert all(group.count >= 1 for group in log.groups)
