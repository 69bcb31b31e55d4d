"""Why a machine stopped: the fault that the tables explain, the instructions around, the calls that led there.

Rules of this file:
- Nothing here runs code or changes the machine.
"""

from __future__ import annotations

from emu import engine
from emu.exceptions import Stop, Touch, disassemble, touches
from emu.mmu import Abort
from emu.view import View
from pgtable import Access, AccessType, NoMemory, Walk
from pgtable.memory import PAGE

_U64 = (1 << 64) - 1


def stop(view: View, home: int, kind: str, message: str, pc: int, walk: Walk | None = None) -> Stop:
    """A stop at `pc` with what is around; `home`: where the run began, which is no caller."""
    return Stop(kind, message, pc, view.describe(pc), walk, _around(view, pc), _backtrace(view, home))


def fault(view: View, pc: int, number: int) -> tuple[str, Walk | None]:
    """Of an abort that the CPU took (`number` of emu.engine): the message, and the walk that explains it."""
    el = view.cpu.el
    if number == engine.PREFETCH_ABORT:
        walk = view.translate(pc, Access.fetch(el))
        return f"instruction fetch from {pc:#x}: {_outcome(walk)}", walk
    parts = touches(view.instruction(pc), pc, view.address_register, el)
    walks = [w for part in parts for w in _walks(view, part)]
    if not walks:
        return f"data abort of {disassemble(view.instruction(pc), pc)}", None
    walk = next((w for w in walks if not w.ok), walks[0])
    return f"{walk.access} at {walk.va:#x}: {_outcome(walk)}", walk


def refusal(abort: Abort) -> str:
    """The message of an abort of the model MMU."""
    walk = abort.walk
    if walk.ok:
        return _no_ram(walk)
    if walk.access.type is AccessType.FETCH:
        return f"instruction fetch from {abort.pc:#x}: {_outcome(walk)}"
    return f"{walk.access} at {walk.va:#x}: {_outcome(walk)}"


def external_abort(view: View, pc: int) -> tuple[str, Walk] | None:
    """An access to a PA without RAM, which Unicorn takes for an error of its user's: the message, and the walk."""
    el = view.cpu.el
    parts = [Touch(pc, 4, Access.fetch(el)), *touches(view.instruction(pc), pc, view.address_register, el)]
    walks = (w for part in parts for w in _walks(view, part))
    walk = next((w for w in walks if w.ok and w.pa not in view.memory), None)
    return None if walk is None else (_no_ram(walk), walk)


def _walks(view: View, part: Touch) -> list[Walk]:
    """Walks of the first byte, and of the first in the next page if it goes that far (what FAR_EL1 gives)."""
    last = part.va + part.size - 1 & _U64
    vas = [part.va, last & -PAGE] if part.va // PAGE != last // PAGE else [part.va]
    return [view.translate(va, part.access) for va in vas]


def _no_ram(walk: Walk) -> str:
    return f"{walk.access} at {walk.va:#x}: external abort, no RAM at {walk.pa:#x}"


def _outcome(walk: Walk) -> str:
    if walk.ok:
        return "the tables allow it now (a stale TLB entry, or a check that Unicorn makes and the tables do not)"
    return str(walk.result)


def _around(view: View, pc: int) -> tuple[str, ...]:
    """Four instructions before and three after, the one at `pc` marked."""
    lines = []
    for at in range(pc - 16, pc + 16, 4):
        word = view.instruction(at)
        if word or at == pc:
            mark = "=>" if at == pc else "  "
            lines.append(f"{mark} {view.describe(at)}: {disassemble(word, at)}")
    return tuple(lines)


def _backtrace(view: View, home: int, depth: int = 16) -> tuple[str, ...]:
    """Return addresses: LR, then the chain of frame records (AAPCS64) from X29."""
    found, frame = [view.cpu.read(engine.LR)], view.cpu.read(engine.FP)
    for _ in range(depth):
        try:
            frame, address = view.word_at(frame, 8), view.word_at(frame + 8, 8)
        except (ValueError, NoMemory):
            break
        found.append(address)
    unique = [a for i, a in enumerate(found) if a and a != home and (not i or a != found[i - 1])]
    return tuple(view.describe(address) for address in unique)
