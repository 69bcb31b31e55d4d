"""Stage 1 for arrays of addresses: the answers of the scalar walk, as arrays, without a loop over addresses.

Rules of this file:
- Addresses are sorted into parts: those of each half of the VA space that are in range (walked in regions.py), and
  those with one fate (out of range, MMU off). The parts are put together in `Many`.
- `Many` keeps each address's PA and the number of its class (classes.py); everything else is expanded when asked.
- What walk.py says of one address or one half is asked there, not said again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pgtable.access import Access, AccessType
from pgtable.addresses import Addresses, Sheet, untagged_bounds
from pgtable.bits import Flags, Words
from pgtable.classes import (
    CLASS,
    MMU_OFF,
    NO_WORDS,
    NS,
    STAGE2,
    TYPES,
    Bytes,
    Judge,
    Levels,
    Numbers,
    Perms,
    Table,
    fault_row,
    number_of,
    result_of,
)
from pgtable.faults import Fault, FaultType
from pgtable.memory import Memory, WordChanges
from pgtable.params import RANGE_BIT, Regime, WalkParams
from pgtable.regions import Reader, Walks, reader
from pgtable.registers import PAR_OK, Registers
from pgtable.walk import Translation, _as_el0, _before_the_walk, _mmu_off

_U64 = (1 << 64) - 1


@dataclass(frozen=True, eq=False)
class Many:
    """What `translate_many` found: arrays in the shape of the VAs, those that are properties made on first use.

    `ok` (bool): the access translates; only this tells, an address size fault at level 0 has code 0. `pa` (uint64): 0
    where not ok. `updates`: what hardware changes (access flag, dirty state, FEAT_HAFDBS), each descriptor once, in
    address order, all walks taken to be made at the same moment. `stored`: the same as memory holds it, where SCTLR.EE
    has tables in the other byte order.
    """

    ok: Flags
    pa: Words
    updates: WordChanges
    access: Access
    stored: WordChanges = field(repr=False)
    _table: Table = field(repr=False)
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
    def level(self) -> Levels:
        """The leaf's level, or the one that the fault reports; MMU_OFF (-128) for a translation with the MMU off."""
        found: Levels = self._column("level")
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
    def perms(self) -> Perms:
        """Permission bits of every level (permissions.py), before PAN, uint16; 0 where not ok."""
        found: Perms = self._column("perms")
        return found

    @cached_property
    def flags(self) -> Bytes:
        """WRITE, DIRTY_BIT, OVERLAY, STAGE2, S1PTW of a fault; NG, NS of a translation; uint8."""
        found: Bytes = self._column("flags")
        return found

    def par(self) -> Words:
        """PAR_EL1 (uint64), as `Fault.par` and `Translation.par` give it.

        Where the fault is an external abort on the walk, the AT instruction takes an exception instead (`aborts`).
        """
        fixed = self._encoded(_par)
        pa = PAR_OK["PA"]
        return fixed[self._class] | pa.put(np.zeros_like(self.pa), self.pa & np.uint64(pa.value_mask))

    def esr(self, *, target_el: int | None = None) -> Words:
        """ESR_ELx of each abort (uint64), as `Fault.esr` gives it (stage 2's to EL2); 0 where ok."""
        access = self.access

        def esr(found: Translation | Fault) -> int:
            if isinstance(found, Translation):
                return 0
            return found.esr(access, target_el=2 if target_el is None and found.stage == 2 else target_el)

        fixed = self._encoded(esr)
        found: Words = fixed[self._class]
        return found

    @property
    def aborts(self) -> Flags:
        """Where the walk met an external abort."""
        found: Flags = self._column("type") == number_of(FaultType.EXTERNAL_ON_WALK)
        return found

    @property
    def stage2(self) -> Flags:
        """Where stage 2 refused."""
        found: Flags = self.flags & np.uint8(STAGE2) != 0
        return found

    def _encoded(self, encode: Callable[[Translation | Fault], int]) -> Words:
        """A value for each class, from the scalar encoders: each distinct result is encoded once."""
        t = self._table
        columns = (t["type"], t["level"].astype(np.intp) - MMU_OFF, t["flags"], t["attr"], t["sh"])
        key = np.ravel_multi_index(columns, (len(TYPES) + 1, 1 << 8, 1 << 8, 1 << 8, 1 << 2))
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        return np.array([encode(result_of(row)) for row in t[first]], np.uint64)[inverse]


@lru_cache(maxsize=1 << 12)
def _par(found: Translation | Fault) -> int:
    return found.par()


def stage1_many(memory: Memory, regs: Registers, vas: npt.ArrayLike, access: Access, regime: Regime) -> Many:
    """What stage 1 makes of each of `vas`; see `translate_many` (mmu.py)."""
    flat, shape = addresses_of(vas)
    halves = tuple(WalkParams.of(regs, regime, va) for va in ((0, RANGE_BIT) if regime.has_el0 else (0,)))
    return _filled(_answered(reader(memory), halves, flat, access), shape, access, halves[0].big_endian)


def addresses_of(vas: npt.ArrayLike) -> tuple[Words, tuple[int, ...]]:
    """The VAs as a flat, contiguous uint64 array, and their shape."""
    array = np.asarray(vas)
    if array.dtype.kind not in "ui" and array.size and not isinstance(vas, np.ndarray):
        array = _integers(np.asarray(vas, object), array)
    if array.dtype.kind not in "ui" and array.size:
        raise ValueError(f"VAs of type {array.dtype}: must be integers of 64 bits (uint64)")
    if array.dtype.kind == "i" and array.size and int(array.min()) < 0:
        raise ValueError(f"VA {int(array.min()):#x}: must be 64 bits and not negative (uint64)")
    return np.ascontiguousarray(array, np.uint64).reshape(-1), array.shape


def _integers(objects: npt.NDArray[Any], array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Python integers, of which numpy makes floats when some need 64 bits and others not; else `array`."""
    values: list[Any] = objects.reshape(-1).tolist()
    if any(type(value) is not int for value in values):
        return array
    low, high = min(values), max(values)
    if low < 0 or high > _U64:
        raise ValueError(f"VA {low if low < 0 else high:#x}: must be 64 bits and not negative (uint64)")
    return objects.astype(np.uint64)


def _answered(source: Reader, halves: tuple[WalkParams, ...], flat: Words, access: Access) -> Sheet:
    """The answers for the VAs of `flat`: each half fills in those in its range, the others are refused."""
    if not halves[0].mmu_on:
        return _answered_flat(halves[0], flat, access)
    halves = tuple(p for p in halves if not _before_the_walk(p, p.half_base, access))
    fetch = access.type is AccessType.FETCH
    bounds = untagged_bounds(flat, halves)
    known = bounds or dict.fromkeys((False, True))
    masks = [p.fetch_range_mask if fetch else p.data_range_mask for p in halves]
    parts = [(p, Addresses(flat, p, mask, known[p.upper])) for p, mask in zip(halves, masks, strict=True)]
    # A VA out of range (pseudocode VAIsOutOfRange) is refused as one whose half is closed (TxSZ, E0PD, EPD).
    all_in_range = sum(addresses.bounds.n for _, addresses in parts) == flat.size
    sheet = Sheet(flat.size, None if all_in_range else fault_row(Fault(FaultType.TRANSLATION, 0)))
    for p, addresses in parts:
        if addresses.bounds.n:
            Walks(source, Judge(p, access, _as_el0(p, access)), addresses, sheet).run()
    return sheet


def _answered_flat(p: WalkParams, flat: Words, access: Access) -> Sheet:
    """With the MMU off: the PA is the VA without its tag; everything else is what VA 0 gives.

    A VA of the upper half is always out of range: its bit 55 is beyond the PA size.
    """
    sheet = Sheet(flat.size, fault_row(Fault(FaultType.ADDRESS_SIZE, 0)))
    result = _mmu_off(p, 0, access)
    row = fault_row(result) if isinstance(result, Fault) else np.zeros(1, CLASS)
    if isinstance(result, Translation):
        row["ok"], row["level"], row["flags"] = True, MMU_OFF, NS * result.ns
        row["attr"], row["sh"], row["perms"] = result.attr, result.sh, result.perms
    for _, va, where in Addresses(flat, p, p.physical_range_mask(access.type is AccessType.FETCH)).chunks():
        sheet.put(where, 0)
        sheet.ok[where], sheet.pa[where] = row["ok"][0], va if row["ok"][0] else 0
    sheet.tables.append(row)
    return sheet


def _filled(sheet: Sheet, shape: tuple[int, ...], access: Access, big_endian: bool) -> Many:
    """The finished answers, in the shape of the VAs."""
    ok, pa = sheet.ok.reshape(shape), sheet.pa.reshape(shape)
    number = np.broadcast_to(np.int32(0), shape) if sheet.number is None else sheet.number.reshape(shape)
    table = np.concatenate([np.zeros(0, CLASS), *sheet.tables])
    stopped = np.concatenate([at for at, _ in sheet.stopped]), np.concatenate([words for _, words in sheet.stopped])
    updates = each_once(sheet.updates)
    return Many(ok, pa, updates, access, in_memory(updates, big_endian), table, number, stopped)


def in_memory(updates: WordChanges, big_endian: bool) -> WordChanges:
    """The updates with their words as memory holds them."""
    return WordChanges(updates.pa, updates.old.byteswap(), updates.new.byteswap()) if big_endian else updates


def each_once(updates: list[WordChanges]) -> WordChanges:
    """Every descriptor once, in address order, with all the changes that were found for it."""
    found = [u for u in updates if u.pa.size]
    if not found:
        return WordChanges(NO_WORDS, NO_WORDS, NO_WORDS)
    pa, old, new = (np.concatenate([u[i] for u in found]) for i in range(3))
    order = np.argsort(pa, kind="stable")
    pa, old, flips = pa[order], old[order], (old ^ new)[order]
    first = np.flatnonzero(np.append(True, pa[1:] != pa[:-1]))
    old = old[first]
    changed: Words = np.bitwise_or.reduceat(flips, first)
    return WordChanges(pa[first], old, old ^ changed)
