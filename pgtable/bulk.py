"""The stage 1 walk for arrays of addresses: what `translate` answers, for each element, without a loop over elements.

Rules of this file:
- A region is what one last-level table covers (2 MiB with the 4K granule). Each distinct region is walked once, level
  by level, for all regions together (`_descend`); an address then costs one look-up of its region and one read.
- Descriptors that differ in nothing but in-place output address bits are one class. The rules are applied to classes
  (`_Judge`), in the order of walk.py and over the same layouts and rule tables; `Many` expands classes when asked.
- A block, a hole or a table with no RAM is the affair of its region (`_Decided`, `_Exact`), not of the whole call.
- Addresses are worked on in chunks that stay in the cache; loops run over levels, halves, RAM regions, chunks and kinds
  of region, never over addresses.
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
    [("ok", "?"), ("type", "u1"), ("fault", "u1"), ("level", "i1"), ("attr", "u1"), ("sh", "u1"), ("flags", "u1")]
    + [("perms", "u2"), ("rest", "u8"), ("free", "u8"), ("fixed", "u8"), ("offset", "u8"), ("flip", "u8")]
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
        """The leaf's level, or the level that the fault reports; MMU_OFF (-128) for a translation with the MMU off."""
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
        return fixed[self._class] | pa.put(np.zeros_like(self.pa), self.pa & pa.value_mask)

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


def _translated(
    reader: _Reader, p: WalkParams, flat: Words, where: Numbers | None, access: Access
) -> Iterator[_Part]:
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
        va = va & (1 << p.ia_bits) - 1 | p.half_base if p.mmu_on else va  # without the tag
    if va.size:
        yield _Walks(reader, p, access, unprivileged, va).part(where) if p.mmu_on else _flat(p, where, va, access)


def _out_of_range(p: WalkParams, va: Words, access: Access) -> Flags | None:
    """Where the VA is out of range (pseudocode VAIsOutOfRange, S1DisabledOutput); None: nowhere, and no VA has a tag."""
    if p.mmu_on and _holds(p, int(va.min()), int(va.max())):
        return None
    fetch = access.type is AccessType.FETCH
    if not p.mmu_on:
        return va & p.physical_range_mask(fetch) != 0
    mask = p.fetch_range_mask if fetch else p.data_range_mask
    return va & mask != (mask if p.upper else 0)


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
    pa = va & ((1 << p.features.pa_bits) - 1)
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
    pa, old, new = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(pa, kind="stable")
    pa, old, flips = pa[order], old[order], (old ^ new)[order]
    first = np.flatnonzero(np.append(True, pa[1:] != pa[:-1]))
    old = old[first]
    return WordChanges(pa[first], old, old ^ np.bitwise_or.reduceat(flips, first))


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
        for base, size, words, _, _ in self.memory.regions:
            offset = tables - np.uint64(base)  # wraps far above `size` below the base
            inside = offset <= np.uint64(max(size - 8 * n, 0))
            if size >= 8 * n and inside.any():
                yield _Source(words, (offset >> 3).view(np.int64), inside)


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
        new = []
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
