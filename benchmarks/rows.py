"""What `make bench` measures: a row for each thing, with its contenders, its reference and its bound.

Rules of this file:
- A row's figures are of one unit and one piece of work; contenders that take turns give a ratio in each round.
- A contender that gives another answer than the reference stops the benchmark.
- What cannot be had is said with its reason (`Bench.missing`), and never counted as met.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import bulk, listing, tcg
from benchmarks.timing import Spread, Times, in_turn, ratios, seconds
from emu import Machine, snippets
from emu.image import ImageError, KernelImage
from emu.kernels import KernelError
from pgtable import Granule, PhysicalMemory, Registers, translate, translate_many
from pgtable.build import TableBuilder
from pgtable.leaves import leaves
from pgtable.listing import listing as list_all

GIB = 1 << 30
RAM = listing.RAM
VA = listing.VA
TCR = 0x5_B510_3510 | 1 << 7  # 48 bits, 4K, walks of TTBR0 off


@dataclass
class Row:
    """One line. `figures`: of each contender, in `unit`. `ratio`: of `over` to `under`, or None for a bound on ours.

    `bound`: the largest ratio (or figure, where there is no ratio) that the project wants; None: told, not bounded.
    """

    group: str
    name: str
    unit: str
    figures: dict[str, Spread]
    over: str = "ours"
    under: str | None = None
    ratio: Spread | None = None
    bound: float | None = None
    judged: bool = True  # False where the sizes are not those of the bound

    @property
    def figure(self) -> float | None:
        """What the bound is about."""
        if self.under:
            return self.ratio.median if self.ratio else None
        return self.figures[self.over].median

    @property
    def met(self) -> bool | None:
        """The bound holds; None where there is none, no figure, or another size."""
        return None if self.bound is None or self.figure is None or not self.judged else self.figure <= self.bound


@dataclass
class Bench:
    """How much is measured, and with whom."""

    rounds: int = 11
    quick: bool = False
    kernel: str = "debian:6.12"
    qemu: str = "qemu-system-aarch64"
    peers: dict[str, Path] = field(default_factory=dict)  # checkouts of gdb-pt-dump and arm64-pgtable-tool
    missing: dict[str, str] = field(default_factory=dict)

    def timed(
        self, group: str, name: str, contenders: dict[str, Callable[[], float]], *, under: str, bound: float | None
    ) -> Row:
        """A row of contenders that take turns, in nanoseconds for each piece of work."""
        times = in_turn(contenders, self.rounds)
        return row(group, name, "ns", times, under=under, bound=bound)


def row(group: str, name: str, unit: str, times: Times, *, under: str | None, bound: float | None) -> Row:
    """A row of what was measured."""
    found = ratios(times, "ours", under) if under else []
    figures = {who: Spread.of(figures) for who, figures in times.items() if figures}
    return Row(group, name, unit, figures, under=under, ratio=Spread.of(found) if found else None, bound=bound)


def per(work: int, call: Callable[[], object]) -> Callable[[], float]:
    """Nanoseconds for each of `work` pieces of one call."""
    return lambda: seconds(call) * 1e9 / work


# translate_many. The bounds of mixed trees and other granules are twice those of plain 4K pages.
MAPS: dict[str, tuple[str, float]] = {
    "1 GiB, 4K pages": ("C", 1.5),
    "1 GiB, four attributes, 20 % holes": ("C", 3),
    "1 GiB, pages, blocks, holes": ("C", 3),
    "1 GiB, 2M blocks": ("C", 3),
    "1 GiB, 16K pages": ("C", 3),
    "1 GiB, 64K pages": ("C", 3),
    "64 GiB, 4K pages": ("gather", 2.5),
    "64 GiB, pages, blocks, holes": ("gather", 5),
    "64 GiB, 16K pages": ("gather", 5),
}


def many(bench: Bench) -> Iterator[Row]:
    """A million random addresses."""
    with tempfile.TemporaryDirectory() as folder:
        for name, (under, bound) in MAPS.items():
            made = bulk.MAPS[name](100_000 if bench.quick else 1_000_000)
            times = bulk.measured(made, bench.rounds, folder)
            yield row("translate_many", name, "ns/address", times, under=under, bound=bound)


def one(bench: Bench) -> Iterator[Row]:
    """Addresses one by one, in the tree of 1 GiB."""
    made = bulk.built(Granule.K4, GIB, 5000)
    region, vas = made.memory.regions[0], made.va.tolist()
    raw, root = region.raw, bulk.BASE

    def bare() -> list[int]:
        found = []
        for va in vas:
            table = root
            for shift in (39, 30, 21, 12):
                table = raw[(table - root >> 3) + (va >> shift & 511)] & 0xFFFF_FFFF_F000
            found.append(table | va & 4095)
        return found

    def ours() -> list[int]:
        return [translate(made.memory, made.registers, va).pa for va in vas]

    assert bare() == ours(), "translate differs from the bare loop"
    contenders = {"ours": per(len(vas), ours), "bare loop": per(len(vas), bare)}
    drgn = bulk.drgn_walk(made)
    if drgn:
        contenders["drgn"] = lambda: drgn() * 1e9
    else:
        bench.missing.setdefault("drgn", "not installed (pip install drgn)")
    yield bench.timed("translate", "one address", contenders, under="bare loop", bound=10)


def lists(bench: Bench) -> Iterator[Row]:
    """Everything that 4 GiB of pages map: a million descriptors."""
    size = GIB // 4 if bench.quick else 4 * GIB
    n = size >> 12
    bounds = {"linear": 2.0, "runs of 16 pages": 4.0, "scattered": 20.0}
    with tempfile.TemporaryDirectory() as folder:
        c = listing.compiled(folder) if shutil.which("cc") else None
        for name, run in listing.SHAPES:
            memory, tables = listing.tree(size, run)
            regs = Registers(TTBR1_EL1=tables.root, TCR_EL1=TCR, SCTLR_EL1=1, MAIR_EL1=0xFF)
            contenders = {"ours": per(n, lambda m=memory, r=regs: list_all(m, r))}  # type: ignore[misc]
            if c:
                rows = np.zeros((n, 4), np.uint64)
                contenders["C"] = per(n, lambda m=memory, t=tables, o=rows: listing.plain(c, m, t.root, o))  # type: ignore[misc]
                count, found = listing.plain(c, memory, tables.root, rows), list_all(memory, regs).runs
                assert found.va.tolist() == rows[:count, 0].tolist(), "not the rows that C finds"
            times = in_turn(contenders, bench.rounds)
            folder_of_peer = bench.peers.get("gdb-pt-dump")
            if name == "linear" and folder_of_peer:
                times["gdb-pt-dump"] = [listing.gdb_pt_dump(str(folder_of_peer), 64 << 20) * 1e9 / (64 << 20 >> 12)]
            yield row("listing", f"dump, {name}", "ns/descriptor", times, under="C", bound=bounds[name])
        yield bench.timed(
            "listing",
            "leaves, every descriptor a row",
            {
                "ours": per(n, lambda: leaves(memory, regs)),
                **({"C": per(n, lambda: listing.plain(c, memory, tables.root, rows))} if c else {}),
            },
            under="C",
            bound=20,
        )


def build(bench: Bench) -> Iterator[Row]:
    """64 GiB mapped by 4K pages: 128 MiB of tables."""
    size = 4 * GIB if bench.quick else 64 * GIB
    pool, n = (size >> 9) + (8 << 20), size >> 12
    memory = PhysicalMemory((RAM, pool))
    start = memory.regions[0].address

    def ours() -> None:
        TableBuilder(memory, (RAM, pool), va_bits=48, upper=True).map(VA, 1 << 32, size, level=3)

    contenders = {"ours": per(n, ours), "memset": per(n, lambda: ctypes.memset(start, 1, 8 * n))}
    times = in_turn(contenders, bench.rounds)
    ours()
    translated = translate_many(memory, bulk.registers(Granule.K4).replace(TTBR1_EL1=RAM), [VA, VA + size - 1])
    assert translated.pa.tolist() == [1 << 32, (1 << 32) + size - 1]
    if "arm64-pgtable-tool" in bench.peers and not find_spec("intervaltree"):
        bench.missing["arm64-pgtable-tool"] = "it needs intervaltree (pip install intervaltree)"
    elif "arm64-pgtable-tool" in bench.peers:
        times["arm64-pgtable-tool"] = [_pgtable_tool(bench.peers["arm64-pgtable-tool"])]
    name = f"TableBuilder.map, {size // GIB} GiB by 4K pages"
    yield row("build", name, "ns/page", times, under="memset", bound=2.5)


def _pgtable_tool(folder: Path) -> float:
    """Nanoseconds a page of arm64-pgtable-tool, for 8 regions of 511 pages (its cost grows with the square)."""
    with tempfile.TemporaryDirectory() as here:
        source, out = Path(here, "map.txt"), Path(here, "out.S")

        def run(regions: int) -> float:
            lines = (f"{0x8000_0000 + (i << 21):#x}, 2044K, RW_DATA, part {i}\n" for i in range(regions))
            source.write_text("".join(lines))
            line = [sys.executable, str(folder / "generate.py"), "-i", str(source), "-o", str(out)]
            line += ["-ttb", "0x90000000", "-el", "1"]
            return seconds(lambda: subprocess.run(line, check=True, capture_output=True))

        empty = run(1)
        return (run(9) - empty) * 1e9 / (8 * 511)


class Subject(NamedTuple):
    """A machine with 1 GiB to make invalid and valid again: `call(enable, record)`."""

    machine: Machine
    call: Callable[[int, str], object]


def _subject(bench: Bench) -> Subject:
    ram, n = GIB + (256 << 20), GIB >> 12
    try:
        machine = Machine.boot(KernelImage.load(bench.kernel), ram=ram)
        va = machine.plan.linear + (128 << 20)
        return Subject(machine, lambda on, record: machine.call("set_memory_valid", va, n, on, record=record).ok())
    except (KernelError, ImageError) as error:
        bench.missing["the kernel's set_memory_valid"] = f"{error}; the embedded snippet runs instead"
    return _bare()


def _bare() -> Subject:
    """The embedded snippet, which walks from the root for each page."""
    machine, n = Machine.bare(ram=GIB + (256 << 20)), GIB >> 12
    va, code = machine.plan.linear + (64 << 20), bytes(snippets.load("set_memory_valid"))
    return Subject(machine, lambda on, record: machine.run(code, va, n, on, record=record).ok())


def changes(bench: Bench) -> Iterator[Row]:
    """set_memory_valid over 1 GiB: 262 144 descriptors; bare, and with what changed."""
    _, call = _subject(bench)
    n = GIB >> 12

    def run(record: str, report: Callable[[object], object]) -> Callable[[], float]:
        def timed() -> float:
            call(1, "nothing")
            return seconds(lambda: report(call(0, record))) * 1e9 / n

        return timed

    contenders: dict[str, Callable[[], float]] = {
        "bare": run("nothing", lambda _: None),
        "ours": run("changes", lambda result: result.changes.runs),  # type: ignore[attr-defined]
        "as arrays": run("changes", lambda result: (result.changes.va, result.changes.new)),  # type: ignore[attr-defined]
    }
    call(1, "nothing")
    found = call(0, "changes").changes  # type: ignore[attr-defined]
    assert sum(run.n for run in found.runs) == len(found) == n
    yield bench.timed("changes", "set_memory_valid of 1 GiB, every change told", contenders, under="bare", bound=1.1)
    program = shutil.which(bench.qemu)
    if not program:
        bench.missing["QEMU TCG"] = f"no {bench.qemu} (Debian package qemu-system-arm)"
        return
    _, snippet = _bare()
    both = {"ours": per(n, lambda: snippet(0, "nothing")), "QEMU TCG": tcg.timer(program, 5 if bench.quick else 40)}
    yield bench.timed("changes", "the embedded snippet over 1 GiB, bare", both, under="QEMU TCG", bound=None)


def boots(bench: Bench) -> Iterator[Row]:
    """A machine with a kernel in RAM: made once in a process, each further one shares it until it is written."""
    try:
        image = KernelImage.load(bench.kernel)
    except (KernelError, ImageError) as error:
        bench.missing["cold boot"] = str(error)
        return
    words = np.empty(len(image.data) // 8, np.uint64)
    source = np.frombuffer(image.data, np.uint64, len(words))

    def boot() -> float:
        start = time.perf_counter()
        machine = Machine.boot(image)
        taken = time.perf_counter() - start
        del machine  # its memory is given back outside the time
        return taken * 1e3

    contenders: dict[str, Callable[[], float]] = {
        "ours": boot,
        "filling the memory": lambda: seconds(lambda: np.copyto(words, source)) * 1e3,
    }
    times = in_turn(contenders, bench.rounds)
    yield row("boot", "a fresh Machine, cold boot, beside the fill", "ms", times, under=None, bound=2)


FOOTPRINT = """
import sys
from pgtable import PhysicalMemory, Registers
from pgtable.build import TableBuilder
from pgtable.listing import listing
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10
path, root, tcr = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
memory, few = PhysicalMemory.open(path), PhysicalMemory((0, 1 << 16))
regs = lambda root: Registers(TTBR1_EL1=root, TCR_EL1=tcr, SCTLR_EL1=1, MAIR_EL1=0xFF)
tables = TableBuilder(few, (0, 1 << 16), va_bits=48, upper=True)
for i in range(8):  # everything is loaded and has run once, on a small tree
    tables.map(tables.base + (i << 14), i << 20, 1 << 14, level=3)
listing(few, regs(tables.root))
before = peak()
found = listing(memory, regs(root))
print(before, peak(), int(found.runs.size.sum()))
"""
COMMAND = """
import sys
from emu.cli import main
sys.argv = ["pgtable", "dump", f"raw:{sys.argv[1]}@0", "--json"]
sys.argv += [f"--reg={name}={value}" for name, value in REGS]
try:
    main()
finally:
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(line.split()[1], file=sys.stderr)
"""


def footprint(bench: Bench) -> Iterator[Row]:
    """Resident memory of a process that lists a dump file, beside the tables that it must read."""
    sizes = [("linear", 0, 4 * GIB if bench.quick else 64 * GIB), ("runs of 16 pages", 16, 4 * GIB)]
    sizes.append(("scattered", 1, GIB if bench.quick else 4 * GIB))
    for name, run, size in sizes:
        grown, tables = listed(size, run)
        times = {"ours": [grown / (1 << 20)], "tables": [tables / (1 << 20)]}
        yield row("memory", f"{size // GIB} GiB {name}, beside its tables", "MiB", times, under="tables", bound=2)
    times = {"ours": [dumped() / (1 << 20)], "file": [64 * 1024.0]}
    yield row("memory", "pgtable dump of a sparse file of 64 GiB", "MiB", times, under=None, bound=2048)


def listed(size: int, run: int) -> tuple[int, int]:
    """Lists a dump of `size` bytes, all of it mapped, in a process of its own: what its memory grows by, the tables."""
    with tempfile.TemporaryDirectory() as folder:
        path, root, tables = _dump(Path(folder), size, run, size)
        line = [sys.executable, "-c", FOOTPRINT, str(path), str(root), str(TCR)]
        done = subprocess.run(line, check=True, capture_output=True, text=True)
    before, peak, found = map(int, done.stdout.split())
    assert found == size, f"{found} bytes listed, not {size}"
    return peak - before, tables


def dumped() -> int:
    """Bytes that `pgtable dump` takes at the most for a sparse file of 64 GiB, of which 1 GiB is mapped."""
    with tempfile.TemporaryDirectory() as folder:
        path, root, _ = _dump(Path(folder), 64 * GIB, 0, GIB)
        regs = {"TTBR1_EL1": root, "TTBR0_EL1": 0, "TCR_EL1": TCR, "SCTLR_EL1": 1, "MAIR_EL1": 0xFF}
        code = COMMAND.replace("REGS", repr(list(regs.items())))
        done = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    rows = json.loads(done.stdout)["rows"]
    assert sum(row["size"] for row in rows) == GIB
    return int(done.stderr.split()[-1]) << 10


def _dump(folder: Path, file_size: int, run: int, mapped: int) -> tuple[Path, int, int]:
    """A sparse dump with tables for `mapped` bytes at its end: its path, the PA of the root, the tables' size."""
    memory, tables = listing.tree(mapped, run)
    size, path = tables.used[1], folder / "ram.bin"
    origin = file_size - memory.regions[0].size
    words = memory.regions[0].words[: size // 8].copy()
    listing.move(words, origin - RAM)
    with path.open("wb") as file:
        file.truncate(file_size)
        file.seek(origin)
        file.write(words.tobytes())
    return path, tables.root - RAM + origin, size


GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "translate_many": many,
    "translate": one,
    "listing": lists,
    "build": build,
    "changes": changes,
    "boot": boots,
    "memory": footprint,
}
