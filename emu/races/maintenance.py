"""Races in which the checkers of TLB maintenance are told of everything: splits, ptdump, wrong TLBIs, set_memory_*.

Sources: Arm ARM D8.17 (break-before-make, FEAT_BBM), arch/arm64/mm/mmu.c (split_pmd), mm/ptdump.c, mm/vmalloc.c,
arch/arm64/mm/pageattr.c.
"""

from __future__ import annotations

from collections.abc import Mapping

from emu import scenarios
from emu.coldboot import protections
from emu.machine import Machine
from emu.race import Actor, Call, Race, Scene, Step
from emu.races.parts import (
    DBM,
    GFP_KERNEL,
    RDONLY,
    TEST,
    ScenarioError,
    change,
    freeing,
    give_pages,
    lock,
    symbols_of,
    vmap_huge,
    walk_call,
)
from emu.warm import WarmMachine
from pgtable import Access
from pgtable.descriptors import LAST_LEVEL
from pgtable.registers import TTBR
from pgtable.tlb import Policy
from pgtable.tlbi import operand_for

# Programs of bad-tlbi: X0 the VA of a PTE, X1 TLBI's operand, X2 the new descriptor.
_CLEAR, _STORE, _RET = 0xF900001F, 0xF9000002, 0xD65F03C0  # str xzr, [x0]; str x2, [x0]; ret
_DSB_ISHST, _DSB_ISH, _ISB = 0xD5033A9F, 0xD5033B9F, 0xD5033FDF
_VALE1IS = 0xD50883A1  # tlbi vale1is, x1
_BREAK = (_CLEAR, _DSB_ISHST, _VALE1IS, _DSB_ISH, _ISB)
_MAKE = (_STORE, _DSB_ISHST, _ISB, _RET)
PROGRAMS = {
    "nothing": (*_BREAK, *_MAKE),
    "asid": (*_BREAK, *_MAKE),
    "tlbi": (_CLEAR, _DSB_ISHST, _ISB, *_MAKE),
    "dsb": (_CLEAR, _DSB_ISHST, _VALE1IS, *_MAKE),
    "early": (_VALE1IS, _DSB_ISH, _CLEAR, _DSB_ISHST, _ISB, *_MAKE),
}


def _reader(va: int, *, faults: bool = False) -> Actor:
    """A CPU that loads from `va`; `faults`: a fault is a finding."""

    def load(scene: Scene) -> None:
        found = scene.access(va, Access.read(el=1))
        if faults and found.fault:
            scene.note("fault", f"a load from {va:#x} meets a {found.fault}")

    return Actor("read", (Step(f"load from {va:#x}", load),))


# split-walk


def split_walk(machine: Machine, options: Mapping[str, str]) -> Race:
    """A block of kernel memory becomes a table of pages; a walk and a load go on meanwhile."""
    how, flush, bbm = options["how"], options["flush"] == "yes", int(options["bbm"])
    give_pages(machine)
    plan, tables = machine.plan, machine.tables
    va, level = scenarios.test_va(plan), LAST_LEVEL - 1
    size = tables.granule.level_size(level)
    pa = -(-scenarios.TEST_PA // size) * size
    tables.map(va, pa, size, level=level, template=protections(tables.fmt).kernel)
    block = machine.translate(va).steps[-1]
    work: tuple[Call | Step, ...]
    if how == "kernel":
        work = _kernel_split(machine, block.pa, block.word)
    else:
        new = _table_of_pages(machine, block.word)
        work = _split(va, block.pa, new, breaks=how == "break", flush=flush)
    take, give = lock(machine, "read")
    walk = walk_call(machine, va, va + 2 * plan.page_size, hole=True)
    walker = Actor("walk", (*take, walk, *give, Step("saw", _holes)))
    actors = (Actor("split", work), walker, _reader(va, faults=True))
    watch = [(block.pa & -plan.page_size, plan.page_size)]
    quiet = ("barrier",) if how == "kernel" else ()  # of every PTE that it makes
    return Race(machine, actors, watch, mode=options["mode"], serial=False, judge=Policy(), bbm=bbm, quiet=quiet)


def _holes(scene: Scene) -> None:
    if any(scene.results):
        scene.note("hole", "a walk finds no mapping where there is one at all times")


def _table_of_pages(machine: Machine, block: int) -> int:
    """A descriptor of a new table that translates as the block does."""
    fmt = machine.tables.fmt
    page, leaf = machine.plan.page_size, fmt.leaf(LAST_LEVEL - 1)["OA"]
    table = machine.give_page()
    for i in range(page // 8):
        oa = leaf.get(block) + i * page
        machine.memory.store(table + 8 * i, fmt.leaf(LAST_LEVEL)["OA"].put(block & ~leaf.mask | 3, oa))
    return fmt.table(LAST_LEVEL - 1)["TA"].put(3, table)


def _split(va: int, pa: int, new: int, *, breaks: bool, flush: bool) -> tuple[Step, ...]:
    """Steps, each of them one instruction to the others."""

    def clear(scene: Scene) -> None:
        scene.store(pa, 0)
        scene.barrier("dsb ishst")

    def invalidate(scene: Scene) -> None:
        scene.tlbi("vaae1is", va)
        scene.barrier("dsb ish")
        scene.barrier("isb")

    def make(scene: Scene) -> None:
        scene.store(pa, new)
        scene.barrier("dsb ishst")
        scene.barrier("isb")

    broken = (Step("break", clear),) if breaks else ()
    flushed = (Step("TLBI", invalidate),) if flush else ()
    done = Step("return", Scene.returns)
    return (*broken, *flushed, Step("make", make), done) if breaks else (Step("make", make), *flushed, done)


def _kernel_split(machine: Machine, pa: int, block: int) -> tuple[Call, ...]:
    if "split_pmd" not in symbols_of(machine):
        assert machine.image
        raise ScenarioError(f"{machine.image.name} has no split_pmd: take how=break or how=direct")
    return (Call("split_pmd", (machine.plan.linear_va(pa), block, GFP_KERNEL, 0)),)


# ptdump-vmalloc


def ptdump_vmalloc(machine: Machine, options: Mapping[str, str]) -> Race:
    """The kernel's dump of two blocks of the vmalloc space, with the locks that it takes, while vmalloc works there."""
    give_pages(machine)
    plan, tables = machine.plan, machine.tables
    va = scenarios.test_va(plan)
    prot = protections(tables.fmt).kernel
    if options["by"] == "huge":
        va, work = vmap_huge(machine)
    else:
        tables.place(va, LAST_LEVEL, 0)
        if options["by"] == "unmap":
            tables.map(va, scenarios.TEST_PA, plan.page_size, level=LAST_LEVEL, template=prot)
            work = (Call("vunmap_range", (va, va + plan.page_size)),)
        else:
            shift = plan.page_size.bit_length() - 1
            work = (Call("vmap_range_noflush", (va, va + plan.page_size, scenarios.TEST_PA, prot | 3, shift)),)
    dump = Actor("ptdump", (_ptdump_call(machine, va, va + plan.page_size),))
    watch = [(step.pa, 8) for step in machine.translate(va).steps]
    freed = freeing(machine)
    actors = (dump, Actor("vmalloc", work))
    quiet = ("barrier", "tlbi") if options["by"] == "huge" else ()  # of a flush, page by page
    return Race(machine, actors, watch, mode=options["mode"], serial=False, frees=freed, judge=Policy(), quiet=quiet)


def _ptdump_call(machine: Machine, start: int, end: int) -> Call:
    """ptdump_walk_pgd() of one range of init_mm, whose callbacks do nothing."""
    assert machine.image
    btf, plan, init_mm = machine.image.btf, machine.plan, machine.symbol("init_mm")
    machine.memory.write(plan.code_pa, _RET.to_bytes(4, "little"))
    state, ranges = plan.spare, plan.spare + 0x100
    first = btf.offset("ptdump_state", "range")  # what comes before it are callbacks
    machine.write(state, plan.code.to_bytes(8, "little") * (first // 8) + ranges.to_bytes(8, "little"))
    machine.write(ranges, start.to_bytes(8, "little") + end.to_bytes(8, "little") + bytes(16))
    pgd = machine.word_at(init_mm + btf.offset("mm_struct", "pgd"), 8)
    return Call("ptdump_walk_pgd", (state, init_mm, pgd))


# bad-tlbi


def bad_tlbi(machine: Machine, options: Mapping[str, str]) -> Race:
    """A page that is not global moves to another PA; the program is one of PROGRAMS, run for real."""
    plan = machine.plan
    va = plan.linear + TEST
    page = machine.tables.fmt.leaf(LAST_LEVEL)
    step = machine.translate(va).steps[-1]
    old = page["nG"].put(step.word, 1)
    machine.memory.store(step.pa, old)
    code = b"".join(word.to_bytes(4, "little") for word in PROGRAMS[options["wrong"]])
    machine.memory.write(plan.code_pa, code)
    asid = TTBR["ASID"].get(machine.registers().TTBR0_EL1) ^ (options["wrong"] == "asid")
    operand = operand_for("vale1is", va, asid=asid)
    new = page["OA"].put(old, page["OA"].get(old) + plan.page_size)
    program = Actor("move", (Call(plan.code, (plan.linear_va(step.pa), operand, new)),))
    watch = [(step.pa, 8)]
    return Race(machine, (program, _reader(va)), watch, mode=options["mode"], serial=False, judge=Policy())


# set-memory-bbm


def set_memory_bbm(machine: Machine, options: Mapping[str, str]) -> Race:
    """One CPU goes through the functions that change permissions of kernel memory, another reads the page."""
    page = machine.plan.page_size
    if isinstance(machine, WarmMachine):
        va = machine.call("vmalloc", 2 * page).ok().value
        watch = [va, machine.plan.linear_va(machine.translate(va).pa)]
        names = ("set_memory_ro", "set_memory_x", "set_memory_nx", "set_memory_rw")
        calls = [Call(name, (va, 2)) for name in names]
        calls += [Call("set_memory_valid", (watch[1], 1, on)) for on in (0, 1)]
        struct = machine.call("vmalloc_to_page", va).ok().value
    else:
        va = machine.plan.linear + TEST
        watch = [va]
        calls = [Call("set_memory_valid", (va, 2, on)) for on in (0, 1)]
        flushes = "__change_memory_common" in symbols_of(machine)  # of 7.3's update_range_prot the caller does
        for masks in ((RDONLY, DBM), (DBM, RDONLY)) if flushes else ():
            calls += [work for work in change(machine, "A", va, 2, *masks).work if isinstance(work, Call)]
        struct = machine.struct_page(machine.translate(va).pa)
    if options["noflush"] == "yes":
        both = ("set_direct_map_invalid_noflush", "set_direct_map_default_noflush")
        calls = [Call(name, (struct,)) for name in both]
    actors = (Actor("A", tuple(calls)), _reader(watch[-1]))
    return Race(machine, actors, watch, mode=options["mode"], serial=False, judge=Policy())
