"""The modules of the three packages, found in the checkout, with the first sentence of each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from docs._site.text import plain, table

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pgtable", "kernel_model", "emu")
LEFT_OUT = ("emu.cli", "emu.demo", "emu.gdb_script", "emu.snippets.__main__")


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def every_module() -> tuple[str, ...]:
    """Dotted names, the three packages themselves left out: they have a page that is written."""
    names = (
        _name(path)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.parent != ROOT / package or path.stem != "__init__"
    )
    return tuple(sorted(name for name in names if not name.startswith(LEFT_OUT)))


def _first_sentence(module: str) -> str:
    path = ROOT / Path(*module.split("."))
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def _rows(package: str) -> Iterator[tuple[str, str]]:
    for module in every_module():
        if module.partition(".")[0] == package:
            yield f"[{module}](python/{module}.md)", plain(_first_sentence(module))


def listed(package: str) -> str:
    """The modules of a package, with links."""
    return table(("Module", ""), _rows(package))
