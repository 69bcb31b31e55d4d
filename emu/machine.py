"""A machine that runs arm64 code on tables: a kernel's functions by name, or a snippet.

    m = Machine.boot(KernelImage.load("debian:6.12"))
    r = m.call("set_memory_valid", m.plan.linear_va(pa), 4, 0)

Rules of this file:
- `call` and `run` never raise for what the guest does: a fault, a BUG or a budget ends up in `CallResult.stop`.
- The guest's TLB is Unicorn's. A descriptor that the guest changed without TLBI may still be used in its old form, as
  on hardware; what Python changed between runs is seen at once.
- Nothing here knows what a kernel function ought to do: that is kernel_model's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from emu import coldboot, engine
from emu.changes import Changes
from emu.engine import Cpu, End, Ended, SystemInstruction
from emu.exceptions import Stop, Touch, disassemble, touches
from emu.image import KernelImage
from emu.mmu import LATER, ModelMmu
from emu.order import OrderRecorder
from emu.trace import Barrier, Event, Maintenance, tlbi_name
from emu.tracing import Tap, Trace
from emu.types import Types
from pgtable import CPUS, Access, AccessType, Features, Granule, NoMemory, PhysicalMemory, Registers, Walk, translate
from pgtable.memory import PAGE, Mark, Pages
from pgtable.tlb_events import Finding

_U64 = (1 << 64) - 1
BRK_WARN = 0xD4210000  # brk #0x800 (arch/arm64/include/asm/brk-imm.h, BUG_BRK_IMM)
SVC = (0xD4000001).to_bytes(4, "little")  # svc #0
TIMEOUT = 10.0  # seconds of CPU time that a call may take


class Warn(NamedTuple):
    """A WARN that the guest ran into: `site` is symbol+offset; `repeat`: a WARN_ON_ONCE that had fired before."""

    pc: int
    site: str
    file: str
    line: int
    once: bool
    repeat: bool

    def __str__(self) -> str:
        once = f" ({'again, ' if self.repeat else ''}once)" if self.once else ""
        return f"WARN at {self.site}, {self.file}:{self.line}{once}"


@dataclass(frozen=True)
class CallResult:
    """What a call did. `value` is X0 unsigned.

    `changes`: descriptors that differ, from a comparison. `maintenance`: TLBI in order. `events`: with
    record="order", TLBI, barriers and table writes in order. `stop`: None, or why it did not return. `x`: X0 to X30,
    () with record="events" or "nothing". `printed`: the messages of printk(), of a booted kernel. `findings`: of a
    traced machine (emu.tracing).
    """

    value: int
    changes: Changes
    maintenance: tuple[Maintenance, ...]
    warnings: tuple[Warn, ...]
    stop: Stop | None
    events: tuple[Event, ...] | None = None
    x: tuple[int, ...] = ()
    printed: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def signed(self) -> int:
        """X0 as a signed number: 64 bits, or a C int where the upper half is 0 (as the compiler leaves it)."""
        width = 32 if self.value >> 32 == 0 else 64
        return self.value - (1 << width) if self.value >> width - 1 else self.value

    @property
    def barriers(self) -> tuple[str, ...]:
        """Names of the barriers executed, in order; needs record="order"."""
        if self.events is None:
            raise ValueError('barriers are recorded with record="order"')
        return tuple(event.name for event in self.events if isinstance(event, Barrier))

    def ok(self) -> CallResult:
        """This result; raises RuntimeError if the call did not return."""
        if self.stop:
            raise RuntimeError(str(self.stop))
        return self


class State(NamedTuple):
    """A machine's memory and registers at one moment (`Machine.save`)."""

    pages: Pages
    registers: tuple[int, ...]
    system: tuple[int, ...]
    warned: frozenset[int]
    pages_given: int
    tables_used: int
    user_used: int
    later: tuple[int, ...] = ()  # registers of the model MMU that Unicorn's CPU has not
    context: object = None  # all of Unicorn's registers, of a booted kernel


@dataclass
class _Run:
    """What hooks collect while the guest runs."""

    maintenance: list[Maintenance] = field(default_factory=list)
    warnings: list[Warn] = field(default_factory=list)
    stop: Stop | None = None
    ended: bool = False  # by the SVC that ends a snippet at EL0
    home: int = 0  # where it returns to, which is no caller


class Machine:
    """One CPU, physical memory and the kernel's tables. Made by `boot` (a kernel) or `bare` (snippets).

    `memory`: PhysicalMemory. `tables`: the TableBuilder of the kernel's half. `plan`: where things are.
    """

    def __init__(
        self,
        made: coldboot.SetUp,
        image: KernelImage | None = None,
        *,
        features: Features | None = None,
        vectors: bool | None = None,
    ) -> None:
        self.memory: PhysicalMemory = made.memory
        self.plan = made.plan
        self.image = image
        self.tables = made.tables
        self.user = made.user
        self.cpu = Cpu(self.memory, page_size=self.plan.page_size)
        self.stubs: dict[int, Callable[[Machine], int | None]] = {}
        self._warned: set[int] = set()
        self._now = _Run()
        self._order = OrderRecorder(self.cpu, self.read)
        self._on_warn: Callable[[object], None] | None = None
        self._known: Mark | None = None  # table words when the guest last ran
        self.trace: Tap | None = None
        self.siblings: list[Machine] = []  # other CPUs on this memory (emu.cpus)
        self.first: Machine = self  # the one of them whose page pool is theirs
        self._pages_given = 0
        self._svc_end: int | None = None
        self._struct_pages = made.struct_pages
        self.mmu = ModelMmu(self.cpu, features, vectors=vectors) if features else None
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
        if cold not in _STRUCT_PAGES:
            _STRUCT_PAGES[cold] = _struct_pages(cls(cold.thaw(), image, features=features))
        made = cold.thaw()
        first = _STRUCT_PAGES[cold]
        mapped = made if first is None else coldboot.map_struct_pages(made, first)
        machine = cls(mapped, image, features=features, vectors=vectors)
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

    # what the guest sees

    def registers(self) -> Registers:
        """The registers of the translation regime as they are now, for `pgtable.translate`."""
        if self.mmu:
            return self.mmu.registers()
        names = ("TCR_EL1", "TTBR0_EL1", "TTBR1_EL1", "MAIR_EL1", "SCTLR_EL1")
        return Registers(CPUS["unicorn"], **{name: self.cpu[name] for name in names})

    def set_register(self, name: str, value: int) -> None:
        """Sets a system register by its name, as MSR and an ISB would; what the TLB holds is dropped.

        Raises ValueError for one that this machine has not.
        """
        if name in engine.SYSTEM:
            self.cpu[name] = value
        elif self.mmu and name in LATER:
            self.mmu[name] = value
        else:
            names = sorted({*engine.SYSTEM, *(LATER if self.mmu else ())})
            raise ValueError(f"register {name}: this machine has {', '.join(names)}")
        self.cpu.flush_tlb()

    def translate(self, va: int, access: Access | None = None) -> Walk:
        """What an access to `va` does with the tables and registers as they are now."""
        return translate(self.memory, self.registers(), va, access)

    def read(self, va: int, n: int) -> bytes:
        """`n` bytes at kernel address `va`, through the tables. Raises ValueError with the walk where it faults."""
        return b"".join(self.memory.read(pa, size) for pa, size in self._spans(va, n))

    def write(self, va: int, data: bytes) -> None:
        """Writes bytes at kernel address `va`, through the tables, whatever their permissions; also instructions."""
        done = 0
        if self.translate(va, Access.fetch(el=1)).ok:
            self.cpu.flush_code()
        for pa, size in list(self._spans(va, len(data))):
            self.memory.write(pa, data[done : done + size])
            done += size

    def word_at(self, va: int, size: int = 4) -> int:
        """The little-endian word at kernel address `va`."""
        return int.from_bytes(self.read(va, size), "little")

    def _spans(self, va: int, n: int) -> list[tuple[int, int]]:
        spans, end, page = [], va + n, self.plan.page_size
        while va < end:
            size = min(end - va, page - va % page)
            spans.append((self.translate(va, Access.read(el=1, pan=False)).pa, size))
            va += size
        return spans

    def symbol(self, name: str | int) -> int:
        """The address of a symbol, or of an address itself; raises SymbolError."""
        if isinstance(name, int):
            return name
        if self.image is None:
            raise ValueError(f"{name}: a machine without a kernel has no symbols")
        return self.image.symbols[name]

    @property
    def types(self) -> Types:
        """The kernel's C types, to read memory by: `types["vm_struct"].at(va)`. Raises BtfError without BTF."""
        if self.image is None:
            raise ValueError("a machine without a kernel has no types")
        return Types(self.image.btf, self.read, self.describe)

    def describe(self, pc: int) -> str:
        """`symbol+0x12`, or the address in hex."""
        if self.image is None or not self.image.base <= pc < self.image.base + self.image.size:
            return f"{pc:#x}"
        return self.image.symbols.describe(pc)

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
        self._now = _Run(home=self.plan.landing)
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

    def argument(self, n: int) -> int:
        """The value of Xn now: in a stub, argument n."""
        return self.cpu.read(engine.X[n])

    def _stubbed(self, pc: int) -> bool:
        value = self.stubs[pc](self)
        if value is not None:
            self.cpu.write(engine.X[0], value)
        self.cpu.write(engine.PC, self.cpu.read(engine.LR))
        return True

    def _record(self, pc: int, until: int, timeout: float | None, blocks: int | None, record: str) -> CallResult:
        if record not in ("changes", "order", "nothing", "events"):
            raise ValueError(f"record={record!r}: must be 'changes', 'order', 'events' or 'nothing'")
        self._now = _Run(home=self.cpu.read(engine.LR))
        if self.mmu:
            self.mmu.begin()
        found = self.trace.begin() if self.trace else 0
        before = self._mark() if record in ("changes", "order") else None
        if before is None and record == "nothing":
            self._known = None
            self.cpu.flush_tlb()
        budget = _Budget(self.cpu, blocks) if blocks is not None else None
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

    def give_page(self) -> int:
        """The PA of a zeroed page of RAM from the page pool, for stubs of the page allocator.

        Raises MemoryError when the pool is empty.
        """
        pa = self.plan.pages[0] + self.first._pages_given * self.plan.page_size
        if pa + self.plan.page_size > sum(self.plan.pages):
            raise MemoryError(f"page pool of {self.plan.pages[1]:#x} bytes is empty")
        self.first._pages_given += 1
        self.memory.words(pa, self.plan.page_size // 8)[:] = 0
        return pa

    def take_back(self) -> None:
        """The page pool is whole again: what give_page gave is forgotten."""
        self.first._pages_given = 0

    def struct_page(self, pa: int) -> int:
        """The kernel's struct page of a page of RAM, as its own vmalloc_to_page says. Raises ValueError without it."""
        if self._struct_pages is None:
            raise ValueError("this machine has no struct pages mapped")
        return self._struct_pages + (pa - self.plan.ram[0]) // self.plan.page_size * coldboot.STRUCT_PAGE

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
        return Changes(before, self._known, self.tables.fmt, self.registers())

    # what hooks do

    def _system(self, instruction: SystemInstruction) -> bool:
        _, op1, crn, crm, op2, rt = instruction
        name = tlbi_name(op1, crn, crm, op2)
        if name is not None:
            operand = self.cpu.read(engine.X[rt]) if rt < 31 else 0
            event = Maintenance(name, operand, self.cpu.read(engine.PC))
            self._now.maintenance.append(event)
            self._order.note(event)
            if self.siblings and event.broadcast:
                for other in self.siblings:
                    other.cpu.flush_tlb()
        return self.mmu is not None and self.mmu.system(instruction)

    def _interrupt(self, number: int) -> bool:
        pc = self.cpu.read(engine.PC)
        if self.trace:
            self.trace.synchronized(pc, "exception")
        if number == engine.SVC and pc == self._svc_end:
            self._now.ended = True
            return False
        if self.mmu and not (number == engine.BREAK and self._is_bug(pc)):
            behind = number in (engine.SVC, engine.HVC, engine.SMC)
            if self.mmu.interrupt(number, pc, self._word(pc - 4 if behind else pc)):
                return True
        if number == engine.BREAK:
            return self._break(pc)
        if number in (engine.DATA_ABORT, engine.PREFETCH_ABORT):
            self._now.stop = self._fault(pc, number)
        elif number in (engine.SVC, engine.HVC, engine.SMC):
            pc -= 4  # ELR_EL1 is already behind it
            self._now.stop = self._stop("exception", disassemble(self._word(pc), pc), pc)
        else:
            kind, text = _EXCEPTIONS.get(number, ("exception", f"exception {number}"))
            self._now.stop = self._stop(kind, text, pc)
        return False

    def _refused(self) -> bool:
        """The model MMU refused an access: it goes to the guest's vectors (True), or the run ends."""
        abort = self.mmu.abort() if self.mmu else None
        if self.mmu is None or abort is None:
            return False
        if self.trace:
            self.trace.synchronized(abort.pc, "exception")
        if self.mmu.vectoring:
            self.mmu.take(abort)
            return True
        walk, pc = abort.walk, abort.pc
        where = f"{walk.access} at {walk.va:#x}"
        if walk.ok:
            message = f"{where}: external abort, no RAM at {walk.pa:#x}"
        elif walk.access.type is AccessType.FETCH:
            message = f"instruction fetch from {pc:#x}: {_outcome(walk)}"
        else:
            message = f"{where}: {_outcome(walk)}"
        self._now.stop = self._stop("fault", message, pc, walk)
        return False

    def _is_bug(self, pc: int) -> bool:
        return self.image is not None and pc in self.image.bugs

    def _break(self, pc: int) -> bool:
        """A BRK: a WARN goes on after it, as the kernel's handler does; anything else stops."""
        bug = self.image.bugs.get(pc) if self.image and self._word(pc) == BRK_WARN else None
        if bug is None or not bug.warn:
            text = f"BUG at {bug.file}:{bug.line}" if bug else f"brk #{self._word(pc) >> 5 & 0xFFFF:#x}"
            self._now.stop = self._stop("bug" if bug else "exception", text, pc)
            return False
        repeat = bug.once and pc in self._warned
        self._warned.add(pc)
        warn = Warn(pc, self.describe(pc), bug.file, bug.line, bug.once, repeat)
        self._now.warnings.append(warn)
        if self._on_warn:
            self._on_warn(warn)
        self.cpu.write(engine.PC, pc + 4)
        return True

    def _fault(self, pc: int, number: int) -> Stop:
        el = self.cpu.el
        if number == engine.PREFETCH_ABORT:
            walk = self.translate(pc, Access.fetch(el))
            return self._stop("fault", f"instruction fetch from {pc:#x}: {_outcome(walk)}", pc, walk)
        parts = touches(self._word(pc), pc, self._register, el)
        walks = [w for part in parts for w in self._walks(part)]
        if not walks:
            return self._stop("fault", f"data abort of {disassemble(self._word(pc), pc)}", pc)
        walk = next((w for w in walks if not w.ok), walks[0])
        return self._stop("fault", f"{walk.access} at {walk.va:#x}: {_outcome(walk)}", pc, walk)

    def _walks(self, part: Touch) -> list[Walk]:
        """Walks of the first byte, and of the first in the next page if it goes that far (what FAR_EL1 gives)."""
        last = part.va + part.size - 1 & _U64
        vas = [part.va, last & -PAGE] if part.va // PAGE != last // PAGE else [part.va]
        return [self.translate(va, part.access) for va in vas]

    def _register(self, n: int) -> int:
        return self.cpu.read(engine.SP if n == 31 else engine.X[n])

    def _stop_for(self, ended: Ended, budget: _Budget | None) -> Stop | None:
        if ended.end is End.REACHED or self._now.ended:
            return None
        if budget and budget.spent:
            return self._stop("budget", f"{budget.limit} basic blocks ran without an end", ended.pc)
        if ended.end is End.TIMEOUT:
            return self._stop("timeout", "the time allowed ran out", ended.pc)
        return self._external_abort(ended.pc) or self._stop("engine", ended.error or "stopped", ended.pc)

    def _external_abort(self, pc: int) -> Stop | None:
        """An access to a PA without RAM, which Unicorn takes for an error of its user's."""
        el = self.cpu.el
        parts = [Touch(pc, 4, Access.fetch(el)), *touches(self._word(pc), pc, self._register, el)]
        walk = next((w for part in parts for w in self._walks(part) if w.ok and w.pa not in self.memory), None)
        if walk is None:
            return None
        return self._stop("fault", f"{walk.access} at {walk.va:#x}: external abort, no RAM at {walk.pa:#x}", pc, walk)

    def _stop(self, kind: str, message: str, pc: int, walk: Walk | None = None) -> Stop:
        return Stop(kind, message, pc, self.describe(pc), walk, self._around(pc), self._backtrace())

    def _word(self, va: int) -> int:
        """The instruction at `va`, 0 where it cannot be read."""
        try:
            return self.word_at(va)
        except (ValueError, NoMemory):
            return 0

    def _around(self, pc: int) -> tuple[str, ...]:
        """Four instructions before and three after, the one at `pc` marked."""
        lines = []
        for at in range(pc - 16, pc + 16, 4):
            word = self._word(at)
            if word or at == pc:
                mark = "=>" if at == pc else "  "
                lines.append(f"{mark} {self.describe(at)}: {disassemble(word, at)}")
        return tuple(lines)

    def _backtrace(self, depth: int = 16) -> tuple[str, ...]:
        """Return addresses: LR, then the chain of frame records (AAPCS64) from X29."""
        found, frame = [self.cpu.read(engine.LR)], self.cpu.read(engine.FP)
        for _ in range(depth):
            try:
                frame, address = self.word_at(frame, 8), self.word_at(frame + 8, 8)
            except (ValueError, NoMemory):
                break
            found.append(address)
        unique = [a for i, a in enumerate(found) if a and a != self._now.home and (not i or a != found[i - 1])]
        return tuple(self.describe(address) for address in unique)


def _outcome(walk: Walk) -> str:
    if walk.ok:
        return "the tables allow it now (a stale TLB entry, or a check that Unicorn makes and the tables do not)"
    return str(walk.result)


_EXCEPTIONS = {engine.UNDEFINED: ("undefined", "undefined instruction")}


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


class _Budget:
    """A limit on basic blocks, counted by a hook that lives as long as the call."""

    def __init__(self, cpu: Cpu, limit: int) -> None:
        if limit <= 0:
            raise ValueError(f"blocks={limit}: must be more than 0")
        self.limit, self.count, self._cpu = limit, 0, cpu
        self._handle = cpu.on_block(self._tick)
        cpu.flush_code()

    def _tick(self, _: int) -> bool:
        self.count += 1
        return not self.spent

    @property
    def spent(self) -> bool:
        return self.count > self.limit

    def close(self) -> None:
        """Takes the hook away."""
        self._cpu.remove(self._handle)
        self._cpu.flush_code()


# Where each cold kernel of this process has its struct pages.
_STRUCT_PAGES: weakref.WeakKeyDictionary[coldboot.Template, int | None] = weakref.WeakKeyDictionary()


def _struct_pages(machine: Machine) -> int | None:
    """The VA of the struct page of the first page of RAM; None for an image that cannot say.

    It depends on the version, the VA bits and memstart_addr: the compiled vmalloc_to_page is asked, not a formula.
    """
    if machine.image is None or "vmalloc_to_page" not in machine.image.symbols:
        return None
    plan = machine.plan
    result = machine.call("vmalloc_to_page", plan.window)
    if result.stop or not result.value:
        return None
    return result.value - (plan.window_pa - plan.ram[0]) // plan.page_size * coldboot.STRUCT_PAGE
