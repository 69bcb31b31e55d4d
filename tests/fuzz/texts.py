"""Targets that read text: programs, traces, corpora, stored cases, registers, numbers, names, conditions, caches."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from tests.fuzz.files import file
from tests.fuzz.harness import Target


def text(data: bytes) -> str:
    """As a file or an argument gives it."""
    return data.decode("utf-8", "surrogateescape")


# programs and traces


def program(data: bytes) -> None:
    """A program of table writes, judged by both checkers."""
    from pgtable import bbm, tlb
    from pgtable.tlb_program import parse_program

    made = parse_program(text(data))
    bbm.run(made)
    if made.scene.stage == 1:
        tlb.run(made)


def programs() -> list[bytes]:
    """The programs of docs/tlb.md, and settings that they do not use."""
    from tests.pgtable.programs import CASES

    more = "granule 16k\nva_bits 47\nhalf lower\nregime EL20\nbbm 2\ncpus 3\nasid 7\nroot 0x48000000\n"
    more += "reg MAIR_EL1 = 0xff\ntables none\nword 0x48000000 = 0x49000003\ncpu1 tlbi rvae1is 0x4000 pages 4 ttl 3\n"
    more += (
        "cpu0 write 0x40003008 L3 0 -> 0x703 va 0x1804000 asid 3\ncpu2 msr TTBR0_EL1 0x48000000\ncpu2 free 0x49000000\n"
    )
    return [case.text.encode() for case in CASES[::3] if len(case.text) < 4000] + [more.encode(), b"stage 2\n"]


def casemate(data: bytes) -> None:
    """A casemate trace, judged, and written again."""
    from pgtable import bbm
    from pgtable.casemate import read_trace, write_trace

    made = read_trace(text(data))
    bbm.run(made)
    with suppress(ValueError):
        write_trace(made)


def traces() -> list[bytes]:
    """Traces of our programs, and every event by hand."""
    from pgtable.casemate import write_trace
    from tests.pgtable.test_casemate import CAN_BE_SAID, at_el2

    small = [case for case in CAN_BE_SAID if len(case.text) < 600][::6]
    by_hand = "(mem-init (id 0) (tid 0) (address 1000) (size 1000))\n(sysreg-write (id 1) (tid 0) vttbr_el2 1000)\n"
    by_hand += "(mem-set 2 0 1000 8 ff)\n(hint (id 3) (tid 1) release_table 1000 0)\n(mem-free 4 0 1000 1000)\n"
    by_hand += (
        '(lock 5 0 10)\n(tlbi (id 6) (tid 0) ipas2e1is (value 1))\n! ok\n(barrier 7 0 dsb (kind ish) (src "a:1"))\n'
    )
    return [write_trace(at_el2(case)).encode() for case in small] + [by_hand.encode()]


# the judge's corpora, stored cases


def corpus(data: bytes) -> None:
    """A corpus, judged case by case."""
    from emu.judge.corpus import load
    from emu.judge.verdict import Tally, judge_case

    for case in load(file(data)):
        judge_case(case, Tally(case.kind))


def corpora() -> list[bytes]:
    """Small cases of several kinds, with answers."""
    from emu.judge.cases import random_case
    from emu.judge.corpus import dump

    found = []
    for kind in ("s1-4k", "s1-lpa2", "acc-hahd", "s2-4k", "s1s2-4k", "el2"):
        with suppress(KeyError):
            case = random_case(random.Random(3), kind)
            some = {"queries": case.queries[:4], "mem": dict(list(case.mem.items())[:12])}
            small = type(case)(**{**{f.name: getattr(case, f.name) for f in fields(case)}, **some})
            answer: Any = (0x92000007, 0x1000, 0) if case.is_access else 0x80B
            found.append(dump(small.answered("10.0", [answer] * 4, {})).encode() + b"\n")
    return [*found, found[0] + found[1]]


@cache
def stored_types() -> dict[str, type]:
    """The dataclass of each function's cases."""
    from emu.checks import registry

    return {name: registry.harness(name).case for name in registry.HARNESSES}


def stored(data: bytes) -> None:
    """A stored case of the function that it names."""
    from emu.checks.stored import dump, load

    source = text(data)
    for function, kind in stored_types().items():
        if function in source:
            world, case = load(source, function, 4096, kind)
            dump(function, world, 4096, case)
            return


def stored_cases() -> list[bytes]:
    """For each type of case, the plainest one."""
    firsts = {kind: function for function, kind in reversed(stored_types().items())}
    rows = [
        {"schema": "pgtable.case/1", "function": name, "world": "plain", "page_size": 4096, "case": plain(kind)}
        for kind, name in firsts.items()
    ]
    return [json.dumps(row).encode() for row in rows]


def plain(hint: Any) -> Any:
    """A value of this type, as JSON."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return plain(args[0])
    if hint in (int, str, bool):
        return hint()
    if origin is dict:
        return [[plain(args[0]), plain(args[1])]]
    if origin:
        return [plain(arg) for arg in args if arg is not Ellipsis]
    if issubclass(hint, Enum):
        return next(iter(hint)).name if len(hint) else 0
    hints = get_type_hints(hint)
    return (
        {name: plain(of) for name, of in hints.items()} if is_dataclass(hint) else [plain(of) for of in hints.values()]
    )


# registers, numbers, names, conditions


def registers(data: bytes) -> None:
    """A file of registers, and arguments of --reg."""
    from emu.sources import overridden

    overridden(None, file(data), [])
    lines = text(data).splitlines()
    overridden(None, None, lines[:20])


def register_texts() -> list[bytes]:
    """Lines and JSON."""
    return [
        b"TTBR1_EL1=0x40001000\n# a comment\nTCR_EL1 = 0x4f5503510\nSCTLR=1\n",
        b'{"TCR_EL1": "0x35", "HCR_EL2": 7}',
    ]


def words(data: bytes) -> None:
    """Everything that the command line takes as a number, an address, a range or a name; one a line."""
    from emu import cli_source, kernels
    from emu.cli import CommandError
    from emu.cli_completion import sources
    from emu.races.explore import Schedule
    from emu.sources import Source
    from pgtable.where import number

    readers: tuple[tuple[Callable[[str], object], type[Exception]], ...] = (
        (lambda s: cli_source.word(s, "VA"), CommandError),
        (lambda s: cli_source.address(s, Source("a", "b", memory(), symbols={"init_mm": 1})), CommandError),
        (lambda s: cli_source.span(s, "--va"), CommandError),
        (kernels.parse_name, kernels.KernelError),
        (lambda s: Schedule.parse(s, ("A", "B", "AB")), ValueError),
        (lambda s: number(s, "--size"), ValueError),
        (lambda s: list(map(str, sources(s))), ()),  # type: ignore[arg-type]
    )
    for line in text(data).splitlines()[:8]:
        for reader, error in readers:
            with suppress(error):
                reader(line)


def word_texts() -> list[bytes]:
    """One of each."""
    lines = (
        "0xffff800080000000",
        "ffff800080000000",
        "init_mm+0x10",
        "0x1000-0x2000",
        "0x1000+4K",
        "debian:6.12-cloud",
    )
    return ["\n".join(lines).encode(), b"A5 B A\nAB3 AB A B\n12M\ndebian:7.3\nraw:/tmp/x@0x40000000\nqmp:/run/x"]


@cache
def memory() -> Any:
    """Some RAM."""
    from pgtable import PhysicalMemory

    return PhysicalMemory((0x4000_0000, 0x1000))


def where(data: bytes) -> None:
    """A condition over a listing."""
    from pgtable.where import where as chosen

    chosen(_listing(), text(data))


@cache
def _listing() -> Any:
    from pgtable.listing import listing
    from tests.fuzz.tables import guest, guests

    ram, regs, _ = guest(guests()[0])
    return listing(ram, regs)  # type: ignore[arg-type]


def conditions() -> list[bytes]:
    """The names and operators."""
    from pgtable.where import HELP

    return [
        b"W and X", b"attr==device and size>=2M or not (level<3)", b"sh!=inner and AttrIndx==0x4 and pa<0x80000000",
        " or ".join(name for names in HELP for name in names.split()[:1]).encode(),
    ]  # fmt: skip


# what lies in the cache


def kept(data: bytes) -> None:
    """The files of the image cache and of fetched kernels, as anybody may have left them."""
    from emu import imagecache, kernels, reading

    place = Path(file(b"", "array")).parent
    (place / imagecache.META).write_bytes(data)
    (place / "array").write_bytes(np.arange(16, dtype="<u8").tobytes())
    (place / "part.json").write_bytes(data)
    whole = imagecache.load(place)
    if whole:
        reading.recall(*whole)
    imagecache.load_part(place, "part")
    root = kernels.cache_dir()
    (root / "kernels" / "folder").mkdir(parents=True, exist_ok=True)
    (root / "kernels" / "names.json").write_bytes(data)
    (root / "kernels" / "folder" / "kernel.json").write_bytes(data)
    (root / "kernels" / "folder" / "vmlinuz").write_bytes(b"1234")
    kernels.cached()


def kept_files() -> list[bytes]:
    """Each kind."""
    import zlib

    crc = zlib.crc32(np.arange(16, dtype="<u8").tobytes())
    rows: list[Any] = [
        {"facts": {"base": 1, "size": 2, "layout": {}}, "files": {"array": [128, crc, "<u8", [16]]}},
        [128, crc, "<u8", [4, 4]],
        {"debian:6.1": "folder", "debian:6.12": "other"},
        {"package": "a", "version": "1", "upstream": "6", "flavour": "cloud", "suite": "sid", "sha256": "0", "size": 4},
    ]
    return [json.dumps(row).encode() for row in rows]


TLB = ("pgtable/tlb_program.py", "pgtable/tlb_scene.py", "pgtable/tlb.py", "pgtable/bbm.py")
TARGETS = (
    Target("program", "programs of table writes and TLB maintenance, and both checkers", program, programs,
           ("ProgramError",), TLB, 1 << 13),
    Target("casemate", "casemate's traces", casemate, traces, ("ValueError",), ("pgtable/casemate.py",), 1 << 13),
    Target("corpus", "the judge's corpora, and the verdicts", corpus, corpora, ("CorpusError",),
           ("emu/judge/corpus.py", "emu/judge/verdict.py", "emu/judge/model.py"), 1 << 13),
    Target("stored", "stored cases of `check --case`", stored, stored_cases, ("StoredError",),
           ("emu/checks/stored.py",), 1 << 13),
    Target("registers", "--regs and --reg", registers, register_texts, ("SourceError",), ("emu/sources/registers.py",),
           1 << 13),
    Target("words", "numbers, addresses, ranges, kernel names, schedules on the command line", words, word_texts, (),
           ("emu/cli_source.py", "emu/cli_completion.py"), 1 << 10),
    Target("where", "conditions of `dump --where`", where, conditions, ("ValueError",), ("pgtable/where.py",), 1 << 10),
    Target("cache", "the files of the caches", kept, kept_files, (), ("emu/imagecache.py",), 1 << 12),
)  # fmt: skip
