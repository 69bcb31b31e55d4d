"""Random translation tables, aimed: most of what they hold is reached by one of the addresses they give back.

A `Space` is the format of one half of an address space; a `Grower` fills memory with a tree of tables for it. A tree
is a set of paths: each starts at the root and ends, at a level drawn for it, in a leaf, a hole in the tables, an
address that is too large, or an invalid descriptor. The rules of the file:

- Only `random.Random` decides, so that a seed gives the same tree everywhere.
- No walk may read where a device or the asking program is (`is_safe`): the judges would read what is not a table.
- The bit numbers here aim the questions. They judge nothing: a wrong one makes a duller case, not a wrong verdict.
"""

from dataclasses import dataclass, field
from random import Random

from emu.judge.corpus import HANDLER, TABLES, has_ram, is_safe, islands

__all__ = ["OUTER", "Grower", "Space", "Style", "Target", "harmless"]

WORD = (1 << 64) - 1
INVALID, BLOCK, TABLE, PAGE = 0, 1, 3, 3  # bits [1:0]; BLOCK is reserved at level 3
TYPE = 3
LEAF_BITS = 0xFFFC_0000_0000_0FFC
TABLE_BITS = 0xFFF8_0000_0000_0FFC
SOFTWARE_BITS = 0xF780_0000_0000_0000
UXN, PXN, CONTIGUOUS, DBM, AF = 1 << 54, 1 << 53, 1 << 52, 1 << 51, 1 << 10
SH_LOW, AP2, AP1, ATTR_LOW = 8, 1 << 7, 1 << 6, 2
OUTER = 2  # the shareability that Device and Non-cacheable memory has
NSTABLE, APTABLE1, APTABLE0, UXNTABLE, PXNTABLE = (1 << bit for bit in (63, 62, 61, 60, 59))
CONTIGUOUS_BITS = {(12, 1): 4, (12, 2): 4, (12, 3): 4, (14, 2): 5, (14, 3): 7, (16, 2): 5, (16, 3): 5}
"""(granule, level): log2 of the entries in a contiguous run."""


@dataclass(frozen=True)
class Space:
    """The format of one half: granule, sizes, and how descriptors hold an address."""

    upper: bool
    shift: int
    txsz: int
    ps: int
    out_bits: int
    ds: bool
    cpu: str

    @property
    def va_bits(self) -> int:
        """The size of the half: 64 - TxSZ."""
        return 64 - self.txsz

    @property
    def stride(self) -> int:
        """How many VA bits a full table resolves."""
        return self.shift - 3

    @property
    def start(self) -> int:
        """The level of the root table: -1 to 3."""
        return 4 + (self.shift - self.va_bits) // self.stride

    @property
    def wide(self) -> bool:
        """Whether a 64K descriptor holds OA[51:48] in [15:12]."""
        return self.shift == 16 and self.ps >= 6

    @property
    def field_bits(self) -> int:
        """One more than the highest address bit that is put in a descriptor."""
        if self.ds:
            return 52 if self.ps >= 6 else 50
        return 52 if self.wide else 48

    def low(self, level: int) -> int:
        """The lowest VA bit that indexes the table of `level`: also the size of what an entry maps."""
        return self.shift + self.stride * (3 - level)

    def entries(self, level: int) -> int:
        """How many entries a table of `level` has; the root may be small."""
        return 1 << (min(self.va_bits, self.low(level) + self.stride) - self.low(level))

    def index(self, va: int, level: int) -> int:
        """The entry that `va` takes in the table of `level`."""
        return va >> self.low(level) & (self.entries(level) - 1)

    def canonical(self, va: int) -> int:
        """`va` with the bits above the range as this half wants them."""
        low = va & ((1 << self.va_bits) - 1)
        return low | (WORD << self.va_bits & WORD) if self.upper else low

    def has_blocks(self, level: int) -> bool:
        """Whether a block is legal at `level`."""
        return self.first_block <= level <= 2

    @property
    def first_block(self) -> int:
        """The first level that has blocks."""
        if self.shift == 12:
            return 0 if self.ds else 1
        return 1 if self.ds or (self.shift == 16 and self.cpu.startswith("max")) else 2

    @property
    def oa_bits(self) -> int:
        """Every descriptor bit that can hold address bits in some setting of PS."""
        here = ((1 << (50 if self.ds else 48)) - 1) & -(1 << self.shift)
        return here | (3 << 8 if self.ds else 0xF000 if self.shift == 16 else 0)

    def place(self, pa: int) -> int:
        """The bits of a descriptor that hold `pa`."""
        here = pa & ((1 << (50 if self.ds else 48)) - 1) & -(1 << self.shift)
        return here | (pa >> 50 << 8 if self.ds else pa >> 48 << 12 if self.wide else 0)

    def ttbr(self, pa: int) -> int:
        """The bits of a TTBR that hold `pa`."""
        return pa & ((1 << 48) - 1) | pa >> 48 << 2

    def root_alignment(self) -> int:
        """Of how many bytes the root table's address is a multiple."""
        size = 8 * self.entries(self.start)
        return max(size, 64) if self.ps >= 6 or self.ds else size


@dataclass(frozen=True)
class Style:
    """How descriptors are drawn: what a kind of case is about."""

    leaves: tuple[int, ...] = ()
    """Attributes to draw from; none: any bits."""
    raw: bool = False
    """Any bits, reserved ones too, and any type."""
    guarded: bool = False
    """Every word is harmless in every format, since the registers will be tampered with."""
    single_el: bool = False
    """The regime has one EL: AP[1] is one, PXN and its Table form are zero."""
    af_clear: float = 0.12
    dbm: float | None = 0.5
    """How often DBM is set; None: left to the attributes (PIE uses the bit)."""
    ap2: float | None = None
    """How often AP[2] (nDirty with PIE) is set."""
    sh: tuple[int, ...] = ()
    """The shareability that goes with each AttrIndx; none: any."""
    ram: float = 0.2
    """How often a leaf outputs RAM."""
    illegal_blocks: bool = True


@dataclass(frozen=True)
class Target:
    """An address that a tree has something to say about, and the lowest VA bit of the entry that decides."""

    va: int
    low: int


@dataclass
class Grower:
    """Grows trees into `mem` and collects `targets`."""

    rng: Random
    cpu: str
    style: Style
    mem: dict[int, int] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    _children: dict[int, int] = field(default_factory=dict)
    _used: set[int] = field(default_factory=set)

    def grow(self, space: Space, root: int, paths: int) -> None:
        """Add paths that start at the table `root`."""
        for _ in range(paths):
            self._path(space, root)

    def map_page(self, space: Space, root: int, va: int, pa: int, more: int = 0) -> None:
        """Map one page, executable and read-only, by tables that restrict nothing; `more`: bits of the leaf."""
        at = root
        for level in range(space.start, 3):
            entry = at + 8 * space.index(va, level)
            at = self._children[entry] = self.table(space, 1 << space.shift)
            self.mem[entry] = space.place(at) | TABLE
        sh = 0 if space.ds else OUTER << SH_LOW
        self.mem[at + 8 * space.index(va, 3)] = space.place(pa) | AF | sh | AP2 | AP1 | PAGE | more

    def _path(self, space: Space, at: int) -> None:
        rng, va = self.rng, 0
        levels = range(space.start, 4)
        last = rng.choices(levels, [4 if level == 3 else 2 if space.has_blocks(level) else 0.9 for level in levels])[0]
        for level in range(space.start, last):
            entry, va = self._step(space, level, at, va, rng.random() < 0.6)
            if entry not in self.mem:
                self._children[entry] = child = self.table(space, 1 << space.shift)
                self.mem[entry] = self.table_descriptor(space, child)
            if entry not in self._children:
                return self._hit(space, va, level)
            at = self._children[entry]
        entry, va = self._step(space, last, at, va, False)
        self.mem.setdefault(entry, self._end(space, last))
        return self._hit(space, va, last)

    def _hit(self, space: Space, va: int, level: int) -> None:
        self.targets.append(Target(space.canonical(va), space.low(level)))

    def _step(self, space: Space, level: int, at: int, va: int, shared: bool) -> tuple[int, int]:
        """An entry of the table at `at` (with `shared`, one that leads on, if there is one), and the VA so far."""
        rng, count = self.rng, space.entries(level)
        known = [e for e in self._children if at <= e < at + 8 * count] if shared else []
        index = rng.choice((0, count - 1, rng.randrange(count), rng.randrange(count)))
        entry = rng.choice(known) if known else at + 8 * index
        return entry, va | (entry - at) // 8 << space.low(level)

    def _end(self, space: Space, level: int) -> int:
        """The descriptor that ends a path at `level`."""
        rng = self.rng
        if self.style.raw and rng.random() < 0.7:
            return self._fuzz()
        leaf = level == 3 or space.has_blocks(level) or (self.style.illegal_blocks and rng.random() < 0.2)
        ends = [(self._leaf, 12.0 if leaf else 0.0), (self._invalid, 1.0)]
        if level < 3:
            ends += [(self._to_hole, 1.2), (self._to_far, 1.2 if space.out_bits < space.field_bits else 0.0)]
        end = rng.choices([e for e, _ in ends], [w for _, w in ends])[0]
        return end(space, level)

    # ---- physical addresses

    def table(self, space: Space, size: int, limit: int = 52) -> int:
        """An unused place for a table below the output size (and 2^limit): RAM, at a multiple of `size`."""
        if self.style.guarded:
            size = 1 << 16  # bits [15:12] are zero then, whatever they mean
        granule = max(1 << space.shift, size)
        top = 1 << min(self._reach(space), limit)
        homes = [i for i in islands(self.cpu) if sum(i) <= top]
        while True:
            base, length = self.rng.choice(homes)
            low, high = (TABLES, HANDLER) if base < TABLES else (base, base + length)
            at = low + self.rng.randrange((high - low) // granule) * granule
            pages = range(at, at + granule, 0x1000)
            if self._used.isdisjoint(pages):
                self._used.update(pages)
                return at + self.rng.randrange(granule // size) * size

    def _reach(self, space: Space) -> int:
        """How many bits a usable address may have; a guarded one means the same in every format."""
        return min(space.out_bits, space.field_bits, 48 if self.style.guarded else 52)

    def hole(self, space: Space) -> int:
        """An address below the output size with nothing there."""
        while True:
            pa = self.rng.getrandbits(self.rng.randint(31, self._reach(space))) & -(1 << 16)
            if is_safe(pa, self.cpu) and not has_ram(pa, self.cpu):
                return pa

    def far(self, space: Space, limit: int = 52) -> int:
        """An address beyond the output size, that descriptors can hold, with its highest bit below `limit`."""
        while True:
            over = 1 << self.rng.randrange(space.out_bits, min(space.field_bits, limit))
            pa = over | self.hole(space)
            if is_safe(pa, self.cpu):
                return pa

    def _output(self, space: Space, level: int) -> int:
        rng = self.rng
        if rng.random() < self.style.ram:
            base, size = rng.choice(islands(self.cpu))
            return base + rng.randrange(size)
        if rng.random() < 0.06 and space.out_bits < space.field_bits:
            return self.far(space)
        return rng.getrandbits(min(space.out_bits, space.field_bits))

    # ---- descriptors

    def table_descriptor(self, space: Space, pa: int) -> int:
        """A table descriptor, with some of the attributes that restrict what is below."""
        while True:
            word = self._restrictions() & ~(space.oa_bits | TYPE) | space.place(pa) | TABLE
            if not self.style.guarded or harmless(word, self.cpu):
                return word

    def _restrictions(self) -> int:
        rng, style = self.rng, self.style
        if style.raw:
            return rng.getrandbits(64)
        word = rng.getrandbits(64) & TABLE_BITS
        for bit in (NSTABLE, APTABLE1, APTABLE0, UXNTABLE, PXNTABLE):
            if rng.random() < 0.6:
                word &= ~bit
        return word & ~(APTABLE0 | PXNTABLE) if style.single_el else word

    def _invalid(self, space: Space, level: int) -> int:
        if level == 3 and self.rng.random() < 0.5:
            return self._leaf(space, level) & ~TYPE | BLOCK
        return self.rng.getrandbits(64) & ~1

    def _to_hole(self, space: Space, level: int) -> int:
        return self.table_descriptor(space, self.hole(space))

    def _to_far(self, space: Space, level: int) -> int:
        return self.table_descriptor(space, self.far(space))

    def _leaf(self, space: Space, level: int) -> int:
        size = 1 << (space.shift if self.style.raw else space.low(level))
        while True:
            pa = self._output(space, level) & ((1 << space.field_bits) - size)
            word = self._attributes(space, level) & ~(space.oa_bits | TYPE) | space.place(pa)
            word |= PAGE if level == 3 else BLOCK
            if not self.style.guarded or harmless(word, self.cpu):
                return word

    def _attributes(self, space: Space, level: int) -> int:
        rng, style = self.rng, self.style
        if style.raw:
            return rng.getrandbits(64)
        word = rng.choice(style.leaves) if style.leaves else rng.getrandbits(64) & LEAF_BITS
        if rng.random() < 0.7:
            word &= ~SOFTWARE_BITS
        for bit, often in ((AF, 1 - style.af_clear), (DBM, style.dbm), (AP2, style.ap2)):
            if often is not None:
                word = word | bit if rng.random() < often else word & ~bit
        if style.single_el:
            word = (word | AP1) & ~PXN
        if rng.random() < 0.8 or not self._run_fits(space, level):
            word &= ~CONTIGUOUS
        sh = style.sh[word >> ATTR_LOW & 7] if style.sh else rng.choice((0, 2, 3))
        return word & ~(3 << SH_LOW) | sh << SH_LOW

    def _run_fits(self, space: Space, level: int) -> bool:
        run = CONTIGUOUS_BITS.get((space.shift, level))
        return run is not None and space.low(level) + run <= space.va_bits

    def _fuzz(self) -> int:
        while True:
            word = self.rng.getrandbits(64) & ~TYPE | self.rng.choice((INVALID, BLOCK, 2, TABLE, PAGE, PAGE))
            if harmless(word, self.cpu):
                return word


def harmless(word: int, cpu: str) -> bool:
    """Whether no format reads this word as a table where a device or the asking program is."""
    if word & TYPE != TABLE:
        return True
    for shift in (12, 14, 16):
        low = word & ((1 << 48) - (1 << shift))
        for pa in (low, low | (word >> 12 & 15) << 48, low | word & (3 << 48) | (word >> 8 & 3) << 50):
            if not (is_safe(pa, cpu) and is_safe(pa + (1 << shift) - 1, cpu)):
                return False
    return True
