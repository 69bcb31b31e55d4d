"""Memory attributes: what a MAIR byte means.

Source: pseudocode S1DecodeMemAttrs, DecodeLDFAttr, EffectiveShareability; encodings in `MemoryAttributes.of`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

NON_SHAREABLE, OUTER_SHAREABLE, INNER_SHAREABLE = 0, 2, 3

DEVICE_nGnRnE = 0x00
NORMAL_NC = 0x44
NORMAL_WT = 0xAA
NORMAL_WB = 0xFF

_DEVICE = ("nGnRnE", "nGnRE", "nGRE", "GRE")
_HINTS = ("no allocate", "write-allocate", "read-allocate", "read/write-allocate")


class MemoryAttributes(NamedTuple):
    """A decoded attribute byte. `xs`: the XS attribute (TLBI nXS need not wait for accesses to XS = 0 memory)."""

    type: str  # "Device-nGnRnE", "Normal", "reserved"
    inner: str
    outer: str
    tagged: bool
    xs: bool

    @classmethod
    def of(cls, byte: int) -> MemoryAttributes:
        """What attribute byte `byte` (0..255) means."""
        return _decode(byte)

    def __str__(self) -> str:
        if self.type != "Normal":
            return self.type + ("" if self.xs else " (XS=0)")
        cache = self.inner if self.inner == self.outer else f"inner {self.inner}, outer {self.outer}"
        return f"Normal {cache}{', tagged' if self.tagged else ''}"


# Bytes whose meaning is not two cacheability nibbles: FEAT_XS, FEAT_MTE2.
_SPECIAL = {
    0x40: MemoryAttributes("Normal", "non-cacheable", "non-cacheable", False, False),
    0xA0: MemoryAttributes("Normal", "write-through read-allocate", "write-through read-allocate", False, False),
    0xF0: MemoryAttributes("Normal", "write-back read/write-allocate", "write-back read/write-allocate", True, False),
}


@cache
def _decode(byte: int) -> MemoryAttributes:
    if byte in _SPECIAL:
        return _SPECIAL[byte]
    outer, inner = byte >> 4, byte & 15
    if is_device(byte):
        return MemoryAttributes(f"Device-{_DEVICE[inner >> 2]}", "", "", False, not inner & 1)
    if not outer or not inner:
        return MemoryAttributes("reserved", "", "", False, True)
    xs = not (_write_back(inner) and _write_back(outer))
    return MemoryAttributes("Normal", _nibble(inner), _nibble(outer), False, xs)


def _write_back(nibble: int) -> bool:
    return bool(nibble & 4) and nibble != 4


def _nibble(nibble: int) -> str:
    """Cacheability of one nibble (pseudocode DecodeLDFAttr)."""
    if nibble == 4:
        return "non-cacheable"
    kind = "write-back" if nibble & 4 else "write-through"
    return f"{kind} {'' if nibble & 8 else 'transient '}{_HINTS[nibble & 3]}"


def is_device(byte: int) -> bool:
    """A Device memory encoding: 0b0000dd0x."""
    return not byte & 0xF2


def forced_outer(byte: int) -> bool:
    """Shareability is Outer Shareable whatever the descriptor says: Device, or Normal non-cacheable both ways."""
    return is_device(byte) or byte in (0x44, 0x40)


FORCED_OUTER = tuple(forced_outer(byte) for byte in range(256))
