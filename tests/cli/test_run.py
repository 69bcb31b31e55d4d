"""`pgtable check` and `pgtable call`: what they print, as text and as JSON, and their exit codes."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import pytest
from click.testing import CliRunner, Result

from emu.cli import cli
from emu.image import KernelImage
from emu.machine import Machine
from tests.kernels import KERNELS, kernel_image, kernel_path

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schema"
KERNEL_IDS = [pytest.param(name, id=name) for name in KERNELS]

pytestmark = pytest.mark.kernels


_loaded = functools.cache(KernelImage.load)


@pytest.fixture(autouse=True)
def _read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel is read once for all these tests, as it is in one run of the command."""
    monkeypatch.setattr(KernelImage, "load", _loaded)


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def valid_json(result: Result, schema: str) -> dict[str, Any]:
    """The one object on stdout, valid for its schema."""
    found: dict[str, Any] = json.loads(result.stdout)
    text = json.loads((SCHEMAS / f"{schema}.json").read_text())
    jsonschema.Draft202012Validator(text).validate(found)
    assert next(iter(found.items())) == ("schema", f"pgtable.{schema}/1")
    return found


def middle(name: str) -> str:
    """A linear address, as `call` takes it."""
    plan = Machine.boot(kernel_image(name)).plan
    return f"lin:{plan.ram[0] + plan.ram[1] // 2:#x}"


# check


@pytest.mark.parametrize("name", KERNEL_IDS)
def test_check_finds_no_differences_and_shows_the_valid_bit_go(name: str) -> None:
    kernel_image(name)
    result = run("check", "set_memory_valid", "--kernel", name, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = valid_json(result, "check")
    assert found["kernel"] == name
    assert found["function"] == "set_memory_valid"
    assert found["differences"] == []
    assert len(found["changes"]) == 4
    marked = {"nG": ["0x0", "0x1"]} if name == "debian:7.3" else {}
    assert all(change["fields"] == {"VALID": ["0x1", "0x0"], **marked} for change in found["changes"])
    off, on = found["calls"]
    assert [off["arguments"][1:], on["arguments"][1:]] == [[4, 0], [4, 1]]
    assert off["changes"] == found["changes"]
    assert [c["old"] for c in on["changes"]] == [c["new"] for c in off["changes"]]
    for call in (off, on):
        assert call["value"] == call["predicted"]["value"] == 0
        assert call["maintenance"] == call["predicted"]["maintenance"]
        assert call["events"] == call["predicted"]["events"]
        assert call["stop"] is None
        assert [line.split()[0] for line in call["walk"]] == ["pgd", "p4d", "pud", "pmd", *["pte"] * 4]


@pytest.mark.parametrize("name", KERNEL_IDS)
def test_check_as_text_has_each_part_and_the_verdict(name: str) -> None:
    release = kernel_image(name).release
    result = run("check", "set_memory_valid", "--kernel", name, "--pages", "2")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == f"kernel      {release}"
    assert lines[-1] == "verdict     0 differences"
    titles = [line.split("  ")[0] for line in lines if line[:1].strip()]
    call = ["call", "changed", "in order", "model says", "walk"]
    assert titles == ["kernel", "model", *call, *call, "verdict"]
    assert re.search(
        r"^changed     0x[0-9a-f]{16} L3 0x[0-9a-f]{16} -> 0x[0-9a-f]{16}  VALID 0x1->0x0", result.stdout, re.M
    )
    assert "model says  returns 0, 2 descriptors changed, 2 TLBI, " in result.stdout


def test_check_with_the_model_of_7_x_on_6_1_names_bit_11_and_the_flush() -> None:
    kernel_image("debian:6.1")
    args = ("check", "set_memory_valid", "--kernel", "debian:6.1", "--model", "7.x")
    text = run(*args)
    assert text.exit_code == 1
    assert re.search(
        r"^difference  descriptor at 0x\w+ level 3: nG \(bit 11\) predicted 0x1, real 0x0$", text.stdout, re.M
    )
    assert "difference  TLB maintenance: event 0 predicted nothing more (of 0), real tlbi vaale1is" in text.stdout
    assert re.search(r"^verdict     [1-9]\d* differences$", text.stdout, re.M)

    result = run(*args, "--json")
    assert result.exit_code == 1
    found = valid_json(result, "check")
    assert found["model"] == "7.x"
    assert {(d["field"], d["bits"]) for d in found["differences"] if d["what"] == "descriptor"} == {("nG", "11")}
    assert found["differences"] == [d for call in found["calls"] for d in call["differences"]]


@pytest.mark.parametrize("enable", [0, 1])
def test_check_of_one_direction(enable: int) -> None:
    kernel_image("debian:6.12")
    result = run("check", "set_memory_valid", "--kernel", "debian:6.12", "--enable", str(enable), "--json")
    (call,) = valid_json(result, "check")["calls"]
    assert call["arguments"][2] == enable


def test_check_of_no_pages_has_its_warning() -> None:
    kernel_image("debian:6.1")
    result = run("check", "set_memory_valid", "--kernel", "debian:6.1", "--pages", "0", "--enable", "0")
    assert result.exit_code == 0
    assert re.search(r"^warnings    WARN at __apply_to_page_range\+0x\w+, mm/memory.c:\d+$", result.stdout, re.M)
    assert "walk        nothing: the range is empty" in result.stdout


def test_check_counts_what_it_does_not_show() -> None:
    kernel_image("debian:6.12")
    result = run("check", "set_memory_valid", "--kernel", "debian:6.12", "--pages", "600", "--enable", "0")
    assert "... 584 more" in result.stdout  # 16 of 600 changes


def test_check_takes_a_path() -> None:
    path = kernel_path("debian:6.1")
    result = run("check", "set_memory_valid", "--kernel", str(path), "--json")
    assert result.exit_code == 0
    assert valid_json(result, "check")["kernel"] == str(path)


# call


@pytest.mark.parametrize("name", KERNEL_IDS)
def test_call_shows_the_changes_and_the_tlb_maintenance(name: str) -> None:
    result = run("call", "set_memory_valid", middle(name), "2", "0", "--kernel", name, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = valid_json(result, "call")
    assert (found["function"], found["value"], found["signed"]) == ("set_memory_valid", "0x0000000000000000", 0)
    assert len(found["changes"]) == len(found["maintenance"]) == 2
    assert found["maintenance"][0]["operation"] == "VAALE1IS"
    assert found["events"] is None
    assert found["stop"] is None

    text = run("call", "set_memory_valid", middle(name), "2", "0", "--kernel", name)
    assert text.stdout.startswith("call        set_memory_valid = 0 (0x0)\nchanged     0x")
    assert "TLB         tlbi vaale1is, 0x" in text.stdout


def test_call_in_order() -> None:
    args = ("call", "set_memory_valid", middle("debian:6.12"), "1", "1", "--kernel", "debian:6.12", "--order")
    found = valid_json(run(*args, "--json"), "call")
    assert [re.sub("0x.*", "", e) for e in found["events"]] == [
        *("[", "dsb ishst", "isb", "dsb ishst", "tlbi vaale1is, ", "dsb ish", "isb")
    ]
    assert "in order    [0x" in run(*args).stdout


def test_call_with_a_trace_judges_what_was_done_and_keeps_every_event(tmp_path: Path) -> None:
    """set_direct_map_invalid_noflush() leaves the TLBI to its caller; a file that is there is not written over."""
    name = "debian:6.12"
    machine = Machine.boot(kernel_image(name))
    page = f"{machine.struct_page(machine.plan.ram[0] + 0x200_0000):#x}"
    words = ("call", "set_direct_map_invalid_noflush", page, "--kernel", name, "--trace")
    found = valid_json(run(*words, tmp_path / "a.jsonl", "--json"), "call")["findings"]
    assert [(f["rule"], f["cause"]) for f in found] == [("unclean at return", "no TLBI")]
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows[0] == {"schema": "pgtable.trace/1"}
    assert [row["kind"] for row in rows[1:]][-2:] == ["return", "finding"]
    text = run(*words, tmp_path / "b.jsonl").stdout
    assert "findings    unclean at return (no TLBI): " in text
    again = run(*words, tmp_path / "a.jsonl")
    assert (again.exit_code, "is there already" in again.stderr) == (2, True)
    lost = run(*words, tmp_path / "no" / "a.jsonl")
    assert (lost.exit_code, "No such file" in lost.stderr) == (2, True)


def test_call_reports_a_warning_and_an_error_value() -> None:
    kernel_image("debian:6.1")
    result = run("call", "set_memory_valid", "lin:0x48000000", "0", "0", "--kernel", "debian:6.1", "--json")
    found = valid_json(result, "call")
    assert (result.exit_code, found["signed"], found["value"]) == (0, -22, "0x00000000ffffffea")
    (warning,) = found["warnings"]
    assert (warning["file"], warning["once"], warning["repeat"]) == ("mm/memory.c", False, False)


def test_a_call_that_faults_has_exit_code_1_and_says_why() -> None:
    kernel_image("debian:6.12")
    result = run("call", "strlen", "0x1234", "--kernel", "debian:6.12")
    assert result.exit_code == 1
    assert "stopped     fault: EL1 read at 0x1234: translation fault, level 2" in result.stdout
    assert "=> strlen+0x14: ldp x2, x3, [x0]" in result.stdout
    found = valid_json(run("call", "strlen", "0x1234", "--kernel", "debian:6.12", "--json"), "call")
    assert found["stop"] == {"kind": "fault", "message": "EL1 read at 0x1234: translation fault, level 2"}


def test_arguments_are_numbers_symbols_with_offsets_and_linear_addresses() -> None:
    image = kernel_image("debian:6.12")
    banner = "Linux version "
    whole = run("call", "strlen", "linux_banner", "--kernel", "debian:6.12", "--json")
    tail = run("call", "strlen", "linux_banner+14", "--kernel", "debian:6.12", "--json")
    assert valid_json(whole, "call")["signed"] - valid_json(tail, "call")["signed"] == len(banner)
    by_address = run("call", f"{image.symbols['strlen']:#x}", "linux_banner", "--kernel", "debian:6.12", "--json")
    assert valid_json(by_address, "call")["value"] == valid_json(whole, "call")["value"]
    negative = run("call", "--kernel", "debian:6.12", "--json", "--", "set_memory_valid", "lin:0x48000000", "-1", "1")
    assert valid_json(negative, "call")["signed"] == -22


def test_a_call_without_an_end_is_ended_by_the_timeout() -> None:
    image = kernel_image("debian:6.12")
    loop = next(
        image.base + 4 * i for i in range(0, len(image.data) // 4) if image.word(image.base + 4 * i, 4) == 0x14000000
    )
    result = run("call", f"{loop:#x}", "--kernel", "debian:6.12", "--timeout", "0.3", "--json")
    assert result.exit_code == 1
    assert valid_json(result, "call")["stop"]["kind"] == "timeout"


# what the user got wrong

KERNEL = ("--kernel", "debian:6.1")
WRONG = {
    "unknown function to check": (
        ("check", "memcpy", *KERNEL),
        "check memcpy: debian:6.1 has walk_page_range_novma, .*, and all of them is `all`",
    ),
    "unknown model": (
        ("check", "set_memory_valid", *KERNEL, "--model", "5.10"),
        r"model 5\.10: there is none, only 6\.1, 6\.12-novma, 6\.12, 7\.x, .*",
    ),
    "more pages than there are": (
        ("check", "set_memory_valid", *KERNEL, "--pages", "40000"),
        r"40000 pages: only \d+ lie between 0x\w+ and the tables of the linear map",
    ),
    "unknown symbol": (("call", "set_memory_walid", *KERNEL), "this kernel has no symbol set_memory_walid"),
    "ambiguous symbol": (("call", "gic_handle_irq", *KERNEL), "gic_handle_irq stands for 2 addresses: 0x.*, 0x.*"),
    "nonsense argument": (
        ("call", "strlen", "12x", *KERNEL),
        "argument 12x: neither a number, lin:PA nor a symbol of this kernel",
    ),
    "nonsense linear address": (("call", "strlen", "lin:zz", *KERNEL), "argument lin:zz: neither .*"),
    "too large": (("call", "strlen", "0x1ffffffffffffffff", *KERNEL), ".* does not fit 64 bits"),
    "nine arguments": (("call", "strlen", *"123456789", *KERNEL), "9 arguments: a call passes at most 8 in registers"),
    "no symbol file": (("call", "strlen", *KERNEL, "--symbols", "/nonexistent"), "/nonexistent does not exist; .*"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_sentence_and_exit_code_2(case: str) -> None:
    kernel_image("debian:6.1")
    args, sentence = WRONG[case]
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(f"pgtable: error: {sentence}\n", result.stderr), result.stderr
