"""Permission rules of stage 1, as tables read by index: the same tables for one descriptor and for an array.

Rules of this file:
- Permissions are a bit set: `PR PW PX` for the privileged level of the regime, `UR UW UX` for EL0, `PG UG` for
  guarded control stacks. Table rows are made once by plain functions that restate the Arm ARM.
- `Rules` are tables over an index: `direct_index` (AP, APTable, UXN, PXN: 64 rows) or PIIndex (16 rows).
- PAN is no row of the permissions: it depends on the access. `Rules.pan` says where it bites.
Sources: pseudocode S1DirectBasePermissions, S1IndirectBasePermissions, S1OverlayPermissions, S1ComputePermissions.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np

from pgtable.bits import W
from pgtable.registers import NIBBLES

PR, PW, PX, PG, UR, UW, UX, UG = (1 << i for i in range(8))
PRIVILEGED = PR | PW | PX | PG
UNPRIVILEGED = UR | UW | UX | UG
ALL = PRIVILEGED | UNPRIVILEGED
EXECUTE = PX | UX | PG | UG  # what a leaf outside the state's own space loses (FEAT_RME)
TO_UNPRIVILEGED = 4  # PR << 4 is UR, and so on


def letters(perms: int) -> str:
    """Six letters or dashes: `rwx` of the privileged level, then of EL0."""
    order = (PR, PW, PX, UR, UW, UX)
    return "".join(letter if perms & bit else "-" for letter, bit in zip("rwxrwx", order, strict=True))


class RuleTable:
    """A table of permission sets, indexed by an int (gives int) or an integer array (gives uint16)."""

    __slots__ = ("array", "rows")

    def __init__(self, rows: Iterable[int]) -> None:
        self.rows = tuple(rows)
        self.array = np.array(self.rows, np.uint16)

    def at(self, index: W) -> W:
        """The row or rows at `index`."""
        found: Any = self.rows[index] if isinstance(index, int) else self.array[index.astype(np.intp)]
        result: W = found
        return result


class Rules(NamedTuple):
    """Permission tables over one index.

    `base`: before overlays and without the effect of WXN. `wxn`: the execute permissions that writability takes
    away. `final`: both, with no overlay. `overlayable`: the permissions that an overlay may reduce. `pan`: 1 where a
    privileged data access is refused when PSTATE.PAN is 1.
    """

    base: RuleTable
    wxn: RuleTable
    final: RuleTable
    overlayable: RuleTable
    pan: RuleTable


# What AP[2:1] grants, and what APTable leaves of it.
BY_AP = (PR | PW, PR | PW | UR | UW, PR, PR | UR)
BY_AP_ONE_LEVEL = (PR | PW, PR | PW, PR, PR)
BY_APTABLE = (ALL, ALL & ~(UR | UW), ALL & ~(PW | UW), ALL & ~(PW | UW | UR))
BY_APTABLE_ONE_LEVEL = (ALL, ALL, ALL & ~PW, ALL & ~PW)


def direct_index(ap: W, ap_table: W, uxn: W, pxn: W) -> W:
    """The row of a direct rule table: AP[2:1], accumulated APTable, UXN or UXNTable, PXN or PXNTable."""
    index: Any = ap | ap_table << 2 | uxn << 4 | pxn << 5
    return cast(W, index)


@cache
def direct_rules(has_el0: bool, wxn: bool, epan: bool) -> Rules:
    """Direct permissions (AP, APTable, UXN, PXN) of a regime; `epan` is SCTLR.EPAN."""
    base = [(_two_levels if has_el0 else _one_level)(index) for index in range(64)]
    lost = [_written_and_executed(p) if wxn else 0 for p in base]
    pan = [int(bool(p & (UR | UW | (UX if epan else 0)))) for p in base]
    return _rules(base, lost, [ALL] * 64, pan)


def _two_levels(index: int) -> int:
    """A row for EL1&0 or EL2&0. Privileged code may not execute what EL0 may write (implicit PXN)."""
    data = BY_AP[index & 3] & BY_APTABLE[index >> 2 & 3]
    pxn = index >> 5 or data & UW
    return data | (0 if pxn else PX) | (0 if index >> 4 & 1 else UX)


def _one_level(index: int) -> int:
    """A row for EL2 or EL3 alone: AP[1] and APTable[0] do not count, XN is where UXN is."""
    data = BY_AP_ONE_LEVEL[index & 3] & BY_APTABLE_ONE_LEVEL[index >> 2 & 3]
    return data | (0 if index >> 4 & 1 else PX)


def _written_and_executed(p: int) -> int:
    """The execute permissions of levels that may write (WXN)."""
    return (PX if p & PW and p & PX else 0) | (UX if p & UW and p & UX else 0)


def _rules(base: list[int], lost: list[int], overlayable: list[int], pan: list[int]) -> Rules:
    final = [p & ~x for p, x in zip(base, lost, strict=True)]
    return Rules(*(RuleTable(rows) for rows in (base, lost, final, overlayable, pan)))


# Encodings of a PIR nibble: read, write, execute, guarded control stack. Bit 3: overlays do not apply. Reserved
# encodings grant nothing. 0110 is RWX whose X goes while it is writable (the encoding's own WXN).
_R, _RW, _RX, _X, _RWX, _RG = PR, PR | PW, PR | PX, PX, PR | PW | PX, PR | PG
BY_PIR = (0, _R, _X, _RX, 0, _RW, _RWX, _RWX, _R, _RG, _RX, 0, _RW, 0, _RWX, 0)
PIR_WXN = 0b0110
PIR_NO_OVERLAY = 0b1000


@cache
def indirect_rules(pir: int, pire0: int | None) -> Rules:
    """Indirect permissions by PIIndex (FEAT_S1PIE); `pire0` None: the regime has no EL0."""
    rows = [_indirect(p.get(pir), None if pire0 is None else p.get(pire0)) for p in reversed(NIBBLES.fields)]
    return _rules(*(list(column) for column in zip(*rows, strict=True)))


def _indirect(privileged: int, unprivileged: int | None) -> tuple[int, int, int, int]:
    """Base, lost to WXN, overlayable and PAN of one PIIndex (pseudocode S1IndirectBasePermissions).

    PAN looks at what PIRE0 grants, EPAN or not; whether a reserved encoding counts is IMPLEMENTATION DEFINED (Arm ARM
    R_TBKKB): here it does not, as in QEMU.
    """
    p = BY_PIR[privileged]
    u = _as_unprivileged(BY_PIR[unprivileged]) if unprivileged is not None else 0
    if p & (PX | PG) and u & (UW | UG):
        p = u = 0  # privileged code must not run, or return to, what EL0 may write: nobody gets access
    lost = (PX if privileged == PIR_WXN else 0) | (UX if unprivileged == PIR_WXN else 0)  # also in a conflict
    overlayable = (0 if privileged & PIR_NO_OVERLAY else PRIVILEGED) | (
        0 if unprivileged is None or unprivileged & PIR_NO_OVERLAY else UNPRIVILEGED
    )
    return p | u, lost, overlayable, int(bool(unprivileged and BY_PIR[unprivileged]))


def _as_unprivileged(p: int) -> int:
    """Privileged permission bits moved to their EL0 places."""
    return p << TO_UNPRIVILEGED


# A POR nibble grants read (bit 0), execute (bit 1) and write (bit 2); with bit 3 set it is reserved: nothing.
BY_POR = tuple(
    0 if n & 8 else (PR if n & 1 else 0) | (PX if n & 2 else 0) | (PW if n & 4 else 0) | PG for n in range(16)
)


@cache
def overlay_rules(por: int | None, por_el0: int | None) -> RuleTable:
    """The overlay by POIndex (0..7; 0..15 in 128-bit descriptors); None: no overlay at that level, it grants all."""
    rows = []
    for field in reversed(NIBBLES.fields):
        privileged = PRIVILEGED if por is None else BY_POR[field.get(por)]
        unprivileged = UNPRIVILEGED if por_el0 is None else _as_unprivileged(BY_POR[field.get(por_el0)])
        rows.append(privileged | unprivileged)
    return RuleTable(rows)


def overlaid(rules: Rules, levels: int) -> Rules:
    """`rules` where overlays are on for `levels` only: PRIVILEGED, UNPRIVILEGED or both."""
    return rules._replace(overlayable=RuleTable(row & levels for row in rules.overlayable.rows))


def with_overlay(base: W, lost: W, overlayable: W, overlay: W) -> tuple[W, W]:
    """Base and overlay permissions after both have been reduced by WXN (pseudocode S1ComputePermissions).

    Where an overlay applies and grants execute, WXN takes the overlay's write permission; else it takes execute.
    """
    effective: Any = overlay | (ALL ^ overlayable)
    by_overlay: Any = lost & overlayable & overlay  # PX and UX bits, one place above PW and UW
    reduced: Any = base & (ALL ^ (lost & (ALL ^ by_overlay)))
    return reduced, effective & (ALL ^ (by_overlay >> 1))
