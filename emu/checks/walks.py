"""The walks of tables without regard to vmas: walk_page_range_novma, walk_kernel_page_table_range(_lockless), _debug.

Each case is a tree, a range, the callbacks that are set, what they do, and who holds which lock.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from emu.checks.harness import Checked
from emu.checks.rows import ACTIONS, walk_rows, walk_universe
from emu.checks.script import Recorder
from emu.checks.trees import Grower, Kind, Tree, random_tree
from emu.checks.world import Reaction, Script, World, shown
from emu.machine import CallResult
from kernel_model import walkers
from kernel_model.compare import Outcome
from kernel_model.levels import U64
from kernel_model.mm import Kernel, Mm, Rwsem

ENTRIES = ("pgd_entry", "p4d_entry", "pud_entry", "pmd_entry", "pte_entry")
ALL = (*ENTRIES, "pte_hole")
FREE, READ, WRITE = 0, 0x100, 1  # counts of an rwsem


@dataclass(frozen=True)
class WalkCase:
    """One call. `mm`: "init_mm", "user" (an mm of our own over the same tables) or "none"; `counts`: of the locks of
    that mm and of init_mm; `private`: the root is also given as the argument `pgd`."""

    tree: Tree
    start: int
    end: int
    callbacks: tuple[str, ...] = ALL
    script: Script = field(default_factory=dict)
    walk_lock: int = 0
    mm: str = "init_mm"
    counts: tuple[int, int] = (WRITE, WRITE)
    private: bool = False

    def __str__(self) -> str:
        script = ", ".join(f"{at}: {shown(reaction)}" for at, reaction in sorted(self.script.items()))
        return (
            f"[{self.start:#x}, {self.end:#x}) of {self.mm}, locks {self.counts[0]:#x} and {self.counts[1]:#x}, "
            f"walk_lock {self.walk_lock}, callbacks {' '.join(self.callbacks) or 'none'}"
            f"{', private root' if self.private else ''}{f', script {{{script}}}' if script else ''}; {self.tree}"
        )


class KernelWalk:
    """The harness of one of the functions."""

    worlds = ("plain", "wide")
    case = WalkCase

    def __init__(self, function: str) -> None:
        self.function = function
        self.takes_mm = function in ("walk_page_range_novma", "walk_page_range_debug")

    # ---- cases

    def prepared(self, world: World) -> Iterator[WalkCase]:
        """Each kind of entry at each level with each action; locks; ranges at the ends of the space."""
        yield from self._every_row(world)
        tree, va = simple(world)
        page = world.levels.page_size
        for counts in ((FREE, FREE), (READ, FREE), (WRITE, FREE), (FREE, WRITE), (READ, READ), (WRITE, WRITE)):
            for mm in ("init_mm", "user") if self.takes_mm else ("init_mm",):
                for walk_lock in (0, 3):
                    yield WalkCase(tree, va, va + 2 * page, mm=mm, counts=counts, walk_lock=walk_lock)
            yield WalkCase(tree, va, va, counts=counts)
            if world.own.install_pte:
                yield WalkCase(tree, va, va + page, (*ALL, "install_pte"), counts=counts)
        low, _ = simple(world, 0)
        for start, end in _corners(va, page):
            for each in (tree, low):
                yield WalkCase(each, start, end)
                yield WalkCase(each, start, end, ("pte_entry",), private=True)
        yield WalkCase(_far_table(world, tree, va), va, va + 2 * page)

    def _every_row(self, world: World) -> Iterator[WalkCase]:
        """One word of each kind at each level, walked with every reaction of the callback that sees it."""
        rng = random.Random(0)
        for depth, level in enumerate(world.space.tables):
            for kind in Kind:
                if kind is Kind.RANDOM:
                    continue
                tree, va = _one(world, rng, depth, kind)
                span = min(2 * level.size, 1 << 34)
                for reaction in (Reaction(), *(Reaction(action=a) for a in (1, 2)), Reaction(7), Reaction(-5)):
                    # The callback of this level is the one after those above it; the P4D and PGD may be folded.
                    for at in range(len(ALL)):
                        yield WalkCase(tree, va, va + span, script={at: reaction})

    def random(self, world: World, rng: random.Random) -> WalkCase:
        """A random tree, a range near what it was grown around, random callbacks and reactions."""
        focus = [_focus(world, rng) for _ in range(rng.choice((1, 1, 2)))]
        tree = random_tree(world.space, rng, focus, ng=world.ng)
        start, end = _range(world, rng, rng.choice(focus))
        names = ALL if rng.random() < 0.5 else tuple(name for name in ALL if rng.random() < 0.7)
        if world.own.install_pte and rng.random() < 0.02:
            names = (*names, "install_pte")
        return WalkCase(
            tree,
            start,
            end,
            names,
            _script(world, rng, tree),
            rng.choice((0, 0, 0, 1, 2, 3)),
            rng.choice(("init_mm", "init_mm", "user")) if self.takes_mm else "init_mm",
            (rng.choice((FREE, READ, WRITE)), rng.choice((FREE, READ, WRITE))),
            rng.random() < 0.2,
        )

    # ---- running

    def run(self, world: World, case: WalkCase) -> Checked:
        """On the model, then for real."""
        world.load(case.tree, case.script)
        predicted = self.predicted(world, case)
        real = self.real(world, case)
        rows = walk_rows(world, predicted, case.script)
        return Checked(predicted, real, rows)

    def predicted(self, world: World, case: WalkCase) -> Outcome:
        """What the model says, of the tree that is loaded."""
        kernel = world.kernel()
        return world.predicted(kernel, lambda: self._model(world, kernel, case))

    def real(self, world: World, case: WalkCase) -> Outcome:
        """What the compiled function does, on the tree that is loaded."""
        return world.real(self._real(world, case), keeps=True)

    def _model(self, world: World, kernel: Kernel, case: WalkCase) -> int:
        kernel.init_mm.mmap_lock = Rwsem(case.counts[1])
        mms = {"init_mm": kernel.init_mm, "user": Mm(world.root, Rwsem(case.counts[0])), "none": None}
        mm = mms[case.mm]
        ops = Recorder(kernel, case.script, world.arena).ops(case.callbacks, case.walk_lock)
        pgd = world.root if case.private else None
        function = getattr(walkers, self.function)
        first = (mm,) if self.takes_mm else ()
        value: int = function(kernel, *first, case.start, case.end, ops, pgd)
        return value

    def _real(self, world: World, case: WalkCase) -> CallResult:
        ops = world.ops_table(world.scratch, case.callbacks, case.walk_lock)
        user = world.scratch + 0x200
        world.set_lock(world.init_mm_lock, Rwsem(case.counts[1]))
        pgd = world.linear(world.root)
        if case.mm == "user":
            world.store(user + world.offset("mm_struct", "pgd"), pgd)
            world.set_lock(user + world.offset("mm_struct", "mmap_lock"), Rwsem(case.counts[0]))
        first = {"init_mm": world.image.symbols["init_mm"], "user": user, "none": 0}[case.mm]
        args = (*((first,) if self.takes_mm else ()), case.start, case.end, ops, pgd if case.private else 0, 0)
        return world.call(self.function, *args)

    # ---- rows, shrinking

    def rows(self, world: World) -> frozenset[str]:
        """Callback x kind of entry x reaction, for what this kernel's levels can show to a callback."""
        return walk_universe(world)

    def smaller(self, case: WalkCase) -> Iterator[WalkCase]:
        """Fewer words, fewer callbacks, fewer reactions, a shorter range."""
        for name in case.callbacks:
            yield replace(case, callbacks=tuple(n for n in case.callbacks if n != name))
        for at in case.script:
            yield replace(case, script={i: r for i, r in case.script.items() if i != at})
        yield from (replace(case, tree=tree) for tree in case.tree.smaller())
        middle = (case.start + case.end) // 2
        yield replace(case, end=middle)
        yield replace(case, start=middle)


def _far_table(world: World, tree: Tree, va: int) -> Tree:
    """The same with bit 48 in its PMD entry: a table out of RAM for a build with 52-bit addresses, in it for others."""
    pmd = world.levels.pmd
    table = world.arena[0] + world.space.tables.index(pmd) * world.plan.page_size
    entry = table + 8 * world.space.index(pmd, va)
    return tree.with_word(entry, tree.words[entry] | 1 << 48)


def simple(world: World, va: int | None = None) -> tuple[Tree, int]:
    """Eight pages at `va` (the start of the image's area), with tables down to them."""
    rng = random.Random(1)
    grower = Grower(world.space, rng)
    va = world.image.base + (1 << 28) if va is None else va
    tables = world.space.tables
    table = grower.path(va, depth=len(tables) - 1)
    for i in range(8):
        grower.words[table + 8 * (world.space.index(tables[-1], va) + i)] = grower.leaf_word(tables[-1])
    return grower.done(), va


def _one(world: World, rng: random.Random, depth: int, kind: Kind) -> tuple[Tree, int]:
    """A word of one kind at one depth of an otherwise plain path."""
    grower = Grower(world.space, rng)
    va = world.image.base + (1 << 28)
    level = world.space.tables[depth]
    table = grower.path(va, depth=depth)
    grower.words[table + 8 * world.space.index(level, va)] = grower.word(level, kind)
    # Where an upper level is virtual in this run its callback sees another slot of the root (facts: index of PGD).
    pgd = world.levels.pgd
    grower.words.setdefault(grower.root + 8 * pgd.index(va), grower.word(world.space.tables[0], kind))
    return grower.done(), va & -level.size & U64


def _corners(va: int, page: int) -> Iterator[tuple[int, int]]:
    """Ranges at the ends of the address space, and unaligned ones."""
    top = U64
    yield from ((0, page), (0, page - 1), (0, 0x100), (page, 0), (va + 0x234, va + 2 * page + 1))
    yield from ((top - 2 * page + 1, top), (top - page + 1, top), (top, 0), (va, va + page // 2), (va + 1, va + 2))


def _focus(world: World, rng: random.Random) -> int:
    """An address where kernels map things, near a border of some level."""
    plan, levels = world.plan, world.levels
    bases = (plan.linear, world.image.base, world.image.base + (1 << 30), (1 << 64) - (1 << 40), (1 << 64) - (1 << 21))
    level = rng.choice((levels.pte, levels.pmd, levels.pmd, levels.pud))
    base = rng.choice(bases) + rng.randrange(1, 64) * level.size
    va: int = base + rng.randrange(-4, 5) * levels.page_size & U64
    return va


def _range(world: World, rng: random.Random, va: int) -> tuple[int, int]:
    """A range near `va`: a few pages, a few entries of a higher level, unaligned, or to the end of the space."""
    page, levels = world.levels.page_size, world.levels
    start = va + rng.randrange(-6, 3) * page & U64
    how = rng.random()
    if how < 0.6:
        end = start + rng.randrange(1, 12) * page
    elif how < 0.8:
        level = rng.choice((levels.pmd, levels.pud))
        start = (va + level.size // 2 & -level.size) - rng.randrange(0, 3) * page & U64
        end = start + rng.randrange(1, 3) * level.size + rng.randrange(0, 3) * page
    elif how < 0.9:
        start, end = start + rng.randrange(page), start + rng.randrange(1, 8 * page)
    elif how < 0.95:
        end = U64 if rng.random() < 0.5 else (1 << 64) - page
        start = end - rng.randrange(1, 8 * page)
    else:
        end = start - rng.randrange(2) * page
    return start & U64, end & U64


def _script(world: World, rng: random.Random, tree: Tree) -> Script:
    """Reactions for some of the first callbacks; a store may put any word of the tree, or a new one, into the entry."""
    script: Script = {}
    if rng.random() < 0.4:
        return script
    words = [0, *list(tree.words.values())[:40]]
    for i in range(12):
        if rng.random() < 0.2:
            action = rng.choice((None, 0, 1, 2, 2, 1))
            value = rng.choice((0, 0, 0, 0, 0, 7, -5, 1))
            store = rng.choice((None, None, None, rng.choice(words)))
            script[i] = Reaction(value, action, store)
    return script


__all__ = ["ACTIONS", "KernelWalk", "WalkCase", "simple"]
