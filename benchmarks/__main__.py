"""`make bench`: every bound of the project in one table, ours beside references and peers, in one run.

    python -m benchmarks [--quick] [--only GROUP] [--rounds N] [--json FILE]

Contenders take turns round after round; figures are medians, ratios the medians of each round's ratio, with the
smallest and largest beside. Exit code 1 where a bound is missed, 2 for options that make no sense.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from benchmarks.rows import GROUPS, Bench, Row
from benchmarks.timing import Spread

PEERS = {
    "gdb-pt-dump": "https://github.com/martinradev/gdb-pt-dump",
    "arm64-pgtable-tool": "https://github.com/ashwio/arm64-pgtable-tool",
}
CLONE_LIMIT = 60  # seconds


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes: a check that it runs")
    parser.add_argument("--only", choices=list(GROUPS), help="one group of rows")
    parser.add_argument("--rounds", type=int, help="how often each contender runs (default 11, --quick 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write every figure")
    parser.add_argument("--no-fetch", action="store_true", help="peers that are not there are not fetched")
    parser.add_argument("--kernel", default="debian:6.12", help="whose set_memory_valid runs")
    parser.add_argument("--qemu", default="qemu-system-aarch64", help="the QEMU that runs the same work")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", metavar="FOLDER", type=Path, help="a checkout; else git is asked for one")
    given = parser.parse_args()
    if given.rounds is not None and given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: must be at least 1")
    if given.json and not given.json.resolve().parent.is_dir():
        parser.error(f"--json {given.json}: there is no folder {given.json.resolve().parent}")
    bench = Bench(given.rounds or (3 if given.quick else 11), given.quick, given.kernel, given.qemu)
    for peer in PEERS:
        folder = getattr(given, peer.replace("-", "_"))
        if folder and not folder.is_dir():
            parser.error(f"--{peer} {folder}: no such folder")
        _obtain(bench, peer, folder, fetch=not (given.quick or given.no_fetch))
    if not shutil.which("cc"):
        bench.missing["C"] = "no C compiler (cc)"
    rows = []
    print(f"{'':58}{'ours':>10}  {'beside':>20}{'ratio':>9}  {'spread':<15}{'bound':>6}")
    for group in [given.only] if given.only else GROUPS:
        print(group)
        for row in GROUPS[group](bench):
            row.judged = not bench.quick
            rows.append(row)
            print("\n".join(lines(row)), flush=True)
    print("\n".join(summary(rows, bench)))
    if given.json:
        given.json.write_text(json.dumps(document(rows, bench), indent=1) + "\n")
    return int(any(row.met is False for row in rows))


def lines(row: Row) -> Iterable[str]:
    """A row of the table, and a line for each further contender."""
    beside = f"{row.under} {row.figures[row.under].median:.1f}" if row.under in row.figures else "-"
    spread = f"{row.ratio.min:.2f} .. {row.ratio.max:.2f}" if row.ratio else ""
    ratio = f"{row.ratio.median:.2f}" if row.ratio else ""
    bound = f"{row.bound:g}" if row.bound is not None else ""
    verdict = {True: "met", False: "MISSED", None: "" if row.bound is None else "not judged"}[row.met]
    ours = f"{row.figures[row.over].median:.1f}"
    yield f"  {row.name:56}{ours:>10}  {beside:>20}{ratio:>9}  {spread:<15}{bound:>6}  {verdict}".rstrip()
    others = [f"{who} {figure.median:.1f}" for who, figure in row.figures.items() if who not in (row.over, row.under)]
    yield f"    {row.unit}" + "".join(f"; {other}" for other in others)


def summary(rows: list[Row], bench: Bench) -> Iterable[str]:
    """What was met, and what was not to be had."""
    bounded = [row for row in rows if row.met is not None]
    missed = [row.name for row in bounded if not row.met]
    if bounded:
        yield f"{len(bounded) - len(missed)} of {len(bounded)} bounds met"
    for name in missed:
        yield f"missed: {name}"
    for name, reason in bench.missing.items():
        yield f"not available: {name}: {reason}"
    if bench.quick:
        yield "--quick: sizes are smaller than those of the bounds: nothing is judged"


def document(rows: list[Row], bench: Bench) -> dict[str, Any]:
    """docs/schema/bench.json."""
    return {
        "schema": "pgtable.bench/1",
        "host": {
            "machine": platform.machine(),
            "cpus": os.cpu_count() or 1,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("numpy", "unicorn")},
        },
        "rounds": bench.rounds,
        "quick": bench.quick,
        "rows": [
            {
                "group": row.group,
                "name": row.name,
                "unit": row.unit,
                "figures": {who: figure._asdict() for who, figure in row.figures.items()},
                "over": row.over,
                "under": row.under,
                "ratio": row.ratio._asdict() if isinstance(row.ratio, Spread) else None,
                "bound": row.bound,
                "met": row.met,
            }
            for row in rows
        ],
        "missing": bench.missing,
    }


def _obtain(bench: Bench, peer: str, folder: Path | None, *, fetch: bool) -> None:
    """A checkout of a peer: the one given, the one in the cache, or a new one there."""
    kept = user_cache_path("pgtable") / "peers" / peer
    if folder is None and not kept.is_dir() and fetch:
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            line = ["git", "clone", "--quiet", "--depth", "1", PEERS[peer], str(kept)]
            env = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
            done = subprocess.run(line, capture_output=True, text=True, timeout=CLONE_LIMIT, check=False, env=env)
            reason = done.stderr.strip().splitlines()[-1] if done.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error)
        if reason:
            bench.missing[peer] = f"{reason}; pass --{peer} FOLDER"
            return
    found = folder or kept
    if found.is_dir():
        bench.peers[peer] = found
    else:
        bench.missing[peer] = f"not fetched (--quick, --no-fetch); pass --{peer} FOLDER"


if __name__ == "__main__":
    sys.exit(main())
