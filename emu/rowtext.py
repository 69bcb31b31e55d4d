"""Rows of a listing as text: sizes, permissions, memory types, flags; one line a row, or a column a thing.

Rules of this file: no colours (the commands add them on a terminal); addresses are full 64-bit words; a range ends
before its second address, as in Linux's dump.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from pgtable.attributes import MemoryAttributes
from pgtable.descriptors import LAST_LEVEL
from pgtable.faults import FaultType, fault_code
from pgtable.findings import size_text
from pgtable.listing import Listing, Runs
from pgtable.permissions import letters
from pgtable.registers import FSC
from pgtable.table_params import TableParams

__all__ = ["RowText", "fault_text", "flags_text", "kind_text", "memory_text", "rights_text", "size_text"]
U64 = (1 << 64) - 1
SHAREABILITY = ("non", "reserved", "outer", "inner")
# Fields that have a column of their own, or whose bits mean nothing to hardware.
_SHOWN = (
    "VALID",
    "TYPE",
    "OA",
    "AttrIndx",
    "MemAttr",
    "AP",
    "S2AP",
    "SH",
    "UXN",
    "PXN",
    "XN",
    "AF",
    "Contiguous",
    "NS",
)


def rights_text(perms: int, el0: bool) -> str:
    """`rw- ---`: of the regime's EL, and of EL0 where it has one."""
    text = letters(perms)
    return f"{text[:3]} {text[3:]}" if el0 else text[:3]


@cache
def memory_text(attr: int) -> str:
    """A MAIR byte in a few letters: `Normal WB`, `Device-nGnRE`, `Normal in WB out NC`."""
    found = MemoryAttributes.of(attr)
    if found.type != "Normal":
        return found.type
    inner, outer = (_cache_text(text) for text in (found.inner, found.outer))
    kind = f"Normal {inner}" if inner == outer else f"Normal in {inner} out {outer}"
    return f"{kind} tagged" if found.tagged else kind


def _cache_text(text: str) -> str:
    return "NC" if text == "non-cacheable" else "WB" if text.startswith("write-back") else "WT"


def kind_text(level: int) -> str:
    """`L3 page`, `L2 block`."""
    return f"L{level} {'page' if level == LAST_LEVEL else 'block'}"


def fault_text(code: int) -> str:
    """The name of a fault status code."""
    return FSC[code]


_AF_CODES = {fault_code(FaultType.ACCESS_FLAG, level) for level in range(LAST_LEVEL + 1)}


def flags_text(p: TableParams, word: int, level: int, fault: int) -> str:
    """What else is set: `cont`, `nG`, `DBM`; `AF=0`; the fault that every access meets."""
    leaf = p.fmt.leaf(level)
    parts = ["cont"] if word & leaf.mask("Contiguous") else []
    for field in leaf:
        value = field.get(word)
        if value and field.name not in _SHOWN and not field.reserved and not field.name.startswith("IGNORED"):
            parts.append(field.name if field.value_mask == 1 else f"{field.name}={value:#x}")
    if not word & p.af:
        parts.append("AF=0")
    if fault and fault not in _AF_CODES:
        parts.append(f"[{fault_text(fault)}]")
    return " ".join(parts)


class RowText:
    """Lines for the rows of a listing; what depends on attributes only is made once."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self._tails: dict[tuple[int, ...], tuple[str, str]] = {}

    def lines(self, runs: Runs) -> Iterator[str]:
        """One line a row: range, size, kind, permissions, memory, shareability, flags, PA."""
        for row in zip(*(column.tolist() for column in runs), strict=True):
            va, size, pa, level, word, _, _, perms, _, fault, attributes, attr, sh = row
            key = (level, perms, fault, attributes, attr, sh, va >> 63)
            found = self._tails.get(key)
            if found is None:
                found = self._tails[key] = self._tail(va, level, word, perms, fault, attr, sh)
            ipa = "" if self.listing.ipa is None else f"{self.listing.ipa_of(va):#014x} "
            yield f"{va:#018x}-{va + size & U64:#018x} {size_text(size):>6} {found[0]} {ipa}{pa:#014x}{found[1]}"

    def _tail(self, va: int, level: int, word: int, perms: int, fault: int, attr: int, sh: int) -> tuple[str, str]:
        p = self.listing.params(va)
        rights = rights_text(perms, p.regime.has_el0)
        flags = flags_text(p, word, level, fault)
        before = f"{kind_text(level):8} {rights} {memory_text(attr):16} {SHAREABILITY[sh]:5}"
        return before, f"  {flags}" if flags else ""
