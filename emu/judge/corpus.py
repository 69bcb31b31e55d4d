"""Translation cases with recorded answers: what a corpus holds, how to read it, how to write it.

A corpus is a file of JSON objects, one a line, plain or xz (found by content). There are two sorts of case:

*AT cases* ask with AT instructions; an answer is the value of PAR_EL1. *Access cases* make real loads, stores and
fetches; an answer is DONE or the syndrome. Fields of a record, and what becomes of them in a `Case`:

    id        a name, unique in its file: "a/max/s1-4k-0"
    kind      the family of cases: s1-4k s1-16k s1-64k s1-mixed s1-linux s1-lpa2 (DS=1) s1-lpa64 (64K, 52 bits)
              s1-ha s1-hahd s1-off s1-secure s1-pie s1-raw s1-wild el2 el20 s2-only s1s2; access cases: s1 linux
              lpa2 ha hahd pie s2
    cpu       QEMU's -cpu, a key of PA_BITS: it decides the PA size and so which islands of RAM there are
    ref       AT cases: the QEMU version whose PAR to believe
    regs      {register: hex}; a register that is not named has the value in DEFAULTS, or 0. PAN is PSTATE.PAN
    mem       {address: hex word}; all other RAM is zero, and what is not RAM is a hole (external abort)
    ops, q    the queries in order: q is "va:index va:index ...", an index into ops, VA in hex
    par       AT cases: {version: answers}: a hex PAR_EL1; bit 64 set: the AT took an exception, ESR in the low bits;
              null: the guest died of this query. "=": the same list as the first version; null: not asked
    acc       access cases, the same with 0 (done), null (not tried), [esr, far, hpfar] in hex; bit 63 of esr: the
              exception went to EL2; bit 62: a granule protection check
              exception, taken to EL3, and MFAR_EL3 instead of hpfar. A syndrome of external
              abort, not on a walk (DFSC 0x10), says that the translation succeeded and nothing is at the PA
    after     {version: {address: hex word}}: the table words that the hardware changed in the whole case, or "="
    half      access cases: 0 or 1, the TTBR under test. The other one belongs to the program that asks: 4K granule,
              TxSZ=25, root table at HANDLER, VBAR_EL1 in it (regs says so); no query goes there
    pan       access cases: PSTATE.PAN during the access (regs does not name PAN there)
    code_ipa  access cases of stage 2, in hex: stage 1 is off, and mem maps the two 4K pages from this IPA to
              HANDLER + 0x4000 with all permissions

Queries of a case run in order on one CPU, so a hardware update made by one is seen by the next. An access case drops
all TLB entries before each access.
"""

import functools
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from emu import jsontext, writing

__all__ = [
    "DEFAULTS",
    "DONE",
    "EXC",
    "HANDLER",
    "HANDLER_VA",
    "ISLANDS",
    "PA_BITS",
    "PROGRAM_PAGE",
    "RME_CPU",
    "TABLES",
    "TO_EL2",
    "TO_EL3",
    "Answer",
    "Case",
    "CorpusError",
    "Query",
    "dump",
    "has_ram",
    "is_safe",
    "islands",
    "load",
    "loads",
    "save",
]  # fmt: skip

EXC = 1 << 64
"""Set in the answer of an AT that took an exception instead; the ESR is in the low bits."""
DONE = 0
"""The answer of an access that was done."""
TO_EL2 = 1 << 63
"""Set in the ESR of an access whose exception went to EL2."""
TO_EL3 = 1 << 62
"""Set in the ESR of an access that ended in a granule protection check exception, taken to EL3: FAR and MFAR follow."""
RME_CPU = "max,x-rme=on"
"""The CPU model with granule protection (FEAT_RME)."""

Syndrome: TypeAlias = tuple[int, int, int]
Answer: TypeAlias = int | Syndrome | None
Query: TypeAlias = tuple[int, str]

BASE_RAM = (0x4000_0000, 64 << 20)
ISLANDS = (
    BASE_RAM,
    *((base, 16 << 20) for base in (0xC000_0000, *(1 << bit for bit in (35, 39, 41, 43, 46, 47, 49, 51)))),
)
"""RAM as (base, size): one island in every band of physical address sizes."""
HANDLER = 0x43F0_0000
"""From here to the end of the base RAM is the asking program's: its tables, and its code at lower ELs."""
HANDLER_VA = (0x10_0000_0000, 0xFFFF_FF90_0000_0000)
"""Where the lower and the upper half map the asking program's two pages, when they are not under test."""
PROGRAM_PAGE = 0x4020_0000
"""A case of EL3's own regime must map these 4 KiB to themselves, executable at EL3: the asking program runs there."""
TABLES = 0x4180_0000
"""From here to HANDLER the base RAM is free for tables and targets; below is the asking program too."""
PA_BITS = {
    "max": 52,
    "max,lpa2=off": 52,
    "max,x-rme=on": 52,
    "neoverse-n1": 48,
    "neoverse-v1": 48,
    "cortex-a57": 44,
    "cortex-a76": 40,
    "cortex-a710": 40,
}
"""Physical address size of every CPU model that cases may name."""
_LAST_ISLAND_GAP = 64 << 30  # QEMU puts devices above the last island; there must be room below the PA size
_DEVICES = 1 << 42  # somewhere in so many bytes

DEFAULTS: Mapping[str, int] = {
    "SCR_EL3": 0x7840_0400_0501,  # RW, HCE, NS, and the enables of TCR2, SCTLR2, PIE and AIE registers
    "HCR_EL2": 1 << 31,  # RW
    "HCRX_EL2": 0xC000,  # TCR2En, SCTLR2En
    "SCTLR_EL1": 0x30D0_0800,
    "SCTLR_EL2": 0x30C5_0830,
    "MAIR_EL1": 0xFF,
    "MAIR_EL2": 0xFF,
    **dict.fromkeys(
        (
            "TCR_EL1", "TTBR0_EL1", "TTBR1_EL1", "TCR_EL2", "TTBR0_EL2", "TTBR1_EL2", "VTCR_EL2", "VTTBR_EL2",
            "TCR2_EL1", "PIR_EL1", "PIRE0_EL1", "MAIR2_EL1", "PAN",
        ),
        0,
    ),
}  # fmt: skip
"""Registers of a case that names none."""


class CorpusError(ValueError):
    """A corpus cannot be read; the message is one sentence naming the file, the line and what is wrong."""


@functools.cache
def islands(cpu: str) -> tuple[tuple[int, int], ...]:
    """The RAM that a CPU model has, as (base, size): islands near or beyond its PA size were left out."""
    limit = 1 << PA_BITS[cpu]
    return tuple(i for i in ISLANDS if i == BASE_RAM or sum(i) + _LAST_ISLAND_GAP <= limit)


def has_ram(pa: int, cpu: str) -> bool:
    """Whether a CPU model has RAM at `pa`."""
    return any(base <= pa < base + size for base, size in islands(cpu))


def is_safe(pa: int, cpu: str) -> bool:
    """Whether the asking program survives an access to this PA, and no device sees it."""
    base, size = BASE_RAM
    last = sum(islands(cpu)[-1])
    in_program = base <= pa < TABLES or HANDLER <= pa < base + size
    return pa >= base and not in_program and not last <= pa < last + _DEVICES


@dataclass(frozen=True)
class Case:
    """One set of registers and tables, the queries put to it, and the answers that are known.

    `regs` has the defaults filled in. `answers[version][i]` is about `queries[i]`; a version that was not asked is
    absent. `after` names only versions that changed words. `half` is None in AT cases.
    """

    id: str
    kind: str
    cpu: str
    regs: Mapping[str, int]
    mem: Mapping[int, int]
    queries: Sequence[Query]
    answers: Mapping[str, Sequence[Answer]] = field(default_factory=dict)
    after: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    ref: str | None = None
    half: int | None = None
    pan: int = 0
    code_ipa: int | None = None

    @property
    def is_access(self) -> bool:
        """Whether the queries are real accesses and not AT instructions."""
        return self.half is not None

    @property
    def reference(self) -> str | None:
        """The version to believe: `ref`, else the first one asked, else None."""
        return self.ref or next(iter(self.answers), None)

    @property
    def islands(self) -> tuple[tuple[int, int], ...]:
        """The RAM of this case's CPU, as (base, size)."""
        return islands(self.cpu)

    @property
    def words(self) -> dict[int, int]:
        """`mem` without the words that this CPU has no RAM for: they do not exist."""
        return {a: w for a, w in self.mem.items() if has_ram(a, self.cpu)}

    def changed(self, version: str) -> Mapping[int, int]:
        """The table words that `version` changed, and their values at the end of the case."""
        return self.after.get(version, {})

    def question(self) -> "Case":
        """The case without any answer."""
        return replace(self, answers={}, after={}, ref=None)

    def answered(self, version: str, answers: Sequence[Answer], after: Mapping[int, int]) -> "Case":
        """The case with the answers of one more version."""
        changes = {**self.after, version: after} if after else self.after
        return replace(self, answers={**self.answers, version: tuple(answers)}, after=changes, ref=self.ref or version)


# ---- reading


def load(path: str | Path) -> Iterator[Case]:
    """Every case of a corpus file, in order; raises CorpusError where it is not one."""
    try:
        with _open(Path(path)) as lines:
            yield from loads(lines, name=str(path))
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise CorpusError(f"{path}: cannot be read: {reason}") from None


def _open(path: Path) -> TextIO:
    with path.open("rb") as f:
        packed = f.read(6) == b"\xfd7zXZ\0"
    return lzma.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8")


def loads(lines: Iterable[str], name: str = "corpus") -> Iterator[Case]:
    """The case on every line that is not blank; `name` is how an error calls the source."""
    empty = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        empty = False
        try:
            yield _case(_json(line))
        except _RecordError as e:
            raise CorpusError(f"{name}, line {number}: {e}") from None
    if empty:
        raise CorpusError(f"{name}: is empty, a corpus has one JSON object a line")


class _RecordError(Exception):
    """What is wrong with a record; `loads` adds where."""


def _json(line: str) -> object:
    try:
        return jsontext.loads(line)
    except ValueError as e:
        raise _RecordError(f"not JSON: {e}") from None


def _case(record: object) -> Case:
    if not isinstance(record, dict):
        raise _RecordError(f"a record is a JSON object, not {_shown(record)}")
    access = "acc" in record
    cpu = _text(record, "cpu")
    if cpu not in PA_BITS:
        raise _RecordError(f"cpu {cpu!r} is not one of {', '.join(PA_BITS)}")
    queries = _queries(_text(record, "q"), _get(record, "ops", list))
    answers = _answers(_get(record, "acc" if access else "par", dict), len(queries), _outcome if access else _par)
    ref = _text(record, "ref") if "ref" in record else None
    if ref is not None and ref not in answers:
        raise _RecordError(f"ref {_shown(ref)} is none of the versions that answered: {', '.join(answers)}")
    return Case(
        id=_text(record, "id"),
        kind=_text(record, "kind"),
        cpu=cpu,
        regs={**DEFAULTS, **{k: _hex(v, f"regs[{k}]") for k, v in _get(record, "regs", dict).items()}},
        mem=_words(_get(record, "mem", dict), "mem"),
        queries=queries,
        answers=answers,
        after=_after(_get(record, "after", dict)),
        ref=ref,
        half=_bit(record, "half") if access else None,
        pan=_bit(record, "pan") if access else 0,
        code_ipa=_hex(record["code_ipa"], "code_ipa") if "code_ipa" in record else None,
    )


def _get(record: dict[str, Any], key: str, kind: type) -> Any:
    if key not in record:
        raise _RecordError(f"there is no {key!r}")
    if not isinstance(record[key], kind):
        raise _RecordError(f"{key!r} is {_shown(record[key])}, not a {_JSON_NAMES[kind]}")
    return record[key]


_JSON_NAMES: Mapping[type, str] = {dict: "JSON object", list: "list", str: "string"}


def _text(record: dict[str, Any], key: str) -> str:
    return str(_get(record, key, str))


def _bit(record: dict[str, Any], key: str) -> int:
    if record.get(key) not in (0, 1):
        raise _RecordError(f"{key!r} is {_shown(record.get(key))}, not 0 or 1")
    return int(record[key])


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _hex(value: object, what: str, bits: int = 64) -> int:
    try:
        number = int(value, 16) if isinstance(value, str) else -1
    except ValueError:
        number = -1
    if not 0 <= number < 1 << bits:
        raise _RecordError(f"{what} is {_shown(value)}, not a hex number of {bits} bits")
    return number


def _words(words: dict[str, Any], what: str) -> dict[int, int]:
    result = {_hex(a, f"an address in {what}", 52): _hex(w, f"{what}[{a}]") for a, w in words.items()}
    for address in result:
        if address & 7:
            raise _RecordError(f"{what}[{address:x}] is not at a multiple of 8")
    return result


def _queries(text: str, ops: list[Any]) -> tuple[Query, ...]:
    if not all(isinstance(op, str) for op in ops):
        raise _RecordError(f"'ops' is {_shown(ops)}, not a list of strings")
    pairs = [q.partition(":") for q in text.split()]
    for va, _, index in pairs:
        if not (index.isdecimal() and int(index) < len(ops)):
            raise _RecordError(f"query '{va}:{index}' has no index into the {len(ops)} ops")
    return tuple((_hex(va, "the VA of a query"), ops[int(index)]) for va, _, index in pairs)


def _answers(lists: dict[str, Any], count: int, one: Callable[[object, str], Answer]) -> dict[str, Sequence[Answer]]:
    result: dict[str, Sequence[Answer]] = {}
    for version, answers in lists.items():
        if answers == "=" and result:
            result[version] = next(iter(result.values()))
        elif isinstance(answers, list):
            if len(answers) != count:
                raise _RecordError(f"QEMU {version} has {len(answers)} answers to {count} queries")
            result[version] = tuple(one(a, f"an answer of QEMU {version}") for a in answers)
        elif answers is not None:
            raise _RecordError(f'the answers of QEMU {version} are {_shown(answers)}, not a list, "=" or null')
    return result


def _par(value: object, what: str) -> int | None:
    return None if value is None else _hex(value, what, 65)


def _outcome(value: object, what: str) -> Answer:
    if value is None or value == DONE:
        return value if value is None else DONE
    if not (isinstance(value, list) and len(value) == 3):
        raise _RecordError(f"{what} is {_shown(value)}, not 0, null or [esr, far, hpfar]")
    esr, far, hpfar = (_hex(v, what) for v in value)
    return esr, far, hpfar


def _after(changes: dict[str, Any]) -> dict[str, Mapping[int, int]]:
    result: dict[str, Mapping[int, int]] = {}
    for version, words in changes.items():
        if words == "=" and result:
            result[version] = next(iter(result.values()))
        elif isinstance(words, dict):
            result[version] = _words(words, f"after[{version}]")
        elif words is not None:
            raise _RecordError(f"after[{version}] is {_shown(words)}, not a JSON object")
    return {version: words for version, words in result.items() if words}


# ---- writing


def dump(case: Case) -> str:
    """The case as one line of a corpus, without the newline; `loads([dump(case)])` gives an equal case."""
    ops = list(dict.fromkeys(op for _, op in case.queries))
    index = {op: i for i, op in enumerate(ops)}
    record: dict[str, Any] = {"id": case.id, "kind": case.kind, "cpu": case.cpu}
    if case.ref is not None:
        record["ref"] = case.ref
    if case.half is not None:
        record |= {"half": case.half, "pan": case.pan}
    if case.code_ipa is not None:
        record["code_ipa"] = f"{case.code_ipa:x}"
    record["regs"] = {n: f"{v:x}" for n, v in case.regs.items() if v != DEFAULTS.get(n)}
    record["mem"] = _hex_words(case.mem)
    record |= {"ops": ops, "q": " ".join(f"{va:x}:{index[op]}" for va, op in case.queries)}
    answers = {v: [_packed(a, case.is_access) for a in given] for v, given in case.answers.items()}
    record["acc" if case.is_access else "par"] = _shared(answers)
    record["after"] = _shared({v: _hex_words(a) for v, a in case.after.items()})
    return json.dumps(record, separators=(",", ":"))


def save(path: str | Path, cases: Iterable[Case]) -> int:
    """Write a corpus, xz if the name ends in .xz; returns how many cases it has."""
    packed = str(path).endswith(".xz")
    with writing.replacing(path) as file, lzma.open(file, "wb") if packed else nullcontext(file) as f:
        return sum(1 for case in cases if f.write(f"{dump(case)}\n".encode()))


def _hex_words(words: Mapping[int, int]) -> dict[str, str]:
    return {f"{a:x}": f"{words[a]:x}" for a in sorted(words)}


def _packed(answer: Answer, access: bool) -> Any:
    if isinstance(answer, tuple):
        return [f"{v:x}" for v in answer]
    return answer if answer is None or access else f"{answer:x}"


def _shared(by_version: dict[str, Any]) -> dict[str, Any]:
    first, *others = by_version or [""]
    return {**by_version, **{v: "=" for v in others if by_version[v] == by_version[first]}}
