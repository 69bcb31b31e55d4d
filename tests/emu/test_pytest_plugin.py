"""The pytest plugin in runs of its own, and what its comparisons say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emu import pytest_plugin
from emu.assertions import assert_no_bbm_violation, assert_only_changed, assert_same_walk
from emu.machine import Machine
from emu.tracing import Trace
from tests.kernels import kernel_path

TEMPLATE = Path(__file__).resolve().parents[2] / "examples" / "kernel-regression"


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, check=False)


def test_the_plugin_imports_pytest_and_the_standard_library_only() -> None:
    blocked = ("numpy", "unicorn", "capstone", "click", "pgtable", "kernel_model")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import emu.pytest_plugin"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no-such-vmlinux", "no file, and no name of the form debian:VERSION[-FLAVOUR]"),
        ("debian:", "must be debian:VERSION[-FLAVOUR]"),
        ("debian:x/../y", "must be debian:VERSION[-FLAVOUR]"),
    ],
)
def test_a_word_that_is_no_kernel_is_one_sentence(name: str, says: str, tmp_path: Path) -> None:
    done = run(tmp_path, "--pgtable-kernel", name)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"--pgtable-kernel {name}: {says}" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.kernels
def test_a_project_runs_once_for_each_kernel(tmp_path: Path) -> None:
    shutil.copytree(TEMPLATE, tmp_path / "project")
    names = [word for name in ("debian:6.1", "debian:7.3") if kernel_path(name) for word in ("--pgtable-kernel", name)]
    done = run(tmp_path / "project", *names, "tests/test_set_memory_valid.py", "-vv")
    assert done.returncode == 0, done.stdout
    assert "8 passed" in done.stdout
    for name in ("debian:6.1", "debian:7.3"):
        assert f"test_a_range_of_its_own_tables[{name}] PASSED" in done.stdout


@pytest.mark.parametrize(
    ("wanted", "suits"),
    [
        (">=6.12", True), (">6.12", False), ("<=6.12", True), ("<6.12", False), ("6.12", True), ("==6.12.95", True),
        ("6.12.94", False), ("!=6.12", False), ("<6.12.96", True), (">=7", False), ("<7", True), (">= 6.9", True),
    ],
)  # fmt: skip
def test_versions(wanted: str, suits: bool) -> None:
    assert pytest_plugin.suits("6.12.95+deb12-cloud-arm64", wanted) == suits


def test_a_marker_that_is_no_version_is_an_error() -> None:
    with pytest.raises(pytest.UsageError, match=r"pgtable_kernels\('new'\)"):
        pytest_plugin.suits("6.12.95", "new")


def test_a_kernel_that_is_not_there_skips_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest_plugin, "_why_not", lambda name: f"no kernel {name}")
    monkeypatch.setenv("PGTABLE_REQUIRE", "qemu")
    with pytest.raises(pytest.skip.Exception, match="no kernel debian:9"):
        pytest_plugin._image.__wrapped__("debian:9")
    monkeypatch.setenv("PGTABLE_REQUIRE", "qemu,kernels")
    with pytest.raises(pytest.fail.Exception, match="no kernel debian:9"):
        pytest_plugin._image.__wrapped__("debian:9")


def test_a_file_that_is_no_kernel_fails_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(b"not a kernel")
    with pytest.raises(pytest.fail.Exception, match="vmlinux"):
        pytest_plugin._image.__wrapped__(str(tmp_path / "vmlinux"))


def test_what_the_comparisons_say(machine: Machine) -> None:
    """Nothing, of what is right; and each thing that is wrong, with its descriptor."""
    va, page = machine.plan.linear_va(0x4800_0000), machine.plan.page_size
    before = machine.translate(va)
    result = machine.call("set_memory_valid", va, 2, 0)
    assert_only_changed(result, {va, va + page})
    assert_only_changed(result, (va, va + page), VALID=0, **({"nG": ...} if "nG" in result.changes[0].fields else {}))
    for wanted, fields, says in (
        (va, {}, f"not expected  {va + page:#018x} L3"),
        ({va, va + page, va + 2 * page}, {}, f"unchanged     {va + 2 * page:#018x}"),
        ({va, va + page}, {"VALID": (0, 1)}, "VALID not 0x0->0x1"),
        ({va, va + page}, {"VALID": 1}, "VALID not ->0x1"),
        ({va, va + page}, {"VALID": 0, "nG": ..., "AP": 2}, "AP stayed"),
        ({va, va + page}, {"PXN": ...}, "VALID too"),
    ):
        with pytest.raises(AssertionError) as error:
            assert_only_changed(result, wanted, **fields)  # type: ignore[arg-type]
        assert says in str(error.value)
    with pytest.raises(AssertionError, match=r"(?s)the walk of .* changed\nbefore.*\nafter.*translation fault"):
        assert_same_walk(machine, va, before)
    machine.call("set_memory_valid", va, 2, 1).ok()
    assert_same_walk(machine, va, before)


def test_tlb_maintenance_is_judged_where_there_is_a_trace(machine: Machine) -> None:
    va = machine.plan.linear_va(0x4800_0000)
    with pytest.raises(ValueError, match="the machine has no trace"):
        assert_no_bbm_violation(machine.call("set_memory_valid", va, 1, 0))
    machine.call("set_memory_valid", va, 1, 1).ok()
    machine.attach(Trace())
    assert_no_bbm_violation(machine.call("set_memory_valid", va, 1, 0))
    machine.call("set_memory_valid", va, 1, 1).ok()
    page = machine.struct_page(0x4800_0000)
    with pytest.raises(AssertionError, match="unclean at return"):
        assert_no_bbm_violation(machine.call("set_direct_map_invalid_noflush", page))
