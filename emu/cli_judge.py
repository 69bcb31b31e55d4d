"""`pgtable judge`: the hardware model against QEMU's answers, stored in corpora or asked for now."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from emu import writing
from emu.cli import CommandError, examples
from emu.judge import cases as random_cases
from emu.judge.corpus import PA_BITS, Case, CorpusError, dump, load
from emu.judge.guest import GuestDied, OracleError
from emu.judge.known import KNOWN, KNOWN_NESTED, KNOWN_RME
from emu.judge.qemu import Oracle, UnsupportedError
from emu.judge.shrink import shrink
from emu.judge.verdict import Disagreement, Tally, judge_case

STORED = 3  # failing cases that are shrunk and stored in a run: each takes up to half a minute
SHOWN = 20  # unexplained disagreements printed in full


@click.command(epilog=examples("pgtable judge cases.jsonl.xz", "pgtable judge --qemu --seed 1 --cases 200"))
@click.argument("files", nargs=-1, type=click.Path())
@click.option(
    "--qemu", is_flag=False, flag_value="", metavar="[PATH]", help="Ask qemu-system-aarch64 (on PATH, or PATH) now."
)
@click.option("--seed", default=1, show_default=True, help="Seed of the random cases.")
@click.option("--cases", "count", default=100, show_default=True, type=click.IntRange(1), help="Random cases to ask.")
@click.option(
    "--cpu", default="max", show_default=True, type=click.Choice(list(PA_BITS)), help="QEMU's CPU model that is asked."
)
@click.option("--kind", "only", multiple=True, help="Only cases of this kind (repeatable).")
@click.option(
    "--granule",
    "granules",
    multiple=True,
    type=click.Choice([*random_cases.GRANULES]),
    help="Random cases of this granule only (repeatable).",
)
@click.option("--cells", is_flag=True, help="Also agreement by fault kind and level.")
@click.option(
    "--store", default="judge-failures", show_default=True, type=click.Path(), help="Folder for shrunk failing cases."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, schema pgtable.judge/1.")
@click.pass_context
def judge(
    ctx: click.Context,
    files: tuple[str, ...],
    qemu: str | None,
    seed: int,
    count: int,
    cpu: str,
    only: tuple[str, ...],
    granules: tuple[str, ...],
    cells: bool,
    store: str,
    as_json: bool,
) -> None:
    """Compare the model with the answers in corpus FILES, or with QEMU's now (--qemu), by the scalar and array walk.

    Exit code 1 on a disagreement that no known fault of the judge explains, when a cell that the judge fills has no
    agreement, or when nothing was judged.
    """
    if not files and qemu is None:
        raise CommandError("nothing to judge: give corpus files, or --qemu")
    verdict = Verdict(only)
    try:
        if files:
            verdict.add_files(files)
        if qemu is not None:
            verdict.ask_qemu(qemu or None, seed, count, granules, Path(store), cpu)
    except (CorpusError, OracleError) as error:
        raise CommandError(str(error)) from None
    click.echo(json.dumps(verdict.as_json(), indent=1) if as_json else verdict.text(cells))
    ctx.exit(1 if verdict.failed else 0)


class Verdict:
    """What was judged, kind by kind."""

    def __init__(self, only: tuple[str, ...] = ()) -> None:
        self.only = only
        self.tallies: dict[str, Tally] = {}
        self.unexplained: list[Disagreement] = []
        self.stored: list[str] = []

    @property
    def failed(self) -> bool:
        """A kind failed, or nothing was judged at all."""
        judged = sum(t.queries for t in self.tallies.values())
        return not judged or any(t.failed for t in self.tallies.values())

    def add(self, case: Case) -> list[Disagreement]:
        """Judges one case; returns what is unexplained."""
        tally = self.tallies.setdefault(case.kind, Tally(case.kind))
        wrong = [d for d in judge_case(case, tally) if not d.rule]
        self.unexplained += wrong[: SHOWN - len(self.unexplained)]
        return wrong

    def add_files(self, files: tuple[str, ...]) -> None:
        """Judges every case of corpus files."""
        with _progress() as progress:
            for file in files:
                task = progress.add_task(Path(file).name, total=None)
                for case in load(file):
                    if not self.only or case.kind in self.only:
                        self.add(case)
                    progress.advance(task)

    def ask_qemu(
        self, path: str | None, seed: int, count: int, granules: tuple[str, ...], store: Path, cpu: str = "max"
    ) -> None:
        """Asks a QEMU random cases of every kind in turn; a failing one is shrunk and stored."""
        rng = random.Random(seed)
        with Oracle(path, cpu) as oracle, _progress() as progress:
            avoid = random_cases.TRAPS.get(oracle.version, frozenset())
            kinds = random_cases.kinds(oracle.registers | oracle.operations, avoid, cpu)
            kinds = [kind for kind in kinds if not self.only or kind in self.only]
            kinds = [kind for kind in kinds if not granules or random_cases.granule_names(kind, granules)]
            if not kinds:
                wanted = ", ".join([*self.only, *granules])
                raise OracleError(f"QEMU {oracle.version} can be asked none of the kinds {wanted}")
            task = progress.add_task(f"QEMU {oracle.version}", total=count)
            for i in range(count):
                case = random_cases.random_case(rng, kinds[i % len(kinds)], cpu=cpu, avoid=avoid, granules=granules)
                answered = oracle.answered(case)
                if self.add(answered) and len(self.stored) < STORED:
                    self._store(oracle, case, store, f"seed{seed}-{i}")
                progress.advance(task)

    def _store(self, oracle: Oracle, case: Case, folder: Path, name: str) -> None:
        def fails(smaller: Case) -> bool:
            try:
                return any(not d.rule for d in judge_case(oracle.answered(smaller), Tally(case.kind)))
            except (UnsupportedError, GuestDied):
                return False

        small = oracle.answered(shrink(case, fails))
        file = folder / f"{case.kind}-{name}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writing.write(file, dump(small) + "\n")
        except OSError as error:
            raise CommandError(f"--store {file}: {error.strerror}") from None
        self.stored.append(str(file))

    def text(self, cells: bool) -> str:
        """The table, the cells if asked for, and what is unexplained."""
        table = Table(box=None, pad_edge=False)
        columns = ("kind", "cases", "queries", "agree", "disagree", "known judge faults", "skipped")
        for i, name in enumerate(columns):
            table.add_column(name, justify="right" if i in (1, 2, 3, 4, 6) else "left")
        for t in self.tallies.values():
            known = ", ".join(f"{name} {n}" for name, n in sorted(t.known.items()))
            table.add_row(t.kind, *(str(n) for n in (t.cases, t.queries, t.agree, t.disagree)), known, str(t.skipped))
        parts = [_rendered(table)]
        parts += [_rendered(self._cell_table())] if cells else []
        parts += [f"{t.kind}: nothing agrees in: {', '.join(t.empty_cells)}" for t in self._with_empty_cells()]
        used = {name for t in self.tallies.values() for name in t.known}
        parts += [f"{name}: {rule}" for name, rule in rules().items() if name in used]
        parts += [f"unexplained: {d}" for d in self.unexplained]
        parts += [f"stored, shrunk: {file}" for file in self.stored]
        queries, disagree = (sum(getattr(t, name) for t in self.tallies.values()) for name in ("queries", "disagree"))
        return "\n".join([*parts, f"{queries} queries judged in two paths, {disagree} unexplained"])

    def _with_empty_cells(self) -> list[Tally]:
        return [t for t in self.tallies.values() if t.empty_cells]

    def _cell_table(self) -> Table:
        table = Table("outcome", "judged", "agree", box=None, pad_edge=False)
        names = sorted({cell for t in self.tallies.values() for cell in t.filled})
        for name in names:
            filled, agreed = (sum(getattr(t, a)[name] for t in self.tallies.values()) for a in ("filled", "agreed"))
            table.add_row(name, str(filled), str(agreed))
        return table

    def as_json(self) -> dict[str, Any]:
        """The object that --json prints."""
        return {
            "schema": "pgtable.judge/1",
            "failed": self.failed,
            "kinds": [
                {
                    "kind": t.kind,
                    "cases": t.cases,
                    "queries": t.queries,
                    "agree": t.agree,
                    "disagree": t.disagree,
                    "skipped": t.skipped,
                    "unanswered": t.unanswered,
                    "known": dict(sorted(t.known.items())),
                    "cells": {cell: {"judged": t.filled[cell], "agree": t.agreed[cell]} for cell in sorted(t.filled)},
                }
                for t in self.tallies.values()
            ],
            "rules": rules(),
            "unexplained": [str(d) for d in self.unexplained],
            "stored": self.stored,
        }


def rules() -> dict[str, str]:
    """What every row says that may explain a disagreement, stage 1's first."""
    found: dict[str, str] = {}
    for name, judge, rule in [k[:3] for k in KNOWN] + [k[:3] for k in KNOWN_NESTED] + [k[:3] for k in KNOWN_RME]:
        found.setdefault(name, f"{judge}: {rule}")
    return found


def _progress() -> Progress:
    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _rendered(table: Table) -> str:
    console = Console(width=None if sys.stdout.isatty() else 200, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
