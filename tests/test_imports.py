"""Imports go down only: pgtable below kernel_model below emu, and the machine shares nothing with the model."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STDLIB = set(sys.stdlib_module_names)

# What a package may import besides itself and the standard library.
MAY_IMPORT = {
    "pgtable": {"numpy"},
    "kernel_model": {"pgtable", "numpy"},
    "emu": {
        *("pgtable", "kernel_model", "numpy", "unicorn", "capstone", "elftools", "click", "rich", "platformdirs"),
        *("backports", "drgn", "qemu", "gdb", "distributed", "pytest"),
    },
}

# The files of emu that compose, and so import kernel_model; the machine that runs code is not among them.
# and cli*.py, and the folder of the checks
COMPOSE = {"census.py", "check.py", "linux_audit.py", "linux_dump.py", "context.py", "scenarios.py", "demo.py"}

# Who may load an engine, a disassembler, or the command line's libraries.
ONLY = {
    "unicorn": {"engine.py"},
    "capstone": {"exceptions.py"},
    "qemu": {"boot.py"},
    "click": {"demo.py"},  # and cli*.py
    "rich": set(),
    "gdb": {"gdb_script.py"},
    "distributed": {"workers.py"},
    "pytest": {"pytest_plugin.py"},
}

FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def is_cli(path: Path) -> bool:
    return path.name.startswith("cli")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of every import in a file, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name, _ in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_a_file_imports_only_what_its_floor_allows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    wrong = tops(path) - STDLIB - {package, "compression"} - MAY_IMPORT[package]
    assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_only_the_files_that_compose_import_the_model(path: Path) -> None:
    composes = is_cli(path) or path.name in COMPOSE or path.is_relative_to(ROOT / "emu" / "checks")
    if path.is_relative_to(ROOT / "emu") and not composes:
        assert "kernel_model" not in tops(path)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_each_library_is_loaded_in_its_own_file(path: Path) -> None:
    for library, allowed in ONLY.items():
        if library in tops(path):
            assert path.name in allowed or (library in ("click", "rich") and is_cli(path)), f"{path.name}: {library}"


def test_the_machine_does_not_reach_the_model_by_way_of_another_file() -> None:
    seen: set[str] = set()
    todo = ["emu.machine"]
    while todo:
        module = todo.pop()
        path = ROOT / (module.replace(".", "/") + ".py")
        path = path if path.exists() else ROOT / module.replace(".", "/") / "__init__.py"
        if module in seen or not path.exists():
            continue
        seen.add(module)
        todo += [name for name, _ in imports(path) if name.startswith(("emu", "kernel_model"))]
    assert {"emu.engine", "emu.coldboot"} <= seen
    assert not {name for name in seen if name.startswith("kernel_model")}


def loaded(code: str) -> set[str]:
    """The libraries that a new process has loaded after `code`."""
    libraries = "{'unicorn', 'capstone', 'numpy', 'elftools', 'click', 'rich', 'emu.machine', 'kernel_model'}"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*sorted({libraries} & set(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_import_emu_loads_nothing_and_its_names_come_when_used() -> None:
    assert loaded("import emu") == set()
    assert loaded("import emu; dir(emu)") == set()
    assert not loaded("from emu import KernelImage") & {"unicorn", "capstone", "click", "kernel_model"}
    assert {"unicorn", "emu.machine"} <= loaded("from emu import Machine")
    assert "kernel_model" not in loaded("from emu import Machine, KernelImage")
    with pytest.raises(subprocess.CalledProcessError):
        loaded("from emu import Nonsense")


def test_pgtable_and_the_model_run_without_emu() -> None:
    assert loaded("import pgtable") == {"numpy"}
    assert loaded("import kernel_model.pageattr, kernel_model.compare") == {"numpy", "kernel_model"}


def test_the_names_that_emu_promises_are_there() -> None:
    import emu

    for name in emu.__all__:
        assert getattr(emu, name).__name__ == name
    assert set(emu.__all__) <= set(dir(emu))
    with pytest.raises(AttributeError, match="module 'emu' has no attribute 'Nonsense'"):
        _ = emu.Nonsense
