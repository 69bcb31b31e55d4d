"""What happens while a guest runs: TLB maintenance is noted, exceptions are taken or end the run, a WARN goes on.

Rules of this file:
- A hook says whether the run goes on. Why it does not is in `Running.stop`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from emu import coldboot, engine, stops
from emu.calls import Budget, Warn
from emu.engine import End, Ended, SystemInstruction
from emu.exceptions import Stop, disassemble
from emu.image import KernelImage
from emu.order import OrderRecorder
from emu.trace import Maintenance, tlbi_name
from emu.tracing import Tap
from emu.view import View
from pgtable import Features, Walk

if TYPE_CHECKING:
    from emu.machine import Machine

BRK_WARN = 0xD4210000  # brk #0x800 (arch/arm64/include/asm/brk-imm.h, BUG_BRK_IMM)
_EXCEPTIONS = {engine.UNDEFINED: ("undefined", "undefined instruction")}


@dataclass
class Running:
    """What hooks collect while the guest runs."""

    maintenance: list[Maintenance] = field(default_factory=list)
    warnings: list[Warn] = field(default_factory=list)
    stop: Stop | None = None
    ended: bool = False  # by the SVC that ends a snippet at EL0
    home: int = 0  # where it returns to, which is no caller


class Hooked(View):
    """A view with the state of the run in progress, and what hooks do. `siblings`: other CPUs on this memory."""

    def __init__(
        self, made: coldboot.SetUp, image: KernelImage | None, features: Features | None, vectors: bool | None
    ) -> None:
        super().__init__(made, image, features, vectors)
        self.trace: Tap | None = None
        self.siblings: list[Machine] = []
        self._now = Running()
        self._warned: set[int] = set()
        self._order = OrderRecorder(self.cpu, self.read)
        self._on_warn: Callable[[object], None] | None = None
        self._svc_end: int | None = None

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
            if self.mmu.interrupt(number, pc, self.instruction(pc - 4 if behind else pc)):
                return True
        if number == engine.BREAK:
            return self._break(pc)
        if number in (engine.DATA_ABORT, engine.PREFETCH_ABORT):
            message, walk = stops.fault(self, pc, number)
            self._now.stop = self._stop("fault", message, pc, walk)
        elif number in (engine.SVC, engine.HVC, engine.SMC):
            pc -= 4  # ELR_EL1 is already behind it
            self._now.stop = self._stop("exception", disassemble(self.instruction(pc), pc), pc)
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
        self._now.stop = self._stop("fault", stops.refusal(abort), abort.pc, abort.walk)
        return False

    def _is_bug(self, pc: int) -> bool:
        return self.image is not None and pc in self.image.bugs

    def _break(self, pc: int) -> bool:
        """A BRK: a WARN goes on after it, as the kernel's handler does; anything else stops."""
        bug = self.image.bugs.get(pc) if self.image and self.instruction(pc) == BRK_WARN else None
        if bug is None or not bug.warn:
            text = f"BUG at {bug.file}:{bug.line}" if bug else f"brk #{self.instruction(pc) >> 5 & 0xFFFF:#x}"
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

    def _stop_for(self, ended: Ended, budget: Budget | None) -> Stop | None:
        if ended.end is End.REACHED or self._now.ended:
            return None
        if budget and budget.spent:
            return self._stop("budget", f"{budget.limit} basic blocks ran without an end", ended.pc)
        if ended.end is End.TIMEOUT:
            return self._stop("timeout", "the time allowed ran out", ended.pc)
        found = stops.external_abort(self, ended.pc)
        if found:
            return self._stop("fault", found[0], ended.pc, found[1])
        return self._stop("engine", ended.error or "stopped", ended.pc)

    def _stop(self, kind: str, message: str, pc: int, walk: Walk | None = None) -> Stop:
        return stops.stop(self, self._now.home, kind, message, pc, walk)
