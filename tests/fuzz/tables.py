"""Targets that read translation tables, whatever is in RAM, and the commands over them."""

from __future__ import annotations

import shlex
import struct
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np

from tests.fuzz.files import file
from tests.fuzz.harness import Target
from tests.pgtable.hand import OUT, ROOT, hcr, leaf, sctlr, table, tcr

PAGES = 6
REGISTERS = (
    "SCTLR_EL1",
    "TCR_EL1",
    "TTBR0_EL1",
    "TTBR1_EL1",
    "MAIR_EL1",
    "HCR_EL2",
    "VTCR_EL2",
    "VTTBR_EL2",
    "TCR2_EL1",
)
HEAD = struct.Struct(f"<B{len(REGISTERS)}Q")
STAGE2 = 1 << 31 | 0x8_0000_0000 | 5 << 16 | 1 << 6 | 25 | 0x3500  # VTCR_EL2: 39 bits from level 1


def ram() -> bytes:
    """Six pages: a tree of 4 KiB pages with blocks, contiguous entries, a loop, and what is not there."""
    words = np.zeros((PAGES, 512), np.uint64)
    for level in range(3):
        words[level, [0, 256]] = table(ROOT + 0x1000 * (level + 1))
    words[0, 511] = table(ROOT)
    words[1, 3], words[2, 5] = leaf(OUT, low=1), leaf(OUT + 0x20_0000, low=1)
    words[2, 7] = table(1 << 40)
    words[3, :16] = [leaf(OUT + 0x1000 * i, Contiguous=1, UXN=1) for i in range(16)]
    words[3, 20:24] = [leaf(OUT, AP=2), leaf(AP=1, nG=1), leaf(1 << 47), 0xDEADBEEF]
    words[4, 1] = table(ROOT + 0x5000)
    words[5, :] = leaf(ROOT, AttrIndx=4)
    return words.tobytes()


def guests() -> list[bytes]:
    """Registers and RAM: each granule, and both stages."""
    rows = [
        (0, sctlr(), tcr(), ROOT, ROOT, 0xFF, hcr(), 0, 0, 0),
        (1, sctlr(WXN=1), tcr("16K", 47), ROOT, ROOT + 0x4000, 0x4400FF, hcr(), 0, 0, 0),
        (2, sctlr(), tcr("64K", 42, upper=True), ROOT, ROOT, 0xFF, hcr(), 0, 0, 2),
        (3, sctlr(), tcr(ia=39), ROOT + 0x1000, ROOT, 0xFF, hcr(VM=1), STAGE2, ROOT + 0x1000, 0),
    ]
    return [HEAD.pack(*row) + ram() for row in rows]


def guest(data: bytes) -> tuple[object, object, int]:
    """RAM, registers and the first byte, of an input."""
    from pgtable import PhysicalMemory, Registers

    data = data.ljust(HEAD.size, b"\0")
    choice, *values = HEAD.unpack_from(data)
    content = data[HEAD.size :][: 1 << 16].ljust(0x1000, b"\0")
    content += bytes(-len(content) % 0x1000)
    memory = PhysicalMemory((ROOT, len(content)))
    memory.write(ROOT, content)
    return memory, Registers(None, **dict(zip(REGISTERS, values, strict=True))), choice


def readers(data: bytes) -> None:
    """listing, find, audit, diff, search for roots, both stages, walks."""
    from emu.rowtext import RowText
    from emu.sources.find import find_roots
    from pgtable import Access, translate, translate_many
    from pgtable.audit import audit
    from pgtable.diff import diff
    from pgtable.find import aliases, entries, references
    from pgtable.listing import listing
    from pgtable.listing_stage2 import nested_listing, stage2_listing
    from pgtable.params import Regime

    memory, regs, choice = guest(data)
    found = listing(memory, regs, regime=list(Regime)[choice & 3])  # type: ignore[arg-type]
    for line, _ in zip(RowText(found).lines(found.runs), range(200), strict=False):
        assert line
    aliases(found, OUT, 0x2000)
    references(memory, found, ROOT + 0x1000)  # type: ignore[arg-type]
    list(zip(entries(memory, found, 3, 3), range(500), strict=False))  # type: ignore[arg-type]
    audit(found, memory)  # type: ignore[arg-type]
    diff(found, listing(memory, regs))  # type: ignore[arg-type]
    stage2_listing(memory, regs)  # type: ignore[arg-type]
    nested_listing(memory, regs)  # type: ignore[arg-type]
    vas = np.array([0, 0x5000, 0x1_0000, 0xFFFF_0000_0000_0000, 0xFFFF_FFFF_FFFF_F000, 1 << 47], np.uint64)
    translate_many(memory, regs, vas, Access.write())  # type: ignore[arg-type]
    for va in vas.tolist():
        str(translate(memory, regs, va, Access.fetch(0)))  # type: ignore[arg-type]
    if choice >> 2 & 3 == 3:
        find_roots(memory)  # type: ignore[arg-type]


# commands

OPTIONS = {
    "walk": "--write --fetch --el0 --at --regime --stage --json --reg",
    "dump": "--style --where --va --pa --level --size --half --sort --totals --variant --stage --reg --regime --json",
    "find": "--pa --table --word --roots --stage --reg --regime --json",
    "audit": "--rule --list --reg --regime --json --stage",
    "diff": "--reg --regime --json",
    "map": "--title --reg --regime",
    "explain": "--level --granule --ds --d128 --stage --fwb --regime --mair --tcr --va --table --kernel --json",
}


def command(data: bytes) -> None:
    """A command line over tables: a line of words, then registers and RAM. Nothing but SOURCE names a file."""
    import click

    from emu.cli import cli

    text, _, rest = data.partition(b"\n")
    head, content = rest[: HEAD.size].ljust(HEAD.size, b"\0"), rest[HEAD.size :][: 1 << 15]
    content = content.ljust(max(-(-len(content) // 0x1000), 1) * 0x1000, b"\0")
    arguments = _arguments(text.decode("utf-8", "replace"), file(content, "ram"), head)
    out = StringIO()
    with redirect_stdout(out), redirect_stderr(StringIO()):
        try:
            code = cli(arguments, standalone_mode=False)
        except click.exceptions.Exit as exit:
            code = exit.exit_code
    assert code in (None, 0, 1), code


def _arguments(text: str, ram: str, head: bytes) -> list[str]:
    try:
        name, *words = shlex.split(text)
    except ValueError:
        name, *words = text.split() or [""]
    allowed = OPTIONS.get(name, "").split()
    words = [word for word in words if not word.startswith("-") or word.partition("=")[0] in allowed]
    if name not in OPTIONS or name == "explain":
        return ["explain", *words]
    values = dict(zip(REGISTERS, HEAD.unpack(head)[1:], strict=True))
    regs = file("".join(f"{key}={value:#x}\n" for key, value in values.items()).encode(), "regs")
    source = f"raw:{ram}@{ROOT:#x}"
    fixed = {"diff": [source, source], "map": [source, "-o", str(Path(ram).with_name("map.svg"))]}.get(name, [source])
    return [name, *fixed, "--regs", regs, *(words if name != "diff" else [w for w in words if w.startswith("-")])]


LINES = (
    "walk 0x0 0xffff000000005000 --write", "walk ffff000000005000 --at S1E1R --json", "walk 0x5000 --stage both --json",
    "walk 0x0 --fetch --el0 --regime EL20", "dump --where 'W and X or level==2 and not AF'", "dump --json --sort size",
    "dump --style linux", "dump --style leaves --va 0x0-0x200000 --size 4K", "dump --totals --half upper --level 3",
    "dump --where 'attr==device and size>=2M' --pa 0x80000000+0x1000", "find --pa 0x80000000+0x1000 --json",
    "find --table 0x40001000", "find --word 0x3/0x3", "find --roots", "audit", "audit --rule w-and-x --json",
    "audit --list", "diff --json", "map --title t", "dump --stage 2",
    "explain 0x00e8000040000f03 --level 3 --kernel 7.x",
    "explain 00e8000040000783 00e8000040000703 --json", "explain ESR_EL1=0x96000047 FAR_EL1=0xffff800012345678",
    "explain '[ffff800012345678] pgd=1000000041003003, p4d=0, pud=0, pmd=0x3, pte=0' --va 0x1000 --table 0x40000003",
    "explain 0x3 --d128 --granule 64k --stage 2 --fwb", "explain 0x3 --tcr 0x3510 --mair 0xff --ds --regime EL2",
)  # fmt: skip


def commands() -> list[bytes]:
    """Command lines over the four guests."""
    return [line.encode() + b"\n" + guests()[i % 4] for i, line in enumerate(LINES)]


MODULES = ("pgtable/listing.py", "pgtable/tree.py", "pgtable/regions.py", "pgtable/audit_rules.py", "pgtable/find.py",
           "pgtable/walk.py", "pgtable/nested.py", "pgtable/stage2.py", "emu/sources/find.py")  # fmt: skip
CLI = tuple(f"emu/cli_{name}.py" for name in ("walk", "dump", "find", "audit", "diff", "map", "explain", "source"))
TARGETS = (
    Target("tables", "tables in hostile RAM: list, find, audit, compare, both stages, roots", readers, guests, (),
           MODULES, 1 << 16),
    Target("command", "command lines over such RAM: walk, dump, find, audit, diff, map, explain", command, commands,
           ("CommandError", "UsageError", "BadParameter", "BadOptionUsage", "NoSuchOption", "MissingParameter"),
           CLI, 1 << 16),
)  # fmt: skip
