"""What a leaf of stage 2 allows: S2AP and XN, or FEAT_S2PIE's indirect permissions with FEAT_S2POE's overlays.

Rules of this file:
- A permission is a bit of READ ... WALK_WRITE. What an access needs is a set of them; what is missing refuses it.
- Overlays are asked before the base (pseudocode S2CheckPermissions): a refusal by both is the overlay's.
- S2POE is judged by no emulator; its table is S2PIE's (pseudocode S2IndirectBasePermissions, S2OverlayPermissions).
Sources: pseudocode S2DirectBasePermissions, S2ComputePermissions, S2CheckPermissions; Arm ARM D8.4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgtable.access import Access, AccessType
from pgtable.registers import NIBBLES

if TYPE_CHECKING:
    from pgtable.stage2 import Stage2Params

READ, WRITE, EL1_EXECUTE, EL0_EXECUTE, WALK_WRITE = 1, 2, 4, 8, 16  # WALK_WRITE: hardware changes a stage 1 descriptor
ALL = READ | WRITE | EL1_EXECUTE | EL0_EXECUTE | WALK_WRITE
_EXECUTE = {0: EL1_EXECUTE | EL0_EXECUTE, 1: EL0_EXECUTE, 2: 0, 3: EL1_EXECUTE}  # by XN[1:0]
_MOSTLY_READ_ONLY = READ | WALK_WRITE
_READ_WRITE = READ | WRITE | WALK_WRITE

# By encoding, in S2PIR_EL2 and S2POR_EL1. TopLevel (FEAT_THE), in which 2, 3, 6 and 7 differ, is not modelled.
INDIRECT = (
    *(0, 0, _MOSTLY_READ_ONLY, _MOSTLY_READ_ONLY),
    *(WRITE, 0, _MOSTLY_READ_ONLY, _MOSTLY_READ_ONLY),
    *(READ, READ | EL0_EXECUTE, READ | EL1_EXECUTE, READ | EL1_EXECUTE | EL0_EXECUTE),
    *(_READ_WRITE, _READ_WRITE | EL0_EXECUTE, _READ_WRITE | EL1_EXECUTE, ALL),
)


def indirect(register: int) -> tuple[int, ...]:
    """The permissions that each of the sixteen fields of S2PIR_EL2 or S2POR_EL1 gives."""
    return tuple(INDIRECT[NIBBLES[f"Perm{i}"].get(register)] for i in range(16))


def permissions(p: Stage2Params, word: int) -> int:
    """What a leaf allows, its overlay included."""
    return base(p, word) & overlay(p, word)


def base(p: Stage2Params, word: int) -> int:
    """The base permissions of a leaf."""
    leaf = p.page
    if p.indirect is not None:
        return p.indirect[leaf["PIIndex"].get(word)]
    allowed = leaf["S2AP"].get(word)
    if p.hd and leaf["DBM"].get(word):
        allowed |= WRITE
    return allowed | (WALK_WRITE if allowed & WRITE else 0) | _EXECUTE[leaf["XN"].get(word)]


def overlay(p: Stage2Params, word: int) -> int:
    """What a leaf's overlay leaves."""
    return ALL if p.overlays is None else p.overlays[p.page["POIndex"].get(word)]


def needs(access: Access, s1ptw: bool) -> int:
    """The permissions that an access must have: of a stage 1 descriptor a read, and to change it WALK_WRITE."""
    kind = access.type
    if s1ptw:
        return READ | (WALK_WRITE if kind is AccessType.WRITE else 0)
    if kind is AccessType.FETCH:
        return EL1_EXECUTE if access.el else EL0_EXECUTE
    if kind is AccessType.ATOMIC:
        return READ | WRITE
    if kind in (AccessType.WRITE, AccessType.AT_WRITE, AccessType.GCS_WRITE, AccessType.INVALIDATE):
        return WRITE
    if kind in (AccessType.CLEAN, AccessType.CLEAN_INVALIDATE):
        return 0 if access.el else READ
    return 0 if kind is AccessType.AT_ANY else READ


def is_clean(p: Stage2Params, word: int) -> bool:
    """With indirect permissions: a write must first make the leaf dirty (its Dirty bit is 0)."""
    return p.indirect is not None and not p.page["Dirty"].get(word)


def made_dirty(p: Stage2Params, word: int) -> int:
    """The leaf after hardware marked it dirty; as it is, where hardware may not."""
    leaf = p.page
    if p.indirect is not None:
        return word | leaf["Dirty"].mask
    return word | leaf["S2AP"].put(0, WRITE) if leaf["DBM"].get(word) else word
