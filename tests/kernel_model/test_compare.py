"""How far two outcomes of one call are compared when neither ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kernel_model.compare import RUNAWAY, Outcome, Word, comparable, compare
from kernel_model.mm import Barrier, Event, Warn, Write
from pgtable.descriptors import Format

STORES: tuple[Event, ...] = tuple(Write(8 * i, i) for i in range(6))
MEMORY = {0: Word(None, None, 0, 0, 1)}


def endless(count: int, *, cut: bool, **more: Any) -> Outcome:
    return Outcome(0, MEMORY, STORES[:count], RUNAWAY, cut, **more)


def differs(one: Outcome, two: Outcome) -> bool:
    found = compare(one, two, Format().layout)
    assert bool(found) == bool(compare(two, one, Format().layout))
    return bool(found)


@pytest.mark.parametrize(
    ("one", "two", "different"),
    [  # events, and whether the side was cut
        ((4, False), (4, False), False),
        ((4, False), (0, False), True),
        ((4, True), (6, True), False),
        ((4, True), (6, False), False),
        ((6, True), (4, False), True),  # it ended there, and the other went on
    ],
)
def test_what_was_cut_is_a_beginning_of_the_other(
    one: tuple[int, bool], two: tuple[int, bool], different: bool
) -> None:
    sides = [endless(count, cut=cut) for count, cut in (one, two)]
    assert differs(*sides) is different


def test_a_beginning_has_the_same_events() -> None:
    other = replace(endless(6, cut=True), events=(STORES[1], *STORES[1:]))
    assert differs(endless(4, cut=True), other)


def test_memory_is_compared_unless_a_side_was_cut() -> None:
    for cut in (False, True):
        assert differs(endless(4, cut=cut), replace(endless(4, cut=cut), words={})) is not cut


def test_one_that_returns_is_compared_in_full() -> None:
    returned = replace(endless(4, cut=False), stop="")
    assert comparable(returned, endless(2, cut=True)) == (returned, endless(2, cut=True))
    assert differs(returned, endless(4, cut=True))


def test_warnings_of_a_call_that_was_cut_are_anywhere() -> None:
    """The real WARNs of the main job are listed behind its other events."""
    early = replace(endless(0, cut=True), events=(Warn("f"), *STORES[:3]))
    late = replace(endless(0, cut=True), events=(*STORES[:4], Warn("f"), Barrier("isb")))
    assert not differs(early, late)
