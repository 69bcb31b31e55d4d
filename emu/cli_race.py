"""`pgtable race`: what interleavings of kernel functions do to their tables, and one schedule again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from emu.cli import CommandError, examples
from emu.cli_campaign import run_campaign, told, worker_options
from emu.cli_run import _JSON, _SYMBOLS, bad_input, load_image

if TYPE_CHECKING:
    from emu.campaigns.plan import Plan
    from emu.machine import Machine
    from emu.race import Finding, Race, RaceResult
    from emu.races.actors import Event
    from emu.races.parts import Scenario


@click.command(
    epilog=examples(
        "pgtable race lost-update --kernel debian:6.12",
        "pgtable race --campaign races.db --kernel debian:6.1 --kernel debian:7.3 --random 1000",
    )
)
@click.argument("scenario", required=False)
@click.option("--list", "listing", is_flag=True, help="The scenarios, and what each is about.")
@click.option(
    "--kernel",
    "sources",
    multiple=True,
    metavar="KERNEL",
    help="A kernel file, or debian:VERSION[-FLAVOUR]: cold tables (repeatable with --campaign).",
)
@click.option("--snapshot", "snapshot", metavar="FILE", help="A booted kernel (`pgtable snapshot boot`) instead.")
@_SYMBOLS
@click.option("--preemptions", metavar="N|all", help="How often a CPU may be interrupted. Default: the scenario's.")
@click.option("--mode", type=click.Choice(["smp", "interrupt"]), help="CPUs, or a softirq on one CPU.")
@click.option("--with", "options", multiple=True, metavar="NAME=VALUE", help="An option of the scenario; see --list.")
@click.option("--random", "walks", default=0, type=click.IntRange(min=0), help="Random schedules besides.")
@click.option("--seed", default=1, show_default=True, help="Of --random.")
@click.option("--replay", "schedule", metavar="SCHEDULE", help="Run this one schedule and show it.")
@click.option("--campaign", "store", metavar="STORE", help="All scenarios or one, of each kernel, kept in STORE.")
@worker_options
@_JSON
@click.pass_context
def race(
    ctx: click.Context,
    scenario: str | None,
    listing: bool,
    sources: tuple[str, ...],
    snapshot: str | None,
    symbols: str | None,
    preemptions: str | None,
    mode: str | None,
    options: tuple[str, ...],
    walks: int,
    seed: int,
    schedule: str | None,
    store: str | None,
    jobs: int | None,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Run the functions of SCENARIO in all orders that few preemptions allow, and judge how each ends.

    A schedule is `A5 B A`: A up to its 5th event (access to a table, atomic, barrier, TLBI), B to its end, A to its
    end. Exit code 1 if there is a race, also where one is expected.

    --campaign: every scenario for cold tables with each combination of its options: the search, and --random schedules
    of each. The same command with the same STORE goes on where it was stopped; `pgtable fuzz STORE --report` shows it.
    """
    if listing:
        click.echo(json.dumps(_list_json(), indent=1) if as_json else "\n".join(_list_lines()))
        return
    chosen = dict(_option(text) for text in options)
    if store is not None:
        if snapshot or symbols or preemptions or mode or schedule:
            raise CommandError("race: --campaign takes none of --snapshot, --symbols, --preemptions, --mode, --replay")
        ctx.exit(run_campaign(_plan(scenario, sources, chosen, walks, seed), store, jobs, scheduler, as_json))
    row = _scenario(scenario)
    bound = row.preemptions if preemptions is None else _bound(preemptions)
    with _told():
        made = row.race(_machine(sources, snapshot, symbols), mode=mode, **chosen)
        if schedule is not None:
            count, answer = _replayed(row.name, made, schedule, as_json)
        else:
            count, answer = _searched(row.name, made, bound, walks, seed, as_json)
    click.echo(answer)
    ctx.exit(1 if count else 0)


@contextmanager
def _told() -> Iterator[None]:
    """What does not fit the scenario, or is bad input: one sentence."""
    from emu.races.parts import ScenarioError

    try:
        with bad_input():
            yield
    except (ScenarioError, ValueError) as error:
        raise CommandError(f"race: {error}") from None


def _scenario(name: str | None) -> Scenario:
    from emu.races.scenarios import SCENARIOS

    if name is None:
        raise CommandError(f"race: name a scenario: {', '.join(SCENARIOS)}")
    if name not in SCENARIOS:
        raise CommandError(f"race: no scenario {name}: there are {', '.join(SCENARIOS)}")
    return SCENARIOS[name]


def _replayed(scenario: str, race: Race, schedule: str, as_json: bool) -> tuple[int, str]:
    """The number of findings, and what to print."""
    findings, events = race.replay(schedule)
    if as_json:
        return len(findings), json.dumps(_replay_json(scenario, race, schedule, findings, events), indent=1)
    return len(findings), _replay_text(race, findings, events)


def _searched(
    scenario: str, race: Race, preemptions: int | None, walks: int, seed: int, as_json: bool
) -> tuple[int, str]:
    """The number of findings, and what to print."""
    result = race.explore(preemptions, walks=walks, seed=seed, progress=lambda line: click.echo(line, err=True))
    findings = [race.minimised(finding) for finding in result.findings]
    if as_json:
        return len(findings), json.dumps(_result_json(scenario, race, result, findings), indent=1)
    return len(findings), _result_text(race, result, findings)


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise CommandError(f"race: --with {text}: must be NAME=VALUE")
    return name, value


def _bound(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise CommandError(f"race: --preemptions {text}: must be a number or all")
    return int(text)


def _machine(sources: tuple[str, ...], snapshot: str | None, symbols: str | None) -> Machine:
    from emu.machine import Machine
    from emu.snapshot import Snapshot

    if len(sources) + (snapshot is not None) != 1:
        raise CommandError("race: give --kernel KERNEL or --snapshot FILE, one of them")
    if snapshot is not None:
        loaded = Snapshot.load(snapshot)
        return loaded.machine(mmu="model" if loaded.lpa2 else "cpu")
    return Machine.boot(load_image(sources[0], symbols))


def _plan(scenario: str | None, kernels: tuple[str, ...], options: dict[str, str], walks: int, seed: int) -> Plan:
    """A campaign: of each race the search, and so many random schedules."""
    from emu.campaigns import schedules
    from emu.campaigns.plan import Plan

    if not kernels:
        raise CommandError("race: --campaign needs --kernel KERNEL")
    scenarios = (_scenario(scenario).name,) if scenario else ()
    with told(), bad_input():
        units = [unit for kernel in kernels for unit in schedules.units(kernel, scenarios, options)]
    parameters = {
        "command": "race",
        "seed": seed,
        "random": walks,
        "kernels": list(dict.fromkeys(f"{unit.subject} {unit.release}" for unit in units)),
        "scenarios": list(scenarios),
        "options": options,
    }
    return Plan(parameters, seed, [(unit, 1 + -(-walks // schedules.WALKS)) for unit in units])


# text


def _list_lines() -> list[str]:
    from emu.races.scenarios import SCENARIOS

    lines = []
    for scenario in SCENARIOS.values():
        lines.append(f"{scenario.name:16}{scenario.text} ({_kinds(scenario.booted)})")
        lines += [f"{'':16}--with {name}={'|'.join(values)}" for name, values in scenario.options.items()]
    return lines


def _kinds(booted: bool | None) -> str:
    return {True: "--snapshot", False: "--kernel", None: "--kernel or --snapshot"}[booted]


def _result_text(race: Race, result: RaceResult, findings: list[Finding]) -> str:
    bound = "any number of" if result.preemptions is None else f"at most {result.preemptions}"
    lines = [f"actor       {actor}" for actor in race.actors]
    lines += [
        f"schedules   {result.interleavings} with {bound} preemptions, {result.runs} run to their end,"
        f" {result.steps} steps, {result.states} states; mode {result.mode}"
    ]
    lines += [f"random      {result.walks} schedules"] if result.walks else []
    for finding in findings:
        lines += ["", f"finding     {finding}", f"in          {finding.count} of the schedules"]
        lines += [f'replay      --replay "{finding.schedule}"', "", race.columns(finding.schedule)]
    return "\n".join([*lines, "", _verdict(len(findings))])


def _replay_text(race: Race, findings: list[Finding], events: list[Event]) -> str:
    from emu.races.show import columns

    lines = [columns(events, race.actors, race.machine, race.places), ""]
    return "\n".join([*lines, *(f"finding     {finding}" for finding in findings), _verdict(len(findings))])


def _verdict(count: int) -> str:
    return f"verdict     {count} finding{'' if count == 1 else 's'}"


# JSON


def _list_json() -> dict[str, Any]:
    from emu.races.scenarios import SCENARIOS

    rows = [
        {
            "name": s.name,
            "text": s.text,
            "machine": _kinds(s.booted),
            "options": {name: list(values) for name, values in s.options.items()},
        }
        for s in SCENARIOS.values()
    ]
    return {"schema": "pgtable.race/1", "scenarios": rows}


def _head(scenario: str, race: Race) -> dict[str, Any]:
    assert race.machine.image
    return {
        "schema": "pgtable.race/1",
        "scenario": scenario,
        "release": race.machine.image.release,
        "mode": race.mode,
        "actors": [{"name": actor.name, "work": [str(work) for work in actor.work]} for actor in race.actors],
    }


def _result_json(scenario: str, race: Race, result: RaceResult, findings: list[Finding]) -> dict[str, Any]:
    return {
        **_head(scenario, race),
        "preemptions": result.preemptions,
        "schedules": result.interleavings,
        "runs": result.runs,
        "steps": result.steps,
        "states": result.states,
        "random": result.walks,
        "findings": [_finding_json(finding) for finding in findings],
    }


def _replay_json(
    scenario: str, race: Race, schedule: str, findings: list[Finding], events: list[Event]
) -> dict[str, Any]:
    return {
        **_head(scenario, race),
        "schedule": schedule,
        "findings": [_finding_json(finding) for finding in findings],
        "events": [
            {
                "actor": e.actor,
                "number": e.number,
                "kind": e.kind,
                "at": race.machine.describe(e.pc) if e.pc else e.text,
            }
            | ({"pa": f"{e.pa:#018x}", "old": f"{e.old:#018x}", "new": f"{e.new:#018x}"} if e.pa else {})
            for e in events
        ],
    }


def _finding_json(finding: Finding) -> dict[str, Any]:
    words = [
        {
            "va": None if word.va is None else f"{word.va:#018x}",
            "level": word.level,
            "pa": f"{word.pa:#018x}",
            "right": f"{word.right:#018x}",
            "found": f"{word.found:#018x}",
            "fields": {name: [f"{right:#x}", f"{found:#x}"] for name, right, found in word.fields},
        }
        for word in finding.words
    ]
    return {
        "kind": finding.kind,
        "text": finding.text,
        "schedule": str(finding.schedule),
        "count": finding.count,
        "words": words,
    }
