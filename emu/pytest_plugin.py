"""The pytest plugin: tests that run on one or several kernels, with machines of them and readable comparisons.

    pytest --pgtable-kernel debian:6.1 --pgtable-kernel path/to/vmlinux

    def test_valid(machine):
        va = machine.plan.linear_va(0x4800_0000)
        result = machine.call("set_memory_valid", va, 1, 0).ok()
        assert_only_changed(result, va, VALID=(1, 0))

Rules of this file:
- pytest loads it in every run of a user's tests: only pytest and the standard library are imported at the top, and no
  kernel is looked for before a test asks for one.
- A kernel or a QEMU that is not there skips the test, with the reason; where PGTABLE_REQUIRE names "kernels" or "qemu"
  it fails it. A kernel that is there and cannot be read, and a word that is no kernel, are errors.
The comparisons are in emu.assertions. Who uses this: docs/pytest.md, examples/kernel-regression.
"""

from __future__ import annotations

import functools
import os
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from emu.image import KernelImage
    from emu.machine import Machine
    from emu.snapshot import Snapshot
    from emu.warm import WarmMachine
    from pgtable.build import TableBuilder

__all__ = ["booted", "machine", "tables"]

DEFAULT_KERNEL = "debian:7.3"
MARK = "pgtable_kernels"
_VERSION = re.compile(r"(<=|>=|==|!=|<|>)?\s*(\d+(?:\.\d+)*)$")


def pytest_addoption(parser: pytest.Parser) -> None:
    """--pgtable-kernel, --pgtable-snapshots, and the ini file's pgtable_kernels."""
    group = parser.getgroup("pgtable", "arm64 page tables on real kernels")
    group.addoption(
        "--pgtable-kernel",
        action="append",
        default=[],
        metavar="KERNEL",
        help="a kernel to test: debian:VERSION[-FLAVOUR], or a vmlinux, Image or vmlinuz (repeatable)",
    )
    group.addoption(
        "--pgtable-snapshots",
        metavar="FOLDER",
        help="where booted kernels are kept (default: .pytest_cache)",
    )
    parser.addini("pgtable_kernels", "kernels to test where --pgtable-kernel names none", type="linelist", default=[])


def pytest_configure(config: pytest.Config) -> None:
    """Says what the marker means, and refuses a word that names no kernel."""
    config.addinivalue_line(
        "markers", f'{MARK}(*versions): only for kernels of these versions: {MARK}(">=6.12", "<7.3")'
    )
    for name in kernels(config):
        if not name.startswith("debian:") and not Path(name).is_file():
            text = f"--pgtable-kernel {name}: no file, and no name of the form debian:VERSION[-FLAVOUR]"
            raise pytest.UsageError(text)
        if name.startswith("debian:") and not re.fullmatch(r"debian:\d[\w.+~-]*", name):
            raise pytest.UsageError(f"--pgtable-kernel {name}: must be debian:VERSION[-FLAVOUR], as debian:7.3-16k")
    config.pluginmanager.register(_plugin_of(kernels(config)), "pgtable kernels")


def kernels(config: pytest.Config) -> list[str]:
    """What the command line asks for, else the ini file, else debian:7.3; each once, files by their full path."""
    asked = config.getoption("--pgtable-kernel") or config.getini("pgtable_kernels") or [DEFAULT_KERNEL]
    base = Path(config.invocation_params.dir)
    return list(dict.fromkeys(str(base / name) if (base / name).is_file() else name for name in asked))


def _plugin_of(names: list[str]) -> types.ModuleType:
    """A plugin with the `kernel` fixture of a run: once for each kernel that was asked for."""
    ids = [name if name.startswith("debian:") else Path(name).name for name in names]

    @pytest.fixture(scope="session", params=names, ids=ids)
    def kernel(request: pytest.FixtureRequest) -> KernelImage:
        """The kernel under test, an emu.KernelImage: `release`, `symbols`, `types`."""
        return _image(request.param)

    made = types.ModuleType("pgtable_kernels")
    made.kernel = kernel  # type: ignore[attr-defined]
    return made


@pytest.fixture(autouse=True)
def _pgtable_versions(request: pytest.FixtureRequest) -> None:
    """Skips a test for kernels that its marker leaves out; raises UsageError for a marker that says nothing."""
    wanted = [text for mark in request.node.iter_markers(MARK) for text in mark.args]
    if not wanted or "kernel" not in request.fixturenames:
        return
    release = request.getfixturevalue("kernel").release
    for text in wanted:
        if not suits(release, text):
            pytest.skip(f"Linux {release}: the test is for {' '.join(wanted)}")


def suits(release: str, wanted: str) -> bool:
    """Whether a kernel release ("6.12.95-arm64") is `wanted` (">=6.12"); raises UsageError for what is no version."""
    match = _VERSION.match(wanted.strip()) if isinstance(wanted, str) else None
    number = re.match(r"\d+(?:\.\d+)*", release)
    if match is None:
        raise pytest.UsageError(f'{MARK}({wanted!r}): must be versions like ">=6.12", "<7.3"')
    if number is None:
        return False
    want = [int(part) for part in match[2].split(".")]
    have = [int(part) for part in number[0].split(".")]
    have = (have + [0] * len(want))[: len(want)]  # "==6.12" is every 6.12.y
    order = (have > want) - (have < want)
    return {"<": order < 0, "<=": order <= 0, ">": order > 0, ">=": order >= 0, "!=": order != 0}.get(
        match[1] or "==", order == 0
    )


# fixtures


@pytest.fixture
def machine(kernel: KernelImage) -> Machine:
    """A fresh machine with the kernel in memory and nothing run: emu.Machine. It costs milliseconds."""
    from emu.machine import Machine

    return Machine.boot(kernel)


@pytest.fixture
def booted(_pgtable_snapshot: Snapshot) -> WarmMachine:
    """A fresh machine of the kernel after it has booted in QEMU (once a kernel; the snapshot is kept)."""
    return _pgtable_snapshot.machine()


@pytest.fixture
def tables(machine: Machine) -> TableBuilder:
    """The builder of the machine's kernel tables: `tables.map(va, pa, size, level=3)` before a call."""
    return machine.tables


@pytest.fixture(scope="session")
def _pgtable_snapshot(kernel: KernelImage, request: pytest.FixtureRequest) -> Iterator[Snapshot]:
    from emu.boot import BootFailed, Options, boot
    from emu.snapshot import Snapshot, SnapshotError, content_hash

    asked = request.config.getoption("--pgtable-snapshots")
    folder = Path(asked) if asked else request.config.rootpath / ".pytest_cache" / "pgtable"
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{content_hash(kernel)[:32]}.snap"
    try:
        yield Snapshot.load(place)
        return
    except SnapshotError:
        pass
    try:
        made = boot(Options(kernel.name), place)
    except BootFailed as error:
        if "is missing" in str(error) or "not on PATH" in str(error):
            _lack("qemu", str(error))
        raise
    yield made


@functools.cache
def _image(name: str) -> KernelImage:
    from emu.image import ImageError, KernelImage

    if name.startswith("debian:"):
        missing = _why_not(name)
        if missing:
            _lack("kernels", missing)
    try:
        return KernelImage.load(name)
    except ImageError as error:
        pytest.fail(str(error), pytrace=False)


@functools.cache
def _why_not(name: str) -> str:
    """Why a Debian kernel cannot be had, "" if it can; asked once."""
    from emu.kernels import KernelError, fetch

    try:
        fetch(name)
    except (KernelError, OSError) as error:
        return f"no kernel {name}: {error}"
    return ""


def _lack(what: str, reason: str) -> NoReturn:
    if what in os.environ.get("PGTABLE_REQUIRE", "").split(","):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
