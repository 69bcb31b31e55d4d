"""What `pgtable fuzz` and `pgtable race --campaign` share: options, the run with its progress bar, the report."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from emu.cli import CommandError

if TYPE_CHECKING:
    from emu.campaigns.plan import Chunk, Plan, Result
    from emu.campaigns.store import Store
    from emu.campaigns.workers import Workers

F = TypeVar("F", bound=Callable[..., Any])


def worker_options(command: F) -> F:
    """--jobs and --scheduler."""
    jobs = click.option("--jobs", type=click.IntRange(1, 256), help="Processes of this machine [one a CPU].")
    scheduler = click.option("--scheduler", metavar="tcp://HOST:PORT", help="The workers of a Dask cluster instead.")
    return jobs(scheduler(command))


@contextmanager
def told() -> Iterator[None]:
    """A campaign that cannot be or go on: one sentence, exit code 2."""
    from emu.campaigns.plan import CampaignError
    from emu.judge.guest import OracleError

    try:
        yield
    except (CampaignError, OracleError) as error:
        raise CommandError(str(error)) from None


def run_campaign(plan: Plan, path: str, jobs: int | None, scheduler: str | None, as_json: bool) -> int:
    """Begins or resumes the campaign of a store, prints its report, and returns the exit code."""
    from emu.campaigns.drive import drive
    from emu.campaigns.store import Store

    with told():
        store = Store.open(path, plan)
        try:
            done = store.done()
            if len(done) < plan.cases:
                with _progress(plan, len(done)) as advance:
                    workers = _workers(jobs, scheduler)
                    aside = drive(plan.chunks(done), workers, lambda chunk, result: advance(store, chunk, result))
                    _tell(aside)
            return print_report(store, as_json)
        finally:
            store.close()


def _workers(jobs: int | None, scheduler: str | None) -> Workers:
    from emu.campaigns.workers import Cluster, Processes

    return Cluster(scheduler) if scheduler else Processes(jobs or len(os.sched_getaffinity(0)))


Advance = Callable[["Store", "Chunk", "Result"], None]


@contextmanager
def _progress(plan: Plan, done: int) -> Iterator[Advance]:
    """A bar of cases on stderr, with the number of findings; gives what stores a result and moves the bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("cases", total=plan.cases, completed=done)
        findings = 0

        def advance(store: Store, chunk: Chunk, result: Result) -> None:
            nonlocal findings
            store.add(chunk.unit, result)
            findings += len(result.found)
            progress.update(task, advance=len(result.rows), description=f"{findings} findings")

        yield advance


def _tell(aside: list[Chunk]) -> None:
    for chunk in aside:
        click.echo(f"not done: its worker ended each time: {chunk.ids[0]} and the next {chunk.size - 1}", err=True)


def print_report(store: Store, as_json: bool) -> int:
    """Prints totals and findings; 1 if there are findings, or cases are missing."""
    from emu.campaigns.report import report_json, report_text

    report = report_json(store)
    click.echo(json.dumps(report, indent=1) if as_json else report_text(store))
    return 1 if report["findings"] or report["cases"] < report["planned"] else 0
