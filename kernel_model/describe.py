"""A descriptor in Linux's words: names of its bits, what kind of entry it is, its protection, its line in ptdump.

Rules of this file:
- `describe` adds to an Explanation of pgtable; the bits are `names.Bits`, the only bit numbers here are those of swap
  entries, which hardware does not look at.
Sources: arch/arm64/include/asm/pgtable-hwdef.h, pgtable-prot.h, pgtable.h (swap entries), include/linux/swap.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kernel_model.names import Bits
from kernel_model.ptdump_text import prot_mask, pte_bits, words
from kernel_model.variants import Variant
from pgtable.bits import Layout, bits, ignored
from pgtable.describe import Explanation, FieldText, Place, meaning
from pgtable.descriptors import LAST_LEVEL, Format, Granule, Kind
from pgtable.findings import LOWEST_LEVEL, Finding

# The last swap types, as Debian configures the kernels (no DEVICE_PRIVATE).
SWAP_TYPES = {27: "hwpoison", 28: "migration, read", 29: "migration, read, exclusive", 30: "migration, write"}
SWAP_TYPES |= {31: "PTE marker"}
_PRESENT = bits("present", 1, 0, "must be 0")
_EXCLUSIVE = bits("exclusive", 2, doc="the anonymous page was this process's alone (PTE_SWP_EXCLUSIVE)")
SWAP = Layout(
    "swap entry",
    (
        _PRESENT,
        _EXCLUSIVE,
        bits("uffd-wp", 3, doc="userfaultfd write protection (PTE_SWP_UFFD_WP)"),
        ignored(5, 4),
        bits("type", 10, 6, "swap file, or a kind of its own", SWAP_TYPES),
        bits("present-invalid", 11, doc="must be 0 (PTE_PRESENT_INVALID)"),
        bits("offset", 61, 12, "slot in the swap file; for a migration the page's PFN"),
        ignored(63, 62),
    ),
)
# Of kernels without PTE_PRESENT_INVALID.
SWAP_6_1 = Layout(
    "swap entry",
    (
        _PRESENT,
        _EXCLUSIVE,
        bits("type", 7, 3, "swap file, or a kind of its own", SWAP_TYPES),
        bits("offset", 57, 8, "slot in the swap file; for a migration the page's PFN"),
        bits("prot-none", 58, doc="must be 0 (PTE_PROT_NONE)"),
        ignored(63, 59),
    ),
)

MEMORY_TYPES = ("MT_NORMAL", "MT_NORMAL_TAGGED", "MT_NORMAL_NC", "MT_DEVICE_nGnRnE", "MT_DEVICE_nGnRE")
LEVELS = {3: "PTE", 2: "PMD", 1: "PUD", 0: "P4D", -1: "PGD"}


def level_name(place: Place, b: Bits) -> str:
    """PTE to PGD; the root of Debian's builds is the PGD (for 52 bits where the kernel can, else for 48)."""
    five = place.granule is Granule.K4 and b.variant.addr_high
    return "PGD" if place.level == LOWEST_LEVEL[place.granule] - five else LEVELS[place.level]


def describe(found: Explanation, variant: Variant) -> Explanation:
    """`found` with Linux's names, facts and findings; raises ValueError where Linux has none (stage 2, EL2, EL3)."""
    place = found.place
    if place is None or place.stage == 2 or not place.regime.has_el0:
        raise ValueError("Linux names the descriptors of its own tables only: stage 1 of EL1&0 and EL2&0")
    b = Bits.of(Format(place.granule, place.ds), variant)
    word = found.word
    if is_swap(word, place, b):
        return _swap(found, SWAP_6_1 if variant.prot_none_58 else SWAP)
    names = dict(named_bits(word, place, b))
    fields = tuple(
        row._replace(linux=tuple(name for name, mask in names.items() if mask & row.field.mask)) for row in found.fields
    )
    facts = dict(found.facts) | {"Linux": entry(word, place, b)}
    if place.kind is not Kind.TABLE:
        facts |= {"prot": name} if (name := protection(word, b)) else {}
        rows = pte_bits(b)
        facts |= {"ptdump": " ".join(words(rows, word).split())} if word & prot_mask(rows) else {}
    findings = (*found.findings, *_findings(word, place, b))
    return replace(found, fields=fields, facts=facts, findings=findings)


def is_swap(word: int, place: Place, b: Bits) -> bool:
    """is_swap_pte(): neither none nor present, nor a valid kernel entry whose VALID bit was cleared.

    The last has bits that no swap entry reaches: UXN and the dirty bit.
    """
    gone = word and not b.pte_present(word) and not word & (b.VALID | b.TYPE)
    return bool(gone and place.level >= LAST_LEVEL - 1 and not word & (b.UXN | b.DIRTY))


def named_bits(word: int, place: Place, b: Bits) -> Iterator[tuple[str, int]]:
    """(Linux's name, mask) of the bits that are set."""
    if place.kind is Kind.TABLE:
        yield from _table_bits(word, place, b)
        return
    level = level_name(place, b)
    kinds = {3: ("PTE_TYPE_PAGE", b.TYPE)}.get(place.level, (f"{level}_TYPE_SECT", b.VALID))
    rows = [
        ("PTE_VALID", b.VALID),
        *([kinds] if word & b.VALID and place.kind is not Kind.INVALID else []),
        ("PTE_USER", b.USER),
        ("PTE_RDONLY", b.RDONLY),
        *([("PTE_SHARED", b.SHARED)] if "SH" in b.leaf else []),
        ("PTE_AF", b.AF),
        ("PTE_PRESENT_INVALID" if b.pte_present_invalid(word) else "PTE_NG", b.NG),
        ("PTE_GP", b.GP),
        ("PTE_WRITE", b.WRITE),
        ("PTE_CONT", b.CONT),
        ("PTE_PXN", b.PXN),
        ("PTE_UXN", b.UXN),
        *_software_bits(word, b),
    ]
    index = b.leaf["AttrIndx"].get(word)
    if word and index < len(MEMORY_TYPES):
        yield f"PTE_ATTRINDX({MEMORY_TYPES[index]})", b.ATTRINDX_MASK
    yield from ((name, mask) for name, mask in rows if word & mask == mask)


def _software_bits(word: int, b: Bits) -> Iterator[tuple[str, int]]:
    software = b.leaf["IGNORED_58_55"]
    yield "PTE_DIRTY", b.DIRTY
    yield "PTE_SPECIAL", b.SPECIAL
    if b.variant.devmap:
        yield "PTE_DEVMAP", software.put(0, 4)
    if b.variant.prot_none_58:
        if not word & b.VALID:
            yield "PTE_PROT_NONE", b.PROT_NONE
            yield "PMD_PRESENT_INVALID", b.PMD_PRESENT_INVALID
        return
    yield "PTE_UFFD_WP" if b.variant.devmap else "PTE_UFFD", software.put(0, 8)
    overlay = b.leaf["IGNORED_62_60"]
    yield from ((f"PTE_PO_IDX_{i}", overlay.put(0, 1 << i)) for i in range(3))


def _table_bits(word: int, place: Place, b: Bits) -> Iterator[tuple[str, int]]:
    level, table = level_name(place, b), b.table
    rows = {"PXN": table["PXNTable"].mask, "UXN": table["UXNTable"].mask, "AF": table["AF"].mask}
    yield f"{level}_TYPE_TABLE", b.TYPE | b.VALID
    yield from ((f"{level}_TABLE_{name}", mask) for name, mask in rows.items() if word & mask)


def entry(word: int, place: Place, b: Bits) -> str:
    """What kind of entry it is, and which of Linux's predicates hold."""
    level = level_name(place, b).lower()
    if not word:
        return f"{level}_none"
    if place.kind is Kind.TABLE:
        return f"a table: {level}_present, {level}_table"
    if b.pte_valid(word):
        return ", ".join([f"{level}_present", f"{level}_valid", *_predicates(word, b, level)])
    if place.level < LAST_LEVEL and b.variant.prot_none_58 and word & b.PMD_PRESENT_INVALID:
        return ", ".join([f"{level}_present (PMD_PRESENT_INVALID)", *_predicates(word, b, level)])
    if b.pte_present(word):
        why = "PTE_PROT_NONE" if b.variant.prot_none_58 else "PTE_PRESENT_INVALID"
        return ", ".join([f"{level}_present ({why}), not {level}_valid", *_predicates(word, b, level)])
    return f"neither {level}_none nor {level}_present"


def _predicates(word: int, b: Bits, level: str) -> Iterator[str]:
    write, read_only = bool(word & b.WRITE), bool(word & b.RDONLY)
    rows = {
        "young": word & b.AF,
        "write": write,
        "dirty": word & b.DIRTY or (write and not read_only),
        "special": word & b.SPECIAL,
        "cont": word & b.CONT,
        "user_exec": not word & b.UXN,
        "devmap": b.devmap(word),
    }
    yield from (f"{level}_{name}" for name, holds in rows.items() if holds)


def protection(word: int, b: Bits) -> str:
    """The protection that an entry has, by its name in Linux; "" for another one."""
    invalid = not b.pte_valid(word)
    valid = word | b.VALID | b.TYPE
    plain = valid & ~(b.leaf["OA"].mask | b.CONT | b.NG | b.SPECIAL | b.GP)
    for name, value in _kernel_protections(b).items():
        if plain == value:
            more = [said for said, mask in (("PTE_NG", b.NG), ("PTE_CONT", b.CONT), ("PTE_GP", b.GP)) if word & mask]
            more = [said for said in more if not (invalid and said == "PTE_NG")]
            return name + "".join(f" | {said}" for said in more) + (", made invalid" if invalid else "")
    changing = b.AF | b.DIRTY | (b.RDONLY if word & b.WRITE else 0)
    for name, value in _user_protections(b).items():
        if plain & ~changing == value & ~changing and word & b.NG:
            return f"PAGE_NONE, or {name} under NUMA balancing" if invalid else f"like {name}"
    return ""


def _kernel_protections(b: Bits) -> dict[str, int]:
    """PAGE_KERNEL and its kin without PTE_NG."""
    shared = b.SHARED if "SH" in b.leaf else 0
    default = b.VALID | b.TYPE | b.AF | shared
    normal = default | b.PXN | b.UXN | b.WRITE
    kernel, read_only = normal | b.DIRTY, normal & ~b.WRITE | b.DIRTY | b.RDONLY
    return {
        "PAGE_KERNEL": kernel,
        "PAGE_KERNEL_RO": read_only,
        "PAGE_KERNEL_ROX": read_only & ~b.PXN,
        "PAGE_KERNEL_EXEC": kernel & ~b.PXN,
        "PAGE_KERNEL_TAGGED": kernel | b.ATTRINDX(1),
        "PAGE_KERNEL_RO, tagged": read_only | b.ATTRINDX(1),
        "PROT_NORMAL_NC": normal | b.ATTRINDX(2),
        "PROT_DEVICE_nGnRnE": normal | b.ATTRINDX(3),
        "PROT_DEVICE_nGnRE": normal | b.ATTRINDX(4),
    }


def _user_protections(b: Bits) -> dict[str, int]:
    """PAGE_SHARED and its kin without PTE_NG; AF, dirty and, where it is writable, PTE_RDONLY come and go."""
    shared = b.SHARED if "SH" in b.leaf else 0
    default = b.VALID | b.TYPE | b.AF | shared | b.PXN | b.RDONLY
    return {
        "PAGE_SHARED": default | b.USER | b.UXN | b.WRITE,
        "PAGE_SHARED_EXEC": default | b.USER | b.WRITE,
        "PAGE_READONLY": default | b.USER | b.UXN,
        "PAGE_READONLY_EXEC": default | b.USER,
        "PAGE_EXECONLY": default,
        "PAGE_NONE": default | b.UXN,
    }


def _swap(found: Explanation, layout: Layout) -> Explanation:
    """The word as a swap entry."""
    rows = tuple(FieldText(f, f.get(found.word), meaning(f, f.get(found.word))) for f in layout)
    view = layout.view(found.word)
    kind = SWAP_TYPES.get(view.type)
    said = f"{kind}: " if kind else f"swap file {view.type}, "
    said += f"PFN {_pfn(view.offset):#x}" if kind and kind.startswith("migration") else f"offset {view.offset:#x}"
    facts = dict(found.facts) | {"Linux": f"a swap entry: {said}; pte_present is false"}
    return replace(found, layout=layout, fields=rows, facts=facts, title=found.title.replace("invalid", "swap entry"))


def _pfn(offset: int) -> int:
    """swp_offset_pfn() on Debian's kernels: above the PFN are the young and dirty bits of the page."""
    return offset & (1 << SWP_PFN_BITS) - 1


SWP_PFN_BITS = 52 - 12


def _findings(word: int, place: Place, b: Bits) -> Iterator[Finding]:
    if place.kind is Kind.TABLE:
        return
    dirty, write, read_only = (bool(word & mask) for mask in (b.DIRTY, b.WRITE, b.RDONLY))
    if b.pte_valid(word):
        if not write and not read_only:
            yield Finding(
                "suspicious", "AP", "PTE_RDONLY and PTE_WRITE are both 0: hardware allows writes, pte_write() says no"
            )
        if write and read_only and dirty:
            text = "PTE_WRITE, PTE_RDONLY and PTE_DIRTY at once: pte_mkdirty() would have cleared PTE_RDONLY"
            yield Finding("suspicious", "DBM", text)
    elif b.pte_present_invalid(word):
        text = "PTE_PRESENT_INVALID: mprotect(PROT_NONE), NUMA balancing, a block being changed"
        more = ", or set_memory_valid(..., 0)" if b.variant.invalid_keeps_present else ""
        yield Finding("note", "nG", f"{text}{more}")
    elif word and not b.pte_present(word):
        text = "only VALID was cleared: set_memory_valid(..., 0) of kernels that do not mark with PTE_PRESENT_INVALID"
        yield Finding("note", "VALID", f"neither none nor present; {text}")
