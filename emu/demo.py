"""`make run`: the main job on a real kernel, or on the embedded snippet where no kernel is to be had.

Four pages of the linear map are made invalid and valid again by the compiled set_memory_valid, each call predicted
beforehand and compared; then a load meets an invalid page and the walk says why.
"""

from __future__ import annotations

import sys
import time

import click

from emu import snippets
from emu.check import KernelSubject, SnippetSubject, Subject, main_job
from emu.cli_run import report_text
from emu.image import ImageError, KernelImage
from emu.kernels import KernelError, fetch

KERNEL = "debian:6.12"
PAGES = 4


def subject() -> Subject:
    """The kernel, fetched on first use; the snippet where there is none."""
    try:
        image = KernelImage.load(fetch(KERNEL, progress=lambda message: click.echo(message, err=True)))
        image.name = KERNEL
        return KernelSubject(image)
    except (KernelError, ImageError) as error:
        click.echo(f"no kernel to be had ({error}); the embedded snippet does the same", err=True)
        return SnippetSubject()


def fault_text(who: Subject) -> str:
    """A load from a page that the function has just made invalid."""
    machine = who.machine(ng=False)
    va = machine.plan.linear_va(machine.plan.ram[0] + machine.plan.ram[1] // 2)
    if isinstance(who, KernelSubject):
        machine.call("set_memory_valid", va, PAGES, 0).ok()
    else:
        machine.run(bytes(snippets.load("set_memory_valid")), va, PAGES, 0).ok()
    result = machine.run(bytes(snippets.load("load")), va + 8)
    return f"load        from {va + 8:#018x}, now invalid\nstopped     " + str(result.stop).replace(
        "\n", "\n            "
    )


def main() -> None:
    """Runs the demonstration; exit code 1 on a difference."""
    started = time.monotonic()
    who = subject()
    reports = main_job(who, PAGES)
    click.echo(report_text(reports))
    click.echo("\n" + fault_text(who))
    click.echo(f"{time.monotonic() - started:.1f} s", err=True)
    sys.exit(1 if any(report.differences for report in reports) else 0)


if __name__ == "__main__":
    main()
