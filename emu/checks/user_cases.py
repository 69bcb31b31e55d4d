"""Cases for the walks of user memory: prepared ones for each situation that matters, and random ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from emu.checks.trees import TARGET_PA, Grower, Kind, Tree, random_tree
from emu.checks.vmas import VMAS, Area, Space, objects_of
from emu.checks.world import Reaction, Script, World, shown
from kernel_model.levels import U64

FUNCTIONS = (
    "walk_page_range",
    "walk_page_range_mm_unsafe",
    "walk_page_range_vma",
    "walk_page_range_vma_unsafe",
    "walk_page_vma",
    "walk_page_mapping",
)
OF_MM = FUNCTIONS[:2]
OF_VMA = FUNCTIONS[2:5]
ENTRIES = ("pgd_entry", "p4d_entry", "pud_entry", "pmd_entry", "pte_entry")
ALL = (*ENTRIES, "pte_hole", "hugetlb_entry", "pre_vma", "post_vma")
FREE, READ, WRITE = 0, 0x100, 1  # counts of an rwsem


@dataclass(frozen=True)
class UserCase:
    """One call. `start`, `end`: addresses, for walk_page_mapping page offsets. `vma`: which one is the argument.

    `lazy`: the task is in lazy MMU mode (7.x).
    """

    tree: Tree
    space: Space
    start: int
    end: int
    callbacks: tuple[str, ...] = ALL
    script: Script = field(default_factory=dict)
    walk_lock: int = 0
    vma: int = 0
    lazy: bool = False

    def __str__(self) -> str:
        script = ", ".join(f"{at}: {shown(reaction)}" for at, reaction in sorted(self.script.items()))
        areas = ", ".join(f"[{a.start:#x}, {a.end:#x}) huge {a.huge_size:#x} {a.locked}" for a in self.space.areas)
        return (
            f"[{self.start:#x}, {self.end:#x}) vma {self.vma} of {areas or 'none'}, mmap lock {self.space.count:#x}, "
            f"walk_lock {self.walk_lock}, callbacks {' '.join(self.callbacks)}, script {{{script}}}; {self.tree}"
        )


# ---- prepared cases


def prepared(function: str, world: World) -> Iterator[UserCase]:
    """Each kind of entry at each level with each reaction; locks; kinds of vma; refusals; install_pte."""
    yield from _every_row(function, world)
    yield from _locks(function, world)
    yield from _vma_kinds(function, world)
    yield from _splits(function, world)
    if world.variant.install_pte:
        yield from _installs(function, world)


def plain(world: World, depth: int, kind: Kind, seed: int = 0) -> tuple[Tree, int]:
    """A word of one kind at one depth of an otherwise plain path, below user addresses."""
    rng = Random(seed)
    grower = Grower(world.space, rng, ng=True)
    va = 5 << 38 | 3 << 30
    level = world.space.tables[depth]
    table = grower.path(va, depth=depth)
    grower.words[table + 8 * world.space.index(level, va)] = grower.word(level, kind)
    grower.words.setdefault(grower.root, grower.word(world.space.tables[0], kind))
    return grower.done(), va & -level.size & U64


def _every_row(function: str, world: World) -> Iterator[UserCase]:
    """One word of each kind at each level, walked with every reaction of the callback that sees it."""
    last = len(world.space.tables) - 1
    reactions = (Reaction(7), Reaction(-5), Reaction(action=1), Reaction(action=2), Reaction())
    for depth, level in enumerate(world.space.tables):
        for kind in Kind:
            if kind is Kind.RANDOM:
                continue
            tree, va = plain(world, depth, kind)
            span = min(2 * level.size, 1 << 34)
            for at in range(last + 4):
                for reaction in reactions[: 2 if level.name == "PUD" and at > 3 and kind is not Kind.TABLE else 5]:
                    yield _one_vma(function, world, tree, va, span, script={at: reaction})


def _one_vma(
    function: str, world: World, tree: Tree, va: int, span: int, *, area: Area | None = None, **more: Any
) -> UserCase:
    """A walk of all of one vma."""
    page = world.levels.page_size
    area = area or Area(va, va + span)
    space = more.pop("space", None) or Space((area,))
    mapping = function == "walk_page_mapping"
    start, end = (0, span // page) if mapping else (va, va + span)
    return UserCase(tree, space, start, end, **more)


def _locks(function: str, world: World) -> Iterator[UserCase]:
    """Every walk_lock with every state of the mm's lock and the vma's."""
    tree, va = plain(world, len(world.space.tables) - 1, Kind.LEAF)
    span = 2 * world.levels.page_size
    for count in (FREE, READ, WRITE, WRITE | READ):
        for locked in ("", "read", "write"):
            for walk_lock in range(4):
                space = Space((Area(va, va + span, locked=locked),), count)
                yield _one_vma(function, world, tree, va, span, space=space, walk_lock=walk_lock)
    area = Area(va, va + span)
    for space in (Space((area,), FREE, has_mm=function == "walk_page_mapping"), Space((area,), WRITE)):
        case = _one_vma(function, world, tree, va, span, space=space)
        yield case
        yield replace(case, end=case.start)
        yield replace(case, callbacks=(*ALL, "install_pte")) if world.variant.install_pte else case
        if function in OF_VMA:
            yield replace(case, start=case.start - 1)
            yield replace(case, end=case.end + 1)


def _vma_kinds(function: str, world: World) -> Iterator[UserCase]:
    """VM_PFNMAP, hugetlb of each size, test_walk, pre_vma and the holes between vmas, with each kind of answer."""
    for value in (0, 7, -5):
        for at in range(6):
            script = {at: Reaction(value)}
            yield from _answers(function, world, script)
    for size in objects_of(world).huge_sizes:
        for depth in range(len(world.space.tables)):
            for kind in (Kind.NONE, Kind.LEAF, Kind.RUN, Kind.PRESENT_INVALID, Kind.LOST_VALID):
                tree, va = plain(world, depth, kind)
                va &= -size
                area = Area(va, va + 2 * size, size)
                for script in ({}, {1: Reaction(3)}, {2: Reaction(3)}):
                    yield _one_vma(function, world, tree, va, 2 * size, area=area, script=script)


def _splits(function: str, world: World) -> Iterator[UserCase]:
    """What splitting a huge PMD may leave: nothing new, a table, an entry of each kind, swap entries, PTE_DEVMAP."""
    depth = [level.name for level in world.space.tables].index("PMD")
    level, span = world.space.tables[depth], 2 * world.levels.page_size
    layout = world.space.fmt.leaf(world.space.hardware_level(level))
    tree, va = plain(world, depth, Kind.LEAF)
    grower = Grower(world.space, Random(3), ng=True)
    words = [grower.word(level, kind) for kind in Kind if kind not in (Kind.TABLE, Kind.RANDOM)]
    words += [kind * (layout["AP"].mask & -layout["AP"].mask) for kind in range(26, 32)]
    below = tree.root + tree.pages * world.levels.page_size
    tree = replace(tree, pages=tree.pages + 1)
    words += [grower.table_word(below), grower.table_word(below) | layout["IGNORED_58_55"].put(0, 4)]
    for word in (None, *words):
        for callbacks in (ALL, ("pte_entry",)):
            space = Space((Area(va, va + span),), splits=(word,))
            yield _one_vma(function, world, tree, va, span, space=space, callbacks=callbacks)


def _answers(function: str, world: World, script: Script) -> Iterator[UserCase]:
    """A vma of each kind after a gap, with and without test_walk."""
    tree, va = plain(world, len(world.space.tables) - 1, Kind.LEAF)
    page = world.levels.page_size
    for callbacks in (ALL, (*ALL, "test_walk"), ("pte_entry",), ("pte_entry", "hugetlb_entry")):
        for pfnmap in (False, True):
            areas = (Area(va, va + 2 * page, pfnmap=pfnmap), Area(va + 3 * page, va + 4 * page, pgoff=2))
            case = _one_vma(function, world, tree, va, 4 * page, space=Space(areas), callbacks=callbacks, script=script)
            if function in OF_MM:
                yield replace(case, start=va - page, end=va + 6 * page)
                yield replace(case, space=Space(()))
            yield case if function not in OF_VMA else replace(case, end=va + 2 * page)


def _installs(function: str, world: World) -> Iterator[UserCase]:
    """install_pte where tables are missing at each level, with and without pages for them."""
    leaf = world.space.fmt.leaf(3).pack(VALID=1, TYPE=1, AF=1, UXN=1, OA=TARGET_PA)  # ordered for the walker
    page = world.levels.page_size
    yield _full_run(function, world)
    last = len(world.space.tables) - 1
    tree, va = plain(world, last, Kind.NONE)
    ordered: Script = {i: Reaction(store=leaf) for i in range(3)}
    names = ("install_pte", "pte_entry")
    made = _one_vma(function, world, tree, va, 3 * page, callbacks=names, script=ordered)
    yield replace(made, lazy=world.own.lazy_barriers)
    for depth, level in enumerate(world.space.tables):
        for kind in (Kind.NONE, Kind.LEAF, Kind.PRESENT_INVALID, Kind.LOST_VALID):
            tree, va = plain(world, depth, kind)
            scripts: list[Script] = [{1: Reaction(-5)}, {3: Reaction(-5)}, {0: Reaction(store=leaf)}, {}]
            for callbacks in (("install_pte", "pte_entry"), ("install_pte",), (*ALL, "install_pte")):
                for pages in (None, 0, 1, 2) if kind is Kind.NONE else (None,):
                    for script in scripts[: 1 if level.name == "PUD" and kind is not Kind.NONE else 4]:
                        space = Space((Area(va, va + 2 * page),), pages=pages)
                        yield _one_vma(
                            function, world, tree, va, 2 * page, space=space, callbacks=callbacks, script=script
                        )


def _full_run(function: str, world: World) -> UserCase:
    """install_pte for each page of a contiguous run, with code that EL0 may execute."""
    tree, va = plain(world, len(world.space.tables) - 1, Kind.NONE)
    level, run = world.space.tables[-1], world.levels.contiguous["PTE"]
    layout = world.space.fmt.leaf(3)
    word = layout.pack(VALID=1, TYPE=1, AF=1, nG=1, AP=3, OA=TARGET_PA)
    script = {i: Reaction(store=layout.pack(word, OA=TARGET_PA + i * level.size)) for i in range(run // level.size)}
    return _one_vma(function, world, tree, va, run, callbacks=("install_pte", "pte_entry"), script=script)


# ---- random cases


def random_case(function: str, world: World, rng: Random) -> UserCase:
    """A random mm over a random tree, a range near one of its borders, random callbacks and reactions."""
    sizes = objects_of(world).huge_sizes
    areas = _areas(world, rng, sizes, least=int(function in OF_VMA))
    borders = [at for area in areas for at in (area.start, area.end)] or [base_address(world, rng)]
    focus = [rng.choice(borders) for _ in range(rng.choice((1, 1, 2)))]
    tree = random_tree(world.space, rng, focus, ng=True)
    start, end = _range(world, rng, rng.choice(focus))
    names = ALL if rng.random() < 0.5 else tuple(name for name in ALL if rng.random() < 0.7)
    names += ("test_walk",) if rng.random() < 0.3 else ()
    names += ("install_pte",) if world.variant.install_pte and rng.random() < _how_often_installs(function) else ()
    words = [0, 0, *list(tree.words.values())[:40]]
    splits = tuple(rng.choice((None, *words)) for _ in range(rng.choice((0, 1, 4))))
    pages = rng.choice((None, None, 0, 1, 2))
    has_mm = function == "walk_page_mapping" or rng.random() < 0.97
    space = Space(areas, rng.choice((FREE, READ, WRITE, WRITE)), splits, has_mm, pages)
    script = _script(rng, words)
    case = UserCase(tree, space, start, end, names, script, rng.randrange(4))
    return _fitted(function, case, rng)


def _how_often_installs(function: str) -> float:
    """How often install_pte is set: seldom where it is refused."""
    return 0.4 if "unsafe" in function else 0.02


def _fitted(function: str, case: UserCase, rng: Random) -> UserCase:
    """The case with arguments that this function does not refuse at once, mostly."""
    areas = case.space.areas
    if function == "walk_page_mapping":
        first = rng.choice([area.pgoff for area in areas] or [0]) + rng.randrange(-2, 6)
        return replace(case, start=max(first, 0), end=max(first, 0) + rng.randrange(1, 600))
    if function not in OF_VMA or not areas:
        return case
    index = rng.randrange(len(areas))
    area = areas[index]
    if rng.random() < 0.05:
        return replace(case, vma=index)
    start = min(max(case.start, area.start), area.end - 1)
    return replace(case, vma=index, start=start, end=max(min(case.end, area.end), start + 1))


def base_address(world: World, rng: Random) -> int:
    """A user address near a border of some level."""
    levels = world.levels
    level = rng.choice((levels.pte, levels.pmd, levels.pmd, levels.pud))
    top = rng.choice((0, 1 << 30, 0x5555 << 32, (1 << levels.va_bits) - (1 << 36)))
    va: int = top + rng.randrange(1, 48) * level.size + rng.randrange(-3, 4) * levels.page_size
    return min(max(va, levels.page_size), (1 << levels.va_bits) - (1 << 31))


def _areas(world: World, rng: Random, sizes: tuple[int, ...], *, least: int = 0) -> tuple[Area, ...]:
    """`least` to four vmas in address order, adjacent or with gaps."""
    page, levels = world.levels.page_size, world.levels
    at, areas = base_address(world, rng) & -page, []
    for _ in range(max(least, rng.choice((0, 1, 1, 2, 2, 3, VMAS)))):
        huge = rng.choice(sizes) if rng.random() < 0.25 else 0
        unit = huge or rng.choice((page, page, page, levels.pmd.size))
        at = (at + unit - 1 & -unit) if huge else at
        end = at + unit * rng.randrange(1, 4 if huge else 8)
        pgoff = rng.choice((0, 0, 3, at // page))
        areas.append(Area(at, end, huge, rng.random() < 0.15, pgoff, rng.choice(("", "", "read", "write"))))
        at = end + rng.choice((0, 0, 1, 5, 600)) * page
    return tuple(areas)


def _range(world: World, rng: Random, va: int) -> tuple[int, int]:
    """A range near `va`: pages, entries of a higher level, unaligned ends, or none."""
    page, levels = world.levels.page_size, world.levels
    start = max(va + rng.randrange(-6, 3) * page, 0)
    how = rng.random()
    if how < 0.6:
        return start, start + rng.randrange(1, 12) * page
    if how < 0.85:
        level = rng.choice((levels.pmd, levels.pud))
        return start, start + rng.randrange(1, 3) * level.size + rng.randrange(0, 3) * page
    if how < 0.97:
        start += rng.randrange(page)
        return start, start + rng.randrange(1, 8 * page)
    return start, start - rng.randrange(2) * page & U64


def _script(rng: Random, words: list[int]) -> Script:
    """Reactions for some of the first callbacks; a store may put any word of the tree into the entry."""
    script: Script = {}
    if rng.random() < 0.3:
        return script
    for i in range(14):
        if rng.random() < 0.2:
            action = rng.choice((None, None, 0, 1, 2, 1))
            value = rng.choice((0, 0, 0, 0, 0, 7, -5, 1))
            store = rng.choice((None, None, None, rng.choice(words)))
            script[i] = Reaction(value, action, store)
    return script
