"""What stopped the guest: the access of a faulting instruction, disassembly, a backtrace.

Unicorn tells neither the fault address nor a syndrome (ESR, FAR read as zero): the instruction is decoded here and
the tables are walked by pgtable, which says why.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from pgtable import Access, AccessType, Walk


@dataclass(frozen=True)
class Stop:
    """Why a run ended before its end.

    `kind`: "fault", "bug", "undefined", "exception", "timeout", "budget" or "engine"; on a booted kernel also
    "sleep", "idle", "ipi", "panic" or "device" (see emu.warm). `walk`: for a fault, the walk
    that explains it (None where the model finds nothing wrong). `disassembly` is around the PC, marked `=>`.
    """

    kind: str
    message: str
    pc: int
    symbol: str = ""
    walk: Walk | None = None
    disassembly: tuple[str, ...] = ()
    backtrace: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.kind}: {self.message}"]
        parts += [str(self.walk)] if self.walk else []
        parts += ["  " + line for line in self.disassembly]
        parts += ["  called from " + line for line in self.backtrace]
        return "\n".join(parts)


class Touch(NamedTuple):
    """A part of what an instruction accesses: `size` bytes at `va`."""

    va: int
    size: int
    access: Access


@cache
def _disassembler() -> Any:
    import capstone

    engine = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM)
    engine.detail = True
    return engine


def disassemble(word: int, pc: int) -> str:
    """One instruction as text, `.word 0x...` if it is none."""
    for instruction in _disassembler().disasm(struct.pack("<I", word), pc):
        return f"{instruction.mnemonic} {instruction.op_str}".rstrip()
    return f".word {word:#010x}"


# [x1, w2, uxtw #2], [sp, #16], [x3], [x3, #-8]!, [x3], #8; not the lane of {v0.b}[3]
_MEMORY = re.compile(r"\[([xs]\w+)(?:, (?:#(-?\w+)|(\w+)(?:, (\w+)(?: #(\d+))?)?))?\](!?)(?:, #(-?\w+))?")
_LITERAL = re.compile(r", #(\w+)$")  # ldr x0, #0x400008: the address, as capstone works it out
_VECTOR = re.compile(r"\bv\d+\.(\d*)([bhsd])")  # v0.16b, or v0.b of a lane
_SIZED = {"b": 1, "sb": 1, "h": 2, "sh": 2, "sw": 4}
_PAIRS = ("ldp", "stp", "ldnp", "stnp", "ldpsw", "ldxp", "ldaxp", "stxp", "stlxp")
_REGISTER_SIZES = {"b": 1, "h": 2, "s": 4, "d": 8, "q": 16, "w": 4, "x": 8}


def touches(word: int, pc: int, register: Callable[[int], int], el: int) -> list[Touch]:
    """What the load, store, atomic or cache instruction `word` accesses, in address order; [] for others.

    `register(n)` gives Xn, 31 for SP. Post-index displacement comes after the access and does not count.
    """
    text = disassemble(word, pc)
    mnemonic, _, operands = text.partition(" ")
    if mnemonic == "dc" and operands.startswith("zva"):
        return [Touch(register(_number(operands.split()[-1])) & -64, 64, Access.write(el))]
    va = _address(mnemonic, operands, register)
    if va is None or mnemonic.startswith("prf"):
        return []
    size, count = _size(mnemonic, operands)
    access = _access(mnemonic, el)
    return [Touch(va + i * size & (1 << 64) - 1, size, access) for i in range(count)]


def _number(name: str) -> int:
    return 31 if name in ("sp", "wsp", "xzr", "wzr") else int(name[1:])


def _address(mnemonic: str, operands: str, register: Callable[[int], int]) -> int | None:
    memory = _MEMORY.search(operands)
    if memory:
        return _effective(memory, register)
    literal = _LITERAL.search(operands) if mnemonic in ("ldr", "ldrsw") else None
    return int(literal[1], 0) if literal else None


def _effective(memory: re.Match[str], register: Callable[[int], int]) -> int:
    base, displacement, index, extend, shift = memory.group(1, 2, 3, 4, 5)
    va = register(_number(base))
    if displacement:
        va += int(displacement, 0)
    if index:
        value = 0 if index in ("xzr", "wzr") else register(_number(index))
        if extend in ("uxtw", "sxtw"):
            value &= (1 << 32) - 1
            value -= (1 << 32) if extend == "sxtw" and value >> 31 else 0
        va += value << int(shift or 0)
    return va & (1 << 64) - 1


def _size(mnemonic: str, operands: str) -> tuple[int, int]:
    """Bytes of one element, and how many."""
    vectors = _VECTOR.findall(operands)
    if vectors:  # whole registers, or one lane, or one element for all lanes (LD1R)
        lanes, kind = vectors[0]
        return _REGISTER_SIZES[kind] * (int(lanes) if lanes and not mnemonic.endswith("r") else 1), len(vectors)
    data = operands.split("[")[0].replace("{", "").replace("}", "").split(",")
    names = [name.strip() for name in data if name.strip() and not name.strip().startswith("#")]
    if mnemonic.startswith(("stxr", "stlxr", "stxp", "stlxp")):
        names = names[1:]  # the first is the status
    pair = mnemonic.rstrip("r") in _PAIRS or mnemonic.startswith("casp")
    suffix = re.search(r"(sb|sh|sw|b|h)$", mnemonic)
    if suffix and not mnemonic.endswith("ldpsw"):
        return _SIZED[suffix.group(1)], 1
    size = 4 if mnemonic == "ldpsw" else _REGISTER_SIZES.get(names[0][0], 8) if names else 8
    return size, 2 if pair else 1


_ATOMIC = re.compile(
    r"^(cas|swp|ldadd|ldclr|ldeor|ldset|ldsmax|ldsmin|ldumax|ldumin|st(add|clr|eor|set|smax|smin|umax|umin))"
)


def _access(mnemonic: str, el: int) -> Access:
    if _ATOMIC.match(mnemonic):
        kind = AccessType.ATOMIC
    else:
        kind = AccessType.WRITE if mnemonic.startswith("st") else AccessType.READ
    unprivileged = mnemonic.startswith(("ldtr", "sttr")) and el > 0
    return Access(kind, el, unprivileged=unprivileged)
