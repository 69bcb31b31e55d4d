"""The stage 1 walk for arrays of addresses: what `translate` answers, for each element, without a loop over elements.

Rules of this file:
- A region is what one last-level table covers (2 MiB with the 4K granule). Each distinct region is walked once, level
  by level, for all regions together (`_descend`); an address then costs one look-up of its region and one read.
- Descriptors that differ in nothing but in-place output address bits are one class. The rules are applied to classes
  (`_Judge`), in the order of walk.py and over the same layouts and rule tables; `Many` expands classes when asked.
- A block, a hole or a table with no RAM is the affair of its region (`_Decided`, `_Exact`), not of the whole call.
- Addresses are worked on in chunks that stay in the cache; loops run over levels, halves, RAM regions, chunks and
  kinds of region, never over addresses.
Sources: as in walk.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from pgtable.access import Access, AccessType
from pgtable.at import OPERATIONS, _regime, par_of, stage2_on
from pgtable.attributes import FORCED_OUTER, OUTER_SHAREABLE, is_device
from pgtable.bits import Flags, Words
from pgtable.descriptors import LAST_LEVEL, Kind
from pgtable.faults import Fault, FaultType, fault_code
from pgtable.memory import PAGE, Memory, NoMemory, PhysicalMemory, WordChanges
from pgtable.params import RANGE_BIT, Regime, WalkParams
from pgtable.permissions import PR, PW, TO_UNPRIVILEGED, with_overlay
from pgtable.registers import PAR_OK, Registers
from pgtable.walk import Translation, _as_el0, _before_the_walk, _effective_attr, _mmu_off, regime_of

Numbers: TypeAlias = npt.NDArray[np.intp]
Bytes: TypeAlias = npt.NDArray[np.uint8]

CHUNK = 1 << 15  # addresses worked on at a time: four arrays of them fit a second-level cache of 1 MiB
DENSE = 8  # with this many addresses per region, finding out which regions are meant costs more than walking all
SPARSE = 1 << 16  # distinct values are found by marking them in a table of at least this size
DIGIT = 1 << 12  # and, where they lie further apart, part by part: this many at a time
MMU_OFF = -128  # `Many.level` of a translation with the MMU off

# `Many.flags`: of a fault, why (as in `Fault`); of a translation, two bits of what it says.
WRITE, DIRTY_BIT, OVERLAY, NG, NS = (1 << i for i in range(5))

_TYPES = tuple(FaultType)
_U64 = (1 << 64) - 1

# A class of descriptors and what becomes of an access to them. `type`: 1 + index in _TYPES, 0 for a translation.
# `rest`, `free`: the word is rest | pa & free. The PA is word & free | fixed | VA & offset. `flip`: what hardware
# changes in the descriptor.
_CLASS = np.dtype(
    [
        *[("ok", "?"), ("type", "u1"), ("fault", "u1"), ("level", "i1"), ("attr", "u1"), ("sh", "u1"), ("flags", "u1")],
        *[("perms", "u2"), ("rest", "u8"), ("free", "u8"), ("fixed", "u8"), ("offset", "u8"), ("flip", "u8")],
    ]
)
_Table: TypeAlias = npt.NDArray[np.void]


@dataclass(frozen=True, eq=False)
class Many:
    """What `translate_many` found: arrays in the shape of the VAs, those that are properties made on first use.

    `ok` (bool): the access translates; only this tells, an address size fault at level 0 has code 0. `pa` (uint64): 0
    where not ok. `updates`: what hardware changes (access flag, dirty state, FEAT_HAFDBS), each descriptor once, in
    address order, all walks taken to be made at the same moment.
    """

    ok: Flags
    pa: Words
    updates: WordChanges
    access: Access
    _table: _Table = field(repr=False)
    _class: npt.NDArray[np.int32] = field(repr=False)
    _stopped: tuple[Numbers, Words] = field(repr=False)  # flat positions of faults, last descriptor read there

    def _column(self, name: str) -> Any:
        return self._table[name][self._class]

    @cached_property
    def fault(self) -> Bytes:
        """The fault status code (xFSC), uint8; 0 where ok."""
        found: Bytes = self._column("fault")
        return found

    @cached_property
    def level(self) -> npt.NDArray[np.int8]:
        """The leaf's level, or the one that the fault reports; MMU_OFF (-128) for a translation with the MMU off."""
        found: npt.NDArray[np.int8] = self._column("level")
        return found

    @cached_property
    def word(self) -> Words:
        """The leaf, uint64; for a fault the last descriptor read, 0 if none was. In the tree's byte order."""
        word: Words = self._column("rest") | self.pa & self._column("free")
        positions, words = self._stopped
        word.reshape(-1)[positions] = words
        return word

    @cached_property
    def attr(self) -> Bytes:
        """Effective memory attributes as a MAIR byte, uint8; 0 where not ok."""
        found: Bytes = self._column("attr")
        return found

    @cached_property
    def sh(self) -> Bytes:
        """Effective shareability, uint8; 0 where not ok."""
        found: Bytes = self._column("sh")
        return found

    @cached_property
    def perms(self) -> npt.NDArray[np.uint16]:
        """Permission bits of every level (permissions.py), before PAN, uint16; 0 where not ok."""
        found: npt.NDArray[np.uint16] = self._column("perms")
        return found

    @cached_property
    def flags(self) -> Bytes:
        """WRITE, DIRTY_BIT, OVERLAY of a fault; NG, NS of a translation; uint8."""
        found: Bytes = self._column("flags")
        return found

    def par(self) -> Words:
        """PAR_EL1 (uint64), as `Fault.par` and `par_of` give it.

        Where the fault is an external abort on the walk, the AT instruction takes an exception instead (`aborts`).
        """
        fixed = self._encoded(lambda fault: fault.par(), par_of)
        pa = PAR_OK["PA"]
        return fixed[self._class] | pa.put(np.zeros_like(self.pa), self.pa & np.uint64(pa.value_mask))

    def esr(self, *, target_el: int | None = None) -> Words:
        """ESR_ELx of each abort (uint64), as `Fault.esr` gives it; 0 where ok."""
        fixed = self._encoded(lambda fault: fault.esr(self.access, target_el=target_el), lambda _: 0)
        found: Words = fixed[self._class]
        return found

    @property
    def aborts(self) -> Flags:
        """Where the walk met an external abort."""
        found: Flags = self._column("type") == _number(FaultType.EXTERNAL_ON_WALK)
        return found

    def _encoded(self, of_fault: Callable[[Fault], int], of_done: Callable[[Translation], int]) -> Words:
        """A value for each class, from the scalar encoders: each distinct result is encoded once."""
        t = self._table
        columns = (t["type"], t["level"].astype(np.intp) - MMU_OFF, t["flags"], t["attr"], t["sh"])
        key = np.ravel_multi_index(columns, (len(_TYPES) + 1, 1 << 8, 1 << 8, 1 << 8, 1 << 2))
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        results = [_result(row) for row in t[first]]
        values = [of_fault(result) if isinstance(result, Fault) else of_done(result) for result in results]
        return np.array(values, np.uint64)[inverse]


def _number(type: FaultType) -> int:
    return 1 + _TYPES.index(type)


def _result(row: Any) -> Translation | Fault:
    """A class as the scalar walk's result, its address left out."""
    flags = int(row["flags"])
    if row["ok"]:
        attr, sh, perms = int(row["attr"]), int(row["sh"]), int(row["perms"])
        return Translation(0, int(row["level"]), 0, attr, sh, perms, bool(flags & NG), bool(flags & NS))
    type, level = _TYPES[int(row["type"]) - 1], int(row["level"])
    write, dirty, overlay = (bool(flags & bit) for bit in (WRITE, DIRTY_BIT, OVERLAY))
    return Fault(type, level, write=write, dirty_bit=dirty, overlay=overlay)


def translate_many(
    memory: Memory,
    regs: Registers,
    vas: npt.ArrayLike,
    access: Access | None = None,
    *,
    regime: Regime | None = None,
    swap: bool = False,
) -> Many:
    """What `access` (default: an EL1 read) to each of `vas` (integers of 64 bits, any shape) does.

    RAM is taken to come in whole 4 KiB pages. `swap` makes the hardware updates, which are else only listed; it needs
    a PhysicalMemory. Raises ValueError for VAs that are not unsigned 64-bit integers.
    """
    access = access or Access()
    flat, shape = _addresses(vas)
    if swap and not isinstance(memory, PhysicalMemory):
        raise ValueError(f"swap=True: {type(memory).__name__} cannot be written, only a PhysicalMemory")
    regime = regime or regime_of(regs, access.el)
    reader = _Ram(memory) if isinstance(memory, PhysicalMemory) else _Pages(memory)
    halves = tuple(WalkParams.of(regs, regime, va) for va in ((0, RANGE_BIT) if regime.has_el0 else (0,)))
    parts = [part for p, where in _by_half(halves, flat) for part in _translated(reader, p, flat, where, access)]
    many = _joined(parts, shape, access)
    if swap and isinstance(memory, PhysicalMemory):
        _store(memory, many.updates, halves[0].big_endian)
    return many


def at_many(memory: Memory, regs: Registers, operation: str, vas: npt.ArrayLike, *, swap: bool = False) -> Many:
    """The walks that `AT operation` makes for each of `vas`; `par()` of the result is PAR_EL1.

    Raises ValueError for an unknown operation, and for one that asks stage 2.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"AT {operation}: must be one of {', '.join(OPERATIONS)}")
    if operation.startswith("S12") and stage2_on(regs):
        raise ValueError(f"AT {operation} with HCR_EL2.VM or DC set: stage 2 is not modelled")
    kind, el, pan = OPERATIONS[operation]
    access = Access(kind, el, pan=bool(regs.PAN) if pan else None)
    return translate_many(memory, regs, vas, access, regime=_regime(regs, el), swap=swap)


def _addresses(vas: npt.ArrayLike) -> tuple[Words, tuple[int, ...]]:
    """The VAs as a flat, contiguous uint64 array, and their shape."""
    array = np.asarray(vas)
    if array.size and array.dtype.kind not in "ui":
        raise ValueError(f"VAs of type {array.dtype}: must be integers of 64 bits (uint64)")
    if array.dtype.kind == "i" and array.size and int(array.min()) < 0:
        raise ValueError(f"VA {int(array.min())}: must be 64 bits and not negative (uint64)")
    return np.ascontiguousarray(array, np.uint64).reshape(-1), array.shape


# Parts: a half's addresses with one outcome, or walked together.


class _Part(NamedTuple):
    """The answer for some addresses. `where`: their positions, None for all of them in order."""

    where: Numbers | None
    pa: Words
    number: npt.NDArray[np.int32]  # of each address's class in `table`
    table: _Table
    stopped: tuple[Numbers, Words]  # positions in this part of faults, last descriptor read
    updates: WordChanges


_NO_WORDS = np.zeros(0, np.uint64)
_NO_UPDATES = WordChanges(_NO_WORDS, _NO_WORDS, _NO_WORDS)
_NONE_STOPPED = (np.zeros(0, np.intp), _NO_WORDS)


def _by_half(halves: tuple[WalkParams, ...], va: Words) -> Iterator[tuple[WalkParams, Numbers | None]]:
    """The positions of each half's addresses; None where one half has them all."""
    if not va.size:
        return
    low, high = int(va.min()), int(va.max())
    for p in halves:
        if _holds(p, low, high):
            yield p, None
            return
    upper = va & RANGE_BIT != 0
    for p in halves:
        where = np.flatnonzero(upper == p.upper) if len(halves) > 1 else None
        if where is None or where.size:
            yield p, where


def _holds(p: WalkParams, low: int, high: int) -> bool:
    """All VAs from `low` to `high` are in this half's range, tag included."""
    return p.half_base <= low and high - p.half_base < 1 << p.ia_bits


def _translated(reader: _Reader, p: WalkParams, flat: Words, where: Numbers | None, access: Access) -> Iterator[_Part]:
    """One half's addresses: those out of range, and the others."""
    va = flat if where is None else flat[where]
    unprivileged = _as_el0(p, access)
    fault = _before_the_walk(p, p.half_base, access, unprivileged) if p.mmu_on else None
    if fault:  # TxSZ, E0PD, EPD, which do not depend on the VA and report what a VA out of range does
        yield _constant(where, va, fault)
        return
    beyond = _out_of_range(p, va, access)
    if beyond is not None:
        all_of_them = np.arange(va.size) if where is None else where
        yield _constant(all_of_them[beyond], va[beyond], _range_fault(p))
        where, va = all_of_them[~beyond], va[~beyond]
        if p.mmu_on:  # without the tag
            va = va & np.uint64((1 << p.ia_bits) - 1) | np.uint64(p.half_base)
    if va.size:
        yield _Walks(reader, p, access, unprivileged, va).part(where) if p.mmu_on else _flat(p, where, va, access)


def _out_of_range(p: WalkParams, va: Words, access: Access) -> Flags | None:
    """Where VAs are out of range (pseudocode VAIsOutOfRange, S1DisabledOutput); None: nowhere, and none has a tag."""
    if p.mmu_on and _holds(p, int(va.min()), int(va.max())):
        return None
    fetch = access.type is AccessType.FETCH
    if not p.mmu_on:
        mask = p.physical_range_mask(fetch)
    else:
        mask = p.fetch_range_mask if fetch else p.data_range_mask
    beyond: Flags = va & np.uint64(mask) != np.uint64(mask if p.upper and p.mmu_on else 0)
    return beyond


def _range_fault(p: WalkParams) -> Fault:
    return Fault(FaultType.TRANSLATION if p.mmu_on else FaultType.ADDRESS_SIZE, 0)


def _constant(where: Numbers | None, va: Words, fault: Fault) -> _Part:
    """The same fault for every address, no descriptor read."""
    n = va.size
    stopped = np.arange(n), np.zeros(n, np.uint64)
    table = _fault_rows(1, fault.level, fault.type)
    return _Part(where, np.zeros(n, np.uint64), np.zeros(n, np.int32), table, stopped, _NO_UPDATES)


def _flat(p: WalkParams, where: Numbers | None, va: Words, access: Access) -> _Part:
    """With the MMU off: the PA is the VA without its tag; everything else is what VA 0 gives."""
    result = _mmu_off(p, 0, access)
    if isinstance(result, Fault):
        return _constant(where, va, result)
    row = np.zeros(1, _CLASS)
    row["ok"], row["level"] = True, MMU_OFF
    row["attr"], row["sh"], row["perms"], row["flags"] = result.attr, result.sh, result.perms, NS * result.ns
    pa = va & np.uint64((1 << p.features.pa_bits) - 1)
    return _Part(where, pa, np.zeros(va.size, np.int32), row, _NONE_STOPPED, _NO_UPDATES)


def _fault_rows(n: int, level: int, type: FaultType) -> _Table:
    rows = np.zeros(n, _CLASS)
    rows["level"], rows["type"], rows["fault"] = level, _number(type), fault_code(type, level)
    return rows


def _joined(parts: list[_Part], shape: tuple[int, ...], access: Access) -> Many:
    """The parts put together in the shape of the VAs."""
    if len(parts) == 1 and parts[0].where is None:
        _, pa, number, table, stopped, updates = parts[0]
    else:
        pa, number, table, stopped, updates = _scattered(parts, int(np.prod(shape)))
    ok = table["ok"]
    done = np.ones(shape, np.bool_) if ok.all() else ok[number].reshape(shape)
    return Many(done, pa.reshape(shape), updates, access, table, number.reshape(shape), stopped)


def _scattered(
    parts: list[_Part], n: int
) -> tuple[Words, npt.NDArray[np.int32], _Table, tuple[Numbers, Words], WordChanges]:
    pa, number = np.empty(n, np.uint64), np.empty(n, np.int32)
    classes, positions = 0, []
    for part in parts:
        where = np.arange(n) if part.where is None else part.where
        pa[where], number[where] = part.pa, part.number + np.int32(classes)
        classes += len(part.table)
        positions.append(where[part.stopped[0]])
    table = np.concatenate([np.zeros(0, _CLASS), *(part.table for part in parts)])
    words = np.concatenate([_NO_WORDS, *(part.stopped[1] for part in parts)])
    stopped = np.concatenate([np.zeros(0, np.intp), *positions]), words
    return pa, number, table, stopped, _each_once([part.updates for part in parts])


def _each_once(updates: list[WordChanges]) -> WordChanges:
    """Every descriptor once, in address order, with all the changes that were found for it."""
    found = [u for u in updates if u.pa.size]
    if not found:
        return _NO_UPDATES
    pa, old, new = (np.concatenate([u[i] for u in found]) for i in range(3))
    order = np.argsort(pa, kind="stable")
    pa, old, flips = pa[order], old[order], (old ^ new)[order]
    first = np.flatnonzero(np.append(True, pa[1:] != pa[:-1]))
    old = old[first]
    changed: Words = np.bitwise_or.reduceat(flips, first)
    return WordChanges(pa[first], old, old ^ changed)


def _store(memory: PhysicalMemory, updates: WordChanges, big_endian: bool) -> None:
    new = updates.new.byteswap() if big_endian else updates.new
    for region in memory.regions:
        offset = updates.pa - np.uint64(region.base)
        inside = offset < np.uint64(region.size)
        region.words[(offset[inside] >> 3).view(np.int64)] = new[inside]


# Physical memory, as the walks of many addresses read it.


class _Source(NamedTuple):
    """Tables that lie in one array: table i starts at `start[i]` of `words`; `inside`: it is there, all of it."""

    words: Words
    start: npt.NDArray[np.int64]
    inside: Flags


class _Reader(Protocol):
    dense: bool  # reading a table that nobody asked for is cheap

    def gather(self, pas: Words) -> tuple[Words, Flags]: ...

    def sources(self, tables: Words, n: int) -> Iterator[_Source]: ...


class _Ram:
    """PhysicalMemory: its regions are such arrays."""

    dense = True

    def __init__(self, memory: PhysicalMemory) -> None:
        self.memory = memory
        self.gather = memory.gather

    def sources(self, tables: Words, n: int) -> Iterator[_Source]:
        """For each RAM region, which of `tables` (PAs of `n` words each) are in it."""
        for region in self.memory.regions:
            size, offset = region.size, tables - np.uint64(region.base)  # wraps far above `size` below the base
            inside = offset <= np.uint64(max(size - 8 * n, 0))
            if size >= 8 * n and inside.any():
                yield _Source(region.words, (offset >> np.uint64(3)).view(np.int64), inside)


class _Pages:
    """Any other Memory: each 4 KiB page is read once, when first needed, and kept."""

    dense = False
    per_page = PAGE // 8

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.rows: dict[int, int] = {}  # page number: row of `words`, -1 where there is no RAM
        self.words = np.zeros((0, self.per_page), np.uint64)

    def gather(self, pas: Words) -> tuple[Words, Flags]:
        """The word at each of `pas` and whether there is RAM, as PhysicalMemory.gather."""
        rows, start = self._located(pas)
        there = rows >= 0
        out = np.zeros(pas.shape, np.uint64)
        out[there] = self.words.reshape(-1)[start[there]]
        return out, there

    def sources(self, tables: Words, n: int) -> Iterator[_Source]:
        """The pages read so far, as one array; tables larger than a page are not in it."""
        if n <= self.per_page:
            rows, start = self._located(tables)
            yield _Source(self.words.reshape(-1), start, rows >= 0)

    def _located(self, pas: Words) -> tuple[Numbers, npt.NDArray[np.int64]]:
        """The row of each PA's page, and the PA's place in all rows joined."""
        distinct, inverse = _distinct(pas // np.uint64(PAGE))
        self._load(distinct.tolist())
        rows = np.array([self.rows[page] for page in distinct.tolist()], np.intp)[inverse]
        return rows, rows * self.per_page + (pas % np.uint64(PAGE) // np.uint64(8)).view(np.int64)

    def _load(self, pages: list[int]) -> None:
        new: list[Words] = []
        for page in pages:
            if page not in self.rows:
                try:
                    words = self.memory.words(page * PAGE, self.per_page)
                    self.rows[page] = len(self.words) + len(new)
                    new.append(words)
                except NoMemory:
                    self.rows[page] = -1
        if new:
            self.words = np.concatenate([self.words, np.stack(new)])


# Regions of the VA space, one for each last-level table.


def _distinct(keys: Words) -> tuple[Words, Numbers]:
    """The distinct keys in order, and the place of each key among them, without sorting where that can be helped."""
    low, high = (int(keys.min()), int(keys.max())) if keys.size else (0, 0)
    limit = max(SPARSE, keys.size)
    if high - low < limit:
        return _marked(keys, low, high)
    upper, inverse = _distinct(keys // np.uint64(DIGIT))
    if len(upper) * DIGIT > limit:
        distinct, places = np.unique(keys, return_inverse=True)
        return distinct, places.reshape(keys.shape)
    packed, places = _marked(inverse.astype(np.uint64) * np.uint64(DIGIT) + keys % np.uint64(DIGIT), 0, limit)
    return upper[packed // np.uint64(DIGIT)] * np.uint64(DIGIT) + packed % np.uint64(DIGIT), places


def _marked(keys: Words, low: int, high: int) -> tuple[Words, Numbers]:
    """`_distinct` by a table of all possible keys."""
    place = (keys - np.uint64(low)).view(np.int64)
    lookup, found = _numbered([place], high - low + 1)
    return found.astype(np.uint64) + np.uint64(low), lookup[place]


def _numbered(places: Iterable[npt.NDArray[np.int64]], n: int) -> tuple[Numbers, Numbers]:
    """Which of 0..n-1 occur in `places`: their numbers by value, and the values in order."""
    seen = np.zeros(n, np.bool_)
    for some in places:
        seen[some] = True
    found = np.flatnonzero(seen)
    lookup = np.zeros(n, np.intp)
    lookup[found] = np.arange(len(found))
    return lookup, found


class _Index(NamedTuple):
    """Which of the distinct regions `keys` (VA >> shift) each address is in.

    `lookup`: a region's number by key - low; None: that is the number. `inverse`: each address's, where the keys are
    too far apart for a table.
    """

    keys: Words
    shift: int
    low: int
    lookup: Numbers | None = None
    inverse: Numbers | None = None

    @classmethod
    def of(cls, va: Words, shift: int, dense: bool) -> _Index:
        low, high = int(va.min()) >> shift, int(va.max()) >> shift
        n = high - low + 1
        if dense and n * DENSE <= va.size:
            return cls(np.arange(low, high + 1, dtype=np.uint64), shift, low)
        if n <= max(SPARSE, va.size):
            index = cls(_NO_WORDS, shift, low)
            scratch = np.empty(CHUNK, np.uint64)
            lookup, found = _numbered((index.rows(i, va[i : i + CHUNK], scratch) for i in _chunks(va)), n)
            return cls(found.astype(np.uint64) + np.uint64(low), shift, low, lookup)
        keys, inverse = _distinct(va >> np.uint64(shift))
        return cls(keys, shift, low, inverse=inverse)

    def rows(self, start: int, va: Words, scratch: Words) -> npt.NDArray[np.int64]:
        """The regions' numbers for the addresses `va` from position `start` on."""
        if self.inverse is not None:
            return self.inverse[start : start + va.size]
        out = scratch[: va.size]
        np.right_shift(va, self.shift, out=out)
        np.subtract(out, self.low, out=out)
        place = out.view(np.int64)
        return place if self.lookup is None else self.lookup[place]


def _chunks(va: Words) -> range:
    return range(0, va.size, CHUNK)


# Descent: many walks side by side, level by level.

_ENDS = (None, FaultType.ADDRESS_SIZE, FaultType.EXTERNAL_ON_WALK)  # a descriptor, or a fault before it was read
_LEVELS = range(-1, LAST_LEVEL + 1)


class _Ends(NamedTuple):
    """Where each of n walks ended, in arrays of shape (n,).

    `level`: of the descriptor `word` at PA `at`, or what the fault reports. `end`: index in _ENDS. `inherited`: the
    table attributes that count. A walk that stops short of the last level has `at` = its last-level table.
    """

    level: npt.NDArray[np.int8]
    end: Bytes
    inherited: Words
    word: Words
    at: Words


class _Descent:
    """Walks of one half's addresses. `updates`: the table descriptors whose access flag hardware sets."""

    def __init__(self, reader: _Reader, p: WalkParams) -> None:
        self.reader = reader
        self.p = p
        self.keep = p.inherited_mask | (p.ns_table if p.secure else 0)
        self.updates: list[WordChanges] = []
        self.is_table = {level: np.array([kind is Kind.TABLE for kind in kinds]) for level, kinds in p.kinds.items()}

    def to_last_table(self, va: Words) -> _Ends:
        """Down to the last-level table, whose address is checked but which is not read."""
        ends, live, above = self._down(va, self.p.levels[:-1])
        _stop(ends, live[ends.at[live] & self.p.over != 0], above, FaultType.ADDRESS_SIZE)
        return ends

    def to_leaf(self, va: Words) -> _Ends:
        """All the way down."""
        return self._down(va, self.p.levels)[0]

    def _down(self, va: Words, levels: tuple[tuple[int, int, int], ...]) -> tuple[_Ends, Numbers, int]:
        n = va.size
        zeros = np.zeros(n, np.uint64)
        ends = _Ends(np.full(n, LAST_LEVEL, np.int8), np.zeros(n, np.uint8), zeros, zeros.copy(), zeros + self.p.base)
        live, above = np.arange(n), 0
        for level, shift, mask in levels:
            entry = (va[live] >> np.uint64(shift) & np.uint64(mask)) << np.uint64(3)
            live = self._step(ends, live, entry, level, above)
            above = level
        return ends, live, above

    def _step(self, ends: _Ends, live: Numbers, entry: Words, level: int, above: int) -> Numbers:
        """Reads one descriptor for each live walk; those that go on through a table stay live."""
        at = ends.at[live] | entry
        beyond = at & self.p.over != 0
        _stop(ends, live[beyond], above, FaultType.ADDRESS_SIZE)
        live, at = live[~beyond], at[~beyond]
        words, there = self.reader.gather(at)
        _stop(ends, live[~there], level, FaultType.EXTERNAL_ON_WALK)
        live, at, words = live[there], at[there], words[there]
        words = words.byteswap() if self.p.big_endian else words
        ends.word[live], ends.at[live], ends.level[live] = words, at, level
        down = self.is_table[level][_type_bits(self.p, words)]
        live, at, words = live[down], at[down], words[down]
        self._mark_used(at, words)
        ends.inherited[live] |= words & self.keep
        ends.at[live], ends.level[live] = self.p.table_address(words), LAST_LEVEL
        return live

    def _mark_used(self, at: Words, words: Words) -> None:
        """FEAT_HAFT: hardware sets the access flag of tables that a walk goes through."""
        if self.p.haft:
            unused = words & self.p.table_af == 0
            self.updates.append(WordChanges(at[unused], words[unused], words[unused] | self.p.table_af))


def _stop(ends: _Ends, rows: Numbers, level: int, type: FaultType) -> None:
    ends.level[rows], ends.end[rows] = level, _ENDS.index(type)


def _type_bits(p: WalkParams, words: Words) -> Numbers:
    """The descriptors' bits [1:0], by which `WalkParams.kinds` is indexed."""
    return (words & p.page.mask("VALID", "TYPE")).astype(np.intp)


# Classes: the rules, applied to descriptors that differ in what matters.


class _Judge:
    """Applies the rules for one half and one access, and numbers the classes."""

    def __init__(self, p: WalkParams, access: Access, unprivileged: bool) -> None:
        self.p = p
        self.access = access
        self.unprivileged = unprivileged
        self.size = 0
        self.all_ok = True
        self.any_flip = False
        self._rows = np.zeros(64, _CLASS)
        self.ok: Flags = np.zeros(0, np.bool_)  # columns of `table`, for speed
        self.flip: Words = _NO_WORDS
        self._contexts: dict[int, _Context] = {}
        table = p.fmt.table(LAST_LEVEL - 1)
        keep = p.inherited_mask | (p.ns_table if p.secure else 0)
        self._fields = [f for f in table if f.mask & keep]
        self._sizes = (len(_ENDS), len(_LEVELS), *(f.value_mask + 1 for f in self._fields))

    @property
    def table(self) -> _Table:
        """The classes so far."""
        return self._rows[: self.size]

    def add(self, rows: _Table) -> int:
        """Numbers new classes; returns the first number."""
        first, self.size = self.size, self.size + len(rows)
        if self.size > len(self._rows):
            self._rows = np.concatenate([self._rows[:first], np.zeros(self.size, _CLASS)])
        self._rows[first : self.size] = rows
        self.ok, self.flip = self.table["ok"].copy(), self.table["flip"].copy()
        self.all_ok &= bool(rows["ok"].all())
        self.any_flip |= bool(rows["flip"].any())
        return first

    def codes(self, ends: _Ends) -> Numbers:
        """What of an end bears on its descriptor: end, level and table attributes, as one small number."""
        inherited = [f.get(ends.inherited).astype(np.intp) for f in self._fields]
        return np.ravel_multi_index((ends.end, ends.level.astype(np.intp) - _LEVELS[0], *inherited), self._sizes)

    def context(self, code: int) -> _Context:
        """The context of a code."""
        if code not in self._contexts:
            end, level, *values = (int(i) for i in np.unravel_index(code, self._sizes))
            inherited = sum(f.put(0, value) for f, value in zip(self._fields, values, strict=True))
            self._contexts[code] = _Context(self, _ENDS[end], _LEVELS[level], inherited)
        return self._contexts[code]


SLOTS = 1 << 16
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the upper bits of key * _SPREAD number a slot
_SLOT_SHIFT = np.uint64(48)


class _Context:
    """Descriptors met at one level under the same table attributes, sorted into classes.

    A class's key is the word without its free bits (`kept` are the others); all invalid descriptors have key 0.
    """

    def __init__(self, judge: _Judge, fault: FaultType | None, level: int, inherited: int) -> None:
        self.judge = judge
        self.fault = fault
        self.level = level
        self.inherited = inherited
        p = judge.p
        self.can_map = fault is None and any(kind in (Kind.BLOCK, Kind.PAGE) for kind in p.kinds[level])
        self.free = _free_bits(p, level) if self.can_map else 0
        self.offset = p.offset_mask(level, 0)
        self.plain = not p.features.contiguous_output and p.output_address(level, _U64 ^ self.free) & ~p.over == 0
        self.kept = _U64 ^ self.free if self.can_map else 0
        self.valid = p.page["VALID"].mask
        self.single: dict[int, int] = {}
        self.keys = _NO_WORDS  # sorted, with their classes in `numbers`
        self.numbers = np.zeros(0, np.intp)

    @cached_property
    def slots(self) -> tuple[Words, Numbers]:
        """Keys by hash, and their classes: the quick way. A key that finds its slot taken is looked up by sorting."""
        keys = np.zeros(SLOTS, np.uint64)
        keys[0] = _U64  # the empty slot of key 0
        return keys, np.zeros(SLOTS, np.intp)

    def classify(self, words: Words) -> int | Numbers:
        """Each word's class; an int where they are all the same."""
        both, either = int(np.bitwise_and.reduce(words)), int(np.bitwise_or.reduce(words))
        if not (both ^ either) & self.kept:
            return self._one(both & self.kept if both & self.valid else 0)
        keys = words & self.kept
        if not both & self.valid:
            keys *= words & self.valid  # 0 or 1
        slot_keys, slot_numbers = self.slots
        slot = (keys * _SPREAD >> _SLOT_SHIFT).view(np.int64)
        found = slot_numbers.take(slot)
        missing = np.flatnonzero(slot_keys.take(slot) != keys)
        if missing.size:
            found[missing] = self._sorted(keys[missing])
        return found

    def place(self, va: Words, words: Words, number: int | Numbers, scratch: Words, out: Words) -> None:
        """The PAs of leaves `words`, of classes `number`, to `out`; those of faults mean nothing."""
        table = self.judge.table
        offset: int | Words = self.offset
        if not self.plain:
            offset = table["offset"][number]
        np.bitwise_and(words, self.free, out=out)
        np.bitwise_and(va, offset, out=scratch)
        np.bitwise_or(out, scratch, out=out)
        if not self.plain:
            np.bitwise_or(out, table["fixed"][number], out=out)

    def _one(self, key: int) -> int:
        if key not in self.single:
            self.single[key] = int(self._sorted(np.full(1, key, np.uint64))[0])
        return self.single[key]

    def _sorted(self, keys: Words) -> Numbers:
        """The classes of keys, found in the sorted list; new ones are added to it."""
        place = np.searchsorted(self.keys, keys)
        known = np.append(self.keys, np.uint64(0))[place] == keys
        known &= place < len(self.keys)
        if not known.all():
            self._learn(np.unique(keys[~known]))
            place = np.searchsorted(self.keys, keys)
        return self.numbers[place]

    def _learn(self, keys: Words) -> None:
        first = self.judge.add(_judged(self, keys))
        numbers = np.arange(first, first + len(keys))
        place = np.searchsorted(self.keys, keys)
        self.keys, self.numbers = np.insert(self.keys, place, keys), np.insert(self.numbers, place, numbers)
        slot_keys, slot_numbers = self.slots
        slot = (keys * _SPREAD >> _SLOT_SHIFT).view(np.int64)
        slot_keys[slot], slot_numbers[slot] = keys, numbers


def _free_bits(p: WalkParams, level: int) -> int:
    """Bits of a leaf that go into the PA as they are, and mean nothing else."""
    output = p.fmt.leaf(level)["OA"]
    run = p.offset_mask(level, p.contiguous)  # in a contiguous run the lower ones may come from the VA
    return sum(span.mask for span in output.spans if span.lo == span.at) & ~p.over & ~run


class _Verdicts:
    """The first fault found for each of n descriptors: `type` as in _CLASS, and flags."""

    def __init__(self, n: int) -> None:
        self.type = np.zeros(n, np.uint8)
        self.flags = np.zeros(n, np.uint8)

    def refuse(self, where: Flags, type: FaultType, flags: int | Bytes = 0) -> None:
        """Where no earlier rule has refused."""
        first = where & (self.type == 0)
        self.type[first] = _number(type)
        self.flags |= np.where(first, np.uint8(0) | flags, np.uint8(0))


def _judged(context: _Context, words: Words) -> _Table:
    """The classes of descriptors `words` (pseudocode S1Walk from the leaf on, S1Translate)."""
    judge, p, level = context.judge, context.judge.p, context.level
    if context.fault:
        return _fault_rows(len(words), level, context.fault)
    if not context.can_map:
        return _fault_rows(len(words), level, FaultType.TRANSLATION)
    found = _Verdicts(len(words))
    index = _attr_index(p, words)
    base, overlay, pan = _permissions(p, words, context.inherited)
    _refuse_leaf(found, p, level, words)
    if not judge.access.aligned and judge.access.type is not AccessType.FETCH:
        found.refuse(np.array([is_device(byte) for byte in p.mair])[index], FaultType.ALIGNMENT)
    _refuse_permission(found, judge, words, base, overlay, pan)
    perms = base if overlay is None else base & overlay
    return _class_rows(context, words, found, index, perms)


def _attr_index(p: WalkParams, words: Words) -> Numbers:
    low, high = p.page["AttrIndx"], p.page["AttrIndx3"] if p.fmt.aie else None
    index = low.get(words) if high is None else low.get(words) | high.get(words) * (low.value_mask + 1)
    return index.astype(np.intp)


def _refuse_leaf(found: _Verdicts, p: WalkParams, level: int, words: Words) -> None:
    """Not a leaf, contiguous, nT, address size, access flag: in this order (pseudocode S1Walk)."""
    kind = np.array(p.kinds[level])[_type_bits(p, words)]
    found.refuse(kind == Kind.INVALID, FaultType.TRANSLATION)
    if p.features.contiguous_faults and p.run_too_large(level):
        found.refuse(words & p.contiguous != 0, FaultType.TRANSLATION)
    if p.features.nt_faults and p.features.bbm and level < LAST_LEVEL:
        found.refuse(words & p.nt != 0, FaultType.TRANSLATION)
    found.refuse(p.output_address(level, words) & p.over != 0, FaultType.ADDRESS_SIZE)
    if not p.ha:
        found.refuse(words & p.af == 0, FaultType.ACCESS_FLAG)


_Perms: TypeAlias = npt.NDArray[np.uint16]


def _permissions(p: WalkParams, words: Words, inherited: int) -> tuple[_Perms, _Perms | None, Flags]:
    """Base and overlay permission bits, and where PAN refuses: `leaf_permissions` for arrays."""
    rules: Any = p.rules
    index = p.page["PIIndex"].get(words) if p.pie else p.direct_index(words, np.full_like(words, inherited))
    pan = rules.pan.at(index) != 0
    if p.overlays is None:
        return rules.final.at(index), None, pan
    overlays: Any = p.overlays
    overlay = overlays.at(p.page["POIndex"].get(words))
    base, overlay = with_overlay(rules.base.at(index), rules.wxn.at(index), rules.overlayable.at(index), overlay)
    return base, overlay, pan


def _refuse_permission(
    found: _Verdicts, judge: _Judge, words: Words, base: _Perms, overlay: _Perms | None, pan: Flags
) -> None:
    """Overlay, base, dirty state: in this order (pseudocode S1CheckPermissions)."""
    p, access, unprivileged = judge.p, judge.access, judge.unprivileged
    need = access.needs(p.cmow, unprivileged)
    if not need:
        return
    if access.pan_sensitive and not unprivileged and (p.pan if access.pan is None else access.pan):
        base = np.where(pan, base & ~np.uint16(PR | PW), base)
    for by_overlay, granted in ((OVERLAY, overlay), (0, base)):
        if granted is not None:
            missing = need & ~(granted >> (TO_UNPRIVILEGED if unprivileged else 0))
            write: Bytes = np.where((missing & PR == 0) & bool(need & PW), WRITE, 0).astype(np.uint8)
            found.refuse(missing != 0, FaultType.PERMISSION, write | np.uint8(by_overlay))
    if p.pie and need & PW and not p.hd:
        found.refuse(words & p.not_dirty != 0, FaultType.PERMISSION, WRITE | DIRTY_BIT)


def _class_rows(context: _Context, words: Words, found: _Verdicts, index: Numbers, perms: _Perms) -> _Table:
    """The rows of the class table; what only a translation has stays 0 for a fault."""
    judge, p, level = context.judge, context.judge.p, context.level
    rows = np.zeros(len(words), _CLASS)
    ok = found.type == 0
    rows["ok"], rows["type"], rows["flags"], rows["level"] = ok, found.type, found.flags, level
    for number in set(found.type.tolist()) - {0}:
        rows["fault"][found.type == number] = fault_code(_TYPES[number - 1], level)
    attr = np.array([_effective_attr(p, judge.access, byte) for byte in p.mair], np.uint8)
    done, words = rows[ok], words[ok]
    done["attr"] = attr[index[ok]]
    sh = p.sh if p.fmt.lpa2 else p.page["SH"].get(words)
    done["sh"] = np.where(np.array(FORCED_OUTER)[done["attr"]], OUTER_SHAREABLE, sh)
    done["perms"] = perms[ok]
    done["flags"] = _spaces(p, words, context.inherited)
    done["flip"] = _flips(judge, words)
    done["rest"], done["free"] = words, context.free
    done["offset"] = np.where(words & p.contiguous != 0, p.offset_mask(level, p.contiguous), p.offset_mask(level, 0))
    done["fixed"] = p.output_address(level, words) & ~done["offset"]
    rows[ok] = done
    return rows


def _spaces(p: WalkParams, words: Words, inherited: int) -> Bytes:
    """NG and NS of translations, as in the scalar walk's `Translation`."""
    secure = p.secure and not inherited & p.ns_table
    ng = p.regime.has_el0 and ((words & p.ng != 0) | (p.secure and not secure))
    ns = (words & p.ns != 0) | (not secure)
    return np.where(ng, NG, 0).astype(np.uint8) | np.where(ns, NS, 0).astype(np.uint8)


def _flips(judge: _Judge, words: Words) -> Words:
    """The bits that hardware changes in leaves to which the access is allowed (access flag, dirty state)."""
    p, access = judge.p, judge.access
    if not p.ha or (access.is_at and not p.features.at_updates):
        return np.zeros_like(words)
    flips = ~words & np.uint64(p.af)
    if p.hd and access.writes and not access.is_at:
        managed = (words & p.dbm != 0) | p.pie
        flips |= np.where(managed, words & np.uint64(p.not_dirty), np.uint64(0))
    return flips


# Routes: how an address gets from its region to its descriptor.


class _Route(Protocol):
    def read(self, va: Words, rows: Numbers, out: Words) -> int | Numbers:
        """The classes of addresses `va` in regions `rows` (an int: all the same); PAs go to `out` (faults: any)."""
        ...

    def evidence(self, some: Numbers) -> tuple[Words, Words]:
        """PA and word of the last descriptor read for some of the addresses of the last `read`."""
        ...


class _Decided:
    """Regions whose walk ended above the last level: in a block, a hole, or a fault."""

    def __init__(self, judge: _Judge, ends: _Ends, rows: Numbers) -> None:
        self.ends = ends
        self.number = np.zeros(len(ends.level), np.intp)
        codes = judge.codes(ends)[rows]
        for code in np.flatnonzero(np.bincount(codes)).tolist():
            alike = rows[codes == code]
            self.number[alike] = judge.context(code).classify(ends.word[alike])
        numbers = self.number[rows]
        self.same = int(numbers[0]) if (numbers == numbers[0]).all() else None
        found = judge.table[self.number]
        self.offset = found["offset"].copy()
        self.base = ends.word & found["free"] | found["fixed"]
        self.one_offset = None if self.same is None else judge.table["offset"][self.same]

    def read(self, va: Words, rows: Numbers, out: Words) -> int | Numbers:
        offset = self.offset.take(rows, mode="clip") if self.one_offset is None else self.one_offset
        np.bitwise_and(va, offset, out=out)
        np.bitwise_or(out, self.base.take(rows, mode="clip"), out=out)
        self.rows = rows
        return self.number.take(rows, mode="clip") if self.same is None else self.same

    def evidence(self, some: Numbers) -> tuple[Words, Words]:
        rows = self.rows[some]
        return self.ends.at[rows], self.ends.word[rows]


class _Exact:
    """Regions whose table is in no single array: each address is walked to the end."""

    def __init__(self, judge: _Judge, descent: _Descent) -> None:
        self.judge = judge
        self.descent = descent

    def read(self, va: Words, rows: Numbers, out: Words) -> int | Numbers:
        each = np.arange(va.size)
        self.decided = _Decided(self.judge, self.descent.to_leaf(va), each)
        return self.decided.read(va, each, out)

    def evidence(self, some: Numbers) -> tuple[Words, Words]:
        return self.decided.evidence(some)


class _Tables:
    """Regions whose last-level tables are in one array of words and under the same table attributes.

    By region: `start` is its table's place in `words`, `at` the table's PA, both less the region's first page number.
    """

    def __init__(self, context: _Context, words: Words, start: npt.NDArray[np.int64], at: Words) -> None:
        self.context = context
        self.words = words
        self.start = start
        self.at = at
        self.page_shift = context.judge.p.fmt.granule.page_shift
        self.index = np.empty(CHUNK, np.int64)
        self.found = np.empty(CHUNK, np.uint64)

    def read(self, va: Words, rows: Numbers, out: Words) -> int | Numbers:
        index, found = self.index[: va.size], self.found[: va.size]
        np.take(self.start, rows, out=index, mode="clip")
        np.right_shift(va, self.page_shift, out=found)
        np.add(index, found.view(np.int64), out=index)
        np.take(self.words, index, out=found, mode="clip")
        if self.context.judge.p.big_endian:
            found.byteswap(inplace=True)
        number = self.context.classify(found)
        self.context.place(va, found, number, index.view(np.uint64), out)
        self.va, self.rows = va, rows
        return number

    def evidence(self, some: Numbers) -> tuple[Words, Words]:
        at = self.at[self.rows[some]] + (self.va[some] >> self.page_shift << 3)
        return at, self.found[some]


class _Walks:
    """The addresses of one half that are in range, walked together."""

    def __init__(self, reader: _Reader, p: WalkParams, access: Access, unprivileged: bool, va: Words) -> None:
        self.p = p
        self.va = va
        self.judge = _Judge(p, access, unprivileged)
        self.descent = _Descent(reader, p)
        shift = p.fmt.granule.level_shift(LAST_LEVEL - 1)
        self.index = _Index.of(va, shift, reader.dense and not p.haft)
        first = np.maximum(self.index.keys << shift, p.half_base)
        self.routes: list[_Route] = []
        self.route = np.zeros(len(first), np.uint16)  # by region
        self._plan(reader, self.descent.to_last_table(first), first >> p.fmt.granule.page_shift)
        self.stopped: list[tuple[Numbers, Words]] = [_NONE_STOPPED]
        self.scratch = np.empty((2, CHUNK), np.uint64)

    def _plan(self, reader: _Reader, ends: _Ends, page: Words) -> None:
        """A route for each region. `page`: the number of each region's first page."""
        left = (ends.level == LAST_LEVEL) & (ends.end == 0)
        if not left.all():
            self._add(~left, _Decided(self.judge, ends, np.flatnonzero(~left)))
        tables, at = np.flatnonzero(left), ends.at - (page << 3)
        codes = self.judge.codes(ends)[tables]
        for words, start, inside in reader.sources(ends.at[tables], self.p.levels[-1][2] + 1):
            place = -page.view(np.int64)
            place[tables] += start
            for code in np.flatnonzero(np.bincount(codes[inside])).tolist():
                regions = tables[inside & (codes == code)]
                self._add(regions, _Tables(self.judge.context(code), words, place, at))
            left[tables[inside]] = False
        if left.any():
            self._add(left, _Exact(self.judge, self.descent))

    def _add(self, regions: Flags | Numbers, route: _Route) -> None:
        self.route[regions] = len(self.routes)
        self.routes.append(route)

    def part(self, where: Numbers | None) -> _Part:
        """The answers."""
        n = self.va.size
        pa, number = np.empty(n, np.uint64), np.zeros(n, np.int32)
        for start in _chunks(self.va):
            self._chunk(start, pa[start : start + CHUNK], number[start : start + CHUNK])
        stopped = np.concatenate([at for at, _ in self.stopped]), np.concatenate([words for _, words in self.stopped])
        return _Part(where, pa, number, self.judge.table, stopped, _each_once(self.descent.updates))

    def _chunk(self, start: int, pa: Words, number: npt.NDArray[np.int32]) -> None:
        """The answers for the addresses from `start` on, into `pa` and `number`, which is 0 so far."""
        va = self.va[start : start + pa.size]
        rows = self.index.rows(start, va, self.scratch[0])
        for route, some in self._split(rows):
            if some is None:
                found = self._answer(route, va, rows, pa, start)
                if not isinstance(found, int) or found:
                    number[:] = found
            else:
                out = self.scratch[1][: some.size]
                number[some] = self._answer(route, va[some], rows[some], out, some + start)
                pa[some] = out

    def _split(self, rows: Numbers) -> Iterator[tuple[_Route, Numbers | None]]:
        """The routes that regions `rows` need, with the positions in `rows`; None for all of them."""
        if len(self.routes) == 1:
            yield self.routes[0], None
            return
        taken = self.route.take(rows, mode="clip")
        for i, route in enumerate(self.routes):
            some = np.flatnonzero(taken == i)
            if some.size:
                yield route, some if some.size < rows.size else None

    def _answer(self, route: _Route, va: Words, rows: Numbers, out: Words, positions: int | Numbers) -> int | Numbers:
        """The classes of some addresses; PAs go to `out`, faults and updates are noted."""
        number = route.read(va, rows, out)
        judge = self.judge
        if not judge.all_ok:
            self._note_faults(route, _members(~judge.ok, number, va.size), out, positions)
        if judge.any_flip:
            self._note_updates(route, _members(judge.flip != 0, number, va.size), number)
        return number

    def _note_faults(self, route: _Route, some: Numbers, out: Words, positions: int | Numbers) -> None:
        if some.size:
            out[some] = 0
            at = some + positions if isinstance(positions, int) else positions[some]
            self.stopped.append((at, route.evidence(some)[1]))

    def _note_updates(self, route: _Route, some: Numbers, number: int | Numbers) -> None:
        if some.size:
            at, words = route.evidence(some)
            flips = self.judge.flip[number if isinstance(number, int) else number[some]]
            self.descent.updates.append(WordChanges(at, words, words ^ flips))


def _members(classes: Flags, number: int | Numbers, n: int) -> Numbers:
    """The positions, of n, of addresses in one of `classes`."""
    if isinstance(number, int):
        return np.arange(n if classes[number] else 0)
    return np.flatnonzero(classes.take(number, mode="clip"))
