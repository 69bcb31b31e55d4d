"""`make bench`: it runs, says what its schema says, and (full) the bounds hold with a margin for a noisy host.

Judges: a plain C walk, memset, a bare loop and QEMU TCG, measured in the same run; each row also compares answers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import pytest

from benchmarks.__main__ import lines, summary
from benchmarks.rows import GROUPS, Bench, Row, row
from benchmarks.timing import Spread, in_turn, ratios

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads((ROOT / "docs" / "schema" / "bench.json").read_text())
MARGIN = 2  # a shared host: a bound that is missed by more is a regression
MISSED = {"4 GiB scattered, beside its tables": 16.0}  # what docs/performance.md says of it, and no more


def bench(*options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "benchmarks", *options]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize("group", ["translate", "build", "memory"])
def test_a_quick_run_prints_a_table_and_writes_what_the_schema_says(group: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = bench("--quick", "--rounds", "1", "--only", group, "--json", str(out))
    found = json.loads(out.read_text())
    jsonschema.validate(found, SCHEMA)
    assert {each["group"] for each in found["rows"]} == {group}
    for each in found["rows"]:
        assert each["name"] in done.stdout
        assert each["met"] is None  # other sizes than those of the bounds
    assert "nothing is judged" in done.stdout


@pytest.mark.full
def test_every_group_runs(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    bench("--quick", "--rounds", "1", "--json", str(out))
    found = json.loads(out.read_text())
    jsonschema.validate(found, SCHEMA)
    assert [*dict.fromkeys(each["group"] for each in found["rows"])] == list(GROUPS)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_bounds_hold_with_a_margin(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    line = [sys.executable, "-m", "benchmarks", "--no-fetch", "--rounds", "5", "--json", str(out)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode in (0, 1), done.stderr  # 1: a bound is missed, by less than the margin as we want it here
    bounded = [each for each in json.loads(out.read_text())["rows"] if each["bound"] is not None]
    assert len(bounded) >= 18
    for each in bounded:
        figure = each["ratio"] or each["figures"]["ours"]
        margin = {"MiB": 1, "ms": 2 * MARGIN}.get(each["unit"], MARGIN)  # ms: no ratio, and this host may be busy
        allowed = margin * each["bound"]
        allowed = MISSED.get(each["name"], allowed)
        assert figure["median"] <= allowed, each


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--json", "/nowhere/bench.json"], "--json /nowhere/bench.json: there is no folder /nowhere"),
        (["--gdb-pt-dump", "/nowhere"], "--gdb-pt-dump /nowhere: no such folder"),
        (["--only", "everything"], "argument --only: invalid choice: 'everything'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_make_no_sense_are_refused_in_a_sentence(options: list[str], message: str) -> None:
    done = bench(*options, code=2)
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def a_row(**changes: Any) -> Row:
    made = row("g", "name", "ns", {"ours": [3.0, 4.0, 8.0], "C": [2.0, 2.0, 2.0]}, under="C", bound=2)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_a_bound_is_judged_by_the_median_of_each_rounds_ratio() -> None:
    made = a_row()
    assert made.ratio == Spread(2.0, 1.5, 4.0)
    assert made.met is True
    assert a_row(bound=1.99).met is False
    assert a_row(bound=None).met is None
    assert a_row(judged=False).met is None
    assert a_row(ratio=None).met is None  # the reference was not to be had
    assert row("g", "alone", "MiB", {"ours": [5.0]}, under=None, bound=4).met is False


def test_a_missing_contender_is_not_a_ratio_and_a_miss_is_named() -> None:
    assert ratios({"ours": [1.0]}, "ours", "C") == []
    text = "\n".join(lines(a_row(bound=1.5)))
    assert "MISSED" in text
    assert "C 2.0" in text
    missed = "\n".join(summary([a_row(bound=1.5), a_row()], Bench(missing={"drgn": "not installed"})))
    assert missed == "1 of 2 bounds met\nmissed: name\nnot available: drgn: not installed"


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []

    def contender(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    times = in_turn({"a": lambda: contender("a"), "b": lambda: contender("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert times == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_the_guest_of_the_tcg_row_is_what_its_source_assembles_to() -> None:
    from benchmarks import tcg
    from emu import snippets

    try:
        made = snippets.assemble((tcg.HERE / "guest.S").read_text(), "guest")
    except snippets.SnippetError as error:
        pytest.skip(str(error))
    assert bytes(made) == tcg.guest_words()
