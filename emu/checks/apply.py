"""Harnesses for apply_to_page_range and apply_to_existing_page_range: the function is the guest's recorder."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from emu.checks.harness import Checked
from emu.checks.pageattr import BLOCKS, PREPARED
from emu.checks.pageattr_cases import Maker
from emu.checks.script import Recorder
from emu.checks.surroundings import Arranger, Surroundings, settings_of
from emu.checks.trees import Tree
from emu.checks.world import Reaction, Script, World
from kernel_model import apply
from kernel_model.compare import RUNAWAY, Outcome
from kernel_model.mm import Barrier, Callback, Context, Kernel, Warn, Write

U64 = (1 << 64) - 1
FUNCTIONS: dict[str, Callable[[Kernel, int, int, apply.Fn | None], int]] = {
    "apply_to_page_range": apply.apply_to_page_range,
    "apply_to_existing_page_range": apply.apply_to_existing_page_range,
}


@dataclass(frozen=True)
class Case:
    """One call on init_mm. `fn`: whether there is a function; `script`: what it does at which call."""

    addr: int
    size: int
    tree: Tree
    script: Script
    fn: bool = True
    around: Surroundings = field(default_factory=Surroundings)

    def __str__(self) -> str:
        return f"({self.addr:#x}, {self.size:#x}) fn {self.fn} {self.script} {self.around.context.name}"


class ApplyHarness:
    """The harness of one of the two."""

    worlds = ("plain", "ng", "wide")

    def __init__(self, function: str) -> None:
        self.function = function

    def prepared(self, world: World) -> Iterator[Case]:
        """Always the same random cases: enough to reach every row."""
        rng = random.Random(0)
        for _ in range(PREPARED):
            yield self.random(world, rng)

    def random(self, world: World, rng: random.Random) -> Case:
        """One random case: any range, and a function that fails or writes to its PTE at some call."""
        maker = Maker(world, rng, "ends")
        settings = settings_of(world.image)
        (addr, end), _, focus = maker.call(settings)
        script = {}
        if rng.random() < 0.4:
            script[rng.randrange(6)] = Reaction(value=rng.choice((-5, 7, -12, 0)), store=rng.getrandbits(64))
        context = rng.choice((Context.TASK, Context.TASK, Context.SOFTIRQ))
        around = Surroundings(settings, context)
        return Case(addr, end - addr & U64, maker.tree(focus), script, rng.random() < 0.95, around)

    def run(self, world: World, case: Case) -> Checked:
        """The case on the model and on the real function."""
        world.load(case.tree, case.script)
        kernel = case.around.apply_to(world.kernel())
        fn = Recorder(kernel, case.script, world.arena).fn if case.fn else None
        predicted = world.predicted(kernel, lambda: FUNCTIONS[self.function](kernel, case.addr, case.size, fn))
        Arranger.of(world).arrange(case.around)
        args = (world.image.symbols["init_mm"], case.addr, case.size, world.callback("fn") if case.fn else 0, 0)
        unaligned = (case.addr | case.size) % world.plan.page_size
        blocks = BLOCKS if predicted.stop or unaligned else None
        real = world.real(world.call(self.function, *args, blocks=blocks))
        return Checked(predicted, real, frozenset(name for name, seen in ROWS.items() if seen(predicted)))

    def rows(self, world: World) -> frozenset[str]:
        """What cases of this function can show."""
        return frozenset(ROWS) if self.function == "apply_to_page_range" else frozenset(ROWS) - {"a table is made"}

    def smaller(self, case: Case) -> Iterator[Case]:
        """The same without a script, then with parts of the tree gone."""
        if case.script:
            yield replace(case, script={})
        words = list(case.tree.words)
        for part in (words[: len(words) // 2], words[len(words) // 2 :], *([pa] for pa in words)):
            yield replace(case, tree=case.tree.without(part))


ROWS: dict[str, Callable[[Outcome], bool]] = {
    "returns 0": lambda out: out.value == 0 and not out.stop,
    "-EINVAL": lambda out: out.value == -22,
    "the function's value": lambda out: out.value in (-5, 7),
    "WARN": lambda out: any(isinstance(e, Warn) for e in out.events),
    "the function is called": lambda out: any(isinstance(e, Callback) for e in out.events),
    "a table is made": lambda out: Barrier("isb") in out.events and any(isinstance(e, Write) for e in out.events),
    "no end": lambda out: out.stop == RUNAWAY,
}

HARNESSES: tuple[ApplyHarness, ...] = tuple(ApplyHarness(name) for name in FUNCTIONS)
