"""Campaign work: schedules of a race. Case 0 of a unit is the search, each further one WALKS random schedules."""

from __future__ import annotations

import functools
import itertools
import shlex
from collections.abc import Collection, Iterator, Mapping

from emu.campaigns.plan import RACE, CampaignError, Found, Row, Unit, without_numbers
from emu.image import KernelImage
from emu.machine import Machine
from emu.race import Race
from emu.races.parts import Scenario, ScenarioError
from emu.races.scenarios import SCENARIOS

WALKS = 50


def units(kernel: str, only_scenarios: Collection[str], given: Mapping[str, str]) -> list[Unit]:
    """Every scenario for cold machines that this kernel has, with each combination of its options; `given`: options
    with one value only. Raises CampaignError where nothing is left."""
    image = _image(kernel)
    granule = f"{image.layout.page_size >> 10}K"
    found = [
        Unit(RACE, kernel, image.release, scenario.name, granule, " ".join(options))
        for scenario in SCENARIOS.values()
        if not scenario.booted and (not only_scenarios or scenario.name in only_scenarios)
        for options in _combinations(scenario, given)
        if _fits(kernel, scenario, options)
    ]
    if not found:
        raise CampaignError(f"{kernel} has no race for a cold machine of: {', '.join(only_scenarios) or 'all'}")
    return found


def _combinations(scenario: Scenario, given: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """("by=vmap", "lock=none") for each combination of a scenario's options."""
    values = [[given[name]] if name in given else allowed for name, allowed in scenario.options.items()]
    for chosen in itertools.product(*values):
        yield tuple(f"{name}={value}" for name, value in zip(scenario.options, chosen, strict=True))


def _fits(kernel: str, scenario: Scenario, options: Collection[str]) -> bool:
    """Whether this kernel has what the scenario needs."""
    try:
        _race(kernel, scenario, options)
    except ScenarioError:
        return False
    return True


def _race(kernel: str, scenario: Scenario, options: Collection[str]) -> Race:
    return scenario.race(Machine.boot(_image(kernel)), **dict(_pair(option) for option in options))


def _pair(option: str) -> tuple[str, str]:
    name, _, value = option.partition("=")
    return name, value


@functools.lru_cache(4)
def _image(kernel: str) -> KernelImage:
    return KernelImage.load(kernel)


def run(unit: Unit, case_id: str, seed: int) -> tuple[Row, list[Found]]:
    """The search, or random schedules of that seed."""
    if _image(unit.subject).release != unit.release:
        raise CampaignError(f"{unit.subject} is another kernel on a worker, the campaign is of {unit.release}")
    scenario, options = SCENARIOS[unit.part], unit.variant.split()
    race = _race(unit.subject, scenario, options)
    searched = case_id.endswith(" #0")
    result = race.explore(scenario.preemptions if searched else 0, walks=0 if searched else WALKS, seed=seed)
    judged = result.interleavings + result.walks
    row = Row(case_id, judged, judged - result.wrong, 0, result.wrong, {"steps": result.steps})
    chosen = [word for option in options for word in ("--with", option)]
    command = shlex.join(["pgtable", "race", unit.part, "--kernel", unit.subject, *chosen, "--replay"])
    found: dict[str, Found] = {}
    for finding in result.findings:
        smallest = race.minimised(finding)
        signature = f"{' '.join([unit.part, *options])}: {smallest.kind}: {without_numbers(smallest.text)}"
        found.setdefault(signature, Found(signature, case_id, str(smallest), f'{command} "{smallest.schedule}"'))
    return row, list(found.values())


def forget() -> None:
    """Nothing is kept but images, which no case changes."""
