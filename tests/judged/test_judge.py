"""The model against QEMU's stored answers, and fresh ones: `pgtable judge` and what it stands on."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner

from emu.cli_judge import judge
from emu.judge.corpus import Case, load, save
from emu.judge.guest import QemuMissing, find_qemu, qemu_version
from emu.judge.verdict import Tally, judge_case
from tests.kernels import lack

CORPUS = Path(__file__).with_name("corpus")
SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "schema" / "judge.json"
SAMPLE = 12  # every so many cases in the fast tier


def tallies(cases: list[Case]) -> tuple[dict[str, Tally], list[str]]:
    """Counts by kind, and what nobody explains."""
    found: dict[str, Tally] = {}
    unexplained: list[str] = []
    for case in cases:
        tally = found.setdefault(case.kind, Tally(case.kind))
        unexplained += [str(d) for d in judge_case(case, tally) if not d.rule]
    return found, unexplained


@pytest.mark.parametrize("name", ["at_clean", "access", "at_edge"])
def test_sample_of_the_corpus_agrees_with_qemu(name: str) -> None:
    cases = [case for i, case in enumerate(load(CORPUS / f"{name}.jsonl.xz")) if i % SAMPLE == 0]
    found, unexplained = tallies(cases)
    assert unexplained == []
    assert sum(t.agree for t in found.values()) > 5000


@pytest.mark.full
@pytest.mark.parametrize("name", ["at_clean", "access"])
def test_clean_corpus_agrees_with_qemu_without_an_exception(name: str) -> None:
    found, unexplained = tallies(list(load(CORPUS / f"{name}.jsonl.xz")))
    assert unexplained == []
    assert {k: dict(t.known) for k, t in found.items() if t.known} == {}
    assert all(not t.failed for t in found.values())
    print({k: (t.queries, t.agree) for k, t in found.items()})


@pytest.mark.full
def test_edge_corpus_differs_only_by_known_rules() -> None:
    found, unexplained = tallies(list(load(CORPUS / "at_edge.jsonl.xz")))
    assert unexplained == []
    assert {rule for t in found.values() for rule in t.known} >= {"T1", "T5", "T6", "T7", "T8", "T15"}


def one_case() -> Case:
    return next(iter(load(CORPUS / "access.jsonl.xz")))


def wrong(case: Case) -> Case:
    """The case with its first fault's answer changed to another fault."""
    version = case.reference
    assert version
    answers = list(case.answers[version])
    i = next(i for i, a in enumerate(answers) if isinstance(a, tuple))
    esr, far, hpfar = answers[i]  # type: ignore[misc]
    answers[i] = (esr ^ 4, far, hpfar)
    return case.question().answered(version, answers, {})


def test_command_agrees_and_counts(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", [one_case()])
    done = CliRunner().invoke(judge, [str(tmp_path / "a.jsonl"), "--json"])
    report = json.loads(done.stdout)
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    assert (done.exit_code, report["failed"]) == (0, False)
    assert report["kinds"][0]["agree"] == report["kinds"][0]["queries"] > 100
    cells = report["kinds"][0]["cells"].values()
    assert sum(cell["agree"] for cell in cells) == report["kinds"][0]["agree"]


def test_command_fails_on_one_wrong_answer(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", [wrong(one_case())])
    done = CliRunner().invoke(judge, [str(tmp_path / "a.jsonl")])
    assert done.exit_code == 1
    assert "unexplained: " in done.stdout


def test_command_fails_when_nothing_was_judged(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", [one_case().question()])
    assert CliRunner().invoke(judge, [str(tmp_path / "a.jsonl")]).exit_code == 1


def test_a_wrong_answer_of_stage_2_is_seen(tmp_path: Path) -> None:
    case = next(c for c in load(CORPUS / "access.jsonl.xz") if c.kind == "s2")
    save(tmp_path / "a.jsonl", [case])
    assert CliRunner().invoke(judge, [str(tmp_path / "a.jsonl")]).exit_code == 0
    save(tmp_path / "a.jsonl", [wrong(case)])
    assert CliRunner().invoke(judge, [str(tmp_path / "a.jsonl")]).exit_code == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is empty"), (b"hello\n", "not JSON"), (b"{}\n", "there is no"), (b"\xfd7zXZ\0garbage", "cannot be read")],
)
def test_bad_corpus_gives_one_sentence(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "bad").write_bytes(content)
    done = CliRunner().invoke(judge, [str(tmp_path / "bad")])
    assert done.exit_code == 2
    assert says in done.output
    assert "Traceback" not in done.output


def test_missing_corpus_and_nothing_to_judge() -> None:
    assert CliRunner().invoke(judge, ["/nonexistent"]).exit_code == 2
    assert CliRunner().invoke(judge, []).exit_code == 2


@pytest.mark.qemu
def test_fresh_random_cases_agree_with_qemu(tmp_path: Path) -> None:
    try:
        find_qemu()
    except QemuMissing as error:
        lack("qemu", str(error))
    args = ["--qemu", "--seed", "11", "--cases", "29", "--json", "--store", str(tmp_path)]
    done = CliRunner().invoke(judge, args)
    report = json.loads(done.stdout)
    assert report["unexplained"] == []
    assert done.exit_code == 0
    assert min(k["queries"] / k["cases"] for k in report["kinds"]) >= 100


def test_missing_qemu_is_one_sentence() -> None:
    done = CliRunner().invoke(judge, ["--qemu", "/nonexistent/qemu"])
    assert done.exit_code == 2
    assert "qemu" in done.output


def test_a_cpu_that_qemu_lacks_is_one_sentence() -> None:
    """QEMU 7.2 has no granule protection, and says so before it runs anything."""
    try:
        path = find_qemu()
    except QemuMissing as error:
        lack("qemu", str(error))
    if not qemu_version(path).startswith("7."):
        pytest.skip(f"{path} knows x-rme")
    done = CliRunner().invoke(judge, ["--qemu", path, "--cpu", "max,x-rme=on"])
    assert done.exit_code == 2
    assert "x-rme" in done.output
    assert "Traceback" not in done.output


def test_the_cpu_is_one_of_those_that_are_known() -> None:
    done = CliRunner().invoke(judge, ["--qemu", "--cpu", "pentium"])
    assert done.exit_code == 2
    assert "'pentium' is not one of" in done.output
