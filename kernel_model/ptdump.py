"""mm/ptdump.c and arch/arm64/mm/ptdump.c: what a dump of the kernel's page tables says, and the W^X check.

Rules of this file:
- A note is made for every leaf, every PTE and every hole; a group of notes with equal bits and level becomes one line.
  What is none of the three (a non-present entry that is not 0, above the last level) is in no note: the group before
  it grows over it.
- The callbacks ask for CONTINUE on a leaf, as the kernel's do. A walk of bad top-level entries clears them (pagewalk).
- get_online_mems() and mmap_write_lock() are not modelled: a dump holds both from its first entry to its last.
- A PTE is read by ptep_get() or ptep_get_lockless(): in a contiguous run AF and dirty of one are those of all.
- KASAN's shadow (one note for a table page) is not modelled.
Sources: mm/ptdump.c ptdump_walk_pgd and the entries, arch/arm64/mm/ptdump.c note_page, note_page_flush, ptdump_walk,
ptdump_check_wx.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kernel_model import contpte
from kernel_model.levels import U64
from kernel_model.mm import Kernel
from kernel_model.pagewalk import Action, MmWalk, MmWalkOps, walk_pgd_range
from kernel_model.ptdump_text import (
    AddrMarker,
    Line,
    folded_to_pgd,
    page_offset,
    prot_mask,
    pte_bits,
    text,
)

NO_LEVEL = -1


class Insecure(NamedTuple):
    """A WARN_ONCE of the W^X check: the function that has it, and the address where the group begins."""

    function: str
    address: int


class WxCount(NamedTuple):
    """What ptdump_check_wx() counts: pages writable and executable at EL1, pages without UXN, and the first of each."""

    wx: int
    uxn: int
    first: tuple[Insecure, ...] = ()

    @property
    def passed(self) -> bool:
        """The verdict, which newer kernels return."""
        return not self.wx and not self.uxn


@dataclass
class PtdumpPgState:
    """struct ptdump_pg_state. `notes` is what goes to the seq_file; `mm`: a level folded at run time is named PGD."""

    kernel: Kernel
    markers: Sequence[AddrMarker]
    end_address: int
    mm: bool = True
    check_wx: bool = False
    marker: int = 0
    start_address: int = 0
    level: int = NO_LEVEL
    current_prot: int = 0
    wx_pages: int = 0
    uxn_pages: int = 0
    mask: int = 0
    folded: frozenset[int] = frozenset()
    notes: list[Line | AddrMarker] = field(default_factory=list)
    first: list[Insecure] = field(default_factory=list)

    def __post_init__(self) -> None:
        kernel = self.kernel
        self.mask = prot_mask(pte_bits(kernel.bits))
        self.folded = frozenset(n for n in range(5) if self.mm and folded_to_pgd(kernel.levels, kernel.variant, n))


def ptdump_walk(kernel: Kernel, markers: Sequence[AddrMarker], *, mm_named: bool = True, base: int) -> str:
    """ptdump_walk(): the text of a dump of `kernel.pgd`'s tree, byte for byte.

    `markers`: with an end marker at ~0 behind the last (`address_markers`). `base`: the first VA of the dump; of a
    lower half it goes to TASK_SIZE_64, else to the end. `mm_named`: struct ptdump_info has an mm, as it always has.
    """
    return text(ptdump_notes(kernel, markers, mm_named=mm_named, base=base), kernel.bits, kernel.levels)


def ptdump_notes(
    kernel: Kernel, markers: Sequence[AddrMarker], *, mm_named: bool = True, base: int
) -> list[Line | AddrMarker]:
    """The lines and markers of `ptdump_walk`, in order, before they become text.

    Raises Runaway where the kernel would not come back (contpte.ptep_get_lockless).
    """
    st = ptdump_state(kernel, markers, mm_named=mm_named, base=base)
    ptdump_walk_pgd(st, base, st.end_address)
    return st.notes


def ptdump_state(kernel: Kernel, markers: Sequence[AddrMarker], *, mm_named: bool = True, base: int) -> PtdumpPgState:
    """The state that ptdump_walk() starts with; what has been noted is in it, also when the walk runs away."""
    task_size_64 = 1 << kernel.levels.va_bits
    return PtdumpPgState(kernel, markers, task_size_64 if base < task_size_64 else U64, mm=mm_named)


def check_wx(kernel: Kernel) -> WxCount:
    """ptdump_check_wx() of a kernel that has warned of nothing yet: WARN_ONCE fires once for each kind."""
    st = PtdumpPgState(kernel, (AddrMarker(0, ""), AddrMarker(U64, "")), U64, mm=False, check_wx=True)
    ptdump_walk_pgd(st, page_offset(kernel.levels.va_bits), U64)
    return WxCount(st.wx_pages, st.uxn_pages, tuple(st.first))


def ptdump_walk_pgd(st: PtdumpPgState, start: int, end: int) -> None:
    """ptdump_walk_pgd() over one range, [start, end), and the flush of the last group."""
    ops = MmWalkOps(
        ptdump_pgd_entry, ptdump_p4d_entry, ptdump_pud_entry, ptdump_pmd_entry, ptdump_pte_entry, ptdump_hole
    )
    if start != end:
        walk_pgd_range(start, end, MmWalk(st.kernel, ops, private=st))
    note_page_flush(st)


def ptdump_pgd_entry(pgd: int, addr: int, next: int, walk: MmWalk) -> int:
    """ptdump_pgd_entry(): arm64 has no leaf so high."""
    return 0


def ptdump_p4d_entry(p4d: int, addr: int, next: int, walk: MmWalk) -> int:
    """ptdump_p4d_entry(): nor here."""
    return 0


def ptdump_pud_entry(pud: int, addr: int, next: int, walk: MmWalk) -> int:
    """ptdump_pud_entry()."""
    value = walk.kernel.read(pud)
    return _leaf(walk, addr, 2, value) if walk.kernel.bits.pud_leaf(value) else 0


def ptdump_pmd_entry(pmd: int, addr: int, next: int, walk: MmWalk) -> int:
    """ptdump_pmd_entry()."""
    value = walk.kernel.read(pmd)
    return _leaf(walk, addr, 3, value) if walk.kernel.bits.pmd_leaf(value) else 0


def _leaf(walk: MmWalk, addr: int, level: int, value: int) -> int:
    note_page(walk.private, addr, level, value)
    walk.action = Action.CONTINUE
    return 0


def ptdump_pte_entry(pte: int, addr: int, next: int, walk: MmWalk) -> int:
    """ptdump_pte_entry(): every PTE is noted, none or not."""
    get = contpte.ptep_get_lockless if walk.kernel.variant.ptdump_lockless else contpte.ptep_get
    note_page(walk.private, addr, 4, get(walk.kernel, pte))
    return 0


def ptdump_hole(addr: int, next: int, depth: int, walk: MmWalk) -> int:
    """ptdump_hole()."""
    note_page(walk.private, addr, depth, 0)
    return 0


def note_page(st: PtdumpPgState, addr: int, level: int, val: int) -> None:
    """note_page(): a group ends where bits or level change, or where a marker is reached."""
    level = 0 if level in st.folded else level
    prot = val & st.mask if level >= 0 else 0
    if st.level == NO_LEVEL:
        st.level, st.current_prot, st.start_address = level, prot, addr
        st.notes.append(st.markers[0])
    elif prot != st.current_prot or level != st.level or addr >= st.markers[st.marker + 1].start_address:
        _end_group(st, addr)
        st.start_address, st.current_prot, st.level = addr, prot, level
    _pass_marker(st, addr)


def _end_group(st: PtdumpPgState, addr: int) -> None:
    if st.current_prot:
        note_prot_uxn(st, addr)
        note_prot_wx(st, addr)
    st.notes.append(Line(st.start_address, addr, st.level, st.current_prot))
    _pass_marker(st, addr)


def _pass_marker(st: PtdumpPgState, addr: int) -> None:
    """One marker, if it is reached: after a group and after its note, so that two at one address both appear."""
    if addr >= st.markers[st.marker + 1].start_address:
        st.marker += 1
        st.notes.append(st.markers[st.marker])


def note_page_flush(st: PtdumpPgState) -> None:
    """The last group's end: 0 for ~0, or where the range ends (note_page_flush(); before it, always 0)."""
    ends = st.kernel.variant.ptdump_ends and st.end_address != U64
    note_page(st, st.end_address if ends else 0, NO_LEVEL, 0)


def note_prot_wx(st: PtdumpPgState, addr: int) -> None:
    """note_prot_wx(): writable and executable at EL1; whether the group is valid is not asked."""
    bits = st.kernel.bits
    if st.check_wx and not st.current_prot & (bits.RDONLY | bits.PXN):
        _warn_once(st, "note_prot_wx")
        st.wx_pages += _pages(st, addr)


def note_prot_uxn(st: PtdumpPgState, addr: int) -> None:
    """note_prot_uxn(): EL0 may execute it."""
    if st.check_wx and not st.current_prot & st.kernel.bits.UXN:
        _warn_once(st, "note_prot_uxn")
        st.uxn_pages += _pages(st, addr)


def _pages(st: PtdumpPgState, addr: int) -> int:
    return (addr - st.start_address & U64) >> st.kernel.levels.page_shift


def _warn_once(st: PtdumpPgState, function: str) -> None:
    if all(found.function != function for found in st.first):
        st.first.append(Insecure(function, st.start_address))
        st.kernel.warn(function)
