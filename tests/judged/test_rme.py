"""Granule protection, Root and Realm against QEMU's stored answers; and that breaking a rule of it is noticed.

corpus/rme.jsonl.xz: `random_case` of every kind of draw_rme.py, answered by QEMU 11.1, every other case by 10.0 too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emu.judge.corpus import Case, load
from emu.judge.draw_rme import RME_KINDS
from emu.judge.known import KNOWN_RME
from emu.judge.verdict import Tally, judge_case
from pgtable import CPUS, PhysicalMemory, Registers, gpc, gpt, spaces, stage2, translate_many, walk
from pgtable.gpt import Gpt, GptWalk
from pgtable.spaces import PASpace

CORPUS = Path(__file__).parent / "corpus" / "rme.jsonl.xz"
CASES = list(load(CORPUS))


def unexplained(cases: list[Case]) -> int:
    return sum(not found.rule for case in cases for found in judge_case(case, Tally(case.kind)))


@pytest.mark.parametrize("kind", RME_KINDS)
def test_a_kind_agrees_or_is_explained(kind: str) -> None:
    tally = Tally(kind)
    for case in CASES:
        if case.kind == kind:
            assert [str(found) for found in judge_case(case, tally) if not found.rule] == []
    assert tally.disagree == 0
    assert tally.agree > 450
    assert tally.empty_cells == []


def test_every_known_fault_of_qemu_is_in_the_corpus() -> None:
    seen = Counter(found.rule for case in CASES for found in judge_case(case, Tally(case.kind)))
    assert {row.name for row in KNOWN_RME} <= seen.keys()


def test_qemu_10_agrees_with_11() -> None:
    """What both were asked: the rules have not changed between them."""
    both = [replace(case, ref="10.0") for case in CASES if "10.0" in case.answers]
    assert len(both) == 3 * len(RME_KINDS)
    assert unexplained(both) == 0


def test_arrays_do_not_tell_spaces() -> None:
    with pytest.raises(ValueError, match="FEAT_RME"):
        translate_many(PhysicalMemory((0, 4096)), Registers(CPUS["max,x-rme=on"]), [0])


# each breaks one rule; the corpus notices (what it does not notice is in tests/pgtable/test_rme.py)


def _no_check(*arguments: Any) -> GptWalk:
    return GptWalk(*arguments[1:4], arguments[3])


def _wrong_leaf(state: PASpace, alone: bool, secure: bool, word: int) -> PASpace:
    return state


MUTANTS: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "nothing is checked": (gpc, "granule_protection_check", _no_check),
    "every GPI lets in": (gpt, "_permits", lambda found: True),
    "all GPIs mean something": (Gpt, "valid", lambda self, gpi: True),
    "a leaf is in its state's space": (walk, "leaf_space", _wrong_leaf),
    "all that stage 2 outputs is Secure": (stage2, "_leaves_secure", lambda regs, ns: False),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_breaking_a_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, attribute, wrong = MUTANTS[name]
    assert getattr(where, attribute) is not wrong
    monkeypatch.setattr(where, attribute, wrong)
    for case in CASES:
        if unexplained([case]):
            return
    pytest.fail(f"{name}: nothing in the corpus differs")


def test_spaces_are_said_by_name() -> None:
    assert [str(space) for space in PASpace] == ["Secure", "Non-secure", "Root", "Realm"]
    assert spaces.AMEC.mask == 1 << 63
