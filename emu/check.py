"""A kernel function run for real, against what kernel_model said it would do.

Rules of this file:
- The prediction is made first, on a copy of the same memory, by code that has not seen the machine run.
- A `Case` says how the tables are prepared and which call is made; nothing else differs between cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from emu import coldboot, snippets
from emu.image import KernelImage
from kernel_model import mm, pageattr
from kernel_model.compare import RUNAWAY, Difference, Outcome, Word, compare
from kernel_model.levels import Levels
from kernel_model.mm import Barrier, Event, Kernel, Tlbi, Warn, Write
from kernel_model.names import Bits
from kernel_model.pagewalk import MmWalk, MmWalkOps, walk_pgd_range
from kernel_model.variants import Variant, by_name, detect
from pgtable.build import MapError, TableBuilder
from pgtable.memory import Mark, difference

if TYPE_CHECKING:
    from emu.machine import CallResult, Machine
    from emu.machine import Warn as RealWarn


@dataclass(frozen=True)
class Call:
    """A call of set_memory_valid."""

    addr: int
    numpages: int
    enable: int
    function: str = "set_memory_valid"

    def __str__(self) -> str:
        return f"{self.function}({self.addr:#018x}, {self.numpages}, {self.enable})"


Prepare = Callable[[TableBuilder, coldboot.Plan], Call]


@dataclass(frozen=True)
class Case:
    """One check: `prepare` maps what it needs and says what to call. `blocks`: the budget of a call without an end."""

    name: str
    prepare: Prepare
    ng: bool = False
    blocks: int | None = None


class Subject(Protocol):
    """What is checked: a kernel, or the snippet that stands in for one."""

    name: str
    release: str

    def variant(self) -> Variant:
        """The model's row for it."""
        ...

    def levels(self, plan: coldboot.Plan) -> Levels:
        """Its levels of tables."""
        ...

    def thaw(self, *, ng: bool) -> coldboot.SetUp:
        """A fresh set-up, before anything ran."""
        ...

    def machine(self, *, ng: bool) -> Machine:
        """A machine to run it on."""
        ...

    def call(self, machine: Machine, call: Call, *, blocks: int | None) -> CallResult:
        """The real call, its events in order."""
        ...


class KernelSubject:
    """A kernel image."""

    def __init__(self, image: KernelImage) -> None:
        self.image, self.name, self.release = image, image.name, image.release

    def variant(self) -> Variant:
        """By what is in the image."""
        return detect(self.image.symbols, self.image.btf.has)

    def levels(self, plan: coldboot.Plan) -> Levels:
        """From the image's layout and the VA bits of this run."""
        layout = self.image.layout
        return Levels(layout.page_shift, layout.levels, layout.va_bits, plan.va_bits)

    def thaw(self, *, ng: bool) -> coldboot.SetUp:
        """A cold boot."""
        return coldboot.template(self.image, ng=ng).thaw()

    def machine(self, *, ng: bool) -> Machine:
        """A cold machine whose page allocator is a stub."""
        from emu.machine import Machine

        machine = Machine.boot(self.image, ng=ng)
        stub_allocator(machine)
        return machine

    def call(self, machine: Machine, call: Call, *, blocks: int | None) -> CallResult:
        """By the function's name."""
        return machine.call(call.function, call.addr, call.numpages, call.enable, record="order", blocks=blocks)


class SnippetSubject:
    """Our own set_memory_valid, for a machine without a kernel: 6.1's design on four levels of 4K tables."""

    name = release = "embedded snippet"

    def variant(self) -> Variant:
        """The snippet does what 6.1 does."""
        return by_name("6.1")

    def levels(self, plan: coldboot.Plan) -> Levels:
        """Four levels, 48 bits."""
        return Levels(12, 4, 48, plan.va_bits)

    def thaw(self, *, ng: bool) -> coldboot.SetUp:
        """A machine without a kernel, as Machine.bare makes it."""
        return coldboot.bare_template().thaw()

    def machine(self, *, ng: bool) -> Machine:
        """The same as a machine."""
        from emu.machine import Machine

        return Machine.bare()

    def call(self, machine: Machine, call: Call, *, blocks: int | None) -> CallResult:
        """Run from the code page."""
        code = bytes(snippets.load("set_memory_valid"))
        return machine.run(code, call.addr, call.numpages, call.enable, record="order", blocks=blocks)


@dataclass(frozen=True)
class Report:
    """A finished check."""

    kernel: str
    release: str
    variant: str
    call: Call
    predicted: Outcome
    real: Outcome
    result: CallResult
    walk: tuple[str, ...]
    differences: tuple[Difference, ...]


def run_case(subject: Subject | KernelImage, case: Case, variant: Variant | None = None) -> Report:
    """Predicts a case, runs it, compares. `variant`: the model to use, by default the one the kernel asks for."""
    subject = KernelSubject(subject) if isinstance(subject, KernelImage) else subject
    variant = variant or subject.variant()
    made = subject.thaw(ng=case.ng)
    call = case.prepare(made.tables, made.plan)
    kernel = kernel_of(subject.levels(made.plan), made, variant, ng=case.ng, steps=abs(call.numpages))
    walk = walk_lines(kernel, call.addr, call.numpages)
    predicted = predict(kernel, made, call)

    machine = subject.machine(ng=case.ng)  # the engine is loaded only now, after the prediction
    case.prepare(machine.tables, machine.plan)
    result = subject.call(machine, call, blocks=case.blocks)
    real = observed(result)
    differences = tuple(compare(predicted, real, made.tables.fmt.layout))
    return Report(subject.name, subject.release, variant.name, call, predicted, real, result, walk, differences)


STEP_LIMIT = 100_000  # loop iterations of the model, besides those of the pages asked for


def kernel_of(levels: Levels, made: coldboot.SetUp, variant: Variant, *, ng: bool = False, steps: int = 0) -> Kernel:
    """The model's kernel over a copy of the machine's memory."""
    plan = made.plan
    bits = Bits.of(made.tables.fmt, variant, ng_mappings=ng)
    given = iter(range(plan.pages[0], sum(plan.pages), plan.page_size))
    flags = made.tables.fmt.table(2).pack(UXNTable=1, AF=int(variant.walks))
    return Kernel(
        made.memory,
        made.tables.root,
        levels,
        bits,
        allocate=lambda: next(given, None),
        table_flags=flags,
        step_limit=STEP_LIMIT + 4 * steps,
    )


def predict(kernel: Kernel, made: coldboot.SetUp, call: Call) -> Outcome:
    """What the model says the call does; `made.memory`, which is the kernel's, is left as the model leaves it."""
    ranges = [made.tables.used, made.plan.pages]
    mark = made.memory.mark(ranges)
    stop, value, cut = "", 0, False
    try:
        value = pageattr.set_memory_valid(kernel, call.addr, call.numpages, call.enable)
    except (mm.Runaway, LookupError) as error:
        stop, cut = RUNAWAY, isinstance(error, mm.Runaway)
    words = _words(mark, made.memory.mark(ranges), made)
    return Outcome(value, words, tuple(kernel.events), stop, cut)


def _words(before: Mark, after: Mark, made: coldboot.SetUp) -> dict[int, Word]:
    """Changed descriptors with their place in the tree as it is afterwards."""
    from emu.changes import Changes

    if not len(difference(before, after).pa):
        return {}
    changes = Changes(before, after, made.tables.fmt, made.registers)
    return {c.pa: Word(c.va, c.level, c.pa, c.old, c.new) for c in changes}


def observed(result: CallResult) -> Outcome:
    """The outcome of a real call."""
    words = {c.pa: Word(c.va, c.level, c.pa, c.old, c.new) for c in result.changes}
    events: list[Event] = [e for e in (_event(e) for e in result.events or ()) if e is not None]
    events += [observed_warning(w) for w in result.warnings]
    kind = result.stop.kind if result.stop else ""
    stop = RUNAWAY if kind in ("budget", "timeout", "fault") else kind and "stopped"
    return Outcome(result.signed, words, tuple(events), stop, cut=kind in ("budget", "timeout"))


def observed_warning(warn: RealWarn) -> Warn:
    """A WARN by the function that has it, without what the compiler put behind its name (.part.0, .isra.0, .cold)."""
    return Warn(warn.site.partition("+")[0].partition(".")[0])


def _event(event: Any) -> Event | None:
    """A recorded event in the model's terms; None for a DMB, which says nothing to the walker."""
    from emu import trace

    if isinstance(event, trace.Maintenance):
        return Tlbi(event.operation, event.operand)
    if isinstance(event, trace.Barrier):
        return None if event.name.startswith("dmb") else Barrier(event.name)
    return Write(event.pa, event.value)


# The page allocator's entry points, by the names they had: what a cold machine has no memory for.
ALLOCATORS = ("__alloc_pages", "__alloc_pages_noprof", "alloc_pages_noprof")
STATISTICS = ("__mod_lruvec_page_state", "__lruvec_stat_mod_folio")


def stub_allocator(machine: Machine) -> None:
    """Gives the page allocator pages from the machine's pool, and stubs the statistics of page tables."""
    assert machine.image
    for name in ALLOCATORS:
        if name in machine.image.symbols:
            machine.stub(name, _allocate)
    for name in STATISTICS:
        if name in machine.image.symbols:
            machine.stub(name, lambda _: 0)


def _allocate(machine: Machine) -> int:
    return machine.struct_page(machine.give_page())


def walk_lines(kernel: Kernel, addr: int, numpages: int) -> tuple[str, ...]:
    """What a walk of the range sees, callback by callback."""
    lines: list[str] = []

    def entry(name: str) -> Callable[[int, int, int, MmWalk], int]:
        def seen(pa: int, start: int, end: int, walk: MmWalk) -> int:
            lines.append(f"{name} [{start:#018x}, {end:#018x}) {kernel.read(pa):#018x}")
            return 0

        return seen

    def hole(start: int, end: int, depth: int, walk: MmWalk) -> int:
        lines.append(f"hole [{start:#018x}, {end:#018x}) depth {depth}")
        return 0

    ops = MmWalkOps(entry("pgd"), entry("p4d"), entry("pud"), entry("pmd"), entry("pte"), hole)
    end = addr + numpages * kernel.levels.page_size
    if numpages > 0:
        copy = Kernel(kernel.memory, kernel.pgd, kernel.levels, kernel.bits, step_limit=1_000_000)
        walk_pgd_range(addr & -kernel.levels.page_size, end & -kernel.levels.page_size, MmWalk(copy, ops))
    return tuple(lines)


def linear_pages(pages: int, enable: int, *, keeps_present: bool = False) -> Case:
    """The main job: `pages` pages of the linear map, invalid beforehand if they are to be made valid.

    `keeps_present`: invalid pages are marked present-invalid (nG), as a 7.x kernel leaves them.
    """

    def prepare(tables: TableBuilder, plan: coldboot.Plan) -> Call:
        va = plan.linear_va(plan.ram[0] + plan.ram[1] // 2)
        room = (plan.pool[0] - plan.linear_pa(va)) // plan.page_size
        if pages > room:  # the kernel reaches its tables by the linear map
            raise MapError(f"{pages} pages: only {room} lie between {va:#x} and the tables of the linear map")
        if enable and pages:
            tables.protect(va, pages * plan.page_size, VALID=0, nG=int(keeps_present))
        return Call(va, pages, enable)

    return Case("linear map", prepare)


def main_job(subject: Subject, pages: int, enable: int | None = None, variant: Variant | None = None) -> list[Report]:
    """The main job: invalid, then valid again (or only `enable`), each call on its own machine."""
    keeps = subject.variant().invalid_keeps_present
    wanted = (0, 1) if enable is None else (enable,)
    return [run_case(subject, linear_pages(pages, each, keeps_present=keeps), variant) for each in wanted]
