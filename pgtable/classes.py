"""The rules of stage 1 for arrays of descriptors: which classes they fall into, and what becomes of each class.

Rules of this file:
- Descriptors that were reached in the same way and differ in nothing but in-place output address bits are one class.
  The rules are applied to classes, so that a million descriptors of one mapping cost as much as one.
- The order of the rules is that of walk.py (pseudocode S1Walk from the leaf on, S1Translate, S1CheckPermissions); the
  layouts and rule tables are the same objects.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pgtable.access import Access, AccessType
from pgtable.attributes import FORCED_OUTER, OUTER_SHAREABLE, is_device
from pgtable.bits import Flags, Words
from pgtable.descriptors import LAST_LEVEL, Kind
from pgtable.faults import Fault, FaultType, fault_code
from pgtable.params import WalkParams
from pgtable.permissions import PR, PW, TO_UNPRIVILEGED
from pgtable.table_params import TableParams
from pgtable.walk import Translation, _effective_attr, leaf_permissions, overlay_under_pan

Numbers: TypeAlias = npt.NDArray[np.intp]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Levels: TypeAlias = npt.NDArray[np.int8]
Perms: TypeAlias = npt.NDArray[np.uint16]
Table: TypeAlias = npt.NDArray[np.void]  # of CLASS

LEVELS = range(-1, LAST_LEVEL + 1)
ENDS = (None, FaultType.ADDRESS_SIZE, FaultType.EXTERNAL_ON_WALK)  # a descriptor, or a fault before it was read
TYPES = tuple(FaultType)
MMU_OFF = -128  # level of a translation with the MMU off

# Flags: of a fault, why (as in `Fault`); of a translation, two bits of what it says.
WRITE, DIRTY_BIT, OVERLAY, NG, NS, STAGE2, S1PTW = (1 << i for i in range(7))

NO_WORDS = np.zeros(0, np.uint64)
_U64 = (1 << 64) - 1

# A class and what becomes of an access to it. `type`: 1 + index in TYPES, 0 for a translation. The word is rest |
# PA & free; the PA is word & free | fixed | VA & offset. `flip`: the bits that hardware changes in the descriptor.
CLASS = np.dtype(
    [
        *[("ok", "?"), ("type", "u1"), ("fault", "u1"), ("level", "i1"), ("attr", "u1"), ("sh", "u1"), ("flags", "u1")],
        *[("perms", "u2"), ("rest", "u8"), ("free", "u8"), ("fixed", "u8"), ("offset", "u8"), ("flip", "u8")],
    ]
)


def number_of(type: FaultType) -> int:
    """A fault's `type` in CLASS."""
    return 1 + TYPES.index(type)


@cache
def _codes() -> Bytes:
    """Fault status codes by type and level (from LEVELS[0] on); 0 for what cannot be."""
    codes = np.zeros((1 + len(TYPES), len(LEVELS)), np.uint8)
    for type in TYPES:
        for i, level in enumerate(LEVELS):
            if level >= 0 or type in (FaultType.ADDRESS_SIZE, FaultType.TRANSLATION, FaultType.EXTERNAL_ON_WALK):
                codes[number_of(type), i] = fault_code(type, level)
    return codes


def fault_row(fault: Fault) -> Table:
    """One class: a fault that no descriptor has a part in."""
    row = np.zeros(1, CLASS)
    row["level"], row["type"], row["fault"] = fault.level, number_of(fault.type), fault.code
    return row


def row_of(found: Translation | Fault) -> Table:
    """A scalar walk's result as a class, its addresses left out."""
    if isinstance(found, Fault):
        row = fault_row(found)
        marks = {WRITE: found.write, DIRTY_BIT: found.dirty_bit, OVERLAY: found.overlay}
        row["flags"] = sum(bit for bit, on in (marks | {STAGE2: found.stage == 2, S1PTW: found.s1ptw}).items() if on)
        return row
    row = np.zeros(1, CLASS)
    row["ok"], row["level"] = True, MMU_OFF if found.level is None else found.level
    row["attr"], row["sh"], row["perms"] = found.attr, found.sh, found.perms
    row["flags"] = NG * found.nG + NS * found.ns
    return row


def result_of(row: Any) -> Translation | Fault:
    """A class as the scalar walk's result, its address left out."""
    flags, level = int(row["flags"]), int(row["level"])
    if row["ok"]:
        attr, sh, perms = int(row["attr"]), int(row["sh"]), int(row["perms"])
        return Translation(0, level, 0, attr, sh, perms, bool(flags & NG), bool(flags & NS))
    write, dirty, overlay, stage2, s1ptw = (bool(flags & bit) for bit in (WRITE, DIRTY_BIT, OVERLAY, STAGE2, S1PTW))
    type, stage = TYPES[int(row["type"]) - 1], 1 + stage2
    return Fault(type, level, stage, s1ptw, write=write, dirty_bit=dirty, overlay=overlay)


class Ends(NamedTuple):
    """Where each of n walks ended, in arrays of shape (n,).

    `level`: of the descriptor `word` at PA `at`, or what the fault reports. `end`: index in ENDS. `inherited`: the
    table attributes that count. A walk that stops short of the last level has `at` = its last-level table.
    """

    level: Levels
    end: Bytes
    inherited: Words
    word: Words
    at: Words

    def some(self, rows: Numbers) -> Ends:
        """Some of them."""
        return Ends(self.level[rows], self.end[rows], self.inherited[rows], self.word[rows], self.at[rows])


class Judge:
    """Applies the rules for one half and one access, and numbers the classes: rows of `table`."""

    def __init__(self, p: WalkParams, access: Access, unprivileged: bool) -> None:
        self.p = p
        self.access = access
        self.unprivileged = unprivileged
        self.inherited = inherited_mask(p)
        self.size = 0
        self.all_ok = True
        self.any_flip = False
        self.ok: Flags = np.zeros(0, np.bool_)  # columns of `table`, for speed
        self.flip = NO_WORDS
        self._rows = np.zeros(16, CLASS)
        self._contexts: dict[int, Context] = {}
        self._fields = [f for f in p.fmt.table(LAST_LEVEL - 1) if f.mask & self.inherited]
        self._sizes = (len(ENDS), len(LEVELS), *(f.value_mask + 1 for f in self._fields))

    @property
    def table(self) -> Table:
        """The classes so far."""
        return self._rows[: self.size]

    def add(self, ends: Ends) -> Numbers:
        """Makes each of `ends` a class; returns their numbers."""
        first, self.size = self.size, self.size + len(ends.word)
        if self.size > len(self._rows):
            self._rows = np.concatenate([self._rows[:first], np.zeros(self.size, CLASS)])
        self._rows[first : self.size] = _judged(self, ends)
        self.ok, self.flip = self.table["ok"].copy(), self.table["flip"].copy()
        self.all_ok, self.any_flip = bool(self.ok.all()), bool(self.flip.any())
        return np.arange(first, self.size)

    def codes(self, ends: Ends) -> Numbers:
        """How each descriptor was reached (end, level, table attributes), as a small number."""
        inherited = [f.get(ends.inherited).astype(np.intp) for f in self._fields]
        found: Numbers = np.ravel_multi_index((ends.end, by_level(ends.level), *inherited), self._sizes)
        return found

    def context(self, code: int) -> Context:
        """What a code of `codes` stands for."""
        if code not in self._contexts:
            end, level, *values = (int(i) for i in np.unravel_index(code, self._sizes))
            inherited = sum(f.put(0, value) for f, value in zip(self._fields, values, strict=True))
            self._contexts[code] = Context(self, end, LEVELS[level], inherited)
        return self._contexts[code]

    @cached_property
    def free(self) -> Words:
        """By level: bits of a leaf that go into the PA as they are, and mean nothing else; 0 where no leaf can be."""
        return np.array([_free_bits(self.p, level) for level in LEVELS], np.uint64)

    @cached_property
    def kinds(self) -> npt.NDArray[np.int8]:
        """By level and bits [1:0]: what a descriptor is."""
        return np.array([self.p.kinds[level] for level in LEVELS], np.int8)

    @cached_property
    def offsets(self) -> Words:
        """By Contiguous bit and level: the PA bits that come from the VA."""
        rows = [[self.p.offset_mask(level, word) & _U64 for level in LEVELS] for word in (0, self.p.contiguous)]
        return np.array(rows, np.uint64)


def inherited_mask(p: TableParams) -> int:
    """The table attributes that bear on what is below."""
    return p.inherited_mask | (p.ns_table if p.secure else 0)


def by_level(level: Levels) -> Numbers:
    """Levels as indices of tables that begin with LEVELS[0]."""
    return level.astype(np.intp) - LEVELS[0]


def type_bits(p: TableParams, words: Words) -> Numbers:
    """The descriptors' bits [1:0], by which `WalkParams.kinds` is indexed."""
    return (words & np.uint64(p.page.mask("VALID", "TYPE"))).view(np.intp)


def _can_map(p: WalkParams, level: int) -> bool:
    """A leaf may be at this level."""
    return Kind.BLOCK in p.kinds[level] or Kind.PAGE in p.kinds[level]


def _free_bits(p: WalkParams, level: int) -> int:
    if not _can_map(p, level):
        return 0
    run = p.offset_mask(level, p.contiguous)  # in a contiguous run the lower ones may come from the VA
    spans = p.fmt.leaf(level)["OA"].spans
    return sum(span.mask for span in spans if span.lo == span.at) & ~p.over & ~run


SLOTS = 1 << 16
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the upper bits of key * _SPREAD are a slot's number
_SLOT_SHIFT = np.uint64(48)


class Context:
    """Descriptors reached in the same way, sorted into classes.

    A class's key is the word without its free bits (`kept` are the others); all invalid descriptors have key 0.
    """

    def __init__(self, judge: Judge, end: int, level: int, inherited: int) -> None:
        self.judge = judge
        self.end = end
        self.level = level
        self.inherited = inherited
        self.free = 0 if end else int(judge.free[level - LEVELS[0]])
        self.kept = _U64 ^ self.free if not end and _can_map(judge.p, level) else 0
        self.valid = judge.p.page["VALID"].mask
        self.offset = judge.p.offset_mask(level, 0)
        self.single: dict[int, int] = {}
        self.keys = NO_WORDS  # sorted, with their classes in `numbers`
        self.numbers = np.zeros(0, np.intp)

    @cached_property
    def plain(self) -> bool:
        """A translation's PA is word & free | VA & offset, with one offset for all."""
        p = self.judge.p
        return not p.features.contiguous_output and not p.output_address(self.level, self.kept) & ~p.over

    @cached_property
    def slots(self) -> tuple[Words, Numbers]:
        """Keys by hash, and their classes: the quick way. A key whose slot is another's is looked up by sorting."""
        keys = np.zeros(SLOTS, np.uint64)
        keys[0] = _U64  # the empty slot of key 0
        return keys, np.zeros(SLOTS, np.intp)

    def classify(self, words: Words) -> int | Numbers:
        """Each word's class, in an array of the same shape; an int where they are all the same."""
        both, either = int(np.bitwise_and.reduce(words)), int(np.bitwise_or.reduce(words))
        if not (both ^ either) & self.kept:
            return self._one(both & self.kept if both & self.valid else 0)
        keys = words & np.uint64(self.kept)
        if not both & self.valid:
            keys *= words & np.uint64(self.valid)  # 0 or 1
        slot_keys, slot_numbers = self.slots
        slot = (keys * _SPREAD >> _SLOT_SHIFT).view(np.intp)
        found = slot_numbers.take(slot, mode="clip")
        missing = np.flatnonzero(slot_keys.take(slot, mode="clip") != keys)
        if missing.size:
            found[missing] = self._sorted(keys[missing])
        return found

    def place(self, va: Words, words: Words, number: int | Numbers, scratch: Words, out: Words) -> None:
        """The PAs of leaves `words`, of classes `number`, to `out`; those of faults mean nothing."""
        table = self.judge.table
        np.bitwise_and(words, self.free, out=out)
        np.bitwise_and(va, self.offset if self.plain else table["offset"][number], out=scratch)
        np.bitwise_or(out, scratch, out=out)
        if not self.plain:
            np.bitwise_or(out, table["fixed"][number], out=out)

    def _one(self, key: int) -> int:
        if key not in self.single:
            keys: Words = np.full(1, key, np.uint64)
            self.single[key] = int(self._sorted(keys)[0])
        return self.single[key]

    def _sorted(self, keys: Words) -> Numbers:
        """The classes of keys, found in the sorted list; new ones are added to it."""
        place = np.searchsorted(self.keys, keys)
        known = (np.append(self.keys, np.uint64(0))[place] == keys) & (place < len(self.keys))
        if not known.all():
            self._learn(np.unique(keys[~known]))
            place = np.searchsorted(self.keys, keys)
        return self.numbers[place]

    def _learn(self, keys: Words) -> None:
        n = len(keys)
        level, end = np.full(n, self.level, np.int8), np.full(n, self.end, np.uint8)
        inherited: Words = np.full(n, self.inherited, np.uint64)
        numbers = self.judge.add(Ends(level, end, inherited, keys, keys))
        place = np.searchsorted(self.keys, keys)
        self.keys, self.numbers = np.insert(self.keys, place, keys), np.insert(self.numbers, place, numbers)
        slot_keys, slot_numbers = self.slots
        slot = (keys * _SPREAD >> _SLOT_SHIFT).view(np.intp)
        slot_keys[slot], slot_numbers[slot] = keys, numbers


# The rules.


class _Verdicts:
    """The first fault found for each of n descriptors: `type` as in CLASS, and flags."""

    def __init__(self, type: Bytes) -> None:
        self.type = type
        self.flags = np.zeros(len(type), np.uint8)

    def refuse(self, where: Flags, type: FaultType, flags: int | Bytes = 0) -> None:
        """Where no earlier rule has refused."""
        first = where & (self.type == 0)
        if first.any():
            self.type[first] = number_of(type)
            self.flags[first] = flags if isinstance(flags, int) else flags[first]


_END_TYPES = np.array([number_of(type) if type else 0 for type in ENDS], np.uint8)


def _judged(judge: Judge, ends: Ends) -> Table:
    """The rows of the class table; what only a translation has stays 0 for a fault."""
    p, words = judge.p, ends.word
    found = _Verdicts(_END_TYPES[ends.end])
    index = _attr_index(p, words)
    output = _output_address(p, ends.level, words)
    permissions: Any = leaf_permissions(p, words, ends.inherited & np.uint64(p.inherited_mask))
    base, overlay, pan = permissions  # uint16 arrays
    _refuse_leaf(found, judge, ends, output)
    if not judge.access.aligned and judge.access.type is not AccessType.FETCH:
        found.refuse(np.array([is_device(byte) for byte in p.mair])[index], FaultType.ALIGNMENT)
    _refuse_permission(found, judge, words, base, overlay, pan != 0)
    rows = np.zeros(len(words), CLASS)
    rows["ok"] = found.type == 0
    rows["type"], rows["flags"], rows["level"] = found.type, found.flags, ends.level
    rows["fault"] = _codes()[found.type, by_level(ends.level)]
    done = np.flatnonzero(rows["ok"])
    if done.size:
        perms = base & overlay
        rows[done] = _translations(judge, ends.some(done), output[done], index[done], perms[done])
    return rows


def _attr_index(p: WalkParams, words: Words) -> Numbers:
    low = p.page["AttrIndx"]
    index: Words = low.get(words)
    if p.fmt.aie:
        index = index | p.page["AttrIndx3"].get(words) * np.uint64(low.value_mask + 1)
    return index.view(np.intp)


def _output_address(p: WalkParams, level: Levels, words: Words) -> Words:
    """The output address of each leaf at its level."""
    output = np.zeros_like(words)
    for one in set(level.tolist()):
        if _can_map(p, one):
            here = level == one
            output[here] = p.output_address(one, words[here])
    return output


def _refuse_leaf(found: _Verdicts, judge: Judge, ends: Ends, output: Words) -> None:
    """Not a leaf, contiguous, nT, address size, access flag: in this order (pseudocode S1Walk)."""
    p, words, level = judge.p, ends.word, by_level(ends.level)
    found.refuse(judge.kinds[level, type_bits(p, words)] == Kind.INVALID, FaultType.TRANSLATION)
    if p.features.contiguous_faults:
        too_large = np.array([p.run_too_large(one) for one in LEVELS])[level]
        found.refuse(too_large & (words & np.uint64(p.contiguous) != 0), FaultType.TRANSLATION)
    if p.features.nt_faults and p.features.bbm:
        found.refuse((ends.level < LAST_LEVEL) & (words & np.uint64(p.nt) != 0), FaultType.TRANSLATION)
    found.refuse(output & np.uint64(p.over) != 0, FaultType.ADDRESS_SIZE)
    if not p.ha:
        found.refuse(words & np.uint64(p.af) == 0, FaultType.ACCESS_FLAG)


def _refuse_permission(found: _Verdicts, judge: Judge, words: Words, base: Perms, overlay: Perms, pan: Flags) -> None:
    """Overlay, base, dirty state: in this order (pseudocode S1CheckPermissions)."""
    p, access, unprivileged = judge.p, judge.access, judge.unprivileged
    need = access.needs(p.cmow, unprivileged)
    if not need:
        return
    if access.pan_sensitive and not unprivileged and (p.pan if access.pan is None else access.pan):
        base = np.where(pan, base & ~np.uint16(PR | PW), base)
        overlay = np.where(pan, overlay_under_pan(p, words, overlay), overlay)
    for by_overlay, granted in ((OVERLAY, overlay), (0, base)):
        missing = need & ~(granted >> np.uint16(TO_UNPRIVILEGED if unprivileged else 0))
        write = np.where((missing & PR == 0) & access.asks_write, np.uint8(WRITE), np.uint8(0))
        found.refuse(missing != 0, FaultType.PERMISSION, write | np.uint8(by_overlay))
    if p.pie and access.asks_write and not p.hd:
        found.refuse(words & np.uint64(p.not_dirty) != 0, FaultType.PERMISSION, WRITE | DIRTY_BIT)


def _translations(judge: Judge, ends: Ends, output: Words, index: Numbers, perms: Perms) -> Table:
    """The rows of classes that translate."""
    p, words, level = judge.p, ends.word, by_level(ends.level)
    rows = np.zeros(len(words), CLASS)
    rows["ok"], rows["level"], rows["perms"] = True, ends.level, perms
    attr = np.array([_effective_attr(p, judge.access, byte) for byte in p.mair], np.uint8)[index]
    sh = p.sh if p.fmt.lpa2 else p.page["SH"].get(words)
    rows["attr"], rows["sh"] = attr, np.where(np.array(FORCED_OUTER)[attr], OUTER_SHAREABLE, sh)
    rows["flags"] = _spaces(p, words, ends.inherited)
    rows["flip"] = _flips(judge, words)
    rows["free"], rows["rest"] = judge.free[level], words & ~judge.free[level]
    contiguous = (words & np.uint64(p.contiguous) != 0).astype(np.intp)
    rows["offset"] = offset = judge.offsets[contiguous, level]
    rows["fixed"] = output & ~offset & ~judge.free[level]
    return rows


def _spaces(p: WalkParams, words: Words, inherited: Words) -> Bytes:
    """NG and NS of translations, as in the scalar walk's `Translation`."""
    left_secure = (inherited & np.uint64(p.ns_table) != 0) & p.secure
    ng = ((words & np.uint64(p.ng) != 0) | left_secure) & p.regime.has_el0
    ns = (words & np.uint64(p.ns) != 0) | left_secure | (not p.secure)
    flags: Bytes = np.where(ng, NG, 0).astype(np.uint8) | np.where(ns, NS, 0).astype(np.uint8)
    return flags


def _flips(judge: Judge, words: Words) -> Words:
    """The bits that hardware changes in leaves to which the access is allowed (access flag, dirty state)."""
    p, access = judge.p, judge.access
    if not p.ha or (access.is_at and not p.features.at_updates):
        return np.zeros_like(words)
    flips = ~words & np.uint64(p.af)
    if p.hd and access.writes and not access.is_at:
        managed = (words & np.uint64(p.dbm) != 0) | p.pie
        flips |= np.where(managed, words & np.uint64(p.not_dirty), np.uint64(0))
    return flips
