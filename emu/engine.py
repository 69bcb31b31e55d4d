"""One Unicorn CPU over physical memory: registers by name, hooks that cannot lose an error.

Rules of this file:
- Nothing here knows of kernels. It hides Unicorn's traps (docs/engines.md) and nothing else.
- A Python error in a callback stops the CPU and comes out of `run` as itself.
- `run` never raises for what the guest does: it returns why the CPU stopped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import unicorn
from unicorn import arm64_const as arm64
from unicorn import unicorn_const as uc_const

from emu.watchdog import Watchdog
from pgtable import PhysicalMemory

X = tuple(
    getattr(arm64, f"UC_ARM64_REG_X{i}") for i in range(31)
)  # X29 and X30 are the frame pointer and the link register
PC, SP, PSTATE = arm64.UC_ARM64_REG_PC, arm64.UC_ARM64_REG_SP, arm64.UC_ARM64_REG_PSTATE
FP, LR = X[29], X[30]

# System registers by name: (op0, op1, CRn, CRm, op2), Arm ARM C5.
SYSTEM: dict[str, tuple[int, int, int, int, int]] = {
    "SCTLR_EL1": (3, 0, 1, 0, 0),
    "CPACR_EL1": (3, 0, 1, 0, 2),
    "TTBR0_EL1": (3, 0, 2, 0, 0),
    "TTBR1_EL1": (3, 0, 2, 0, 1),
    "TCR_EL1": (3, 0, 2, 0, 2),
    "SPSR_EL1": (3, 0, 4, 0, 0),
    "ELR_EL1": (3, 0, 4, 0, 1),
    "SP_EL0": (3, 0, 4, 1, 0),
    "ESR_EL1": (3, 0, 5, 2, 0),
    "FAR_EL1": (3, 0, 6, 0, 0),
    "PAR_EL1": (3, 0, 7, 4, 0),
    "MAIR_EL1": (3, 0, 10, 2, 0),
    "VBAR_EL1": (3, 0, 12, 0, 0),
    "CONTEXTIDR_EL1": (3, 0, 13, 0, 1),
    "TPIDR_EL1": (3, 0, 13, 0, 4),
    "TPIDR_EL0": (3, 3, 13, 0, 2),
    "SP_EL1": (3, 4, 4, 1, 0),
    "HCR_EL2": (3, 4, 1, 1, 0),
    "SCR_EL3": (3, 6, 1, 1, 0),
}

# Interrupt numbers that Unicorn gives an INTR hook (QEMU's EXCP_*).
UNDEFINED, SVC, PREFETCH_ABORT, DATA_ABORT, BREAK, HVC, SMC = 1, 2, 3, 4, 7, 11, 13

# Rights of a TLB entry, and the kinds of access that ask for one.
READ, WRITE, EXECUTE = uc_const.UC_PROT_READ, uc_const.UC_PROT_WRITE, uc_const.UC_PROT_EXEC
FILL_READ, FILL_WRITE, FILL_FETCH = uc_const.UC_MEM_READ, uc_const.UC_MEM_WRITE, uc_const.UC_MEM_FETCH

EL1H, EL0T = 0b0101, 0
PSTATE_DAIF = 0x3C0
_TWO_BLOCKS = 0xD503201F_14000001  # b .+4; nop
_RW = 1 << 10  # SCR_EL3.RW: without it EL1 counts as AArch32 and the MMU reads AArch32 tables


_unicorn: Any = unicorn  # it ships partial types
_WORD = ctypes.c_uint64  # what every general register is: Unicorn's own reg_read takes as long again to find that out


class End(Enum):
    """Why a run ended."""

    REACHED = "reached"  # the address asked for
    STOPPED = "stopped"  # by a hook, which knows why
    TIMEOUT = "timeout"
    ERROR = "error"  # Unicorn's own error


class Ended(NamedTuple):
    """How a run ended: at `pc`, with Unicorn's error text if there was one."""

    end: End
    pc: int
    error: str = ""


class SystemInstruction(NamedTuple):
    """A TLBI, AT, DC, IC or MSR/MRS seen by a hook: its encoding and the number of Xt (31: none)."""

    op0: int
    op1: int
    crn: int
    crm: int
    op2: int
    rt: int


class Fill(NamedTuple):
    """A TLB entry: where a page is, and the rights READ, WRITE, EXECUTE of the EL that asked."""

    pa: int
    rights: int


class Cpu:
    """A Unicorn AArch64 core at EL1 whose physical memory is `memory`, shared and not copied.

    `page_size`: the smallest page its tables have; Unicorn's own MMU drops only parts of larger pages otherwise.
    """

    def __init__(self, memory: PhysicalMemory, *, page_size: int = 4096) -> None:
        self.memory = memory
        self.page_size = page_size
        self.uc: Any = _unicorn.Uc(_unicorn.UC_ARCH_ARM64, _unicorn.UC_MODE_ARM)
        self.uc.ctl_set_cpu_model(arm64.UC_CPU_ARM64_MAX)
        self.uc.ctl_set_page_size(page_size)
        for region in memory.regions:
            self.uc.mem_map_ptr(region.base, region.size, uc_const.UC_PROT_ALL, region.address)
        self["SCR_EL3"] = _RW
        self["CPACR_EL1"] = 3 << 20  # FPEN: no traps of SIMD
        self.set_el(1)
        self._error: BaseException | None = None
        self._watchdog = Watchdog(self.uc.emu_stop)
        self._refused = False
        self._on_refusal: Callable[[], bool] | None = None
        self._stopping = False
        self._run_two_blocks()

    def _run_two_blocks(self) -> None:
        """Until it has gone from one block to another, Unicorn tells `on_new_block` nothing of where a run begins."""
        start = self.memory.regions[0].base
        word = self.memory.fetch(start)
        self.memory.store(start, _TWO_BLOCKS)
        self.uc.emu_start(start, start + 8)
        self.memory.store(start, word)
        self.flush_code()

    def __getitem__(self, name: str) -> int:
        op0, op1, crn, crm, op2 = SYSTEM[name]
        return int(self.uc.reg_read(arm64.UC_ARM64_REG_CP_REG, (crn, crm, op0, op1, op2)))

    def __setitem__(self, name: str, value: int) -> None:
        op0, op1, crn, crm, op2 = SYSTEM[name]
        self.uc.reg_write(arm64.UC_ARM64_REG_CP_REG, (crn, crm, op0, op1, op2, value))

    def set_el(self, el: int) -> None:
        """Goes to EL1h or EL0t, interrupts masked. Any system register write makes Unicorn notice."""
        self.pstate = PSTATE_DAIF | (EL1H if el else EL0T)

    @property
    def pstate(self) -> int:
        """PSTATE, laid out as in SPSR_EL1. Setting it leaves SP alone."""
        return int(self.uc.reg_read(PSTATE))

    @pstate.setter
    def pstate(self, value: int) -> None:
        self.uc.reg_write(PSTATE, value)
        self["CPACR_EL1"] = self["CPACR_EL1"]

    @property
    def el(self) -> int:
        """The current exception level."""
        return int(self.uc.reg_read(PSTATE)) >> 2 & 3

    def read(self, register: int) -> int:
        """A general register's value."""
        return int(self.uc._reg_read(register, _WORD, None))

    def write(self, register: int, value: int) -> None:
        """Sets a general register."""
        self.uc._reg_write(register, _WORD, value & (1 << 64) - 1)

    def general(self) -> list[int]:
        """X0 to X30."""
        return [int(v) for v in self.uc.reg_read_batch(X)]

    def context(self) -> Any:
        """All registers at once, for `set_context`: a hundred times faster than one by one."""
        return self.uc.context_save()

    def set_context(self, context: Any) -> None:
        """Puts registers back, system registers and PSTATE too. What the TLB holds stays."""
        self.uc.context_restore(context)

    def flush_tlb(self) -> None:
        """Drops every TLB entry (a change of tables from Python is seen at once)."""
        self.uc.ctl(uc_const.UC_CTL_TLB_FLUSH, uc_const.UC_CTL_IO_WRITE)

    def flush_code(self) -> None:
        """Drops translated code, so that hooks added since reach it."""
        self.uc.ctl_flush_tb()

    def on_interrupt(self, callback: Callable[[int], bool]) -> None:
        """`callback(number)` for exceptions; False stops the run."""

        def hook(uc: Any, number: int, _: Any) -> None:
            self._guarded(lambda: callback(number))

        self.uc.hook_add(uc_const.UC_HOOK_INTR, hook)

    def on_system(self, callback: Callable[[SystemInstruction], bool]) -> None:
        """`callback(instruction)` before every SYS (TLBI, AT, DC, IC); True skips it. Unicorn hears only the first."""

        def hook(uc: Any, register: int, cp: Any, _: Any) -> int:
            rt = register - X[0] if X[0] <= register <= X[28] else {X[29]: 29, X[30]: 30}.get(register, 31)
            try:
                return int(callback(SystemInstruction(cp.op0, cp.op1, cp.crn, cp.crm, cp.op2, rt)))
            except BaseException as error:
                self._fail(error)
                return 1

        self.uc.hook_add(uc_const.UC_HOOK_INSN, hook, None, 1, 0, arm64.UC_ARM64_INS_SYS)

    def on_msr(self, callback: Callable[[SystemInstruction, int], bool]) -> None:
        """`callback(instruction, value)` before every MSR; True skips it. Unicorn hears the first only."""

        def hook(uc: Any, register: int, cp: Any, _: Any) -> int:
            try:
                return int(callback(SystemInstruction(cp.op0, cp.op1, cp.crn, cp.crm, cp.op2, 31), int(cp.val)))
            except BaseException as error:
                self._fail(error)
                return 1

        self.uc.hook_add(uc_const.UC_HOOK_INSN, hook, None, 1, 0, arm64.UC_ARM64_INS_MSR)

    def on_fill(self, callback: Callable[[int, int], Fill | None]) -> None:
        """From now on `callback(va of the page, FILL_READ ...)` is the MMU: asked when the TLB has no entry with that
        right. None, or an entry without it, refuses the access; then see `on_refusal`."""

        def hook(uc: Any, va: int, kind: int, entry: Any, _: Any) -> bool:
            try:
                fill = callback(va, kind)
            except BaseException as error:
                self._fail(error)
                return False
            if fill is None:
                self._refused = True
                return False
            entry.paddr, entry.perms = fill
            return True

        self.uc.ctl_set_tlb_mode(uc_const.UC_TLB_VIRTUAL)
        self.uc.hook_add(uc_const.UC_HOOK_TLB_FILL, hook)
        self.flush_tlb()

    def on_refusal(self, callback: Callable[[], bool]) -> None:
        """`callback()` when an access was refused, with the PC at its instruction; True goes on from the PC."""
        self._on_refusal = callback

    def refuse(self) -> None:
        """From a hook: the instruction is to end as a refused access does."""
        self._refused = True
        self.uc.emu_stop()

    def on_code(self, callback: Callable[[int], bool], begin: int, end: int) -> int:
        """`callback(pc)` before each instruction in [begin, end]; False stops the run there. Returns a handle."""

        def hook(uc: Any, address: int, size: int, _: Any) -> None:
            self._guarded(lambda: callback(address))

        return int(self.uc.hook_add(uc_const.UC_HOOK_CODE, hook, None, begin, end))

    def on_block(self, callback: Callable[[int], bool]) -> int:
        """`callback(pc)` at every block; False stops the run. Returns a handle."""

        def hook(uc: Any, address: int, size: int, _: Any) -> None:
            self._guarded(lambda: callback(address))

        return int(self.uc.hook_add(uc_const.UC_HOOK_BLOCK, hook))

    def on_block_in(self, callback: Callable[[int, int], bool], begin: int, end: int) -> int:
        """`callback(pc, bytes)` at every block that begins in [begin, end]; False stops the run. Returns a handle."""

        def hook(uc: Any, address: int, size: int, _: Any) -> None:
            self._guarded(lambda: callback(address, size))

        return int(self.uc.hook_add(uc_const.UC_HOOK_BLOCK, hook, None, begin, end))

    def on_new_block(self, callback: Callable[[int, int], bool]) -> int:
        """`callback(pc, bytes)` when a block has been translated, before it runs; False stops there."""

        def hook(uc: Any, block: Any, _: Any, __: Any) -> None:
            self._guarded(lambda: callback(int(block.pc), int(block.size)))

        return int(self.uc.hook_add(uc_const.UC_HOOK_EDGE_GENERATED, hook))

    def on_write(self, callback: Callable[[int, int, int], bool], begin: int, end: int) -> int:
        """`callback(pa, size, value)` before a store to PAs [begin, end]; False stops the run. Returns a handle."""

        def hook(uc: Any, access: int, address: int, size: int, value: int, _: Any) -> None:
            self._guarded(lambda: callback(address, size, value))

        return int(self.uc.hook_add(uc_const.UC_HOOK_MEM_WRITE, hook, None, begin, end))

    def on_read(self, callback: Callable[[int, int], bool], begin: int, end: int) -> int:
        """`callback(pa, size)` before a load from PAs [begin, end]; False stops the run. Returns a handle."""

        def hook(uc: Any, access: int, address: int, size: int, value: int, _: Any) -> None:
            self._guarded(lambda: callback(address, size))

        return int(self.uc.hook_add(uc_const.UC_HOOK_MEM_READ, hook, None, begin, end))

    def remove(self, handle: int) -> None:
        """Takes a hook away."""
        self.uc.hook_del(handle)

    def stop(self) -> None:
        """Ends the run in progress, from a hook."""
        self._stopping = True
        self.uc.emu_stop()

    def _guarded(self, callback: Callable[[], bool]) -> None:
        try:
            if not callback():
                self.stop()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self.stop()

    def run(self, pc: int, until: int, timeout: float | None = None) -> Ended:
        """Runs from `pc` until `until` is reached, a hook stops it, or `timeout` seconds of CPU time
        are used."""
        self._stopping = False
        self._watchdog.arm(timeout)
        text = ""
        try:
            text = self._go(pc, until)
        finally:
            timed_out = self._watchdog.disarm()
        error, self._error = self._error, None
        if error is not None:
            raise error
        now = self.read(PC)
        if text:
            return Ended(End.ERROR, now, text)
        if self._stopping:
            return Ended(End.STOPPED, now)
        return Ended(End.TIMEOUT if timed_out and now != until else End.REACHED, now)

    def _go(self, pc: int, until: int) -> str:
        """Runs on through refused accesses that the guest handles; Unicorn's error text, if there is one."""
        while True:
            self._refused, text = False, ""
            try:
                self.uc.emu_start(pc, until)
            except _unicorn.UcError as problem:
                text = str(problem)
            if not self._refused or self._error or self._watchdog.fired or self._on_refusal is None:
                return "" if self._watchdog.fired else text
            if not self._on_refusal():
                self._stopping = True
                return ""
            pc = self.read(PC)
