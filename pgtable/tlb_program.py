"""Small programs of table writes, TLB maintenance and accesses, as text: what the checkers are tried with.

Rules of this file:
- One step a line, `cpu0 VERB ...`; lines before the first step set the scene. `docs/tlb.md` describes the language.
- Tables are real: a program has memory, and a write's VA is found through the tables as they are at that step.
- Errors are one sentence with the line number (ProgramError).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pgtable.access import Access, AccessType
from pgtable.descriptors import Granule
from pgtable.params import RANGE_BIT, Regime
from pgtable.registers import NAMES
from pgtable.tlb_events import (
    STRENGTHS,
    Dsb,
    Event,
    Isb,
    Return,
    SysregWrite,
    TableFree,
    TableReuse,
    Tlbi,
    Use,
    Write,
)
from pgtable.tlb_scene import Places, Program, Scene
from pgtable.tlbi import OPERATIONS, Type, decode, operand_for, range_operand

_U64 = (1 << 64) - 1
SPARE = 0x4F00_0000  # tables above a page that a `va` puts somewhere


class ProgramError(ValueError):
    """A line that is no step: one sentence, with the line number."""


# Parsing.

_SCENE = re.compile(r"(granule|va_bits|half|regime|stage|bbm|cpus|asid|root|word|reg|tables)\b\s*(.*)")
_STEP = re.compile(r"cpu(\d+)\s+(\w+)\b\s*(.*)")
_LIMITS = {"va_bits": (12, 52), "stage": (1, 2), "bbm": (0, 3), "cpus": (1, 64), "asid": (0, 0xFFFF), "root": (0, _U64)}


def parse_program(text: str) -> Program:
    """A program from its text; raises ProgramError with the line number."""
    parser = _Parser()
    for number, line in enumerate(text.splitlines(), 1):
        try:
            parser.line(number, line.partition("#")[0].strip())
        except ValueError as error:  # also of a field that cannot hold a number
            raise ProgramError(f"line {number}: {error}") from None
    return parser.program()


class _Parser:
    def __init__(self) -> None:
        self.scene = Scene()
        self.declared: dict[int, int] = {}  # memory as the scene says
        self.initial: dict[int, int] = {}
        self.places: Places | None = None
        self.bare = False
        self.next_table = SPARE
        self.events: list[Event] = []

    def line(self, number: int, line: str) -> None:
        if not line:
            return
        step = _STEP.fullmatch(line)
        if step:
            self._begin()
            words, at, pc = step[3].partition("@")
            self._step(int(step[1]), step[2].lower(), words.split(), _number(pc) if at else number)
            return
        scene = _SCENE.fullmatch(line)
        if not scene:
            raise ProgramError(f"{line.split()[0]!r} is neither a step (cpu0 ...) nor a setting")
        if self.places is not None:
            raise ProgramError(f"{scene[1]} must stand before the first step")
        self._set(scene[1], scene[2])

    def program(self) -> Program:
        self._begin()
        words = tuple(sorted(self.initial.items()))
        return Program(self.scene._replace(words=words), tuple(self.events))

    # the scene

    def _set(self, name: str, value: str) -> None:
        scene = self.scene
        if name == "word" or name == "reg":
            key, equals, word = (part.strip() for part in value.partition("="))
            if not equals:
                raise ProgramError(f"{name} takes NAME = VALUE, not {value!r}")
            if name == "word":
                self.declared[_number(key)] = _number(word)
            else:
                self.scene = scene._replace(registers=(*scene.registers, (_register(key), _number(word))))
        elif name == "granule":
            try:
                self.scene = scene._replace(granule=Granule.named(value))
            except ValueError as error:
                raise ProgramError(str(error)) from None
        elif name == "half":
            self.scene = scene._replace(upper=_choice(name, value, {"upper": True, "lower": False}))
        elif name == "regime":
            self.scene = scene._replace(regime=_choice(name, value, {r.value: r for r in Regime}))
        elif name == "tables":
            self.bare = _choice(name, value, {"none": True, "chain": False})
        else:
            number: dict[str, Any] = {name: _limited(name, value, *_LIMITS[name])}
            self.scene = scene._replace(**number)

    def _begin(self) -> None:
        """The scene is complete: default tables, registers."""
        if self.places is not None:
            return
        params = Program(self.scene, ()).params
        page, root = self.scene.granule.page_size, self.scene.root
        below = 0 if self.bare else len(params.levels) - 1
        self.initial = {root + i * page: root + (i + 1) * page | 3 for i in range(below)} | self.declared
        self.places = Places(params, dict(self.initial))

    # steps

    def _step(self, cpu: int, verb: str, words: list[str], pc: int) -> None:
        if cpu >= self.scene.cpus:
            raise ProgramError(f"cpu{cpu}: there are {self.scene.cpus} CPUs (say `cpus {cpu + 1}`)")
        made = _VERBS.get(verb)
        if made is None:
            raise ProgramError(f"{verb!r} is no step; steps are {', '.join(sorted(_VERBS))}")
        self.events.append(made(self, cpu, pc, words))

    def write(self, cpu: int, pc: int, words: list[str]) -> Event:
        words, options = _options(words, "va", "asid")
        if len(words) != 5 or words[3] != "->" or not re.fullmatch(r"[lL]-?\d", words[1]):
            raise ProgramError("write takes PA Ln OLD -> NEW [va VA] [asid ASID]")
        pa, level, old, new = _number(words[0]), int(words[1][1:]), _number(words[2]), _number(words[4])
        if pa % 8:
            raise ProgramError(f"PA {pa:#x} is not a multiple of 8")
        places = self.places
        assert places
        if pa not in places.words:
            self.initial[pa] = places.words[pa] = old
        if places.words[pa] != old:
            raise ProgramError(f"PA {pa:#x} holds {places.words[pa]:#x}, not {old:#x}")
        if "va" in options and not places.find(pa):
            self._link(places, pa, level, self.in_half(options["va"]))
        at, va = places.find(pa) or (level, None)
        if at != level:
            raise ProgramError(f"PA {pa:#x} is in a level {at} table, not level {level}")
        if va is None and old & 1:
            raise ProgramError(f"PA {pa:#x} is in no table: say where it translates (va VA)")
        said = options.get("va", va)
        if va is not None and said != va:
            raise ProgramError(f"PA {pa:#x} translates {va:#x}, not {said:#x} (`tables none` begins without tables)")
        places.words[pa] = new
        return Write(cpu, pc, pa, level, va, old, new, options.get("asid"))

    def in_half(self, va: int) -> int:
        """The VA, if it is in the half that the program is about."""
        upper = self.scene.upper and self.scene.regime.has_el0
        if bool(va & RANGE_BIT) != upper:
            names = ("lower", "upper")
            raise ProgramError(
                f"VA {va:#x} is in the {names[not upper]} half, the tables are of the {names[upper]} one"
            )
        return va

    def _link(self, places: Places, pa: int, level: int, va: int) -> None:
        """Makes the page of `pa` the table of `level` for `va`, with new tables above it, before the first step."""
        p, granule = places.params, self.scene.granule
        page = pa & -granule.page_size
        if granule.index(va, level) != (pa - page) >> 3:
            raise ProgramError(f"PA {pa:#x} is entry {(pa - page) >> 3} of its table, VA {va:#x} has another")
        table = p.base
        for at, shift, mask in p.levels[: level - p.start_level]:
            slot = table | (va >> shift & mask) << 3
            word = places.words.get(slot, 0)
            if not word:
                self.next_table += granule.page_size
                word = (page if at == level - 1 else self.next_table) | 3
                self.initial[slot] = places.words[slot] = word
            table = p.table_address(word)
        if table != page:
            raise ProgramError(f"VA {va:#x} has its level {level} table at PA {table:#x}, not at {page:#x}")

    def tlbi(self, cpu: int, pc: int, words: list[str]) -> Event:
        words, options = _options(words, "asid", "ttl", "pages", "xt", "vmid")
        row = OPERATIONS.get(words[0].upper()) if words else None
        if row is None:
            raise ProgramError(f"no TLBI operation is called {words[0] if words else '(nothing)'}")
        by_address = row.type in (Type.VA, Type.VAA, Type.IPAS2) and "xt" not in options
        if len(words) != 1 + by_address:
            raise ProgramError(f"tlbi {row.name.lower()} takes {'an address' if by_address else 'no address'}")
        asid, ttl = options.get("asid", self.scene.asid), options.get("ttl", 0)
        address = _number(words[1]) if by_address else 0
        if "xt" in options:
            operand = options["xt"]
        elif row.ranged and by_address:
            operand = self._range(address, options.get("pages", 2), asid, ttl)
        else:
            has_asid = row.type in (Type.VA, Type.ASID) and self.scene.regime.has_el0
            operand = operand_for(row.name, address, asid=asid if has_asid else 0, ttl=ttl) if row.takes_operand else 0
        host = self.scene.regime is Regime.EL20
        return Tlbi(cpu, decode(row, operand, e2h=host, tge=host, vmid=options.get("vmid", 0)), pc)

    def _range(self, address: int, pages: int, asid: int, ttl: int) -> int:
        try:
            return range_operand(address, pages, self.scene.granule, asid=asid, ttl=ttl)
        except ValueError as error:
            raise ProgramError(str(error)) from None

    def dsb(self, cpu: int, pc: int, words: list[str]) -> Event:
        option = words[0].lower() if len(words) == 1 else ""
        if option not in STRENGTHS:
            raise ProgramError(f"dsb takes one of {', '.join(sorted(STRENGTHS))}")
        return Dsb(cpu, option, pc)

    def msr(self, cpu: int, pc: int, words: list[str]) -> Event:
        if len(words) != 2:
            raise ProgramError("msr takes NAME VALUE")
        return SysregWrite(cpu, _register(words[0]), _number(words[1]), pc)


def _alone(make: Callable[[int, int], Event], name: str) -> Any:
    def step(_: _Parser, cpu: int, pc: int, words: list[str]) -> Event:
        if words:
            raise ProgramError(f"{name} takes nothing, not {words[0]!r}")
        return make(cpu, pc)

    return step


def _page(make: Callable[[int, int, int], Event], name: str) -> Any:
    def step(parser: _Parser, cpu: int, pc: int, words: list[str]) -> Event:
        if len(words) != 1:
            raise ProgramError(f"{name} takes the PA of a table page")
        return make(_number(words[0]) & -parser.scene.granule.page_size, cpu, pc)

    return step


def _access(type: AccessType, name: str) -> Any:
    def step(parser: _Parser, cpu: int, pc: int, words: list[str]) -> Event:
        words, options = _options(words, "el")
        if len(words) != 1:
            raise ProgramError(f"{name} takes a VA")
        return Use(cpu, parser.in_half(_number(words[0])), Access(type, options.get("el", parser.scene.regime.el)), pc)

    return step


_VERBS: dict[str, Callable[[_Parser, int, int, list[str]], Event]] = {
    "write": _Parser.write,
    "tlbi": _Parser.tlbi,
    "dsb": _Parser.dsb,
    "isb": _alone(Isb, "isb"),
    "msr": _Parser.msr,
    "read": _access(AccessType.READ, "read"),
    "store": _access(AccessType.WRITE, "store"),
    "fetch": _access(AccessType.FETCH, "fetch"),
    "free": _page(TableFree, "free"),
    "reuse": _page(TableReuse, "reuse"),
    "return": _alone(Return, "return"),
}


def _number(text: str) -> int:
    try:
        value = int(text.strip(), 0)
    except ValueError:
        raise ProgramError(f"{text.strip()!r} is not a number (0x... or decimal)") from None
    if not 0 <= value <= _U64:
        raise ProgramError(f"{text.strip()} does not fit in 64 bits")
    return value


def _limited(name: str, text: str, low: int, high: int) -> int:
    value = _number(text)
    if not low <= value <= high:
        raise ProgramError(f"{name} {value}: must be {low} to {high}")
    return value


def _choice(name: str, text: str, values: dict[str, Any]) -> Any:
    if text not in values:
        raise ProgramError(f"{name} {text}: must be {' or '.join(values)}")
    return values[text]


def _register(name: str) -> str:
    if name.upper() not in NAMES:
        raise ProgramError(f"register {name} is not one that a translation reads")
    return name.upper()


def _options(words: list[str], *names: str) -> tuple[list[str], dict[str, int]]:
    """The words without the `name value` pairs at their end, and the pairs."""
    options: dict[str, int] = {}
    while len(words) >= 2 and words[-2] in names:
        options[words[-2]] = _number(words[-1])
        words = words[:-2]
    return words, options
