"""How a random case with stage 2 on is drawn: stage 2 alone, both stages, and real accesses.

Rules of this file:
- The tables of stage 1 lie at PA = IPA ^ `Guest.moved`: an IPA is never taken for a PA by chance.
- Stage 2 leads to every page with a stage 1 table, mostly without limits, and to what stage 1's leaves output.
- What stage 2's leaves output is no device and nothing of the asking program: a stage 1 table may seem to be there.
- Access cases have stage 1 off, and `code_ipa` says where the asking program's two pages are.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from emu.judge.corpus import DEFAULTS, HANDLER, TABLES, Case, islands
from emu.judge.draw import ALL_GRANULES, NO_FETCH, PS_BITS, SCR_NS, SCTLR_EE, TG, Draw, Kind
from emu.judge.trees import AF, AP1, AP2, OUTER, PAGE, SH_LOW, TABLE, Grower, Space, Style, Target

__all__ = ["STAGE2_KINDS", "DrawStage2"]

HCR_VM, HCR_PTW, HCR_DC, HCR_RW, HCR_FWB = 1, 1 << 2, 1 << 12, 1 << 31, 1 << 46
SCR_EEL2 = 1 << 18
VTCR: Mapping[str, tuple[int, int]] = {
    "T0SZ": (0, 6), "SL0": (6, 2), "IRGN0": (8, 2), "ORGN0": (10, 2), "SH0": (12, 2), "TG0": (14, 2), "PS": (16, 3),
    "VS": (19, 1), "HA": (21, 1), "HD": (22, 1), "SW": (29, 1), "SA": (30, 1), "RES1_31": (31, 1), "DS": (32, 1),
    "SL2": (33, 1), "S2PIE": (36, 1),
}  # fmt: skip
"""VTCR_EL2, and VSTCR_EL2 as far as it goes: (lowest bit, width). SW and SA are NSW and NSA in VTCR_EL2."""
SL0 = {12: {2: 0, 1: 1, 0: 2, 3: 3, -1: 0}, 14: {3: 0, 2: 1, 1: 2, 0: 3}, 16: {3: 0, 2: 1, 1: 2}}
"""SL0 for a root at a level, by granule; level -1 is SL2 = 1 with SL0 = 0."""
CONCATENATED = 4  # bits
LEAST_PS = {(12, -1): 52, (12, 0): 42, (14, 0): 52, (14, 1): 40, (16, 1): 42}  # see the trap "stage 2 by PS"
MEMATTR = 0xF << 2
OPEN = AP2 | AP1 | AF | OUTER << SH_LOW  # S2AP = 3; with indirect permissions PIIndex 1, dirty
WRITE_BACK = {False: 0xF << 2, True: 0x6 << 2}  # MemAttr, by FWB
RESERVED = {False: (4, 8, 12), True: (4, *range(8, 16))}
S12 = ("S12E1R", "S12E1W", "S12E0R", "S12E0W")
STAGE1_ONLY = ("S1E1RP", "S1E1WP")
CODE_IPA = 0x2000_0000
HANDLER_CODE = HANDLER + 0x4000
LEAST_OUTPUT = 0xC000_0000  # above the base RAM, in which the asking program is
MOVES = (0, 1 << 16, 5 << 16, 1 << 21, 1 << 25, 1 << 30)

HARDWARE = Style(af_clear=0.3, dbm=0.6, ap2=0.7, ram=0.5)
PIE = Style(dbm=None, ram=0.5)
_BOTH = Kind(ALL_GRANULES, stage2=True, more_ops=S12 * 4)
_ALONE = replace(_BOTH, off=True, no_ops=STAGE1_ONLY)
_ACCESS = replace(_ALONE, access=True, more_ops=(), no_ops=())
STAGE2_KINDS: Mapping[str, Kind] = {
    "s2-only": _ALONE,
    "s2-hahd": replace(_ALONE, hardware=("HA", "HD"), style=HARDWARE),
    "s2-pie": replace(_ALONE, pie=True, style=PIE, needs=("S2PIR_EL2",)),
    "s1s2": _BOTH,
    "s1s2-4k": replace(_BOTH, granules=(12,)),
    "s1s2-hahd": replace(_BOTH, hardware=("HA", "HD"), style=HARDWARE),
    "s1s2-secure": replace(_BOTH, secure=True, needs=("VSTCR_EL2",), traps=("Secure stage 2",)),
    "acc-s2": replace(_ACCESS, style=Style(ram=0.7)),
    "acc-s2-hahd": replace(_ACCESS, hardware=("HA", "HD"), style=HARDWARE, no_ops=NO_FETCH),
    "acc-s2-pie": replace(_ACCESS, pie=True, style=PIE, needs=("S2PIR_EL2",)),
}


@dataclass(frozen=True)
class Stage2Space(Space):
    """The format of an IPA space: the root is at `root` and may be several tables in a row."""

    root: int = 0

    @property
    def start(self) -> int:
        """The level of the root."""
        return self.root

    def entries(self, level: int) -> int:
        """How many entries a table of `level` has; the root has all that are left."""
        return 1 << (self.va_bits - self.low(level)) if level == self.root else super().entries(level)


@dataclass
class Guest(Grower):
    """Grows stage 1's tables: what they refer to is moved, since stage 2 leads there."""

    moved: int = 0
    limit: int = 52  # bits of an IPA

    def table(self, space: Space, size: int, limit: int = 52) -> int:
        """A place for a table whose IPA stage 2 can translate."""
        at = super().table(space, size, min(limit, self.limit))
        self.mem.setdefault(at, 0)  # an empty table is one too: nothing else may be put there
        return at

    def table_descriptor(self, space: Space, pa: int) -> int:
        """A table descriptor that refers to the IPA of `pa`."""
        return super().table_descriptor(space, pa ^ self.moved)


@dataclass
class Host(Grower):
    """Grows stage 2's tables."""

    fwb: bool = False
    bounded: Mapping[int, int] = field(default_factory=dict)

    def table(self, space: Space, size: int, limit: int = 52) -> int:
        """A place for a table, known as one though it be empty."""
        at = super().table(space, size, limit)
        self.mem.setdefault(at, 0)
        return at

    def lead(self, space: Space, root: int, ipa: int, pa: int | None, *, limits: bool) -> None:
        """A path to a leaf for `ipa`: to `pa` where it is given, else to anywhere. `limits`: with any attributes."""
        at = root
        level = space.start
        size = min(((ipa ^ pa) & -(ipa ^ pa)) or 1 << 52, 1 << 30) if pa is not None else 1 << 30
        blocks = [n for n in range(space.start, 3) if space.has_blocks(n) and 1 << space.low(n) <= size]
        last = self.rng.choice([3, 3, *blocks])
        while level < last:
            entry = at + 8 * space.index(ipa, level)
            if not self.mem.get(entry):
                self._children[entry] = child = self.table(space, 1 << space.shift)
                self.mem[entry] = self.table_descriptor(space, child)
            if entry not in self._children:
                return
            at, level = self._children[entry], level + 1
        entry = at + 8 * space.index(ipa, level)
        if not self.mem.get(entry):
            word = self._leaf(space, level) if limits else OPEN | WRITE_BACK[self.fwb]
            output = word & space.oa_bits if pa is None else space.place(pa & -(1 << space.low(level)))
            self.mem[entry] = word & ~(space.oa_bits | 3) | output | (PAGE if level == 3 else 1)
        self.targets.append(Target(ipa & -(1 << space.low(level)), space.low(level)))

    def _output(self, space: Space, level: int) -> int:
        top = sum(islands(self.cpu)[-1])
        while True:
            pa = super()._output(space, level) & -(1 << space.low(level))
            end = pa + (1 << space.low(level))
            if (pa >= LEAST_OUTPUT or (pa >= TABLES and end <= HANDLER)) and (end <= top or pa >= top + (1 << 42)):
                return pa

    def _attributes(self, space: Space, level: int) -> int:
        word = super()._attributes(space, level)
        while (word & MEMATTR) >> 2 in RESERVED[self.fwb]:
            word = word & ~MEMATTR | self.rng.randrange(16) << 2
        return word


class DrawStage2(Draw):
    """A case with stage 2 on in the making."""

    def case(self) -> Case:
        """Stage 1's tables first, then stage 2's for the pages that they are in."""
        kind, rng = self.kind, self.rng
        self.hcr = HCR_RW | HCR_VM | (HCR_PTW if rng.random() < 0.3 and not kind.access else 0)
        self.hcr |= (HCR_FWB if rng.random() < 0.4 else 0) | (HCR_DC if kind.off and rng.random() < 0.2 else 0)
        self.below = self._ipa_space()
        top = min(self.below.va_bits, 52)
        moved = rng.choice([move for move in MOVES if move.bit_length() <= top - 2])
        self.host = Host(rng, self.cpu, self._style(), fwb=bool(self.hcr & HCR_FWB))
        self.grower = Guest(rng, self.cpu, self._style(), self.host.mem, _used=self.host._used, moved=moved, limit=top)
        spaces: list[Space] = [] if kind.off else [self._space(half) for half in (0, 1)]
        regs = {**DEFAULTS, **self._registers(spaces)}
        for half, space in enumerate(spaces):
            regs[f"TTBR{half}_EL1"] = self._root(space)
        regs |= self._stage2(spaces)
        code_ipa = self._code() if kind.access else None
        mem = self.host.mem
        if regs["SCTLR_EL1"] & SCTLR_EE:
            regs["SCTLR_EL2"] |= SCTLR_EE
            mem = {pa: int.from_bytes(word.to_bytes(8, "little"), "big") for pa, word in mem.items()}
        if kind.off:
            self.grower.targets = self.host.targets
        if code_ipa is not None:
            regs |= {"VBAR_EL1": code_ipa, "VBAR_EL2": HANDLER + 0x8000}
        name = f"r/{self.cpu}/{self.name}-{rng.getrandbits(32):08x}"
        half_under_test = 0 if kind.access else None
        queries = self._queries(spaces or [self.below])
        if code_ipa is not None:
            queries = tuple((va, op) for va, op in queries if not code_ipa <= va < code_ipa + 0x2000)
        return Case(name, self.name, self.cpu, regs, mem, queries, half=half_under_test, code_ipa=code_ipa)

    def _root(self, space: Space) -> int:
        """A TTBR: the IPA of the root table, and the tree under it."""
        rng, guest = self.rng, self.grower
        assert isinstance(guest, Guest)
        root = guest.table(space, max(space.root_alignment(), 8))
        guest.grow(space, root, 22)
        return space.ttbr(root ^ guest.moved) | rng.getrandbits(16) << 48

    # ---- stage 2

    def _ipa_space(self) -> Stage2Space:
        """A space that holds the IPAs of stage 1's tables where there are any."""
        rng, kind = self.rng, self.kind
        shift = rng.choice(kind.granules)
        ds = shift != 16 and rng.random() < 0.3
        out = min(PS_BITS[self.effective_ps], 52 if ds or shift == 16 else 48)
        stride = shift - 3
        while True:
            bits = rng.randint(31 if kind.access else 32 if not kind.off else 18, 52 if ds or shift == 16 else 48)
            least = {level: (3 - level) * stride + shift + 1 for level in SL0[shift]}
            fits = [n for n, low in least.items() if low <= bits <= low + stride - 1 + CONCATENATED]
            fits = [n for n in fits if ds or (n >= 0 and not (shift == 14 and n == 0))]
            if "stage 2 by PS" in self.avoid:
                fits = [n for n in fits if out > LEAST_PS.get((shift, n), 0) and bits <= out]
            if fits and 64 - bits <= (47 if shift == 16 else 48):
                break
        return Stage2Space(False, shift, 64 - bits, self.effective_ps, out, ds, self.cpu, root=rng.choice(fits))

    def _stage2(self, spaces: list[Space]) -> dict[str, int]:
        """Stage 2's tables and registers."""
        rng, kind, below = self.rng, self.kind, self.below
        regs = {"HCR_EL2": self.hcr, "VTCR_EL2": self._vtcr(below)}
        regs["VTTBR_EL2"] = self._tree(below, spaces) | rng.getrandbits(16) << 48
        if kind.pie:
            regs["S2PIR_EL2"] = rng.getrandbits(64) | 0xF0  # PIIndex 1 is OPEN
        if kind.secure:
            regs["SCR_EL3"] = DEFAULTS["SCR_EL3"] & ~SCR_NS | SCR_EEL2
            regs |= {"VSTCR_EL2": regs["VTCR_EL2"], "VSTTBR_EL2": regs["VTTBR_EL2"] & (1 << 48) - 1}
            spread = {name: rng.random() < 0.2 for name in ("SW", "SA")}
            regs["VSTCR_EL2"] ^= sum(on << VTCR[name][0] for name, on in spread.items())
        return regs

    def _vtcr(self, space: Stage2Space) -> int:
        rng, kind = self.rng, self.kind
        values = {"T0SZ": space.txsz, "SL0": SL0[space.shift][space.root], "SL2": int(space.root == -1)}
        values |= {"IRGN0": rng.randrange(4), "ORGN0": rng.randrange(4), "SH0": rng.choice((0, 2, 3)), "RES1_31": 1}
        values |= {"TG0": TG[0][space.shift], "PS": self.ps, "VS": rng.randrange(2), "DS": int(space.ds)}
        values |= dict.fromkeys(kind.hardware, 1) | {"S2PIE": int(kind.pie)}
        if kind.secure:
            values |= {"SW": int(rng.random() < 0.2), "SA": int(rng.random() < 0.2)}
        return sum(values.get(name, 0) << low for name, (low, _) in VTCR.items())

    def _tree(self, space: Stage2Space, spaces: list[Space]) -> int:
        """Where the root is; the tree under it."""
        rng, host, guest = self.rng, self.host, self.grower
        small = "small root" in self.avoid and 8 * space.entries(space.root) < 64
        root = host.table(space, space.root_alignment(), limit=50 if small else 52)
        self.root = root
        if isinstance(guest, Guest) and spaces:
            inside, outputs = (1 << space.va_bits) - 1, self._outputs(spaces)
            for pa in sorted({pa & -4096 for pa in guest.mem}):
                if rng.random() < 0.97:
                    host.lead(space, root, (pa ^ guest.moved) & inside, pa, limits=rng.random() < 0.08)
            for ipa in outputs:
                host.lead(space, root, ipa & inside, None, limits=True)
        host.grow(space, root, 40 if self.kind.off else 12)
        return space.ttbr(root)

    def _outputs(self, spaces: list[Space]) -> Iterable[int]:
        """What leaves of stage 1 output, as far as it is known: most of them."""
        words = [word for word in self.grower.mem.values() if word & AF and self.rng.random() < 0.7]
        return [word & spaces[0].oa_bits & -4096 for word in words][:60]

    def _code(self) -> int:
        """The IPA of the asking program's pages."""
        ipa = CODE_IPA if self.rng.random() < 0.5 else self.rng.getrandbits(self.below.va_bits - 1) & -(1 << 21)
        ipa |= HANDLER_CODE & 0xFFFF  # as far as a page may be large
        for offset in (0, 0x1000):
            self._map_code(ipa + offset, HANDLER_CODE + offset)
        return ipa

    def _map_code(self, ipa: int, pa: int) -> None:
        """A page, or the entry of a larger granule that has it; whatever was there before is replaced."""
        space, host, at = self.below, self.host, self.root
        for level in range(space.root, 3):
            entry = at + 8 * space.index(ipa, level)
            if entry not in host._children:
                host._children[entry] = host.table(space, 1 << space.shift)
                host.mem[entry] = space.place(host._children[entry]) | TABLE
            at = host._children[entry]
        attributes = OPEN | WRITE_BACK[host.fwb]
        attributes &= ~(3 << SH_LOW) if space.ds else -1
        host.mem[at + 8 * space.index(ipa, 3)] = space.place(pa & -(1 << space.shift)) | attributes | PAGE
