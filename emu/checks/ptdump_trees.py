"""Random trees for dumps: what a tree holds around the borders of the kernel's areas, from one seed.

Rules of this file:
- A tree is a value: the same `Random` gives the same tree. Nobody translates by it, so entries may say anything that
  does not send a software walk to memory that is not there.
- Field names are the descriptor rows' of pgtable; no bit is counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from kernel_model.levels import U64
from kernel_model.ptdump_text import AddrMarker
from pgtable.bits import Layout
from pgtable.build import MapError, TableBuilder
from pgtable.descriptors import AP_READ_ONLY, CONTIGUOUS_RUN, LAST_LEVEL, Format

ADDRESSES = 1 << 40  # output addresses are taken modulo this


@dataclass(frozen=True)
class Case:
    """One dump. `prepare` fills the tree; `base`: where the dump begins; `markers`: None for the kernel's own.

    `upper`: a tree of the upper half, which init_mm gets; else of the lower, which an mm of its own gets.
    """

    name: str
    base: int
    prepare: Callable[[TableBuilder], None]
    markers: tuple[AddrMarker, ...] | None = None
    upper: bool = True


def directed_cases(half: int, markers: Sequence[AddrMarker]) -> tuple[Case, ...]:
    """Trees with all that a text can hold, so that no campaign is without it; `half`: where the upper half begins."""

    def borders(tables: TableBuilder) -> None:
        leaf = tables.fmt.leaf(LAST_LEVEL)
        for marker in markers:
            page = marker.start_address & -tables.granule.page_size
            if page >= half:
                tables.place(page, LAST_LEVEL, leaf.pack(VALID=1, TYPE=1, AF=1, UXN=1, PXN=1))

    return (
        Case("a page at each border", half, borders),
        Case("one of each", half, _one_of_each),
        Case("an empty tree", half, lambda tables: None),
        Case("a torn run", half, _torn_run),
    )


# What changes a word of a line, by field; the last four are leaves that are not valid.
ATTRIBUTES: tuple[dict[str, int], ...] = (
    *({"AttrIndx": i} for i in range(8)),
    *({"AP": i} for i in range(1, 4)),
    *({name: 0} for name in ("TYPE", "AF", "PXN", "UXN")),
    *({name: 1} for name in ("nG", "Contiguous", "GP")),
    *({"VALID": 0, "TYPE": i, "nG": 1} for i in range(2)),
    *({"VALID": 0, "TYPE": i, "IGNORED_58_55": 8} for i in range(2)),
)


def _one_of_each(tables: TableBuilder) -> None:
    """A leaf with each attribute at each level, and a bad entry at the top."""
    grower, top = Grower(Random(0), tables, False, True, False), max(LAST_LEVEL - 2, tables.start_level)
    for level in range(top, LAST_LEVEL + 1):
        leaf, unit = tables.fmt.leaf(level), tables.granule.level_size(level)
        word = leaf.pack(VALID=1, TYPE=int(level == LAST_LEVEL), AF=1, UXN=1, PXN=1)
        shared = leaf["SH"].put(word, 3) if "SH" in leaf else leaf["OA"].put(word, leaf["OA"].spans[-1].value_mask)
        words = [word, shared, *(leaf.pack(shared, **fields) for fields in ATTRIBUTES)]
        stride = CONTIGUOUS_RUN[tables.granule].get(level, 1)
        first = (level - top) * tables.granule.level_size(top) * 200 // unit
        for i, each in enumerate(words):
            grower.put(first + i * stride if level == LAST_LEVEL else first + i, level, each)
    if tables.start_level < top:
        bad = tables.fmt.leaf(LAST_LEVEL).pack(AttrIndx=1)
        tables.place(tables.base + 3 * tables.granule.level_size(tables.start_level), tables.start_level, bad)


def _torn_run(tables: TableBuilder) -> None:
    """A page, then a contiguous run of which one page is executable."""
    leaf, count = tables.fmt.leaf(LAST_LEVEL), CONTIGUOUS_RUN[tables.granule][LAST_LEVEL]
    word = leaf.pack(VALID=1, TYPE=1, AF=1, UXN=1, PXN=1)
    tables.place(tables.base, LAST_LEVEL, word)
    for i in range(count, 2 * count):
        each = leaf.pack(word, Contiguous=1, PXN=int(i != count + 3))
        tables.place(
            tables.base + i * tables.granule.page_size, LAST_LEVEL, _at(leaf, each, i * tables.granule.page_size)
        )


def random_case(
    rng: Random, name: str, va_bits: int, page: int, markers: Sequence[AddrMarker], *, bad_tables: bool, torn: float
) -> Case:
    """A tree around `markers` and some other places.

    `bad_tables`: a bad top-level entry may have the table bit. `torn`: the share of trees with contiguous runs of
    PTEs that are not whole.
    """
    seed, whole, secure = rng.getrandbits(64), rng.random() >= torn, rng.random() < 0.15
    upper = rng.random() < 0.85
    half = (1 << 64) - (1 << va_bits) if upper else 0
    inside = [m.start_address for m in markers if 0 <= m.start_address - half < 1 << va_bits] if upper else []
    others = [half + rng.randrange(1 << va_bits - page.bit_length()) * page for _ in range(3)]
    anchors = [half, half + (1 << va_bits) - page, *inside, *others]
    own = None if upper and rng.random() < 0.6 else random_markers(rng, half, anchors)
    base = half if rng.random() < 0.7 else rng.choice(anchors[:-3])

    def prepare(tables: TableBuilder) -> None:
        Grower(Random(seed), tables, bad_tables, whole, secure).grow(anchors)

    return Case(name, base, prepare, own, upper)


def random_markers(rng: Random, half: int, anchors: list[int]) -> tuple[AddrMarker, ...]:
    """A marker table of our own: some at one address, some inside of pages and blocks."""
    places = [rng.choice(anchors) + rng.choice((0, 0, 0, 0x1000, 0x6000, 0x1234, 0x123000)) for _ in range(6)]
    places += rng.choices(places, k=rng.randrange(4))
    rows = [AddrMarker(place, f"area {i}") for i, place in enumerate(sorted(p for p in places if p <= U64))]
    return (AddrMarker(half, "first area"), *rows, AddrMarker(U64, ""))


@dataclass
class Grower:
    """What fills a tree. `whole`: a contiguous run of PTEs is whole or is none. `secure`: nothing is executable.

    `runs`: the runs written, by PA.
    """

    rng: Random
    tables: TableBuilder
    bad_tables: bool
    whole: bool
    secure: bool
    runs: dict[int, list[int]] = field(default_factory=dict)

    def grow(self, anchors: list[int]) -> None:
        """Fills the tree at some of the anchors."""
        rng, start = self.rng, self.tables.start_level
        for anchor in rng.sample(anchors, k=min(len(anchors), rng.randrange(3, 8))):
            level = rng.choice((*range(start, LAST_LEVEL), LAST_LEVEL, LAST_LEVEL))
            shape = rng.choices((self._leaves, self._empty, self._unclear), (8, 1, 2))[0]
            try:
                shape(anchor, level)
            except MapError:  # inside a block that is there already
                continue
        if self.whole:
            self._mend()

    def _leaves(self, anchor: int, level: int) -> None:
        """Groups of entries with equal attributes from a little before the anchor on, with gaps."""
        rng = self.rng
        level = max(level, LAST_LEVEL - 2, self.tables.start_level)  # Linux knows no leaf above the PUD
        index = (anchor - self.tables.base) // self.tables.granule.level_size(level) - rng.choice((0, 0, 1, 3, 20))
        for _ in range(rng.randrange(1, 12)):
            word, count = random_leaf(rng, self.tables.fmt, level), rng.choice((1, 1, 2, 5, 16, 33))
            for i in range(index, index + count):
                self.put(i, level, word)
            index += count + rng.choice((0, 0, 0, 1, 7))

    def _empty(self, anchor: int, level: int) -> None:
        """Tables down to a level, and nothing in the last."""
        self.tables.place(anchor, level, 0)

    def _unclear(self, anchor: int, level: int) -> None:
        """Entries that are neither tables nor leaves nor empty: bad ones at the top, absent ones below."""
        rng, leaf = self.rng, self.tables.fmt.leaf(LAST_LEVEL)
        index = (anchor - self.tables.base) // self.tables.granule.level_size(level)
        may_be_type_2 = level >= LAST_LEVEL - 2 or self.bad_tables
        for i in range(rng.choice((1, 2, 5))):
            valid, kind = rng.choice(((0, 0), (0, 1) if may_be_type_2 else (1, 0)))
            word = leaf.pack(random_leaf(rng, self.tables.fmt, LAST_LEVEL), VALID=valid, TYPE=kind, nG=0)
            self.put(index + i, level, word)

    def put(self, index: int, level: int, word: int) -> None:
        """Entry `index` of all that the tree has at `level`, with an address that goes with it."""
        tables, leaf = self.tables, self.tables.fmt.leaf(level)
        unit = tables.granule.level_size(level)
        if not 0 <= index < (1 << tables.va_bits) // unit:
            return
        word = leaf.pack(word, PXN=1, UXN=1) if self.secure else word
        va = tables.base + index * unit
        contiguous = leaf.mask("VALID", "Contiguous")
        if self.whole and level == LAST_LEVEL and word & contiguous == contiguous:
            self._run(va, word)
        else:
            tables.place(va, level, _at(leaf, word, index * unit))

    def _run(self, va: int, word: int) -> None:
        """The contiguous run around a page: addresses follow each other, AF and dirty state may differ."""
        leaf, page = self.tables.fmt.leaf(LAST_LEVEL), self.tables.granule.page_size
        size, differ = CONTIGUOUS_RUN[self.tables.granule][LAST_LEVEL] * page, self.rng.random() < 0.5
        words = []
        for at in range(va & -size, (va & -size) + size, page):
            each = _aged(self.rng, leaf, word) if differ else word
            words.append(_at(leaf, each, at))
            slot = self.tables.place(at, LAST_LEVEL, words[-1])
        self.runs[slot.pa + 8 - 8 * len(words)] = words

    def _mend(self) -> None:
        """Takes the Contiguous bit from every run that something was written into."""
        memory, bit = self.tables.memory, self.tables.fmt.leaf(LAST_LEVEL).mask("Contiguous")
        for start, words in self.runs.items():
            if [memory.fetch(start + 8 * i) for i in range(len(words))] != words:
                for pa in range(start, start + 8 * len(words), 8):
                    memory.store(pa, memory.fetch(pa) & ~bit)


def _at(leaf: Layout, word: int, va: int) -> int:
    """`word` with an address that goes with `va`, below the address bits that it has."""
    return leaf["OA"].put(word, leaf["OA"].get(word) | va % ADDRESSES)


def _aged(rng: Random, leaf: Layout, word: int) -> int:
    """`word` with AF, the software's dirty bit and AP[2] at random."""
    read_only, dirty = leaf["AP"].put(0, AP_READ_ONLY), leaf["IGNORED_58_55"].put(0, 1)
    for bit in (leaf.mask("AF"), read_only, dirty):
        word = word | bit if rng.getrandbits(1) else word & ~bit
    return word


def random_leaf(rng: Random, fmt: Format, level: int) -> int:
    """A leaf, or what was one: every attribute at random, or a kernel's own with some changed."""
    leaf = fmt.leaf(level)
    names = [row.name for row in leaf if row.name != "OA" and row.reserved != "RES0"]
    word = leaf.pack(
        VALID=1, TYPE=int(level == LAST_LEVEL), AF=1, UXN=1, PXN=1, DBM=1, AttrIndx=rng.choice((0, 0, 1, 1, 2, 3, 4))
    )
    if "SH" in leaf:
        word = leaf["SH"].put(word, 3)
    else:  # address bits are where it was
        word = leaf["OA"].put(word, rng.choice((0, leaf["OA"].spans[-1].value_mask)))
    for name in names if rng.random() < 0.3 else rng.sample(names, k=rng.randrange(4)):
        word = leaf[name].put(word, rng.randrange(leaf[name].value_mask + 1))
    if level < LAST_LEVEL and word & leaf.mask("VALID", "TYPE") == leaf.mask("VALID", "TYPE"):
        word = leaf.pack(word, **{rng.choice(("VALID", "TYPE")): 0})  # not a table
    return word
