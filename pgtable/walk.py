"""The stage 1 translation table walk for one address: registers snapshot, state to next state, evidence kept.

Rules of this file:
- The only effects are `fetch(pa) -> int` and, where hardware updates are asked for, `swap(pa, old, new) -> bool`.
- The order of checks is the pseudocode's (S1Translate, S1Walk, S1CheckPermissions) and stands in `_translate`.
- A fault is returned, never raised. Every descriptor read is kept as a raw step and decoded when asked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

from pgtable.access import Access, AccessType
from pgtable.attributes import (
    FORCED_OUTER,
    NON_SHAREABLE,
    NORMAL_NC,
    NORMAL_WB,
    NORMAL_WT,
    OUTER_SHAREABLE,
    DEVICE_nGnRnE,
    is_device,
)
from pgtable.bits import W
from pgtable.descriptors import LAST_LEVEL, Kind
from pgtable.faults import Fault, FaultType, GranuleRefusal
from pgtable.gpt import GptWalk
from pgtable.memory import NoMemory
from pgtable.params import WalkParams
from pgtable.permissions import ALL, EXECUTE, PR, PW, TO_UNPRIVILEGED, with_overlay
from pgtable.spaces import AMEC, LEAF_NS, PASpace, leaf_space, outside
from pgtable.table_params import TableParams
from pgtable.translation import Translation as Translation

Fetch = Callable[[int], int]
Swap = Callable[[int, int, int], bool]


class Step(NamedTuple):
    """One descriptor that the walk read: at `pa`, number `entry` of its table, found to be `kind`."""

    level: int
    pa: int
    word: int
    entry: int
    kind: Kind


class Update(NamedTuple):
    """A change that hardware makes to the descriptor at `pa` (FEAT_HAFDBS)."""

    pa: int
    old: int
    new: int


def in_memory(update: Update, big_endian: bool) -> Update:
    """The update with its words as memory holds them: walks keep descriptors in the CPU's order."""
    if not big_endian:
        return update
    old, new = (int.from_bytes(word.to_bytes(8, "big"), "little") for word in update[1:])
    return Update(update.pa, old, new)


RawStep = tuple[int, int, int]  # level, pa, word


class Walk:
    """One translation with its evidence: `result`, `steps`, `updates`. `print(walk)` shows every step."""

    __slots__ = ("__dict__", "access", "params", "raw", "result", "updates", "va")

    granules: tuple[GptWalk, ...] = ()  # the granule protection checks made (FEAT_RME)

    def __init__(
        self,
        va: int,
        access: Access,
        params: WalkParams,
        raw: list[RawStep],
        result: Translation | Fault,
        updates: tuple[Update, ...] = (),
    ) -> None:
        self.va = va
        self.access = access
        self.params = params
        self.raw = raw
        self.result = result
        self.updates = updates

    @property
    def ok(self) -> bool:
        """The access translates."""
        return isinstance(self.result, Translation)

    @property
    def fault(self) -> Fault | None:
        """The fault, None where the access translates."""
        return self.result if isinstance(self.result, Fault) else None

    @property
    def pa(self) -> int:
        """The PA; raises ValueError on a fault."""
        if isinstance(self.result, Fault):
            raise ValueError(f"VA {self.va:#x}: {self.result}")
        return self.result.pa

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The descriptors read, in order."""
        fmt = self.params.fmt
        masks = {level: (shift, mask) for level, shift, mask in self.params.levels}
        return tuple(
            Step(level, pa, word, self.va >> masks[level][0] & masks[level][1], fmt.kind(word, level))
            for level, pa, word in self.raw
        )

    def __str__(self) -> str:
        from pgtable.why import walk_text

        return walk_text(self)

    def __repr__(self) -> str:
        return f"<Walk {self.va:#x} {self.access}: {self.result}>"


def walk(
    fetch: Fetch, p: WalkParams, va: int, access: Access, swap: Swap | None = None, below_ns: Fetch | None = None
) -> Walk:
    """The walk proper, for parameters already read. See `translate` (mmu.py).

    `below_ns`: reads the tables that NSTable puts in Non-secure memory, where that makes a difference.
    """
    while True:
        raw: list[RawStep] = []
        updates: list[Update] = []
        result = _translate(fetch, p, va, access, raw, updates, below_ns)
        if swap is None or all(swap(*in_memory(update, p.big_endian)) for update in updates):
            return Walk(va, access, p, raw, result, tuple(updates))
        # Another observer changed a descriptor between read and write: hardware reads it again.


def _translate(
    fetch: Fetch,
    p: WalkParams,
    va: int,
    access: Access,
    raw: list[RawStep],
    updates: list[Update],
    below_ns: Fetch | None,
) -> Translation | Fault:
    if not p.mmu_on:
        return _mmu_off(p, va, access)
    fault = _before_the_walk(p, va, access)
    if fault:
        return fault
    leaf = _descend(fetch, p, va, raw, updates, below_ns)
    if isinstance(leaf, Fault):
        return leaf
    level, pa, word, inherited = leaf
    oa_mask, offset = p.leaf_address[level]
    oa = word & oa_mask if oa_mask else p.output_address(level, word)
    if oa & p.over:
        return _before_output(p, level, word) or Fault(FaultType.ADDRESS_SIZE, level, cause="OA")
    # All that is left depends on the leaf's attributes, not on its address: it is decided once and kept.
    key = word & ~oa_mask, level, inherited, access
    verdict = p.verdicts.get(key)
    if verdict is None:
        verdict = p.verdicts[key] = _verdict(p, level, word, inherited, access)
    if isinstance(verdict, Fault):
        return verdict
    changed, attr, sh, perms, ng, ns, space, run = verdict
    if changed:
        updates.append(Update(pa, word, word ^ changed))
    offset *= run
    if p.secure and any(w & p.ns_table for _, _, w in raw[:-1]):
        ns, ng = True, p.regime.has_el0  # Secure tables that led to Non-secure ones: the entry is not global
        space = space and PASpace.NONSECURE
    return Translation(oa & -offset | va & offset - 1, level, word, attr, sh, perms, ng, ns, space)


class _Leaf(NamedTuple):
    """What is decided by a leaf's attributes: bits that hardware changes, and the result without its address."""

    changed: int
    attr: int
    sh: int
    perms: int
    nG: bool
    ns: bool
    space: PASpace | None
    run: int  # entries of the contiguous run whose offset comes from the VA; 1 for none


def _verdict(p: WalkParams, level: int, word: int, inherited: int, access: Access) -> _Leaf | Fault:
    """Contiguous, nT, access flag, alignment, permission: in this order (pseudocode S1Walk, S1CheckPermissions)."""
    fault = _before_output(p, level, word)
    if fault:
        return fault
    if not word & p.af and not p.ha:
        return Fault(FaultType.ACCESS_FLAG, level, cause="AF")
    attr = p.mair[p.attr_index(word)]
    if not access.aligned and access.type is not AccessType.FETCH and is_device(attr):
        return Fault(FaultType.ALIGNMENT, level)
    base, overlay, pan = leaf_permissions(p, word, inherited)
    fault = _permission_fault(p, level, word, access, _as_el0(p, access), base, overlay, pan)
    if fault:
        return fault
    return _leaf_output(p, level, word, inherited, access, attr, base & overlay)


def _as_el0(p: WalkParams, access: Access) -> bool:
    """The access is checked as EL0's (pseudocode IsUnprivAccessPriv)."""
    if access.el == 0 or not access.unprivileged:
        return access.el == 0
    uao = p.uao if access.uao is None else access.uao
    return not uao and (access.el == 1 or (access.el == 2 and p.el0_is_host))


def _before_the_walk(p: WalkParams, va: int, access: Access) -> Fault | None:
    """Checks that read no descriptor; all report level 0 (pseudocode S1Translate)."""
    mask = p.fetch_range_mask if access.type is AccessType.FETCH else p.data_range_mask
    in_range = va & mask == (mask if p.upper else 0)
    if in_range and not p.unusual:
        return None
    if not p.txsz_ok:
        return Fault(FaultType.TRANSLATION, 0, cause="TxSZ")
    if not in_range:
        return Fault(FaultType.TRANSLATION, 0, cause="range")
    if p.e0pd and _as_el0(p, access):
        return Fault(FaultType.TRANSLATION, 0, cause="E0PD")
    if p.epd:
        return Fault(FaultType.TRANSLATION, 0, cause="EPD")
    return None


def _descend(
    fetch: Fetch, p: WalkParams, va: int, raw: list[RawStep], updates: list[Update], below_ns: Fetch | None
) -> tuple[int, int, int, int] | Fault:
    """From the root to the leaf: (level, descriptor PA, leaf, table attributes), or what stopped it."""
    table, inherited = p.base, 0
    over, table_mask, big_endian, haft = p.over, p.table_mask, p.big_endian, p.haft
    above = 0  # the level whose output address `table` is: 0 for TTBR
    for level, shift, mask, kinds in p.rows:
        pa = table | (va >> shift & mask) << 3
        if pa & over:
            return Fault(FaultType.ADDRESS_SIZE, above, cause="table" if raw else "TTBR")
        try:
            word = fetch(pa)
        except NoMemory:
            return Fault(FaultType.EXTERNAL_ON_WALK, level)
        except GranuleRefusal as refusal:
            return refusal.fault(level)
        if big_endian:
            word = int.from_bytes(word.to_bytes(8, "big"), "little")
        raw.append((level, pa, word))
        kind = kinds[word & 3]
        if kind is not Kind.TABLE:
            if kind is Kind.INVALID:
                return Fault(FaultType.TRANSLATION, level, cause="descriptor")
            return level, pa, word, inherited & p.inherited_mask
        inherited |= word
        if below_ns and word & p.ns_table:
            fetch = below_ns
        table, above = word & table_mask if table_mask else p.table_address(word), level
        if haft and not word & p.table_af and not table & over:
            updates.append(Update(pa, word, word | p.table_af))
    raise AssertionError("level 3 has no tables")


def _early_leaf_fault(p: TableParams, level: int, word: int) -> Fault | None:
    """What comes before the output address: a misprogrammed contiguous run, nT (both only where the CPU faults)."""
    if p.features.contiguous_faults and word & p.contiguous and p.run_too_large(level):
        return Fault(FaultType.TRANSLATION, level, cause="Contiguous")
    if p.features.nt_faults and level < LAST_LEVEL and p.features.bbm and word & p.nt:
        return Fault(FaultType.TRANSLATION, level, cause="nT")
    return None


def _before_output(p: WalkParams, level: int, word: int) -> Fault | None:
    """The checks of a stage 1 leaf that come before its output address: the early ones, then AMEC."""
    fault = _early_leaf_fault(p, level, word)
    if fault is None and p.amec_faults and not p.d128 and AMEC.get(word) and not LEAF_NS.get(word):
        return Fault(FaultType.TRANSLATION, level, cause="AMEC")
    return fault


def leaf_permissions(p: WalkParams, word: W, inherited: W) -> tuple[W, W, W]:
    """Base and overlay permission bits of leaves under table attributes `inherited`, and whether PAN refuses them.

    Ints, or uint64 arrays of one shape (then uint16 arrays come out).
    """
    rules = p.rules
    index = p.page["PIIndex"].get(word) if p.pie else p.direct_index(word, inherited)
    pan = rules.pan.at(index)
    if p.overlays is None:
        final: Any = rules.final.at(index)
        return _inside(p, word, final), final | ALL, pan
    overlay = p.overlays.at(p.page["POIndex"].get(word))
    base, overlay = with_overlay(rules.base.at(index), rules.wxn.at(index), rules.overlayable.at(index), overlay)
    return _inside(p, word, base), overlay, pan


def _inside(p: WalkParams, word: W, base: Any) -> Any:
    """Without execution where the leaf is outside the only space that the state may execute from (FEAT_RME)."""
    if p.space is None:
        return base
    beyond: Any = outside(p.space, not p.through_el1, word)
    return base & ~(EXECUTE * beyond) if isinstance(beyond, int) else base & ~(beyond * EXECUTE).astype(base.dtype)


def overlay_under_pan(p: WalkParams, word: W, overlay: Any) -> Any:
    """The overlay of leaves that PAN refuses: PAN takes the write permission that WXN looks at (direct permissions).

    Source: pseudocode S1DirectBasePermissions. It decides only which of two refusals is reported.
    """
    if p.overlays is None or p.pie:
        return overlay
    return overlay | (p.overlays.at(p.page["POIndex"].get(word)) & PW)


def _permission_fault(
    p: WalkParams,
    level: int,
    word: int,
    access: Access,
    unprivileged: bool,
    base: int,
    overlay: int,
    pan: int,
) -> Fault | None:
    """The first test that refuses the access (pseudocode S1CheckPermissions); overlays are tested before the base."""
    need = access.needs(p.cmow, unprivileged)
    if not need:
        return None
    if pan and access.pan_sensitive and not unprivileged and (p.pan if access.pan is None else access.pan):
        base, overlay = base & ~(PR | PW), overlay_under_pan(p, word, overlay)
    shift = TO_UNPRIVILEGED if unprivileged else 0
    for by_overlay, granted in ((True, overlay), (False, base)):
        missing = need & ~(granted >> shift)
        if missing:
            write = access.asks_write and not missing & PR
            return Fault(FaultType.PERMISSION, level, write=write, overlay=by_overlay, cause="permission")
    if p.pie and access.asks_write and not p.hd and word & p.not_dirty:
        return Fault(FaultType.PERMISSION, level, write=True, dirty_bit=True, cause="dirty")
    return None


def _updated(p: WalkParams, word: int, access: Access) -> int:
    """The leaf after hardware's update for an access that is allowed (pseudocode S1Translate, AccessFlag, Dirty)."""
    if not p.ha or (access.is_at and not p.features.at_updates):
        return word
    new = word | p.af
    if p.hd and access.writes and not access.is_at and (p.pie or word & p.dbm):
        new &= ~p.not_dirty
    return new


def _reported_ns(p: WalkParams, space: PASpace) -> bool:
    """NS as PAR_EL1 has it: EL3 tells four spaces, another state its own from Non-secure (pseudocode EncodePAR)."""
    return bool(space.ns) if p.space is PASpace.ROOT else space is PASpace.NONSECURE


def _leaf_output(p: WalkParams, level: int, word: int, inherited: int, access: Access, attr: int, perms: int) -> _Leaf:
    attr = _effective_attr(p, access, attr)
    run = p.run_length(level) if p.features.contiguous_output and word & p.contiguous else 1
    space = p.space and leaf_space(p.space, not p.through_el1, p.features.rme_secure, word)
    return _Leaf(
        changed=_updated(p, word, access) ^ word,
        attr=attr,
        sh=OUTER_SHAREABLE if FORCED_OUTER[attr] else p.sh if p.fmt.lpa2 else p.page["SH"].get(word),
        perms=perms,
        nG=bool(p.regime.has_el0 and (p.force_ng or word & p.ng)),
        ns=_reported_ns(p, space) if space else not p.secure or bool(word & p.ns),
        space=space,
        run=run,
    )


def leaf_memory(p: WalkParams, level: int, word: int) -> tuple[int, int]:
    """The memory attributes (a MAIR byte) and the shareability that a leaf gives to data accesses, fault or not."""
    found = _leaf_output(p, level, word, 0, Access(), p.mair[p.attr_index(word)], 0)
    return found.attr, found.sh


def _effective_attr(p: WalkParams, access: Access, attr: int) -> int:
    """Caches switched off make Normal memory non-cacheable; fetches see no Device type (end of S1Translate)."""
    if access.type is AccessType.FETCH:
        return NORMAL_NC if not p.fetch_cacheable or is_device(attr) else attr
    return NORMAL_NC if not p.data_cacheable and not is_device(attr) else attr


def _mmu_off(p: WalkParams, va: int, access: Access) -> Translation | Fault:
    """Stage 1 off: the VA is the PA (pseudocode AArch64.S1DisabledOutput)."""
    fetch = access.type is AccessType.FETCH
    top = 55 if p.tbi and not (p.tbid and fetch) else 63
    if va & ((1 << top + 1) - (1 << p.features.pa_bits)):
        return Fault(FaultType.ADDRESS_SIZE, 0, cause="VA")
    if p.default_cacheable:
        attr, sh = NORMAL_WB, NON_SHAREABLE
    elif fetch:
        attr, sh = NORMAL_WT if p.fetch_cacheable else NORMAL_NC, OUTER_SHAREABLE
    else:
        attr, sh = DEVICE_nGnRnE, OUTER_SHAREABLE
    if not fetch and not access.aligned and is_device(attr):
        return Fault(FaultType.ALIGNMENT, 0)
    pa = va & (1 << p.features.pa_bits) - 1
    ns = p.space is PASpace.NONSECURE if p.space else not p.secure
    return Translation(pa, None, 0, attr, sh, ALL, False, ns, p.space)
