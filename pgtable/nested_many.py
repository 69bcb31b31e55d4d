"""Both stages for arrays of addresses: stage 1 on the guest's memory, stage 2 on its results, a class at a time.

Rules of this file:
- Stage 1 is walked by bulk.py as if IPAs were PAs: `GuestMemory` is RAM as the guest's tables see it.
- Addresses that meet the same class of stage 1 and the same attributes in stage 2's leaf share their fate. The scalar
  walk of one of them (nested.py) decides it: no rule is said twice.
- What stage 2 may refuse on the way is walked one by one, each 4 KiB page of VAs once: tables that cannot be read, and
  stage 1 descriptors that hardware would change.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pgtable.access import Access
from pgtable.bits import Flags, Words
from pgtable.bulk import Many, addresses_of, each_once, in_memory, stage1_many
from pgtable.classes import CLASS, ENDS, LEVELS, NO_WORDS, Numbers, Table, by_level, row_of, type_bits
from pgtable.descriptors import Kind
from pgtable.faults import Fault
from pgtable.memory import PAGE, Memory, NoMemory, WordChanges
from pgtable.nested import READ_TABLE, NestedWalk, translate_nested
from pgtable.params import Regime, WalkParams
from pgtable.regions import Descent, reader
from pgtable.registers import Registers
from pgtable.stage2 import Stage2Params, stage2_walk
from pgtable.walk import Update


@dataclass(frozen=True, eq=False)
class NestedMany(Many):
    """What `translate_many` found with stage 2 on. As Many; `word` is stage 1's descriptor.

    `updates` has words as memory holds them. `ipa` (uint64): stage 1's result, or what stage 2 was asked for where it
    refused; 0 where stage 1 faulted. `hpfar` (uint64): HPFAR_EL2 of stage 2's faults; 0 where it is UNKNOWN.
    """

    ipa: Words = field(default_factory=lambda: NO_WORDS)
    hpfar: Words = field(default_factory=lambda: NO_WORDS)


class GuestMemory:
    """A guest's physical memory: words at IPAs, as its walks of stage 1 read them through stage 2.

    NoMemory is raised where stage 2 refuses, and where there is no RAM. `updates`: what hardware changed in stage 2's
    tables for these reads.
    """

    def __init__(self, memory: Memory, p: Stage2Params) -> None:
        self.memory = memory
        self.p = p
        self.updates: list[Update] = []
        self._pages: dict[int, int | None] = {}

    def pa_of(self, ipa: int) -> int | None:
        """Where a table at `ipa` is; None where it cannot be read."""
        page = ipa // PAGE
        if page not in self._pages:
            found = stage2_walk(self.memory.fetch, self.p, page * PAGE, READ_TABLE, s1ptw=True)
            self.updates += found.stored_updates
            self._pages[page] = None if isinstance(found.result, Fault) else found.result.pa
        base = self._pages[page]
        return None if base is None else base | ipa % PAGE

    def fetch(self, ipa: int) -> int:
        """The 64-bit word at `ipa`; raises NoMemory."""
        pa = self.pa_of(ipa)
        if pa is None:
            raise NoMemory(ipa)
        return self.memory.fetch(pa)

    def words(self, ipa: int, n: int) -> Words:
        """The `n` words from `ipa` on, as uint64 of shape (n,); raises NoMemory."""
        parts = []
        while n > 0:
            pa, count = self.pa_of(ipa), min(n, (PAGE - ipa % PAGE) // 8)
            if pa is None:
                raise NoMemory(ipa)
            parts.append(self.memory.words(pa, count))
            ipa, n = ipa + 8 * count, n - count
        return np.concatenate(parts) if parts else NO_WORDS

    def gather(self, ipas: Words) -> tuple[Words, Flags]:
        """The word at each of `ipas` and whether it can be read, in the shape of `ipas`."""
        return reader(self).gather(ipas)

    def tables(self, ipas: Words, n: int) -> tuple[Words, Flags]:
        """Tables of `n` words at each of `ipas`: uint64 (len(ipas), n), and whether any of it can be read.

        A page that stage 2 refuses reads as zero: what it holds is not reached.
        """
        words, there = np.zeros((len(ipas), n), np.uint64), np.zeros(len(ipas), bool)
        for i, ipa in enumerate(ipas.tolist()):
            first = 0
            while first < n:
                count = min(n - first, (PAGE - (ipa + 8 * first) % PAGE) // 8)
                with contextlib.suppress(NoMemory):
                    words[i, first : first + count], there[i] = self.words(ipa + 8 * first, count), True
                first += count
        return words, there


def nested_many(
    memory: Memory, regs: Registers, vas: npt.ArrayLike, access: Access, *, stage1_only: bool = False
) -> NestedMany:
    """What EL1&0 under stage 2 makes of each of `vas`; see `translate_many` (mmu.py).

    `stage1_only`: the results are IPAs, as for `translate_nested`.
    """
    flat, shape = addresses_of(vas)
    p2 = Stage2Params.of(regs)
    guest = GuestMemory(memory, p2)
    first = stage1_many(guest, regs, flat, access, Regime.EL10)
    alone = first.aborts | (first._column("flip") != 0) | _goes_alone(regs)
    ask = _Asker(memory, regs, access, stage1_only)
    sheet = _Sheet(first, np.flatnonzero(alone), guest)
    sheet.alike(ask, np.flatnonzero(~alone), None if stage1_only else _leaves(memory, p2, first, ~alone), flat)
    sheet.one_by_one(ask, flat)
    return sheet.many(shape, access)


def _goes_alone(regs: Registers) -> bool:
    """Every walk may be refused on the way (FEAT_HAFT), or change the IPA space (Secure state)."""
    halves = [WalkParams.of(regs, Regime.EL10, va) for va in (0, 1 << 55)]
    return any(p.haft or p.secure for p in halves)


class _Leaves(NamedTuple):
    """What stage 2 has for some IPAs: `code` says which fate they share, `pa`, `slot` and `word` of the leaf."""

    code: Numbers
    pa: Words
    slot: Words
    word: Words
    tables: list[WordChanges]


def _leaves(memory: Memory, p: Stage2Params, first: Many, these: Flags) -> _Leaves:
    """Stage 2's descent for the IPAs that stage 1 gave. Those it did not give, or out of range, have own codes."""
    ipa = first.pa[these]
    some = np.flatnonzero(first.ok[these] & (ipa >> np.uint64(p.ia_bits) == 0) & (not p.why_off))
    pa, slot, word = np.zeros((3, ipa.size), np.uint64)
    found = _Leaves(first.ok[these].astype(np.intp), pa, slot, word, [])
    if not some.size:
        return found
    descent = Descent(reader(memory), p)
    ends = descent.to_leaf(ipa[some])
    found.tables.extend(descent.updates)
    output, size = np.zeros(some.size, np.uint64), np.ones(some.size, np.uint64)
    leaf = np.zeros(some.size, bool)
    for level, _, _ in p.levels:
        kinds = np.array([kind in (Kind.BLOCK, Kind.PAGE) for kind in p.kinds[level]])
        here = (ends.level == level) & (ends.end == 0)
        here[here] = kinds[type_bits(p, ends.word[here])]
        output[here], size[here] = p.output_address(level, ends.word[here]), p.fmt.granule.level_size(level)
        leaf |= here
    keep = np.uint64((1 << 64) - 1 ^ p.page["OA"].mask)
    attributes = np.where(leaf, ends.word & keep, np.uint64(0))
    _, number = np.unique(attributes, return_inverse=True)
    sizes = (int(number.max()) + 1, len(ENDS), len(LEVELS), 2)
    over = (output & np.uint64(p.over)) != 0
    found.code[some] = 2 + np.ravel_multi_index((number, ends.end, by_level(ends.level), over.astype(np.intp)), sizes)
    found.pa[some] = output & ~(size - np.uint64(1)) | ipa[some] & (size - np.uint64(1))
    found.slot[some], found.word[some] = ends.at, ends.word
    return found


class _Asker:
    """The scalar walk, for the one address that speaks for others."""

    def __init__(self, memory: Memory, regs: Registers, access: Access, stage1_only: bool) -> None:
        self.memory, self.regs, self.access, self.stage1_only = memory, regs, access, stage1_only

    def walk(self, va: int) -> NestedWalk:
        return translate_nested(self.memory, self.regs, va, self.access, stage1_only=self.stage1_only)


class _Sheet:
    """The answers while they are filled in: classes, addresses, and what hardware changes."""

    def __init__(self, first: Many, alone: Numbers, guest: GuestMemory) -> None:
        n = first.pa.size
        self.first, self.alone = first, alone
        self.guest = guest
        self.rows: list[Table] = [np.zeros(0, CLASS)]
        self.number = np.zeros(n, np.int32)
        self.pa, self.ipa, self.hpfar = np.zeros((3, n), np.uint64)
        self.changes: list[WordChanges] = []  # in stage 2's tables, in the CPU's order
        self.changed: list[Update] = []  # by single walks, as memory holds them

    def _add(self, found: NestedWalk) -> int:
        self.rows.append(row_of(found.result))
        return len(self.rows) - 2

    def alike(self, ask: _Asker, these: Numbers, leaves: _Leaves | None, flat: Words) -> None:
        """The addresses that share their fate with others."""
        if not these.size:
            return
        first, ipa = self.first, self.first.pa[these]
        code = leaves.code if leaves else np.zeros(these.size, np.intp)
        key = np.int64(first._class[these]) * (int(code.max()) + 1) + code
        _, speakers, which = np.unique(key, return_index=True, return_inverse=True)
        walks = [ask.walk(va) for va in flat[these[speakers]].tolist()]
        self.number[these] = np.array([self._add(walk) for walk in walks], np.int32)[which]
        ok = np.array([walk.ok for walk in walks])[which]
        self.ipa[these] = ipa
        has_fipa = np.array([walk.has_fipa for walk in walks])[which]
        self.hpfar[these] = np.where(has_fipa, ipa >> np.uint64(12) << np.uint64(4), np.uint64(0))
        self.pa[these] = np.where(ok, leaves.pa if leaves else ipa, np.uint64(0))
        if leaves:
            self.changes += leaves.tables
            flips = np.array([_flip(walk) for walk in walks], np.uint64)[which]
            some = np.flatnonzero(flips)
            word = leaves.word[some]
            self.changes.append(WordChanges(leaves.slot[some], word, word ^ flips[some]))

    def one_by_one(self, ask: _Asker, flat: Words) -> None:
        """The addresses of pages that are walked on their own."""
        pages, inverse = np.unique(flat[self.alone] // np.uint64(PAGE), return_inverse=True)
        for i, page in enumerate(pages.tolist()):
            found, here = ask.walk(page * PAGE), self.alone[inverse == i]
            self.number[here] = self._add(found)
            offset = flat[here] % np.uint64(PAGE)
            self.pa[here] = np.uint64(found.pa) | offset if found.ok else 0
            self.ipa[here] = np.uint64(found.ipa or 0) | offset * np.uint64(found.stage1_ok)
            self.hpfar[here] = found.hpfar
            self.changed += found.updates

    def many(self, shape: tuple[int, ...], access: Access) -> NestedMany:
        """The finished answers."""
        table, first = np.concatenate(self.rows), self.first
        ok = table["ok"][self.number] if len(table) else np.zeros(0, bool)
        words = np.arange(first.pa.size), first.word
        found = [*self.guest.updates, *self.changed]
        listed = WordChanges(*np.array(found, np.uint64).reshape(-1, 3).T)
        updates = each_once([listed, *(in_memory(change, self.guest.p.big_endian) for change in self.changes)])
        return NestedMany(
            ok.reshape(shape),
            self.pa.reshape(shape),
            updates,
            access,
            updates,
            table,
            self.number.reshape(shape),
            words,
            self.ipa.reshape(shape),
            self.hpfar.reshape(shape),
        )


def _flip(walk: NestedWalk) -> int:
    """What hardware changes in stage 2's leaf of the result."""
    if walk.stage2 is None or not walk.stage2.raw:
        return 0
    leaf = walk.stage2.raw[-1][1]
    return sum(update.old ^ update.new for update in walk.stage2.updates if update.pa == leaf)
