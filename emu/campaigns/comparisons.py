"""Campaign work: a compiled kernel function on random tables, against the model's prediction.

A case is one random case of `pgtable check`, in one of its worlds. What is checked as a whole (ptdump, KFENCE) and the
prepared cases are `pgtable check`'s alone.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Collection
from random import Random
from typing import Any

from emu.campaigns.plan import COMPARISON, REPLAY_HERE, CampaignError, Found, Row, Unit, without_numbers
from emu.checks import registry
from emu.checks.campaign import Worlds, shrink
from emu.checks.harness import Harness, differences
from emu.checks.stored import StoredError, dump
from emu.checks.world import World
from emu.image import KernelImage

KERNELS_KEPT = 2  # kernels whose worlds a worker keeps; each takes some 300 MiB


def units(kernel: str, only_functions: Collection[str]) -> list[Unit]:
    """Every function of a kernel in each of its worlds; raises CampaignError for one that it has not."""
    worlds = _worlds(kernel)
    image = worlds.image
    names = [name for name in registry.names(image) if name in registry.HARNESSES]
    for name in only_functions:
        if name not in names:
            raise CampaignError(f"{kernel} has no {name}: it has {', '.join(names)}")
    return [
        Unit(COMPARISON, kernel, image.release, name, f"{image.layout.page_size >> 10}K", flavour)
        for name in only_functions or names
        for flavour in worlds.flavours(registry.harness(name))
    ]


def run(unit: Unit, case_id: str, seed: int) -> tuple[Row, list[Found]]:
    """Draws, predicts, runs and compares one case; a failing one is shrunk."""
    worlds, harness = _worlds(unit.subject), registry.harness(unit.part)
    if worlds.image.release != unit.release:
        raise CampaignError(f"{unit.subject} is {worlds.image.release} on a worker, the campaign is of {unit.release}")
    world = worlds.of(harness, unit.variant)
    case = harness.random(world, Random(seed))
    checked = harness.run(world, case)
    differs = bool(differences(checked))
    events = len(checked.real.events) + len(checked.real.words) + 1
    found = [_found(unit, case_id, world, harness, case)] if differs else []
    return Row(case_id, 1, 1 - differs, 0, int(differs), {"events": events}), found


def _found(unit: Unit, case_id: str, world: World, harness: Harness, case: Any) -> Found:
    smallest = shrink(world, harness, case)
    texts = [str(d) for d in differences(harness.run(world, smallest))]
    signature = f"{unit.part}: {without_numbers(texts[0])}"
    command = shlex.join(["pgtable", "check", unit.part, "--kernel", unit.subject, "--case"]) + " {file}"
    try:
        file = dump(unit.part, unit.variant, world.image.layout.page_size, smallest)
    except StoredError:
        command, file = REPLAY_HERE, ""
    return Found(signature, case_id, "; ".join(texts), command, file)


@functools.lru_cache(KERNELS_KEPT)
def _worlds(kernel: str) -> Worlds:
    return Worlds(KernelImage.load(kernel))


def forget() -> None:
    """Drops the worlds: a case that failed in the middle may have left anything there."""
    _worlds.cache_clear()
