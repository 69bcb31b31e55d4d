"""`pgtable check` over many cases: the table, JSON, failing cases on disk, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import pytest
from click.testing import CliRunner, Result

from emu.cli import cli
from tests.kernels import kernel_path

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "schema" / "check.json"
WALK = "walk_kernel_page_table_range"

pytestmark = pytest.mark.kernels


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args)


def valid_json(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(found)
    return found


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_path("debian:7.3")
    monkeypatch.chdir(tmp_path)


def test_a_right_model_reaches_every_row_and_says_0() -> None:
    result = run("check", WALK, "--kernel", "debian:7.3", "--cases", "20", "--seed", "3", "--json")
    found = valid_json(result)
    assert (result.exit_code, found["differences"]) == (0, [])
    (report,) = found["functions"]
    assert (report["function"], report["failed"], report["unreached"]) == (WALK, 0, [])
    assert found["events"] == report["events"] > 10_000
    assert [cover["function"] for cover in found["coverage"]] == [WALK]
    assert not Path("pgtable-failures").exists()


def test_the_text_is_a_table_of_functions_and_a_verdict() -> None:
    result = run("check", WALK, "--kernel", "debian:7.3", "--cases", "5")
    assert result.exit_code == 0
    assert any(line.split()[:1] == [WALK] for line in result.stdout.splitlines())
    assert result.stdout.splitlines()[-1].startswith("verdict     0 of ")


def test_a_wrong_model_is_told_with_a_small_case_that_can_be_run_again() -> None:
    kernel_path("debian:6.12")
    result = run("check", WALK, "--kernel", "debian:6.12", "--cases", "0", "--model", "7.x")
    assert result.exit_code == 1
    assert "predicted" in result.stdout
    saved = sorted(Path("pgtable-failures").glob("*.json"))
    assert saved
    assert "failing case saved" in result.stderr
    again = run("check", WALK, "--kernel", "debian:6.12", "--model", "7.x", "--case", str(saved[0]))
    assert (again.exit_code, "1 of 1 cases differ" in again.stdout) == (1, True)
    right = run("check", WALK, "--kernel", "debian:6.12", "--case", str(saved[0]))
    assert (right.exit_code, "0 of 1 cases differ" in right.stdout) == (0, True)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("strlen",), "check strlen: debian:7.3 has walk_kernel_page_table_range, "),
        ((WALK, "--case", "nothing.json"), "case nothing.json: "),
        ((WALK, "--model", "6.13"), "model 6.13: there is none, only 6.1, "),
        ((WALK, "--cases", "many"), "Invalid value for '--cases'"),
    ],
)
def test_bad_input_is_one_sentence(args: tuple[str, ...], sentence: str) -> None:
    result = run("check", *args, "--kernel", "debian:7.3")
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr


def test_a_case_of_another_function_is_refused() -> None:
    Path("case.json").write_text('{"function": "set_memory_ro", "world": "plain", "case": null}')
    result = run("check", WALK, "--kernel", "debian:7.3", "--case", "case.json")
    assert result.exit_code == 2
    assert "case case.json: is of set_memory_ro in world plain" in result.stderr
