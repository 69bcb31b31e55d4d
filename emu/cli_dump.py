"""`pgtable dump`: everything that a source's tables map, merged, filtered, in three styles."""

from __future__ import annotations

import json
from collections.abc import Iterator
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

if TYPE_CHECKING:
    from emu.sources import Source
    from pgtable.listing import Listing, Runs
    from pgtable.tree import Finding

EXAMPLE = """\b
Conditions (--where): R W X (the regime's EL), UR UW UX (EL0), user, write, exec, block, page, contiguous, AF, nG,
global, DBM, guarded, fault; level, size, va, pa, attr, sh and any descriptor field with == != < <= > >=;
attr is device, normal, nc, wt, wb, tagged or a MAIR byte; and, or, not, parentheses.
\b
Examples:
  pgtable dump k73.snap
  pgtable dump k73.snap --where 'W and X'
  pgtable dump vmcore --where 'attr==device and size>=2M' --sort size
  pgtable dump k73.snap --style linux
"""

SORTS = ("va", "pa", "size", "level")
FINDINGS = 20  # of a kind that are printed


@click.command(epilog=EXAMPLE)
@source_argument()
@click.option(
    "--style",
    type=click.Choice(["ranges", "linux", "leaves"]),
    default="ranges",
    show_default=True,
    help="Merged ranges, Linux's own text, or one row a descriptor.",
)
@click.option("--where", "condition", metavar="CONDITION", help="Only rows of which this is true.")
@click.option("--va", "va", metavar="FROM-TO", help="Only this range of VAs (also FROM+SIZE).")
@click.option("--pa", "pa", metavar="FROM-TO", help="Only what maps these PAs.")
@click.option("--level", type=click.IntRange(-1, 3), help="Only leaves of this level.")
@click.option("--size", "least", metavar="SIZE", help="Only ranges of at least SIZE (4K, 2M).")
@click.option("--half", type=click.Choice(["lower", "upper"]), help="Only this half of the address space.")
@click.option("--sort", type=click.Choice(SORTS), default="va", show_default=True, help="Largest size first.")
@click.option("--totals", is_flag=True, help="Only the totals: by kind and permissions, bytes of tables.")
@click.option("--variant", metavar="VARIANT", help="For --style linux without a kernel image: 6.1, 6.12, 7.x [7.x].")
@stage_option
@source_options
def dump(
    word: str,
    style: str,
    condition: str | None,
    va: str | None,
    pa: str | None,
    level: int | None,
    least: str | None,
    half: str | None,
    sort: str,
    totals: bool,
    variant: str | None,
    stage: str | None,
    regs: str | None,
    reg: tuple[str, ...],
    regime: str | None,
    as_json: bool,
) -> None:
    """List what the tables of SOURCE map, neighbours with equal attributes merged.

    Each row: VA range, size, kind, permissions (EL1, EL0), memory type, shareability, PA, other bits. What is wrong
    with the tables (loops, tables outside RAM, reserved descriptors) follows as findings.
    """
    filters = (condition, va, pa, level, least, half)
    with opened(word, regs, reg) as source:
        if style == "linux":
            if as_json or totals or any(f is not None for f in filters) or sort != "va" or regime:
                raise CommandError("--style linux: is the kernel's whole dump, without conditions, totals and --json")
            click.echo(linux_text(source, variant), nl=False)
            return
        found = _listed(source, regime, stage_of(source, regime, stage))
        rows = ordered(chosen(found, condition, va, pa, level, least, half), sort)
        totals_of = _totals(found, rows)
        findings = found.findings
    if style == "leaves":
        rows = single(found, rows)
    if as_json:
        click.echo(_json(word, found, rows, findings, totals_of))
        return
    for line in [] if totals else _lines(found, rows):
        click.echo(line)
    click.echo("\n".join([*_finding_lines(findings), *_total_lines(found, totals_of, totals)]))


def _listed(source: Source, regime: str | None, stage: str) -> Listing:
    """The listing that is dumped; of both stages, rows from VA to PA that say where their IPA is."""
    if stage == "both":
        from pgtable.listing_stage2 import nested_listing

        return nested_listing(source.memory, registers_of(source)).both
    return listings(source, regime, stage)[0][1]


def chosen(
    found: Listing,
    condition: str | None,
    va: str | None,
    pa: str | None,
    level: int | None,
    least: str | None,
    half: str | None,
) -> Runs:
    """The rows that all filters let through; a row that is partly inside a range of addresses is cut to it."""
    import numpy as np

    from pgtable.where import number, where

    try:
        mask = where(found, condition) if condition is not None else np.ones(len(found.runs.va), bool)
        size = number(least, "--size") if least is not None else 0
    except ValueError as error:
        raise CommandError(str(error)) from None
    if half is not None:
        mask &= (found.runs.va >> np.uint64(55) != 0) == (half == "upper")
    if level is not None:
        mask &= found.runs.level == level
    runs = found.runs.pick(mask)
    for column, text in (("va", va), ("pa", pa)):
        if text is not None:
            runs = _cut(runs, column, *span(text, f"--{column}"))
    return runs.pick(runs.size >= np.uint64(size))


def _cut(runs: Runs, column: str, low: int, high: int) -> Runs:
    """What of the rows is inside [low, high], by VA or PA."""
    import numpy as np

    at = getattr(runs, column)
    last = at + (runs.size - np.uint64(1))
    inside = (last >= np.uint64(low)) & (at <= np.uint64(high))
    runs, at, last = runs.pick(inside), at[inside], last[inside]
    skip = np.maximum(at, np.uint64(low)) - at
    size = np.minimum(last, np.uint64(high)) - at - skip + np.uint64(1)
    return runs._replace(va=runs.va + skip, pa=runs.pa + skip, size=size)


def ordered(runs: Runs, sort: str) -> Runs:
    """Rows by VA, PA, size (largest first) or level."""
    import numpy as np

    if sort == "va":
        return runs
    key = getattr(runs, sort)
    return runs.pick(np.argsort(np.uint64((1 << 64) - 1) - key if sort == "size" else key, kind="stable"))


def single(found: Listing, runs: Runs) -> Runs:
    """One row for each leaf of the rows."""
    import numpy as np

    if not len(runs.va):
        return runs
    entry = np.zeros(len(runs.va), np.uint64)
    for i, (va, level) in enumerate(zip(runs.va.tolist(), runs.level.tolist(), strict=True)):
        entry[i] = found.params(va).fmt.granule.level_size(level)
    skip = runs.va % entry
    count = ((runs.size + skip + entry - np.uint64(1)) // entry).astype(np.int64)
    row = np.repeat(np.arange(len(count)), count)
    step = (np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)).astype(np.uint64) * entry[row]
    first = runs.va - skip
    return runs.pick(row)._replace(
        va=first[row] + step,
        pa=(runs.pa - skip)[row] + step,
        size=entry[row],
        word=runs.word[row] + step,
        leaves=np.ones(len(row), np.int64),
    )


def linux_text(source: Source, variant: str | None) -> str:
    """The text of Linux's own dump."""
    from emu.linux_dump import LinuxTables
    from kernel_model.mm import Runaway
    from kernel_model.variants import UnknownVariant, by_name
    from pgtable import NoMemory
    from pgtable.listing import listing

    regs = registers_of(source)
    try:
        if source.image is not None and variant is None:
            tables = LinuxTables.of(source.memory, regs, source.image)
        else:
            tables = LinuxTables(source.memory, regs, source.image, by_name(variant or "7.x"))
        wrong = [f for f in listing(source.memory, regs).findings if f.kind in ("loop", "not listed", "no memory")]
        upper = [f for f in wrong if f.va >= tables.params.half_base]
        if upper:
            raise CommandError(f"--style linux: a kernel cannot dump these tables ({upper[0]}); leave out --style")
        return tables.text()
    except (UnknownVariant, ValueError) as error:
        raise CommandError(str(error)) from None
    except (Runaway, NoMemory) as error:
        raise CommandError(f"--style linux: the kernel's dump of these tables does not end: {error}") from None


# text


def _lines(found: Listing, rows: Runs) -> Iterator[str]:
    from emu.rowtext import RowText

    return RowText(found).lines(rows)


def _finding_lines(findings: list[Finding]) -> Iterator[str]:
    """Findings, a few of each kind."""
    by_kind: dict[str, list[Finding]] = {}
    for finding in findings:
        by_kind.setdefault(finding.kind, []).append(finding)
    for kind, some in by_kind.items():
        yield from (f"finding: {finding}" for finding in some[:FINDINGS])
        if len(some) > FINDINGS:
            yield f"finding: {kind}: {len(some) - FINDINGS} more (--json has all)"


def _totals(found: Listing, rows: Runs) -> dict[str, Any]:
    """Ranges, leaves and bytes of the chosen rows, by level and permissions; tables of the whole tree."""
    import numpy as np

    from emu.rowtext import kind_text, rights_text
    from pgtable.find import table_bytes

    kinds = []
    key = rows.level.astype(np.int64) * 65536 + rows.perms
    for value in np.unique(key).tolist():
        some = rows.pick(key == value)
        level, perms = int(some.level[0]), int(some.perms[0])
        kinds.append(
            {
                "kind": kind_text(level),
                "level": level,
                "permissions": rights_text(perms, found.regime.has_el0),
                "ranges": len(some.va),
                "leaves": int(some.leaves.sum()),
                "bytes": sum(some.size.tolist()),
            }
        )
    return {
        "ranges": len(rows.va),
        "leaves": int(rows.leaves.sum()),
        "bytes": sum(rows.size.tolist()),
        "tables": len(np.unique(found.tables.pa)),
        "table_bytes": table_bytes(found),
        "kinds": kinds,
    }


def _total_lines(found: Listing, totals: dict[str, Any], long: bool) -> list[str]:
    from emu.rowtext import size_text

    lines = []
    for row in totals["kinds"] if long else ():
        lines.append(
            f"{row['kind']:8} {row['permissions']:7} {row['ranges']:>7} ranges {row['leaves']:>9} leaves"
            f" {size_text(row['bytes']):>8}"
        )
    mapped = f"{totals['ranges']} ranges, {totals['leaves']} leaves, {size_text(totals['bytes'])} mapped"
    tables = f"{totals['tables']} tables of {size_text(totals['table_bytes'])}"
    return [*lines, f"{mapped}; {tables}{'' if found.complete else '; not all is listed'}"]


# JSON


def row_json(found: Listing, runs: Runs) -> Iterator[dict[str, Any]]:
    """The rows as `--json` prints them."""
    from emu.rowtext import SHAREABILITY, fault_text, flags_text, memory_text, rights_text

    for row in zip(*(column.tolist() for column in runs), strict=True):
        va, size, pa, level, word, slot, inherited, perms, leaves, fault, _, attr, sh = row
        p = found.params(va)
        yield {
            "va": hex64(va),
            "size": size,
            "pa": hex64(pa),
            "level": level,
            "leaves": leaves,
            "word": hex64(word),
            "slot": hex64(slot),
            "inherited": hex64(inherited),
            "permissions": rights_text(perms, p.regime.has_el0),
            "memory": memory_text(attr),
            "attr": f"{attr:#04x}",
            "shareability": SHAREABILITY[sh],
            "flags": flags_text(p, word, level, fault).split(),
            "fault": fault_text(fault) if fault else None,
        } | ({} if found.ipa is None else {"ipa": hex64(found.ipa_of(va))})


def finding_json(finding: Finding) -> dict[str, Any]:
    """A finding as `--json` prints it."""
    return {"kind": finding.kind, "va": hex64(finding.va), "size": finding.size, "text": finding.text}


def _json(word: str, found: Listing, rows: Runs, findings: list[Finding], totals: dict[str, Any]) -> str:
    return json.dumps(
        {
            "schema": "pgtable.dump/1",
            "source": word,
            "regime": found.regime.value,
            "stage": found.stage_text,
            "complete": found.complete,
            "rows": list(row_json(found, rows)),
            "findings": [finding_json(finding) for finding in findings],
            "totals": totals,
        },
        indent=1,
    )
