"""How cost grows with size, as two plots: `python -m benchmarks.growth [--svg FILE] [--json FILE] [--rounds N]`.

Left: 1 to 10^7 random addresses translated in a map of 1 GiB, by `translate_many`, a plain C walk and `translate` in a
loop. Right: 1 MiB to 64 GiB mapped by 4K pages: built, listed, and a million addresses translated. Nanoseconds for
each address or page, medians; the plots need matplotlib (pip install 'pgtable[bench]').
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import bulk
from benchmarks.rows import RAM, TCR, VA
from benchmarks.timing import seconds
from pgtable import Granule, PhysicalMemory, Registers, translate, translate_many
from pgtable.build import TableBuilder
from pgtable.listing import listing

ADDRESSES = [10**i for i in range(8)]
SIZES = [1 << i for i in range(20, 37, 2)]  # bytes mapped
ONE_BY_ONE = 10_000  # more addresses than that are not given to `translate`

Series = dict[str, dict[int, float]]  # name: size: nanoseconds a piece


def by_addresses(rounds: int) -> Series:
    """Cost of an address, by how many are asked for."""
    found: Series = {"translate_many": {}, "C walk": {}, "translate, one by one": {}}
    with tempfile.TemporaryDirectory() as folder:
        for n in ADDRESSES:
            m = bulk.built(Granule.K4, 1 << 30, n)
            repeat = max(1, 1000 // n)
            calls: dict[str, Any] = {
                "translate_many": lambda m=m: translate_many(m.memory, m.registers, m.va),
            }
            if shutil.which("cc"):
                calls["C walk"] = bulk.CWalk(m, folder)
            if n <= ONE_BY_ONE:
                vas = m.va.tolist()
                calls["translate, one by one"] = lambda m=m, vas=vas: [
                    translate(m.memory, m.registers, va) for va in vas
                ]
            _note(found, calls, n, repeat, rounds, n)
            print(f"{n} addresses", file=sys.stderr)
    return {name: points for name, points in found.items() if points}


def by_size(rounds: int) -> Series:
    """Cost of a page (or an address), by how many bytes are mapped."""
    found: Series = {"TableBuilder.map, a page": {}, "listing, a page": {}, "translate_many, an address": {}}
    for size in SIZES:
        pool = (size >> 9 & -4096) + (1 << 20)
        memory, n = PhysicalMemory((RAM, pool)), size >> 12
        regs = Registers(TTBR1_EL1=RAM, TCR_EL1=TCR, SCTLR_EL1=1, MAIR_EL1=0xFF)

        def build(memory: PhysicalMemory = memory, pool: int = pool, size: int = size) -> None:
            TableBuilder(memory, (RAM, pool), va_bits=48, upper=True).map(VA, 1 << 40, size, level=3)

        build()
        repeat = max(1, 4096 // n)
        _note(found, {"TableBuilder.map, a page": build}, n, repeat, rounds, size)
        _note(found, {"listing, a page": lambda m=memory, r=regs: listing(m, r)}, n, repeat, rounds, size)
        m = bulk.built(Granule.K4, size, 1_000_000)
        many = {"translate_many, an address": lambda m=m: translate_many(m.memory, m.registers, m.va)}
        _note(found, many, 1_000_000, 1, rounds, size)
        print(f"{size >> 20} MiB", file=sys.stderr)
    return found


def _note(found: Series, calls: dict[str, Any], pieces: int, repeat: int, rounds: int, at: int) -> None:
    """Medians of contenders that take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            taken = seconds(lambda call=call: [call() for _ in range(repeat)])  # type: ignore[misc]
            if i:
                times[name].append(taken * 1e9 / pieces / repeat)
    for name, figures in times.items():
        found[name][at] = median(figures)


def plot(addresses: Series, sizes: Series, path: Path) -> None:
    """Both plots as one SVG, its text as text."""
    import matplotlib  # type: ignore[import-not-found,unused-ignore]

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pgtable", "font.size": 9})
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, series, label in (
        (left, addresses, "addresses in one call (1 GiB mapped)"),
        (right, sizes, "MiB mapped by 4K pages"),
    ):
        for name, points in series.items():
            scale = 1 if axes is left else 1 << 20
            axes.plot([at / scale for at in points], list(points.values()), marker="o", markersize=3, label=name)
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ns each")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def main() -> int:
    """Measures, writes, prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--svg", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    for path in (given.svg, given.json):
        if path and not path.resolve().parent.is_dir():
            parser.error(f"{path}: there is no folder {path.resolve().parent}")
    addresses, sizes = by_addresses(given.rounds), by_size(given.rounds)
    for series in (addresses, sizes):
        for name, points in series.items():
            print(name, *(f"{at}: {ns:.2f}" for at, ns in points.items()), sep="  ")
    if given.json:
        given.json.write_text(json.dumps({"addresses": addresses, "sizes": sizes}, indent=1) + "\n")
    if given.svg:
        plot(addresses, sizes, given.svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
