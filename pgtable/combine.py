"""What stage 2 makes of stage 1's memory attributes: bytes as in MAIR_ELx and PAR_EL1, and shareability.

Sources: pseudocode S2DecodeMemAttrs, S2CombineS1MemAttrs, S2ApplyFWBMemAttrs, S2CombineS1Shareability,
EffectiveShareability; Arm ARM D8.6.
"""

from __future__ import annotations

from pgtable.attributes import FORCED_OUTER, INNER_SHAREABLE, NON_SHAREABLE, OUTER_SHAREABLE, is_device

NC, WT, WB = 1, 2, 3  # cacheability as MemAttr has it, the weakest first


def says_device(memattr: int, *, fwb: bool) -> bool:
    """Stage 2's MemAttr is a Device type, its two lower bits."""
    return (memattr & 7 if fwb else memattr) < 4


def combined(attr: int, memattr: int, *, fwb: bool, off: bool = False) -> int:
    """Stage 1's byte under stage 2's MemAttr. `off`: HCR_EL2.CD or ID makes stage 2's Normal memory non-cacheable."""
    if says_device(memattr, fwb=fwb):
        device = (memattr & 3) << 2
        return min(device, attr & 0xC) if is_device(attr) else device
    return _forced(attr, memattr & 7, off) if fwb else _weaker(attr, memattr, off)


def _weaker(attr: int, memattr: int, off: bool) -> int:
    """Without FWB, MemAttr being Normal: the more restrictive, hints and transience being stage 1's."""
    if is_device(attr):
        return attr & 0xC
    outer, inner = (NC, NC) if off else (memattr >> 2 & 3, memattr & 3)
    return _limited(attr >> 4, outer) << 4 | _limited(attr & 15, inner)


def _kind(nibble: int) -> int:
    if nibble == 4:
        return NC
    return WB if nibble & 4 else WT


def _limited(nibble: int, most: int) -> int:
    """A nibble of stage 1 whose cacheability is at most `most`."""
    kind = min(_kind(nibble), most or NC)
    if kind == NC:
        return 4
    return nibble & 0b1011 | (4 if kind == WB else 0)


def _forced(attr: int, kind: int, off: bool) -> int:
    """With FWB, MemAttr being Normal: stage 2 may force non-cacheable (5) or write-back (6)."""
    if kind == 5 or (off and kind != 7):
        return attr & 0xC if is_device(attr) else 0x44
    if kind == 6:
        if is_device(attr):
            return 0xFF
        return _written_back(attr >> 4) << 4 | _written_back(attr & 15)
    return attr


def _written_back(nibble: int) -> int:
    """Write-back with the hints of a cacheable nibble; of another one, all of them."""
    return 0xF if nibble == 4 else nibble | 4


def combined_sh(sh: int, sh2: int, attr: int) -> int:
    """The shareability of both, with the combined attribute `attr`."""
    if FORCED_OUTER[attr]:
        return OUTER_SHAREABLE
    for either in (OUTER_SHAREABLE, INNER_SHAREABLE):
        if either in (sh, sh2):
            return either
    return NON_SHAREABLE if 1 not in (sh, sh2) else 1
