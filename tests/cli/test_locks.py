"""`pgtable locks` and `pgtable compare`: what they print, as text and as JSON, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import pytest
from click.testing import CliRunner, Result

from emu.cli import cli
from tests.kernels import kernel_path

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schema"


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args)


def valid_json(result: Result, schema: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{schema}.json").read_text())).validate(found)
    return found


def test_mail_v1_lets_a_user_mm_be_walked_without_a_lock() -> None:
    result = run("locks", "--variant", "mail-v1", "--entry", "walk_page_range_novma")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines() if "NOLOCK" in line and "walk_page" in line]
    assert lines[0][3:] == ["owner", "only", "proceeds", "proceeds"]
    assert lines[1][3:] == ["UNSAFE,", "silent", "UNSAFE,", "silent", "proceeds"]


def test_mail_review_shows_both_readings_with_their_sentences() -> None:
    found = valid_json(run("locks", "--variant", "mail-review", "--json"), "locks")
    assert [table["variant"] for table in found["variants"]] == ["mail-review/assert", "mail-review/refuse"]
    assert "WARNs and is walked" in found["variants"][0]["sentence"]
    assert "-EINVAL" in found["variants"][1]["sentence"]


def test_without_a_variant_every_release_and_every_step_of_the_thread_is_shown() -> None:
    found = valid_json(run("locks", "--json"), "locks")
    names = [table["variant"] for table in found["variants"]]
    assert names[:4] == ["6.1", "6.12-novma", "6.12", "7.x"]
    assert names[4:] == ["mail-base", "mail-v1", "mail-review/assert", "mail-review/refuse", "v2", "v3"]


def test_the_range_condition_is_an_option_of_the_thread() -> None:
    found = valid_json(run("locks", "--variant", "mail-review", "--range-check", "--json"), "locks")
    assert [table["variant"] for table in found["variants"]] == ["mail-review/assert+range", "mail-review/refuse+range"]
    cells = [
        c for c in found["variants"][0]["cells"] if c["mm"] == "init_mm, linear map" and c["walk_lock"] == "NOLOCK"
    ]
    assert [cell["outcome"] for cell in cells] == ["-EINVAL"] * 3, "every set_memory_valid of KFENCE's pool"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--variant", "6.13"), "variant 6.13: there is none, only 6.1, "),
        (("--variant", "7.x", "--entry", "walk"), "entry walk: no variant shown has it"),
        (("--variant", "v2", "--range-check"), "--range-check is for mail-v1 and mail-review, not v2"),
    ],
)
def test_bad_input_is_one_sentence(args: tuple[str, ...], sentence: str) -> None:
    result = run("locks", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.kernels
def test_compare_is_silent_about_a_kernel_and_itself() -> None:
    path = str(kernel_path("debian:6.1"))
    result = run("compare", path, path, "walk_page_range_novma", "--cases", "20", "--json")
    found = valid_json(result, "compare")
    assert (result.exit_code, found["differ"], found["groups"]) == (0, 0, [])


@pytest.mark.kernels
def test_compare_shows_the_events_where_two_kernels_part() -> None:
    paths = [str(kernel_path(name)) for name in ("debian:6.1", "debian:7.3")]
    names = "walk_page_range_novma:walk_kernel_page_table_range_lockless"
    result = run("compare", *paths, names, "--cases", "5")
    assert result.exit_code == 1
    assert "verdict" in result.stdout.splitlines()[-1]
    assert any(line.lstrip().startswith("A => ") for line in result.stdout.splitlines())


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("kernels", "function", "sentence"),
    [
        (("debian:6.1", "debian:6.1"), "strlen", "compare strlen: "),
        (("debian:6.1", "debian:6.1"), "a:b:c", "function a:b:c: one name, or NAME_A:NAME_B"),
        (
            ("debian:7.3", "debian:7.2-16k"),
            "walk_page_range_debug",
            "page sizes differ (debian:7.3 4K, debian:7.2-16k 16K)",
        ),
    ],
)
def test_compare_refuses_what_it_cannot_compare(kernels: tuple[str, str], function: str, sentence: str) -> None:
    for name in kernels:
        kernel_path(name)
    result = run("compare", *kernels, function)
    assert result.exit_code == 2
    assert sentence in result.stderr
