"""A machine that runs arm64 code on tables: a kernel's functions by name, or a snippet.

    m = Machine.boot(KernelImage.load("debian:6.12"))
    r = m.call("set_memory_valid", m.plan.linear_va(pa), 4, 0)

Rules of this file:
- `call` and `run` never raise for what the guest does: a fault, a BUG or a budget ends up in `CallResult.stop`.
- The guest's TLB is Unicorn's. A descriptor that the guest changed without TLBI may still be used in its old form, as
  on hardware; what Python changed between runs is seen at once.
- Nothing here knows what a kernel function ought to do: that is kernel_model's.
What code sees of a machine is in emu.view, what happens while it runs in emu.hooks, what a call gives in emu.calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Self

from emu import coldboot, engine
from emu.calls import TIMEOUT, Budget, CallResult, State, Warn
from emu.changes import Changes, KnownTables
from emu.engine import End, Ended
from emu.exceptions import Stop
from emu.hooks import Hooked, Running
from emu.image import KernelImage
from emu.mmu import LATER
from emu.tracing import Trace
from pgtable import CPUS, Features, Granule, Registers
from pgtable.memory import Mark, Pages

__all__ = ["TIMEOUT", "CallResult", "Machine", "State", "Warn"]

SVC = (0xD4000001).to_bytes(4, "little")  # svc #0


class Machine(Hooked):
    """One CPU, physical memory and the kernel's tables. Made by `boot` (a kernel) or `bare` (snippets)."""

    def __init__(
        self,
        made: coldboot.SetUp,
        image: KernelImage | None = None,
        *,
        features: Features | None = None,
        vectors: bool | None = None,
    ) -> None:
        super().__init__(made, image, features, vectors)
        self.stubs: dict[int, Callable[[Machine], int | None]] = {}
        self._known: Mark | None = None  # table words when the guest last ran
        self._known_tables = KnownTables(self.tables.fmt)
        self._start(made.registers)

    @classmethod
    def boot(
        cls,
        image: KernelImage | str,
        *,
        ram: int = coldboot.RAM_SIZE,
        va_bits: int | None = None,
        ng: bool = False,
        mmu: str = "cpu",
        cpu: str | None = None,
        vectors: bool | None = None,
        trace: Trace | None = None,
    ) -> Machine:
        """A machine with a kernel in memory and nothing run; see emu.coldboot. `ng`: arm64_use_ng_mappings is 1.

        `mmu`: "cpu" is Unicorn's own MMU; "model" is pgtable's walk, with the features of `cpu` (a name in
        pgtable.CPUS, default "max"), for LPA2 (`va_bits=52`), hardware AF and dirty state, PIE. It also takes
        exceptions to VBAR_EL1's vectors: always or never by `vectors`, by default once VBAR_EL1 is set.
        `trace`: see `attach`.
        Raises BootError, or ImageError for a kernel that cannot be loaded.
        """
        image = KernelImage.load(image) if isinstance(image, str) else image
        features = _features(mmu, cpu, vectors)
        cold = coldboot.template(image, ram=ram, va_bits=va_bits, ng=ng, features=features or coldboot.UNICORN)
        made = cold.thaw()
        if cold not in _STRUCT_PAGES:
            _STRUCT_PAGES[cold] = _struct_pages(cls(cold.thaw(), image, features=features), made)
        if found := _STRUCT_PAGES[cold]:
            made.memory.rewind(found.tables)
            made = replace(made, struct_pages=found.first)
        machine = cls(made, image, features=features, vectors=vectors)
        return machine.attach(trace)

    @classmethod
    def bare(
        cls,
        *,
        ram: int = coldboot.BARE_RAM,
        granule: Granule = Granule.K4,
        va_bits: int = 48,
        mmu: str = "cpu",
        cpu: str | None = None,
        vectors: bool | None = None,
        trace: Trace | None = None,
    ) -> Machine:
        """A machine without a kernel, for snippets: RAM, a linear map, a window with a stack; see emu.coldboot.

        `mmu`, `cpu`, `vectors`, `trace`: see `boot`.
        """
        features = _features(mmu, cpu, vectors)
        made = coldboot.bare_template(ram, granule, va_bits, features or coldboot.UNICORN).thaw()
        return cls(made, features=features, vectors=vectors).attach(trace)

    def _start(self, regs: Registers) -> None:
        for name in ("MAIR_EL1", "TCR_EL1", "TTBR0_EL1", "TTBR1_EL1"):
            self.cpu[name] = regs[name]
        self.cpu["SP_EL0"] = self.plan.task
        self.cpu["TPIDR_EL1"] = 0
        self.cpu["SCTLR_EL1"] = regs.SCTLR_EL1
        self.cpu.set_el(1)
        self.cpu.on_interrupt(self._interrupt)
        self.cpu.on_system(self._system)
        if self.mmu:
            self.cpu.on_refusal(self._refused)

    def attach(self, trace: Trace | None) -> Self:
        """From now on `trace` is told of every change of tables, TLB maintenance, barrier, register and exception of
        this machine and of the CPUs that share its memory; once in its life. Returns the machine."""
        if trace is None:
            return self
        if self.trace is not None:
            raise ValueError("this machine has a trace: make another machine for another one")
        everyone: list[Machine] = [self, *self.siblings]
        for machine in everyone:
            machine.trace = trace.tap(machine)
        return self

    def follow(self, pa: int, size: int) -> None:
        """From a hook of a traced run: stores to a page that has become a table are table writes."""
        self._order.follow(pa, size)

    def on_table_event(self, callback: Callable[[object], None] | None) -> None:
        """`callback(event)` of emu.trace at once, of runs that record the order."""
        self._order.on_event = callback

    # running

    def call(
        self,
        function: str | int,
        *args: int,
        timeout: float | None = TIMEOUT,
        blocks: int | None = None,
        record: str = "changes",
    ) -> CallResult:
        """Calls a kernel function (name or address) with up to eight integer arguments, under AAPCS64.

        `timeout`: seconds of CPU time; `blocks`: basic blocks it may run (costs a hook, some 0.5 us a block).
        `record`: "changes" or "order" (also barriers and table writes, in order; 5 to 8 us each), "nothing", or
        "events": the order without a comparison, for many calls on tables that only the guest changes (see `watch`).
        Raises SymbolError for a name that is not there or not one.
        """
        return self._record(self.prepare(function, *args), self.plan.landing, timeout, blocks, record)

    def prepare(self, function: str | int, *args: int) -> int:
        """Sets registers and stack for a call and runs nothing. The address to run from, until `plan.landing`."""
        if len(args) > 8:
            raise ValueError(f"{len(args)} arguments: a call passes at most 8 in registers")
        address = self.symbol(function)
        for i, value in enumerate(args):
            self.cpu.write(engine.X[i], value)
        self.cpu.write(engine.SP, self.plan.stack)
        self.cpu.write(engine.FP, 0)
        self.cpu.write(engine.LR, self.plan.landing)
        return address

    def proceed(self, pc: int, timeout: float | None = TIMEOUT) -> tuple[Ended, Stop | None]:
        """Goes on with a prepared call from `pc` until a hook stops it or it ends; why it stopped, if not by a hook."""
        self._now = Running(home=self.plan.landing)
        if self.mmu:
            self.mmu.begin()
        ended = self.cpu.run(pc, self.plan.landing, timeout)
        if self._now.stop or ended.end is End.STOPPED or ended.pc == self.plan.landing:
            return ended, self._now.stop
        return ended, self._stop_for(ended, None)

    @property
    def warnings(self) -> tuple[Warn, ...]:
        """The WARNs since the last `proceed`."""
        return tuple(self._now.warnings)

    def stub(self, function: str | int, action: Callable[[Machine], int | None]) -> None:
        """Replaces a function: when it is called, `action(machine)` runs instead and gives X0 (None: left alone)."""
        address = self.symbol(function)
        if address not in self.stubs:
            self.cpu.on_code(self._stubbed, address, address)
            self.cpu.flush_code()
        self.stubs[address] = action

    def watch(self, tables: list[tuple[int, int]], on_event: Callable[[object], None]) -> None:
        """For many calls with record="events": writes to PA ranges `tables` count, hooks stay, nothing is flushed.

        `on_event(event)` is told at once of each TLBI, barrier and table write (emu.trace) and each Warn. The
        caller answers for code and the machine's own tables being left alone between calls.
        """
        self._order.keep(tables)
        self._order.on_event = self._on_warn = on_event

    def _stubbed(self, pc: int) -> bool:
        value = self.stubs[pc](self)
        if value is not None:
            self.cpu.write(engine.X[0], value)
        self.cpu.write(engine.PC, self.cpu.read(engine.LR))
        return True

    def _record(self, pc: int, until: int, timeout: float | None, blocks: int | None, record: str) -> CallResult:
        if record not in ("changes", "order", "nothing", "events"):
            raise ValueError(f"record={record!r}: must be 'changes', 'order', 'events' or 'nothing'")
        self._now = Running(home=self.cpu.read(engine.LR))
        if self.mmu:
            self.mmu.begin()
        found = self.trace.begin() if self.trace else 0
        before = self._mark() if record in ("changes", "order") else None
        if before is None and record == "nothing":
            self._known = None
            self.cpu.flush_tlb()
        budget = Budget(self.cpu, blocks) if blocks is not None else None
        try:
            if self.trace:
                ended = self._order.run(pc, until, timeout, self.trace.tables)
            elif record in ("order", "events"):
                ended = self._order.run(pc, until, timeout, self._table_ranges(whole=True))
            else:
                ended = self.cpu.run(pc, until, timeout)
        finally:
            if budget:
                budget.close()
        stop = self._now.stop or self._stop_for(ended, budget)
        if self.trace:
            self.trace.end(ended.pc, returned=stop is None)
        return CallResult(
            value=self.cpu.read(engine.X[0]),
            changes=self._changes(before) if before else Changes(_NOTHING, _NOTHING, self.tables.fmt, None),
            maintenance=tuple(self._now.maintenance),
            warnings=tuple(self._now.warnings),
            stop=stop,
            events=tuple(self._order.events) if record in ("order", "events") else None,
            x=() if record in ("events", "nothing") else tuple(self.cpu.general()),
            findings=self.trace.since(found) if self.trace else (),
            traced=self.trace is not None,
        )

    def run(
        self,
        code: bytes | Sequence[int],
        *args: int,
        el: int = 1,
        timeout: float | None = TIMEOUT,
        blocks: int | None = None,
        record: str = "changes",
    ) -> CallResult:
        """Runs a snippet (bytes, or instruction words) at EL1 or EL0, with X0 ... set to `args`.

        It starts in the code page of that EL (`plan.code`, or `plan.user_code` for EL0) with a stack, and ends where
        it ends, or by RET. Raises ValueError for code that does not fit its page.
        """
        if el not in (0, 1):
            raise ValueError(f"el {el}: a snippet runs at EL0 or EL1")
        data = bytes(code) if isinstance(code, bytes) else b"".join(word.to_bytes(4, "little") for word in code)
        limit = self.plan.page_size - 8
        if not data or len(data) % 4 or len(data) > limit:
            raise ValueError(f"snippet of {len(data)} bytes: must be whole instructions, at most {limit} bytes")
        start = self.plan.code if el else self.plan.user_code
        end = start + len(data)
        # Unicorn takes its end address for an undefined instruction at EL0: there the code ends in an SVC of ours.
        self._svc_end = None if el else end + 4
        page = data + (b"" if el else SVC)  # and zeros over what an earlier one left
        self.memory.write(self.plan.code_pa if el else self.plan.user_code_pa, page.ljust(self.plan.page_size, b"\0"))
        self.cpu.flush_code()
        self.cpu.set_el(el)
        self.cpu.write(engine.SP, self.plan.stack if el else self.plan.user_stack)
        self.cpu["SP_EL1"] = self.plan.stack  # of a handler
        for i in range(31):
            self.cpu.write(engine.X[i], args[i] if i < len(args) else 0)
        self.cpu.write(engine.LR, end)
        try:
            return self._record(start, end if el else end + 8, timeout, blocks, record)
        finally:
            self._svc_end = None
            self.cpu.set_el(1)
            self.cpu["SP_EL0"] = self.plan.task

    # state

    def save(self) -> State:
        """Memory and registers now, for `restore`."""
        system = tuple(self.cpu[name] for name in engine.SYSTEM)
        registers = (*self.cpu.general(), self.cpu.read(engine.SP), self.cpu.read(engine.PC))
        return State(
            self.memory.written(),
            registers,
            system,
            frozenset(self._warned),
            self._pages_given,
            self.tables.next_free,
            self.user.next_free,
            self.mmu.later() if self.mmu else (),
        )

    def restore(self, state: State) -> None:
        """Back to a saved state; views of memory stay valid."""
        self.memory.rewind(state.pages)
        self.cpu.flush_code()  # translated code may be of what was there
        for name, value in zip(engine.SYSTEM, state.system, strict=True):
            self.cpu[name] = value
        if self.mmu:
            for name, value in zip(LATER, state.later, strict=True):
                self.mmu[name] = value
        for register, value in zip((*engine.X, engine.SP, engine.PC), state.registers, strict=True):
            self.cpu.write(register, value)
        self._warned = set(state.warned)
        self._pages_given = state.pages_given
        self.tables.next_free, self.user.next_free = state.tables_used, state.user_used
        self._known = None

    def _table_ranges(self, *, whole: bool = False) -> list[tuple[int, int]]:
        """PA ranges that may hold tables: what the builders and the page pool have given out, or all of them."""
        pages = self.plan.pages
        given = pages[1] if whole else self.first._pages_given * self.plan.page_size
        return [self.tables.used, self.user.used, (pages[0], given)]

    def _mark(self) -> Mark:
        """The table words now; a change since the guest last ran was made by Python and is shown to the CPU."""
        mark = self.memory.mark([r for r in self._table_ranges() if r[1]])
        if self._known is None or not self._known.same_as(mark):
            self.cpu.flush_tlb()
        return mark

    def _changes(self, before: Mark) -> Changes:
        self._known = self.memory.mark([r for r in self._table_ranges() if r[1]])
        return Changes(before, self._known, self.tables.fmt, self.registers(), self._known_tables)


_NOTHING = Mark((), ())


def _features(mmu: str, cpu: str | None, vectors: bool | None) -> Features | None:
    """What the model MMU of a machine has, None for Unicorn's own; raises ValueError for names that are none."""
    if mmu == "cpu":
        if cpu not in (None, "unicorn") or vectors:
            raise ValueError('cpu and vectors are for mmu="model": Unicorn\'s MMU has its own features, no vectors')
        return None
    if mmu != "model":
        raise ValueError(f'mmu={mmu!r}: must be "cpu" or "model"')
    if cpu is not None and cpu not in CPUS:
        raise ValueError(f"cpu {cpu}: must be one of {', '.join(CPUS)}")
    return CPUS[cpu or "max"]


class _StructPages(NamedTuple):
    """The VA of the struct page of the first page of RAM, and the pages that differ once struct pages are mapped."""

    first: int
    tables: Pages


# Of each cold kernel of this process; None for an image that cannot say.
_STRUCT_PAGES: weakref.WeakKeyDictionary[coldboot.Template, _StructPages | None] = weakref.WeakKeyDictionary()


def _struct_pages(machine: Machine, made: coldboot.SetUp) -> _StructPages | None:
    """Where struct pages are; they are mapped in `made`, whose memory was not written before.

    It depends on the version, the VA bits and memstart_addr: the compiled vmalloc_to_page is asked, not a formula.
    """
    if machine.image is None or "vmalloc_to_page" not in machine.image.symbols:
        return None
    plan = machine.plan
    result = machine.call("vmalloc_to_page", plan.window)
    if result.stop or not result.value:
        return None
    first = result.value - (plan.window_pa - plan.ram[0]) // plan.page_size * coldboot.STRUCT_PAGE
    coldboot.map_struct_pages(made, first)
    return _StructPages(first, made.memory.written())
