"""`pgtable map`: what tables map as one HTML page or SVG, of one source or two; the descriptor explorer alone."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from emu import writing
from emu.cli import CommandError
from emu.cli_source import complete_source, opened, regime_of, regime_option, register, registers_file, source_argument

EXAMPLE = """\b
Examples:
  pgtable map k73.snap -o k73.html
  pgtable map before.snap --diff after.snap -o changes.html
  pgtable map debian:7.3 -o cold.svg --title "7.3 as it is cold-booted"
  pgtable map --explorer -o explorer.html
"""


@click.command("map", epilog=EXAMPLE)
@source_argument(metavar="[SOURCE]", required=False)
@click.option("-o", "output", required=True, metavar="FILE", help="Where to: a name that ends in .html or .svg.")
@click.option(
    "--diff",
    "other",
    metavar="SOURCE2",
    help="Compare: what SOURCE2 maps otherwise than SOURCE.",
    shell_complete=complete_source,
)
@click.option("--explorer", is_flag=True, help="The descriptor explorer alone, without a SOURCE.")
@click.option("--title", help="The title [the sources' names].")
@registers_file
@register
@regime_option
def map_command(
    word: str | None,
    output: str,
    other: str | None,
    explorer: bool,
    title: str | None,
    regs: str | None,
    reg: tuple[str, ...],
    regime: str | None,
) -> None:
    """Draw the address space of SOURCE to scale, with the walk of every range, as one file that needs no network.

    .html is a page to zoom and search in, with a descriptor explorer; .svg is a drawing of the whole space. SOURCE is
    as in `pgtable walk`; registers that are given count for both sources of --diff. Exit code 0, also with differences.
    """
    suffix = Path(output).suffix.lower()
    if suffix not in (".html", ".svg"):
        raise CommandError(f"-o {output}: must end in .html or .svg")
    if explorer:
        if word or other or suffix == ".svg":
            raise CommandError("--explorer: takes no SOURCE and makes .html only")
        from emu.map.page import explorer_page

        _written(output, explorer_page(title or "AArch64 descriptors"))
        return
    if word is None:
        raise CommandError("SOURCE is missing: a snapshot, a dump, a kernel; or --explorer")
    _written(output, _drawn(word, other, title, suffix, (regs, reg, regime)))


def _drawn(
    word: str,
    other: str | None,
    title: str | None,
    suffix: str,
    options: tuple[str | None, tuple[str, ...], str | None],
) -> str:
    """The page or the drawing of one source or two."""
    from emu.map.data import MapData, Mapped
    from emu.map.drawing import drawing
    from emu.map.page import FINDINGS, map_page

    regs, reg, regime = options
    with ExitStack() as stack:
        words = [name for name in (word, other) if name is not None]
        found = [Mapped.of(stack.enter_context(opened(name, regs, reg)), regime_of(regime)) for name in words]
        names = " → ".join(Path(name).name for name in words)
        data = MapData.of(title or names, found[-1], found[0] if other else None)
        findings = data.now.listing.findings
        for finding in findings[:FINDINGS]:
            click.echo(f"{finding}", err=True)
        if len(findings) > FINDINGS:
            click.echo(f"and {len(findings) - FINDINGS} more, see `pgtable dump`", err=True)
        return map_page(data) if suffix == ".html" else drawing(data)


def _written(output: str, text: str) -> None:
    """Puts `text` into the file `output`, which is there as it was until all of it is written."""
    try:
        writing.write(output, text)
    except OSError as error:
        raise CommandError(f"{output}: {error.strerror}") from None
    click.echo(f"{output}: {len(text.encode()) >> 10} KiB", err=True)
