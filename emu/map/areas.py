"""The areas of an address space: its halves and, of a Linux kernel, what each part is for.

Rules of this file: areas are a partition in VA order. A Linux area begins where the kernel's own address_markers[] in
RAM says; a kernel without (no ptdump in debugfs, or not booted) gets the build's, and its fixmap, whose size is a
matter of the configuration, begins at the first range that nothing else claims.
Sources: arch/arm64/mm/ptdump.c (address_markers), include/asm-generic/sections.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from emu.context import AREAS, SECTIONS
from emu.image import KernelImage
from emu.linux_dump import LinuxTables
from emu.sources import Source
from pgtable.listing import Listing
from pgtable.params import WalkParams
from pgtable.tree import all_halves

END = 1 << 64


class Area(NamedTuple):
    """VAs [start, end); `name` is "" where there is nothing to say."""

    start: int
    end: int
    name: str


class Half(NamedTuple):
    """A half of a regime's VA space, [start, end): what it is called, and why it is off, "" if it is not."""

    start: int
    end: int
    name: str
    off: str


def halves(listing: Listing) -> list[Half]:
    """The lower half and, where the regime has one, the upper."""
    return [_half(p) for p in all_halves(listing.regs, listing.regime)]


def _half(p: WalkParams) -> Half:
    end = END if p.upper else 1 << p.ia_bits
    return Half(
        p.half_base, end, f"{'upper' if p.upper else 'lower'} half, TTBR{int(p.upper)}_EL{p.regime.el}", p.why_off
    )


def areas(source: Source, listing: Listing) -> list[Area]:
    """The whole VA space in parts: Linux's where the source has an image, else the halves."""
    found = halves(listing)
    starts = {0: ""} | {half.end: "" for half in found if half.end < END} | {half.start: half.name for half in found}
    starts[0] = found[0].name
    if source.image and len(found) == 2 and not found[1].off:
        starts[0] = "user space"
        starts |= {max(start, found[1].start): name for start, name in _linux(source, source.image, listing)}
    borders = sorted(starts)
    return [Area(a, b, starts[a]) for a, b in zip(borders, [*borders[1:], END], strict=True)]


def _linux(source: Source, image: KernelImage, listing: Listing) -> Iterator[tuple[int, str]]:
    tables = LinuxTables.of(source.memory, listing.regs, image)
    marks = tables.own_markers or tables.markers
    starts = {mark.name: mark.start_address for mark in marks if mark.start_address < END - 1}
    if not tables.own_markers:
        starts["Fixmap start"] = _fixmap(starts, listing)
    yield from ((start, AREAS.get(name, "")) for name, start in starts.items())
    sections = dict(SECTIONS) if "_sdata" in source.symbols else SECTIONS | {"__init_begin": "kernel init and data"}
    yield from ((source.symbols[name], title) for name, title in sections.items() if name in source.symbols)


def _fixmap(starts: dict[str, int], listing: Listing) -> int:
    """Where fixmap begins if what is mapped between the area before and the usual 4 MiB is its too."""
    usual = starts["Fixmap start"]
    before = max(start for start in starts.values() if start < usual)
    vas: list[int] = listing.runs.va.tolist()
    return min([usual, *(va for va in vas if before <= va < usual)])
