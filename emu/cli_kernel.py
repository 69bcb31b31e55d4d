"""`pgtable kernel`: list, fetch and describe kernels.

Rules of this file: stdout is the answer only, a table or with --json one object (docs/schema/kernel-*.json);
progress goes to stderr; bad input ends in one sentence and exit code 2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from emu import kernels
from emu.cli import CommandError, examples
from emu.kernels import Candidate, Kernel, KernelError, Progress

if TYPE_CHECKING:
    from emu.image import KernelImage

_COMPILER = re.compile(r"Linux version \S+ \([^()]*\) \((.+?), (?:GNU ld|[^,]*LLD)")
_WIDE = 300  # columns where no terminal sets a limit: in a pipe nothing is folded


@click.group("kernel")
def kernel() -> None:
    """Fetch Debian's arm64 kernels by name and say what is in a kernel file."""


@kernel.command("list", epilog=examples("pgtable kernel list --all"))
@click.option("--all", "everything", is_flag=True, help="Also what the mirror has.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, schema pgtable.kernel-list/1.")
def list_(everything: bool, as_json: bool) -> None:
    """The kernels in the cache, by the names they were asked for."""
    rows = [_kernel_row(k) for k in kernels.cached()]
    if everything:
        rows += _mirror_rows({(row["package"], row["version"]) for row in rows})
    if as_json:
        _print_json("kernel-list", {"cache": str(kernels.cache_dir()), "kernels": rows})
    elif rows:
        _print_rows(rows)
    else:
        click.echo(f"no kernel in {kernels.cache_dir()}: `pgtable kernel fetch debian:6.12` gets one", err=True)


@kernel.command(epilog=examples("pgtable kernel fetch debian:7.3"))
@click.argument("name")
@click.option("--update", is_flag=True, help="Ask the mirror, even if the name is in the cache.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, schema pgtable.kernel-fetch/1.")
def fetch(name: str, update: bool, as_json: bool) -> None:
    """Fetch the kernel NAME, debian:VERSION[-FLAVOUR], into the cache."""
    row = _kernel_row(_fetch(name, update=update))
    if as_json:
        _print_json("kernel-fetch", row)
    else:
        _print_facts(row)


@kernel.command(epilog=examples("pgtable kernel info debian:7.3"))
@click.argument("source", metavar="NAME|PATH")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, schema pgtable.kernel-info/1.")
def info(source: str, as_json: bool) -> None:
    """What a kernel is: the file PATH, or NAME, which is fetched if need be."""
    from emu.image import ImageError, KernelImage  # numpy and all: only this command needs them

    fetched = _fetch(source) if kernels.is_name(source) else None
    path = fetched.path if fetched else Path(source)
    try:
        facts = _image_facts(KernelImage.load(path))
    except ImageError as error:
        raise CommandError(str(error)) from None
    package = {key: getattr(fetched, key) if fetched else None for key in ("package", "version", "suite")}
    facts = {"source": source, "path": str(path), **package, **facts}
    if as_json:
        _print_json("kernel-info", facts)
    else:
        _print_facts({key: value for key, value in facts.items() if value is not None})


def _image_facts(image: KernelImage) -> dict[str, Any]:
    compiler = _COMPILER.match(image.banner)
    layout = image.layout
    return {
        "release": image.release,
        "banner": image.banner,
        "compiler": compiler[1] if compiler else None,
        "base": _hex(image.base),
        "end": _hex(image.base + image.size),
        "page_size": layout.page_size,
        "levels": layout.levels,
        "va_bits": layout.va_bits,
        "va_bits_min": layout.va_bits_min,
        "page_offset": _hex(layout.page_offset),
        "symbols": len(image.symbols),
    }


def _hex(address: int) -> str:
    return f"{address:#018x}"


def _fetch(name: str, *, update: bool = False) -> Kernel:
    with _progress() as progress:
        try:
            return kernels.fetch(name, update=update, progress=progress)
        except KernelError as error:
            raise CommandError(str(error)) from None


def _kernel_row(k: Kernel) -> dict[str, Any]:
    return {**asdict(k), "name": k.name or None, "path": str(k.path)}


def _mirror_rows(have: set[tuple[str, str]]) -> Iterable[dict[str, Any]]:
    """What else the mirror has; a name stands where it means just that package."""
    with _progress() as progress:
        try:
            found = kernels.available(progress=progress)
        except KernelError as error:
            raise CommandError(str(error)) from None
    # They come oldest first, so the newest of a name stays; NAME has no way to write 7.4~rc1.
    meant = {f"{kernels.PREFIX}{c.upstream}-{c.flavour}": c for c in found if "~" not in c.upstream}
    names = {c: name for name, c in meant.items()}
    return [_candidate_row(c, names.get(c)) for c in found if (c.package, c.version) not in have]


def _candidate_row(c: Candidate, name: str | None) -> dict[str, Any]:
    keys = ("package", "version", "upstream", "flavour", "suite")
    return {"name": name, **{key: getattr(c, key) for key in keys}, "path": None, "sha256": None}


# output


@contextmanager
def _progress() -> Iterator[Progress]:
    """Where messages go: one line that changes on a terminal, else a line for each new subject."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
    else:
        yield _Lines()


class _Lines:
    """Prints a message unless it only brings another percentage."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, message: str) -> None:
        subject = re.sub(r": \d+ %$", "", message)
        if subject != self._last:
            click.echo(subject, err=True)
            self._last = subject


def _print_json(schema: str, content: Mapping[str, Any]) -> None:
    click.echo(json.dumps({"schema": f"pgtable.{schema}/1", **content}, indent=1))


def _print_rows(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("NAME", "PACKAGE", "VERSION", "SUITE", "FILE"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(row[key] or "-" for key in ("name", "package", "version", "suite", "path")))
    _print_table(table)


def _print_facts(facts: Mapping[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), str(value))
    _print_table(table)


def _print_table(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    console.print(table, markup=False)
