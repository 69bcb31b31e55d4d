"""A place to run one function on words that a test puts down: the model alone, or the compiled function of a kernel.

Both take the same tree and give the same kind of outcome, so that one table of measured values judges both.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from emu.checks.pageattr import FUNCTIONS, Case, PageattrHarness
from emu.checks.surroundings import Surroundings, settings_of
from emu.checks.trees import Grower, Space
from emu.checks.world import World
from kernel_model.compare import Outcome
from kernel_model.levels import Levels
from kernel_model.mm import Barrier, Called, Kernel, Settings, Tlbi, Warn
from kernel_model.names import Bits
from kernel_model.variants import Variant, by_name
from pgtable import Format, Granule, PhysicalMemory
from tests.kernels import kernel_image

U64 = (1 << 64) - 1
ARENA, POOL = (0x4000_0000, 1 << 20), (0x4010_0000, 1 << 20)
BUILDS = {
    "debian:6.1": ("6.1", Levels(12, 4, 48, 48)),
    "debian:6.12": ("6.12", Levels(12, 5, 52, 48)),
    "debian:7.3": ("7.x", Levels(12, 5, 52, 48)),
}
SIX, SEVEN = ("debian:6.1", "debian:6.12"), ("debian:7.3",)


class Bench:
    """A model on memory of its own. `lay` words, then `run`."""

    def __init__(self, name: str, *, ng: bool = False) -> None:
        row, self.levels = BUILDS[name]
        self.name, self.variant, self.ng = name, by_name(row), ng
        self.memory = PhysicalMemory((ARENA[0], ARENA[1] + POOL[1]))
        self.space = Space(self.levels, Format(Granule(self.levels.page_shift)), ARENA)
        self.linear_offset = -(1 << self.levels.va_bits) - ARENA[0] & U64
        self.new()

    def new(self) -> None:
        """An empty tree."""
        self.grower = Grower(self.space, random.Random(0))

    def lay(self, va: int, level: str, *words: int) -> int:
        """Puts words into consecutive entries of `level` ("PTE", "PMD", "PUD") from `va` on; PA of the first."""
        at = next(i for i, each in enumerate(self.space.tables) if each.name == level)
        for i, word in enumerate(words):
            row = self.space.tables[at]
            entry = self.entry(va + i * row.size & U64, level)
            self.grower.words[entry] = word
        return self.entry(va, level)

    def entry(self, va: int, level: str) -> int:
        """PA of the entry of `level` for `va`; tables are made on the way."""
        at = next(i for i, each in enumerate(self.space.tables) if each.name == level)
        return self.grower.path(va, depth=at) + 8 * self.space.index(self.space.tables[at], va)

    def linear(self, pa: int) -> int:
        """The linear map's VA of a PA."""
        return pa + self.linear_offset & U64

    def settings(self, **changed: object) -> Settings:
        """What a cold kernel has, then `changed`."""
        made = Settings(caps_finalized=False, kfence=self.name != "debian:6.1")
        for name, value in changed.items():
            setattr(made, name, value)
        return made

    def run(self, function: str, *args: int, around: Surroundings | None = None) -> Outcome:
        """Calls the function on what was laid."""
        tree = self.grower.done()
        words = self.memory.words(ARENA[0], (ARENA[1] + POOL[1]) // 8)
        words[:] = 0
        for pa, word in tree.words.items():
            self.memory.store(pa, word)
        kernel = (around or Surroundings(self.settings())).apply_to(self._kernel())
        value = int(FUNCTIONS[function].model(kernel, *args))
        return Outcome(value, {}, tuple(kernel.events))

    def _kernel(self) -> Kernel:
        bits = Bits.of(self.space.fmt, self.variant, ng_mappings=self.ng)
        pages = iter(range(POOL[0], sum(POOL), self.levels.page_size))
        return Kernel(
            self.memory,
            ARENA[0],
            self.levels,
            bits,
            allocate=lambda: next(pages, None),
            linear_offset=self.linear_offset,
            step_limit=20_000,
        )

    def fetch(self, pa: int) -> int:
        """A word of memory now."""
        return self.memory.fetch(pa)


class RealBench(Bench):
    """The compiled function of a kernel, in a world."""

    def __init__(self, name: str, *, ng: bool = False) -> None:
        super().__init__(name, ng=ng)
        self.world = world_of(name, ng=ng)
        self.space, self.linear_offset = self.world.space, self.world.linear_offset
        self.new()

    def settings(self, **changed: object) -> Settings:
        return settings_of(self.world.image, **changed)

    def run(self, function: str, *args: int, around: Surroundings | None = None) -> Outcome:
        case = Case(args, self.grower.done(), around or Surroundings(self.settings()))
        return PageattrHarness(function).run(self.world, case).real

    def fetch(self, pa: int) -> int:
        return self.world.machine.memory.fetch(pa)


_WORLDS: dict[tuple[str, bool], World] = {}


def world_of(name: str, *, ng: bool = False) -> World:
    """One world for each kernel, as long as the tests run."""
    image = kernel_image(name)
    if (name, ng) not in _WORLDS:
        _WORLDS[name, ng] = World(image, ng=ng)
    return _WORLDS[name, ng]


def benches(*names: str) -> list[Any]:
    """pytest parameters: (class, name) of the models and the kernels."""
    models = [pytest.param((Bench, name), id=f"model of {name}") for name in names or BUILDS]
    real = [pytest.param((RealBench, name), id=name, marks=pytest.mark.kernels) for name in names or BUILDS]
    return models + real


def order(outcome: Outcome) -> list[str]:
    """TLBI and barriers, in order."""
    return [str(event) for event in outcome.events if isinstance(event, Tlbi | Barrier)]


def tlbis(outcome: Outcome) -> int:
    """How many TLBI of single pages, -1 for one of all."""
    found = [event for event in outcome.events if isinstance(event, Tlbi)]
    return -1 if any(event.operation == "VMALLE1IS" for event in found) else len(found)


def warns(outcome: Outcome) -> list[str]:
    """The functions that warned."""
    return [event.function for event in outcome.events if isinstance(event, Warn)]


def called(outcome: Outcome) -> list[str]:
    """The functions that were called and are stubs."""
    return [event.name for event in outcome.events if isinstance(event, Called)]


__all__ = ["SEVEN", "SIX", "Bench", "RealBench", "Variant", "benches", "called", "order", "tlbis", "warns", "world_of"]
