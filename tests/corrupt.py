"""Corrupt tables: whatever is in RAM, walk, dump, find and audit answer, in time, and agree.

    python -m tests.corrupt --cases 200000 --jobs 2      the campaign, whose figures are in docs/tables.md

A sample is a small random tree of any granule, size and regime, and what went wrong with it: flipped bits, tables that
lead back, RAM that ends, garbage, a root anywhere. Judge: the scalar walk, address by address, against the listing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np

from emu.rowtext import RowText
from pgtable import Access, AccessType, Kind, PhysicalMemory, Registers, Walk, translate
from pgtable.audit import audit
from pgtable.features import CPUS
from pgtable.find import aliases, entries, references
from pgtable.listing import Listing, listing
from pgtable.params import Regime
from tests.pgtable.hand import PAGE_SHIFT, REGIME_EL, ROOT, STRIDE, U64, hcr, leaf, sctlr, start_level, table, tcr, tcr2

PAGES = 12  # table pages of a sample
ADDRESSES = 8  # walked in a sample
SHOWN = 300  # lines of a sample that are made
SLOW = 2.0  # seconds that no command may take on a sample
T = TypeVar("T")
SHAPES = [
    *(("4K", ia) for ia in (48, 48, 48, 48, 48, 48, 39, 39, 30, 30, 25, 25, 52, 52)),
    *(("16K", ia) for ia in (48, 47, 36, 52)),
    *(("64K", ia) for ia in (48, 42, 52)),
]
ACCESSES = (AccessType.READ, AccessType.WRITE, AccessType.FETCH, AccessType.AT_ANY)


@dataclass
class Sample:
    """Corrupt tables: memory, registers, and what was done to them."""

    memory: PhysicalMemory
    regs: Registers
    regime: Regime
    done: list[str]


@dataclass
class Figures:
    """What a campaign saw. `slowest`: seconds, by command; `failures`: the seed of each and what happened."""

    samples: int = 0
    walks: int = 0
    reached: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    slowest: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Figures) -> None:
        """Joins another's figures."""
        self.samples, self.walks = self.samples + other.samples, self.walks + other.walks
        self.reached, self.rows = self.reached + other.reached, self.rows + other.rows
        self.faults += other.faults
        self.findings += other.findings
        for name, seconds in other.slowest.items():
            self.slowest[name] = max(self.slowest.get(name, 0), seconds)
        self.failures += other.failures


def sample(seed: int) -> Sample:
    """The sample of a seed."""
    rng = random.Random(seed)
    granule, ia = rng.choice(SHAPES)
    regime = rng.choice(("EL10", "EL10", "EL10", "EL20", "EL2", "EL3"))
    page = 1 << PAGE_SHIFT[granule]
    memory = PhysicalMemory((ROOT, PAGES * page))
    made = Sample(memory, _registers(rng, granule, ia, regime), Regime(regime), [])
    start = start_level(granule, ia)
    for i in range(PAGES):
        level = min(start + i * (4 - start) // PAGES, 3)
        _fill(rng, made, granule, level, [ROOT + k * page for k in range(i + 1, PAGES)], ROOT + i * page)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        kind = rng.choice(CORRUPTIONS)
        made.done.append(kind.__name__.strip("_"))
        kind(rng, made, page)
    return made


def _registers(rng: random.Random, granule: str, ia: int, regime: str) -> Registers:
    one, el = regime in ("EL2", "EL3"), REGIME_EL[regime]
    wide = ia == 52 and granule != "64K"
    ps = rng.choice((5, 5, 2, 6)) if not wide else 6
    code = tcr(granule, ia, ps=ps, one=one, DS=int(wide), HA=rng.getrandbits(1))
    if not one:
        upper = tcr(granule, ia, ps=ps, upper=True)
        code = code & ~(0xFFFF << 16) | upper & 0xFFFF << 16
    values = {f"TCR_EL{el}": code, f"TTBR0_EL{el}": ROOT, f"SCTLR_EL{el}": sctlr(WXN=rng.getrandbits(1))}
    if not one:
        values[f"TTBR1_EL{el}"] = ROOT
    if rng.random() < 0.1 and not one:
        values[f"TCR2_EL{el}"] = tcr2(PIE=1)
        values[f"PIR_EL{el}"] = rng.getrandbits(64)
    values[f"MAIR_EL{el}"] = rng.getrandbits(64)
    features = CPUS["max"].replace(contiguous_output=bool(rng.getrandbits(1)), nt_faults=bool(rng.getrandbits(1)))
    return Registers(features, HCR_EL2=hcr(E2H=int(regime == "EL20")), **values)


def _fill(rng: random.Random, made: Sample, granule: str, level: int, below: list[int], page: int) -> None:
    """A table: runs of leaves, a few tables, the rest empty or garbage."""
    n, shift = 1 << STRIDE[granule], PAGE_SHIFT[granule] + (3 - level) * STRIDE[granule]
    words = np.zeros(n, np.uint64)
    for _ in range(3):
        at, length = rng.randrange(n), rng.randrange(1, 40)
        oa = rng.getrandbits(rng.choice((36, 44, 48))) & -(1 << shift) & (1 << 48) - 1
        plain = {"low": 3 if level == 3 else 1, "AP": rng.getrandbits(2), "AF": int(rng.random() < 0.8)}
        word = leaf(0, **plain, AttrIndx=rng.getrandbits(3), Contiguous=rng.getrandbits(1), UXN=rng.getrandbits(1))
        for i in range(min(length, n - at)):
            words[at + i] = word | (oa + (i << shift)) & (1 << 48) - 1
    for entry in rng.sample(range(n), 3) if level < 3 and below else ():
        words[entry] = table(rng.choice(below), APTable=rng.choice((0, 0, 2)), PXNTable=rng.choice((0, 0, 1)))
    if level < 3 and below:
        words[rng.choice((0, n - 1, n >> 1))] = table(below[0])
    made.memory.words(page, n)[:] = words


def _flip(rng: random.Random, made: Sample, page: int) -> None:
    """One bit of some descriptors."""
    words = made.memory.regions[0].words
    used = np.flatnonzero(words)
    for _ in range(rng.randrange(1, 20)):
        words[rng.choice(used)] ^= np.uint64(1 << rng.randrange(64))


def _loop(rng: random.Random, made: Sample, page: int) -> None:
    """Tables that lead anywhere in the pool, their own path included."""
    words = made.memory.regions[0].words
    for _ in range(rng.choice((1, 1, 3, 30))):
        words[rng.randrange(len(words))] = table(ROOT + rng.randrange(PAGES) * page)


def _self(rng: random.Random, made: Sample, page: int) -> None:
    """A table full of itself, in its first 4 KiB."""
    at = rng.randrange(made.memory.regions[0].size // page) * page
    made.memory.words(ROOT + at, 512)[:] = table(ROOT + at)


def _truncate(rng: random.Random, made: Sample, page: int) -> None:
    """RAM ends earlier."""
    size = rng.randrange(1, PAGES) * page
    size = min(size, made.memory.regions[0].size)
    shorter = PhysicalMemory((ROOT, size))
    shorter.write(ROOT, made.memory.read(ROOT, size))
    made.memory = shorter


def _garbage(rng: random.Random, made: Sample, page: int) -> None:
    """A table whose first 4 KiB are random."""
    at = rng.randrange(made.memory.regions[0].size // page) * page
    made.memory.write(ROOT + at, rng.randbytes(4096))


def _root(rng: random.Random, made: Sample, page: int) -> None:
    """A root that is anywhere."""
    name = next(n for n in made.regs.as_dict() if n.startswith("TTBR0"))
    made.regs = made.regs.replace(**{name: rng.choice((rng.getrandbits(64), ROOT + rng.randrange(1 << 16)))})


CORRUPTIONS = (*([_flip] * 8), *([_loop] * 5), _self, *([_truncate] * 5), *([_garbage] * 2), *([_root] * 2))


def check(seed: int, figures: Figures) -> None:
    """Makes the sample of `seed`, asks everything of it, and notes what happened."""
    made = sample(seed)
    figures.samples += 1
    found = _timed(figures, "dump", lambda: listing(made.memory, made.regs, regime=made.regime))
    _timed(figures, "dump's text", lambda: _text(found, seed))
    figures.rows += len(found.runs.va)
    figures.findings.update({finding.kind for finding in found.findings})
    rng, reached = random.Random(seed), False
    for va in addresses(rng, found):
        el = rng.choice((0, 1)) if made.regime is Regime.EL10 else made.regime.el
        access = Access(rng.choice(ACCESSES), el, aligned=rng.random() < 0.8)
        walked = _timed(figures, "walk", partial(_walked, made, va, access))
        figures.walks += 1
        if walked.fault:
            figures.faults[walked.fault.type.value] += 1
        reached = reached or walked.ok
        problem = disagreement(made, found, va)
        if problem:
            figures.failures.append(f"seed {seed}: {problem}")
    figures.reached += reached
    pa = int(found.runs.pa[0]) if len(found.runs.va) else ROOT
    _timed(figures, "find", lambda: (aliases(found, pa, 4096), references(made.memory, found, ROOT)))
    _timed(figures, "find --word", lambda: list(islice(entries(made.memory, found, 3, 3), SHOWN)))
    _timed(figures, "audit", lambda: audit(found, made.memory))


def _text(found: Listing, seed: int) -> list[str]:
    """Rows as `dump` prints them, some where there are very many."""
    rows = (
        found.runs
        if len(found.runs.va) <= SHOWN
        else found.runs.pick(slice(seed % 7, None, len(found.runs.va) // SHOWN))
    )
    return [*RowText(found).lines(rows), *map(str, found.findings)]


def _walked(made: Sample, va: int, access: Access) -> Walk:
    walked = translate(made.memory, made.regs, va, access, regime=made.regime)
    assert str(walked)
    return walked


def _timed(figures: Figures, name: str, do: Callable[[], T]) -> T:
    start = time.process_time()
    result = do()
    figures.slowest[name] = max(figures.slowest.get(name, 0), time.process_time() - start)
    return result


def addresses(rng: random.Random, found: Listing) -> Iterator[int]:
    """At the borders of rows, inside them, in what is wrong, and anywhere."""
    runs = found.runs
    for _ in range(ADDRESSES):
        kind = rng.randrange(4)
        if kind < 2 and len(runs.va):
            i = rng.randrange(len(runs.va))
            yield int(runs.va[i]) + rng.choice((0, int(runs.size[i]) - 1, int(runs.size[i]), -1, 0x123)) & U64
        elif kind == 2 and found.findings:
            finding = rng.choice(found.findings)
            yield finding.va + rng.randrange(max(finding.size, 1)) & U64
        else:
            yield rng.getrandbits(rng.choice((16, 30, 48, 64))) | (U64 << 52 & U64 if rng.getrandbits(1) else 0)


def disagreement(made: Sample, found: Listing, va: int) -> str:
    """What the listing says of `va` and the walk does not, "" where they agree."""
    access = Access(AccessType.AT_ANY, made.regime.el)
    walked = translate(made.memory, made.regs, va, access, regime=made.regime)
    row = found.at(va)
    if row is None:
        unlisted = any(f.kind == "not listed" and f.va <= va < f.va + f.size for f in found.findings)
        mapped = walked.ok or (len(walked.steps) and walked.steps[-1].kind in (Kind.BLOCK, Kind.PAGE))
        return f"{walked} is not listed" if mapped and not unlisted else ""
    code = int(found.runs.fault[row])
    if code:
        return "" if walked.fault and walked.fault.code == code else f"{walked} is listed as fault {code:#x}"
    pa = int(found.runs.pa[row]) + va - int(found.runs.va[row])
    return "" if walked.ok and walked.pa == pa else f"{walked} is listed at PA {pa:#x}"


def run(first: int, count: int, progress: Callable[[int], None] = lambda done: None) -> Figures:
    """The samples of the seeds from `first` on."""
    figures = Figures()
    for seed in range(first, first + count):
        try:
            check(seed, figures)
        except Exception as error:  # any at all is what this looks for
            figures.failures.append(f"seed {seed}: {type(error).__name__}: {error}")
        if (seed - first) % 100 == 99:
            progress(seed - first + 1)
    figures.failures += [f"{name} took {s:.1f} s" for name, s in figures.slowest.items() if s > SLOW]
    return figures


def _job(part: tuple[int, int]) -> Figures:
    return run(*part)


def main() -> int:
    """The campaign of the command line: figures as one JSON object; exit code 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.corrupt", description=main.__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    total, parts = Figures(), [(given.seed + i, min(500, given.cases - i)) for i in range(0, given.cases, 500)]
    with multiprocessing.Pool(given.jobs) as pool:
        for figures in pool.imap_unordered(_job, parts):
            total.add(figures)
            print(f"\r{total.samples} of {given.cases}", end="", file=sys.stderr)
    print(file=sys.stderr)
    shown = {
        "samples": total.samples,
        "walks": total.walks,
        "reached a leaf": f"{100 * total.reached / total.samples:.1f} %",
        "faults": dict(total.faults.most_common()),
        "samples with finding": dict(total.findings.most_common()),
        "rows": total.rows,
        "slowest, CPU seconds": {name: round(seconds, 3) for name, seconds in total.slowest.items()},
        "failures": total.failures[:50],
    }
    print(json.dumps(shown, indent=1))
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
