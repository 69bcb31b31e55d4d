"""Every row of the known faults of judges explains a stored query, and does not explain a model that is wrong there.

`python -m tests.judged.test_known` writes the fixtures of the rows that at_edge.jsonl.xz shows anew. T16, T20 and T27
are what random cases found, as `pgtable judge --qemu` shrinks and stores them; those of T27 are fetches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from emu.judge import model
from emu.judge.corpus import DONE, Answer, Case, load, save
from emu.judge.known import KNOWN, Known, explain
from emu.judge.verdict import Tally, judge_case
from pgtable import Fault, FaultType, Walk
from pgtable.registers import PAR_OK

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
EDGE = HERE / "corpus" / "at_edge.jsonl.xz"
FOUND_BY_RANDOM_CASES = ("T16", "T20", "T27")
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


def answered(case: Case) -> tuple[Walk, Answer]:
    """The model's walk and answer for a case of one query."""
    found = model.by_walk(case)
    (walk,), (answer,) = found.walks, found.answers
    assert walk is not None
    return walk, answer


def with_result(walk: Walk, fault: Fault) -> Walk:
    return Walk(walk.va, walk.access, walk.params, walk.raw, fault)


def wrongs(case: Case, walk: Walk, answer: Answer, judge: Answer) -> Iterator[tuple[str, Walk, Answer]]:
    """The same walk as models with one thing wrong would have it; the PA only where the judge has one to compare."""
    if isinstance(answer, int) and isinstance(judge, int) and walk.fault is None and not judge & 1:
        yield "another PA", walk, answer ^ LOWEST_PA_BIT
    for type in (FaultType.TRANSLATION, FaultType.ACCESS_FLAG):
        fault = Fault(type, 3)
        wrong = (fault.esr(walk.access), walk.va, 0) if case.is_access else fault.par()
        yield f"{type.value} fault", with_result(walk, fault), wrong


def test_a_row_explains_its_stored_queries_in_both_paths(row: Known, cases: list[Case]) -> None:
    for case in cases:
        found = judge_case(case, Tally(case.kind))
        assert [(d.path, d.rule) for d in found] == [("scalar", row.name), ("array", row.name)]


def test_a_row_does_not_explain_a_wrong_model(row: Known, cases: list[Case]) -> None:
    for case in cases:
        (judge,) = case.answers[case.reference or ""]
        walk, answer = answered(case)
        assert explain(case, walk, judge, answer) == row.name
        for what, wrong_walk, wrong_answer in wrongs(case, walk, answer, judge):
            assert explain(case, wrong_walk, judge, wrong_answer) == "", what


def test_a_row_does_not_explain_a_judge_that_agrees_on_the_fault(row: Known, cases: list[Case]) -> None:
    """Another answer of the judge than the one that the row is about: the model's own fault, at another level."""
    for case in cases:
        walk, answer = answered(case)
        if walk.fault:
            if row.name in ("T5", "T6"):
                for level in range(4):  # further down it may be another descriptor's
                    judge = walk.fault._replace(level=level).par()
                    assert explain(case, walk, judge, answer) == (row.name if level > walk.fault.level else "")
            if row.name == "T16":
                assert explain(case, walk, walk.fault.par() ^ 1 << 9, answer) == "", row.name
            if row.name == "T27":
                esr = walk.fault._replace(level=(walk.fault.level + 1) % 4).esr(walk.access)
                assert explain(case, walk, (esr, walk.va, 0), answer) == ""
        if row.name == "T1":
            assert explain(case, walk, Fault(FaultType.TRANSLATION, 3).par(), answer) == ""


def test_pan_explains_a_fetch_only_where_all_of_it_is_there() -> None:
    """T27 wants a write permission that WXN looks at, EPAN and PSTATE.PAN: without one of them it explains nothing."""
    (case, *_) = load(FIXTURES / "T27.jsonl")
    sctlr = next(name for name in ("SCTLR_EL1", "SCTLR_EL2") if name in case.regs and case.regs[name] >> 57 & 1)
    for other in (
        replace(case, pan=0),
        replace(case, regs={**case.regs, sctlr: case.regs[sctlr] & ~(1 << 57)}),
        replace(case, mem={pa: word | (word & 3 == 1) << 54 for pa, word in case.mem.items()}),
    ):
        walk, answer = answered(other)
        assert walk.fault, other
        assert explain(other, walk, DONE, answer) == ""


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
        if row.name not in FOUND_BY_RANDOM_CASES:
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
