"""How a random case gets a granule protection table (FEAT_RME): a security state, spaces, granules, broken entries.

Rules of this file:
- A case is drawn as for any other CPU (draw.py, draw_stage2.py); then its memory is protected.
- The asking program runs in every state: its granules are open to every space.
- GPCCR_EL3 is consistent: with any other no instruction of the asking program could be fetched.
- L0GPTSZ is QEMU's: an entry of level 0 covers 1 GiB. Where the program is, it is always a table.
Sources: Arm ARM D9.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

from emu.judge.corpus import DEFAULTS, HANDLER, TABLES, Case, islands
from emu.judge.draw import ALL_GRANULES, SCR_NS, Kind
from emu.judge.draw_stage2 import SCR_EEL2, STAGE2_KINDS
from emu.judge.trees import Style

__all__ = ["RME_KINDS", "protected"]

SCR_GPF, SCR_NSE, HCR_GPF = 1 << 48, 1 << 62, 1 << 48
SECURE, NONSECURE, ROOT, REALM = range(4)  # {NSE, NS}
STATES = {SECURE: SCR_EEL2, NONSECURE: SCR_NS, REALM: SCR_NS | SCR_NSE}
EVERY, NONE, NS_ONLY = 0xF, 0x0, 0xD
RESERVED = (1, 2, 7, 12)
GPC_ON, OUTER = 1 << 16, 2 << 12
PPS = {0: 32, 1: 36, 2: 40, 3: 42, 4: 44, 5: 48}
PGS = {0: 12, 1: 16, 2: 14}  # log2 of a granule
SPAD, NSPAD, RLPAD, NSO, APPSAA = 1 << 7, 1 << 6, 1 << 5, 1 << 19, 1 << 24
GIB = 30
PAGE = 1 << 12
OUTPUT = 0x0000_FFFF_C000_0000  # the GiB of an address in a descriptor

_ANY = Kind(ALL_GRANULES, rme=True, needs=("GPCCR_EL3",))
_ACCESS = replace(_ANY, access=True, style=Style(ram=0.7))


def _stage2(name: str) -> Kind:
    return replace(STAGE2_KINDS[name], rme=True, needs=("GPCCR_EL3",))


RME_KINDS: Mapping[str, Kind] = {
    "rme-s1": _ANY,
    "rme-el2": replace(_ANY, regime="EL2", style=Style(single_el=True)),
    "rme-el20": replace(_ANY, regime="EL20"),
    "rme-el3": replace(_ANY, regime="EL3", style=Style(single_el=True)),
    "rme-s1s2": _stage2("s1s2"),
    "rme-secure": _stage2("s1s2-secure"),
    "rme-acc": _ACCESS,
}


@dataclass
class _Gpt:
    """A table in the making. `own`: the space of the state that is asked; `open`: pages that it reaches;
    `closed`: how often a granule is not its own, of 9 and so many.
    """

    rng: Random
    own: int
    extended: bool
    mem: dict[int, int]
    open: frozenset[int]
    closed: float

    def gpi(self, *, reserved: float = 0.01) -> int:
        """What a granule is: mostly open to the state."""
        rng = self.rng
        if rng.random() < reserved:
            return rng.choice(RESERVED)
        others = (*(8 | space for space in range(4)), NONE, NS_ONLY if self.extended else EVERY)
        return rng.choices((8 | self.own, EVERY, rng.choice(others)), (5, 4, self.closed))[0]

    def block(self) -> int:
        """An entry of level 0: a block, or nothing."""
        rng = self.rng
        if rng.random() < 0.06:
            return rng.choice((0, 2, 1 | EVERY << 4 | 1 << rng.randrange(8, 64)))
        return 1 | self.gpi() << 4

    def granules(self) -> int:
        """An entry of level 1: a contiguous run, or sixteen granules."""
        rng = self.rng
        if rng.random() < 0.4:
            return 1 | self.gpi() << 4 | rng.choice((1, 2, 3, 3, 3, 0)) << 8
        each = [self.gpi(reserved=0.0005) for _ in range(16)]
        word = sum(gpi << 4 * i for i, gpi in enumerate(each))
        return EVERY if word & 15 == 1 else word  # else it would be a contiguous entry

    def level1(self, at: int, base: int, span: int) -> None:
        """The entries of a level 1 table for the islands of RAM in its GiB; the rest is no access."""
        for start, size in _RAM:
            if start >> GIB != base >> GIB:
                continue
            for pa in range(start, start + size, span):
                own = not TABLES <= pa < HANDLER and start < TABLES
                own |= not self.open.isdisjoint(range(pa, pa + span, PAGE))
                entry = at + 8 * (pa - base >> span.bit_length() - 1)
                self.mem[entry] = (1 << 64) - 1 if own else self.granules()


_RAM = islands("max")


def protected(rng: Random, case: Case, kind: Kind, *, extended: bool) -> Case:
    """The case under granule protection, in a security state. `extended`: with the fields of FEAT_RME_GPC2."""
    mem = dict(case.mem)
    regs = dict(case.regs)
    state = SECURE if kind.secure else rng.choice((NONSECURE, REALM) if kind.stage2 else tuple(STATES))
    scr = regs.get("SCR_EL3", DEFAULTS["SCR_EL3"]) & ~SCR_NS | STATES[state]
    regs["SCR_EL3"] = scr | (SCR_GPF if rng.random() < 0.5 else 0)
    if kind.access:
        regs |= {"VBAR_EL2": HANDLER + 0x8000, "HCR_EL2": regs["HCR_EL2"] | (HCR_GPF if rng.random() < 0.5 else 0)}
    pps = rng.choice((5,) if kind.regime == "EL3" or kind.access else (1, 2, 3, 4, 5, 5, 5))
    granule = rng.choice((1, 1, 2, 2, 0))
    # EL3's program reads its tables, and QEMU dies of what walks of accesses meet: AT instructions ask for those.
    pages = frozenset(pa & -PAGE for pa in mem) if kind.regime == "EL3" or kind.access else frozenset()
    gpt = _Gpt(rng, ROOT if kind.regime == "EL3" else state, extended, mem, pages, 1 if kind.stage2 else 3)
    place = _Places(rng, mem)
    root = place.free(max(8 << PPS[pps] - GIB, PAGE))
    _level0(gpt, place, root, PPS[pps], PGS[granule])
    gpccr = GPC_ON | OUTER | pps | granule << 14 | rng.randrange(16) << 8
    if extended:
        pads = {SECURE: SPAD, NONSECURE: NSPAD, REALM: RLPAD}
        gpccr |= sum(bit for space, bit in pads.items() if rng.random() < 0.08 and not (kind.access and space == state))
        gpccr |= (APPSAA if rng.random() < 0.2 else 0) | rng.randrange(2) * NSO
    regs |= {"GPCCR_EL3": gpccr, "GPTBR_EL3": root >> 12}
    return replace(case, regs=regs, mem=mem)


def _level0(gpt: _Gpt, place: "_Places", root: int, pps: int, granule: int) -> None:
    """Level 0: a table for the program's GiB and for some islands', blocks where leaves lead."""
    rng, entries = gpt.rng, 1 << pps - GIB
    span = 1 << granule + 4
    size = max(8 << GIB - granule - 4, PAGE)
    reached = {(word & OUTPUT) >> GIB for word in gpt.mem.values() if word & 1}
    blocks = {gib for gib in reached if rng.random() < 0.9} | {base >> GIB for base, _ in _RAM}
    for gib in sorted(blocks):
        if gib >= entries:
            continue
        home = gib == TABLES >> GIB
        if home or (gib << GIB in {base & -(1 << GIB) for base, _ in _RAM} and rng.random() < 0.5):
            table = place.free(size)
            gpt.level1(table, gib << GIB, span)
            wrong = 0 if home or gpt.open or rng.random() < 0.9 else 1 << rng.choice((4, 12, 50, 55))
            gpt.mem[root + 8 * gib] = table | 3 | wrong
        else:
            opened = any(page >> GIB == gib for page in gpt.open)
            gpt.mem[root + 8 * gib] = 1 | EVERY << 4 if opened else gpt.block()


@dataclass
class _Places:
    """Where nothing of the case is, among the tables."""

    rng: Random
    mem: dict[int, int]

    def free(self, size: int) -> int:
        """An unused place, at a multiple of its size."""
        used = {pa & -PAGE for pa in self.mem} | self._taken
        choices = [
            at
            for at in range(-(-TABLES // size) * size, HANDLER - size + 1, size)
            if used.isdisjoint(range(at, at + size, PAGE))
        ]
        at = self.rng.choice(choices)
        self._taken.update(range(at, at + size, PAGE))
        return at

    def __post_init__(self) -> None:
        self._taken: set[int] = set()
