"""`pgtable check`: kernel functions against the model, one prepared call or many cases."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emu import writing
from emu.cli import CommandError, examples
from emu.cli_run import _JSON, _SYMBOLS, bad_input, load_image, report_json, report_text

if TYPE_CHECKING:
    from emu.checks.campaign import Campaign, FunctionReport
    from emu.checks.coverage import FunctionCoverage
    from emu.image import KernelImage
    from kernel_model.variants import Variant

MAIN_JOB = "set_memory_valid"


@click.command(
    epilog=examples(
        "pgtable check set_memory_valid --kernel debian:6.12 --pages 2",
        "pgtable check all --kernel debian:7.3 --cases 200 --seed 7",
        "pgtable check ptdump --snapshot k73.snap",
    )
)
@click.argument("function")
@click.option("--kernel", "source", metavar="KERNEL", help="A kernel file, or debian:VERSION[-FLAVOUR].")
@click.option("--snapshot", metavar="FILE", help="With ptdump: a booted kernel's own tables instead.")
@_SYMBOLS
@click.option("--cases", type=click.IntRange(0, 1_000_000), help="Random cases of each function (default 200).")
@click.option("--seed", default=1, show_default=True, type=click.IntRange(0), help="Of the random cases.")
@click.option("--jobs", type=click.IntRange(1, 256), help="Processes that share the functions [one a CPU].")
@click.option("--pages", default=4, show_default=True, type=click.IntRange(0, 1 << 20), help="Pages of the main job.")
@click.option("--enable", type=click.IntRange(0, 1), help="The main job's call: 0 invalid, 1 valid. Default: both.")
@click.option("--model", metavar="VARIANT", help="Predict with this row of the model (6.1, 6.12, 7.x, mail-v1 ...).")
@click.option("--case", "stored", type=click.Path(dir_okay=False), help="Only this case, saved by an earlier check.")
@click.option("--save", type=click.Path(file_okay=False), help="Folder for failing cases [pgtable-failures].")
@_JSON
@click.pass_context
def check(
    ctx: click.Context,
    function: str,
    source: str | None,
    snapshot: str | None,
    symbols: str | None,
    cases: int | None,
    seed: int,
    jobs: int | None,
    pages: int,
    enable: int | None,
    model: str | None,
    stored: str | None,
    save: str | None,
    as_json: bool,
) -> None:
    """Run the kernel's FUNCTION on prepared tables and compare with what the model predicted.

    FUNCTION is a function's name, ptdump, kfence, or `all`. set_memory_valid without --cases is the main job: pages
    of the linear map made invalid, then valid, shown in full. Everything else is many cases: prepared ones for each
    situation, then --cases random ones. Exit code 1 if anything differs, or if a row of the model's table was not
    reached.

    ptdump with --snapshot: the dump of the booted kernel against ours of the RAM file; then again with one bit of one
    descriptor changed, --cases times.
    """
    from kernel_model.variants import by_name

    if (source is None) == (snapshot is None) or (snapshot and function != "ptdump"):
        raise CommandError("check: give --kernel KERNEL, or with ptdump --snapshot FILE")
    if snapshot is not None:
        from emu.cli_ptdump import check_booted

        ctx.exit(check_booted(snapshot, 200 if cases is None else cases, seed, as_json))
    assert source
    with bad_input():
        variant = by_name(model) if model else None
        if function == MAIN_JOB and cases is None and not stored:
            _main_job(ctx, source, symbols, pages, enable, variant, as_json)
        image = load_image(source, symbols)
        if stored:
            campaign = _one(image, function, Path(stored), variant)
        else:
            campaign = _campaign(image, function, 200 if cases is None else cases, seed, variant, jobs)
    click.echo(json.dumps(campaign_json(campaign, function), indent=1) if as_json else campaign_text(campaign))
    if not stored:
        _save(campaign, image.layout.page_size, Path(save or "pgtable-failures"))
    ctx.exit(0 if campaign.ok else 1)


def _main_job(
    ctx: click.Context,
    source: str,
    symbols: str | None,
    pages: int,
    enable: int | None,
    variant: Variant | None,
    as_json: bool,
) -> None:
    from emu.check import KernelSubject, main_job

    reports = main_job(KernelSubject(load_image(source, symbols)), pages, enable, variant)
    click.echo(json.dumps(report_json(reports), indent=1) if as_json else report_text(reports))
    ctx.exit(1 if any(report.differences for report in reports) else 0)


def _campaign(
    image: KernelImage, function: str, cases: int, seed: int, variant: Variant | None, jobs: int | None
) -> Campaign:
    from emu.checks import registry
    from emu.checks.campaign import run_all

    known = registry.names(image)
    if function != "all" and function not in known:
        raise CommandError(f"check {function}: {image.name} has {', '.join(known)}, and all of them is `all`")
    names = known if function == "all" else [function]
    with _Progress() as progress:
        jobs = jobs or len(os.sched_getaffinity(0))
        return run_all(image, names, cases, seed, variant=variant, progress=progress, jobs=jobs)


def _one(image: KernelImage, function: str, path: Path, variant: Variant | None) -> Campaign:
    """A stored case alone: it is not shrunk, and reaches what it reaches."""
    from emu.checks import registry
    from emu.checks.campaign import Campaign, Worlds, run_stored
    from emu.checks.stored import StoredError, load

    if function not in registry.HARNESSES or function not in image.symbols:
        raise CommandError(f"case {path}: {image.name} has no {function} that is checked case by case")
    worlds, harness = Worlds(image, variant), registry.harness(function)
    try:
        flavour, case = load(path.read_text(), function, image.layout.page_size, harness.case)
    except UnicodeDecodeError:
        raise CommandError(f"case {path}: is no text, so no case that a check saved") from None
    except (OSError, StoredError) as error:
        raise CommandError(f"case {path}: {error}") from None
    if flavour not in worlds.flavours(harness):
        raise CommandError(f"case {path}: {image.name} has no world {flavour} for {function}")
    if not worlds.of(harness, flavour).space.fits(case.tree):
        raise CommandError(f"case {path}: its tables are not where {image.name} has room for them")
    found = Campaign(image.name, image.release, (variant or worlds[flavour].variant).name, 0)
    try:
        found.reports.append(run_stored(worlds, harness, flavour, case))
    except (LookupError, ValueError, ArithmeticError, MemoryError) as error:  # numbers that no check would have made
        raise CommandError(f"case {path}: cannot be run on {image.name}: {type(error).__name__} {error}") from None
    return found


class _Progress:
    """One line on a terminal's stderr that says what is running."""

    def __enter__(self) -> _Progress:
        self._shown = sys.stderr.isatty()
        return self

    def __call__(self, text: str) -> None:
        if self._shown:
            click.echo(f"\r\x1b[K{text}", err=True, nl=False)

    def __exit__(self, *_: object) -> None:
        if self._shown:
            click.echo("\r\x1b[K", err=True, nl=False)


def _save(campaign: Campaign, page_size: int, folder: Path) -> None:
    """Writes the failing cases that can be run again, each to a new file, and says where or why not."""
    from emu.checks import registry
    from emu.checks.stored import StoredError, dump

    for report in campaign.reports:
        for failure in report.failures if report.function in registry.HARNESSES else ():
            name = f"{report.function}-{campaign.release}-{campaign.seed}".replace("/", "_")
            try:
                path = _write_new(folder, name, dump(report.function, failure.flavour, page_size, failure.case))
            except (OSError, StoredError) as error:
                click.echo(f"failing case of {report.function} not saved: {error}", err=True)
            else:
                click.echo(f"failing case saved: {path}", err=True)


def _write_new(folder: Path, name: str, text: str) -> Path:
    """Writes NAME-N.json with the first N that no file has."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = count()
    while True:
        path = folder / f"{name}-{next(numbers)}.json"
        with suppress(FileExistsError):
            writing.write(path, text, new=True)
            return path


# text


def campaign_text(campaign: Campaign) -> str:
    """The table of functions, what differs, what was not reached, and the coverage of the code."""
    lines = [f"kernel      {campaign.release}", f"model       {campaign.variant}", f"seed        {campaign.seed}", ""]
    lines.append(f"{'function':40} {'cases':>7} {'events':>9} {'differ':>7} {'unreached':>9} {'seconds':>8}")
    lines += [_row(report) for report in campaign.reports]
    for report in campaign.reports:
        lines += _details(report)
    if campaign.coverage:
        lines += ["", f"{'compiled code':40} {'blocks':>7} {'reached':>9} {'share':>7} {'of what can run':>16}"]
    for cover in campaign.coverage:
        able = cover.reached + len(cover.unexplained)
        shares = [100 * cover.reached / max(count, 1) for count in (cover.blocks, able)]
        lines.append(f"{cover.name:40} {cover.blocks:>7} {cover.reached:>9} {shares[0]:>6.1f}% {shares[1]:>15.1f}%")
        lines += [f"    {block}" for block in cover.unreached]
    failed = sum(report.failed for report in campaign.reports)
    missed = sum(len(report.unreached) for report in campaign.reports)
    cases = sum(report.cases for report in campaign.reports)
    verdict = f"{failed} of {cases} cases differ, {campaign.events} events compared"
    return "\n".join([*lines, "", f"verdict     {verdict}" + (f", {missed} rows not reached" if missed else "")])


def _row(report: FunctionReport) -> str:
    return (
        f"{report.function:40} {report.cases:>7} {report.events:>9} {report.failed:>7} {len(report.unreached):>9}"
        f" {report.seconds:>8.1f}"
    )


def _details(report: FunctionReport) -> list[str]:
    lines = [f"{report.function}: not reached: {row}" for row in report.unreached]
    for failure in report.failures:
        lines += ["", f"{report.function} ({failure.flavour}): {failure.case}"]
        lines += [f"    {difference}" for difference in failure.differences]
    return lines


# JSON


def campaign_json(campaign: Campaign, function: str) -> dict[str, Any]:
    """A campaign as `--json` prints it."""
    failures = [failure for report in campaign.reports for failure in report.failures]
    return {
        "schema": "pgtable.check/1",
        "kernel": campaign.kernel,
        "release": campaign.release,
        "model": campaign.variant,
        "function": function,
        "seed": campaign.seed,
        "events": campaign.events,
        "differences": [difference.as_json() for failure in failures for difference in failure.differences],
        "functions": [_report_json(report) for report in campaign.reports],
        "coverage": [_coverage_json(cover) for cover in campaign.coverage],
    }


def _report_json(report: FunctionReport) -> dict[str, Any]:
    return {
        "function": report.function,
        "cases": report.cases,
        "events": report.events,
        "failed": report.failed,
        "unreached": report.unreached,
        "failures": [
            {"world": f.flavour, "case": str(f.case), "differences": [d.as_json() for d in f.differences]}
            for f in report.failures
        ],
    }


def _coverage_json(cover: FunctionCoverage) -> dict[str, Any]:
    return {
        "function": cover.name,
        "blocks": cover.blocks,
        "reached": cover.reached,
        "unreached": [
            {"at": f"{u.part}+{u.offset:#x}", "instruction": u.instruction, "reason": u.reason} for u in cover.unreached
        ],
    }
