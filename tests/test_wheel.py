"""Wheel and sdist hold what git tracks, and what is installed from either runs where there is nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import pytest

from tests.kernels import kernel_path, lack

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("emu", "kernel_model", "pgtable")
SCHEMAS = "docs/schema"  # in a wheel: emu/schema
NOT_IN_SDIST = ".ci/"

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]


def run(*args: str | Path) -> str:
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(source: Path, out: Path) -> Path:
    """A wheel of `source`, built in isolation: the build back end comes from the package index."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "-w", out, source)
    (found,) = out.glob("pgtable-*.whl")
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this checkout."""
    return built(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this checkout, in isolation too."""
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT)
    (found,) = out.glob("pgtable-*.tar.gz")
    return found


def git_files(*folders: str) -> tuple[set[str], set[str]]:
    """What git tracks and is there, and what is there and neither tracked nor ignored."""
    tracked = set(run("git", "ls-files", *folders).splitlines())
    gone = set(run("git", "ls-files", "--deleted", *folders).splitlines())
    return tracked - gone, set(run("git", "ls-files", "--others", "--exclude-standard", *folders).splitlines())


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as content:
        return set(content.namelist())


def test_the_wheel_has_the_files_that_git_tracks(wheel: Path) -> None:
    tracked, untracked = git_files(*PACKAGES, SCHEMAS)
    packed = {name.replace("emu/schema/", f"{SCHEMAS}/") for name in names(wheel) if ".dist-info/" not in name}
    assert packed - untracked == tracked


def test_the_sdist_has_the_files_that_git_tracks(sdist: Path) -> None:
    tracked, untracked = git_files()
    with tarfile.open(sdist) as content:
        packed = {member.name.partition("/")[2] for member in content if member.isfile()} - {"PKG-INFO"}
    assert packed - untracked == {name for name in tracked if not name.startswith(NOT_IN_SDIST)}


def test_a_wheel_of_the_sdist_is_a_wheel_of_the_checkout(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    assert names(built(sdist, tmp_path)) == names(wheel)


def test_the_wheel_has_types_snippets_licence_and_command(wheel: Path) -> None:
    packed = names(wheel)
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed
    assert {"emu/snippets/load.S", "emu/snippets/load.hex", "emu/snippets/load.lst"} <= packed
    assert {"emu/judge/guest.hex", "emu/map/map.js", "emu/schema/check.json", "emu/schema/walk.json"} <= packed
    info = {name.partition(".dist-info/")[2] for name in packed if ".dist-info/" in name}
    assert {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"} == info
    with zipfile.ZipFile(wheel) as content:
        metadata = content.read(next(name for name in packed if name.endswith("METADATA"))).decode()
    assert "\nLicense-Expression: GPL-2.0-or-later\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_the_command_runs_where_only_this_is_installed(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    package = request.getfixturevalue(kind)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    # Only wheels, but for the sdist itself: no C compiler is needed.
    others = ("--only-binary", ":all:") if kind == "wheel" else ("--prefer-binary",)
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *others, package)
    command = tmp_path / "venv" / "bin" / "pgtable"
    assert run(command, "--version") == f"pgtable, version {version('pgtable')}\n"
    assert "Commands:" in run(command, "--help")
    code = "from emu import Machine, snippets; print(Machine.bare().run(bytes(snippets.load('at'))).ok().value)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert int(done.stdout) & 1  # address 0 is not mapped
    words = [command, "explain", "0x0060000080000f83", "--level", "3", "--json"]
    explained = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    (schema,) = (tmp_path / "venv").glob("lib/python*/site-packages/emu/schema/explain.json")
    jsonschema.validate(json.loads(explained.stdout), json.loads(schema.read_text()))


@pytest.mark.kernels
@pytest.mark.qemu
def test_the_template_project_runs_with_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    for name in ("debian:6.1", "debian:7.3"):
        kernel_path(name)
    if not shutil.which("qemu-system-aarch64"):
        lack("qemu", "qemu-system-aarch64 is not on PATH")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    words = ("--quiet", "--disable-pip-version-check", "--only-binary", ":all:", f"{wheel}[live]", "pytest")
    run(python, "-m", "pip", "install", *words)
    shutil.copytree(ROOT / "examples" / "kernel-regression", tmp_path / "project")
    command = [tmp_path / "venv" / "bin" / "pytest", "--pgtable-kernel", "debian:6.1", "--pgtable-kernel", "debian:7.3"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path / "project", env=kept)
    assert done.returncode == 0, done.stdout
    assert "18 passed, 2 skipped" in done.stdout
