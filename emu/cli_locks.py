"""`pgtable locks`: the lock rules of the page walks, for releases and for the thread's variants."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from emu.cli import CommandError, examples

if TYPE_CHECKING:
    from kernel_model.locktable import Cell
    from kernel_model.variants import Variant

REVIEW = "mail-review"


@click.command(epilog=examples("pgtable locks --variant mail-v1 --entry walk_page_range_novma"))
@click.option("--variant", metavar="NAME", help="One variant, or mail-review for both its readings. Default: all.")
@click.option("--entry", metavar="FUNCTION", help="Only this entry point.")
@click.option("--debug", is_flag=True, help="With CONFIG_DEBUG_VM and lockdep. Default: as Debian ships it.")
@click.option("--range-check", is_flag=True, help="The thread's variants with the vmalloc or module range condition.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schema).")
def locks(variant: str | None, entry: str | None, debug: bool, range_check: bool, as_json: bool) -> None:
    """What each entry point of the page walk does: entry point x walk_lock x mm x what is held.

    proceeds: and the lock that Linux's rules ask for is held. owner only: kernel tables without a lock, right only
    for the one that owns the range. UNSAFE, silent: it proceeds without that lock and nothing says so. A WARN goes on
    with the walk.
    """
    from kernel_model.locks import Config
    from kernel_model.locktable import cells, freed_by

    config = Config.DEBUG if debug else Config.SHIPPED
    tables = []
    for name, sentence, row in _chosen(variant, range_check):
        found = [cell for cell in cells(row, config) if entry in (None, cell.entry)]
        tables.append(Table(name, sentence, found, freed_by(row)))
    if entry and not any(table.cells for table in tables):
        raise CommandError(f"entry {entry}: no variant shown has it")
    click.echo(json.dumps(_json(tables, config.value), indent=1) if as_json else _text(tables, config.value))


def _chosen(name: str | None, range_check: bool) -> list[tuple[str, str, Variant]]:
    """Name, sentence and row of each variant asked for."""
    from kernel_model.thread import THREAD, with_range_check
    from kernel_model.variants import VARIANTS

    known = {each: ("release", row) for each, row in VARIANTS.items()}
    known |= {each: (reading.sentence, reading.variant) for each, reading in THREAD.items()}
    chosen = [each for each in known if name in (None, each) or (name == REVIEW and each.startswith(f"{REVIEW}/"))]
    if not chosen:
        raise CommandError(f"variant {name}: there is none, only {', '.join([*known, REVIEW])}")
    rows = [(each, *known[each]) for each in chosen]
    if not range_check:
        return rows
    thread = [row for row in rows if row[2].locks.third == "NOLOCK" and "walk_page_range_novma" in row[2].locks.entries]
    if not thread:
        raise CommandError(f"--range-check is for mail-v1 and mail-review, not {name}")
    return [(f"{each}+range", sentence, with_range_check(row)) for each, sentence, row in thread]


class Table(NamedTuple):
    """One variant's rules: its sentence, its cells, and who frees kernel tables beside a walk."""

    name: str
    sentence: str
    cells: list[Cell]
    freed_by: dict[str, str]


def _text(tables: Iterable[Table], config: str) -> str:
    """Each variant: a block for each set of locks that can be held, a line for each call."""
    lines = [f"kernels built: {config}"]
    for name, sentence, found, freed in tables:
        lines += ["", f"{name}: {sentence}"]
        rows = [(key, list(group)) for key, group in groupby(found, lambda c: (c.entry, c.walk_lock, c.mm))]
        for columns, same in groupby(rows, lambda row: tuple(cell.held for cell in row[1])):
            width = max(8, *(len(cell.mm) for cell in found))
            lines += ["", _line(("entry point", "walk_lock", "mm"), columns, width)]
            lines += [_line(key, [_shown(cell) for cell in group], width) for key, group in same]
        lines += ["", *(f"kernel tables are also freed by {who}: {how}" for who, how in freed.items())]
    return "\n".join(lines)


def _line(key: tuple[str, str, str], columns: Iterable[str], width: int) -> str:
    head = f"{key[0]:38} {key[1]:18} {key[2]:{width}}"
    return (head + "".join(f" {column:22}" for column in columns)).rstrip()


def _shown(cell: Cell) -> str:
    times = f" x{cell.warnings}" if cell.warnings > 1 else ""
    also = " (WARN)" if cell.warnings and cell.outcome == "-EINVAL" else ""
    return cell.outcome + times + also


def _json(tables: Iterable[Table], config: str) -> dict[str, Any]:
    return {
        "schema": "pgtable.locks/1",
        "config": config,
        "variants": [
            {
                "variant": table.name,
                "sentence": table.sentence,
                "cells": [cell.as_json() for cell in table.cells],
                "freed_by": table.freed_by,
            }
            for table in tables
        ],
    }
