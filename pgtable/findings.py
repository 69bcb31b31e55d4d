"""What looks wrong in a descriptor, and why: rules over one word, by its layout and the hardware model.

Rules of this file:
- `fault`: an access faults. `wrong`: the architecture forbids it or reserves it. `suspicious`: legal, and seldom what
  was meant. `note`: not wrong, but easily misread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from pgtable.attributes import MemoryAttributes, is_device
from pgtable.descriptors import AP_READ_ONLY, CONTIGUOUS_RUN, LAST_LEVEL, Format, Granule, Kind
from pgtable.params import Regime, WalkParams
from pgtable.permissions import PRIVILEGED, PW, PX, UR, UW, UX
from pgtable.walk import leaf_permissions


class Finding(NamedTuple):
    """One thing to know about a word: its kind (see the file's rules), the field, a sentence."""

    kind: str
    field: str
    text: str


def size_text(size: int) -> str:
    """Bytes with the largest unit that divides them: `4K`, `33216K`, `512G`, `1B`."""
    unit = 0
    while size and not size % 1024 and unit < len(_UNITS) - 1:
        size, unit = size // 1024, unit + 1
    return f"{size}{_UNITS[unit]}"


_UNITS = "BKMGTPE"


def descriptor_findings(
    word: int, level: int, p: WalkParams, fmt: Format, va: int | None, inherited: int
) -> Iterator[Finding]:
    """The findings about a descriptor at `level`; `fmt` is a stage 2 format, or that of `p`; `va`: where it is used.

    `inherited`: the attributes of the tables above it.
    """
    kind, layout = fmt.kind(word, level), fmt.layout(word, level)
    yield from _type(word, level, fmt, kind)
    if kind is Kind.INVALID and not word & 1:
        return  # hardware looks at no other bit
    for field in layout.misuse(word):
        yield _reserved(field.name, field.bits, field.reserved, level, fmt, kind)
    if kind is Kind.TABLE:
        yield from _table(word, p, fmt)
        return
    yield from _address(word, level, p, fmt, va)
    yield from _flags(word, level, fmt, p)
    if not fmt.stage2:
        yield from _permissions(word, p, inherited)


def _type(word: int, level: int, fmt: Format, kind: Kind) -> Iterator[Finding]:
    if not word & 1:
        if word:
            text = f"VALID is 0: translation fault at level {level}; bits 63:1 are software's, hardware ignores them"
        else:
            text = f"all bits are 0: nothing is mapped; translation fault at level {level}"
        yield Finding("fault", "VALID", text)
    elif kind is Kind.INVALID and level == LAST_LEVEL:
        text = "bits [1:0] = 0b01 are reserved at level 3 (a page has 0b11): translation fault, level 3"
        yield Finding("wrong", "TYPE", text)
    elif kind is Kind.INVALID:
        legal = ", ".join(str(n) for n in sorted(fmt.block_levels))
        wide = replace(fmt, ds=True)
        hint = "; with DS=1 (LPA2) it has" if level in wide.block_levels else ""
        text = f"a block at level {level}, which has none with this granule (blocks: level {legal}){hint}"
        yield Finding("wrong", "TYPE", f"{text}: translation fault, level {level}")


def _reserved(name: str, bits: str, what: str, level: int, fmt: Format, kind: Kind) -> Finding:
    if what == "RES1":
        return Finding("wrong", name, f"bit {bits} must be 1")
    low = int(bits.partition(":")[2] or bits)
    if low == 48 and kind is not Kind.INVALID:
        text = f"bits {bits} are set: an address beyond 48 bits needs DS=1 (LPA2); here they are RES0 and ignored"
        return Finding("wrong", name, text)
    if kind is Kind.BLOCK and low < fmt.granule.level_shift(level):
        size = size_text(fmt.granule.level_size(level))
        return Finding("wrong", name, f"bits {bits} are set: a {size} block must be at an address aligned to {size}")
    return Finding("wrong", name, f"bit{'s' if ':' in bits else ''} {bits} must be 0 here")


def _table(word: int, p: WalkParams, fmt: Format) -> Iterator[Finding]:
    table = fmt.table(LAST_LEVEL - 1)
    address = table["TA"].get(word)
    if not address:
        yield Finding("suspicious", "TA", "the next table is at PA 0")
    if address & p.over:
        yield Finding("fault", "TA", f"address size fault: {address:#x} has more than {p.ps_bits} bits")
    software = sum(f.mask for f in table if f.reserved == "IGNORED")
    if word & software:
        text = f"bits that hardware ignores in a table are set ({word & software:#x}): is this a page of level 3?"
        yield Finding("note", "TYPE", text)


def _address(word: int, level: int, p: WalkParams, fmt: Format, va: int | None) -> Iterator[Finding]:
    leaf, granule = fmt.leaf(level), fmt.granule
    oa, size = leaf["OA"].get(word), granule.level_size(level)
    if oa & p.over:
        yield Finding("fault", "OA", f"address size fault: {oa:#x} has more than {p.ps_bits} bits")
    if fmt.lpa2 and oa >> 50 == 3:
        text = "OA[51:50] = 0b11: with DS=0 these bits 9:8 are SH, inner shareable; was the word written for DS=1?"
        yield Finding("suspicious", "OA", text)
    if not word & leaf["Contiguous"].mask:
        return
    run = CONTIGUOUS_RUN[granule].get(level)
    if run is None:
        yield Finding(
            "wrong", "Contiguous", f"there is no contiguous run at level {level} with the {granule.label} granule"
        )
        return
    number, base, extent = oa // size % run, oa & -(size * run), size_text(size * run)
    if va is None:
        text = f"contiguous: this must be entry {number} of {run} with the same attributes, which map {extent}"
        yield Finding("note", "Contiguous", f"{text} from PA {base:#x}")
    elif va // size % run != number:
        text = f"contiguous run is misaligned: VA and PA must be equal modulo {extent}"
        yield Finding("wrong", "Contiguous", f"{text}, but the VA has entry {va // size % run} and the PA {number}")


def _flags(word: int, level: int, fmt: Format, p: WalkParams) -> Iterator[Finding]:
    leaf = fmt.leaf(level)
    if not leaf["AF"].get(word) and fmt.stage2:
        yield Finding("fault", "AF", "AF is 0: access flag fault of stage 2, or hardware sets it (VTCR_EL2.HA)")
    elif not leaf["AF"].get(word):
        ha = "HA=1: hardware sets it at the first access" if p.ha else "HA=0: access flag fault at the first access"
        yield Finding("note" if p.ha else "fault", "AF", f"AF is 0; with {ha}")
    if "SH" in leaf and leaf["SH"].get(word) == 1:
        yield Finding("wrong", "SH", "SH = 0b01 is reserved: the CPU may take it for any shareability")
    if "nT" in leaf and leaf["nT"].get(word):
        yield Finding(
            "suspicious", "nT", "nT is 1: the block is being changed; accesses may fault (FEAT_BBM level 1, 2)"
        )
    if fmt.stage2:
        yield from _stage2(word, level, fmt)
        return
    if leaf["NS"].get(word) and not p.secure:
        yield Finding("note", "NS", "NS has no effect outside Secure state")
    if p.regime in (Regime.EL2, Regime.EL3) and leaf["nG"].get(word):
        yield Finding("wrong", "nG", f"nG must be 0: {p.regime.value} has no ASIDs")


def _stage2(word: int, level: int, fmt: Format) -> Iterator[Finding]:
    leaf = fmt.leaf(level)
    if leaf["MemAttr"].meaning(leaf["MemAttr"].get(word)).startswith("reserved"):
        yield Finding("wrong", "MemAttr", f"MemAttr = {leaf['MemAttr'].get(word):#x} is reserved")
    access = leaf["S2AP"].get(word)
    if leaf["DBM"].get(word):
        clean = "clean: a write faults, or hardware sets S2AP[1] (VTCR_EL2.HD)" if not access & 2 else "dirty"
        yield Finding("note", "DBM", f"DBM=1 and S2AP[1]={access >> 1}: writable, {clean}")
    if not fmt.fwb and not leaf["MemAttr"].get(word) & 0xC and leaf["XN"].get(word) != 2:
        yield Finding(
            "suspicious", "XN", "Device memory that a guest may execute: it can be fetched from speculatively"
        )


def _permissions(word: int, p: WalkParams, inherited: int) -> Iterator[Finding]:
    base, overlay, _ = leaf_permissions(p, word, inherited)
    perms, el = base & overlay, f"EL{p.regime.el}"
    attr = p.mair[p.attr_index(word)]
    if p.epd:
        yield Finding("fault", "EPD", "TCR.EPD switches walks of this half off: translation fault, level 0")
    if p.e0pd:
        yield Finding("note", "E0PD", "TCR.E0PD keeps EL0 out of this half, whatever the descriptor says")
    yield from _dirty(word, p)
    if "PXN" in p.page and p.regime.has_el0 and perms & UW and not perms & PX and not p.page["PXN"].get(word):
        yield Finding("note", "PXN", f"PXN is 0, but {el} never executes what EL0 can write")
    if perms & PW and perms & PX:
        yield Finding("suspicious", "AP", f"{el} can write and execute it")
    if perms & UW and perms & UX:
        yield Finding("suspicious", "AP", f"EL0 can write and execute it; {el} cannot execute what EL0 can write")
    elif perms & UX and perms & PW:
        yield Finding("suspicious", "UXN", f"EL0 can execute what {el} can write")
    elif perms & UX and not perms & UR:
        yield Finding("note", "UXN", "EL0 can execute it and not read it (execute-only)")
    if is_device(attr) and perms & (PX | UX):
        yield Finding(
            "suspicious", "AttrIndx", "Device memory that can be executed: it can be fetched from speculatively"
        )
    if MemoryAttributes.of(attr).type == "reserved":
        yield Finding("wrong", "AttrIndx", f"the attribute byte {attr:#04x} is reserved")
    if not perms & (PRIVILEGED | UR | UW | UX):
        yield Finding("suspicious", "AP", "no level has any access")


def _dirty(word: int, p: WalkParams) -> Iterator[Finding]:
    page = p.page
    if p.pie:
        if page["nDirty"].get(word) and not p.hd:
            yield Finding("note", "nDirty", "nDirty is 1: a write faults while TCR.HD=0, else hardware clears it")
        return
    if not page["DBM"].get(word):
        return
    if page["AP"].get(word) & AP_READ_ONLY:
        text = "writable but clean: with HD=1 hardware clears AP[2] at the first write, with HD=0 a write faults"
        yield Finding("note", "DBM", f"DBM=1 and AP[2]=1: {text}")
    else:
        yield Finding("note", "DBM", "DBM=1 and AP[2]=0: writable and dirty; DBM changes nothing until AP[2] is 1")


def guess_level(word: int, fmt: Format) -> tuple[int, str]:
    """The level that a word is likely from, and why."""
    granule, table = fmt.granule, fmt.table(LAST_LEVEL - 1)
    software = sum(f.mask for f in table if f.reserved == "IGNORED")
    blocks = sorted(level for level in fmt.block_levels if _aligned(word, fmt, level))
    if word & 3 == 3:
        if word & software:
            return 3, f"bits [1:0] = 0b11, and bits that a table does not have are set ({word & software:#x}): a page"
        return 2, "bits [1:0] = 0b11 and no attributes but a table's: a table; levels 0 to 2 look alike"
    if word & 3 == 2:
        return 3, "bits [1:0] = 0b10: invalid, otherwise like a page"
    if not word & 1 and not (blocks and word & fmt.leaf(2)["AF"].mask and word & _attributes(fmt)):
        return 3, "invalid: nothing tells the level"
    if not blocks:
        return max(fmt.block_levels), "bits [1:0] = 0b01: a block, though its address is aligned to no block's size"
    size = size_text(granule.level_size(blocks[0]))
    also = "".join(f"; level {n} ({size_text(granule.level_size(n))}) is possible too" for n in blocks[1:])
    what = "a block" if word & 1 else "invalid, otherwise like a block"
    return blocks[0], f"bits [1:0] = 0b{word & 3:02b}: {what}, and its address is aligned to {size}{also}"


def _aligned(word: int, fmt: Format, level: int) -> bool:
    """No bit is set between the granule and the block's size (nT aside), and the block is not at PA 0."""
    leaf = fmt.leaf(level)
    size = fmt.granule.level_size(level)
    below = size - fmt.granule.page_size & ~leaf["nT"].mask & ~leaf["OA"].mask
    return not word & below and (level == max(fmt.block_levels) or bool(leaf["OA"].get(word)))


def _attributes(fmt: Format) -> int:
    """Attribute bits of a leaf above its address."""
    return sum(f.mask for f in fmt.leaf(LAST_LEVEL) if not f.reserved and f.spans[0].lo >= 50)


LOWEST_LEVEL = {Granule.K4: 0, Granule.K16: 0, Granule.K64: 1}  # of 48-bit and 52-bit spaces; 4K with DS: -1


def check_level(level: int, fmt: Format) -> None:
    """Raises ValueError for a level that the granule does not have."""
    lowest = LOWEST_LEVEL[fmt.granule] - (fmt.granule is Granule.K4 and fmt.ds)
    if not lowest <= level <= LAST_LEVEL:
        name = f"{fmt.granule.label} granule{' with DS=1' if fmt.ds else ''}"
        raise ValueError(f"level {level}: the {name} has levels {lowest} to {LAST_LEVEL}")
