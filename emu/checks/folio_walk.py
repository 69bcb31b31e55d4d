"""folio_walk_start() and huge_pte_offset(), run for real: one address of a vma, looked up in a tree.

What vm_normal_page() and its kin say is decided by the case; leaves lead into RAM, where there are struct pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from emu.checks.harness import Checked
from emu.checks.trees import Grower, Kind, Tree, random_tree
from emu.checks.user_cases import base_address, plain
from emu.checks.vmas import Area, Objects, Space, objects_of
from emu.checks.world import World
from emu.coldboot import STRUCT_PAGE
from emu.machine import CallResult
from kernel_model import huge
from kernel_model.compare import Outcome
from kernel_model.folio_walk import FolioWalk, Level, folio_walk_start
from kernel_model.levels import Fold
from kernel_model.mm import Called, Kernel, Mm, Warn, Write
from pgtable.descriptors import LAST_LEVEL

NORMAL = ("vm_normal_page", "vm_normal_page_pmd", "vm_normal_page_pud")
ZERO, HUGE_ZERO = 5 << 20, 128 << 20  # the pages of zeros, in bytes from the start of RAM
PAGE_LOCKED = 1  # PG_locked, bit 0 of the flags of a struct page
FREE, READ = 0, 0x100


@dataclass(frozen=True)
class FolioCase:
    """One call. `page`: what vm_normal_page() and its kin return, in pages from the start of RAM, None for none.

    `locked`: the pages of migration entries are. `count`: of the mmap lock.
    """

    tree: Tree
    area: Area
    addr: int
    flags: int
    page: int | None = None
    locked: bool = True
    count: int = READ


class FolioWalkStart:
    """The harness of folio_walk_start()."""

    worlds = ("plain", "wide")
    case = FolioCase
    stubs = "vmas"

    def __init__(self, function: str = "folio_walk_start") -> None:
        self.function = function

    def exists(self, world: World) -> bool:
        """The kernel has the function."""
        return self.function in world.image.symbols

    # ---- cases

    def prepared(self, world: World) -> Iterator[FolioCase]:
        """Each kind of entry at each level, also one of zeros or under migration, with each flag."""
        for depth in range(len(world.space.tables)):
            for kind in Kind:
                tree, va = plain(world, depth, kind)
                for each in (tree, *_special(world, tree, va, depth)):
                    yield from _flags(world, each, va)
        tree, va = plain(world, len(world.space.tables) - 1, Kind.LEAF)
        case = next(_flags(world, tree, va))
        yield replace(case, count=FREE)
        yield replace(case, addr=case.area.start - 1)
        yield replace(case, addr=case.area.end)

    def random(self, world: World, rng: Random) -> FolioCase:
        """A random tree, an address near what it was grown around."""
        page, focus = world.levels.page_size, base_address(world, rng)
        tree = _into_ram(world, random_tree(world.space, rng, [focus], ng=True))
        addr = focus + rng.randrange(-4, 4) * page + rng.randrange(page)
        level = rng.choice((world.levels.pte, world.levels.pmd, world.levels.pud))
        if rng.random() < 0.3:
            addr += rng.randrange(-2, 3) * level.size
        if rng.random() < 0.3:
            tree = rng.choice([tree, *_special(world, tree, addr, rng.randrange(len(world.space.tables)))])
        start = max((addr & -page) - rng.randrange(3) * page, 0)
        area = Area(start, start + rng.randrange(1, 9) * page)
        shown = rng.choice((None, rng.randrange(1 << 10)))
        return FolioCase(
            tree, area, addr, rng.randrange(4), shown, rng.random() < 0.8, rng.choice((FREE, READ, READ, 1))
        )

    # ---- running

    def run(self, world: World, case: FolioCase) -> Checked:
        """On the model, then for real."""
        objects = objects_of(world)
        world.load(case.tree)
        objects.write(Space((case.area,), case.count))
        self._zero_pages(world)
        kernel = world.kernel()
        ram = world.plan.ram[0]
        kernel.settings.zero_page = ram + ZERO
        kernel.settings.huge_zero_page = ram + HUGE_ZERO if world.own.thp else -1
        predicted = world.predicted(kernel, lambda: self._model(world, kernel, case))
        real = self._real(world, objects, case)
        return Checked(predicted, real, _rows(world, predicted))

    def _zero_pages(self, world: World) -> None:
        shift, ram = world.levels.page_shift, world.plan.ram[0]
        small = "zero_pfn" if "zero_pfn" in world.image.symbols else "zero_page_pfn"
        world.poke(small, ram + ZERO >> shift)
        if "huge_zero_pfn" in world.image.symbols:
            world.poke("huge_zero_pfn", ram + HUGE_ZERO >> shift)

    def _page(self, world: World, case: FolioCase) -> int:
        """What vm_normal_page() returns, by PA; 0 for none."""
        return 0 if case.page is None else world.plan.ram[0] + case.page * world.levels.page_size

    def _model(self, world: World, kernel: Kernel, case: FolioCase) -> int:
        mm = objects_of(world).model(kernel)
        kernel.outside.update(dict.fromkeys(NORMAL, lambda addr, value: self._page(world, case)))
        fw = FolioWalk()
        folio = folio_walk_start(kernel, fw, mm.vmas[0], case.addr, case.flags, lambda page: case.locked)
        if folio is not None:
            page, lock = (-1 if each is None else each for each in (fw.page, fw.lock))
            kernel.called("found", page, fw.level, fw.entry, fw.value, lock)
        return folio or 0

    def _real(self, world: World, objects: Objects, case: FolioCase) -> Outcome:
        for name in NORMAL:
            world.stub(name, lambda m, name=name: self._normal(world, case, name, m))  # type: ignore[misc]
        locks = world.variant.fw_migration and case.flags & 1 and case.locked
        if locks:
            self._lock_pages(world, PAGE_LOCKED)
        fw = objects.other
        result = world.call(self.function, fw, objects.vma(0), case.addr, case.flags)
        if result.stop is None and result.value:
            world.note(Called("found", self._found(world, objects, fw)))
        if locks:
            self._lock_pages(world, 0)
        folio = self._pa(world, result.value) if result.value and result.stop is None else 0
        return world.real(result, value=folio, keeps=True)

    def _normal(self, world: World, case: FolioCase, name: str, machine: Any) -> int:
        world.note(Called(name, (machine.argument(1), machine.argument(2))))
        page = self._page(world, case)
        return world.machine.struct_page(page) if page else 0

    def _lock_pages(self, world: World, flags: int) -> None:
        """Sets the flags of every page of RAM."""
        plan = world.plan
        words = world.machine.memory.words(plan.vmemmap_pa, plan.ram[1] // plan.page_size * STRUCT_PAGE // 8)
        words[:: STRUCT_PAGE // 8] = flags

    def _pa(self, world: World, page: int) -> int:
        """The PA whose struct page is at `page`."""
        plan = world.plan
        return plan.ram[0] + (page - world.machine.struct_page(plan.ram[0])) // STRUCT_PAGE * plan.page_size

    def _found(self, world: World, objects: Objects, fw: int) -> tuple[int, ...]:
        """What the walk left in struct folio_walk."""
        memory, at = world.machine.memory, world.physical(fw)
        members = [world.offset("folio_walk", name) for name in ("page", "ptep", "pte", "ptl", "level")]
        page, entry, value, lock, level = (memory.fetch(at + member) for member in members)
        of_mm = lock == objects.mm + world.offset("mm_struct", "page_table_lock")
        if world.image.btf.size("spinlock") > 8:  # PREEMPT_RT: an object of its own, which cold struct pages have not
            owner = -1 if of_mm else world.physical(entry) & -world.levels.page_size
        else:
            owner = -1 if of_mm else self._pa(world, lock - world.offset("ptdesc", "ptl"))
        return (self._pa(world, page) if page else -1, level & (1 << 32) - 1, world.physical(entry), value, owner)

    # ---- rows, shrinking

    def rows(self, world: World) -> frozenset[str]:
        """What was found, or asked, at each level."""
        variant = world.own
        rows = {f"found {level.name}" for level in Level} | {"none", "outside the vma", "no mmap lock"}
        rows |= {"zero page", "vm_normal_page", "vm_normal_page_pmd"} | ({"huge zero page"} if variant.thp else set())
        if variant.has_normal_page_pud:
            rows.add("vm_normal_page_pud")
        if variant.fw_migration:
            rows |= {"bug", "migration"}
        if world.levels.p4d.fold is not Fold.COMPILE:
            rows.add("entry cleared")
        return frozenset(rows)

    def smaller(self, case: FolioCase) -> Iterator[FolioCase]:
        """Fewer words."""
        yield from (replace(case, tree=tree) for tree in case.tree.smaller())


def _rows(world: World, outcome: Outcome) -> frozenset[str]:
    """The rows that a case reached."""
    warns = sum(isinstance(event, Warn) for event in outcome.events)
    found = {"bug"} if outcome.stop == "bug" else set() if outcome.value else {"none"}
    for event in outcome.events:
        if isinstance(event, Write):
            found.add("entry cleared")
        elif isinstance(event, Called) and event.name != "found":
            found.add(event.name)
        elif isinstance(event, Called):
            found |= _found_rows(world, event, outcome.value)
    if warns:
        found.add("no mmap lock")
    if warns and not outcome.value:
        found.add("outside the vma")
    return frozenset(found)


def _found_rows(world: World, event: Called, folio: int) -> set[str]:
    page, level = event.args[:2]
    ram = world.plan.ram[0]
    zero = {ram + ZERO: "zero page", ram + HUGE_ZERO: "huge zero page"}
    hidden = {zero.get(folio, "migration")} if page == -1 else set()
    return {f"found {Level(level).name}"} | hidden


def _flags(world: World, tree: Tree, va: int) -> Iterator[FolioCase]:
    """A tree with each flag, with and without a normal page."""
    page = world.levels.page_size
    area = Area(va, va + 4 * page)
    for flags in range(4):
        for shown in (None, 77):
            for locked in (True, False):
                yield FolioCase(_into_ram(world, tree), area, va + page // 2, flags, shown, locked)


def _special(world: World, tree: Tree, va: int, depth: int) -> Iterator[Tree]:
    """The entry of `va` at one depth leads to the pages of zeros, or is a migration entry of each kind."""
    grower = Grower(world.space, Random(0), ng=True)
    grower.words, grower._next = dict(tree.words), tree.root + tree.pages * world.levels.page_size
    table = grower.path(va, depth=depth)
    level = world.space.tables[depth]
    layout = world.space.fmt.leaf(world.space.hardware_level(level))
    entry, ram = table + 8 * world.space.index(level, va), world.plan.ram[0]
    for valid in (0, 1):
        word = layout.pack(grower.leaf_word(level, pa=0), VALID=valid, nG=1)
        for page in (ZERO, HUGE_ZERO):
            yield replace(grower.done(), words={**grower.words, entry: layout.pack(word, OA=ram + page & -level.size)})
    for kind in (27, 28, 29, 30, 31):
        word = kind * (layout["AP"].mask & -layout["AP"].mask)
        yield replace(grower.done(), words={**grower.words, entry: word | ram + (9 << 20) >> _swap_shift(world)})


def _swap_shift(world: World) -> int:
    """How far below its place in a leaf the page frame number of a migration entry is: it begins at bit 12."""
    return world.levels.page_shift - 12


def _into_ram(world: World, tree: Tree) -> Tree:
    """The tree with every entry that is no table of it, from the PUD level down, leading into RAM.

    Entries above, which 6.12 may take for tables whatever they are, lead where there is none.
    """
    ram, size = world.plan.ram
    page = world.levels.page_size
    first = next(i for i, level in enumerate(world.space.tables) if level.name in ("PUD", "PMD"))
    layout = world.space.fmt.leaf(LAST_LEVEL)
    address, depths = (1 << 50) - page, _depths(world, tree)

    def moved(pa: int, word: int) -> int:
        if depths.get(pa & -page, -1) < first or (word & 3 == 3 and _table(world, word) is not None):
            return word
        if world.space.fmt.lpa2 and word & (layout["VALID"].mask | layout["nG"].mask):
            word &= ~layout["OA"].spans[-1].mask
        if not word & (layout["VALID"].mask | layout["nG"].mask):
            return word & ~((1 << 50) - (1 << 12)) | (ram + (word & address & size - 1)) >> _swap_shift(world)
        return word & ~address | ram + (word & address & size - 1)

    return replace(tree, words={pa: moved(pa, word) if word else 0 for pa, word in tree.words.items()})


def _depths(world: World, tree: Tree) -> dict[int, int]:
    """How far below the root each table is, by its PA; a word without VALID may be taken for a table too."""
    depths, todo = {tree.root: 0}, [tree.root]
    while todo:
        at = todo.pop()
        words = [word for pa, word in tree.words.items() if pa & -world.levels.page_size == at]
        for below in (_table(world, word) for word in words):
            if below is not None and below not in depths:
                depths[below] = depths[at] + 1
                todo.append(below)
    return depths


def _table(world: World, word: int) -> int | None:
    """The table of the arena that a word leads to, if it may be one."""
    table: int = world.space.fmt.table(LAST_LEVEL - 1)["TA"].get(word)
    return table if word & 2 and 0 <= table - world.arena[0] < world.arena[1] else None


@dataclass(frozen=True)
class HugeCase:
    """One call of huge_pte_offset()."""

    tree: Tree
    addr: int
    size: int


class HugePteOffset:
    """The harness of huge_pte_offset()."""

    worlds = ("plain", "wide")
    case = HugeCase
    stubs = "vmas"

    def __init__(self, function: str = "huge_pte_offset") -> None:
        self.function = function

    def exists(self, world: World) -> bool:
        """The kernel has the function."""
        return self.function in world.image.symbols

    def prepared(self, world: World) -> Iterator[HugeCase]:
        """Each kind of entry at each level for each size."""
        for depth in range(len(world.space.tables)):
            for kind in Kind:
                tree, va = plain(world, depth, kind)
                for size in _sizes(world):
                    yield HugeCase(tree, va & -size, size)

    def random(self, world: World, rng: Random) -> HugeCase:
        """A random tree and size; the address is aligned to that, mostly."""
        focus, size = base_address(world, rng), rng.choice(_sizes(world))
        tree = random_tree(world.space, rng, [focus], ng=True)
        return HugeCase(tree, focus & -size if rng.random() < 0.8 else focus, size)

    def run(self, world: World, case: HugeCase) -> Checked:
        """On the model, then for real; None is returned as 0."""
        objects = objects_of(world)
        world.load(case.tree)
        objects.write(Space(()))
        kernel = world.kernel()
        predicted = world.predicted(kernel, lambda: self._model(world, kernel, case))
        result: CallResult = world.call(self.function, objects.mm, case.addr, case.size)
        value = world.physical(result.value) if result.value and not result.stop else 0
        real = world.real(result, value=value, keeps=True)
        return Checked(predicted, real, frozenset({f"{case.size:#x} {'found' if predicted.value else 'none'}"}))

    def _model(self, world: World, kernel: Kernel, case: HugeCase) -> int:
        return huge.huge_pte_offset(kernel, Mm(world.root), case.addr, case.size) or 0

    def rows(self, world: World) -> frozenset[str]:
        """Found or not, for each size."""
        return frozenset(f"{size:#x} {what}" for size in _sizes(world) for what in ("found", "none"))

    def smaller(self, case: HugeCase) -> Iterator[HugeCase]:
        """Fewer words."""
        yield from (replace(case, tree=tree) for tree in case.tree.smaller())


def _sizes(world: World) -> tuple[int, ...]:
    return objects_of(world).huge_sizes
