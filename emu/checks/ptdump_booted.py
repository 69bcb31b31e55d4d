"""`pgtable check ptdump --snapshot`: a booted kernel's own dump of its tables, against ours of its RAM file.

Rules of this file:
- Ours is made from the snapshot's file: nothing of the machine that runs the kernel is asked. Theirs is the text that
  ptdump_walk() writes into a buffer of the kernel's own page allocator, and what ptdump_check_wx() prints.
- Then one bit of one PTE is changed in both, in many PTEs, one at a time. The CPU walks a copy of the tables
  meanwhile, so that a changed entry is only looked at: the kernel's own text, stack or this buffer may be what it maps.
- Same bits, both sides: the whole texts must be equal, and so the lines that a bit changes are the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import numpy as np

from emu.checks.ptdump import AREA, MESSAGES, TIMEOUT, Dump, blocks_of, compare, hand_over, stopped
from emu.cpus import kernel_pages
from emu.linux_dump import LinuxTables, marker_table
from emu.machine import CallResult
from emu.snapshot import Snapshot
from emu.symbols import Symbols
from emu.warm import WarmMachine
from kernel_model import ptdump
from kernel_model.compare import RUNAWAY
from kernel_model.levels import U64
from kernel_model.mm import Runaway
from kernel_model.ptdump import Insecure, WxCount
from kernel_model.ptdump_text import AddrMarker, text
from kernel_model.variants import detect
from pgtable import PhysicalMemory, WalkParams, translate
from pgtable.bits import Layout, Words
from pgtable.descriptors import LAST_LEVEL
from pgtable.leaves import halves, leaves, tables

MIB = 1 << 20
BUFFER = 1 * MIB  # bytes for a text

_CHECKED = re.compile(r"Checked W\+X mappings: (?:passed|FAILED, (\d+) W\+X pages found, (\d+) non-UXN pages found)")
# Two forms of one address, the first hashed: 0x and digits, or a symbol and how far behind it.
_WARNED = re.compile(r"(non-UXN mapping at|W\+X mapping at) address \w+/([\w.]+)(?:\+(0x\w+))?")


class Flip(NamedTuple):
    """One bit of a leaf: the PA of the descriptor, the VA it maps, its level, and the field and bit changed."""

    slot: int
    va: int
    level: int
    field: str
    mask: int

    def __str__(self) -> str:
        return f"{self.field} ({self.mask:#x}) of the level {self.level} entry of {self.va:#x}, PA {self.slot:#x}"


@dataclass
class BootedReport:
    """A finished check. `lines` of the first text; `flips` made, of which `seen` changed the text;
    `fields`: how many flips of each field. `wx`: what the W^X check of the first counts."""

    kernel: str
    release: str
    lines: int = 0
    flips: int = 0
    seen: int = 0
    fields: dict[str, int] = field(default_factory=dict)
    wx: WxCount | None = None
    text: str = ""
    differences: list[str] = field(default_factory=list)


class Ours(LinuxTables):
    """The model over the RAM of a snapshot's file."""

    memory: PhysicalMemory

    def __init__(self, snapshot: Snapshot) -> None:
        image = snapshot.image
        super().__init__(snapshot.fresh_memory(), snapshot.registers, image, detect(image.symbols, image.btf.has))

    def dump(self) -> tuple[Dump, int | None]:
        """The text and the W^X check of the tables as they are in `memory`.

        Where the kernel's dump has no end (`RUNAWAY`): the text until there, and more basic blocks than it takes.
        """
        kernel = self.kernel()
        state = ptdump.ptdump_state(kernel, self.markers, base=self.params.half_base)
        wx, stop = None, ""
        try:
            ptdump.ptdump_walk_pgd(state, self.params.half_base, state.end_address)
            wx = ptdump.check_wx(self.kernel())
        except Runaway:
            stop = RUNAWAY
        made = Dump(text(state.notes, self.bits, self.levels), wx, b"", stop)
        return made, blocks_of(kernel, state.notes) if stop else None


class Theirs:
    """The booted kernel, on its own memory, with the CPU on a copy of the tables."""

    def __init__(self, snapshot: Snapshot, markers: tuple[AddrMarker, ...]) -> None:
        self.machine: WarmMachine = snapshot.machine(mmu="model" if snapshot.lpa2 else "cpu")
        self.btf = snapshot.image.btf
        area = kernel_pages(self.machine, AREA + BUFFER)
        self.buffer = area + AREA
        self.seq, self.info = hand_over(
            self.machine,
            area,
            (self.buffer, BUFFER),
            mm=self.machine.symbol("init_mm"),
            base=_upper(snapshot).half_base,
            markers=marker_table(snapshot.image) or markers,
        )
        self._onto_copy(snapshot)
        self.state = self.machine.save()

    def _onto_copy(self, snapshot: Snapshot) -> None:
        """The CPU's TTBR1_EL1 points to a copy of the tables; init_mm.pgd stays where it was."""
        memory, params = self.machine.memory, _upper(snapshot)
        page = params.fmt.granule.page_size
        level_of = _table_pages(memory, snapshot)
        first = translate(memory, snapshot.registers, kernel_pages(self.machine, len(level_of) * page)).pa
        moved = {old: first + i * page for i, old in enumerate(level_of)}
        for old, level in level_of.items():
            words = memory.words(old, page // 8).copy()
            if level != LAST_LEVEL:
                _relink(words, params.fmt.table(level), moved)
            memory.write(moved[old], words.tobytes())
        root = moved[params.base & -page] + params.base % page
        self.machine.set_register("TTBR1_EL1", snapshot.registers.TTBR1_EL1 - params.base + root)

    def dump(self, slot: int = 0, word: int = 0, blocks: int | None = None) -> Dump:
        """The text and the W^X check, from the saved state, with `word` at the PA `slot`."""
        machine = self.machine
        machine.restore(self.state)
        if slot:
            machine.memory.store(slot, word)
        walked = machine.call("ptdump_walk", self.seq, self.info, record="nothing", blocks=blocks, timeout=TIMEOUT)
        written = machine.word_at(self.seq + self.btf.offset("seq_file", "count"), 8)
        if written >= BUFFER:
            return Dump("", None, b"", "the text does not fit")
        said, stop = machine.read(self.buffer, written).decode("latin-1"), stopped(walked)
        if stop:
            return Dump(said, None, b"", stop)
        checked = machine.call("ptdump_check_wx", record="nothing", timeout=TIMEOUT)
        return Dump(said, *_verdict(checked, machine.snapshot.image.symbols))


def _table_pages(memory: PhysicalMemory, snapshot: Snapshot) -> dict[int, int]:
    """The table pages of the upper half: PA, and the level of their entries."""
    params = _upper(snapshot)
    found = tables(memory, snapshot.registers)
    upper = found.va >= np.uint64(params.half_base)
    pages = found.pa[upper] & np.uint64(U64 & -params.fmt.granule.page_size)
    return dict(zip(pages.tolist(), found.level[upper].tolist(), strict=True))


def _relink(words: Words, table: Layout, moved: dict[int, int]) -> None:
    """Points the table descriptors of a copied table to the copies."""
    for i in np.flatnonzero(words & np.uint64(table.mask("VALID", "TYPE"))):
        word = int(words[i])
        if table.mask("VALID", "TYPE") & ~word == 0:
            words[i] = table["TA"].put(word, moved[table["TA"].get(word)])


def _verdict(checked: CallResult, symbols: Symbols) -> tuple[WxCount | None, bytes, str]:
    """What a ptdump_check_wx() said: its counts and first addresses; or why there is none."""
    said = next(filter(None, map(_CHECKED.search, checked.printed)), None)
    if checked.stop or said is None:
        return None, b"", str(checked.stop or f"ptdump_check_wx() printed {checked.printed}")
    counts = [int(n or 0) for n in said.groups()]
    first = [
        Insecure(MESSAGES[kind], int(place, 16) if place.startswith("0x") else symbols[place] + int(offset or "0", 16))
        for line in checked.printed
        for kind, place, offset in _WARNED.findall(line)
    ]
    return WxCount(counts[0], counts[1], tuple(first)), b"", ""


def _upper(snapshot: Snapshot) -> WalkParams:
    return next(p for p in halves(snapshot.registers) if p.upper)


def flips(rng: Random, ours: Ours, count: int) -> Iterator[Flip]:
    """`count` times one bit of one leaf of the upper half: any but those of the address."""
    found = leaves(ours.memory, ours.regs)
    upper = np.flatnonzero(found.va >= np.uint64(ours.params.half_base))
    for _ in range(count):
        i = int(rng.choice(upper))
        level = int(found.level[i])
        leaf = ours.params.fmt.leaf(level)
        row = rng.choice([row for row in leaf if row.name not in ("OA", "TYPE")])
        mask = 1 << rng.choice([bit for bit in range(64) if row.mask >> bit & 1])
        yield Flip(int(found.slot[i]), int(found.va[i]), level, row.name, mask)


def run(
    snapshot: Snapshot, count: int, seed: int, *, progress: Callable[[str], None] = lambda text: None
) -> BootedReport:
    """Dumps the kernel's tables on both sides, and again with each of `count` random bits of `seed` changed."""
    ours = Ours(snapshot)
    theirs = Theirs(snapshot, ours.markers)
    report = BootedReport(snapshot.origin.kernel, snapshot.origin.release)
    if ours.own_markers and ours.own_markers != ours.markers:
        report.differences.append(f"address_markers: predicted {ours.markers}, real {ours.own_markers}")
    base, _ = ours.dump()
    report.differences += compare("the tables as they were", base, theirs.dump())
    report.text, report.lines, report.wx = base.text, base.text.count("\n"), base.wx
    for flip in flips(Random(seed), ours, count):
        progress(f"bit {report.flips + 1} of {count}")
        word = ours.memory.fetch(flip.slot)
        ours.memory.store(flip.slot, word ^ flip.mask)
        predicted, blocks = ours.dump()
        ours.memory.store(flip.slot, word)
        report.differences += compare(f"with {flip}", predicted, theirs.dump(flip.slot, word ^ flip.mask, blocks))
        report.flips += 1
        report.seen += predicted.text != base.text
        report.fields[flip.field] = report.fields.get(flip.field, 0) + 1
    return report
