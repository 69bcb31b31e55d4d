"""The wheel holds what git tracks of the three packages, and the command runs where only it is installed."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("emu", "kernel_model", "pgtable")

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]


def run(*args: str | Path) -> str:
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built in isolation: the build back end comes from the package index."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "-w", out, ROOT)
    (built,) = out.glob("pgtable-*.whl")
    return built


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as content:
        return set(content.namelist())


def test_the_wheel_has_the_files_that_git_tracks(wheel: Path) -> None:
    tracked = set(run("git", "ls-files", *PACKAGES).splitlines())
    untracked = set(run("git", "ls-files", "--others", "--exclude-standard", *PACKAGES).splitlines())
    packed = {name for name in names(wheel) if ".dist-info/" not in name}
    assert packed - untracked == tracked - set(run("git", "ls-files", "--deleted", *PACKAGES).splitlines())


def test_the_wheel_has_types_snippets_licence_and_command(wheel: Path) -> None:
    packed = names(wheel)
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed
    assert {"emu/snippets/load.S", "emu/snippets/load.hex", "emu/snippets/load.lst"} <= packed
    info = {name.partition(".dist-info/")[2] for name in packed if ".dist-info/" in name}
    assert {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"} == info
    with zipfile.ZipFile(wheel) as content:
        metadata = content.read(next(name for name in packed if name.endswith("METADATA"))).decode()
    assert "\nLicense-Expression: GPL-2.0-or-later\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata


def test_the_command_runs_where_only_the_wheel_is_installed(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    # Only wheels: no C compiler is needed.
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", wheel)
    command = tmp_path / "venv" / "bin" / "pgtable"
    assert run(command, "--version") == f"pgtable, version {version('pgtable')}\n"
    assert "Commands:" in run(command, "--help")
    code = "from emu import Machine, snippets; print(Machine.bare().run(bytes(snippets.load('at'))).ok().value)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert int(done.stdout) & 1  # address 0 is not mapped
