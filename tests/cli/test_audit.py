"""`pgtable audit`: what it prints, its JSON and JUnit files, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import pytest
from click.testing import CliRunner, Result

from emu.cli import cli
from emu.cli_audit import SHOWN
from emu.linux_audit import LINUX_RULES
from pgtable.audit import RULES, STAGE2_RULES
from tests.pgtable.test_audit import ALIAS, AP2, DATA, DATA_PA, PAGE, PXN, RAM, TEXT, World, world
from tests.snapshots import booted

SCHEMA = json.loads((Path(__file__).resolve().parents[2] / "docs" / "schema" / "audit.json").read_text())
NAMES = [rule.name for rule in (*RULES, *LINUX_RULES)]
ALL_NAMES = [*NAMES, *(rule.name for rule in STAGE2_RULES)]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, ["audit", *map(str, args)])


def source(made: World, tmp_path: Path) -> list[str]:
    """The world as a raw dump and a file of registers: arguments of the command."""
    dump, regs = tmp_path / "ram.bin", tmp_path / "regs.txt"
    region = made.memory.regions[0]
    dump.write_bytes(region.words.tobytes())
    regs.write_text("".join(f"{name}={value:#x}\n" for name, value in made.regs.as_dict().items()))
    return [f"raw:{dump}@{RAM:#x}", "--regs", str(regs)]


def broken(pages: int) -> World:
    """Every other page of data is executable."""
    made = world()
    for i in range(pages):
        made.flip(DATA + 2 * i * PAGE, PXN)
    return made


def test_a_clean_tree_is_exit_code_0_and_a_line_a_rule(tmp_path: Path) -> None:
    result = run(*source(world(), tmp_path))
    assert result.exit_code == 0
    first, *lines, last = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert first.endswith(": EL10, 7 runs, 12 tables")
    assert [line.split()[1] for line in lines] == NAMES
    assert {line.split()[0] for line in lines} == {"pass", "info", "skip"}
    assert last == "verdict     0 failed, 16 passed, 1 informed, 6 skipped"


def test_ranges_are_capped_in_the_text_and_all_in_json(tmp_path: Path) -> None:
    made = broken(4)
    made.upper.map(ALIAS, DATA_PA + (1 << 20), 64 * PAGE, level=3)
    for i in range(20):
        made.flip(ALIAS + 2 * i * PAGE, PXN)
    args = source(made, tmp_path)
    text = run(*args, "--rule", "wx")
    assert text.exit_code == 1
    lines = text.stdout.splitlines()
    assert lines[1] == "fail        wx  24 ranges, 0x18000 bytes"
    assert lines[2] == f"              range {DATA:#018x} +0x1000 -> {DATA_PA:#x}: EL1 rwx EL0 ---"
    assert [line.split()[0] for line in lines[2:]] == ["range"] * SHOWN + ["...", "verdict"]
    assert lines[-2].strip() == f"... and {24 - SHOWN} more"
    result = run(*args, "--rule", "wx", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    assert next(iter(found.items())) == ("schema", "pgtable.audit/1")
    (rule,) = found["rules"]
    assert found["failed"] == 1
    assert len(rule["ranges"]) == 24
    assert rule["ranges"][0] == {
        "va": f"{DATA:#018x}",
        "size": PAGE,
        "pa": f"{DATA_PA:#018x}",
        "alias": None,
        "text": "EL1 rwx EL0 ---",
    }


def test_junit_has_a_case_for_each_rule(tmp_path: Path) -> None:
    made = broken(1)
    made.flip(TEXT, AP2)
    file = tmp_path / "audit.xml"
    assert run(*source(made, tmp_path), "--junit", file).exit_code == 1
    suite = ElementTree.parse(file).getroot()
    cases = {case.get("name"): case for case in suite}
    assert list(cases) == NAMES
    counts = {name: len(suite.findall(f"testcase/{name}")) for name in ("failure", "skipped")}
    assert {"failure": int(suite.get("failures", "")), "skipped": int(suite.get("skipped", ""))} == counts
    assert (int(suite.get("tests", "")), counts["failure"]) == (len(NAMES), 1)
    failure = cases["wx"].find("failure")
    assert failure is not None
    assert failure.get("message", "").endswith(": 2 ranges, 8K")
    assert [line.partition(" ")[0] for line in (failure.text or "").splitlines()] == [f"{TEXT:#018x}", f"{DATA:#018x}"]


@pytest.mark.kernels
@pytest.mark.qemu
def test_a_booted_kernel_is_clean_and_says_what_is_on_purpose() -> None:
    snapshot = booted()
    result = run(snapshot.path, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    assert [rule["rule"] for rule in found["rules"]] == NAMES
    assert {rule["rule"] for rule in found["rules"] if rule["expected"]} == {"alias-attributes", "global"}
    text = run(snapshot.path).stdout
    assert "expected 0x" in text
    assert text.splitlines()[-1] == "verdict     0 failed, 21 passed, 1 informed, 1 skipped"


def test_list_names_every_rule_and_needs_no_source() -> None:
    result = run("--list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == ALL_NAMES


def test_every_rule_is_in_the_documentation() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "audit.md").read_text()
    assert [name for name in ALL_NAMES if f"| `{name}` |" not in text] == []


def test_nothing_mapped_is_no_pass(tmp_path: Path) -> None:
    made = world()
    off = made._replace(regs=made.regs.replace(SCTLR_EL1=0))
    result = run(*source(off, tmp_path))
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "verdict     nothing is mapped: nothing was judged"


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    args = source(world(), tmp_path)
    nowhere = tmp_path / "no" / "audit.xml"
    for bad, sentence in {
        (): "audit needs a SOURCE (or --list)",
        ("--list", "--json"): "--list: prints text; leave out --json",
        (*args, "--rule", "wx", "--rule", "nosuch"): "--rule nosuch: no such rule; pgtable audit --list shows them",
        (*args, "--junit", str(nowhere)): f"--junit {nowhere}: No such file or directory",
        (str(nowhere),): f"{nowhere}: No such file or directory",
    }.items():
        result = run(*bad)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("pgtable: error: ")
        assert sentence.partition(": No such")[0] in result.stderr


def test_help_ends_with_an_example() -> None:
    assert run("--help").stdout.rstrip().endswith("--junit audit.xml")
