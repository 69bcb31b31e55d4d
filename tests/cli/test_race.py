"""`pgtable race`: what it prints, as text and as JSON, its exit codes, and that a finding can be had again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import pytest
from click.testing import CliRunner, Result

from emu.cli import cli
from tests.kernels import kernel_path
from tests.snapshots import booted

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "schema" / "race.json"
KERNEL = "debian:6.12"


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["race", *args])


def valid_json(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(found)
    return found


@pytest.mark.kernels
def test_a_finding_is_printed_with_a_schedule_that_gives_it_again() -> None:
    kernel_path(KERNEL)
    found = valid_json(run("lost-update", "--kernel", KERNEL, "--json"))
    assert [finding["kind"] for finding in found["findings"]] == ["lost-update"] * 2
    for finding in found["findings"]:
        result = run("lost-update", "--kernel", KERNEL, "--replay", finding["schedule"], "--json")
        assert result.exit_code == 1
        assert valid_json(result)["findings"][0]["words"] == finding["words"]


@pytest.mark.kernels
def test_text_shows_columns_and_the_verdict() -> None:
    kernel_path(KERNEL)
    result = run("lost-update", "--kernel", KERNEL, "--preemptions", "1")
    assert result.exit_code == 1
    assert "str x1, [x0]" in result.stdout
    assert "DBM 0x1->0x0" in result.stdout
    assert result.stdout.endswith("verdict     2 findings\n")
    assert "1 preemptions: 26 schedules" in result.stderr
    quiet = run("disjoint-pages", "--kernel", KERNEL)
    assert (quiet.exit_code, "9657700 with any number of preemptions" in quiet.stdout) == (0, True)


def test_the_list_has_every_scenario_with_its_options() -> None:
    found = valid_json(run("--list", "--json"))
    names = [row["name"] for row in found["scenarios"]]
    text = run("--list").stdout
    assert names[0] == "lost-update"
    assert all(name in text for name in names)
    assert "lock=none|read|write|hotplug" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "name a scenario"),
        (("nonsense",), "no scenario nonsense"),
        (("lost-update",), "give --kernel KERNEL or --snapshot FILE"),
        (("lost-update", "--kernel", "x", "--preemptions", "-1"), "--preemptions -1: must be a number or all"),
        (("lost-update", "--kernel", "x", "--with", "lock"), "must be NAME=VALUE"),
        (("lost-update", "--kernel", "x", "--kernel", "y"), "give --kernel KERNEL or --snapshot FILE, one of them"),
        (("--campaign", "/nowhere/a.db"), "--campaign needs --kernel KERNEL"),
        (("--campaign", "/nowhere/a.db", "--kernel", "x", "--replay", "A B"), "--campaign takes none of --snapshot"),
    ],
)
def test_bad_input_is_one_sentence(args: tuple[str, ...], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--with", "lock=read"), "lost-update has no option lock"),
        (("--replay", "A7 B"), "A never runs to its end"),
        (("--replay", "A5000 B A"), "A has no switch point there"),
    ],
)
def test_what_does_not_fit_the_scenario_is_refused(args: tuple[str, ...], message: str) -> None:
    kernel_path(KERNEL)
    result = run("lost-update", "--kernel", KERNEL, *args)
    assert (result.exit_code, message in result.output) == (2, True)


@pytest.mark.full
@pytest.mark.qemu
@pytest.mark.kernels
def test_a_snapshot_with_lpa2_tables_races_too() -> None:
    """Unicorn's MMU has no such tables: the machines take ours."""
    snapshot = booted("debian:7.2-16k", cpu="max")
    assert snapshot.lpa2
    found = valid_json(run("lost-update", "--snapshot", str(snapshot.path), "--preemptions", "1", "--json"))
    assert [finding["kind"] for finding in found["findings"]] == ["lost-update"] * 2
