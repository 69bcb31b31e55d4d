"""Random tables as a kernel may meet them, for tests that run a compiled function and its model over the same words.

A `Tree` is descriptor words by PA, all in an arena of pages. `Space` says what tables look like in this run: levels,
descriptor format, where the arena is and where mappings may lead.

Rules of this file:
- The same seed gives the same tree on every machine: everything comes from one random.Random.
- Trees grow along `focus` addresses: paths to them, and entries of every kind beside the path, where walks begin and
  end.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from kernel_model.levels import Fold, Level, Levels
from pgtable.descriptors import CONTIGUOUS_RUN, LAST_LEVEL, Format

U64 = (1 << 64) - 1
TARGET_PA = 0x6000_0000  # where leaves lead: nothing is read or written there


class Kind(Enum):
    """Kinds of entry, as Linux tells them apart."""

    NONE = "none"
    TABLE = "table"
    LEAF = "leaf"
    RUN = "contiguous run"
    LOST_VALID = "leaf without VALID"
    PRESENT_INVALID = "leaf without VALID, with nG"
    TABLE_LOST_VALID = "table without VALID"
    SHAPED = "page-shaped without VALID, with nG and bit 58"
    SOFTWARE_58 = "without VALID, with bit 58"
    SOFTWARE_59 = "without VALID, with bit 59"
    RANDOM = "random bits"


UPPER = (
    (Kind.NONE, 6),
    (Kind.TABLE, 6),
    (Kind.LEAF, 6),
    (Kind.RUN, 2),
    (Kind.LOST_VALID, 2),
    (Kind.PRESENT_INVALID, 2),
    (Kind.TABLE_LOST_VALID, 1),
    (Kind.SHAPED, 1),
    (Kind.SOFTWARE_58, 1),
    (Kind.SOFTWARE_59, 1),
)
PTES = (
    (Kind.NONE, 5),
    (Kind.LEAF, 10),
    (Kind.RUN, 3),
    (Kind.LOST_VALID, 2),
    (Kind.PRESENT_INVALID, 2),
    (Kind.SOFTWARE_58, 1),
    (Kind.SOFTWARE_59, 1),
    (Kind.RANDOM, 1),
)


@dataclass(frozen=True)
class Tree:
    """Words by PA; the root table is the arena's first page, `pages` of it are used."""

    root: int
    words: dict[int, int]
    pages: int

    def __str__(self) -> str:
        shown = [f"[{pa:#x}] {word:#018x}" for pa, word in list(self.words.items())[:24]]
        more = [f"and {len(self.words) - len(shown)} more"] if len(self.words) > len(shown) else []
        return f"tree at {self.root:#x}: {', '.join([*shown, *more]) or 'empty'}"

    def without(self, pas: Sequence[int]) -> Tree:
        """The same with some words 0."""
        gone = set(pas)
        return replace(self, words={pa: word for pa, word in self.words.items() if pa not in gone})

    def smaller(self) -> Iterator[Tree]:
        """Without half of the words, a quarter, and so on down to one."""
        words = list(self.words)
        step = max(1, len(words) // 2)
        while step:
            for i in range(0, len(words), step):
                yield self.without(words[i : i + step])
            step //= 2

    def with_word(self, pa: int, word: int) -> Tree:
        """The same with one word changed."""
        return replace(self, words={**self.words, pa: word})


@dataclass(frozen=True)
class Space:
    """What tables of this run look like. `arena`: PA and bytes of the pages that they may take."""

    levels: Levels
    fmt: Format
    arena: tuple[int, int]

    @cached_property
    def tables(self) -> tuple[Level, ...]:
        """The levels that have tables in this run, from the root down."""
        rows = self.levels.rows
        virtual_top = any(level.fold is Fold.RUN for level in rows)
        return tuple(
            level for level in rows if level.fold is not Fold.COMPILE and not (virtual_top and level.name == "PGD")
        )

    def fits(self, tree: Tree) -> bool:
        """The tree's words are descriptors in pages of the arena."""
        (start, size), used = self.arena, tree.pages * self.levels.page_size
        inside = all(0 <= pa - start < used and not pa & 7 and not word >> 64 for pa, word in tree.words.items())
        return tree.root == start and used <= size and inside

    def hardware_level(self, level: Level) -> int:
        """The Arm ARM's number of a level with tables."""
        return LAST_LEVEL + 1 - len(self.tables) + self.tables.index(level)

    def index(self, level: Level, va: int) -> int:
        """Index in the table of `level`; the root has only the bits that the VA size leaves."""
        bits = self.levels.va_bits - level.shift if level is self.tables[0] else self.levels.page_shift - 3
        return (va & (1 << self.levels.va_bits) - 1) >> level.shift & (1 << bits) - 1


class Grower:
    """Makes one tree."""

    def __init__(self, space: Space, rng: random.Random, *, ng: bool = False) -> None:
        self.space, self.rng, self.ng = space, rng, ng
        self.words: dict[int, int] = {}
        self._page = space.levels.page_size
        self._next = space.arena[0]
        self.root = self.table()

    def table(self) -> int:
        """The PA of a new empty table; the root again when the arena is full."""
        if self._next >= sum(self.space.arena):
            return self.root
        self._next += self._page
        return self._next - self._page

    def done(self) -> Tree:
        """The finished tree."""
        words = {pa: word for pa, word in sorted(self.words.items()) if word}
        return Tree(self.root, words, (self._next - self.space.arena[0]) // self._page)

    # words

    def table_word(self, table: int) -> int:
        """A table descriptor."""
        return self.space.fmt.table(LAST_LEVEL - 1).pack(VALID=1, TYPE=1, TA=table, UXNTable=1, PXNTable=0)

    def leaf_word(self, level: Level, *, pa: int | None = None) -> int:
        """A valid block or page with attributes that kernels use, or any."""
        rng, fmt = self.rng, self.space.fmt
        layout = fmt.leaf(self.space.hardware_level(level))
        plain = rng.random() < 0.5
        word = layout.pack(
            VALID=1,
            TYPE=int(level.name == "PTE"),
            AF=1 if plain else rng.randrange(2),
            UXN=1 if plain else rng.randrange(2),
            PXN=rng.randrange(2),
            DBM=rng.randrange(2),
            AP=rng.choice((0, 0, 2)) if plain else rng.randrange(4),
            nG=int(self.ng) if plain else rng.randrange(2),
            AttrIndx=rng.choice((0, 1)) if plain else rng.randrange(8),
            IGNORED_58_55=1 if plain else rng.choice((0, 1, 2)),
            OA=(TARGET_PA if pa is None else pa) + rng.randrange(64) * level.size & self._address_mask(level),
        )
        return word if fmt.lpa2 else layout.pack(word, SH=3 if plain else rng.randrange(4))

    def _address_mask(self, level: Level) -> int:
        return -level.size & (1 << 40) - 1

    def word(self, level: Level, kind: Kind) -> int:
        """A word of a kind other than RUN, for an entry of `level`."""
        layout = self.space.fmt.leaf(self.space.hardware_level(level))
        valid, ng, shaped = layout["VALID"].mask, layout["nG"].mask, layout["TYPE"].mask
        match kind:
            case Kind.NONE:
                return 0
            case Kind.TABLE:
                return self.table_word(self.table())
            case Kind.TABLE_LOST_VALID:
                return self.table_word(self.table()) & ~valid
            case Kind.LOST_VALID:
                return self.leaf_word(level) & ~valid & ~ng
            case Kind.PRESENT_INVALID:
                return self.leaf_word(level) & ~valid | ng
            case Kind.SHAPED:
                return self.leaf_word(level) & ~valid | ng | shaped | layout["IGNORED_58_55"].put(0, 8)
            case Kind.SOFTWARE_58:
                return self.leaf_word(level) & ~valid & ~ng | layout["IGNORED_58_55"].put(0, 8)
            case Kind.SOFTWARE_59:
                return self.leaf_word(level) & ~valid & ~ng | layout["IGNORED_59"].mask
            case Kind.RANDOM:
                return self.rng.getrandbits(64) or 1
            case _:
                return self.leaf_word(level)

    # growing

    def path(self, va: int, *, depth: int) -> int:
        """Grows tables towards `va` down to the table of `space.tables[depth]`; PA of the last table on the way."""
        table = self.root
        for level in self.space.tables[:depth]:
            entry = table + 8 * self.space.index(level, va)
            word = self.words.get(entry, 0)
            if not word:
                word = self.words[entry] = self.word(level, Kind.TABLE)
            below = self._table_at(word)
            if below is None:
                return table
            table = below
        return table

    def _table_at(self, word: int) -> int | None:
        """The arena's table that a word points at."""
        layout = self.space.fmt.table(LAST_LEVEL - 1)
        table = layout["TA"].get(word)
        is_table = word & 3 == 3 and self.space.arena[0] <= table < sum(self.space.arena)
        return table if is_table else None

    def around(self, va: int, *, share: float = 0.7, reach: int = 3) -> None:
        """Gives entries near the path to `va` random kinds, at every level that has a table there."""
        for depth, level in enumerate(self.space.tables):
            table = self.path(va, depth=depth)
            here = self.space.index(level, va)
            wide = 4 * reach if level.name == "PTE" else reach
            for index in range(here - wide, here + wide + 1):
                on_path = index == here and level.name != "PTE"
                if 0 <= index < self._entries(level) and self.rng.random() < (share / 4 if on_path else share):
                    self._fill(table, level, index)

    def _entries(self, level: Level) -> int:
        top = level is self.space.tables[0]
        return 1 << (self.space.levels.va_bits - level.shift) if top else self._page // 8

    def _fill(self, table: int, level: Level, index: int) -> None:
        if self.words.get(table + 8 * index):
            return
        kinds = PTES if level.name == "PTE" else UPPER
        kind = self.rng.choices([k for k, _ in kinds], [w for _, w in kinds])[0]
        runs = CONTIGUOUS_RUN[self.space.fmt.granule].get(self.space.hardware_level(level), 0)
        if kind is Kind.RUN and runs:
            self._run(table, level, index - index % runs, runs)
        else:
            self.words[table + 8 * index] = self.word(level, kind)
            if kind is Kind.TABLE:
                self._furnish(self._table_at(self.words[table + 8 * index]), level)

    def _run(self, table: int, level: Level, first: int, count: int) -> None:
        """A contiguous run, whole, whatever was there."""
        layout = self.space.fmt.leaf(self.space.hardware_level(level))
        base = layout.pack(self.leaf_word(level), Contiguous=1)
        start = layout["OA"].get(base) & -(count * level.size)
        for i in range(count):
            if not self.words.get(table + 8 * (first + i)):
                self.words[table + 8 * (first + i)] = layout.pack(base, OA=start + i * level.size)

    def _furnish(self, table: int | None, above: Level) -> None:
        """A few entries at both ends of a table beside the path, where a walk across it begins and ends."""
        if table is None or self.rng.random() < 0.3:
            return
        level = self.space.tables[self.space.tables.index(above) + 1]
        last = self._page // 8 - 1
        for index in (0, 1, last - 1, last):
            kind = self.rng.choice((Kind.NONE, Kind.LEAF, Kind.LEAF, Kind.PRESENT_INVALID))
            self.words.setdefault(table + 8 * index, self.word(level, kind))


def random_tree(space: Space, rng: random.Random, focus: Sequence[int], *, ng: bool = False) -> Tree:
    """A tree grown around `focus` addresses; some have garbage in the top table beside the paths."""
    grower = Grower(space, rng, ng=ng)
    for va in focus:
        depth = rng.choice((0, 1, 2, 3, 4, 4, 4, 4, 4, 4))
        grower.path(va, depth=min(depth, len(space.tables) - 1))
        grower.around(va, share=rng.choice((0.2, 0.7, 0.9)))
    top = space.tables[0]
    for _ in range(rng.choice((0, 0, 2, 6))):
        entry = grower.root + 8 * rng.randrange(1 << (space.levels.va_bits - top.shift))
        kind = rng.choice((Kind.LEAF, Kind.TABLE_LOST_VALID, Kind.LOST_VALID, Kind.TABLE, Kind.PRESENT_INVALID))
        grower.words.setdefault(entry, grower.word(top, kind))
    return grower.done()
