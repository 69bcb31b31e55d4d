"""The MMU of pgtable as a CPU's MMU: Unicorn's TLB misses are answered by our walk (`Machine.boot(mmu="model")`).

What Unicorn's own MMU lacks then runs: LPA2, hardware access flag and dirty state, indirect permissions, overlays,
64K with 52 bits, exact syndromes, exceptions that go to the guest's vectors.

Rules of this file:
- Unicorn's TLB stays: it holds what a walk gave until the guest's TLBI, for EL0, EL1 and EL1 with PAN separately. An
  entry grants what needs no further walk: not a write that must first mark the page dirty. Faults are never kept.
- A refused miss stops the CPU at the instruction. Syndrome and address are worked out there, by decoding it: Unicorn
  tells the page only.
- What UNDEFINED stands for in Unicorn and our CPU has (PIR_EL1, range TLBI ...) is done here, by decoding the word.
Sources: Arm ARM D1 (exception entry; pseudocode AArch64.TakeException), C5 (encodings), D8 (TLB maintenance).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from emu import engine
from emu.engine import Cpu, Fill, SystemInstruction
from emu.exceptions import touches
from emu.pstate import PSTATE
from emu.trace import Maintenance, tlbi_name
from emu.tracing import Tap
from pgtable import Access, AccessType, Features, Registers, Translation, Walk, translate
from pgtable.at import ExternalAbort, at
from pgtable.bits import Layout, bits, res0
from pgtable.permissions import PR, PW, TO_UNPRIVILEGED
from pgtable.registers import EC_DATA, EC_FETCH, ESR, SCTLR_EL1
from pgtable.walk import Swap, leaf_permissions

# System instructions (MRS, MSR, SYS): bits 31:22 say that it is one.
_SYSTEM = Layout(
    "system instruction",
    (
        bits("Rt", 4, 0),
        bits("op2", 7, 5),
        bits("CRm", 11, 8),
        bits("CRn", 15, 12),
        bits("op1", 18, 16),
        bits("op0", 20, 19),
        bits("L", 21, doc="MRS, SYSL"),
        bits("kind", 31, 22),
        res0(63, 32),
    ),
)
_IS_SYSTEM = 0b1101010100
_SYS = 1  # op0 of TLBI, AT, DC, IC

# Registers that Unicorn's CPU has not: encoding, and the feature that brings them.
LATER: dict[str, tuple[tuple[int, int, int, int, int], str]] = {
    "TCR2_EL1": ((3, 0, 2, 0, 3), "tcr2"),
    "MAIR2_EL1": ((3, 0, 10, 2, 1), "aie"),
    "PIRE0_EL1": ((3, 0, 10, 2, 2), "pie"),
    "PIR_EL1": ((3, 0, 10, 2, 3), "pie"),
    "POR_EL1": ((3, 0, 10, 2, 4), "poe"),
    "POR_EL0": ((3, 3, 10, 2, 4), "poe"),
}
_LATER_BY_ENCODING = {encoding: name for name, (encoding, _) in LATER.items()}
_READ_FROM_CPU = ("TCR_EL1", "TTBR0_EL1", "TTBR1_EL1", "MAIR_EL1", "SCTLR_EL1")

_AT = {(8, 0): "S1E1R", (8, 1): "S1E1W", (8, 2): "S1E0R", (8, 3): "S1E0W", (9, 0): "S1E1RP", (9, 1): "S1E1WP"}

_RIGHTS = {engine.FILL_READ: engine.READ, engine.FILL_WRITE: engine.WRITE, engine.FILL_FETCH: engine.EXECUTE}
_KINDS = {engine.FILL_READ: AccessType.READ, engine.FILL_WRITE: AccessType.WRITE, engine.FILL_FETCH: AccessType.FETCH}

# Vectors (Arm ARM D1.3.1): where VBAR_EL1 + offset is for a synchronous exception, by what it was taken from.
_FROM_SP_EL0, _FROM_SP_EL1, _FROM_EL0 = 0x000, 0x200, 0x400
_EC_UNKNOWN, _EC_SVC, _EC_BRK = 0x00, 0x15, 0x3C
_EXTERNAL = 0x10  # FSC of a synchronous external abort, not on a walk
_U64 = (1 << 64) - 1


@dataclass(frozen=True)
class Abort:
    """An instruction or data abort: `walk` says why, `esr` and `far` are what ESR_EL1 and FAR_EL1 get.

    A walk that is `ok` found an address without RAM: an external abort.
    """

    pc: int
    far: int
    esr: int
    walk: Walk


class _Refused(NamedTuple):
    """A TLB miss that the walk did not answer."""

    page: int
    type: AccessType


class ModelMmu:
    """The MMU of `features` for `cpu`: TLB fills, syndromes, exception entry, registers that the CPU lacks.

    `vectors`: exceptions go to VBAR_EL1's vectors; None: once the guest has set VBAR_EL1.
    """

    def __init__(self, cpu: Cpu, features: Features, *, vectors: bool | None = None) -> None:
        self.features = features
        self.vectors = vectors
        self._cpu = cpu
        self._memory = cpu.memory
        self._later = dict.fromkeys(LATER, 0)
        self._values: tuple[int, ...] = ()  # of the registers, as last read
        self._known: dict[tuple[int, ...], Registers] = {}
        self._changed = True
        self._refused: _Refused | None = None
        self._pending: Abort | None = None  # of an AT
        self._code: dict[int, int] = {}  # pages that were fetched from, and where they are
        self._large: dict[int, set[int]] = {}  # entries larger than Unicorn's page: size -> VAs
        self._tagged = False
        self.trace: Tap | None = None
        cpu.on_fill(self._fill)
        cpu.on_msr(self._on_msr)

    # registers

    def registers(self) -> Registers:
        """The registers of the regime, with PSTATE's PAN and UAO, as they are now."""
        self._changed = True
        return self._registers(self._cpu.pstate)

    def __getitem__(self, name: str) -> int:
        return self._later[name]

    def __setitem__(self, name: str, value: int) -> None:
        self._later[name] = value & _U64
        self._changed = True

    def later(self) -> tuple[int, ...]:
        """The values of the registers of `LATER`."""
        return tuple(self._later.values())

    def begin(self) -> None:
        """Before a run: Python may have written registers."""
        self._changed = True
        self._refused = self._pending = None

    def _registers(self, pstate: int) -> Registers:
        if self._changed:
            self._values = (*(self._cpu[name] for name in _READ_FROM_CPU), *self._later.values())
            self._changed = False
        key = (PSTATE["PAN"].get(pstate), PSTATE["UAO"].get(pstate), *self._values)
        regs = self._known.get(key)
        if regs is None:
            if len(self._known) > 64:  # a guest that changes TTBR0_EL1 all the time
                self._known.clear()
            names = ("PAN", "UAO", *_READ_FROM_CPU, *LATER)
            regs = self._known[key] = Registers(self.features, **dict(zip(names, key, strict=True)))
        return regs

    def _on_msr(self, instruction: SystemInstruction, value: int) -> bool:
        self._changed = True  # it is written after this
        if self.trace:
            self.trace.msr(instruction, value)
        return False

    # TLB fills

    def _fill(self, page: int, kind: int) -> Fill | None:
        """What Unicorn may keep for the page at `page`; None: the access faults."""
        pstate = self._cpu.pstate
        regs, el = self._registers(pstate), PSTATE["EL"].get(pstate)
        unprivileged = el > 0 and kind != engine.FILL_FETCH and self._is_unprivileged()
        access = _access(_KINDS[kind], el, unprivileged)
        walk = self._walk(regs, page, access, self._swap)
        found = walk.result
        if not isinstance(found, Translation) or found.pa not in self._memory:
            self._refused = _Refused(page, access.type)
            return None
        self._note(walk, found)
        if kind == engine.FILL_FETCH:
            self._code[page] = found.pa
        as_el0 = el == 0 or (unprivileged and not regs.UAO)
        return Fill(found.pa, _RIGHTS[kind] | _rights(walk, found, as_el0=as_el0, pan=bool(regs.PAN)))

    def _walk(self, regs: Registers, va: int, access: Access, swap: Swap | None = None) -> Walk:
        """What an access does: by the tables, or by the TLB model of a trace that has one."""
        if self.trace and self.trace.has_tlb:
            return self.trace.access(regs, va, access, swap)
        return translate(self._memory, regs, va, access, swap=swap)

    def _swap(self, pa: int, old: int, new: int) -> bool:
        """Hardware's update of a descriptor; False if it is not `old` any more."""
        if self._memory.fetch(pa) != old:
            return False
        self._memory.store(pa, new)
        return True

    def _is_unprivileged(self) -> bool:
        """The instruction at the PC is an LDTR or STTR of some size (Arm ARM C4.1, unprivileged loads and stores)."""
        return self._word(self._cpu.read(engine.PC)) & 0x3F200C00 == 0x38000800

    def _word(self, pc: int) -> int:
        """The instruction at `pc`, 0 where there is none."""
        page = pc & -self._cpu.page_size
        pa = self._code.get(page)
        return 0 if pa is None else int.from_bytes(self._memory.read(pa + pc - page, 4), "little")

    def _note(self, walk: Walk, found: Translation) -> None:
        """Remembers entries that one TLBI VAE1 must drop and Unicorn would keep in part."""
        params, page_size = walk.params, self._cpu.page_size
        if found.level is None:
            return
        if params.fmt.granule.page_size < page_size:
            raise NotImplementedError(
                f"{params.fmt.granule.label} tables on a machine whose pages have {page_size:#x} bytes: make it with "
                f"that granule"
            )
        size = params.fmt.granule.level_size(found.level)
        if size > page_size:
            self._large.setdefault(size, set()).add(walk.va & -size)
        self._tagged = self._tagged or walk.va >> 56 not in (0, 0xFF)

    # maintenance and other system instructions

    def system(self, instruction: SystemInstruction) -> bool:
        """Before a SYS: an AT is done here (True); a TLBI is left to the CPU, which does not drop all of a block."""
        _, op1, crn, crm, op2, rt = instruction
        if op1 == 0 and crn == 7 and (crm, op2) in _AT and self._el:
            self._translate_address(_AT[crm, op2], self._general(rt))
            return True
        name = tlbi_name(op1, crn, crm, op2)
        if name is not None and self._el:
            self._maintain(Maintenance(name, self._general(rt), 0))
        return False

    def _maintain(self, event: Maintenance) -> None:
        va = event.va
        if va is None or self._tagged or any(va & -size in bases for size, bases in self._large.items()):
            self._flush()

    def _flush(self) -> None:
        self._cpu.flush_tlb()
        self._large.clear()
        self._tagged = False

    def _translate_address(self, operation: str, va: int) -> None:
        """AT: PAR_EL1, or an abort for an external abort on the walk."""
        try:
            self._cpu["PAR_EL1"] = at(self._memory, self._registers(self._cpu.pstate), operation, va, self._swap)
        except ExternalAbort as error:
            self._pending = Abort(self._cpu.read(engine.PC), va, error.esr, error.walk)
            self._cpu.refuse()

    def interrupt(self, number: int, pc: int, word: int) -> bool:
        """An exception that Unicorn gave to its INTR hook: done here, or taken to the vectors; False if neither."""
        if number == engine.UNDEFINED and self._emulate(word):
            self._cpu.write(engine.PC, pc + 4)
            return True
        classes = {engine.UNDEFINED: _EC_UNKNOWN, engine.SVC: _EC_SVC, engine.BREAK: _EC_BRK}
        if number not in classes or not self.vectoring:
            return False
        immediate = 0 if number == engine.UNDEFINED else word >> 5 & 0xFFFF
        self.enter(ESR.pack(EC=classes[number], IL=1) | immediate, pc)
        return True

    def _emulate(self, word: int) -> bool:
        """An instruction that Unicorn's CPU has not, and this one has: MRS, MSR of `LATER`, TLBI."""
        i = _SYSTEM.view(word)
        if i.kind != _IS_SYSTEM:
            return False
        if i.op0 == _SYS:
            known = tlbi_name(int(i.op1), int(i.CRn), int(i.CRm), int(i.op2))
            if i.L or not self._el or known is None or known.startswith("TLBI_"):
                return False
            self._flush()  # of a range, or with the outer shareable domain: dropping more is allowed
            return True
        name = _LATER_BY_ENCODING.get((int(i.op0), int(i.op1), int(i.CRn), int(i.CRm), int(i.op2)))
        if name is None or not getattr(self.features, LATER[name][1]) or not (self._el or name.endswith("EL0")):
            return False
        rt = int(i.Rt)
        if not i.L:
            self[name] = self._general(rt)
            if self.trace:
                self.trace.register(name, self[name])
        elif rt < 31:
            self._cpu.write(engine.X[rt], self[name])
        return True

    @property
    def _el(self) -> int:
        return PSTATE["EL"].get(self._cpu.pstate)

    def _general(self, n: int) -> int:
        """Xn; 31 is XZR."""
        return self._cpu.read(engine.X[n]) if n < 31 else 0

    def _base(self, n: int) -> int:
        """Xn; 31 is SP."""
        return self._cpu.read(engine.SP if n == 31 else engine.X[n])

    # aborts

    @property
    def vectoring(self) -> bool:
        """Exceptions go to the guest's vectors."""
        return self._cpu["VBAR_EL1"] != 0 if self.vectors is None else self.vectors

    def abort(self) -> Abort | None:
        """The abort that the CPU stopped for, once: what hardware would report of it; None if it is not for one."""
        refused, self._refused = self._refused, None
        pending, self._pending = self._pending, None
        if refused is None:
            return pending
        pc, regs = self._cpu.read(engine.PC), self.registers()
        walk = self._refused_walk(refused, pc, regs)
        return Abort(pc, self._far(walk, pc), self._esr(walk), walk)

    def _refused_walk(self, refused: _Refused, pc: int, regs: Registers) -> Walk:
        """The walk of the first byte in the refused page, as the instruction accesses it."""
        again = partial(self._walk, regs)
        if refused.type is AccessType.FETCH:
            return again(pc, Access.fetch(self._el))
        size = self._cpu.page_size
        walks = []
        for va, length, access in touches(self._word(pc), pc, self._base, self._el):
            last = va + length - 1 & _U64
            firsts = [byte for byte in (va, last & -size) if byte & -size == refused.page]
            walks += [again(byte, access) for byte in firsts[:1]]
        failed = (walk for walk in walks if not self._goes_somewhere(walk))
        return next(failed, None) or again(refused.page, _access(refused.type, self._el, unprivileged=False))

    def _goes_somewhere(self, walk: Walk) -> bool:
        return walk.ok and walk.pa in self._memory

    def _far(self, walk: Walk, pc: int) -> int:
        """FAR_EL1: the byte's address; DC ZVA gives its operand, not aligned down."""
        word = self._word(pc)
        zeroes = walk.access.type is AccessType.WRITE and word & 0xFFFFFFE0 == 0xD50B7420
        return self._general(word & 31) if zeroes else walk.va

    def _esr(self, walk: Walk) -> int:
        if walk.fault:
            return walk.fault.esr(walk.access)
        access = walk.access
        fetch = access.type is AccessType.FETCH
        exception = (EC_FETCH if fetch else EC_DATA) + int(access.el == 1)
        return ESR.pack(FSC=_EXTERNAL, WnR=int(access.type is AccessType.WRITE), IL=1, EC=exception)

    def take(self, abort: Abort) -> None:
        """Goes to the vector of an abort."""
        self._cpu["FAR_EL1"] = abort.far
        self.enter(abort.esr, abort.pc)

    def enter(self, esr: int, elr: int) -> None:
        """Takes a synchronous exception to EL1 (pseudocode AArch64.TakeException)."""
        cpu = self._cpu
        old = PSTATE.view(cpu.pstate)
        own_sp = bool(old.EL and old.SP)
        offset = _FROM_SP_EL1 if own_sp else _FROM_SP_EL0 if old.EL else _FROM_EL0
        cpu["ESR_EL1"], cpu["ELR_EL1"], cpu["SPSR_EL1"] = esr, elr, cpu.pstate
        sctlr = SCTLR_EL1.view(cpu["SCTLR_EL1"])
        pan = 1 if self.features.pan and not sctlr.SPAN else old.PAN
        if not own_sp:
            cpu["SP_EL0"] = cpu.read(engine.SP)
            cpu.write(engine.SP, cpu["SP_EL1"])
        cpu.pstate = PSTATE.pack(
            SP=1, EL=1, DAIF=0xF, PAN=int(pan), NZCV=int(old.NZCV), DIT=int(old.DIT), SSBS=int(sctlr.DSSBS)
        )
        cpu.write(engine.PC, cpu["VBAR_EL1"] + offset)


_ACCESSES: dict[tuple[AccessType, int, bool], Access] = {}


def _access(type: AccessType, el: int, unprivileged: bool) -> Access:
    """One object for each: making one costs more than finding it."""
    key = (type, el, unprivileged)
    if key not in _ACCESSES:
        _ACCESSES[key] = Access(type, el, unprivileged=unprivileged)
    return _ACCESSES[key]


def _rights(walk: Walk, found: Translation, *, as_el0: bool, pan: bool) -> int:
    """What the leaf grants without another walk: bits 0 to 2 are R, W, X to Unicorn and to permissions.py alike."""
    params = walk.params
    if found.level is None:
        return engine.READ | engine.WRITE | engine.EXECUTE
    leaf = walk.raw[-1][1]
    word = next((new for pa, _, new in walk.updates if pa == leaf), found.word)
    inherited = 0
    for _, _, table in walk.raw[:-1]:
        inherited |= table
    base, overlay, refuses = leaf_permissions(params, word, inherited & params.inherited_mask)
    granted = base & overlay
    if as_el0:
        granted >>= TO_UNPRIVILEGED
    elif pan and refuses:
        granted &= ~(PR | PW)
    if word & params.not_dirty and (params.pie or (params.hd and word & params.dbm)):
        granted &= ~PW
    return granted & (engine.READ | engine.WRITE | engine.EXECUTE)
