"""The machine of a snapshot: a kernel that has booted, on which any of its functions can be called.

What a call runs on:
- the task that ran when the snapshot was made (SP_EL0) with its per-CPU base (TPIDR_EL1); its own stack, below where it
  was; interrupts as they were, of which none ever comes;
- strings given as arguments lie on that stack, as local arrays would;
- it returns to a word that nothing executes: the last of a slot in the exception vectors (`vectors` + 0x7c).
What a call cannot do ends in `CallResult.stop`: "sleep" (it would schedule), "idle" (WFI), "ipi" (an interrupt for a
CPU), "panic", "device" (an access to a PA where QEMU has no RAM).
Printing: vprintk_emit() is replaced. The kernel's own vscnprintf() makes the text, `CallResult.printed` gets it, and
neither the ring buffer nor the console is touched.
Sources: arch/arm64/kernel/entry.S (vectors), kernel/printk/printk.c vprintk_emit, AAPCS64 (va_list is a structure of 32
bytes, passed by its address).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from emu import coldboot, engine
from emu.coldboot import PlacedPlan, SetUp
from emu.engine import Ended, SystemInstruction
from emu.exceptions import Stop
from emu.machine import TIMEOUT, CallResult, Machine, State
from emu.mmu import LATER
from pgtable import NoMemory, PhysicalMemory, Registers, translate
from pgtable.build import MapError, TableBuilder
from pgtable.leaves import halves, tables
from pgtable.params import WalkParams
from pgtable.registers import SCTLR_EL1

if TYPE_CHECKING:
    from emu.calls import Budget
    from emu.snapshot import Snapshot

SLOT = 0x80  # bytes of an exception vector
LINE = 1024  # bytes of the longest message that printk makes (PRINTKRB_RECORD_MAX)
STRINGS = 4096  # bytes of the stack that arguments may take
SOH, CONT = "\x01", "c"  # before the level of a message; the level of one that continues (include/linux/kern_levels.h)
ICC_SGI1R = 0xD518CBA0  # msr icc_sgi1r_el1, xt
ICC_SGI1R_MASK = ~0x1F
CTR_DIC = 1 << 29  # of CTR_EL0: new code needs no instruction cache maintenance

# Functions that a call does not come back from, or not in a meaningful way: kind of the stop, and why.
_ENDS = {
    "__schedule": ("sleep", "the task would sleep or give way to another"),
    "gic_ipi_send_mask": ("ipi", "a CPU would be interrupted"),
    "panic": ("panic", ""),
    "vpanic": ("panic", ""),
}


@dataclass(frozen=True)
class WarmPlan(PlacedPlan):
    """Where things are in a booted kernel; `back`: where a called function returns to."""

    back: int = 0

    @property
    def landing(self) -> int:
        """Where a called function returns to."""
        return self.back


class LiveTree(TableBuilder):
    """A kernel's own tree: it can be read and its leaves changed, but its tables are given out by the kernel."""

    def __init__(self, memory: PhysicalMemory, params: WalkParams) -> None:
        self._found = params.base & -params.fmt.granule.page_size
        super().__init__(memory, (self._found, 0), fmt=params.fmt, va_bits=64 - params.txsz, upper=params.half_base > 0)

    def allocate(self, size: int | None = None) -> int:
        """The root, for the constructor; raises MapError for another page."""
        return super().allocate(size) if hasattr(self, "root") else self._found

    def _take(self, size: int) -> int:
        raise MapError("the tables of a booted kernel are its own: vmalloc() and vmap() map pages")


class Resolved(NamedTuple):
    """A function as it was asked for and as the kernel has it."""

    name: str
    found: str
    address: int


class _Printing(NamedTuple):
    """A message in the making: where vprintk_emit() was called from, and the stack there."""

    back: int
    stack: int
    buffer: int


class WarmMachine(Machine):
    """A booted kernel's memory and CPU. Made by `Snapshot.machine`."""

    def __init__(
        self, snapshot: Snapshot, *, mmu: str = "cpu", vectors: bool = False, made: SetUp | None = None
    ) -> None:
        """`made`: memory to share with another machine, and where this one's stack and task are (emu.cpus)."""
        if mmu not in ("cpu", "model"):
            raise ValueError(f'mmu={mmu!r}: must be "cpu" or "model"')
        self.snapshot = snapshot
        self.printed: list[str] = []
        self._printing: list[_Printing] = []
        self._new_code = False
        features = snapshot.registers.features if mmu == "model" else None
        super().__init__(
            made or _set_up(snapshot, mmu), snapshot.image, features=features, vectors=vectors if features else None
        )
        self._silent = bool(snapshot.system.get("CTR_EL0", CTR_DIC) & CTR_DIC)
        self._set_hooks()

    def _start(self, regs: Registers) -> None:
        super()._start(regs)
        # Return addresses are not signed: Unicorn traps PACIASP, and a call returns through none from before.
        self.set_register("SCTLR_EL1", SCTLR_EL1.pack(regs.SCTLR_EL1, EnIA=0, EnIB=0, EnDA=0, EnDB=0))
        for name in ("TPIDR_EL1", "TPIDR_EL0", "CONTEXTIDR_EL1", "VBAR_EL1"):
            self.cpu[name] = self.snapshot.system[name]
        for name in LATER if self.mmu else ():
            self.set_register(name, self.snapshot.system.get(name, 0))
        for i in range(31):
            self.cpu.write(engine.X[i], self.snapshot.general[f"x{i}"])
        self.cpu.write(engine.SP, self.plan.stack)
        self.cpu.pstate = self.snapshot.general["cpsr"]

    # calls

    def resolve(self, function: str) -> Resolved:
        """The function of that name or, where the kernel has none, its only variant (`vmalloc_noprof`).

        Raises SymbolError.
        """
        symbols = self.snapshot.image.symbols
        address = symbols.find(function)
        found = function if function in symbols else str(symbols.at(address))
        others = symbols.variants(function)
        return Resolved(function, others[0] if found not in symbols and others else found, address)

    def symbol(self, name: str | int) -> int:
        """The address of a symbol or of its only variant, or of an address itself; raises SymbolError."""
        return name if isinstance(name, int) else self.snapshot.image.symbols.find(name)

    def call(  # it takes more
        self,
        function: str | int,
        *args: int | str | bytes,
        timeout: float | None = TIMEOUT,
        blocks: int | None = None,
        record: str = "changes",
    ) -> CallResult:
        """As `Machine.call`; an argument may also be a string (UTF-8, ended by NUL), which is put on the stack."""
        result = self._record(self.prepare(function, *args), self.plan.landing, timeout, blocks, record)
        stop = result.stop and _classified(result.stop, self.plan.ram)
        printed = tuple(text.rstrip("\n") for text in self.printed)
        return replace(result, printed=printed, stop=stop) if stop or printed else result

    def prepare(self, function: str | int, *args: int | str | bytes) -> int:  # it takes more
        """As `Machine.prepare`, with the arguments of `call`."""
        if len(args) > 8:
            raise ValueError(f"{len(args)} arguments: a call passes at most 8 in registers")
        self.printed, self._printing = [], []
        values, stack = self._placed(args)
        address = super().prepare(function, *values)
        if self.cpu.pstate != self.snapshot.general["cpsr"]:
            self.cpu.pstate = self.snapshot.general["cpsr"]
        self.cpu.write(engine.SP, stack)
        return address

    def _placed(self, args: Sequence[int | str | bytes]) -> tuple[list[int], int]:
        """The values of arguments, and the stack pointer below those that had to be put there."""
        top, values = self.plan.stack, []
        for arg in args:
            if isinstance(arg, int):
                values.append(arg)
                continue
            data = (arg.encode() if isinstance(arg, str) else arg) + b"\0"
            top = top - len(data) & -16
            if self.plan.stack - top > STRINGS:
                raise ValueError(f"strings of more than {STRINGS} bytes do not fit the stack")
            super().write(top, data)
            values.append(top)
        return values, top

    def run(self, *_: object, **__: object) -> CallResult:
        """Snippets need pages of their own, which a booted kernel has not; raises ValueError."""
        raise ValueError("a snippet runs on Machine.bare() or Machine.boot(): here, functions are called")

    # stops

    def _set_hooks(self) -> None:
        symbols = self.snapshot.image.symbols
        for name, (kind, why) in _ENDS.items():
            for address in symbols.all(name):
                self.cpu.on_code(partial(self._end, name, kind, why), address, address)
        if "vscnprintf" in symbols:
            for address in symbols.all("vprintk_emit"):
                self.cpu.on_code(self._print, address, address)
            self._formatted_at = self.plan.landing + SLOT
            self.cpu.on_code(self._formatted, self._formatted_at, self._formatted_at)
        self.cpu.on_new_block(self._translated)
        self.cpu.flush_code()

    def _end(self, name: str, kind: str, why: str, pc: int) -> bool:
        text = self._string(self.argument(0)).strip() if kind == "panic" else f"{name}() is called: {why}"
        self._now.stop = self._stop(kind, text, pc)
        return False

    def _string(self, va: int, limit: int = LINE) -> str:
        data = b""
        while len(data) < limit and b"\0" not in data:
            try:
                data += self.read(va + len(data), 16 - (va + len(data)) % 16)
            except (ValueError, NoMemory):
                break
        return data.split(b"\0")[0].decode(errors="replace")

    def _interrupt(self, number: int) -> bool:
        pc = self.cpu.read(engine.PC)
        if number == engine.UNDEFINED and self.instruction(pc) & ICC_SGI1R_MASK == ICC_SGI1R & ICC_SGI1R_MASK:
            self._now.stop = self._stop("ipi", "msr icc_sgi1r_el1: a CPU would be interrupted", pc)
            return False
        return super()._interrupt(number)

    def _stop_for(self, ended: Ended, budget: Budget | None) -> Stop | None:
        if ended.end is engine.End.REACHED and ended.pc != self.plan.landing and not self._now.stop:
            return self._stop("idle", "WFI: the CPU would wait for an interrupt", ended.pc - 4)
        return super()._stop_for(ended, budget)

    # printing

    def _print(self, pc: int) -> bool:
        """Instead of vprintk_emit(facility, level, dev_info, fmt, args): vscnprintf(buffer, size, fmt, args)."""
        cpu = self.cpu
        stack = cpu.read(engine.SP)
        buffer = stack - LINE & -16
        self._printing.append(_Printing(cpu.read(engine.LR), stack, buffer))
        for i, value in enumerate((buffer, LINE, self.argument(3), self.argument(4))):
            cpu.write(engine.X[i], value)
        cpu.write(engine.SP, buffer)
        cpu.write(engine.LR, self._formatted_at)
        cpu.write(engine.PC, self.snapshot.image.symbols["vscnprintf"])
        return True

    def _formatted(self, pc: int) -> bool:
        message = self._printing.pop()
        text = self.read(message.buffer, min(self.argument(0), LINE)).decode(errors="replace")
        goes_on = False
        while text.startswith(SOH):
            goes_on, text = goes_on or text[1:2] == CONT, text[2:]
        if goes_on and self.printed and not self.printed[-1].endswith("\n"):
            text = self.printed.pop() + text
        self.printed.append(text)
        self.cpu.write(engine.SP, message.stack)
        self.cpu.write(engine.LR, message.back)
        self.cpu.write(engine.PC, message.back)
        return True

    # state

    def save(self) -> State:
        """Memory and registers now, for `restore`."""
        return super().save()._replace(context=self.cpu.context())

    def restore(self, state: State) -> None:
        """Back to a saved state; views of memory stay valid. Code is translated again only if it may have changed."""
        if self._new_code or self._silent:
            self.cpu.flush_code()
            self._new_code = False
        self.memory.rewind(state.pages)
        self.cpu.flush_tlb()
        self.cpu.set_context(state.context)
        if self.mmu:
            for name, value in zip(LATER, state.later, strict=True):
                self.mmu[name] = value
        self._warned = set(state.warned)
        self._known = None

    def save_to(self, path: str | os.PathLike[str]) -> Snapshot:
        """A snapshot file of memory as it is now, with the registers of the snapshot that this machine began with.

        Raises OSError, and ValueError for the file that this machine runs on.
        """
        from emu.snapshot import save

        if os.path.exists(path) and os.path.samefile(path, self.snapshot.path):
            raise ValueError(f"{path} is the snapshot that this machine runs on: name another file")
        ram = [(region.base, region.words) for region in self.memory.regions]
        old = self.snapshot
        return save(path, replace(old.origin, at=f"{old.origin.at}, then calls"), old.general, old.system, ram)

    def _translated(self, pc: int, size: int) -> bool:
        """Code outside the kernel's text may be gone after a `restore`."""
        image = self.snapshot.image
        self._new_code = self._new_code or not image.base <= pc < image.base + image.size
        return True

    def _system(self, instruction: SystemInstruction) -> bool:
        """Code that was written is announced by instruction cache maintenance (IC)."""
        _, _, crn, crm, _, _ = instruction
        self._new_code = self._new_code or (crn == 7 and crm in (1, 5))
        return super()._system(instruction)

    def write(self, va: int, data: bytes) -> None:
        """Writes bytes at kernel address `va`, through the tables, whatever their permissions; also instructions."""
        self._new_code = True
        super().write(va, data)

    # tables

    def _table_ranges(self, *, whole: bool = False) -> list[tuple[int, int]]:
        """The table pages of both halves as they are now; for `whole` neighbours are joined."""
        page = self.plan.page_size
        pas = np.unique(tables(self.memory, self.registers()).pa & np.uint64(~(page - 1) & (1 << 64) - 1))
        if not whole:
            return [(pa, page) for pa in pas.tolist()]
        runs = np.split(pas, np.flatnonzero(np.diff(pas) != page) + 1) if len(pas) else []
        return [(int(run[0]), page * len(run)) for run in runs]


def _classified(stop: Stop, ram: tuple[int, int]) -> Stop:
    """An access to a PA below RAM is one to a device."""
    walk = stop.walk
    if stop.kind != "fault" or walk is None or not walk.ok or walk.pa >= ram[0]:
        return stop
    return replace(stop, kind="device", message=f"{walk.access} at {walk.va:#x}: a device at PA {walk.pa:#x}")


def _set_up(snapshot: Snapshot, mmu: str) -> SetUp:
    """What a machine starts from: the snapshot's memory, its trees, its registers."""
    memory, regs = snapshot.fresh_memory(), snapshot.registers
    trees = {params.half_base > 0: LiveTree(memory, params) for params in halves(regs)}
    if True not in trees:
        raise coldboot.BootError(f"{snapshot.path} was made before the kernel had its tables")
    if mmu == "cpu" and snapshot.lpa2:
        raise coldboot.BootError(f'{snapshot.path} has LPA2 tables, which Unicorn\'s MMU has not: take mmu="model"')
    upper = trees[True]
    return SetUp(_plan(snapshot, memory, upper), memory, upper, trees.get(False, upper), regs)


def _plan(snapshot: Snapshot, memory: PhysicalMemory, upper: LiveTree) -> WarmPlan:
    image, regs = snapshot.image, snapshot.registers

    def pa_of(va: int) -> int:
        return translate(memory, regs, va).pa

    memstart = memory.fetch(pa_of(image.symbols["memstart_addr"]))
    memstart -= memstart >> 63 << 64
    schedule = image.symbols["schedule"]
    base = memory.regions[0].base
    return WarmPlan(
        page_size=upper.granule.page_size,
        va_bits=upper.va_bits,
        ram=(base, sum(region.size for region in memory.regions)),
        image_pa=pa_of(schedule) - (schedule - image.base),
        pool=(0, 0),
        user_pool=(0, 0),
        pages=(0, 0),
        struct_pool=(0, 0),
        window=0,
        window_pa=0,
        linear=image.layout.page_offset + base - memstart & (1 << 64) - 1,
        memstart=memstart,
        vmemmap_pa=0,
        top=snapshot.general["sp"] & -16,
        current=snapshot.system["SP_EL0"],
        back=image.symbols["vectors"] + SLOT - 4,
    )
