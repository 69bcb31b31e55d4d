"""A store's totals and findings, as text and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from emu.campaigns.plan import COMPARISON, RACE, TRANSLATION
from emu.campaigns.store import Store

WHAT = {TRANSLATION: "translations", COMPARISON: "comparisons", RACE: "schedules"}
_SUMS = "COUNT(*), SUM(judged), SUM(agree), SUM(known), SUM(differ)"
_BY = "SELECT {keys}, " + _SUMS + " FROM cases GROUP BY {keys} ORDER BY {keys}"
_FINDINGS = """
SELECT signature, COUNT(*), MIN(id), text, replay FROM findings GROUP BY signature ORDER BY COUNT(*) DESC, signature
"""
COUNTS = ("cases", "judged", "agree", "known", "differ")


def report_json(store: Store) -> dict[str, Any]:
    """The object that `--json` prints."""
    names = ("work", "subject", "release", "part", "granule", "variant")
    keys = ", ".join(names)
    rows = [dict(zip((*names, *COUNTS), row, strict=True)) for row in store.rows(_BY.format(keys=keys))]
    findings = store.rows(_FINDINGS)
    return {
        "schema": "pgtable.fuzz/1",
        "parameters": store.parameters,
        "planned": store.planned,
        "cases": sum(row["cases"] for row in rows),
        "units": rows,
        "details": {name: dict(sorted(counts.items())) for name, counts in _details(store).items()},
        "findings": [dict(zip(("signature", "cases", "case", "text", "replay"), row, strict=True)) for row in findings],
    }


def report_text(store: Store) -> str:
    """Tables by judge and granule, and by judge and part; details; findings; totals."""
    details = _details(store)
    tables = (_table(store, f"work, subject, release, {key}") for key in ("granule", "part"))
    lines = [line for table in tables for line in (*table, "")]
    for name, counts in details.items():
        lines.append(f"{name:12}" + ", ".join(f"{what} {count}" for what, count in sorted(counts.items())))
    findings = store.rows(_FINDINGS)
    for signature, count, case, text, replay in findings:
        lines += ["", f"finding     {signature}", f"in          {count} cases, such as {case}", f"            {text}"]
        lines += [f"replay      {replay}"]
    totals = store.rows(f"SELECT work, {_SUMS} FROM cases GROUP BY work ORDER BY work DESC")
    lines += ["", *(_total(*total) for total in totals)]
    done = sum(total[1] for total in totals)
    missing = f", {store.planned - done} cases are missing" if done < store.planned else ""
    return "\n".join([*lines, f"verdict     {len(findings)} findings{missing}"])


def _total(work: str, cases: int, judged: int, agree: int, known: int, differ: int) -> str:
    return f"{work:12}{cases} cases, {judged} {WHAT[work]}: {agree} agree, {known} known, {differ} differ"


def _table(store: Store, keys: str) -> list[str]:
    head = [*keys.split(", "), *COUNTS]
    rows = [head, *([str(value) for value in row] for row in store.rows(_BY.format(keys=keys)))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_line(row, widths) for row in rows]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first = len(row) - len(COUNTS)
    cells = (
        cell.ljust(width) if i < first else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join(cells).rstrip()


def _details(store: Store) -> dict[str, Counter[str]]:
    """The counts of all cases' details: those by name, and the others by what they count."""
    found: dict[str, Counter[str]] = {}
    for (text,) in store.rows("SELECT detail FROM cases"):
        for name, value in json.loads(text).items():
            counts = value if isinstance(value, dict) else {name: value}
            found.setdefault(name if isinstance(value, dict) else "counts", Counter()).update(counts)
    return found
