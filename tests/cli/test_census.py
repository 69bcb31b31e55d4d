"""`pgtable census`: what it prints, and its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import pytest
from click.testing import CliRunner, Result

from emu.census import PERMISSIONS, functions_of
from emu.cli import cli
from emu.context import Context
from tests.kernels import kernel_image
from tests.snapshots import FAST, booted

SCHEMA = json.loads((Path(__file__).resolve().parents[2] / "docs" / "schema" / "census.json").read_text())

pytestmark = pytest.mark.kernels


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["census", "--kernel", FAST, *args])


@pytest.mark.qemu
def test_the_object_is_valid_and_has_every_function() -> None:
    booted()
    result = run("--json", "--seed", "2", "--memory", "128M")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    assert next(iter(found.items())) == ("schema", "pgtable.census/1")
    assert (found["kernel"], found["cpu"], found["seed"]) == (FAST, "cortex-a57", 2)
    image = kernel_image(FAST)
    assert found["functions"] == list(functions_of(image))
    assert int(found["kaslr_offset"], 16) not in (0, booted().origin.kaslr_offset)
    assert found["calls"] == sum(row["calls"] for row in found["rows"])
    protecting = [row for row in found["rows"] if row["function"] == "update_mapping_prot"]
    assert {row["caller"]["symbol"].partition("+")[0] for row in protecting} == {
        "mark_rodata_ro",
        "mark_linear_text_alias_ro",
    }
    assert all(
        image.symbols.describe(int(row["caller"]["address"], 16)) == row["caller"]["symbol"] for row in protecting
    )


@pytest.mark.full
@pytest.mark.qemu
def test_the_table_has_a_line_for_each_row_and_steps_go_to_stderr() -> None:
    booted()
    result = run("--functions", "update_mapping_prot,free_initmem,set_memory_rw", "--limit", "2", "--no-kaslr")
    head, titles, *lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert re.fullmatch(r"\S+: 3 calls of 2 functions, cortex-a57, console=ttyAMA0 panic=-1 nokaslr", head)
    assert titles.split() == ["CALLS", "PAGES", "FUNCTION", "CALLER", "REGION", "CONTEXT", "LOCKED", "NOTE"]
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert cells[0][:3] == ["1", "-", "free_initmem"]
    assert [row[-1] for row in cells[1:]] == ["limit reached"] * (len(cells) - 1)
    steps = [line.split()[0] for line in result.stderr.splitlines()]
    assert steps == ["booting", "3"]
    assert "stopping at 3 functions" in result.stderr


def test_the_schema_knows_the_contexts() -> None:
    row = SCHEMA["properties"]["rows"]["items"]["properties"]
    assert row["context"]["enum"] == [each.value for each in Context]


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_image(FAST)
    monkeypatch.setenv("PATH", str(tmp_path))
    for args, sentence in {
        ("--functions", "set_memory_valid,nosuch"): "this kernel has no symbol nosuch",
        ("--memory", "3"): "memory 3: must be whole MiB, at least 64M, as 256M or 1G",
        ("--qemu", "nosuch"): "nosuch is not there or not on PATH: install the Debian package qemu-system-arm.*",
    }.items():
        result = run(*args)
        assert (result.exit_code, result.stdout) == (2, "")
        assert re.fullmatch(f"pgtable: error: {sentence}\n", result.stderr), result.stderr


def test_help_ends_with_an_example_and_says_what_is_counted() -> None:
    text = run("--help").stdout
    assert text.rstrip().endswith("pgtable census --kernel debian:7.3 --cmdline kfence.sample_interval=10")
    assert "set_memory_ro" in PERMISSIONS
