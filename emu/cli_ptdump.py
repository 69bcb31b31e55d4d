"""`pgtable check ptdump --snapshot`: the dump of a booted kernel's tables against ours of its RAM file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from emu.cli import CommandError
from emu.cli_run import bad_input

if TYPE_CHECKING:
    from emu.checks.ptdump_booted import BootedReport


def check_booted(path: str, cases: int, seed: int, as_json: bool) -> int:
    """Runs the check, prints what it found, and returns the exit code."""
    from emu.checks.ptdump_booted import run
    from emu.cli_check import _Progress
    from emu.snapshot import Snapshot

    with bad_input(), _Progress() as progress:
        try:
            report = run(Snapshot.load(path), cases, seed, progress=progress)
        except RuntimeError as error:  # the kernel has no pages for the copy of its tables
            raise CommandError(f"check ptdump: {error}") from None
    click.echo(json.dumps(booted_json(report, seed), indent=1) if as_json else booted_text(report, seed))
    return 1 if report.differences else 0


def booted_text(report: BootedReport, seed: int) -> str:
    """The figures, and what differs."""
    same = "differs" if report.differences else "identical"
    fields = ", ".join(f"{name} {n}" for name, n in sorted(report.fields.items()))
    lines = [
        f"kernel      {report.release}, booted",
        f"text        {report.lines} lines, {same}",
        f"check_wx    {_wx(report)}",
        f"flips       {report.flips} of one bit (seed {seed}), {report.seen} change the text: {fields or 'none'}",
    ]
    verdict = f"{len(report.differences)} differences in {report.flips + 1} dumps"
    return "\n".join([*lines, *report.differences, f"verdict     {verdict}"])


def _wx(report: BootedReport) -> str:
    wx = report.wx
    if wx is None:
        return "does not end"
    return "passed" if wx.passed else f"FAILED, {wx.wx} W+X pages, {wx.uxn} non-UXN pages"


def booted_json(report: BootedReport, seed: int) -> dict[str, Any]:
    """The report as `--json` prints it."""
    wx = report.wx
    return {
        "schema": "pgtable.check-ptdump/1",
        "kernel": report.kernel,
        "release": report.release,
        "lines": report.lines,
        "check_wx": None if wx is None else {"passed": wx.passed, "wx_pages": wx.wx, "uxn_pages": wx.uxn},
        "seed": seed,
        "flips": report.flips,
        "changed_text": report.seen,
        "fields": dict(sorted(report.fields.items())),
        "differences": report.differences,
        "text": report.text,
    }
