"""The listing against a plain C walker on the same buffer: `python -m benchmarks.listing [--json]`; needs cc.

Each round runs both, in turn; medians and their ratio. The C walker is the obvious one: four nested loops, a run that
grows while VA, PA and attributes go on. It is compiled into a temporary folder. With `--gdb-pt-dump FOLDER`, a
checkout of that project, its parser is given the first tree once (it takes seconds), through a Machine of its kind.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.timing import seconds
from pgtable import PhysicalMemory, Registers
from pgtable.bits import Words
from pgtable.build import TableBuilder
from pgtable.listing import listing
from pgtable.memory import NoMemory

RAM = 0x4000_0000
VA = 0xFFFF_0000_0000_0000
ROUNDS = 15
C = """
#include <stdint.h>
#include <stddef.h>
#define OA 0xfffffffff000ull
typedef struct { uint64_t va, pa, size, attributes; } Run;
static Run *out, now; static size_t count; static const uint64_t *ram; static uint64_t base;
static void leaf(uint64_t va, uint64_t word, uint64_t size) {
    uint64_t pa = word & OA, attributes = word & ~OA;
    if (now.size && now.va + now.size == va && now.pa + now.size == pa && now.attributes == attributes) {
        now.size += size;
        return;
    }
    if (now.size) out[count++] = now;
    now = (Run){va, pa, size, attributes};
}
static void table(uint64_t pa, int level, uint64_t va) {
    const uint64_t *words = ram + (pa - base) / 8;
    uint64_t size = 1ull << (12 + 9 * (3 - level));
    for (int i = 0; i < 512; i++) {
        uint64_t word = words[i];
        if (!(word & 1)) continue;
        if (level == 3 || !(word & 2)) leaf(va + i * size, word, size);
        else table(word & OA, level + 1, va + i * size);
    }
}
size_t list(const uint64_t *words, uint64_t first, uint64_t root, uint64_t va, Run *runs) {
    ram = words; base = first; out = runs; count = 0; now.size = 0;
    table(root, 0, va);
    if (now.size) out[count++] = now;
    return count;
}
"""

# What is mapped by 4K pages: (name, run of pages with consecutive PAs; 0 for all).
SHAPES = (("linear", 0), ("runs of 16 pages", 16), ("scattered", 1))


def tree(size: int, run: int) -> tuple[PhysicalMemory, TableBuilder]:
    """`size` bytes mapped by pages: in one piece, or in runs whose neighbours are elsewhere."""
    pool = max(32 << 20, (size >> 9) + (8 << 20))
    memory = PhysicalMemory((RAM, pool))
    tables = TableBuilder(memory, (RAM, pool), va_bits=48, upper=True)
    tables.map(VA, 1 << 32, size, level=3, AF=1)
    if run:
        words = memory.regions[0].words
        pages = np.flatnonzero(words & np.uint64(1 << 10))
        order = np.random.default_rng(1).permutation(len(pages) // run)
        words[pages] = words[pages].reshape(-1, run)[order].reshape(-1)
    return memory, tables


def move(words: Words, by: int) -> None:
    """Table descriptors (those without AF) after the tables have been moved `by` bytes."""
    tables = words & np.uint64(1 << 10 | 3) == np.uint64(3)
    words[tables] += np.uint64(by & (1 << 64) - 1)  # it may be downwards


def plain(c: ctypes.CDLL, memory: PhysicalMemory, root: int, rows: Words) -> int:
    """The C walker's rows, and how many."""
    arguments = (memory.regions[0].address, RAM, root, VA, rows.ctypes.data)
    return int(c.list(*(ctypes.c_uint64(argument) for argument in arguments)))


def measured(size: int, run: int, c: ctypes.CDLL) -> dict[str, float]:
    """Milliseconds of both on one tree, and the ratio of the medians."""
    memory, tables = tree(size, run)
    regs = Registers(TTBR1_EL1=tables.root, TCR_EL1=0x5_B510_3510 | 1 << 7, SCTLR_EL1=1, MAIR_EL1=0xFF)
    runs = np.zeros((size >> 12, 4), np.uint64)
    count = plain(c, memory, tables.root, runs)
    contenders = {"c": lambda: plain(c, memory, tables.root, runs), "ours": lambda: listing(memory, regs)}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, do in contenders.items():
            times[name].append(1000 * seconds(do))
    found = listing(memory, regs).runs
    assert (found.va.tolist(), found.size.tolist()) == (runs[:count, 0].tolist(), runs[:count, 2].tolist())
    c_ms, ours_ms = (statistics.median(times[name]) for name in ("c", "ours"))
    return {"c_ms": c_ms, "ours_ms": ours_ms, "ratio": ours_ms / c_ms, "rows": count}


def gdb_pt_dump(folder: str, size: int) -> float:
    """Seconds of gdb-pt-dump's parser for a linear tree of `size` bytes; `folder` has a checkout of it."""
    sys.path.insert(0, folder)
    from pt.machine import Machine
    from pt.pt_aarch64_parse import PT_Aarch64_Backend

    memory, tables = tree(size, 0)
    regs = {"TTBR0_EL1": 0, "TTBR1_EL1": tables.root, "TCR_EL1": 0x5_B510_3510}

    class Buffer(Machine):  # type: ignore[misc]
        def read_register(self, name: str) -> int:
            return regs[name.replace("$", "")]

        def read_physical_memory(self, physical_address: int, length: int) -> bytes:
            try:
                return bytes(memory.read(physical_address, length))
            except NoMemory:
                return bytes(length)

    parser = PT_Aarch64_Backend(Buffer())
    options = argparse.Namespace(phys_verbose=False, ttbr0_el1=None, ttbr1_el1=None, save=False)
    found: list[object] = []
    taken = seconds(lambda: found.extend(parser.parse_tables({}, options)))
    assert found, "gdb-pt-dump finds nothing"
    return taken


def compiled(folder: str) -> ctypes.CDLL:
    """The C walker."""
    source, library = Path(folder) / "walk.c", Path(folder) / "walk.so"
    source.write_text(C)
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    c = ctypes.CDLL(str(library))
    c.list.restype = ctypes.c_size_t
    return c


def main() -> None:
    """Prints a line for each shape, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=int, default=4, help="bytes mapped, in GiB")
    parser.add_argument("--gdb-pt-dump", metavar="FOLDER", help="a checkout of gdb-pt-dump, timed too")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        c = compiled(folder)
        found = {name: measured(given.gib << 30, run, c) for name, run in SHAPES}
    if given.gdb_pt_dump:
        found["linear"]["gdb_pt_dump_ms"] = 1000 * gdb_pt_dump(given.gdb_pt_dump, given.gib << 30)
    if given.json:
        print(json.dumps(found, indent=1))
        return
    for name, row in found.items():
        times = f"C {row['c_ms']:7.2f} ms   ours {row['ours_ms']:7.2f} ms   ratio {row['ratio']:6.2f}"
        print(f"{name:18} {times}   {row['rows']} rows")
        if "gdb_pt_dump_ms" in row:
            times = f"{row['gdb_pt_dump_ms']:.0f} ms, {row['gdb_pt_dump_ms'] / row['ours_ms']:.0f} times ours"
            print(f"{'  gdb-pt-dump':18} {times}")


if __name__ == "__main__":
    main()
