"""Reads and writes the trace format of casemate, an outside checker of break-before-make (rems-project/casemate).

Rules of this file:
- A trace is S-expressions, one event each: (mem-write (id 0) (tid 1) ... (src "file:1")). The named fields may stand
  without their names, in their order. Numbers are hexadecimal, ids and thread numbers decimal.
- The format knows EL2's stage 1 (TTBR0_EL2) and EL1&0's stage 2 (VTTBR_EL2), 4 KiB pages. A program is about one of
  them: reading, the one that is switched on first; writing, EL2's stage 1 only.
- Locks and ownership, which casemate checks too, are read past and not written: run its checker with `-R`. Its hint
  that a table is released is a page freed.
Source: the trace format section of casemate's manual, and how its checker answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pgtable.descriptors import Granule
from pgtable.params import Regime
from pgtable.registers import TCR_EL1, TCR_EL2
from pgtable.tlb_events import STRENGTHS, Dsb, Event, Isb, SysregWrite, TableFree, Tlbi, Write
from pgtable.tlb_scene import Places, Program, Scene
from pgtable.tlbi import decode

# Fields of each event after id and tid, in their order; `!` marks hexadecimal numbers.
_FIELDS: dict[str, tuple[str, ...]] = {
    "mem-write": ("mem-order", "address!", "value!"),
    "mem-read": ("address!", "value!"),
    "mem-init": ("address!", "size!"),
    "mem-free": ("address!", "size!"),
    "mem-set": ("address!", "size!", "value!"),
    "barrier": ("barrier", "kind"),
    "tlbi": ("operation", "value!"),
    "sysreg-write": ("sysreg", "value!"),
    "hint": ("kind", "location!", "value!"),
    "lock": ("address!",),
    "trylock": ("address!",),
    "unlock": ("address!",),
}
_IGNORED = ("mem-read", "lock", "trylock", "unlock")
_DSBS = ("ish", "ishst", "nsh")
_TLBIS = ("alle2", "alle2is", "vae2is", "vale2is")
_REGISTERS = ("ttbr0_el2", "tcr_el2", "mair_el2", "sctlr_el2", "hcr_el2", "vtcr_el2")
_PAGE = 4096
CPUS = 256
LARGEST = 1 << 24  # bytes that an event sets or frees
_ADDRESS = 0xFFFF_FFFF_F000  # of a table of 4 KiB pages
_TOKEN = re.compile(r'[()]|"[^"]*"|[^\s()"]+')

Record = dict[str, Any]


def parse_records(text: str) -> Iterator[Record]:
    """The events of a trace: "event", "id", "tid", "src" and each event's own fields, numbers as int.

    Lines that begin with `!` (the checker's verdict) are passed over. Raises ValueError naming the event.
    """
    depth, items = 0, list[Any]()
    lines = (line for line in text.splitlines() if not line.startswith("!"))
    for token in _TOKEN.findall("\n".join(lines)):
        if token == "(":
            depth += 1
            if depth == 2:
                items.append([])
        elif token == ")":
            depth -= 1
            if depth == 0:
                yield _record(items)
                items = []
        elif depth == 2:
            items[-1].append(token)
        elif depth == 1:
            items.append(token)
        else:
            raise ValueError(f"trace: {token!r} is outside of an event")
    if depth:
        raise ValueError("trace: an event is not closed")


def _record(items: list[Any]) -> Record:
    if not items or [] in items:
        raise ValueError("trace: an event or a field is empty")
    name = str(items[0])
    if name not in _FIELDS:
        raise ValueError(f"trace: no event is called {name!r}")
    fields = ("id", "tid", *_FIELDS[name])
    made: Record = {"event": name}
    rest = list(fields)
    for item in items[1:]:
        key, value = (item[0], item[-1]) if isinstance(item, list) else (None, item)
        if key == "src" or (key is None and value.startswith('"')):
            made["src"] = value.strip('"')
            continue
        field = next((f for f in rest if key is None or f.rstrip("!") == key), None)
        if field is None:
            raise ValueError(f"trace: {name} has no field {key or value!r}")
        rest.remove(field)
        made[field.rstrip("!")] = _value(name, field, value)
    return made


def _value(name: str, field: str, text: str) -> int | str:
    try:
        if field in ("id", "tid"):
            return _below(int(text), CPUS if field == "tid" else 1 << 64)
        return int(text, 16) if field.endswith("!") else text.lower()
    except ValueError:
        raise ValueError(f"trace: {name}: {field.rstrip('!')} {text!r} is not a number that can be there") from None


def _below(number: int, end: int) -> int:
    if not 0 <= number < end:
        raise ValueError
    return number


def read_trace(text: str) -> Program:
    """A program from a trace; raises ValueError for what is none. PCs are the events' ids."""
    reader = _Reader()
    for record in parse_records(text):
        if record["event"] in _IGNORED:
            continue
        try:
            reader.take(record)
        except KeyError as error:
            raise ValueError(f"trace: {record['event']} has no {error.args[0]}") from None
    return reader.program()


class _Reader:
    def __init__(self) -> None:
        self.words: dict[int, int] = {}  # memory now
        self.initial: dict[int, int] = {}  # when the first tables are switched on
        self.trees: dict[int, tuple[Places, int]] = {}  # by root, with the VMID
        self.stage2: dict[int, int] = {}  # CPU -> its VMID
        self.scene = Scene(upper=False, regime=Regime.EL2, cpus=1)
        self.events: list[Event] = []

    def program(self) -> Program:
        words = tuple(sorted((self.initial if self.trees else self.words).items()))
        return Program(self.scene._replace(words=words), tuple(self.events))

    def take(self, r: Record) -> None:
        cpu, pc = r["tid"], r["id"]
        self.scene = self.scene._replace(cpus=max(self.scene.cpus, cpu + 1))
        match r["event"]:
            case "mem-write":
                self.write(cpu, pc, r["address"], r["value"])
            case "mem-init":
                self.fill(cpu, pc, r["address"], r["size"], 0)
            case "mem-set":
                self.fill(cpu, pc, r["address"], r["size"], r["value"] * 0x0101010101010101)
            case "mem-free":
                self.free(cpu, pc, r["address"], r["size"])
            case "barrier":
                self.events.append(_barrier(cpu, pc, r["barrier"], r.get("kind", "")))
            case "tlbi":
                op = decode(r["operation"], r.get("value", 0), vmid=self.stage2.get(cpu, 0))
                self.events.append(Tlbi(cpu, op, pc))
            case "hint" if r["kind"] == "release_table":
                self.events.append(TableFree(r["location"] & _ADDRESS, cpu, pc))
            case "sysreg-write":
                self.register(cpu, pc, r["sysreg"], r["value"])

    def fill(self, cpu: int, pc: int, pa: int, size: int, word: int) -> None:
        if size > LARGEST:
            raise ValueError(f"trace: {size:#x} bytes at {pa:#x} are more than {LARGEST:#x} at once")
        for at in range(pa, pa + size, 8):
            if word or self.words.get(at):
                self.write(cpu, pc, at, word)

    def free(self, cpu: int, pc: int, pa: int, size: int) -> None:
        if size > LARGEST:
            raise ValueError(f"trace: {size:#x} bytes at {pa:#x} are more than {LARGEST:#x} at once")
        self.events += [TableFree(at, cpu, pc) for at in range(pa, pa + size, _PAGE)]

    def write(self, cpu: int, pc: int, pa: int, value: int) -> None:
        old = self.words.get(pa, 0)
        found = next(((*at, id) for tree, id in self.trees.values() if (at := tree.find(pa))), None)
        self.words[pa] = value
        if self.trees:
            level, va, vmid = found or (3, None, None)
            self.events.append(Write(cpu, pc, pa, level, va, old, value, vmid if self.scene.stage == 2 else None))

    def register(self, cpu: int, pc: int, name: str, value: int) -> None:
        if name not in ("ttbr0_el2", "vttbr_el2"):
            return  # casemate's traces have them for T0SZ, which is 16, and to switch translation on
        stage = 2 if name == "vttbr_el2" else 1
        if not self.trees:
            regime = Regime.EL10 if stage == 2 else Regime.EL2
            self.scene = _updating(self.scene._replace(root=value & _ADDRESS, regime=regime, stage=stage))
            self.initial = dict(self.words)
        elif stage == 1:
            self.events.append(SysregWrite(cpu, name.upper(), value, pc))
        if stage == self.scene.stage:
            scene = self.scene._replace(root=value & _ADDRESS)
            self.trees.setdefault(scene.root, (Places(Program(scene, ()).params, self.words), value >> 48))
        if stage == 2:
            self.stage2[cpu] = value >> 48


def _barrier(cpu: int, pc: int, name: str, kind: str) -> Event:
    if name == "isb":
        return Isb(cpu, pc)
    if name != "dsb" or kind not in STRENGTHS:
        raise ValueError(f"trace: no barrier is called {name} {kind}".rstrip())
    return Dsb(cpu, kind, pc)


def _updating(scene: Scene) -> Scene:
    """With hardware updates of the access flag: casemate does not look at it, so entries without it may be held."""
    name, layout = ("TCR_EL1", TCR_EL1) if scene.regime is Regime.EL10 else ("TCR_EL2", TCR_EL2)
    return scene._replace(registers=((name, scene.registers_set()[name] | layout["HA"].mask),))


def write_trace(program: Program) -> str:
    """The trace of a program about EL2's stage 1 with 4 KiB pages; raises ValueError for what has no event there.

    Accesses and returns have none and are left out.
    """
    scene = program.scene
    if scene.regime is not Regime.EL2 or scene.stage != 1 or scene.granule is not Granule.K4:
        raise ValueError("a casemate trace is about EL2's tables of 4 KiB pages")
    lines = [*_setup(program), *(line for event in program.events if (line := _event(event)))]
    return "".join(
        f'({line.replace("(tid", f"(id {i}) (tid", 1)} (src "program:{i}"))\n' for i, line in enumerate(lines)
    )


def _setup(program: Program) -> Iterator[str]:
    """Table pages, what is in them, and the tables switched on."""
    words = dict(program.scene.words)
    writes = {event.pa for event in program.events if isinstance(event, Write)}
    linked = {word & _ADDRESS for word in (*words.values(), *_made(program)) if word & 3 == 3}
    leaves = {word & _ADDRESS for level, word in _leaves(program) if level == 3}
    pages = {pa & -_PAGE for pa in (*words, *writes)} | {program.scene.root} | (linked - leaves)
    yield f"sysreg-write (tid 0) (sysreg tcr_el2) (value {64 - program.scene.va_bits:x})"
    yield from (f"mem-init (tid 0) (address {page:x}) (size {_PAGE:x})" for page in sorted(pages))
    yield from (_store(0, pa, word) for pa, word in sorted(words.items()) if word)
    yield f"sysreg-write (tid 0) (sysreg ttbr0_el2) (value {program.scene.root:x})"


def _made(program: Program) -> list[int]:
    return [event.new for event in program.events if isinstance(event, Write) and event.level < 3]


def _leaves(program: Program) -> Iterator[tuple[int, int]]:
    """Level and word of what is in memory at the beginning, as far as the tables lead there."""
    places = Places(program.params, dict(program.scene.words))
    for pa, word in program.scene.words:
        level, _ = places.find(pa) or (3, 0)
        yield level, word


def _store(cpu: int, pa: int, word: int) -> str:
    return f"mem-write (tid {cpu}) (mem-order plain) (address {pa:x}) (value {word:x})"


def _event(event: Event) -> str | None:
    match event:
        case Write(cpu=cpu, pa=pa, new=new):
            return _store(cpu, pa, new)
        case Dsb(cpu=cpu, domain=domain):
            if domain not in _DSBS:
                raise ValueError(f"dsb {domain}: a casemate trace has {', '.join(_DSBS)} only")
            return f"barrier (tid {cpu}) dsb (kind {domain})"
        case Isb(cpu=cpu):
            return f"barrier (tid {cpu}) isb"
        case Tlbi(cpu=cpu, op=op):
            name = op.name.lower()
            if name not in _TLBIS:
                raise ValueError(f"tlbi {name}: a casemate trace of EL2 has {', '.join(_TLBIS)} only")
            return f"tlbi (tid {cpu}) {name}" + (f" (value {op.operand:x})" if op.operation.takes_operand else "")
        case SysregWrite(cpu=cpu, name=name, value=value):
            if name.lower() not in _REGISTERS:
                raise ValueError(f"msr {name}: a casemate trace has {', '.join(_REGISTERS)} only")
            return f"sysreg-write (tid {cpu}) (sysreg {name.lower()}) (value {value:x})"
        case TableFree(cpu=cpu, pa=pa):
            return f"mem-free (tid {cpu}) (address {pa:x}) (size {_PAGE:x})"
    return None
