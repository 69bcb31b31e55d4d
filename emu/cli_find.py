"""`pgtable find`: reverse, from a PA, a table or a word to the VAs that lead there."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from emu.cli import CommandError
from emu.cli_source import (
    hex64,
    listings,
    opened,
    registers_of,
    source_argument,
    source_options,
    span,
    stage_of,
    stage_option,
)
from emu.cli_source import word as number_of

if TYPE_CHECKING:
    from emu.sources import Source
    from emu.sources.find import Root
    from pgtable.find import Alias, Entry
    from pgtable.listing import Listing
    from pgtable.memory import TableMemory

EXAMPLE = """\b
Examples:
  pgtable find k73.snap --pa 0x42dbc000
  pgtable find k73.snap --pa 0x42dbc000+64K
  pgtable find k73.snap --table 0x42ab3000
  pgtable find k73.snap --word 0x0040000000000001/0x0040000000000003
  pgtable find raw:ram.bin@0x40000000 --roots
"""

MOST = 1000  # entries that --word prints


@click.command(epilog=EXAMPLE)
@source_argument("source_word")
@click.option("--pa", metavar="PA", help="All VAs that reach PA, or a range FROM-TO, FROM+SIZE.")
@click.option("--table", metavar="PA", help="The descriptors that refer to the table page at PA.")
@click.option("--word", metavar="WORD[/MASK]", help="The descriptors that are WORD in the bits of MASK [all].")
@click.option("--roots", is_flag=True, help="Root tables in the RAM of SOURCE, the most believable first.")
@stage_option
@source_options
def find(
    source_word: str,
    pa: str | None,
    table: str | None,
    word: str | None,
    roots: bool,
    stage: str | None,
    regs: str | None,
    reg: tuple[str, ...],
    regime: str | None,
    as_json: bool,
) -> None:
    """Find what leads to a PA, to a table, or to a word, in the tables of SOURCE.

    For --pa, VAs whose memory attributes are not those of the first are marked: such aliases are a mistake on most
    hardware (Arm ARM, "Mismatched memory attributes"). --roots reads all RAM and needs no registers: trees of any
    granule are ranked by what they map. Exit code 0 also where nothing is found.
    """
    if sum(x is not None for x in (pa, table, word)) + roots != 1:
        raise CommandError("find: give one of --pa, --table, --word and --roots")
    if roots:
        _print(source_word, _roots(source_word), as_json)
        return
    around = _range(pa) if pa is not None else (0, 0)
    at = number_of(table, "--table") if table is not None else 0
    bits = _masked(word) if word is not None else (0, 0)
    with opened(source_word, regs, reg) as source:
        from pgtable.find import aliases, entries, references

        memory, found = _searched(source, regime, stage_of(source, regime, stage), by_pa=pa is not None)
        if pa is not None:
            rows = [(alias_json(found, row), alias_text(found, row)) for row in aliases(found, *around)]
        else:
            some = iter(references(memory, found, at)) if table is not None else entries(memory, found, *bits)
            rows = [(entry_json(row), entry_text(row)) for row in (some if as_json else islice(some, MOST + 1))]
    if not found.complete:
        click.echo("not all of the tree was visited: it refers to itself", err=True)
    _print(source_word, rows, as_json)
    if not rows and not as_json:
        click.echo("no descriptor is so" if word is not None else "nothing leads there", err=True)


def _searched(source: Source, regime: str | None, stage: str, *, by_pa: bool) -> tuple[TableMemory, Listing]:
    """The listing to search, and the memory with its tables: of both stages a PA's VAs, or stage 1's descriptors."""
    memory, found = listings(source, regime, stage)[0]
    if stage == "both" and by_pa:
        from pgtable.listing_stage2 import nested_listing

        both = nested_listing(source.memory, registers_of(source))
        found = replace(found, runs=both.rows, findings=both.findings)
    return memory, found


def _print(source_word: str, rows: list[tuple[dict[str, Any], str]], as_json: bool) -> None:
    """What was found, as JSON or as lines."""
    if as_json:
        answer = {"schema": "pgtable.find/1", "source": source_word, "found": [row for row, _ in rows]}
        click.echo(json.dumps(answer, indent=1))
        return
    for _, text in rows[:MOST]:
        click.echo(text)
    if len(rows) > MOST:
        click.echo(f"there are more than these {MOST} (--json has all)", err=True)


def _roots(source_word: str) -> list[tuple[dict[str, Any], str]]:
    """The root tables in a source's RAM, registers or not."""
    from emu.sources.find import find_roots

    with opened(source_word, registers=False) as source:
        return [(root_json(root), f"{root.score:7.3f}  {root}") for root in find_roots(source.memory)]


def root_json(root: Root) -> dict[str, Any]:
    """A root as `--json` prints it; shares are of 1."""
    return {
        "pa": hex64(root.pa),
        "score": round(root.score, 3),
        "granule": root.granule.label,
        "va_bits": root.va_bits,
        "level": root.start_level,
        "half": "upper" if root.upper else "lower",
        "tables": root.tables,
        "leaves": root.leaves,
        "linear": round(root.linear, 4),
        "distance": hex64(root.distance),
        "own_tables": round(root.own, 4),
        "in_ram": round(root.in_ram, 4),
        "el0": round(root.user, 4),
    }


def _range(text: str) -> tuple[int, int]:
    """A PA and the bytes from it on."""
    if "+" in text or "-" in text:
        low, high = span(text, "--pa")
        return low, high - low + 1
    return number_of(text, "--pa"), 1


def _masked(text: str) -> tuple[int, int]:
    word, slash, mask = text.partition("/")
    return number_of(word, "--word"), number_of(mask, "--word's mask") if slash else (1 << 64) - 1


def alias_text(found: Listing, alias: Alias) -> str:
    """One line: the range, and the row that it is in."""
    import numpy as np

    from emu.rowtext import RowText

    row = found.runs.pick(slice(alias.row, alias.row + 1))
    shift = np.uint64(alias.va - int(row.va[0]))
    part = row._replace(va=row.va + shift, pa=row.pa + shift, size=np.array([alias.size], np.uint64))
    line = next(RowText(found).lines(part))
    return line if alias.same else f"{line}  ATTRIBUTES DIFFER"


def alias_json(found: Listing, alias: Alias) -> dict[str, Any]:
    """An alias as `--json` prints it."""
    from emu.rowtext import SHAREABILITY, memory_text, rights_text

    runs = found.runs
    return {
        "va": hex64(alias.va),
        "pa": hex64(alias.pa),
        "size": alias.size,
        "level": int(runs.level[alias.row]),
        "permissions": rights_text(int(runs.perms[alias.row]), found.regime.has_el0),
        "memory": memory_text(int(runs.attr[alias.row])),
        "shareability": SHAREABILITY[int(runs.sh[alias.row])],
        "same_attributes": alias.same,
    }


def entry_text(entry: Entry) -> str:
    """One line: where the descriptor is, what it is, what it translates."""
    if entry.slot is None:
        return f"TTBR            {entry.word:#018x} root   VA {entry.va:#018x}"
    where = f"L{entry.level} {entry.slot:#014x}"
    return f"{where} {entry.word:#018x} {entry.kind.name.lower():7} VA {entry.va:#018x}"


def entry_json(entry: Entry) -> dict[str, Any]:
    """A descriptor as `--json` prints it; of a root `pa` is null and `word` the TTBR."""
    return {
        "va": hex64(entry.va),
        "level": entry.level,
        "pa": None if entry.slot is None else hex64(entry.slot),
        "word": hex64(entry.word),
        "kind": "root" if entry.slot is None else entry.kind.name.lower(),
    }
