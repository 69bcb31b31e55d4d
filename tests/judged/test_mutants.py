"""Every broken rule is noticed by a judged query of the extract, and nothing else is.

`python -m tests.judged.mutants` prints the table without pytest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain

import pytest

from emu.judge.corpus import Case, dump, load
from emu.judge.verdict import Tally, judge_case
from tests.judged.mutants import (
    EXTRACT,
    LIMIT,
    MUTANTS,
    Kill,
    Mutant,
    broken,
    kill,
    kills_in,
    stale,
    table,
    typed_kills,
)

NAMED = (  # by the issue that asked for the table
    "APTable[0]", "APTable[1]", "UXNTable", "PXNTable", "implicit PXN", "WXN", "HPD", "E0PD", "EPD", "EPAN", "PAN",
    "TBI", "TBID", "high VA bits", "start level", "AF before size", "permission before AF", "HA", "HD", "L0 block",
    "contiguous", "LPA2 SH", "64K OA[51:48]", "PIE", "POE",
)  # fmt: skip
QUICK = ("APTable[1]", "implicit PXN", "start level", "HD", "PIE", "POE")


@pytest.fixture(scope="module")
def extract() -> list[Case]:
    return list(load(EXTRACT))


def disagreements(cases: list[Case]) -> list[str]:
    return [str(d) for case in cases for d in judge_case(case, Tally(case.kind))]


def test_the_extract_is_small_and_of_every_kind(extract: list[Case]) -> None:
    assert sum(len(case.queries) for case in extract) <= LIMIT
    assert min(Counter(case.kind for case in extract).values()) > 1
    assert len({case.kind for case in extract}) >= 18
    assert len({case.id for case in extract}) == len(extract)
    assert all(dump(case) for case in extract)


def test_the_model_agrees_with_every_judged_query_in_both_paths(extract: list[Case]) -> None:
    assert disagreements(extract) == []


def test_the_model_agrees_with_the_typed_tables() -> None:
    assert list(typed_kills()) == []


def test_every_mutant_still_fits_the_code() -> None:
    assert stale() == []


def test_every_rule_that_was_named_has_its_mutant() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert set(NAMED) <= set(names)
    assert len(set(names)) == len(names) >= 30


@pytest.mark.parametrize("name", QUICK)
def test_a_mutant_is_killed_and_everything_is_put_back(name: str, extract: list[Case]) -> None:
    (mutant,) = (m for m in MUTANTS if m.name == name)
    with broken(mutant.changes):
        assert first_kill(mutant, extract)
    assert first_kill(mutant, extract[::20]) is None


def first_kill(mutant: Mutant, cases: list[Case]) -> Kill | None:
    kills = chain.from_iterable(map(kills_in, cases)) if mutant.judged else typed_kills()
    return next(kills, None)


def test_what_a_mutant_replaces_is_put_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), broken(MUTANTS[0].changes):
        _ = 1 / 0
    assert list(typed_kills()) == []


@pytest.mark.full
@pytest.mark.timeout(1800)  # a minute of work, on a machine that is not busy
def test_every_mutant_is_killed(
    extract: list[Case], capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    results = [kill(mutant, extract) for mutant in MUTANTS]
    text = table(results)
    record_property("mutants", text)
    with capsys.disabled():
        print(f"\n{text}")
    assert [r.mutant.name for r in results if not r.kills] == []
    assert disagreements(extract) == []
