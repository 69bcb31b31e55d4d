"""`pgtable compare`: two kernel binaries on the same random tables, a behavioural changelog."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from emu.cli import CommandError, examples
from emu.cli_check import _Progress
from emu.cli_run import _JSON, bad_input, load_image

if TYPE_CHECKING:
    from emu.checks.changelog import Changelog, Group
    from emu.checks.harness import Harness
    from emu.image import KernelImage

SHOWN = 6  # events shown around the first that differs


@click.command(epilog=examples("pgtable compare debian:6.12 debian:7.3 set_memory_valid --cases 100"))
@click.argument("kernel_a")
@click.argument("kernel_b")
@click.argument("function")
@click.option("--cases", default=200, show_default=True, type=click.IntRange(0, 1_000_000), help="Random cases.")
@click.option("--seed", default=1, show_default=True, type=click.IntRange(0), help="Of the random cases.")
@_JSON
@click.pass_context
def compare(
    ctx: click.Context, kernel_a: str, kernel_b: str, function: str, cases: int, seed: int, as_json: bool
) -> None:
    """Run the same random tables through FUNCTION of KERNEL_A and of KERNEL_B and show where they behave differently.

    No model is between them. FUNCTION may be NAME_A:NAME_B where the kernels have it under two names. Exit code 1 if
    anything differs.
    """
    from emu.checks.campaign import Worlds
    from emu.checks.changelog import compare as run

    names = function.split(":") if ":" in function else [function, function]
    if len(names) != 2:
        raise CommandError(f"function {function}: one name, or NAME_A:NAME_B")
    images = [load_image(kernel, None) for kernel in (kernel_a, kernel_b)]
    harnesses = [_harness(name, image) for name, image in zip(names, images, strict=True)]
    if type(harnesses[0]) is not type(harnesses[1]):
        raise CommandError(f"function {function}: the two take different cases and cannot be compared")
    if images[0].layout.page_shift != images[1].layout.page_shift:
        sizes = ", ".join(f"{image.name} {image.layout.page_size >> 10}K" for image in images)
        raise CommandError(f"page sizes differ ({sizes}): the same tables cannot be given to both")
    with bad_input(), _Progress() as progress:
        worlds = Worlds(images[0]), Worlds(images[1])
        log = run(worlds, (harnesses[0], harnesses[1]), cases, seed, progress)
    click.echo(json.dumps(as_object(log), indent=1) if as_json else as_text(log))
    ctx.exit(1 if log.differ else 0)


def _harness(name: str, image: KernelImage) -> Harness:
    from emu.checks import registry

    known = [each for each in registry.names(image) if each in registry.HARNESSES]
    if name not in known:
        raise CommandError(f"compare {name}: {image.name} has {', '.join(known)}")
    return registry.harness(name)


def as_text(log: Changelog) -> str:
    """The groups, the largest first, each with its smallest case."""
    a, b = log.kernels
    lines = [f"A           {a}: {log.functions[0]}", f"B           {b}: {log.functions[1]}", f"seed        {log.seed}"]
    for group in log.groups:
        lines += ["", f"{group.count} cases: {group.what}", f"    {group.case}"]
        lines += _beside(group)
    lines += ["", f"verdict     {log.differ} of {log.cases} cases differ, in {len(log.groups)} ways"]
    return "\n".join(lines)


def _beside(group: Group) -> list[str]:
    """The events of both where they part."""
    if group.at is None:
        return []
    start = max(0, group.at - 2)
    lines = []
    for name, side in (("A", group.a), ("B", group.b)):
        shown = side.events[start : group.at + SHOWN - 2]
        lines += [f"    {name} {'=>' if start + i == group.at else '  '} {event}" for i, event in enumerate(shown)]
        if len(side.events) <= group.at:
            lines.append(f"    {name} => nothing more")
    return lines


def as_object(log: Changelog) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "schema": "pgtable.compare/1",
        "kernels": list(log.kernels),
        "functions": list(log.functions),
        "seed": log.seed,
        "cases": log.cases,
        "events": log.events,
        "differ": log.differ,
        "groups": [
            {
                "what": group.what,
                "count": group.count,
                "case": str(group.case),
                "at": group.at,
                "a": [str(event) for event in group.a.events],
                "b": [str(event) for event in group.b.events],
            }
            for group in log.groups
        ],
    }
