"""What /sys/kernel/debug/kernel_page_tables says, and in which words: markers, level names, attribute words, sizes.

Rules of this file: it turns notes (`Line`, `AddrMarker`) into text and looks at no table; the order of the rows is the
order of the words. Sources: arch/arm64/mm/ptdump.c (pte_bits, kernel_pg_levels, note_page, ptdump_init),
arch/arm64/include/asm/memory.h, pgtable.h and fixmap.h.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kernel_model.levels import U64, Fold, Levels
from kernel_model.names import Bits
from kernel_model.variants import Variant

MIB, GIB = 1 << 20, 1 << 30
STRUCT_PAGE_MAX_SHIFT = 6  # log2 of the room that vmemmap has for a struct page


class AddrMarker(NamedTuple):
    """struct addr_marker: an area of the address space begins or ends at `start_address`."""

    start_address: int
    name: str

    def __str__(self) -> str:
        return f"---[ {self.name} ]---"


class Line(NamedTuple):
    """One group: [start, end) at `level` (0 PGD to 4 PTE, -1 where nothing was noted), with the bits that are shown."""

    start: int
    end: int
    level: int
    prot: int


class PtdumpProtBits(NamedTuple):
    """struct ptdump_prot_bits: the word `set` where the masked bits are `val`, else `clear` (None: no word)."""

    mask: int
    val: int
    set: str
    clear: str | None = None


# AttrIndx of the kernel's memory types, in the order in which they are asked for (asm/memory.h, MT_*).
MEMORY_TYPES = {3: "DEVICE/nGnRnE", 4: "DEVICE/nGnRE", 2: "MEM/NORMAL-NC", 0: "MEM/NORMAL", 1: "MEM/NORMAL-TAGGED"}


def pte_bits(bits: Bits) -> tuple[PtdumpProtBits, ...]:
    """The rows of pte_bits[]: each gives one word of a line."""
    block = PtdumpProtBits(bits.TYPE, bits.TYPE, "   ", "BLK")
    if bits.variant.ptdump_block_type:
        block = _row(bits.VALID | bits.TYPE, bits.VALID, "BLK")
    one = ((bits.USER, "USR"), (bits.RDONLY, ("ro", "RW")), (bits.PXN, ("NX", "x ")), (bits.SHARED, "SHD"))
    two = ((bits.AF, "AF"), (bits.NG, "NG"), (bits.CONT, "CON"))
    types = (PtdumpProtBits(bits.ATTRINDX_MASK, bits.ATTRINDX(i), word) for i, word in MEMORY_TYPES.items())
    return (
        PtdumpProtBits(bits.VALID, bits.VALID, " ", "F"),
        *(_row(mask, mask, words) for mask, words in (*one, *two)),
        block,
        *(_row(mask, mask, words) for mask, words in ((bits.UXN, "UXN"), (bits.GP, "GP"))),
        *types,
    )


def _row(mask: int, val: int, words: str | tuple[str, str]) -> PtdumpProtBits:
    """One word stands for itself and as many spaces."""
    return PtdumpProtBits(mask, val, *((words, " " * len(words)) if isinstance(words, str) else words))


def prot_mask(rows: Iterable[PtdumpProtBits]) -> int:
    """pg_level[].mask as ptdump_initialize() makes it: a group breaks where one of these bits does."""
    mask = 0
    for row in rows:
        mask |= row.mask
    return mask


def level_name(levels: Levels, variant: Variant, level: int) -> str:
    """The name of a level; `level` is already 0 for one folded at run time, where the kernel does that."""
    if variant.ptdump_folds:
        return ("PGD", "P4D", "PUD", "PMD", "PTE")[level]
    pud, pmd = ("PUD" if levels.config_levels > 3 else "PGD"), ("PMD" if levels.config_levels > 2 else "PGD")
    return ("PGD", "P4D", pud, pmd, "PTE")[level]


def folded_to_pgd(levels: Levels, variant: Variant, level: int) -> bool:
    """Whether note_page() takes `level` for 0: mm_p4d_folded() of 1, mm_pud_folded() of 2."""
    row = {1: levels.p4d, 2: levels.pud}.get(level)
    return variant.ptdump_folds and row is not None and row.fold is not Fold.NO


def words(rows: Iterable[PtdumpProtBits], prot: int) -> str:
    """dump_prot(): a space before each word."""
    chosen = (row.set if prot & row.mask == row.val else row.clear for row in rows)
    return "".join(f" {word}" for word in chosen if word is not None)


def size(nbytes: int) -> str:
    """The size column: KiB, divided while that is exact and a greater unit exists."""
    delta, unit = nbytes >> 10, 0
    while delta % 1024 == 0 and unit < 5:
        delta, unit = delta >> 10, unit + 1
    return f"{delta:9d}{'KMGTPE'[unit]}"


def text(notes: Iterable[Line | AddrMarker], bits: Bits, levels: Levels) -> str:
    """The file's text; a line for each note."""
    rows = pte_bits(bits)
    return "".join(f"{_line(note, rows, bits, levels) if isinstance(note, Line) else note}\n" for note in notes)


def _line(note: Line, rows: tuple[PtdumpProtBits, ...], bits: Bits, levels: Levels) -> str:
    name = level_name(levels, bits.variant, note.level)
    attributes = words(rows, note.prot) if note.prot else ""
    return f"0x{note.start:016x}-0x{note.end:016x}   {size(note.end - note.start & U64)} {name}{attributes}"


# address_markers[]


def page_offset(va_bits: int) -> int:
    """_PAGE_OFFSET(): where the linear map of `va_bits` VA bits begins."""
    return -(1 << va_bits) & U64


def fixaddr_top(levels: Levels, variant: Variant) -> int:
    """FIXADDR_TOP."""
    return -8 * MIB & U64 if variant.fixmap_on_top else _vmemmap(levels, variant)[0] - 32 * MIB


def _vmemmap(levels: Levels, variant: Variant) -> tuple[int, int]:
    """VMEMMAP_START and VMEMMAP_END of the build."""
    shift = levels.page_shift - STRUCT_PAGE_MAX_SHIFT
    if variant.fixmap_on_top:
        end = -GIB & U64
        return end - (page_offset(levels.va_bits_min - 1) - page_offset(levels.config_va_bits) >> shift), end
    start = -(1 << levels.config_va_bits - shift) & U64
    return start, start + (1 << levels.va_bits_min - 1 - shift)


def address_markers(levels: Levels, variant: Variant, fixmap_start: int) -> tuple[AddrMarker, ...]:
    """address_markers[] with its end (-1, "").

    `fixmap_start`: FIXADDR_TOT_START, or FIXADDR_START where fixmap is below vmemmap: its size is a matter of the
    build's configuration (NR_CPUS among it), so it is an argument.
    """
    modules = page_offset(levels.va_bits_min - 1)
    modules_end = modules + (2 * GIB if variant.fixmap_on_top else 128 * MIB)
    areas = _vmalloc_and_above(levels, variant)
    fixmap = [("Fixmap start", fixmap_start), ("Fixmap end", fixaddr_top(levels, variant))]
    rows = [
        ("Linear Mapping start", page_offset(levels.config_va_bits)),
        ("Linear Mapping end", modules),
        ("Modules start", modules),
        ("Modules end", modules_end),
        ("vmalloc() area", modules_end),
        *(areas + fixmap if variant.fixmap_on_top else areas[:1] + fixmap + areas[1:]),
    ]
    return (*(AddrMarker(start, name) for name, start in rows), AddrMarker(U64, ""))


def _vmalloc_and_above(levels: Levels, variant: Variant) -> list[tuple[str, int]]:
    """The end of vmalloc, PCI I/O and vmemmap, by address."""
    start, end = _vmemmap(levels, variant)
    if not variant.fixmap_on_top:
        pci_end = start - 8 * MIB
        pci = [("PCI I/O start", pci_end - 16 * MIB), ("PCI I/O end", pci_end)]
        return [("vmalloc() end", start - 256 * MIB), *pci, ("vmemmap start", start), ("vmemmap end", end)]
    # The struct pages of addresses that this run has not are left out: vmemmap begins with the linear map's first.
    unused = page_offset(levels.va_bits) - page_offset(levels.config_va_bits) >> levels.page_shift
    start += unused << STRUCT_PAGE_MAX_SHIFT
    vmemmap = [("vmemmap start", start), ("vmemmap end", end)]
    pci = [("PCI I/O start", end + 8 * MIB), ("PCI I/O end", end + 24 * MIB)]
    return [("vmalloc() end", start - 8 * MIB), *vmemmap, *pci]
