"""Every row of the known faults of judges explains a stored query, and does not explain a model that is wrong there.

`python -m tests.judged.test_known` writes the fixtures of the rows that at_edge.jsonl.xz shows anew. T16 and T20 are
answers of QEMU 7.2, as `pgtable judge --qemu` shrinks and stores them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from emu.judge import model
from emu.judge.corpus import Case, load, save
from emu.judge.known import KNOWN, Known, explain
from emu.judge.verdict import Tally, judge_case
from pgtable import Fault, FaultType, Walk
from pgtable.registers import PAR_OK

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
EDGE = HERE / "corpus" / "at_edge.jsonl.xz"
OF_QEMU_7_2 = ("T16", "T20")
EACH = 3  # queries kept for a row
LOWEST_PA_BIT = PAR_OK["PA"].mask & -PAR_OK["PA"].mask


def fixture_of(row: Known) -> Path:
    return FIXTURES / f"{row.name.replace(' ', '-')}.jsonl"


@pytest.fixture(params=KNOWN, ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> Known:
    found: Known = request.param
    return found


@pytest.fixture
def cases(row: Known) -> list[Case]:
    return list(load(fixture_of(row)))


def answered(case: Case) -> tuple[Walk, int]:
    """The model's walk and PAR_EL1 for a case of one query."""
    found = model.by_walk(case)
    (walk,), (answer,) = found.walks, found.answers
    assert walk is not None
    assert isinstance(answer, int)
    return walk, answer


def with_result(walk: Walk, fault: Fault) -> Walk:
    return Walk(walk.va, walk.access, walk.params, walk.raw, fault)


def wrongs(walk: Walk, answer: int, judge: int) -> Iterator[tuple[str, Walk, int]]:
    """The same walk as models with one thing wrong would have it; the PA only where the judge has one to compare."""
    if walk.fault is None and not judge & 1:
        yield "another PA", walk, answer ^ LOWEST_PA_BIT
    for type in (FaultType.TRANSLATION, FaultType.ACCESS_FLAG):
        fault = Fault(type, 3)
        yield f"{type.value} fault", with_result(walk, fault), fault.par()


def test_a_row_explains_its_stored_queries_in_both_paths(row: Known, cases: list[Case]) -> None:
    for case in cases:
        found = judge_case(case, Tally(case.kind))
        assert [(d.path, d.rule) for d in found] == [("scalar", row.name), ("array", row.name)]


def test_a_row_does_not_explain_a_wrong_model(row: Known, cases: list[Case]) -> None:
    for case in cases:
        (judge,) = case.answers[case.reference or ""]
        assert isinstance(judge, int)
        walk, answer = answered(case)
        assert explain(case, walk, judge, answer) == row.name
        for what, wrong_walk, wrong_answer in wrongs(walk, answer, judge):
            assert explain(case, wrong_walk, judge, wrong_answer) == "", what


def test_a_row_does_not_explain_a_judge_that_agrees_on_the_fault(row: Known, cases: list[Case]) -> None:
    """Another answer of the judge than the one that the row is about: the model's own fault, at another level."""
    for case in cases:
        walk, answer = answered(case)
        if walk.fault:
            same_type_elsewhere = walk.fault._replace(level=(walk.fault.level + 1) % 4).par()
            if row.name in ("T5", "T6"):
                assert explain(case, walk, same_type_elsewhere, answer) == "", row.name
            if row.name == "T16":
                assert explain(case, walk, walk.fault.par() ^ 1 << 9, answer) == "", row.name
        if row.name == "T1":
            assert explain(case, walk, Fault(FaultType.TRANSLATION, 3).par(), answer) == ""


def test_no_row_explains_a_query_without_a_walk(cases: list[Case]) -> None:
    assert {explain(case, None, 0, 1) for case in cases} == {""}


def make() -> None:
    """Writes the fixtures of the rows that at_edge shows: the smallest cases, one query each."""
    found: dict[str, dict[str, Case]] = {row.name: {} for row in KNOWN}
    for case in load(EDGE):
        for d in judge_case(case, Tally(case.kind), paths=("scalar",)):
            if d.rule and d.walk is not None and case.id not in found[d.rule]:
                found[d.rule][case.id] = _small(case, d.query, d.walk)
    FIXTURES.mkdir(exist_ok=True)
    for row in KNOWN:
        if row.name not in OF_QEMU_7_2:
            smallest = sorted(found[row.name].values(), key=lambda case: (len(case.mem), case.id))
            save(fixture_of(row), smallest[:EACH])


def _small(case: Case, query: int, walk: Walk) -> Case:
    """One query, and of the memory what its walk reads."""
    read = {pa for _, pa, _ in walk.raw}
    one = model.only(case, query)
    judges = {v: a for v, a in one.answers.items() if v == case.reference}
    return replace(one, mem={pa: word for pa, word in case.mem.items() if pa in read}, answers=judges, after={})


if __name__ == "__main__":
    make()
