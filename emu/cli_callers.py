"""`pgtable callers`: who calls a function of a compiled kernel."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from emu.cli import CommandError, examples
from emu.cli_run import _KERNEL, _SYMBOLS, bad_input, load_image

if TYPE_CHECKING:
    from emu.callers import Callers, Site
    from emu.image import KernelImage

_WIDE = 300  # columns where no terminal sets a limit: in a pipe nothing is folded


@click.command(epilog=examples("pgtable callers set_memory_valid --kernel debian:7.3"))
@click.argument("function")
@_KERNEL
@_SYMBOLS
@click.option("--json", "as_json", is_flag=True, help="One JSON object, schema pgtable.callers/1.")
def callers(function: str, source: str, symbols: str | None, as_json: bool) -> None:
    """Who calls FUNCTION, a symbol or a link-time address, in the compiled kernel: calls, tail calls, and every place
    that takes its address. Nothing is run; a call by register shows only as an address taken."""
    image = load_image(source, symbols)
    from emu.callers import find

    target = int(function, 16) if re.fullmatch("0x[0-9a-fA-F]+", function) else function
    with bad_input():
        try:
            found = find(image, target)
        except ValueError as error:
            raise CommandError(str(error)) from None
    if as_json:
        click.echo(json.dumps(as_object(function, image, found), indent=1))
    else:
        _print(function, image, found)


def as_object(function: str, image: KernelImage, found: Callers) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "schema": "pgtable.callers/1",
        "kernel": image.name,
        "release": image.release,
        "function": function,
        "address": f"{found.address:#018x}",
        "calls": [_site(site) for site in found.calls],
        "pointers": [_site(site) for site in found.pointers],
    }


def _site(site: Site) -> dict[str, str]:
    return {"address": f"{site.address:#018x}", "symbol": site.place, "kind": site.kind}


def _print(function: str, image: KernelImage, found: Callers) -> None:
    click.echo(f"{function} at {found.address:#018x}, {image.release}: {summary(found)}")
    table = Table(box=None, pad_edge=False)
    for title in ("ADDRESS", "KIND", "WHERE"):
        table.add_column(title, overflow="fold")
    for site in found.calls:
        table.add_row(f"{site.address:#018x}", site.kind, site.place)
    for site in found.pointers:
        table.add_row(f"{site.address:#018x}", site.kind, f"address taken at {site.place}")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    if table.rows:
        console.print(table, markup=False)


def summary(found: Callers) -> str:
    """`10 calls in 4 functions, address taken 1 time`."""
    functions = len({site.function for site in found.calls})
    parts = [f"{_count(len(found.calls), 'call')} in {_count(functions, 'function')}"]
    return ", ".join([*parts, f"address taken {_count(len(found.pointers), 'time')}"])


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
