"""`pgtable diff`: what two sources, or two moments of one, map differently."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from emu.cli import CommandError
from emu.cli_source import hex64, listings, opened, source_argument, source_options, stage_of

if TYPE_CHECKING:
    from pgtable.diff import Change, Side
    from pgtable.listing import Listing

EXAMPLE = """\b
Examples:
  pgtable diff before.snap after.snap
  pgtable diff raw:a.bin@0x40000000 raw:b.bin@0x40000000 --regs regs.txt
  pgtable diff debian:6.12 debian:7.3 --json
"""


@click.command(epilog=EXAMPLE)
@source_argument("word_a", "A")
@source_argument("word_b", "B")
@source_options
@click.option("--regs-b", metavar="FILE", help="Registers of B, where they are not those of --regs.")
@click.pass_context
def diff(
    ctx: click.Context,
    word_a: str,
    word_b: str,
    regs: str | None,
    reg: tuple[str, ...],
    regime: str | None,
    as_json: bool,
    regs_b: str | None,
) -> None:
    """Compare what the sources A and B map: ranges added (+), removed (-) and changed (~), with the fields by name.

    Exit code 1 if anything differs.
    """
    from pgtable.diff import diff as compared

    found = []
    for word, file in ((word_a, regs), (word_b, regs_b or regs)):
        with opened(word, file, reg) as source:
            found.append(listings(source, regime, stage_of(source, regime, None))[0][1])
    a, b = found
    if not (a.complete and b.complete):
        raise CommandError(f"{word_b if a.complete else word_a}: the tree refers to itself, so not all can be compared")
    changes = compared(a, b)
    if as_json:
        rows = [change_json(a, change) for change in changes]
        click.echo(json.dumps({"schema": "pgtable.diff/1", "a": word_a, "b": word_b, "changes": rows}, indent=1))
    else:
        for change in changes:
            click.echo(change_text(a, change))
        kinds = [change.kind for change in changes]
        click.echo(", ".join(f"{kinds.count(kind)} {kind}" for kind in ("added", "removed", "changed")))
    ctx.exit(1 if changes else 0)


def change_text(found: Listing, change: Change) -> str:
    """One line: the range, what it was and is; for a change, the fields."""
    from emu.rowtext import U64, kind_text, rights_text, size_text

    side = change.new or change.old
    assert side
    mark = {"added": "+", "removed": "-", "changed": "~"}[change.kind]
    el0 = found.regime.has_el0
    head = f"{mark} {change.va:#018x}-{change.va + change.size & U64:#018x} {size_text(change.size):>6}"
    if change.old and change.new:
        rights = f"{rights_text(change.old.perms, el0)} -> {rights_text(change.new.perms, el0)}"
        return f"{head} {kind_text(side.level):8} {rights}  {fields_text(change)}"
    return f"{head} {kind_text(side.level):8} {rights_text(side.perms, el0)} {side.pa:#014x} {side.word:#018x}"


def fields_text(change: Change) -> str:
    """`AP[2] 0 -> 1`, by name."""
    return ", ".join(f"{name} {old:#x} -> {new:#x}" for name, old, new in change.fields)


def change_json(found: Listing, change: Change) -> dict[str, Any]:
    """A change as `--json` prints it."""
    return {
        "kind": change.kind,
        "va": hex64(change.va),
        "size": change.size,
        "old": _side(found, change.old),
        "new": _side(found, change.new),
        "fields": {name: [f"{old:#x}", f"{new:#x}"] for name, old, new in change.fields},
    }


def _side(found: Listing, side: Side | None) -> dict[str, Any] | None:
    from emu.rowtext import rights_text

    if side is None:
        return None
    return {
        "pa": hex64(side.pa),
        "level": side.level,
        "word": hex64(side.word),
        "permissions": rights_text(side.perms, found.regime.has_el0),
    }
