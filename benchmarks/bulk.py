"""How long `translate_many` takes per address, beside a bare gather, a plain C walk and drgn, in one run.

    python -m benchmarks.bulk [--addresses N] [--rounds R] [--maps WORD] [--json FILE]

Contenders take turns, round after round; figures are medians over rounds, ratios the medians of each round's ratio, so
that a change of the machine's speed hits all alike. The gather is N random reads of an array as large as the last-level
tables; the C walk checks bits [1:0] and AF at each level and writes PA and ok; drgn makes single calls.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.timing import in_turn, ratios, seconds
from pgtable import Format, Granule, PhysicalMemory, Regime, Registers, WalkParams, translate_many
from pgtable.registers import TCR_EL1

Words = npt.NDArray[np.uint64]

BASE = 0x4000_0000  # of the tables
VA_BASE = 0xFFFF_0000_0000_0000
C_SOURCE = r"""
#include <stdint.h>
#include <stddef.h>
/* mem: the words from PA base on; PAGE_SHIFT, START and BLOCKS (a bit for each level) come from the command line. */
#define STRIDE (PAGE_SHIFT - 3)
#define MASK (((uint64_t)1 << STRIDE) - 1)
#define ADDRESS (0xffffffffffffull >> PAGE_SHIFT << PAGE_SHIFT)
void walk(const uint64_t *mem, uint64_t base, const uint64_t *va, uint64_t *pa, uint8_t *ok, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t v = va[i] & 0xffffffffffffull, table = base;
        pa[i] = 0;
        ok[i] = 0;
        for (int level = START; level < 4; level++) {
            int shift = PAGE_SHIFT + (3 - level) * STRIDE;
            uint64_t d = mem[(table - base) / 8 + (v >> shift & MASK)];
            if (!(d & 1))
                break;
            if (level < 3 && (d & 2)) {
                table = d & ADDRESS;
                continue;
            }
            if ((level == 3 ? !(d & 2) : !(BLOCKS >> level & 1)) || !(d >> 10 & 1))
                break;
            uint64_t offset = ((uint64_t)1 << shift) - 1;
            pa[i] = (d & 0xffffffffffffull & ~offset) | (v & offset);
            ok[i] = 1;
            break;
        }
    }
}
"""


class Map(NamedTuple):
    """A tree of tables in `memory`, and addresses to translate. `leaves`: the words of its last-level tables."""

    granule: Granule
    memory: PhysicalMemory
    registers: Registers
    leaves: Words
    va: Words


def built(granule: Granule, size: int, n: int, change: Callable[[Words, Words], None] | None = None) -> Map:
    """`size` bytes from VA_BASE on, mapped by pages to PA 0 on; `change(level 2 words, page words)` edits the tree."""
    fmt, entries = Format(granule), granule.entries
    counts = [max(1, size >> granule.level_shift(level - 1)) for level in range(4)]  # tables at each level
    start = 0 if granule is not Granule.K64 else 1
    counts = counts[start:]
    first = np.cumsum([0, *counts])
    memory = PhysicalMemory((BASE, int(first[-1]) * granule.page_size))
    words = memory.words(BASE, int(first[-1]) * entries)
    table = np.uint64(fmt.table(2).pack(VALID=1, TYPE=1))
    for i in range(len(counts) - 1):
        below = np.arange(counts[i + 1], dtype=np.uint64) * np.uint64(granule.page_size)
        here = words[int(first[i]) * entries :][: counts[i + 1]]
        here[:] = below + np.uint64(BASE + int(first[i + 1]) * granule.page_size) | table
    leaves = words[int(first[-2]) * entries :][: size // granule.page_size]
    leaves[:] = np.arange(len(leaves), dtype=np.uint64) << np.uint64(granule.page_shift) | leaf(fmt, 3)
    if change:
        change(words[int(first[-3]) * entries :][: counts[-1]], leaves)
    va = np.random.default_rng(1).integers(VA_BASE, VA_BASE + size, n, dtype=np.uint64)
    return Map(granule, memory, registers(granule), leaves, va)


def leaf(fmt: Format, level: int, **fields: int) -> np.uint64:
    """A leaf at output address 0: kernel data, unless `fields` say otherwise."""
    values = {"VALID": 1, "TYPE": int(level == 3), "AF": 1, "SH": 3, "UXN": 1, "PXN": 1, **fields}
    return np.uint64(fmt.leaf(level).pack(**values))


def registers(granule: Granule) -> Registers:
    """Both halves translated by the tree at BASE, 48 bits."""
    tg0 = {Granule.K4: 0, Granule.K16: 2, Granule.K64: 1}[granule]
    tg1 = {Granule.K4: 2, Granule.K16: 1, Granule.K64: 3}[granule]
    tcr = TCR_EL1.pack(T0SZ=16, T1SZ=16, TG0=tg0, TG1=tg1, IPS=5)
    return Registers(TTBR0_EL1=BASE, TTBR1_EL1=BASE, TCR_EL1=tcr, MAIR_EL1=0xFF)


def five_kinds(_: Words, leaves: Words) -> None:
    """Pages of four attributes and one hole in five, in no order."""
    kinds = [
        leaf(Format(), 3),
        leaf(Format(), 3, AP=2),
        leaf(Format(), 3, UXN=0),
        leaf(Format(), 3, PXN=0),
        np.uint64(0),
    ]
    kind = np.random.default_rng(2).integers(0, 5, len(leaves))
    plain = leaves & ~leaf(Format(), 3)
    leaves[:] = np.where(kind == 4, np.uint64(0), plain | np.array(kinds)[kind])


def blocks_and_holes(tables: Words, leaves: Words) -> None:
    """Of each four regions, one is a block, and one in eight a hole."""
    size = np.uint64(Granule.K4.level_size(2))
    tables[::4] = np.arange(0, len(tables), 4, dtype=np.uint64) * size | leaf(Format(), 2)
    tables[1::8] = 0


def all_blocks(tables: Words, leaves: Words) -> None:
    """Every region a block."""
    size = np.uint64(Granule.K4.level_size(2))
    tables[:] = np.arange(len(tables), dtype=np.uint64) * size | leaf(Format(), 2)


def far_apart(m: Map) -> Map:
    """The addresses of both halves: the tree is mapped twice, so that the VAs span all 64 bits."""
    lower = np.random.default_rng(3).random(len(m.va)) < 0.5
    return m._replace(va=np.where(lower, m.va - np.uint64(VA_BASE), m.va))


GIB = 1 << 30
MAPS: dict[str, Callable[[int], Map]] = {
    "1 GiB, 4K pages": lambda n: built(Granule.K4, GIB, n),
    "1 GiB, four attributes, 20 % holes": lambda n: built(Granule.K4, GIB, n, five_kinds),
    "1 GiB, pages, blocks, holes": lambda n: built(Granule.K4, GIB, n, blocks_and_holes),
    "1 GiB, 2M blocks": lambda n: built(Granule.K4, GIB, n, all_blocks),
    "1 GiB, 16K pages": lambda n: built(Granule.K16, GIB, n),
    "1 GiB, 64K pages": lambda n: built(Granule.K64, GIB, n),
    "1 GiB, both halves": lambda n: far_apart(built(Granule.K4, GIB, n)),
    "64 GiB, 4K pages": lambda n: built(Granule.K4, 64 * GIB, n),
    "64 GiB, pages, blocks, holes": lambda n: built(Granule.K4, 64 * GIB, n, blocks_and_holes),
    "64 GiB, 16K pages": lambda n: built(Granule.K16, 64 * GIB, n),
}


class CWalk:
    """The C walk, compiled here for a map's granule."""

    def __init__(self, m: Map, directory: str) -> None:
        self.map = m
        source, library = Path(directory, "walk.c"), Path(directory, f"walk{m.granule.label}.so")
        source.write_text(C_SOURCE)
        blocks = sum(1 << level for level in Format(m.granule, lpa=False).block_levels)
        start = WalkParams.of(m.registers, Regime.EL10, VA_BASE).start_level
        defines = [f"-DPAGE_SHIFT={m.granule.page_shift}", f"-DSTART={start}", f"-DBLOCKS={blocks}"]
        subprocess.run(["cc", "-O3", "-shared", "-fPIC", *defines, "-o", str(library), str(source)], check=True)
        self.call = ctypes.CDLL(str(library)).walk

    def __call__(self) -> tuple[Words, npt.NDArray[np.bool_]]:
        """PA and ok of each address."""
        va = self.map.va
        pa, ok = np.empty_like(va), np.empty(va.shape, np.bool_)
        memory, *arrays = (ctypes.c_void_p(a.ctypes.data) for a in (self.map.memory.regions[0].words, va, pa, ok))
        self.call(memory, ctypes.c_uint64(BASE), *arrays, ctypes.c_size_t(va.size))
        return pa, ok


def drgn_walk(m: Map) -> Callable[[], float] | None:
    """Single calls of drgn on the first addresses; the seconds that one call takes. None: it cannot be asked."""
    try:
        import drgn
        from drgn.helpers.linux import mm
    except ImportError:
        return None
    vas: list[int] = m.va[:5000].tolist()
    few = translate_many(m.memory, m.registers, m.va[:5000])
    if not few.ok.all() or min(vas) < VA_BASE:  # holes would measure its exceptions; it looks at one half
        return None
    top = 0xFFFF_8000_8000_0000
    lines = ["OSRELEASE=6.12.0", f"PAGESIZE={m.granule.page_size}", f"SYMBOL(swapper_pg_dir)={top:x}", "KERNELOFFSET=0"]
    lines += ["NUMBER(VA_BITS)=48", "NUMBER(TCR_EL1_T1SZ)=0x10", f"NUMBER(kimage_voffset)={top - BASE:#x}"]
    program = drgn.Program(drgn.Platform(drgn.Architecture.AARCH64))
    program.set_linux_kernel_custom("\n".join([*lines, f"NUMBER(PHYS_OFFSET)={BASE:#x}", ""]), False)
    region = m.memory.regions[0]
    raw = memoryview(region.buffer)
    program.add_memory_segment(BASE, region.size, lambda _, n, at, __: raw[at : at + n], physical=True)
    follow: Callable[[Any, int, int], int] = mm._linux_helper_follow_phys  # type: ignore[attr-defined]
    assert [follow(program, top, va) for va in vas] == few.pa.tolist()

    def seconds() -> float:
        start = time.perf_counter()
        for va in vas:
            follow(program, top, va)
        return (time.perf_counter() - start) / len(vas)

    return seconds


def measured(m: Map, rounds: int, directory: str) -> dict[str, list[float]]:
    """Nanoseconds per address, by contender, round after round."""
    n = m.va.size
    place = (m.va % np.uint64(len(m.leaves))).view(np.int64)
    contenders: dict[str, Callable[[], float]] = {
        "ours": lambda: per(lambda: translate_many(m.memory, m.registers, m.va), n),
        "gather": lambda: per(lambda: np.take(m.leaves, place, mode="clip"), n),
    }
    if shutil.which("cc"):
        c_walk = CWalk(m, directory)
        found, (pa, ok) = translate_many(m.memory, m.registers, m.va), c_walk()
        assert np.array_equal(found.pa, pa), "not what the C walk finds"
        assert np.array_equal(found.ok, ok)
        contenders["C"] = lambda: per(c_walk, n)
    drgn_seconds = drgn_walk(m)
    if drgn_seconds:
        contenders["drgn"] = lambda: drgn_seconds() * 1e9
    return in_turn(contenders, rounds)


def per(call: Callable[[], object], n: int) -> float:
    """Nanoseconds per address of one call."""
    return seconds(call) * 1e9 / n


def ratio(times: dict[str, list[float]], over: str, under: str) -> float | None:
    """The median of each round's ratio."""
    found = ratios(times, over, under)
    return median(found) if found else None


def line(name: str, times: dict[str, list[float]]) -> str:
    """A map's line of the table."""
    figures = [f"{median(times[c]):8.1f}" if c in times else "       -" for c in ("gather", "C", "drgn", "ours")]
    pairs = [ratio(times, "ours", "C"), ratio(times, "ours", "gather"), ratio(times, "drgn", "ours")]
    spread = f"{min(times['ours']):.1f}..{max(times['ours']):.1f}"
    return (
        f"{name:36}" + "".join(figures) + f"  {spread:>14}" + "".join(f"{r:9.2f}" if r else "        -" for r in pairs)
    )


def main() -> int:
    """Measures the maps asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--addresses", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--maps", default="", help="only maps whose name has this in it")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        print(f"{options.addresses} random addresses, {options.rounds} rounds, ns per address (median)")
        print(f"{'':36}  gather       C    drgn    ours      min..max   ours/C ours/gat drgn/ours")
        for name, make in MAPS.items():
            if options.maps in name:
                results[name] = measured(make(options.addresses), options.rounds, directory)
                print(line(name, results[name]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
