"""Harnesses for arch/arm64/mm/pageattr.c, mem_encrypt.c and the splitting of mmu.c: real functions against the model.

A case is a tree, the arguments and what is around (surroundings.py). A struct page is given by the PA of its page.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from emu.checks.harness import Checked
from emu.checks.pageattr_cases import Maker, around_of
from emu.checks.surroundings import Arranger, Surroundings, requires_bbml, settings_of
from emu.checks.trees import Tree
from emu.checks.world import World
from kernel_model import mem_encrypt, pageattr, split
from kernel_model.compare import RUNAWAY, Outcome
from kernel_model.mm import Barrier, Called, Context, Kernel, Tlbi, Warn, Write
from kernel_model.pageattr import Masks

U64 = (1 << 64) - 1
PREPARED = 40
BLOCKS = 30_000  # basic blocks of a call that may have no end
GFP_KERNEL = 0xCC0


class Function(NamedTuple):
    """How a function is called. `kind`: which arguments its cases have. `page`: the first one is a struct page."""

    kind: str
    model: Callable[..., Any]
    page: bool = False
    more: tuple[int, ...] = ()  # arguments of the real one that the model has not


def _with_masks(function: Callable[..., int]) -> Callable[..., int]:
    return lambda kernel, a, b, set, clear: function(kernel, a, b, Masks(set, clear))


FUNCTIONS: dict[str, Function] = {
    "set_memory_ro": Function("area", pageattr.set_memory_ro),
    "set_memory_rw": Function("area", pageattr.set_memory_rw),
    "set_memory_nx": Function("area", pageattr.set_memory_nx),
    "set_memory_x": Function("area", pageattr.set_memory_x),
    "change_memory_common": Function("area masks", _with_masks(pageattr.change_memory_common)),
    "set_memory_valid": Function("range enable", pageattr.set_memory_valid),
    "__change_memory_common": Function("bytes masks", _with_masks(pageattr.__change_memory_common)),
    "update_range_prot": Function("bytes masks", _with_masks(pageattr.update_range_prot)),
    "set_direct_map_invalid_noflush": Function("page", pageattr.set_direct_map_invalid_noflush, page=True),
    "set_direct_map_default_noflush": Function("page", pageattr.set_direct_map_default_noflush, page=True),
    "set_direct_map_valid_noflush": Function("page range", pageattr.set_direct_map_valid_noflush, page=True),
    "kernel_page_present": Function("page", pageattr.kernel_page_present, page=True),
    "can_set_direct_map": Function("nothing", pageattr.can_set_direct_map),
    "set_memory_encrypted": Function("linear", mem_encrypt.set_memory_encrypted),
    "set_memory_decrypted": Function("linear", mem_encrypt.set_memory_decrypted),
    "realm_set_memory_encrypted": Function("linear", mem_encrypt.realm_set_memory_encrypted),
    "realm_set_memory_decrypted": Function("linear", mem_encrypt.realm_set_memory_decrypted),
    "split_kernel_leaf_mapping": Function("ends", split.split_kernel_leaf_mapping),
    "range_split_to_ptes": Function("ends", split.range_split_to_ptes, more=(GFP_KERNEL,)),
}
BOOLEAN = frozenset({"kernel_page_present", "can_set_direct_map"})


@dataclass(frozen=True)
class Case:
    """One call."""

    args: tuple[int, ...]
    tree: Tree
    around: Surroundings

    def __str__(self) -> str:
        settings = ", ".join(f"{k}={v}" for k, v in vars(self.around.settings).items())
        args = ", ".join(f"{a:#x}" for a in self.args)
        return f"({args}) {self.around.context.name} {self.around.area} {self.around.monitor.name} {settings}"


class PageattrHarness:
    """The harness of one function."""

    worlds = ("plain", "ng", "wide")
    case = Case

    def __init__(self, function: str) -> None:
        self.function = function
        self.how = FUNCTIONS[function]

    def prepared(self, world: World) -> Iterator[Case]:
        """What random cases seldom are, then always the same of those."""
        yield from self._seldom(world)
        rng = random.Random(0)
        if self.how.page:  # a linear map without anything
            case = self.random(world, rng)
            yield replace(case, tree=case.tree.without(list(case.tree.words)))
        for _ in range(PREPARED):
            yield self.random(world, rng)

    def _seldom(self, world: World) -> Iterator[Case]:
        """The first pages of a block: without a page for its table, too early, with TLBI by range, in a realm."""
        walks, bbml = world.variant.walks, requires_bbml(world.image) is not None
        for pages, numpages, changed in (
            (0, 1, {"requires_bbml": bbml, "realm": walks}),
            (None, 1, {"requires_bbml": bbml, "page_alloc_available": False, "realm": walks}),
            (None, 33, {"requires_bbml": bbml, "tlb_range": walks, "realm": walks}),
            (None, 1, {"rodata_full": False, "kfence_early": True}),
        ):
            args, area, tree = Maker(world, random.Random(0), self.how.kind).on_a_block(numpages)
            settings = settings_of(world.image, **changed)
            yield Case(args, tree, Surroundings(settings, area=area, pages=pages))

    def random(self, world: World, rng: random.Random) -> Case:
        """One random case."""
        maker = Maker(world, rng, self.how.kind)
        realm = 0.8 if "crypted" in self.function else 0.4 if self.how.kind == "nothing" else 0.05
        around = around_of(world, rng, realm)
        args, area, focus = maker.call(around.settings)
        return Case(args, maker.tree(focus), replace(around, area=area))

    def run(self, world: World, case: Case) -> Checked:
        """The case on the model and on the real function."""
        world.load(case.tree)
        kernel = case.around.apply_to(world.kernel())
        predicted = world.predicted(kernel, lambda: self._model(kernel, case))
        arranger = Arranger.of(world)
        arranger.arrange(case.around)
        result = world.call(self.function, *self._real_args(world, case), blocks=self._blocks(world, case, predicted))
        value = result.value & 1 if self.function in BOOLEAN else None
        real = world.real(result, value=value)
        return Checked(predicted, real, frozenset(self._rows(world, case, predicted)))

    def _model(self, kernel: Kernel, case: Case) -> int:
        return int(self.how.model(kernel, *case.args))

    def _real_args(self, world: World, case: Case) -> tuple[int, ...]:
        args = (*case.args, *self.how.more)
        if self.how.page:
            args = (world.machine.struct_page(args[0]), *args[1:])
        return tuple(arg & U64 for arg in args)

    def _blocks(self, world: World, case: Case, predicted: Outcome) -> int | None:
        """Only a call that may have no end has a budget: counting blocks costs more than most calls."""
        unaligned = bool(case.args) and not self.how.page and case.args[0] % world.plan.page_size
        return BLOCKS if predicted.stop or (unaligned and not world.own.walks) else None

    def _rows(self, world: World, case: Case, predicted: Outcome) -> Iterator[str]:
        yield from (name for name, seen in ROWS.items() if seen(case, predicted))

    def rows(self, world: World) -> frozenset[str]:
        """What cases of this function can show."""
        if "crypted" in self.function and not world.own.knows_realms:
            return ALWAYS | {"WARN"}
        rows = ALWAYS | REACHED.get(self.function, REACHED_BY_KIND[self.how.kind])
        if "crypted" in self.function:
            rows |= {"monitor"}
        if world.own.flush_rounds and "TLBI of all" in rows:
            rows |= {"TLBI by range"}
        splits = requires_bbml(world.image) and self.function not in UNSPLIT
        return rows | {"-EBUSY", "-ENOMEM", "mutex"} if splits else rows

    def smaller(self, case: Case) -> Iterator[Case]:
        """The same with fewer words."""
        yield from (replace(case, tree=tree) for tree in case.tree.smaller())


ROWS: dict[str, Callable[[Case, Outcome], bool]] = {
    "returns 0": lambda case, out: out.value == 0 and not out.stop,
    "-EINVAL": lambda case, out: out.value == -22,
    "-ENOMEM": lambda case, out: out.value == -12,
    "-EBUSY": lambda case, out: out.value == -16,
    "WARN": lambda case, out: any(isinstance(e, Warn) for e in out.events),
    "entries written": lambda case, out: any(isinstance(e, Write) for e in out.events),
    "TLBI by page": lambda case, out: any(isinstance(e, Tlbi) and e.operand for e in out.events),
    "TLBI by range": lambda case, out: any(isinstance(e, Tlbi) and e.operation.startswith("R") for e in out.events),
    "TLBI of all": lambda case, out: any(isinstance(e, Tlbi) and not e.operand for e in out.events),
    "ISB": lambda case, out: Barrier("isb") in out.events,
    "mutex": lambda case, out: Called("mutex_lock") in out.events,
    "vm_unmap_aliases": lambda case, out: Called("vm_unmap_aliases") in out.events,
    "monitor": lambda case, out: any(isinstance(e, Called) and e.name.startswith("rsi_") for e in out.events),
    "in an interrupt": lambda case, out: case.around.context is not Context.TASK,
    "no end": lambda case, out: out.stop == RUNAWAY,
}
# What random cases must reach, besides what only a kernel that splits or knows realms has.
ALWAYS = frozenset({"returns 0", "in an interrupt"})
_CHANGED = frozenset({"-EINVAL", "WARN", "entries written", "ISB"})
REACHED_BY_KIND: dict[str, frozenset[str]] = {
    "area": _CHANGED | {"TLBI by page", "vm_unmap_aliases"},
    "area masks": _CHANGED | {"TLBI by page", "vm_unmap_aliases"},
    "range enable": _CHANGED | {"TLBI by page", "TLBI of all"},
    "bytes masks": _CHANGED | {"TLBI by page", "TLBI of all"},
    "linear": _CHANGED | {"TLBI by page", "TLBI of all"},
    "page": _CHANGED,
    "page range": _CHANGED | {"TLBI by page"},
    "ends": _CHANGED - {"WARN"},
    "nothing": frozenset(),
}
REACHED: dict[str, frozenset[str]] = {
    "update_range_prot": _CHANGED,
    "kernel_page_present": frozenset(),
    "set_direct_map_invalid_noflush": _CHANGED - {"ISB"},
}
UNSPLIT = frozenset({"range_split_to_ptes", "kernel_page_present", "can_set_direct_map"})

HARNESSES: tuple[PageattrHarness, ...] = tuple(PageattrHarness(name) for name in FUNCTIONS)
