"""`pgtable census`: who changes permissions of kernel memory while a kernel boots."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from emu.cli import CommandError
from emu.cli_run import bad_input
from emu.cli_snapshot import fetched, memory_size, steps_on_stderr

if TYPE_CHECKING:
    from emu.census import Census, Row

_WIDE = 300  # columns where no terminal sets a limit: in a pipe nothing is folded
_TITLES = ("CALLS", "PAGES", "FUNCTION", "CALLER", "REGION", "CONTEXT", "LOCKED", "NOTE")

EXAMPLE = """\b
Example:
  pgtable census --kernel debian:7.3 --cmdline kfence.sample_interval=10
"""


@click.command(epilog=EXAMPLE)
@click.option("--kernel", required=True, metavar="KERNEL", help="A kernel file, or debian:VERSION[-FLAVOUR].")
@click.option("--cpu", help="QEMU's CPU model [default: cortex-a57, for 16K pages cortex-a76].")
@click.option("--memory", default="256M", show_default=True, help="RAM.")
@click.option("--cmdline", default="", help="More for the kernel's command line, as kfence.sample_interval=10.")
@click.option("--kaslr/--no-kaslr", default=True, show_default=True, help="A random place for the kernel, by the seed.")
@click.option("--seed", default=1, show_default=True, help="Decides the seeds in the device tree.")
@click.option("--after", default=0.0, show_default=True, type=click.FloatRange(min=0), help="Seconds after the boot.")
@click.option("--timeout", default=120.0, show_default=True, type=click.FloatRange(min=0), help="Seconds for the boot.")
@click.option("--qemu", metavar="PATH", help="A qemu-system-aarch64 other than the one on PATH.")
@click.option("--functions", default="", metavar="F,F", help="What to count [default: set_memory_* and the like].")
@click.option("--limit", default=1000, show_default=True, type=click.IntRange(min=1), help="Calls of each function.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, schema pgtable.census/1.")
def census(
    kernel: str, memory: str, cmdline: str, functions: str, limit: int, after: float, as_json: bool, **options: Any
) -> None:
    """Boot KERNEL in QEMU and count who changes permissions of kernel memory: function, caller, region of the address,
    context, and whether init_mm's lock is held. It ends when the first process sleeps."""
    from emu.btf import BtfError
    from emu.census import count
    from emu.guest import BootFailed, Options

    wanted = Options(kernel, memory=memory_size(memory), command_line=cmdline, **options)
    names = [name for name in functions.split(",") if name]
    with bad_input(), steps_on_stderr() as progress:
        fetched(kernel, progress)
        try:
            found = count(wanted, names, limit=limit, after=after, progress=progress)
        except (BootFailed, BtfError) as error:
            raise CommandError(str(error)) from None
    if as_json:
        click.echo(json.dumps(as_object(found, limit), indent=1))
    else:
        _print(found)


def as_object(found: Census, limit: int) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "schema": "pgtable.census/1",
        "kernel": found.image.name,
        "release": found.image.release,
        "cpu": found.cpu,
        "qemu": found.qemu,
        "command_line": found.command_line,
        "seed": found.options.seed,
        "kaslr_offset": f"{found.offset:#018x}",
        "functions": list(found.functions),
        "limit": limit,
        "seconds": round(found.seconds, 1),
        "calls": found.calls,
        "rows": [_row(found, row) for row in found.rows],
    }


def _row(found: Census, row: Row) -> dict[str, Any]:
    return {
        "function": row.function,
        "caller": {"address": f"{row.site:#018x}", "symbol": found.image.symbols.describe(row.site)},
        "region": row.region,
        "context": row.context.value,
        "calls": row.calls,
        "pages": row.pages,
        "init_mm_locked": row.locked,
        "limit_reached": row.function in found.limited,
    }


def _print(found: Census) -> None:
    functions = len({row.function for row in found.rows})
    click.echo(
        f"{found.image.release}: {found.calls} calls of {functions} functions, {found.cpu}, {found.command_line}"
    )
    table = Table(box=None, pad_edge=False)
    for title in _TITLES:
        table.add_column(title, overflow="fold", justify="right" if title in ("CALLS", "PAGES", "LOCKED") else "left")
    for row in found.rows:
        caller = found.image.symbols.describe(row.site)
        note = "limit reached" if row.function in found.limited else ""
        numbers = [str(row.calls), _or_dash(row.pages)]
        table.add_row(*numbers, row.function, caller, row.region, row.context.value, _or_dash(row.locked), note)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    if table.rows:
        console.print(table, markup=False)


def _or_dash(number: int | None) -> str:
    return "-" if number is None else str(number)
