"""`pgtable snapshot` and `pgtable call --snapshot`: what they print, and their exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import pytest
from click.testing import CliRunner, Result

from emu.cli import cli
from emu.snapshot import Snapshot
from tests.kernels import kernel_image
from tests.snapshots import FAST, booted

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schema"

pytestmark = pytest.mark.kernels


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def call(*args: object) -> Result:
    return run("call", "--snapshot", str(booted().path), *args)


def valid_json(result: Result, schema: str) -> dict[str, Any]:
    """The one object on stdout, valid for its schema."""
    found: dict[str, Any] = json.loads(result.stdout)
    text = json.loads((SCHEMAS / f"{schema}.json").read_text())
    jsonschema.Draft202012Validator(text).validate(found)
    assert next(iter(found.items())) == ("schema", f"pgtable.{schema}/1")
    return found


# snapshot info and boot


@pytest.mark.qemu
def test_info_says_where_it_comes_from() -> None:
    snapshot = booted()
    found = valid_json(run("snapshot", "info", str(snapshot.path), "--json"), "snapshot-info")
    assert (found["kernel"], found["cpu"], found["at"]) == (FAST, "cortex-a57", "mark")
    assert int(found["base"], 0) == snapshot.image.base
    assert int(found["system"]["TTBR1_EL1"], 0) == snapshot.registers.TTBR1_EL1
    assert found["ram"] == [{"base": "0x0000000040000000", "size": 256 << 20}]
    text = run("snapshot", "info", str(snapshot.path)).stdout
    assert f"release       {snapshot.origin.release}" in text
    assert re.search(r"^TTBR1_EL1     0x\w{16}$", text, re.M)
    assert "ram           0x0000000040000000, 256 MiB" in text


@pytest.mark.full
@pytest.mark.qemu
def test_boot_writes_a_snapshot_and_shows_its_steps_on_stderr(tmp_path: Path) -> None:
    booted()
    result = run("snapshot", "boot", "--kernel", FAST, "-o", str(tmp_path / "s"), "--memory", "128M", "--no-kaslr")
    assert result.exit_code == 0, result.stderr
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["booting", "stopped", "saving"]
    assert "command_line  console=ttyAMA0 panic=-1 nokaslr" in result.stdout
    assert "ram           0x0000000040000000, 128 MiB" in result.stdout


def test_boot_without_qemu_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_image("debian:6.12")
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run("snapshot", "boot", "--kernel", "debian:6.12", "-o", str(tmp_path / "s"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "install the Debian package qemu-system-arm" in result.stderr
    assert result.stderr.count("\n") == 1


WRONG_BOOT = {
    "memory": (("--memory", "3"), "memory 3: must be whole MiB, at least 64M, as 256M or 1G"),
    "symbol": (("--at", "nosuch"), "this kernel has no symbol nosuch"),
    "folder": (("-o", "/nonexistent/s"), "/nonexistent/s: there is no folder /nonexistent"),
    "kernel": (("--kernel", "/nonexistent"), "/nonexistent does not exist.*"),
}


@pytest.mark.parametrize("case", WRONG_BOOT)
def test_bad_input_to_boot_is_one_sentence(case: str, tmp_path: Path) -> None:
    kernel_image("debian:6.12")
    args, sentence = WRONG_BOOT[case]
    result = run("snapshot", "boot", "--kernel", "debian:6.12", "-o", str(tmp_path / "s"), *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(f"pgtable: error: {sentence}\n", result.stderr), result.stderr


# call --snapshot


@pytest.mark.qemu
def test_calls_follow_each_other_and_use_what_was_returned() -> None:
    result = call("vmalloc", "8192,", "set_memory_ro", "$1", "2", ",", "find_vm_area", "$1", ",", "vfree", "$1")
    assert result.exit_code == 0
    assert result.stderr == "vmalloc is vmalloc_noprof in this kernel\n"
    titles = re.findall(r"^call        (\w+) = ", result.stdout, re.M)
    assert titles == ["vmalloc", "set_memory_ro", "find_vm_area", "vfree"]
    va = re.search(r"vmalloc = -\d+ \((0x\w+)\)", result.stdout)
    assert va
    assert "struct      struct vm_struct at 0x" in result.stdout
    assert f"addr = {va[1]}" in result.stdout
    assert f"tlbi vaale1is, {va[1]}" in result.stdout


@pytest.mark.qemu
def test_the_json_has_every_call() -> None:
    found = valid_json(call("vmalloc", "4096,", "find_vm_area", "$1", "--json"), "call")
    (first,) = found["earlier"]
    assert (first["function"], found["function"]) == ("vmalloc", "find_vm_area")
    assert [change["va"] for change in first["changes"]] == [first["value"]]
    assert first["struct"] is None
    assert f"  addr = {int(first['value'], 0):#x}" in found["struct"]


@pytest.mark.qemu
def test_strings_symbols_and_printed_text() -> None:
    result = call("_printk", '"\\x016%s is at %ps\\n"', '"it, here"', "&vfree", ",", "strlen", '"a,"')
    assert "printed     it, here is at vfree" in result.stdout
    assert "call        strlen = 2 (0x2)" in result.stdout
    offset = call("strlen", '"abc"', ",", "strlen", "linux_banner", ",", "strlen", "linux_banner+6", "--json")
    found = valid_json(offset, "call")
    assert found["earlier"][1]["signed"] - found["signed"] == 6
    printed = valid_json(call("_printk", '"x"', "--json"), "call")
    assert printed["printed"] == ["x"]


@pytest.mark.qemu
def test_a_call_that_would_sleep_ends_the_line_with_exit_code_1() -> None:
    result = call("msleep", "5,", "vfree", "0")
    assert result.exit_code == 1
    assert "stopped     sleep: __schedule() is called: the task would sleep or give way to another" in result.stdout
    assert "vfree" not in result.stdout


WRONG_CALL = {
    "no call": (("vfree", "0", ","), "a call without a function: commas stand between calls"),
    "too early": (("vfree", "$1"), r"argument \$1: 0 calls have returned before, \$1 is the first"),
    "unknown": (("vfree", "&nosuch"), "this kernel has no symbol nosuch"),
    "nonsense": (("vfree", "12x"), "argument 12x: neither a number, lin:PA nor a symbol of this kernel"),
    "nine": (("strlen", *"123456789"), "strlen: 9 arguments: a call passes at most 8 in registers"),
    "function": (("nosuch",), "this kernel has no symbol nosuch"),
}


@pytest.mark.qemu
@pytest.mark.parametrize("case", WRONG_CALL)
def test_bad_input_to_call_is_one_sentence(case: str) -> None:
    args, sentence = WRONG_CALL[case]
    result = call(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(f"pgtable: error: {sentence}\n", result.stderr), result.stderr


def test_a_kernel_or_a_snapshot_must_be_given_and_be_one(tmp_path: Path) -> None:
    both = run("call", "vfree", "0", "--kernel", "debian:6.12", "--snapshot", "x")
    assert both.stderr == run("call", "vfree", "0").stderr
    assert both.stderr == "pgtable: error: call: give --kernel KERNEL or --snapshot FILE\n"
    foreign = tmp_path / "x"
    foreign.write_bytes(b"no snapshot")
    for args in (("call", "vfree", "0", "--snapshot"), ("snapshot", "info")):
        result = run(*args, str(foreign))
        assert result.exit_code == 2
        assert "x is not a snapshot of pgtable" in result.stderr


# call --save


@pytest.mark.qemu
def test_what_calls_left_is_kept_and_diff_says_what_that_was(tmp_path: Path) -> None:
    """set_memory_ro changes the area and its linear alias: two ranges, and nothing else."""
    before, after = tmp_path / "before.snap", tmp_path / "after.snap"
    assert call("vmalloc", "8192", "--save", before).exit_code == 0
    assert call("vmalloc", "8192,", "set_memory_ro", "$1", "2", "--save", after).exit_code == 0
    same = run("diff", before, before)
    assert (same.exit_code, same.stdout) == (0, "0 added, 0 removed, 0 changed\n")
    result = run("diff", before, after, "--json")
    assert result.exit_code == 1
    changes = valid_json(result, "diff")["changes"]
    assert [(row["kind"], row["size"], set(row["fields"])) for row in changes] == [("changed", 8192, {"AP", "DBM"})] * 2
    va = int(changes[1]["va"], 0)
    linear = int(changes[0]["va"], 0)
    assert Snapshot.load(after).machine().plan.linear_va(int(changes[1]["new"]["pa"], 0)) == linear != va
    assert Snapshot.load(after).origin.at == "mark, then calls"


@pytest.mark.qemu
def test_a_snapshot_is_not_written_over_itself_nor_after_a_stop(tmp_path: Path) -> None:
    first, second = tmp_path / "first.snap", tmp_path / "second.snap"
    assert call("vmalloc", "8192", "--save", first).exit_code == 0
    content = first.stat().st_mtime_ns
    refused = run("call", "--snapshot", first, "vmalloc", "8192", "--save", first)
    assert refused.exit_code == 2
    assert "is the snapshot that this machine runs on" in refused.output
    assert first.stat().st_mtime_ns == content
    stopped = call("schedule", "--save", second)
    assert stopped.exit_code == 1
    assert "is not written: schedule did not return" in stopped.output
    assert not second.exists()
    nowhere = call("vmalloc", "8192", "--save", tmp_path / "no" / "folder.snap")
    assert nowhere.exit_code == 2
    assert "--save" in nowhere.output
    assert run("call", "--kernel", FAST, "vmalloc", "--save", second).exit_code == 2
