"""Harnesses for apply_to_page_range and apply_to_existing_page_range: the function is the guest's recorder."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from emu.checks.harness import Checked
from emu.checks.pageattr import BLOCKS, PREPARED
from emu.checks.pageattr_cases import Maker
from emu.checks.script import Recorder
from emu.checks.surroundings import Arranger, Surroundings, settings_of
from emu.checks.trees import Grower, Tree
from emu.checks.world import Reaction, Script, World
from kernel_model import apply
from kernel_model.compare import RUNAWAY, Outcome
from kernel_model.mm import Barrier, Callback, Context, Kernel, Mm, Warn, Write

U64 = (1 << 64) - 1
FUNCTIONS: dict[str, Callable[[Kernel, int, int, apply.Fn | None, Mm | None], int]] = {
    "apply_to_page_range": apply.apply_to_page_range,
    "apply_to_existing_page_range": apply.apply_to_existing_page_range,
}


@dataclass(frozen=True)
class Case:
    """One call. `fn`: whether there is a function; `script`: what it does at which call; `user`: not on init_mm."""

    addr: int
    size: int
    tree: Tree
    script: Script
    fn: bool = True
    around: Surroundings = field(default_factory=Surroundings)
    user: bool = False

    def __str__(self) -> str:
        mm = "a user's mm" if self.user else "init_mm"
        return (
            f"({mm}, {self.addr:#x}, {self.size:#x}) fn {self.fn} {self.script} {self.around.context.name}; {self.tree}"
        )


class ApplyHarness:
    """The harness of one of the two."""

    worlds = ("plain", "ng", "wide")
    case = Case

    def __init__(self, function: str) -> None:
        self.function = function

    def prepared(self, world: World) -> Iterator[Case]:
        """Tables that end at each level with too few pages for the rest; then always the same random cases."""
        rng = random.Random(0)
        for depth in range(len(world.space.tables)):
            for pages, user in product((0, 1, 2, 3), (False, True)):
                yield self._unfinished(world, depth, pages, user)
        for _ in range(PREPARED):
            yield self.random(world, rng)

    def _unfinished(self, world: World, depth: int, pages: int, user: bool) -> Case:
        """Two pages whose tables are there down to `depth` only, the allocator having `pages`."""
        grower, page = Grower(world.space, random.Random(1)), world.levels.page_size
        va = world.image.base + (1 << 28) & (world.levels.half - 1 if user else U64)
        grower.path(va, depth=depth)
        around = Surroundings(settings_of(world.image), pages=pages)
        return Case(va, 2 * page, grower.done(), {}, around=around, user=user)

    def random(self, world: World, rng: random.Random) -> Case:
        """One random case: any range, and a function that fails or writes to its PTE at some call."""
        maker = Maker(world, rng, "ends")
        settings = settings_of(world.image)
        (addr, end), _, focus = maker.call(settings)
        script = {}
        if rng.random() < 0.4:
            script[rng.randrange(6)] = Reaction(value=rng.choice((-5, 7, -12, 0)), store=rng.getrandbits(64))
        context = rng.choice((Context.TASK, Context.TASK, Context.SOFTIRQ))
        around = Surroundings(settings, context, pages=rng.choice((0, 1, 2, 3)) if rng.random() < 0.25 else None)
        tree, fn, user = maker.tree(focus), rng.random() < 0.95, rng.random() < 0.3
        if user:  # the same entries are those of the lower half
            addr, end = addr & world.levels.half - 1, end & world.levels.half - 1
            context = Context.TASK
        return Case(addr, end - addr & U64, tree, script, fn, around, user)

    def run(self, world: World, case: Case) -> Checked:
        """The case on the model and on the real function."""
        world.load(case.tree, case.script)
        kernel = case.around.apply_to(world.kernel())
        fn = Recorder(kernel, case.script, world.arena).fn if case.fn else None
        mm = Mm(world.root) if case.user else None
        if case.user:
            kernel.table_flags = world.made.tables.fmt.table(2).pack(PXNTable=1, AF=int(kernel.variant.walks))
        predicted = world.predicted(kernel, lambda: FUNCTIONS[self.function](kernel, case.addr, case.size, fn, mm))
        Arranger.of(world).arrange(case.around)
        space = _user_mm(world) if case.user else world.image.symbols["init_mm"]
        args = (space, case.addr, case.size, world.callback("fn") if case.fn else 0, 0)
        unaligned = (case.addr | case.size) % world.plan.page_size
        blocks = BLOCKS if predicted.stop or unaligned else None
        real = world.real(world.call(self.function, *args, blocks=blocks))
        return Checked(predicted, real, frozenset(name for name, seen in ROWS.items() if seen(predicted)))

    def rows(self, world: World) -> frozenset[str]:
        """What cases of this function can show."""
        makes = self.function == "apply_to_page_range"
        return frozenset(ROWS) - {"no end"} - (frozenset() if makes else {"a table is made"})

    def smaller(self, case: Case) -> Iterator[Case]:
        """The same without a script, then with parts of the tree gone."""
        if case.script:
            yield replace(case, script={})
        yield from (replace(case, tree=tree) for tree in case.tree.smaller())


def _user_mm(world: World) -> int:
    """VA of a struct mm_struct whose root is the tree's."""
    at = world.scratch + 0x200
    world.machine.write(at, bytes(world.image.btf.size("mm_struct")))
    world.store(at + world.offset("mm_struct", "pgd"), world.linear(world.root))
    return at


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
