"""`pgtable fuzz`: a campaign of random cases, model against judges, kept in a store that can be resumed."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import click

from emu.cli import CommandError, examples
from emu.cli_campaign import print_report, run_campaign, told, worker_options
from emu.cli_run import _JSON, bad_input

if TYPE_CHECKING:
    from emu.campaigns.plan import Plan

QEMU = "qemu-system-aarch64"


@click.command(
    epilog=examples(
        "pgtable fuzz night.db --cases 5000 --kernel debian:6.12 --kernel debian:7.3 --checks 10000",
        "pgtable fuzz night.db --cases 5000 --scheduler tcp://192.0.2.1:8786",
        "pgtable fuzz night.db --report",
    )
)
@click.argument("store", metavar="STORE")
@click.option(
    "--cases",
    default=1000,
    show_default=True,
    type=click.IntRange(0),
    help="Random cases for QEMU, some 250 translations each.",
)
@click.option("--qemu", "qemus", multiple=True, metavar="PATH", help=f"A QEMU (repeatable) [{QEMU}].")
@click.option("--kind", "kinds", multiple=True, help="Only translations of this kind (repeatable).")
@click.option("--granule", "granules", multiple=True, help="Only of this granule: 4K, 16K, 64K, mixed (repeatable).")
@click.option(
    "--checks", default=1000, show_default=True, type=click.IntRange(0), help="Random cases for functions of --kernel."
)
@click.option("--kernel", "kernels", multiple=True, metavar="KERNEL", help="A kernel to compare (repeatable).")
@click.option("--function", "functions", multiple=True, help="Only this function of each kernel (repeatable).")
@click.option("--seed", default=1, show_default=True, type=click.IntRange(0), help="Of the campaign.")
@worker_options
@click.option("--report", is_flag=True, help="Only print what the store has.")
@click.option("--case", "case_id", metavar="ID", help="Only run this case of the store's campaign again.")
@_JSON
@click.pass_context
def fuzz(
    ctx: click.Context,
    store: str,
    cases: int,
    qemus: tuple[str, ...],
    kinds: tuple[str, ...],
    granules: tuple[str, ...],
    checks: int,
    kernels: tuple[str, ...],
    functions: tuple[str, ...],
    seed: int,
    jobs: int | None,
    scheduler: str | None,
    report: bool,
    case_id: str | None,
    as_json: bool,
) -> None:
    """Run a campaign: random translations judged by QEMU, random tables through kernel functions, kept in STORE.

    The same command with the same STORE goes on where it was stopped. Findings are listed by what they have alike, each
    with a command that gives it again alone. Exit code 1 if there are findings or cases are missing.
    """
    if report or case_id:
        ctx.exit(_reported(store, as_json) if report else _one_case(store, case_id or ""))
    with told(), bad_input():
        plan = make_plan(
            seed,
            cases=cases,
            qemus=qemus or (QEMU,),
            kinds=kinds,
            granules=granules,
            checks=checks if kernels else 0,
            kernels=kernels,
            functions=functions,
        )
    ctx.exit(run_campaign(plan, store, jobs, scheduler, as_json))


def make_plan(
    seed: int,
    *,
    cases: int = 0,
    qemus: tuple[str, ...] = (QEMU,),
    kinds: tuple[str, ...] = (),
    granules: tuple[str, ...] = (),
    checks: int = 0,
    kernels: tuple[str, ...] = (),
    functions: tuple[str, ...] = (),
) -> Plan:
    """The campaign of these options, which are those of the command; QEMUs and kernels are asked for what they have."""
    from emu.campaigns import comparisons, translations
    from emu.campaigns.plan import Plan, dealt
    from emu.judge.cases import GRANULES, KINDS

    _known("--kind", kinds, KINDS)
    _known("--granule", granules, (*GRANULES, translations.MIXED))
    judged = [unit for qemu in qemus for unit in translations.units(qemu, kinds, granules)] if cases else []
    compared = [unit for kernel in kernels for unit in comparisons.units(kernel, functions)] if checks else []
    if not judged and not compared:
        raise CommandError("fuzz: nothing to do: give --cases, or --checks with --kernel")
    parameters = {
        "command": "fuzz",
        "seed": seed,
        "cases": cases,
        "qemus": list(dict.fromkeys(f"{unit.subject} {unit.release}" for unit in judged)),
        "kinds": list(kinds),
        "granules": list(granules),
        "checks": checks,
        "kernels": list(dict.fromkeys(f"{unit.subject} {unit.release}" for unit in compared)),
        "functions": list(functions),
    }
    return Plan(parameters, seed, [*dealt(judged, cases), *dealt(compared, checks)])


def _known(option: str, given: tuple[str, ...], names: Collection[str]) -> None:
    for name in given:
        if name not in names:
            raise CommandError(f"{option} {name}: must be one of {', '.join(names)}")


def _reported(path: str, as_json: bool) -> int:
    from emu.campaigns.store import Store

    with told():
        store = Store.open(path)
        try:
            return print_report(store, as_json)
        finally:
            store.close()


def _one_case(path: str, case_id: str) -> int:
    """Runs one case again; 1 if there is a finding."""
    from emu.campaigns.plan import case_seed
    from emu.campaigns.store import Store
    from emu.campaigns.work import run_case

    with told():
        store = Store.open(path)
        try:
            unit, seed = store.unit(case_id), store.parameters["seed"]
        finally:
            store.close()
        row, found = run_case(unit, case_id, case_seed(seed, case_id))
    click.echo("\n".join([f"case        {row.id}", *(f"finding     {f.text}" for f in found)]))
    return 1 if found else 0
