"""Builds translation tables in physical memory: map, unmap, protect, split, by pages and blocks.

Rules of this file:
- The tables in memory are the only state, with the pool's next free page; there are no table objects.
- A mapping is refused, with nothing written, when it is misaligned, out of range or overlaps a live one.
- Leaf attributes are a template word, or fields by their Arm names (`AP=2, UXN=1`); the layout checks them.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import NamedTuple

import numpy as np

from pgtable.bits import Flags, Words
from pgtable.build_spans import Entries, Spans, whole_tables, write_run
from pgtable.descriptors import CONTIGUOUS_RUN, LAST_LEVEL, Format, Granule, Kind
from pgtable.memory import PhysicalMemory
from pgtable.stage2 import CONCATENATED, SL0_OF_LEVEL

# A leaf that a kernel could use: AF set, inner shareable, never executable, EL1 read/write, attribute 0.
DEFAULT_FIELDS = {"AF": 1, "UXN": 1, "PXN": 1}
# A leaf of stage 2 that a guest could use: everything allowed. MemAttr is write-back; with FWB: what stage 1 says.
STAGE2_DEFAULT_FIELDS = {"AF": 1, "S2AP": 3, "MemAttr": 0xF}
AS_STAGE1 = 7


class MapError(ValueError):
    """A mapping that cannot be made; says which address, size and limit."""


class Slot(NamedTuple):
    """Where a descriptor is: entry `entry` of the table at `table`, at `level`; `va` is where its range begins."""

    level: int
    table: int
    entry: int
    va: int

    @property
    def pa(self) -> int:
        """The descriptor's PA."""
        return self.table + 8 * self.entry


class TableBuilder:
    """One translation tree, its root included, in `memory`, taking table pages from `pool` (PA, bytes).

    `va_bits`: bits of the VA that the tree translates (64 - TxSZ). `upper`: it is TTBR1's. `table_fields` go into
    every table descriptor (`UXNTable=1`). `root`: the root table's PA, for TTBRn. `stage` 2: the tree is stage 2's,
    addresses are IPAs; its root is at `start_level` (default: the deepest possible), as up to 16 concatenated tables;
    `vtcr` gives VTCR_EL2's fields for it.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        pool: tuple[int, int],
        *,
        fmt: Format | None = None,
        va_bits: int = 48,
        upper: bool = False,
        stage: int = 1,
        start_level: int | None = None,
        **table_fields: int,
    ) -> None:
        self.memory = memory
        self.fmt = fmt or Format(stage2=stage == 2)
        if self.fmt.stage2 != (stage == 2) or stage not in (1, 2):
            raise MapError(f"stage={stage}: the format is of stage {1 + self.fmt.stage2}")
        self.va_bits = va_bits
        self.upper = upper
        self.granule: Granule = self.fmt.granule
        self.start_level = self._start(start_level)
        self.table_fields = table_fields
        self.pool = pool
        if pool[0] % self.granule.page_size:
            raise MapError(f"pool at {pool[0]:#x}: must be a multiple of {self.granule.page_size:#x}")
        self.next_free = -(-pool[0] // self.root_size) * self.root_size
        self.root = self.allocate(self.root_size)

    @property
    def base(self) -> int:
        """The lowest VA of the tree."""
        return (1 << 64) - (1 << self.va_bits) if self.upper else 0

    @property
    def used(self) -> tuple[int, int]:
        """The table pages taken from the pool: (PA, bytes)."""
        return self.pool[0], self.next_free - self.pool[0]

    def on(self, memory: PhysicalMemory) -> TableBuilder:
        """The same tree in another memory with the same content (a copy of this one)."""
        other = copy(self)
        other.memory = memory
        return other

    def _start(self, asked: int | None) -> int:
        """The root's level; raises MapError for one that the tree cannot have."""
        deepest = LAST_LEVEL - (self.va_bits - 1 - self.granule.page_shift) // self.granule.stride
        if not self.fmt.stage2:
            if asked not in (None, deepest):
                raise MapError(f"start_level={asked}: a {self.va_bits}-bit tree of stage 1 starts at level {deepest}")
            return deepest
        concatenated = self.va_bits - self.granule.level_shift(min(deepest + 1, LAST_LEVEL)) - self.granule.stride
        most = deepest + 1 if deepest < LAST_LEVEL and concatenated <= CONCATENATED else deepest
        first = most if asked is None else asked
        if first not in (deepest, most):
            raise MapError(f"start_level={asked}: {self.va_bits} bits of IPA start at level {deepest} or {most}")
        return first

    @property
    def root_size(self) -> int:
        """Bytes of the root: a table, or up to 16 of them (stage 2)."""
        entries = 1 << (self.va_bits - self.granule.level_shift(self.start_level))
        return max(8 * entries, self.granule.page_size)

    @property
    def vtcr(self) -> dict[str, int]:
        """VTCR_EL2's fields for a tree of stage 2: T0SZ, TG0, SL0, SL2, DS."""
        sl0 = SL0_OF_LEVEL[self.granule][self.start_level]
        tg0 = {Granule.K4: 0, Granule.K64: 1, Granule.K16: 2}[self.granule]
        return {
            "T0SZ": 64 - self.va_bits,
            "TG0": tg0,
            "SL0": sl0 & 3,
            "SL2": sl0 >> 2,
            "DS": int(self.fmt.lpa2),
        }

    def allocate(self, size: int | None = None) -> int:
        """A zeroed table page (or `size` bytes) from the pool; raises MapError when there is none."""
        size = size or self.granule.page_size
        pa = self._take(size)
        self.memory.words(pa, size // 8)[:] = 0
        return pa

    def _take(self, size: int) -> int:
        """The PA of `size` bytes from the pool, with what was in them; raises MapError when there are not so many."""
        pa = self.next_free
        if pa + size > self.pool[0] + self.pool[1]:
            raise MapError(f"no table page left in the pool at {self.pool[0]:#x}, {self.pool[1]:#x} bytes")
        self.next_free = pa + size
        return pa

    def map(
        self,
        va: int,
        pa: int,
        size: int,
        *,
        level: int | None = None,
        template: int | None = None,
        contiguous: bool = False,
        **fields: int,
    ) -> None:
        """Maps [va, va + size) to [pa, pa + size), by the largest legal blocks, or all at `level`.

        `template`: a leaf descriptor whose attributes are used (address and type bits are not); `fields` are set on
        top, by their Arm names. `contiguous` sets the Contiguous bit in every aligned run that is mapped whole.
        Raises MapError.
        """
        self._check(va, size, pa)
        levels = self._levels(level)
        self._check_alignment(va, pa, size, max(levels))
        pieces = list(self._pieces(va, pa, size, levels))
        for piece_level, piece_va, _, count in pieces:
            self._refuse_live(piece_level, piece_va, count)
        for piece_level, piece_va, piece_pa, count in pieces:
            word = self._leaf_word(piece_level, template, fields)
            self._fill(piece_level, piece_va, piece_pa, count, word, contiguous)

    def unmap(self, va: int, size: int) -> None:
        """Zeroes every leaf in [va, va + size); holes are passed over. Raises MapError for part of a block."""
        self._check(va, size)
        for words, _ in list(self._live(va, size)):
            words[:] = 0

    def protect(self, va: int, size: int, **fields: int) -> None:
        """Sets fields (`AP=2`) in every leaf of [va, va + size). Raises MapError for part of a block."""
        self._check(va, size)
        for words, level in list(self._live(va, size)):
            leaf = self.fmt.leaf(level)
            new = words.copy()
            for name, value in fields.items():
                new = leaf[name].put(new, value)
            words[:] = np.where(words & np.uint64(1), new, words)

    def split(self, va: int) -> None:
        """Replaces the block that maps `va` by a table of entries one level down, with the same attributes."""
        slot = self.slot(va)
        word = self.memory.fetch(slot.pa)
        if self.fmt.kind(word, slot.level) is not Kind.BLOCK:
            raise MapError(f"va {va:#x}: no block there to split (level {slot.level}: {word:#018x})")
        below = slot.level + 1
        table = self.allocate()
        pa = self.fmt.leaf(slot.level)["OA"].get(word)
        attributes = word & ~self.fmt.leaf(slot.level).mask("OA", "TYPE")
        write_run(self.memory, table, self.fmt, below, pa, self.granule.entries, attributes | self._type(below))
        self.memory.store(slot.pa, self._table_word(table))

    def slot(self, va: int, level: int | None = None) -> Slot:
        """Where the descriptor of `va` is: at `level`, or where the walk ends. Raises MapError without a table."""
        self._check(va, 1)
        if level is not None:
            self._check_level(va, level)
        table = self.root
        for at in range(self.start_level, LAST_LEVEL + 1):
            slot = Slot(at, table, self._entry(va, at), va & -self.granule.level_size(at))
            word = self.memory.fetch(slot.pa)
            if at == level or (level is None and self.fmt.kind(word, at) is not Kind.TABLE):
                return slot
            if self.fmt.kind(word, at) is not Kind.TABLE:
                raise MapError(f"va {va:#x}: no table at level {at}, so no level {level} descriptor")
            table = self.fmt.table(at)["TA"].get(word)
        raise AssertionError("level 3 has no tables")

    def place(self, va: int, level: int, word: int) -> Slot:
        """Writes a raw descriptor for `va` at `level`, whatever it says, making the tables above it."""
        self._check(va, 1)
        self._check_level(va, level)
        table = self._table_at(va, level)
        slot = Slot(level, table, self._entry(va, level), va & -self.granule.level_size(level))
        self.memory.store(slot.pa, word)
        return slot

    def _check(self, va: int, size: int, pa: int = 0) -> None:
        if size <= 0:
            raise MapError(f"va {va:#x} size {size:#x}: must be more than 0 bytes")
        if not self.base <= va or va + size > self.base + (1 << self.va_bits):
            half = "upper" if self.upper else "lower"
            raise MapError(f"va {va:#x} size {size:#x}: outside the {half} {self.va_bits}-bit range")
        limit = 52 if self.fmt.wide else 48
        if pa + size > 1 << limit:
            raise MapError(f"pa {pa:#x} size {size:#x}: beyond the {limit} bits that a descriptor holds")

    def _check_level(self, va: int, level: int) -> None:
        if not self.start_level <= level <= LAST_LEVEL:
            raise MapError(f"va {va:#x}: level {level} is not a level of this tree")

    def _check_alignment(self, va: int, pa: int, size: int, level: int) -> None:
        unit = self.granule.level_size(level)
        for name, value in (("va", va), ("pa", pa), ("size", size)):
            if value % unit:
                raise MapError(f"{name} {value:#x} is not a multiple of {unit:#x} (level {level})")

    def _levels(self, level: int | None) -> list[int]:
        legal = sorted(at for at in (*self.fmt.block_levels, LAST_LEVEL) if at >= self.start_level)
        if level is None:
            return legal
        if level not in legal:
            raise MapError(f"level {level}: blocks and pages of this tree are at levels {legal}")
        return [level]

    def _pieces(self, va: int, pa: int, size: int, levels: list[int]) -> Iterator[tuple[int, int, int, int]]:
        """Runs (level, va, pa, count) of entries of one level, the largest that fit first."""
        end = va + size
        while va < end:
            level = next(at for at in levels if self._fits(va, pa, end - va, at))
            unit = self.granule.level_size(level)
            stop = min(va + (end - va) // unit * unit, self._next_larger(va, pa, end, level, levels))
            count = (stop - va) // unit
            yield level, va, pa, count
            va, pa = va + count * unit, pa + count * unit

    def _fits(self, va: int, pa: int, size: int, level: int) -> bool:
        unit = self.granule.level_size(level)
        return size >= unit and not va % unit and not pa % unit

    def _next_larger(self, va: int, pa: int, end: int, level: int, levels: list[int]) -> int:
        """Where a larger block could begin after `va`."""
        larger = [self.granule.level_size(at) for at in levels if at < level]
        return min((-(-(va + 1) // u) * u for u in larger if (va - pa) % u == 0), default=end)

    def _entry(self, va: int, level: int) -> int:
        mask = (1 << self.va_bits - self.granule.level_shift(level)) - 1 if level == self.start_level else -1
        mask = mask if self.fmt.stage2 and level == self.start_level else self.granule.entries - 1
        return (va - self.base) >> self.granule.level_shift(level) & mask

    @property
    def _spans(self) -> Spans:
        return Spans(self.memory, self.fmt, self.root, self.start_level)

    def _span(self, level: int, va: int, count: int) -> Entries:
        return Entries((va - self.base) >> self.granule.level_shift(level), count)

    def _refuse_live(self, level: int, va: int, count: int) -> None:
        """Raises MapError if any of the `count` entries, or an entry above them, is a live mapping."""

        def found(at: int, entries: Entries, _: Words, words: Words) -> Words:
            self._refuse_blocks(at, entries, words, va)
            return words

        span = self._span(level, va, count)
        live = self._spans.live(level, span, self._spans.tables(level, span, found))
        if live:
            number, word = live
            kind = self.fmt.kind(word, level)
            at_va = self.base + (number << self.granule.level_shift(level))
            raise MapError(f"va {at_va:#x}: overlaps a live {kind.name.lower()} at level {level} ({word:#018x})")

    def _refuse_blocks(self, level: int, entries: Entries, words: Words, va: int) -> None:
        """Raises MapError if one of the descriptors above a range from `va` on is a block."""
        if level not in self.fmt.block_levels:
            return
        block = words & np.uint64(3) == 1
        if block.any():
            i = int(np.argmax(block))
            va = max(va, self.base + (entries.first + i << self.granule.level_shift(level)))
            raise MapError(f"va {va:#x}: inside a live block at level {level} ({int(words[i]):#018x}); split it first")

    def _tables_made(self, level: int, span: Entries) -> Words:
        """The PAs of the tables at `level` that entries `span` are in, made where they are not there."""
        whole = whole_tables(level, span, self.granule.entries, self.start_level)

        def found(at: int, _: Entries, slots: Words, words: Words) -> Words:
            absent = np.flatnonzero(words & np.uint64(3) != 3)
            if not len(absent):
                return words
            covered = (absent >= whole[0]) & (absent < whole[1]) if at == level - 1 else np.zeros(len(absent), bool)
            tables = self._allocate_many(~covered)
            words = words.copy()
            words[absent] = self.fmt.table(at)["TA"].put(np.full(len(absent), self._table_word(0), np.uint64), tables)
            self._spans.store(slots[absent], words[absent])
            return words

        return self._spans.tables(level, span, found)

    def _allocate_many(self, to_zero: Flags) -> Words:
        """Table pages from the pool, one for each flag, zeroed where it is set. Raises MapError, none taken."""
        page = self.granule.page_size
        first = self._take(len(to_zero) * page)
        for i in np.flatnonzero(to_zero).tolist():
            self.memory.words(first + i * page, page // 8)[:] = 0
        return np.arange(first, first + len(to_zero) * page, page, dtype=np.uint64)

    def _table_at(self, va: int, level: int) -> int:
        """The PA of the table at `level` for `va`, made if it is not there."""
        table = self.root
        for at in range(self.start_level, level):
            pa = table + 8 * self._entry(va, at)
            word = self.memory.fetch(pa)
            if self.fmt.kind(word, at) is Kind.BLOCK:
                raise MapError(f"va {va:#x}: inside a live block at level {at} ({word:#018x}); split it first")
            if self.fmt.kind(word, at) is Kind.TABLE:
                table = self.fmt.table(at)["TA"].get(word)
            else:
                table = self.allocate()
                self.memory.store(pa, self._table_word(table))
        return table

    def _table_word(self, table: int) -> int:
        return self.fmt.table(LAST_LEVEL - 1).pack(VALID=1, TYPE=1, TA=table, **self.table_fields)

    def _type(self, level: int) -> int:
        return self.fmt.leaf(level).pack(VALID=1, TYPE=int(level == LAST_LEVEL))

    def _leaf_word(self, level: int, template: int | None, fields: dict[str, int]) -> int:
        leaf = self.fmt.leaf(level)
        if template is None:
            fields_of = STAGE2_DEFAULT_FIELDS if self.fmt.stage2 else DEFAULT_FIELDS
            defaults = {name: value for name, value in fields_of.items() if name in leaf}
            if self.fmt.fwb:
                defaults["MemAttr"] = AS_STAGE1
            template = leaf.pack(**defaults)
            template = leaf["SH"].put(template, 3) if "SH" in leaf else template
        address = leaf.mask("OA") | self.fmt.leaf(LAST_LEVEL).mask("OA")  # a block's template may be a page
        template &= ~(address | leaf.mask("TYPE", "VALID"))
        return leaf.pack(template, **fields) | self._type(level)

    def _fill(self, level: int, va: int, pa: int, count: int, word: int, contiguous: bool) -> None:
        span, unit = self._span(level, va, count), self.granule.level_size(level)
        for slot, first, n in self._spans.runs(level, span, self._tables_made(level, span)):
            self._write_run(slot, first, level, pa + (first - span.first) * unit, n, word, contiguous)

    def _write_run(self, slot: int, entry: int, level: int, pa: int, count: int, word: int, contiguous: bool) -> None:
        """Writes `count` consecutive entries, from number `entry` at PA `slot` on, that map consecutive addresses."""
        write_run(self.memory, slot, self.fmt, level, pa, count, word)
        if contiguous:
            mask = np.uint64(self.fmt.leaf(level).mask("Contiguous"))
            self.memory.words(slot, count)[self._whole_runs(level, entry, pa, count)] |= mask

    def _whole_runs(self, level: int, entry: int, pa: int, count: int) -> Flags:
        """For each of `count` entries, whether it lies in an aligned run that is written whole."""
        run = CONTIGUOUS_RUN[self.granule].get(level, 1)
        index = np.arange(entry, entry + count)
        first = index // run * run
        aligned = (pa // self.granule.level_size(level) - entry) % run == 0 and run > 1
        return (first >= entry) & (first + run <= entry + count) & aligned

    def _live(self, va: int, size: int) -> Iterator[tuple[Words, int]]:
        """Views of the leaves in [va, va + size), with their level; raises MapError for part of a block."""
        end = va + size
        while va < end:
            slot = self.slot(va)
            unit = self.granule.level_size(slot.level)
            kind = self.fmt.kind(self.memory.fetch(slot.pa), slot.level)
            if kind is Kind.BLOCK and (va % unit or end - va < unit):
                raise MapError(
                    f"va {va:#x} size {end - va:#x}: part of a live block at level {slot.level} (split it first)"
                )
            if slot.level == LAST_LEVEL:
                stop = min(end, (va | (unit * self.granule.entries - 1)) + 1)
                yield self.memory.words(slot.pa, -(-(stop - va) // unit)), slot.level
                va = stop
                continue
            if kind is Kind.BLOCK:
                yield self.memory.words(slot.pa, 1), slot.level
            va = slot.va + unit
