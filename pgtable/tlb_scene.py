"""A program of tlb_program.py: the scene before its first step, its events, its memory, and its text.

Rules of this file:
- A scene's tables are real words in memory, its registers those of an EL1 that runs Linux unless it says otherwise.
- `format_program` writes every setting, every word and every PC, so that nothing depends on a default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pgtable.access import AccessType
from pgtable.bits import Words
from pgtable.descriptors import LAST_LEVEL, Granule, Kind
from pgtable.features import CPUS
from pgtable.memory import NoMemory
from pgtable.params import Regime, WalkParams
from pgtable.registers import HCR_EL2, SCTLR_EL1, TCR_EL1, TCR_EL2, TTBR, Registers
from pgtable.tlb_events import Dsb, Event, Isb, SysregWrite, TableFree, TableReuse, Tlbi, Use, Write
from pgtable.tlbi import Invalidation

ROOT = 0x4000_0000  # the root table, unless `root` says otherwise; the tables below it follow
MAIR = 0x0000_0004_0044_FFFF  # 0, 1 Normal write-back, 2 Normal non-cacheable, 3 Device-nGnRnE, 4 Device-nGnRE
_TG1 = {Granule.K4: 2, Granule.K16: 1, Granule.K64: 3}
_TG0 = {Granule.K4: 0, Granule.K16: 2, Granule.K64: 1}


class Scene(NamedTuple):
    """What holds before the first step. `words`: memory, by PA; `registers`: those set besides, by name."""

    granule: Granule = Granule.K4
    va_bits: int = 48
    upper: bool = True
    regime: Regime = Regime.EL10
    stage: int = 1
    bbm: int = 0
    cpus: int = 2
    asid: int = 0
    root: int = ROOT
    words: tuple[tuple[int, int], ...] = ()
    registers: tuple[tuple[str, int], ...] = ()

    def registers_set(self) -> Registers:
        """The registers of every CPU at the beginning."""
        upper = self.upper and self.regime.has_el0
        values = {f"MAIR_EL{self.regime.el}": MAIR, f"SCTLR_EL{self.regime.el}": SCTLR_EL1.pack(M=1, C=1, I=1)}
        ttbr = TTBR.pack(ASID=self.asid) if self.regime.has_el0 else 0
        size = 64 - self.va_bits
        if self.regime.has_el0:
            half = (
                {"T1SZ": size, "TG1": _TG1[self.granule], "SH1": 3, "EPD0": 1, "T0SZ": size}
                if upper
                else {"T0SZ": size, "TG0": _TG0[self.granule], "SH0": 3, "EPD1": 1, "T1SZ": size, "TG1": 2}
            )
            tcr = TCR_EL1.pack(IPS=5, AS=1, **half)
        else:
            tcr = TCR_EL2.pack(PS=5, T0SZ=size, TG0=_TG0[self.granule], SH0=3)
        el = self.regime.el
        values[f"TCR_EL{el}"] = tcr
        values[f"TTBR0_EL{el}"] = ttbr if upper else self.root | ttbr
        if upper:
            values[f"TTBR1_EL{el}"] = self.root
        if self.regime is Regime.EL20:
            values["HCR_EL2"] = HCR_EL2.pack(E2H=1, TGE=1)
        features = CPUS["max"].replace(bbm=self.bbm)
        return Registers(features, **{**values, **dict(self.registers)})


class ProgramMemory:
    """Memory by words in a dict; pages that hold none of them, and are not said to be there, do not exist."""

    def __init__(self, words: dict[int, int], pages: frozenset[int]) -> None:
        self.known = dict(words)
        self._pages = pages

    def fetch(self, pa: int) -> int:
        """The word at `pa`; raises NoMemory."""
        word = self.known.get(pa)
        if word is None:
            if pa >> 12 not in self._pages:
                raise NoMemory(pa)
            return 0
        return word

    def store(self, pa: int, word: int) -> None:
        """Writes a word."""
        self.known[pa] = word

    def words(self, pa: int, n: int) -> Words:
        """The `n` words from `pa` on; raises NoMemory."""
        return np.array([self.fetch(pa + 8 * i) for i in range(n)], np.uint64)


class Program(NamedTuple):
    """A program: `scene`, and what happens. A step's PC is its line number unless the line says otherwise."""

    scene: Scene
    events: tuple[Event, ...]

    @property
    def registers(self) -> Registers:
        """The registers of every CPU at the beginning."""
        return self.scene.registers_set()

    @property
    def params(self) -> WalkParams:
        """The walk parameters of the half that the program is about."""
        scene = self.scene
        return WalkParams.of(self.registers, scene.regime, 1 << 55 if scene.upper and scene.regime.has_el0 else 0)

    def memory(self) -> ProgramMemory:
        """The memory before the first step, a new copy."""
        tables = {event.pa for event in self.events if isinstance(event, Write)} | set(dict(self.scene.words))
        size = self.scene.granule.page_size
        fmt = self.params.fmt
        linked = {fmt.table(2)["TA"].get(word) for word in _all_words(self) if word & 3 == 3}
        first = {base & -size for base in tables | linked | {self.scene.root}}
        pages = frozenset(page + n >> 12 for page in first for n in range(0, size, 4096))
        return ProgramMemory(dict(self.scene.words), pages)


def _all_words(program: Program) -> Iterator[int]:
    yield from dict(program.scene.words).values()
    yield from (event.new for event in program.events if isinstance(event, Write))


class Places:
    """Where the descriptors of a tree are, while it changes: level and VA by PA. `words`: memory, the caller's."""

    def __init__(self, params: WalkParams, words: dict[int, int]) -> None:
        self.params, self.words = params, words
        self._tables: dict[int, tuple[int, int]] = {}  # table -> level, VA; kept when it is unlinked

    def find(self, pa: int) -> tuple[int, int] | None:
        """Level and VA of the descriptor at `pa`; None for a page that is no table and never was one."""
        p, granule = self.params, self.params.fmt.granule
        self._grow(p.base, p.start_level, p.half_base)
        for table, (level, va) in self._tables.items():
            if table <= pa < table + 8 * self._entries(level):
                return level, va + (pa - table >> 3) * granule.level_size(level)
        return None

    def _entries(self, level: int) -> int:
        return self.params.root_entries if level == self.params.start_level else self.params.fmt.granule.entries

    def _grow(self, table: int, level: int, va: int) -> None:
        """Notes the tables that can be reached."""
        p = self.params
        self._tables[table] = level, va
        if level == LAST_LEVEL:
            return
        for pa in [pa for pa in self.words if table <= pa < table + 8 * self._entries(level)]:
            word = self.words[pa]
            below = p.table_address(word)
            if p.kinds[level][word & 3] is Kind.TABLE and self._tables.get(below, (level + 1,))[0] == level + 1:
                self._grow(below, level + 1, va + (pa - table >> 3) * p.fmt.granule.level_size(level))


def line_of(pc: int) -> str:
    """The name of a PC in a program."""
    return f"line {pc}"


# Writing.


def format_program(program: Program) -> str:
    """The program as text, which `parse_program` reads back to an equal one."""
    return "".join(f"{line}\n" for line in (*_scene_lines(program.scene), *map(_line, program.events)))


def _scene_lines(scene: Scene) -> Iterator[str]:
    yield f"granule {scene.granule.label}"
    yield f"va_bits {scene.va_bits}"
    yield f"half {'upper' if scene.upper else 'lower'}"
    yield f"regime {scene.regime.value}"
    yield from (f"{name} {getattr(scene, name)}" for name in ("stage", "bbm", "cpus", "asid"))
    yield f"root {scene.root:#x}"
    yield "tables none"
    yield from (f"word {pa:#x} = {word:#x}" for pa, word in scene.words)
    yield from (f"reg {name} = {value:#x}" for name, value in scene.registers)


_ACCESS_VERBS = {AccessType.READ: "read", AccessType.WRITE: "store", AccessType.FETCH: "fetch"}


def _line(event: Event) -> str:
    return f"cpu{event.cpu} {_words(event)} @{event.pc:#x}"


def _words(event: Event) -> str:
    match event:
        case Write(pa=pa, level=level, va=va, old=old, new=new, asid=asid):
            place = f" va {va:#x}" if va is not None else ""
            tag = f" asid {asid:#x}" if asid is not None else ""
            return f"write {pa:#x} L{level} {old:#x} -> {new:#x}{place}{tag}"
        case Tlbi(op=op):
            return _tlbi_words(op)
        case Dsb(domain=domain):
            return f"dsb {domain}"
        case Isb():
            return "isb"
        case SysregWrite(name=name, value=value):
            return f"msr {name} {value:#x}"
        case Use(va=va, access=access):
            return f"{_ACCESS_VERBS[access.type]} {va:#x} el {access.el}"
        case TableFree(pa=pa):
            return f"free {pa:#x}"
        case TableReuse(pa=pa):
            return f"reuse {pa:#x}"
    return "return"


def _tlbi_words(op: Invalidation) -> str:
    xt = f" xt {op.operand:#x}" if op.operation.takes_operand else ""
    vmid = f" vmid {op.vmid:#x}" if op.vmid else ""
    return f"tlbi {op.name.lower()}{xt}{vmid}"
