"""The walk of 128-bit descriptors for one address (FEAT_D128, FEAT_LVA3). **Not judged**: no emulator has them.

    walk = walk128(fetch16(memory), WalkParams128.of(regs, Regime.EL10, va), va, Access.write(el=1))

Rules of this file:
- As in walk.py: the only effects are the fetch and `swap`, a fault is returned, every descriptor read is kept.
- `descend` is the same for both stages; stage 2 gives its faults another stage.
- The order of checks is M.a.a's (AArch64.S1Walk): EPD, start level, address of the first entry; then for each level
  read, decode, address of the next entry, nT of a skipping table, access flag of the table; then of the leaf
  Contiguous, nT, AMEC, output size, access flag; then alignment and permission, with the rules of walk.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

from pgtable.access import Access
from pgtable.d128 import NOT_JUDGED, WORD, Format128
from pgtable.descriptors import LAST_LEVEL, Kind
from pgtable.faults import Fault, FaultType
from pgtable.memory import Memory, NoMemory
from pgtable.params128 import Tables128, WalkParams128
from pgtable.registers128 import PAR_FAULT_128, PAR_OK_128
from pgtable.walk import RawStep, Step, Swap, Translation, Update, Walk
from pgtable.walk import _before_the_walk as range_fault
from pgtable.walk import _early_leaf_fault as early_leaf_fault
from pgtable.walk import _mmu_off as mmu_off
from pgtable.walk import _verdict as leaf_verdict
from pgtable.why import _success

Fetch16 = Callable[[int], int]


def fetch16(memory: Memory) -> Fetch16:
    """Reads 128-bit words of `memory` as a little-endian CPU does; raises NoMemory where there is no RAM."""

    def fetch(pa: int) -> int:
        low, high = memory.words(pa, 2).tolist()
        return int(low | high << 64)

    return fetch


def stored(update: Update, big_endian: bool) -> Update:
    """The update with its words as memory holds them: all 16 bytes change places (pseudocode MemSwapTableDesc)."""
    if not big_endian:
        return update
    return Update(update.pa, swapped(update.old), swapped(update.new))


def swapped(word: int) -> int:
    """A 128-bit word in the other byte order."""
    return int.from_bytes(word.to_bytes(WORD, "big"), "little")


class Translation128(Translation):
    """A Translation by a 128-bit leaf. Not judged."""

    __slots__ = ()

    @property
    def guarded(self) -> bool:
        """A guarded page (bit 113)."""
        return bool(self.word & _GP)


_GP = Format128().leaf(LAST_LEVEL)["GP"].mask


class Walk128(Walk):
    """One translation by 128-bit descriptors with its evidence, as Walk: not judged.

    `raw`, `steps` and `updates` have words of 128 bits; a level may be missing where a descriptor skips it.
    """

    params: WalkParams128

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The descriptors read, in order."""
        return steps_of(self.params, self.va, self.raw)

    def par(self) -> int:
        """PAR_EL1 after an AT instruction: the 128-bit form (pseudocode EncodePAR)."""
        return par128(self.result)

    def __str__(self) -> str:
        p = self.params
        half = ("upper" if p.upper else "lower") + " half, " if p.regime.has_el0 else ""
        form = f"{p.ia_bits}-bit, {p.fmt.granule.label} granule, 128-bit descriptors"
        lines = [f"VA {self.va:#018x}: {self.access}, {p.regime.value} {half}{form}"]
        lines += [step_text(step, p.fmt) for step in self.steps]
        return "\n".join([*lines, *_result_lines(self), f"  {NOT_JUDGED}"])


def steps_of(p: Tables128, va: int, raw: list[RawStep]) -> tuple[Step, ...]:
    """Raw steps decoded; `va`: the input address."""
    steps, width = [], p.start_bits if raw else 0
    for level, pa, word in raw:
        entry = va >> p.fmt.level_shift(level) & (1 << width) - 1
        steps.append(Step(level, pa, word, entry, p.fmt.kind(word, level)))
        width = p.fmt.index_bits(word)
    return tuple(steps)


def step_text(step: Step, fmt: Format128) -> str:
    """One line for one descriptor read."""
    skipped = fmt.skipped(step.word)
    what = attributes_text_128(step, fmt)
    target = ""
    if step.kind is Kind.TABLE:
        target = f" -> level {step.level + skipped + 1} {fmt.table_base(step.word):#x}"
    elif step.kind is not Kind.INVALID:
        target = f" -> {fmt.leaf(step.level)['OA'].get(step.word):#x}"
    return f"  L{step.level} {step.pa - WORD * step.entry:#x}[{step.entry}] {step.word:#034x} {what}{target}"


def attributes_text_128(step: Step, fmt: Format128) -> str:
    """The set fields of a descriptor, in one line."""
    layout = fmt.layout(step.word, step.level)
    shown = (f for f in layout if f.get(step.word) and not f.reserved and f.name not in ("VALID", "OA", "TA"))
    parts = [f.name if f.value_mask == 1 else f"{f.name}={f.get(step.word):#x}" for f in shown]
    return f"{step.kind.name.lower()} {' '.join(parts)}".rstrip()


def _result_lines(found: Walk128) -> list[str]:
    if isinstance(found.result, Translation):
        return [_success(found.params, found.result)]
    el = found.params.regime.el
    codes = f"    ESR_EL{el} {found.result.esr(found.access):#x}, FAR_EL{el} {found.va:#x}"
    return [f"  = {found.result}, by {found.result.cause}", codes]


def par128(result: Translation | Fault) -> int:
    """PAR_EL1 in its 128-bit form (pseudocode EncodePAR): the PA is in bits [119:76], bit 64 is 1."""
    if isinstance(result, Fault):
        return PAR_FAULT_128.pack(result.par(), D128=1)
    pa = result.pa & PAR_OK_128["PA"].value_mask
    return PAR_OK_128.pack(SH=result.sh, NS=int(result.ns), NSE=1, PA=pa, ATTR=result.attr, D128=1)


class Changed(Exception):  # noqa: N818  an event, not an error
    """Another observer changed a descriptor between read and write: hardware starts the walk again."""


class Run:
    """One attempt at a walk: what it reads with, what it read, what hardware changes.

    `change` records an update and makes it where there is a `swap`; raises Changed.
    """

    def __init__(self, fetch: Fetch16, swap: Swap | None, big_endian: bool) -> None:
        self._fetch, self._swap, self._big_endian = fetch, swap, big_endian
        self.raw: list[RawStep] = []
        self.updates: list[Update] = []

    def read(self, level: int, pa: int) -> int:
        """The descriptor at `pa` in the CPU's order; raises NoMemory."""
        word = self._fetch(pa)
        word = swapped(word) if self._big_endian else word
        self.raw.append((level, pa, word))
        return word

    def change(self, pa: int, old: int, new: int) -> None:
        """Hardware writes a descriptor."""
        if old == new:
            return
        update = Update(pa, old, new)
        if self._swap and not self._swap(*stored(update, self._big_endian)):
            raise Changed
        self.updates.append(update)


class Leaf(NamedTuple):
    """Where a descent ended. `tables`: the table descriptors passed, in order."""

    level: int
    pa: int
    word: int
    tables: tuple[int, ...]


def descend(run: Run, p: Tables128, ia: int) -> Leaf | Fault:
    """From the first table to the leaf for input address `ia`, or the fault that stopped it (of stage 1).

    Source: pseudocode S1Walk, S2Walk, DecodeDescriptorType, S1SLTTEntryAddress, S1TTEntryAddress, NextTableBase.
    """
    if p.start_level > LAST_LEVEL:
        return Fault(FaultType.TRANSLATION, 0, cause="SKL")
    fmt, level = p.fmt, p.start_level
    tables: list[int] = []
    pa = p.base | entry_offset(fmt, ia, level, p.start_bits)
    if pa & p.over:
        return Fault(FaultType.ADDRESS_SIZE, 0, cause="TTBR")
    while True:
        try:
            word = run.read(level, pa)
        except NoMemory:
            return Fault(FaultType.EXTERNAL_ON_WALK, level, cause="memory")
        kind = fmt.kind(word, level)
        if kind is Kind.INVALID:
            return Fault(FaultType.TRANSLATION, level, cause="descriptor")
        if kind is not Kind.TABLE:
            return Leaf(level, pa, word, tuple(tables))
        below = fmt.next_level(word, level)
        next_pa = fmt.table_base(word) | entry_offset(fmt, ia, below, fmt.index_bits(word))
        if next_pa & p.over:
            return Fault(FaultType.ADDRESS_SIZE, level, cause="table")
        if fmt.skipped(word) and nt_faults(p) and word & p.nt:
            return Fault(FaultType.TRANSLATION, level, cause="nT")
        run.change(pa, word, word | p.table_af if p.haft else word)
        tables.append(word)
        level, pa = below, next_pa


def entry_offset(fmt: Format128, ia: int, level: int, width: int) -> int:
    """The offset of the entry for `ia` in a table at `level` that resolves `width` address bits."""
    return (ia >> fmt.level_shift(level) & (1 << width) - 1) * WORD


def nt_faults(p: Tables128) -> bool:
    """nT = 1 is a translation fault on this CPU (FEAT_BBM, and its choice)."""
    return bool(p.features.nt_faults and p.features.bbm)


def walk128(fetch: Fetch16, params: WalkParams128, va: int, access: Access, swap: Swap | None = None) -> Walk128:
    """The walk of stage 1, for parameters already read; not judged. `fetch(pa)` gives 128 bits, or raises NoMemory.

    `swap(pa, old, new)` makes hardware's updates, words of 128 bits as memory holds them, and says whether the word
    was still `old`; without it they are only listed. The result is a Translation128 or a Fault.
    """
    while True:
        run = Run(fetch, swap, params.big_endian)
        try:
            result = attempt(run, params, va, access)
        except Changed:
            continue
        return Walk128(va, access, params, run.raw, result, tuple(run.updates))


def attempt(run: Run, p: WalkParams128, va: int, access: Access) -> Translation | Fault:
    """One attempt at stage 1's walk; raises Changed where it must be made again."""
    if not p.mmu_on:
        return mmu_off(p, va, access)
    fault = range_fault(p, va, access)
    if fault:
        return fault
    leaf = descend(run, p, va)
    if isinstance(leaf, Fault):
        return leaf
    return _output(run, p, va, access, leaf)


def _output(run: Run, p: WalkParams128, va: int, access: Access, leaf: Leaf) -> Translation | Fault:
    """What a leaf gives: its checks in order, hardware's update, the address (pseudocode S1Walk, S1Translate)."""
    level, pa, word, tables = leaf
    seen = word & ~p.contiguous if contiguous_off(p, tables) else word
    oa = p.fmt.leaf(level)["OA"].get(word)
    fault = early_leaf_fault(p, level, seen)
    if fault:
        return fault
    if p.amec_faults and word & p.amec and not word & p.ns:
        return Fault(FaultType.TRANSLATION, level, cause="AMEC")
    if oa & p.over:
        return Fault(FaultType.ADDRESS_SIZE, level, cause="OA")
    verdict: Any = leaf_verdict(p, level, seen, 0, access)
    if isinstance(verdict, Fault):
        return verdict
    run.change(pa, word, word ^ verdict.changed)
    offset = p.fmt.level_size(level) * verdict.run
    ng, ns = verdict.nG, verdict.ns
    if p.secure and any(table & p.ns_table for table in tables):
        ns, ng = True, p.regime.has_el0  # Secure tables that led to Non-secure ones
    target = oa & -offset | va & offset - 1
    return Translation128(target, level, word, verdict.attr, verdict.sh, verdict.perms, ng, ns)


def contiguous_off(p: WalkParams128, tables: tuple[int, ...]) -> bool:
    """DisCH is in force for a leaf: the descriptor's that led to its table, else TCR2's (S1NextWalkStateTable)."""
    return bool(tables[-1] & p.disable_contiguous) if tables else p.disch
