"""Stage 2: from an IPA to a PA, by the tables of VTTBR_EL2 or VSTTBR_EL2, for EL1&0.

Rules of this file:
- As in walk.py: the only effects are `fetch` and `swap`, a fault is returned, every descriptor read is kept.
- The order of checks is the pseudocode's AArch64.S2Translate: registers and range, tables, leaf, permissions.
- What a leaf allows is in stage2_permissions.py, what stage 2 makes of stage 1's attributes in combine.py.
- Secure state has two IPA spaces, each with its own root and size (VSTCR_EL2, VSTTBR_EL2 for the Secure one).
- With FEAT_RME tables and outputs are in a physical address space; a Realm's guest neither executes outside Realm
  space nor has its stage 1 tables there.
Sources: pseudocode AArch64.GetS2TTWParams, S2StartLevel, S2InvalidSL, S2InconsistentSL, S2TTBaseAddress, S2Walk,
S2CheckPermissions; Arm ARM D8.2 (concatenated tables), D8.6 (S2AP, XN).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

from pgtable.access import Access, AccessType
from pgtable.combine import says_device
from pgtable.descriptors import LAST_LEVEL, Format, Granule, Kind
from pgtable.faults import Fault, FaultType, GranuleRefusal
from pgtable.features import Features
from pgtable.memory import NoMemory
from pgtable.params import ONLY_D128, Regime, granule_of, most_txsz, output_bits, stage2_on
from pgtable.registers import (
    HCR_EL2,
    PA_BITS,
    SCR_EL3,
    SCTLR_EL1,
    TTBR,
    TTBR_52,
    VSTCR_EL2,
    VTCR_EL2,
    VTTBR_EL2,
    Registers,
)
from pgtable.spaces import PASpace, state_space
from pgtable.stage2_permissions import (
    ALL,
    READ,
    WALK_WRITE,
    WRITE,
    base,
    indirect,
    is_clean,
    made_dirty,
    needs,
    overlay,
    permissions,
)
from pgtable.table_params import TableParams
from pgtable.walk import Fetch, RawStep, Swap, Update, in_memory
from pgtable.why_stage2 import stage2_lines

# The root's level by SL0, and with DS also by SL2 (4K): pseudocode S2StartLevel.
_START = {
    Granule.K4: {0: 2, 1: 1, 2: 0, 3: 3, 4: -1},
    Granule.K16: {0: 3, 1: 2, 2: 1, 3: 0},
    Granule.K64: {0: 3, 1: 2, 2: 1},
}
# SL0 (4: SL2) by level.
SL0_OF_LEVEL = {granule: {level: sl for sl, level in rows.items()} for granule, rows in _START.items()}
# The PA size below which a root level is not there (pseudocode S2InvalidSL); 4 is SL2 = 1 with SL0 = 0.
_LEAST_PA = {Granule.K4: {2: 44, 4: 52}, Granule.K16: {2: 42, 3: 52}, Granule.K64: {2: 44}}
CONCATENATED = 4  # bits: at most 16 root tables in a row


@dataclass(frozen=True)
class Stage2Params(TableParams):
    """What stage 2 of EL1&0 takes from HCR_EL2, VTCR_EL2 and VTTBR_EL2."""

    features: Features
    fmt: Format
    on: bool  # HCR_EL2.VM, or DC
    t0sz: int
    sl: int  # SL0, or 4 for SL2
    sl_ok: bool
    txsz_ok: bool
    ps_bits: int
    wide: bool  # VTTBR holds a 52-bit address
    vttbr: int
    vmid: int
    ha: bool
    hd: bool
    ptw: bool  # HCR_EL2.PTW: stage 1 tables in Device memory fault
    fwb: bool
    data_off: bool  # HCR_EL2.CD
    fetch_off: bool  # HCR_EL2.ID
    big_endian: bool
    haft: bool  # VTCR_EL2.HAFT
    sh: int  # VTCR_EL2.SH0: what a leaf has with DS = 1
    indirect: tuple[int, ...] | None = None  # by PIIndex: permissions (VTCR_EL2.S2PIE)
    overlays: tuple[int, ...] | None = None  # by POIndex (VTCR_EL2.S2POE)
    ipa_ns: bool = True  # of the Non-secure IPA space
    ipa_space: PASpace | None = None  # the space of IPAs; None without FEAT_RME
    table_space: PASpace | None = None  # where the tables are
    output_ns: bool = True  # PAs are Non-secure
    regime: Regime = Regime.EL10
    upper: bool = False
    secure: bool = False

    d128: ClassVar[bool] = False  # the descriptors have 128 bits

    @classmethod
    def of(cls, regs: Registers, *, ns: bool = False) -> Stage2Params:
        """The parameters that the registers give; kept with `regs`. `ns`: Secure state's Non-secure IPA space."""
        known: Stage2Params | None = regs._params.get(("stage 2", ns))
        if known is None:
            if vtcr_d128(regs):
                raise ValueError(f"VTCR_EL2.D128 is 1: {ONLY_D128}")
            known = regs._params["stage 2", ns] = cls._read(regs, ns)
        return known

    @classmethod
    def _read(cls, regs: Registers, ns: bool) -> Stage2Params:
        f, hcr, vtcr = regs.features, HCR_EL2.view(regs.HCR_EL2), VTCR_EL2.view(regs.VTCR_EL2)
        state = state_space(f, regs.SCR_EL3, 1)
        secure = not SCR_EL3["NS"].get(regs.SCR_EL3) if state is None else state is PASpace.SECURE
        own = VTCR_EL2.view(regs.VSTCR_EL2) if secure and not ns else vtcr  # T0SZ, SL0, TG0, SL2: each space's own
        granule = granule_of(int(own.TG0), False, f)
        ds = bool(f.lpa2 and granule is not Granule.K64 and vtcr.DS)
        sl = int(own.SL0) | (4 if ds and granule is Granule.K4 and own.SL2 else 0)
        limit = min(52 if granule is Granule.K64 or ds else 48, f.pa_bits)
        t0sz = int(own.T0SZ)
        vmid = VTTBR_EL2["VMID"].get(regs.VTTBR_EL2)
        pie = bool(f.s2pie and vtcr.S2PIE)
        poe = bool(f.s2poe and pie and vtcr.S2POE)
        fmt = Format(granule, ds, stage2=True, fwb=bool(hcr.FWB), lpa=f.pa_bits >= 52, pie=pie, poe=poe)
        return cls(
            features=f,
            fmt=fmt,
            on=stage2_on(regs),
            t0sz=t0sz,
            sl=sl,
            sl_ok=sl in _START[granule] and f.pa_bits >= _LEAST_PA[granule].get(sl, 0) and _allowed(granule, sl, ds, f),
            txsz_ok=64 - limit <= t0sz <= most_txsz(granule, f),
            ps_bits=output_bits(int(vtcr.PS), granule, f),
            wide=ds or (granule is Granule.K64 and f.pa_bits >= 52 and PA_BITS[int(vtcr.PS)] == 52),
            vttbr=regs.VSTTBR_EL2 if secure and not ns else regs.VTTBR_EL2,
            vmid=vmid if vtcr.VS else vmid & 0xFF,
            ha=bool(f.hafdbs and vtcr.HA),
            hd=bool(f.hafdbs >= 2 and vtcr.HA and vtcr.HD),
            ptw=bool(hcr.PTW),
            fwb=bool(hcr.FWB),
            data_off=bool(hcr.CD),
            fetch_off=bool(hcr.ID),
            big_endian=bool(SCTLR_EL1["EE"].get(regs.SCTLR_EL2)),
            haft=bool(f.haft and vtcr.HA and vtcr.HAFT),
            sh=int(vtcr.SH0),
            indirect=indirect(regs.S2PIR_EL2) if pie else None,
            overlays=indirect(regs.S2POR_EL1) if poe else None,
            ipa_ns=ns or (not secure and state is not PASpace.REALM),
            ipa_space=PASpace.NONSECURE if state and ns else state,
            table_space=state and (PASpace.NONSECURE if secure and _tables_nonsecure(regs, ns) else state),
            output_ns=state is not PASpace.REALM and (not secure or _leaves_secure(regs, ns)),
        )

    @property
    def ia_bits(self) -> int:
        """Bits of the IPA that are translated."""
        return 64 - self.t0sz

    @cached_property
    def start_level(self) -> int:
        """The level of the root tables."""
        return _START[self.fmt.granule].get(self.sl, LAST_LEVEL)

    @cached_property
    def consistent(self) -> bool:
        """T0SZ and SL agree: one to sixteen root tables (pseudocode S2InconsistentSL)."""
        granule = self.fmt.granule
        least = (LAST_LEVEL - self.start_level) * granule.stride + granule.page_shift + 1
        return least <= self.ia_bits <= least + granule.stride - 1 + CONCATENATED

    @cached_property
    def root_tables(self) -> int:
        """How many tables are concatenated at the root; 1 for a root that is smaller than a table."""
        return max(1, self.levels[0][2] + 1 >> self.fmt.granule.stride)

    @cached_property
    def base(self) -> int:
        """The PA of the first root table (pseudocode S2TTBaseAddress): aligned to the size of all of them."""
        size = 8 * (self.levels[0][2] + 1)
        size = max(size, 64) if self.wide else size
        return (TTBR_52 if self.wide else TTBR)["BADDR"].get(self.vttbr) & -size

    @property
    def not_dirty(self) -> int:
        """S2AP[1], which hardware sets for a dirty page; Dirty with indirect permissions. The same bit."""
        return self.page["Dirty"].mask if self.fmt.pie else self.page["S2AP"].put(0, WRITE)

    @property
    def root(self) -> int:
        """VTTBR_EL2."""
        return self.vttbr

    def output_space(self, word: int) -> PASpace | None:
        """The space that the leaf `word` outputs to; None without FEAT_RME (pseudocode S2NextWalkStateLeaf)."""
        if self.ipa_space is None:
            return None
        if self.ipa_space is PASpace.REALM:
            return PASpace.NONSECURE if self.page["NS"].get(word) else PASpace.REALM
        return PASpace.NONSECURE if self.output_ns else PASpace.SECURE

    @property
    def why_off(self) -> str:
        """Why stage 2 translates nothing, "" if it does."""
        if not self.on:
            return "stage 2 is off (HCR_EL2.VM and DC)"
        for ok, text in ((self.txsz_ok, "T0SZ is out of range"), (self.sl_ok, "SL0 is reserved")):
            if not ok:
                return f"VTCR_EL2.{text}: every access is a translation fault"
        if not self.consistent:
            return "VTCR_EL2.SL0 does not go with T0SZ: every access is a translation fault"
        return "VTTBR_EL2's address exceeds the output size" if self.base & self.over else ""


def _leaves_secure(regs: Registers, ns: bool) -> bool:
    """In Secure state: the output of an IPA space is Non-secure (pseudocode SS2OutputPASpace)."""
    vstcr, vtcr = VSTCR_EL2.view(regs.VSTCR_EL2), VTCR_EL2.view(regs.VTCR_EL2)
    return bool(vstcr.SW or vstcr.SA or (ns and (vtcr.NSW or vtcr.NSA)))


def _tables_nonsecure(regs: Registers, ns: bool) -> bool:
    """In Secure state: the tables of an IPA space are in Non-secure memory (pseudocode SS2InitialTTWState)."""
    return bool(VTCR_EL2.view(regs.VTCR_EL2).NSW if ns else VSTCR_EL2.view(regs.VSTCR_EL2).SW)


def vtcr_d128(regs: Registers) -> bool:
    """Stage 2 has 128-bit descriptors: pgtable.d128."""
    return bool(regs.features.d128 and VTCR_EL2["D128"].get(regs.VTCR_EL2))


def _allowed(granule: Granule, sl: int, ds: bool, f: Features) -> bool:
    """SL0 = 3 needs FEAT_TTST (4K), or DS (16K); with SL2 every other SL0 is reserved."""
    if granule is Granule.K4:
        return sl != 3 or f.ttst
    return sl != 3 or (granule is Granule.K16 and ds)


class Stage2(NamedTuple):
    """Where an IPA goes: `word` and `level` of the leaf (level None with stage 2 off).

    `perms`: bits READ ... of stage2_permissions.py. `ns`: the PA is Non-secure. `space`: with FEAT_RME, whose it is.
    """

    pa: int
    level: int | None
    word: int
    perms: int
    ns: bool = True
    space: PASpace | None = None


class Stage2Walk(NamedTuple):
    """A stage 2 walk with its evidence. `raw`: (level, PA, word) of each descriptor; `s1ptw`: of a stage 1 table."""

    ipa: int
    access: Access
    s1ptw: bool
    params: Stage2Params
    raw: tuple[RawStep, ...]
    result: Stage2 | Fault
    updates: tuple[Update, ...]

    def __str__(self) -> str:
        head = f"IPA {self.ipa:#x}: {self.access}, stage 2 of EL1&0"
        return "\n".join([head, *(f"  {line}" for line in stage2_lines(self))])

    @property
    def plain(self) -> Stage2Params:
        """The parameters for `raw`, whose words are in the CPU's order."""
        return replace(self.params, big_endian=False)

    @property
    def stored_updates(self) -> tuple[Update, ...]:
        """`updates` as memory holds them, where SCTLR_EL2.EE has tables in the other byte order."""
        return tuple(in_memory(update, self.params.big_endian) for update in self.updates)


def stage2_walk(
    fetch: Fetch, p: Stage2Params, ipa: int, access: Access, *, s1ptw: bool = False, swap: Swap | None = None
) -> Stage2Walk:
    """What stage 2 makes of `ipa`. `access`: of the guest; `s1ptw`: a read (or update) of a stage 1 descriptor."""
    while True:
        raw: list[RawStep] = []
        updates: list[Update] = []
        result = _translate(fetch, p, ipa, access, s1ptw, raw, updates)
        if swap is None or all(swap(*in_memory(update, p.big_endian)) for update in updates):
            return Stage2Walk(ipa, access, s1ptw, p, tuple(raw), result, tuple(updates))


def _fault(kind: FaultType, level: int, s1ptw: bool, cause: str, *, write: bool = False) -> Fault:
    return Fault(kind, level, stage=2, s1ptw=s1ptw, write=write, cause=cause)


def _translate(
    fetch: Fetch, p: Stage2Params, ipa: int, access: Access, s1ptw: bool, raw: list[RawStep], updates: list[Update]
) -> Stage2 | Fault:
    if not p.on:
        return Stage2(ipa, None, 0, ALL, p.ipa_ns, p.ipa_space)
    for ok, cause in ((p.txsz_ok, "T0SZ"), (p.sl_ok, "SL0"), (p.consistent, "SL0"), (not ipa >> p.ia_bits, "range")):
        if not ok:
            return _fault(FaultType.TRANSLATION, 0, s1ptw, cause)
    table, above = p.base, 0
    for level, shift, mask in p.levels:
        pa = table + ((ipa >> shift & mask) << 3)
        if table & p.over:
            return _fault(FaultType.ADDRESS_SIZE, above, s1ptw, "table" if raw else "VTTBR")
        try:
            word = fetch(pa)
        except NoMemory:
            return _fault(FaultType.EXTERNAL_ON_WALK, level, s1ptw, "memory")
        except GranuleRefusal as refusal:
            return refusal.fault(level, stage=2, s1ptw=s1ptw)
        if p.big_endian:
            word = int.from_bytes(word.to_bytes(8, "big"), "little")
        raw.append((level, pa, word))
        kind = p.fmt.kind(word, level)
        if kind is Kind.INVALID:
            return _fault(FaultType.TRANSLATION, level, s1ptw, "descriptor")
        if kind is not Kind.TABLE:
            return _leaf(p, ipa, access, s1ptw, (level, pa, word), updates)
        table, above = p.table_address(word), level
        if p.haft and not word & p.table_af and not table & p.over:
            updates.append(Update(pa, word, word | p.table_af))
    raise AssertionError("level 3 has no tables")


def _leaf(
    p: Stage2Params, ipa: int, access: Access, s1ptw: bool, step: RawStep, updates: list[Update]
) -> Stage2 | Fault:
    level, at, word = step
    layout, size = p.fmt.leaf(level), p.fmt.granule.level_size(level)
    oa = layout["OA"].get(word)
    if oa & p.over:
        return _fault(FaultType.ADDRESS_SIZE, level, s1ptw, "OA")
    if not layout["AF"].get(word) and not p.ha:
        return _fault(FaultType.ACCESS_FLAG, level, s1ptw, "AF")
    refused = _refused(p, word, access, s1ptw)
    if refused:
        return refused._replace(level=level)
    if p.ptw and s1ptw and is_device(p, word):
        return _fault(FaultType.PERMISSION, level, s1ptw, "PTW")
    new = _updated(p, word, access, s1ptw)
    if new != word:
        updates.append(Update(at, word, new))
    space = p.output_space(word)
    ns = p.output_ns if space is None else space is PASpace.NONSECURE
    return Stage2(oa & -size | ipa & size - 1, level, word, permissions(p, word), ns, space)


def _refused(p: Stage2Params, word: int, access: Access, s1ptw: bool) -> Fault | None:
    """The first permission that is missing: the overlay's, the base's, the dirty state."""
    need = needs(access, s1ptw)
    write = bool(need & WALK_WRITE) if s1ptw else access.asks_write
    for by_overlay, granted in ((True, overlay(p, word)), (False, base(p, word))):
        if not by_overlay and _leaves_realm(p, word, access, s1ptw):
            return _fault(FaultType.PERMISSION, 0, s1ptw, "Realm")
        missing = need & ~granted
        if missing:
            fault = _fault(FaultType.PERMISSION, 0, s1ptw, "permission", write=write and not missing & READ)
            return fault._replace(overlay=by_overlay)
    if write and not p.hd and is_clean(p, word):
        return _fault(FaultType.PERMISSION, 0, s1ptw, "dirty", write=True)._replace(dirty_bit=True)
    return None


def _leaves_realm(p: Stage2Params, word: int, access: Access, s1ptw: bool) -> bool:
    """A Realm's guest would execute, or have a stage 1 table, outside Realm space."""
    if p.ipa_space is not PASpace.REALM or not (s1ptw or access.type is AccessType.FETCH):
        return False
    return p.output_space(word) is not PASpace.REALM


def is_device(p: Stage2Params, word: int) -> bool:
    """MemAttr says Device."""
    return says_device(p.fmt.leaf(LAST_LEVEL)["MemAttr"].get(word), fwb=p.fwb)


def _updated(p: Stage2Params, word: int, access: Access, s1ptw: bool) -> int:
    """The leaf after hardware's update."""
    if not p.ha or (access.is_at and not p.features.at_updates and not s1ptw):
        return word
    new = word | p.af
    return made_dirty(p, new) if p.hd and access.writes else new
