"""Stage 2's indirect permissions: S2PIR_EL2 and S2POR_EL1, as tables read by index. **Not judged**.

Rules of this file:
- A row is a bit set: READ, WRITE, EL1_EXECUTE, EL0_EXECUTE as in stage2.py; W_RCW and W_WALK are writes by RCW
  instructions and by walks that update a stage 1 table; TOP0 and TOP1 allow the page to hold the first table of the
  lower and the upper half (FEAT_THE). A read by either needs READ.
- The order of refusals is M.a.a's S2CheckPermissions; two things differ from v9.4: HCR_EL2.PTW is asked after the
  overlay, and AssuredOnly counts for pages that hold stage 1 tables too.
Sources: pseudocode S2IndirectBasePermissions, S2OverlayPermissions, S2ComputePermissions, S2CheckPermissions.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from pgtable.access import Access, AccessType
from pgtable.faults import ASSURED_ONLY, TOP_LEVEL
from pgtable.permissions import RuleTable
from pgtable.registers import NIBBLES
from pgtable.stage2_permissions import EL0_EXECUTE, EL1_EXECUTE, READ, WRITE

W_RCW, W_WALK, TOP0, TOP1 = 16, 32, 64, 128
WRITES = WRITE | W_RCW | W_WALK
EVERYTHING = READ | WRITES | EL1_EXECUTE | EL0_EXECUTE
_MRO = READ | W_RCW | W_WALK  # mostly read-only: written by RCW instructions and walks alone
_RW = READ | WRITES

# By a nibble of S2PIR_EL2 or S2POR_EL1; 0001 and 0101 are reserved and grant nothing.
BY_S2PIR = (
    *(0, 0, _MRO, _MRO | TOP1, WRITE, 0, _MRO | TOP0, _MRO | TOP0 | TOP1),
    *(READ, READ | EL0_EXECUTE, READ | EL1_EXECUTE, READ | EL0_EXECUTE | EL1_EXECUTE),
    *(_RW, _RW | EL0_EXECUTE, _RW | EL1_EXECUTE, _RW | EL0_EXECUTE | EL1_EXECUTE),
)


@cache
def indirect_table(register: int) -> RuleTable:
    """Permission sets by PIIndex (POIndex): the register's 16 nibbles looked up."""
    return RuleTable(BY_S2PIR[field.get(register)] for field in reversed(NIBBLES.fields))


class Grant(NamedTuple):
    """What a leaf of stage 2 grants: before and by the overlay (everything where there is none)."""

    base: int
    overlay: int

    @property
    def perms(self) -> int:
        """What is left of both."""
        return self.base & self.overlay

    @property
    def mro(self) -> bool:
        """Written by RCW instructions and walks alone (pseudocode S2CheckPermissions, s2fs1mro)."""
        return self.perms & WRITES == W_RCW | W_WALK

    @property
    def top(self) -> int:
        """TOP0 and TOP1: the base's, and the overlay's where both together are MRO (S2ComputePermissions)."""
        if self.overlay == EVERYTHING:
            return self.base & (TOP0 | TOP1)
        return (self.base | self.overlay) & (TOP0 | TOP1) if self.mro else 0


class Refusal(NamedTuple):
    """Why stage 2 refuses: `cause` as in Fault; `write` None: as the access that asked."""

    cause: str
    write: bool | None = None
    overlay: bool = False
    dirty_bit: bool = False


class Asked(NamedTuple):
    """What S2CheckPermissions looks at besides the permissions of the leaf.

    `assured_only`, `dirty`: the leaf's; `assured`: stage 1's translation is. `hd`: hardware manages the dirty state.
    """

    access: Access
    assured_only: bool
    assured: bool
    dirty: bool
    hd: bool


def refused_walk(g: Grant, q: Asked, missing_top: bool, ptw_device: bool) -> Refusal | None:
    """What refuses the read, or the update, of a stage 1 descriptor. `q.access`: READ or WRITE.

    `missing_top`: of the first table, and stage 2's page may not hold it. `ptw_device`: HCR_EL2.PTW and Device memory.
    """
    if missing_top:
        return Refusal(TOP_LEVEL)
    if q.assured_only and not q.assured:
        return Refusal(ASSURED_ONLY)
    update = q.access.type is AccessType.WRITE
    needs = READ | (W_WALK if update else 0)
    if needs & ~g.overlay:
        return Refusal("permission", overlay=True)
    if ptw_device:
        return Refusal("PTW")
    if needs & ~g.base:
        return Refusal("permission")
    if update and not q.hd and not q.dirty:
        return Refusal("dirty", dirty_bit=True)
    return None


def top_refused(g: Grant, tl0: bool, tl1: bool, upper: bool) -> bool:
    """VTCR_EL2.{TL0, TL1} keep the page from holding the first table of the half (pseudocode S2CheckPermissions)."""
    ours, other = (TOP1, TOP0) if upper else (TOP0, TOP1)
    mine, theirs = (tl1, tl0) if upper else (tl0, tl1)
    return bool((mine and not g.top & ours) or (theirs and g.top & (TOP0 | TOP1) == other))


def refused(g: Grant, q: Asked, gcsh: bool) -> Refusal | None:
    """What refuses an access that is no walk's. `gcsh`: VTCR_EL2.GCSH, shadow stacks of EL1 need AssuredOnly."""
    access = q.access
    stack = gcsh and access.is_gcs and access.el != 0
    if (q.assured_only and not q.assured) or (stack and not q.assured_only):
        return Refusal(ASSURED_ONLY)
    for granted, overlay in ((g.overlay, True), (g.base, False)):
        for need, write in needs(access):
            if need & ~granted:
                return Refusal("permission", write, overlay)
    if access.asks_write and not q.hd and not q.dirty:
        return Refusal("dirty", True, dirty_bit=True)
    return None


def needs(access: Access) -> list[tuple[int, bool]]:
    """The permissions asked for, in order, and whether a refusal of each is a write's."""
    if access.type is AccessType.FETCH:
        return [(EL1_EXECUTE if access.el else EL0_EXECUTE, False)]
    if access.type in (AccessType.CLEAN, AccessType.CLEAN_INVALIDATE):
        return [] if access.el else [(READ, False)]
    asked = [(READ, False)] if access.type in _READS else []
    return asked + ([(WRITE, True)] if access.asks_write else [])


_READS = (AccessType.READ, AccessType.ATOMIC, AccessType.GCS_READ, AccessType.AT_READ)
