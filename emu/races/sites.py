"""Which instructions others can notice, by their encoding: barriers, TLB maintenance, exclusives, atomics.

Encodings: Arm ARM C4.1 (loads and stores; branches, exception generating and system instructions).
"""

from __future__ import annotations

from emu import engine
from emu.machine import Machine
from emu.trace import Barrier, Maintenance, barrier_name, tlbi_name

# (mask, value, kind), first match counts
_KINDS = (
    (0xFFFF_F01F, 0xD503_301F, "barrier"),  # DSB, DMB, ISB, and CLREX and SB, which are left out below
    (0xFFF8_E000, 0xD508_8000, "tlbi"),  # SYS with CRn 8 or 9
    (0x3F00_0000, 0x0800_0000, "atomic"),  # exclusive, ordered (LDAR, STLR), CAS
    (0x3B20_0C00, 0x3820_0000, "atomic"),  # LSE: LDADD, SWP ...; LDAPR
)
_OP2_OF_BARRIERS = (4, 5, 6)  # DSB, DMB, ISB
_WFE = 0xD503205F
_YIELD = 0xD503203F

# struct rw_semaphore.count (include/linux/rwsem.h): bit 0 a writer, from bit 8 on the readers, flags between.
WRITER, READER = 1, 1 << 8
_ANYONE = (WRITER | -READER) & (1 << 64) - 1
_LOCKS = {"down_read": WRITER, "down_write": _ANYONE}
_LOCKS |= {f"{name}_killable": mask for name, mask in _LOCKS.items()}
_LOCKS |= {"rwsem_down_read_slowpath": WRITER, "rwsem_down_write_slowpath": _ANYONE}  # it was free a moment ago


def lock_sites(machine: Machine) -> dict[int, int]:
    """Where a task would sleep for an rwsem: functions that take one, and the bits of `count` that they wait for."""
    if machine.image is None:
        return {}
    symbols = machine.image.symbols
    return {symbols[name]: mask for name, mask in _LOCKS.items() if name in symbols}


def site_kind(word: int) -> str | None:
    """ "barrier", "tlbi", "atomic", "wait"; None for an instruction that matters to nobody else but by its address."""
    if word in (_WFE, _YIELD):  # the CPU has nothing to do until another one acts
        return "wait"
    for mask, value, kind in _KINDS:
        if word & mask == value:
            return None if kind == "barrier" and word >> 5 & 7 not in _OP2_OF_BARRIERS else kind
    return None


def decoded(word: int, pc: int, kind: str, machine: Machine) -> Barrier | Maintenance | None:
    """What a barrier or TLBI at `pc` is, its operand being in the machine's registers; None for another instruction."""
    if kind == "barrier":
        name = barrier_name(word)
        return Barrier(name, pc) if name else None
    op1, crn, crm, op2, rt = (word >> at & mask for at, mask in ((16, 7), (12, 15), (8, 15), (5, 7), (0, 31)))
    operation = tlbi_name(op1, crn, crm, op2)
    operand = machine.cpu.read(engine.X[rt]) if rt < 31 else 0
    return Maintenance(operation, operand, pc) if operation else None
