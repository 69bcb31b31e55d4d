"""Stage 2 with 128-bit descriptors: from an IPA to a PA (VTCR_EL2.D128). **Not judged**: no emulator has them.

Rules of this file:
- As in stage2.py: the only effects are the fetch and `swap`, a fault is returned, every descriptor read is kept.
- The order of checks is M.a.a's (AArch64.S2Translate, S2Walk): T0SZ, IPA range, start level, tables, Contiguous, nT,
  output size, access flag, alignment, permission (stage2_rules.py).
Sources: pseudocode S2Walk, S2NextWalkStateTable/Leaf, S2HasAlignmentFaultDueToMemType, S2CheckPermissions.
"""

from __future__ import annotations

from typing import NamedTuple

from pgtable.access import Access, AccessType
from pgtable.d128 import NOT_JUDGED
from pgtable.descriptors import LAST_LEVEL
from pgtable.faults import Fault, FaultType
from pgtable.params128 import Stage2Params128
from pgtable.stage2 import Stage2, Stage2Walk, is_device
from pgtable.stage2_permissions import EL0_EXECUTE, EL1_EXECUTE, READ, WRITE
from pgtable.stage2_rules import EVERYTHING, Asked, Grant, Refusal, refused, refused_walk, top_refused
from pgtable.walk import Swap, Update
from pgtable.walk import _early_leaf_fault as early_leaf_fault
from pgtable.walk128 import Changed, Fetch16, Leaf, Run, descend, step_text, steps_of, stored

_DATA = READ | WRITE | EL1_EXECUTE | EL0_EXECUTE


class Of(NamedTuple):
    """Whose address stage 2 translates.

    `s1ptw`: a stage 1 descriptor's, read or (the access is a write) updated; `first`: of the first table, which VTCR's
    TopLevel checks are about; `upper`: of the upper half. `assured`: stage 1's translation so far is an assured one.
    """

    s1ptw: bool = False
    first: bool = False
    upper: bool = False
    assured: bool = False


_DIRECT = Of()


class Stage2Walk128(Stage2Walk):
    """A Stage2Walk by 128-bit descriptors: not judged. `raw` and `updates` have words of 128 bits."""

    __slots__ = ()

    @property
    def stored_updates(self) -> tuple[Update, ...]:
        """`updates` as memory holds them, where SCTLR_EL2.EE has tables in the other byte order."""
        return tuple(stored(update, self.params.big_endian) for update in self.updates)

    @property
    def mro(self) -> bool:
        """The leaf is written by walks and RCW instructions alone (s2fs1mro); False where no leaf was reached."""
        if not self.raw or not isinstance(self.params, Stage2Params128):
            return False
        return isinstance(self.result, Stage2) and granted(self.params, self.raw[-1][2]).mro

    def __str__(self) -> str:
        p = self.params
        assert isinstance(p, Stage2Params128)
        lines = [f"IPA {self.ipa:#x}: {self.access}{', stage 1 table' if self.s1ptw else ''}, 128-bit descriptors"]
        lines += [step_text(step, p.fmt) for step in steps_of(p, self.ipa, list(self.raw))]
        found = self.result
        lines.append(f"  = {found}, by {found.cause}" if isinstance(found, Fault) else f"  = PA {found.pa:#x}")
        return "\n".join([*lines, f"  {NOT_JUDGED}"])


def stage2_walk128(
    fetch: Fetch16, p: Stage2Params128, ipa: int, access: Access, of: Of = _DIRECT, *, swap: Swap | None = None
) -> Stage2Walk128:
    """What stage 2 makes of `ipa`; not judged. `access`: of the guest, or the READ or WRITE of a stage 1 descriptor.

    `fetch`, `swap`: as for walk128. The result is a Stage2 (`perms`: READ, WRITE, EL1_EXECUTE, EL0_EXECUTE) or a Fault.
    """
    while True:
        run = Run(fetch, swap, p.big_endian)
        try:
            result = _attempt(run, p, ipa, access, of)
        except Changed:
            continue
        return Stage2Walk128(ipa, access, of.s1ptw, p, tuple(run.raw), result, tuple(run.updates))


def _attempt(run: Run, p: Stage2Params128, ipa: int, access: Access, of: Of) -> Stage2 | Fault:
    if not p.on:
        return Stage2(ipa, None, 0, _DATA)
    for ok, cause in ((p.txsz_ok, "T0SZ"), (not ipa >> p.ia_bits, "range")):
        if not ok:
            return _of_stage2(Fault(FaultType.TRANSLATION, 0, cause=cause), of)
    leaf = descend(run, p, ipa)
    if isinstance(leaf, Fault):
        cause = "VTTBR" if leaf.cause == "TTBR" else leaf.cause
        return _of_stage2(leaf._replace(cause=cause), of)
    fault = _leaf_fault(p, leaf, access, of)
    if fault:
        return _of_stage2(fault, of)
    level, pa, word, _ = leaf
    run.change(pa, word, _updated(p, word, access, of))
    offset = p.offset_mask(level, word) + 1
    oa = p.fmt.leaf(level)["OA"].get(word)
    return Stage2(oa & -offset | ipa & offset - 1, level, word, granted(p, word).perms & _DATA)


def _of_stage2(fault: Fault, of: Of) -> Fault:
    return fault._replace(stage=2, s1ptw=of.s1ptw)


def _leaf_fault(p: Stage2Params128, leaf: Leaf, access: Access, of: Of) -> Fault | None:
    """The first check of a leaf that fails, as a fault of stage 1."""
    level, word = leaf.level, leaf.word
    fault = early_leaf_fault(p, level, word)
    if fault:
        return fault
    if p.fmt.leaf(level)["OA"].get(word) & p.over:
        return Fault(FaultType.ADDRESS_SIZE, level, cause="OA")
    if not word & p.af and not p.ha:
        return Fault(FaultType.ACCESS_FLAG, level, cause="AF")
    unaligned = not of.s1ptw and not access.aligned and access.type is not AccessType.FETCH
    if unaligned and is_device(p, word):
        return Fault(FaultType.ALIGNMENT, level, cause="MemAttr")
    why = _refusal(p, word, access, of)
    if why is None:
        return None
    write = access.type in (AccessType.WRITE, AccessType.GCS_WRITE) if why.write is None else why.write
    return Fault(
        FaultType.PERMISSION, level, write=write, dirty_bit=why.dirty_bit, overlay=why.overlay, cause=why.cause
    )


def _refusal(p: Stage2Params128, word: int, access: Access, of: Of) -> Refusal | None:
    g = granted(p, word)
    asked = Asked(access, bool(word & p.assured_only), of.assured, bool(word & p.dirty), p.hd)
    if not of.s1ptw:
        return refused(g, asked, p.gcsh)
    top = of.first and top_refused(g, p.tl0, p.tl1, of.upper)
    return refused_walk(g, asked, top, p.ptw and is_device(p, word))


def granted(p: Stage2Params128, word: int) -> Grant:
    """What a leaf grants (pseudocode S2ComputePermissions)."""
    leaf = p.fmt.leaf(LAST_LEVEL)
    base = p.base_rules.at(leaf["PIIndex"].get(word))
    return Grant(base, EVERYTHING if p.overlay_rules is None else p.overlay_rules.at(leaf["POIndex"].get(word)))


def _updated(p: Stage2Params128, word: int, access: Access, of: Of) -> int:
    """The leaf after hardware's update for an access that is allowed (pseudocode S2Translate)."""
    if not p.ha or (access.is_at and not p.features.at_updates and not of.s1ptw):
        return word
    dirty = p.hd and access.writes and not access.is_at
    return word | p.af | (p.dirty if dirty else 0)
