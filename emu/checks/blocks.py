"""Basic blocks of compiled functions, and what the kernel's own tables say of the edges between them.

Rules of this file:
- A function is all that the compiler made of it: `NAME` and `NAME.cold`, `NAME.part.0`, `NAME.isra.0`, ...
- A block begins at the start of a part, at a branch's target, behind a branch, a return or a BRK. Calls end none.
- Places that the kernel patches (jump labels, alternatives) are branches that may go either way, whatever they are in
  the image. The replacements of alternatives are templates, not code, and belong to no block; so do padding and data.
Sources: struct jump_entry (include/linux/jump_label.h), struct alt_instr (arch/arm64/include/asm/alternative.h),
struct exception_table_entry (arch/arm64/include/asm/extable.h), struct arm64_cpu_capabilities (cpufeature.h).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from emu.branches import Flow, displacement, flow
from emu.callers import code_ranges, words_of
from emu.exceptions import disassemble
from emu.image import BtfError, KernelImage

NOP = 0xD503_201F
UDF = 0


class Part(NamedTuple):
    """One symbol of a function: addresses [start, end)."""

    name: str
    start: int
    end: int


class Label(NamedTuple):
    """A jump label: the address of its instruction, where it leads when on, and the name of its key."""

    code: int
    target: int
    key: str


class Alternative(NamedTuple):
    """Instructions that are replaced where the CPU has a capability: [start, end) by those at `replacement`, or by a
    callback's (`replacement` 0). `capability` in words, or its number."""

    start: int
    end: int
    replacement: int
    capability: str


@dataclass(frozen=True)
class Patches:
    """What an image's tables say; empty where it has no symbols for them."""

    labels: dict[int, Label] = field(default_factory=dict)  # by address of the instruction
    alternatives: dict[int, Alternative] = field(default_factory=dict)  # by address of the first instruction
    fixups: dict[int, int] = field(default_factory=dict)  # faulting instruction by address of its fixup
    replacements: frozenset[int] = frozenset()  # addresses of all replacement instructions


class Block(NamedTuple):
    """Instructions [start, end) of `part`, and the starts of the blocks that may run next."""

    part: Part
    start: int
    end: int
    successors: tuple[int, ...]


def parts(image: KernelImage, function: str) -> list[Part]:
    """The symbols of `function`. Raises SymbolError for a name of which nothing is there, or that is not one."""
    symbols, code = image.symbols, code_ranges(image)
    names = [function] if function in symbols or symbols.all(function) else []
    names += [n for n in symbols.variants(function) if n.startswith(f"{function}.") and n in symbols]
    found = [Part(n, symbols[n], symbols[n] + symbols.size_of(n)) for n in names or [function]]
    return [part for part in found if any(start <= part.start < end for start, end in code)]


# the kernel's tables


def patches(image: KernelImage, where: Iterable[Part]) -> Patches:
    """The rows of the tables that are about code in `where`."""
    spans = list(where)

    def inside(address: int) -> bool:
        return any(part.start <= address < part.end for part in spans)

    names = capabilities(image)
    labels = {x.code: x for x in _labels(image) if inside(x.code)}
    rows = list(_alternatives(image, names))
    alternatives = {x.start: x for x in rows if inside(x.start)}
    fixups = {fixup: instruction for instruction, fixup in _fixups(image) if inside(fixup)}
    templates = (x.replacement + i for x in rows if inside(x.replacement) for i in range(0, x.end - x.start, 4))
    return Patches(labels, alternatives, fixups, frozenset(templates))


def _rows(image: KernelImage, first: str, behind: str, size: int) -> Iterator[int]:
    if first in image.symbols and behind in image.symbols:
        yield from range(image.symbols[first], image.symbols[behind] - size + 1, size)


def _relative(image: KernelImage, at: int, size: int = 4) -> int:
    """The address that the word at `at` gives as a signed distance from itself."""
    return at + int.from_bytes(image.bytes_at(at, size), "little", signed=True)


def _labels(image: KernelImage) -> Iterator[Label]:
    for row in _rows(image, "__start___jump_table", "__stop___jump_table", 16):
        key = _relative(image, row + 8, 8) & ~3  # the low bits are flags
        yield Label(_relative(image, row), _relative(image, row + 4), image.symbols.describe(key))


def _alternatives(image: KernelImage, names: dict[int, str]) -> Iterator[Alternative]:
    for row in _rows(image, "__alt_instructions", "__alt_instructions_end", 12):
        start, capability = _relative(image, row), image.word(row + 8, 2) & 0x7FFF  # the top bit: a callback
        length, replaced = image.word(row + 10, 1), image.word(row + 11, 1)
        replacement = _relative(image, row + 4) if replaced else 0
        what = names.get(capability) or _callback(image, row, replaced) or f"capability {capability}"
        yield Alternative(start, start + length, replacement, what)


def _callback(image: KernelImage, row: int, replaced: int) -> str:
    """The function that writes the replacement, where there is none in the image."""
    return "" if replaced else image.symbols.describe(_relative(image, row + 4)).removeprefix("__kvm_nvhe_")


def _fixups(image: KernelImage) -> Iterator[tuple[int, int]]:
    for row in _rows(image, "__start___ex_table", "__stop___ex_table", 12):
        yield _relative(image, row), _relative(image, row + 4)


def capabilities(image: KernelImage) -> dict[int, str]:
    """What the kernel calls its CPU capabilities, by number; {} for an image that does not tell."""
    found: dict[int, str] = {}
    try:
        size = image.btf.size("arm64_cpu_capabilities")
        number = image.btf.offset("arm64_cpu_capabilities", "capability")
    except BtfError:
        return found
    for table in ("arm64_errata", "arm64_features"):
        if table in image.symbols:
            start = image.symbols[table]
            for row in range(start, start + image.symbols.size_of(table) - size + 1, size):
                text = _text(image, image.word(row))
                if text:
                    found.setdefault(image.word(row + number, 2), text)
    return found


def _text(image: KernelImage, va: int) -> str:
    if not image.base <= va < image.base + len(image.data) - 64:
        return ""
    return image.bytes_at(va, 64).split(b"\0")[0].decode("latin-1")


# blocks


def blocks(image: KernelImage, where: list[Part], patched: Patches) -> list[Block]:
    """The basic blocks of the parts, in address order."""
    code = {part: words_of(image, part.start, part.end).tolist() for part in where}
    edges = {at: _next(image, patched, at, word) for part in where for at, word in _each(part, code[part])}
    starts = _leaders(where, edges, patched)
    made = [block for part in where for block in _cut(part, starts, edges)]
    return sorted(_without_padding(image, made, patched, {part.start for part in where} | patched.fixups.keys()))


def _each(part: Part, words: list[int]) -> Iterator[tuple[int, int]]:
    return zip(range(part.start, part.end, 4), words, strict=False)


def _next(image: KernelImage, patched: Patches, at: int, word: int) -> tuple[int, ...] | None:
    """Where control goes after the instruction at `at`; None for one that only goes on."""
    label, alternative = patched.labels.get(at), patched.alternatives.get(at)
    if label:
        return (at + 4, label.target)
    if alternative and alternative.end == at + 4:
        replacement = alternative.replacement
        branch = displacement(image.word(replacement, 4)) if replacement else None
        own = displacement(word) if flow(word) is Flow.JUMP else None
        if branch is not None or own is not None:
            there = replacement + 4 * branch if branch is not None else at + 4 * (own or 0)
            return (at + 4, there)
    return None if flow(word) in (Flow.ON, Flow.CALL) else plain_next(image, at)


def plain_next(image: KernelImage, at: int) -> tuple[int, ...]:
    """Where control goes after the instruction at `at` as it is in the image; () for where a register says."""
    word = image.word(at, 4)
    does = flow(word)
    if does in (Flow.ON, Flow.CALL):
        return (at + 4,)
    if does is Flow.TRAP:
        bug = image.bugs.get(at)
        return (at + 4,) if bug and bug.warn else ()
    ahead = displacement(word)
    there = () if ahead is None else (at + 4 * ahead,)
    return (at + 4, *there) if does is Flow.CONDITIONAL else there


def _leaders(where: list[Part], edges: dict[int, tuple[int, ...] | None], patched: Patches) -> set[int]:
    targets = {there for edge in edges.values() if edge for there in edge}
    behind = {at + 4 for at, edge in edges.items() if edge is not None}
    borders = {at for at in edges if (at in patched.replacements) != (at - 4 in patched.replacements)}
    return ({part.start for part in where} | targets | behind | borders | patched.fixups.keys()) & edges.keys()


def _cut(part: Part, starts: set[int], edges: dict[int, tuple[int, ...] | None]) -> Iterator[Block]:
    mine = sorted(at for at in starts if part.start <= at < part.end)
    for start, end in zip(mine, [*mine[1:], part.end], strict=True):
        edge = edges[end - 4]
        successors = (end,) if edge is None else edge
        yield Block(part, start, end, tuple(dict.fromkeys(there for there in successors if there in starts)))


def _without_padding(image: KernelImage, made: list[Block], patched: Patches, entries: set[int]) -> Iterator[Block]:
    """Without replacements, and without blocks that nothing leads to and that are no instructions."""
    code = [block for block in made if block.start not in patched.replacements]
    padding = {block.start for block in code if _is_padding(image, block)}
    led_to = {there for block in code if block.start not in padding for there in block.successors}
    kept = {block.start for block in code if block.start not in padding or block.start in led_to | entries}
    for block in code:
        if block.start in kept:
            yield block._replace(successors=tuple(there for there in block.successors if there in kept))


def _is_padding(image: KernelImage, block: Block) -> bool:
    words = words_of(image, block.start, block.end).tolist()
    return all(word in (NOP, UDF) for word in words) or disassemble(words[0], block.start).startswith(".word")


def predecessors(made: Iterable[Block]) -> dict[int, list[int]]:
    """By the start of a block: the starts of those that may come before it."""
    found: dict[int, list[int]] = defaultdict(list)
    for block in made:
        for there in block.successors:
            found[there].append(block.start)
    return found
