"""`pgtable check` over many cases: the table, JSON, failing cases on disk, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import pytest
from click.testing import CliRunner, Result

from emu.checks import campaign, registry, stored
from emu.cli import cli
from tests.kernels import kernel_image, kernel_path

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


def test_cases_of_an_earlier_check_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_path("debian:6.12")
    monkeypatch.setattr(campaign, "SHRINK_TRIES", 1)
    wrong = (
        "check",
        "kernel_page_present",
        "--kernel",
        "debian:6.12",
        "--cases",
        "0",
        "--model",
        "7.x",
        "--save",
        "kept",
    )
    first, second = run(*wrong), run(*wrong)
    names = [
        [line.removeprefix("failing case saved: ") for line in result.stderr.splitlines()] for result in (first, second)
    ]
    assert len(names[0]) == len(names[1]) > 0
    assert {str(path) for path in Path("kept").iterdir()} == {*names[0], *names[1]}
    assert len({*names[0], *names[1]}) == 2 * len(names[0])


def test_the_result_is_printed_where_its_cases_cannot_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_path("debian:6.12")
    monkeypatch.setattr(campaign, "SHRINK_TRIES", 1)
    Path("file").write_text("")
    function = "kernel_page_present"
    wrong = ("check", function, "--kernel", "debian:6.12", "--cases", "0", "--model", "7.x")
    result = run(*wrong, "--save", "file/folder")
    assert result.exit_code == 1
    assert "cases differ" in result.stdout.splitlines()[-1]
    assert all(line.startswith(f"failing case of {function} not saved: ") for line in result.stderr.splitlines())
    assert "file/folder" in result.stderr


@pytest.mark.parametrize("value", [7, -1, 1 << 64])
def test_a_stored_case_with_numbers_that_no_check_makes_is_refused(value: int) -> None:
    """A walk_lock that Linux has not."""
    harness = registry.harness("walk_page_range")
    world = campaign.Worlds(kernel_image("debian:6.12")).of(harness, "plain")
    data = json.loads(stored.dump(harness.function, "plain", 4096, next(iter(harness.prepared(world)))))
    data["case"]["walk_lock"] = value
    Path("case.json").write_text(json.dumps(data))
    result = run("check", "walk_page_range", "--kernel", "debian:6.12", "--case", "case.json")
    assert result.exit_code == 2
    assert result.stderr.startswith("pgtable: error: case case.json: cannot be run on debian:6.12")
    assert len(result.stderr.splitlines()) == 1


def test_a_stored_case_of_set_memory_valid_is_run_without_cases() -> None:
    harness = registry.harness("set_memory_valid")
    world = campaign.Worlds(kernel_image("debian:7.3")).of(harness, "plain")
    case = next(iter(harness.prepared(world)))
    Path("case.json").write_text(stored.dump(harness.function, "plain", 4096, case))
    result = run("check", "set_memory_valid", "--kernel", "debian:7.3", "--case", "case.json")
    assert (result.exit_code, "0 of 1 cases differ" in result.stdout) == (0, True)


def children(pid: int) -> list[int]:
    """PIDs of the processes that `pid` started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = stat.read_text().rpartition(")")[2].split()[1]
            found += [int(stat.parent.name)] * (int(parent) == pid)
    return found


# One of the processes is soon idle: it would be the one to print what interrupted it.
TWO = """
from emu.checks import registry
from emu.cli import main
registry.names = lambda image: ["can_set_direct_map", "walk_page_range"]
main()
"""


@pytest.mark.parametrize("group", [False, True])
def test_ctrl_c_ends_all_processes_and_prints_one_line(group: bool) -> None:
    """A terminal sends SIGINT to each process of the group; kill sends it to one."""
    command = [sys.executable, "-c", TWO, "check", "all", "--kernel", "debian:7.3", "--jobs", "2", "--cases", "1000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        limit = time.monotonic() + 30
        while len(workers := children(process.pid)) < 2:
            assert time.monotonic() < limit
            time.sleep(0.05)
        time.sleep(5)  # in the middle of the second function's cases
        (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out, err.strip()) == (130, "", "pgtable: interrupted")
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


FIELDS = {"tree": {"root": 0, "words": [], "pages": 1}, "start": 0, "end": 0, "callbacks": [], "script": []}
FIELDS |= {"walk_lock": 0, "mm": "init_mm", "counts": [1, 1], "private": False}


@pytest.mark.parametrize(
    ("world", "case", "sentence"),
    [
        ("plain", {"args": []}, "case: args where a WalkCase has tree, "),
        ("plain", FIELDS, "its tables are not where debian:7.3 has room for them"),
        ("ng", FIELDS, f"debian:7.3 has no world ng for {WALK}"),
    ],
)
def test_a_case_that_does_not_fit_is_refused(world: str, case: object, sentence: str) -> None:
    Path("case.json").write_text(json.dumps({"function": WALK, "world": world, "page_size": 4096, "case": case}))
    result = run("check", WALK, "--kernel", "debian:7.3", "--case", "case.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"case case.json: {sentence}" in result.stderr


def test_a_case_of_what_is_checked_as_a_whole_is_refused() -> None:
    result = run("check", "ptdump", "--kernel", "debian:7.3", "--case", "case.json")
    assert result.exit_code == 2
    assert "case case.json: debian:7.3 has no ptdump that is checked case by case" in result.stderr


def test_a_case_of_another_function_is_refused() -> None:
    Path("case.json").write_text('{"function": "set_memory_ro", "world": "plain", "page_size": 4096, "case": null}')
    result = run("check", WALK, "--kernel", "debian:7.3", "--case", "case.json")
    assert result.exit_code == 2
    assert "case case.json: is of set_memory_ro in world plain" in result.stderr
