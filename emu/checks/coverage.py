"""Which basic blocks of compiled functions a run has reached, and why the others may not have been.

    with Coverage(machine, ["set_memory_valid", "update_range_prot"]) as seen:
        machine.call("set_memory_valid", va, 4, 0)
    for row in seen.report(): ...

Rules of this file:
- Unicorn tells each piece of code that it runs through, by where it begins and how long it is; hooks are there only
  while recording, and only for these functions. A piece that faults in its middle, or whose function is replaced by
  a stub, counts as run to its end.
- While recording, a block of these functions costs some 0.7 us; otherwise nothing.
- A reason is found in the code or in the kernel's tables. Where neither says anything it is "".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from emu.branches import LINK, B, displacement
from emu.callers import words_of
from emu.checks.blocks import Block, Part, Patches, blocks, parts, patches, plain_next, predecessors
from emu.exceptions import disassemble
from emu.image import KernelImage

if TYPE_CHECKING:
    from emu.machine import Machine

STACK_CHECK = "stack protector failure (__stack_chk_fail)"
ONCE = "WARN_ONCE's second test"
MESSAGE = "message of a WARN"
ORPHAN = "nothing leads here but an alternative that is not applied"
UBSAN = "report of undefined behaviour (UBSAN)"
LEADS_TO, BEHIND = "leads to: ", "behind: "
# Functions that are called only where something is wrong, and what their callers are then.
_TELLING = {
    "__stack_chk_fail": STACK_CHECK,
    "__warn_printk": MESSAGE,
    "panic": "panic",
    "__fortify_panic": "panic",
    "queued_spin_lock_slowpath": "a spin lock that another CPU holds",
}


class Unreached(NamedTuple):
    """A block that did not run: `offset` from the start of `part`, its first instruction, and why ("" if unknown)."""

    part: str
    offset: int
    instruction: str
    reason: str

    def __str__(self) -> str:
        return f"{self.part}+{self.offset:#x}: {self.instruction}" + (f"  ({self.reason})" if self.reason else "")


class FunctionCoverage(NamedTuple):
    """A function with all its parts: how many blocks it has, how many of them ran, and the others."""

    name: str
    blocks: int
    reached: int
    unreached: tuple[Unreached, ...]

    @property
    def unexplained(self) -> tuple[Unreached, ...]:
        """The blocks that did not run and for which there is no reason."""
        return tuple(block for block in self.unreached if not block.reason)

    def __str__(self) -> str:
        return f"{self.name}: {self.reached} of {self.blocks} blocks, {len(self.unexplained)} missed without a reason"


Run = tuple[int, int]  # address and bytes of a piece of code that ran


class Coverage:
    """Records what runs of `functions` on `machine` between `start` and `stop`, or inside `with`.

    `executed`: what others have recorded of the same kernel, which is added to: so one report can be about many
    machines. Raises SymbolError for a function that the kernel has not.
    """

    def __init__(self, machine: Machine, functions: Iterable[str], executed: set[Run] | None = None) -> None:
        if machine.image is None:
            raise ValueError("a machine without a kernel has no functions to cover")
        self.image = machine.image
        self.functions = {name: parts(machine.image, name) for name in functions}
        self.executed: set[Run] = set() if executed is None else executed
        self._cpu = machine.cpu
        self._handles: list[int] = []

    def start(self) -> None:
        """Begins to record."""
        for part in {part for found in self.functions.values() for part in found}:
            self._handles.append(self._cpu.on_block_in(self._ran, part.start, part.end - 4))
        self._cpu.flush_code()

    def stop(self) -> None:
        """Ends recording; nothing is left of it."""
        while self._handles:
            self._cpu.remove(self._handles.pop())
        self._cpu.flush_code()

    def __enter__(self) -> Coverage:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _ran(self, pc: int, size: int) -> bool:
        self.executed.add((pc, size))
        return True

    def report(self) -> list[FunctionCoverage]:
        """What has been reached so far, function by function."""
        patched = patches(self.image, [part for found in self.functions.values() for part in found])
        ran = addresses(self.executed)
        return [_cover(self.image, name, found, patched, ran) for name, found in self.functions.items()]


def addresses(executed: Iterable[Run]) -> set[int]:
    """The address of every instruction in the pieces that ran."""
    return {at for pc, size in executed for at in range(pc, pc + size, 4)}


def _cover(image: KernelImage, name: str, where: list[Part], patched: Patches, ran: set[int]) -> FunctionCoverage:
    made = blocks(image, where, patched)
    missed = [block for block in made if block.start not in ran]
    why = reasons(image, made, {block.start for block in missed}, patched)
    rows = tuple(_unreached(image, block, why[block.start]) for block in missed)
    return FunctionCoverage(name, len(made), len(made) - len(missed), rows)


def _unreached(image: KernelImage, block: Block, reason: str) -> Unreached:
    text = disassemble(image.word(block.start, 4), block.start)
    return Unreached(block.part.name, block.start - block.part.start, text, reason)


# reasons


def reasons(image: KernelImage, made: list[Block], missed: set[int], patched: Patches) -> dict[int, str]:
    """Why each of the blocks `missed` (by their starts) may not have run; "" where nothing says so.

    A block has a reason of its own, or all blocks before it have one and did not run, or all behind it.
    """
    before = predecessors(made)
    by_start = {block.start: block for block in made}
    why = {at: _own(image, by_start, before, by_start[at], patched) for at in missed}
    while True:
        found = {at: _inherited(by_start[at], before, why) for at in sorted(missed) if not why[at]}
        found = {at: reason for at, reason in found.items() if reason}
        if not found:
            return why
        why.update(found)


def _own(
    image: KernelImage, made: Mapping[int, Block], before: Mapping[int, list[int]], block: Block, patched: Patches
) -> str:
    bug = image.bugs.get(block.end - 4)
    if bug:
        return f"{'WARN' if bug.warn else 'BUG'} at {bug.file}:{bug.line}"
    called = [
        _TELLING.get(name) or (UBSAN if name.startswith("__ubsan_handle") else "") for name in _calls(image, block)
    ]
    if any(called):
        return next(filter(None, called))
    if _reads_already_done(image, block):
        return ONCE
    if block.start in patched.fixups:
        return f"exception fixup of {image.symbols.describe(patched.fixups[block.start])}"
    edges = [_edge(image, made[at], block.start, patched) for at in before.get(block.start, [])]
    if not edges and block.start != block.part.start and not any(map(_jumps_by_register, _last_words(image, made))):
        return ORPHAN
    return edges[0] if edges and all(edges) else ""


def _last_words(image: KernelImage, made: Mapping[int, Block]) -> Iterator[int]:
    return (image.word(block.end - 4, 4) for block in made.values())


def _jumps_by_register(word: int) -> bool:
    """BR (with or without authentication): the way into the cases of a switch."""
    return word & 0xFE9F_0000 == 0xD61F_0000 & 0xFE9F_0000 and word >> 21 & 3 == 0


def _calls(image: KernelImage, block: Block) -> Iterator[str]:
    """The symbols that a block calls or jumps to."""
    for at, word in _words(image, block):
        if word & B.mask == B.value and (word & LINK or at == block.end - 4):
            place = image.symbols.at(at + 4 * (displacement(word) or 0))
            if place and not place.offset:
                yield place.name


def _words(image: KernelImage, block: Block) -> Iterator[tuple[int, int]]:
    return zip(range(block.start, block.end, 4), words_of(image, block.start, block.end).tolist(), strict=True)


def _edge(image: KernelImage, block: Block, there: int, patched: Patches) -> str:
    """Why the last instruction of `block`, as it is in the image, does not lead to `there`; "" if it may."""
    at = block.end - 4
    if there in plain_next(image, at):
        return ""
    label, alternative = patched.labels.get(at), patched.alternatives.get(at)
    if label:
        kind = "tracepoint off" if label.key.startswith("__tracepoint") else "static branch"
        return f"{kind}: {label.key}"
    return f"alternative: {alternative.capability}" if alternative else ""


def _inherited(block: Block, before: Mapping[int, list[int]], why: Mapping[int, str]) -> str:
    for places, word in ((before.get(block.start, []), BEHIND), (block.successors, LEADS_TO)):
        found = [why.get(at, "") for at in places if at != block.start]
        if found and all(found):
            return word + found[0].removeprefix(BEHIND).removeprefix(LEADS_TO)
    return ""


# ADRP, and LDRB (immediate, unsigned offset), Arm ARM C4.1
_ADRP, _PC_RELATIVE = 0x9000_0000, 0x9F00_0000
_LDRB, _LDRB_MASK = 0x3940_0000, 0xFFC0_0000


def _reads_already_done(image: KernelImage, block: Block) -> bool:
    """A block that looks at the byte with which a WARN_ONCE remembers that it has fired."""
    pages: dict[int, int] = {}
    for at, word in _words(image, block):
        if word & _PC_RELATIVE == _ADRP:
            pages[word & 31] = (at >> 12) + _page_distance(word) << 12
        elif word & _LDRB_MASK == _LDRB and word >> 5 & 31 in pages:
            place = image.symbols.at(pages[word >> 5 & 31] + (word >> 10 & 0xFFF))
            if place and place.name.startswith("__already_done"):
                return True
    return False


def _page_distance(word: int) -> int:
    """ADRP's immediate: pages, signed."""
    value = (word >> 5 & (1 << 19) - 1) << 2 | word >> 29 & 3
    return value - (value >> 20 << 21)
