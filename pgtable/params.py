"""The registers of a translation regime, read once into a frozen `WalkParams`.

Sources: pseudocode AArch64.GetS1TTWParams and its per-regime forms, S1MinTxSZ, S1StartLevel, S1TTBaseAddress,
PhysicalAddressSize. What the architecture leaves to the implementation is a field of `Features`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, ClassVar, cast

from pgtable.bits import Layout, View, W
from pgtable.descriptors import AP_READ_ONLY, LAST_LEVEL, Format, Granule
from pgtable.features import Features
from pgtable.permissions import (
    PRIVILEGED,
    UNPRIVILEGED,
    Rules,
    RuleTable,
    direct_index,
    direct_rules,
    indirect_rules,
    overlaid,
    overlay_rules,
)
from pgtable.registers import (
    HCR_EL2,
    MAIR,
    PA_BITS,
    SCR_EL3,
    SCTLR2_EMEC,
    SCTLR_EL1,
    TCR2,
    TCR_EL1,
    TCR_EL2,
    TCR_EL3,
    TTBR,
    TTBR_52,
    Registers,
)
from pgtable.spaces import PASpace, state_space
from pgtable.table_params import TableParams

ONLY_D128 = "128-bit descriptors are for translate and pgtable.walk128 only"
RANGE_BIT = 1 << 55  # of a VA: which half of the VA space it is in (pseudocode GetVARange)


class Regime(Enum):
    """A translation regime; the value is its name on the command line."""

    EL10 = "EL10"
    EL20 = "EL20"
    EL2 = "EL2"
    EL3 = "EL3"

    @property
    def has_el0(self) -> bool:
        """Has an unprivileged level, hence two VA ranges (pseudocode HasUnprivileged)."""
        return self in (Regime.EL10, Regime.EL20)

    @property
    def el(self) -> int:
        """The exception level whose registers control it."""
        return {"EL10": 1, "EL20": 2, "EL2": 2, "EL3": 3}[self.value]


@dataclass(frozen=True)
class WalkParams(TableParams):
    """Everything that one half of a regime's VA space takes from the registers.

    `fmt` says which descriptor rows apply; `rules` and `overlays` are the permission tables.
    """

    regime: Regime
    upper: bool
    features: Features
    fmt: Format
    txsz: int
    txsz_ok: bool
    ps_bits: int  # output address size in bits
    wide_ttbr: bool  # TTBR holds a 52-bit address
    ttbr: int
    mmu_on: bool
    tbi: bool
    tbid: bool
    epd: bool
    e0pd: bool
    table_permissions: bool  # APTable, UXNTable, PXNTable count (HPD = 0, no PIE)
    ha: bool
    hd: bool
    haft: bool
    pie: bool
    big_endian: bool  # table walks (SCTLR.EE)
    cmow: bool
    pan: bool
    uao: bool
    el0_is_host: bool  # HCR_EL2.{E2H, TGE} = {1, 1}
    data_cacheable: bool  # SCTLR.C
    fetch_cacheable: bool  # SCTLR.I
    default_cacheable: bool  # HCR_EL2.DC
    through_stage2: bool  # the result, and the addresses of tables, are IPAs
    secure: bool
    asid: int | None  # None: the regime has no ASIDs
    cnp: bool  # common, not private: TLB entries are shared with other PEs
    sh: int  # TCR.SHn: what a leaf has when DS = 1
    mair: tuple[int, ...]
    rules: Rules
    overlays: RuleTable | None
    space: PASpace | None  # the security state's own space; None without FEAT_RME
    force_ng: bool  # TCR2.FNGn: no entry is global
    amec_faults: bool  # a leaf in Realm memory with AMEC = 1 faults

    d128: ClassVar[bool] = False  # the descriptors have 128 bits

    @classmethod
    def of(cls, regs: Registers, regime: Regime, va: int) -> WalkParams:
        """The parameters for the half of `regime` that `va` is in (bit 55); kept with `regs`."""
        upper = bool(va & RANGE_BIT) and regime.has_el0
        params = regs._params.get((regime, upper))
        if params is None:
            if d128_on(regs, regime):
                raise ValueError(f"{'TCR' if regime is Regime.EL3 else 'TCR2'}_EL{regime.el}.D128 is 1: {ONLY_D128}")
            params = regs._params[regime, upper] = _read(regs, regime, upper)
        return params

    @property
    def through_el1(self) -> bool:
        """The regime is EL1&0's, which has stage 2 above it."""
        return self.regime is Regime.EL10

    @cached_property
    def ia_bits(self) -> int:
        """Bits of the VA that are translated: 64 - TxSZ."""
        return 64 - self.txsz

    @cached_property
    def start_level(self) -> int:
        """The level of the root table (pseudocode S1StartLevel)."""
        granule = self.fmt.granule
        return LAST_LEVEL - (self.ia_bits - 1 - granule.page_shift) // granule.stride

    @cached_property
    def base(self) -> int:
        """The root table's PA (pseudocode S1TTBaseAddress): BADDR aligned down to the table's size."""
        size = 8 * self.root_entries
        if self.wide_ttbr:
            size = max(size, 64)
        return (TTBR_52 if self.wide_ttbr else TTBR)["BADDR"].get(self.ttbr) & -size

    @cached_property
    def unusual(self) -> bool:
        """There is more to ask before a walk than the VA's range."""
        return self.epd or self.e0pd or not self.txsz_ok

    @cached_property
    def verdicts(self) -> dict[Any, Any]:
        """What walk.py has decided about leaves, by their attributes; kept with the parameters."""
        return {}

    @cached_property
    def data_range_mask(self) -> int:
        """VA bits that must all be 0 (lower range) or 1 (upper range) for data (pseudocode VAIsOutOfRange)."""
        top = 55 if self.tbi else 63
        return (1 << top + 1) - (1 << min(self.ia_bits, top + 1))

    @cached_property
    def fetch_range_mask(self) -> int:
        """The same for instruction fetches: TBID gives them back the top byte."""
        return (1 << 64) - (1 << self.ia_bits) if self.tbid else self.data_range_mask

    def physical_range_mask(self, fetch: bool) -> int:
        """VA bits that must be 0 with the MMU off: those beyond the PA size (pseudocode AArch64.S1DisabledOutput)."""
        top = 55 if self.tbi and not (self.tbid and fetch) else 63
        return (1 << top + 1) - (1 << self.features.pa_bits)

    @cached_property
    def inherited_mask(self) -> int:
        """The table attributes that limit permissions below."""
        table = self.fmt.table(LAST_LEVEL - 1)
        names = ("APTable", "UXNTable", "PXNTable") if self.fmt.el0 else ("APTable", "XNTable")
        return table.mask(*names) if self.table_permissions else 0

    def attr_index(self, word: int) -> int:
        """The number of a leaf's byte in `mair` (pseudocode S1DecodeMemAttrs, S1AttrIndex with FEAT_AIE)."""
        index = self.page["AttrIndx"].get(word)
        return index | self.page["AttrIndx3"].get(word) << 3 if self.fmt.aie else index

    def direct_index(self, word: W, inherited: W) -> W:
        """The row of the direct permission table for a leaf under table attributes `inherited`."""
        page, table = self.page, self.fmt.table(LAST_LEVEL - 1)
        uxn, pxn = page["UXN" if self.fmt.el0 else "XN"], page["PXN"]
        ap: Any = page["AP"].get(word)
        limit = table["APTable"].get(inherited)
        xn_limit = table["UXNTable" if self.fmt.el0 else "XNTable"].get(inherited)
        px_limit: Any = table["PXNTable"].get(inherited) if self.fmt.el0 else 0
        if self.hd:  # hardware makes a clean page with DBM writable: AP[2] is taken as 0
            ap = ap & (3 ^ page["DBM"].get(word) << 1)
        return cast(W, direct_index(ap, limit, uxn.get(word) | xn_limit, pxn.get(word) | px_limit))

    @property
    def root(self) -> int:
        """The half's TTBR."""
        return self.ttbr

    @property
    def why_off(self) -> str:
        """Why the half translates nothing, "" if it does."""
        if not self.mmu_on:
            return "the MMU is off"
        if self.epd:
            return "TCR.EPD is set: walks are off"
        if not self.txsz_ok:
            return f"TCR.T{int(self.upper)}SZ is out of range: every access is a translation fault"
        return "TTBR's address exceeds the output size" if self.base & self.over else ""

    @property
    def half_base(self) -> int:
        """The lowest VA of this half."""
        return (1 << 64) - (1 << self.ia_bits) if self.upper else 0

    @cached_property
    def ng(self) -> int:
        """The leaf's nG bit."""
        return self.page["nG"].mask

    @cached_property
    def ns(self) -> int:
        """The leaf's NS bit."""
        return self.page["NS"].mask

    @cached_property
    def not_dirty(self) -> int:
        """AP[2], which hardware clears for a dirty page; nDirty with PIE. The same bit."""
        return self.page["nDirty"].mask if self.pie else self.page["AP"].put(0, AP_READ_ONLY)

    @cached_property
    def dbm(self) -> int:
        """The leaf's DBM bit; with PIE it is part of PIIndex and every page counts as having it."""
        return 0 if self.pie else self.page["DBM"].mask

    @cached_property
    def ns_table(self) -> int:
        """A table's NSTable bit."""
        return self.fmt.table(LAST_LEVEL - 1)["NSTable"].mask


_TCR: dict[Regime, tuple[str, Layout]] = {
    Regime.EL10: ("TCR_EL1", TCR_EL1),
    Regime.EL20: ("TCR_EL2", TCR_EL1),
    Regime.EL2: ("TCR_EL2", TCR_EL2),
    Regime.EL3: ("TCR_EL3", TCR_EL3),
}

# TGn decoded, for the lower and the upper range.
_TG: tuple[dict[int, Granule], dict[int, Granule]] = (
    {0: Granule.K4, 1: Granule.K64, 2: Granule.K16},
    {1: Granule.K16, 2: Granule.K4, 3: Granule.K64},
)


def granule_of(field: int, upper: bool, features: Features) -> Granule:
    """TG0 or TG1 decoded; a reserved or missing granule acts as the smallest implemented one (IMPDEF choice)."""
    granule = _TG[upper].get(field)
    if granule is not None and granule.label in features.granules:
        return granule
    return min((g for g in Granule if g.label in features.granules), key=lambda g: g.page_shift)


def most_txsz(granule: Granule, f: Features) -> int:
    """The largest TxSZ (pseudocode S1MaxTxSZ, S2MaxTxSZ)."""
    return (47 if granule is Granule.K64 else 48) if f.ttst else 39


def _txsz(txsz: int, granule: Granule, ds: bool, f: Features) -> tuple[int, bool]:
    """TxSZ, clamped into its limits, and whether it was in them (pseudocode S1MinTxSZ, S1MaxTxSZ, S1TxSZFaults)."""
    least = 12 if ds or (f.lva and granule is Granule.K64) else 16
    most = most_txsz(granule, f)
    faults = f.txsz_faults or (f.lva and txsz < least)  # with FEAT_LVA no choice is left below the minimum
    return min(max(txsz, least), most), least <= txsz <= most or not faults


def output_bits(field: int, granule: Granule, f: Features) -> int:
    """Output address size in bits (pseudocode PhysicalAddressSize)."""
    limit = min(52 if granule is Granule.K64 or f.lpa2 else 48, f.pa_bits)
    return min(PA_BITS[field], limit)


def _second(regs: Registers, regime: Regime) -> View:
    """TCR2's fields for the regime: zero where it is not there or switched off (pseudocode IsTCR2EL1Enabled)."""
    if regime is Regime.EL3:
        return TCR_EL3.view(regs.TCR_EL3)
    on = regs.features.tcr2 and SCR_EL3["TCR2En"].get(regs.SCR_EL3)
    return TCR2.view(regs[f"TCR2_EL{regime.el}"] if on else 0)


def d128_on(regs: Registers, regime: Regime) -> bool:
    """The regime has 128-bit descriptors (pseudocode S1TTWParamsEL10, EL20 and EL3; EL2 alone never): pgtable.d128."""
    return bool(regs.features.d128 and regime is not Regime.EL2 and _second(regs, regime).D128)


def _overlaid(regs: Registers, regime: Regime, second: View) -> int:
    """The permissions that overlays are on for (pseudocode S1POEnabled, S1E0POEnabled)."""
    if not regs.features.poe:
        return 0
    return (PRIVILEGED if second.POE else 0) | (UNPRIVILEGED if regime.has_el0 and second.E0POE else 0)


def _overlays(regs: Registers, regime: Regime, levels: int) -> RuleTable | None:
    """The overlay table when an overlay is on at either level."""
    if not levels:
        return None
    por = regs[f"POR_EL{regime.el}"]
    return overlay_rules(por if levels & PRIVILEGED else None, regs.POR_EL0 if levels & UNPRIVILEGED else None)


def stage2_on(regs: Registers) -> bool:
    """Stage 2 of EL1&0 is on: HCR_EL2.VM or DC, not for a host's EL0, and in Secure state only with SCR_EL3.EEL2.

    Source: pseudocode EL2Enabled, AArch64.FullTranslate; Arm ARM, HCR_EL2.{VM, DC}.
    """
    hcr, scr = HCR_EL2.view(regs.HCR_EL2), SCR_EL3.view(regs.SCR_EL3)
    return bool((hcr.VM or hcr.DC) and not (hcr.E2H and hcr.TGE) and (scr.NS or scr.EEL2))


def _rules(regs: Registers, regime: Regime, pie: bool, wxn: bool, epan: bool) -> Rules:
    if not pie:
        return direct_rules(regime.has_el0, wxn, epan)
    pire0 = regs[f"PIRE0_EL{regime.el}"] if regime.has_el0 else None
    return indirect_rules(regs[f"PIR_EL{regime.el}"], pire0)


def _asid(regs: Registers, el: int, tcr: View, own: int | None) -> int:
    """The current ASID: from the TTBR that TCR.A1 names, or the half's `own`; 8 bits unless TCR.AS (ASID_read)."""
    asid = TTBR["ASID"].get(regs[f"TTBR{int(tcr.A1) if own is None else own}_EL{el}"])
    return asid if tcr.AS else asid & 0xFF


def amec_refused(regs: Registers, regime: Regime, upper: bool) -> bool:
    """EMEC = 1 and AMEC0 or AMEC1 = 0, for EL2 and EL2&0 in Realm state (pseudocode S1AMECFault)."""
    scr, second = SCR_EL3.view(regs.SCR_EL3), _second(regs, regime)
    on = regs.features.mec and scr.NSE and scr.NS and scr.SCTLR2En and SCTLR2_EMEC.get(regs.SCTLR2_EL2)
    return bool(on and regime in (Regime.EL2, Regime.EL20) and not (second.AMEC1 if upper else second.AMEC0))


def _mair(regs: Registers, el: int, aie: bool) -> tuple[int, ...]:
    """The attribute bytes by AttrIndx: eight, or sixteen with MAIR2."""
    low = tuple(f.get(regs[f"MAIR_EL{el}"]) for f in reversed(MAIR.fields))
    return low + tuple(f.get(regs[f"MAIR2_EL{el}"]) for f in reversed(MAIR.fields)) if aie else low


def _read(regs: Registers, regime: Regime, upper: bool) -> WalkParams:
    f = regs.features
    el, has_el0 = regime.el, regime.has_el0
    name, layout = _TCR[regime]
    tcr, sctlr, hcr = layout.view(regs[name]), SCTLR_EL1.view(regs[f"SCTLR_EL{el}"]), HCR_EL2.view(regs.HCR_EL2)
    second = _second(regs, regime)

    def half(field: str) -> int:
        """A field that a regime with two VA ranges has once for each, and another regime once."""
        return int(getattr(tcr, f"{field}{int(upper)}" if has_el0 else field))

    space = state_space(f, regs.SCR_EL3, el)
    granule = granule_of(int(tcr.TG1 if upper else tcr.TG0), upper, f)
    d128 = d128_on(regs, regime)
    ds = bool(not d128 and f.lpa2 and granule is not Granule.K64 and tcr.DS)
    pie, aie = d128 or bool(f.pie and second.PIE), bool(f.aie and second.AIE)
    overlay_levels = _overlaid(regs, regime, second)
    overlays = _overlays(regs, regime, overlay_levels)
    epan = bool(f.pan >= 3 and has_el0 and sctlr.EPAN)
    rules = _rules(regs, regime, pie, bool(sctlr.WXN), epan)
    txsz, txsz_ok = _txsz(int(tcr.T1SZ if upper else tcr.T0SZ), granule, ds, f)
    ps = int(tcr.IPS if has_el0 else tcr.PS)
    return WalkParams(
        regime=regime,
        upper=upper,
        features=f,
        fmt=Format(granule, ds, has_el0, pie, poe=overlays is not None, aie=aie, lpa=f.pa_bits >= 52),
        txsz=txsz,
        txsz_ok=txsz_ok,
        ps_bits=output_bits(ps, granule, f),
        wide_ttbr=ds or (granule is Granule.K64 and f.pa_bits >= 52 and PA_BITS[ps] == 52),
        ttbr=regs[f"TTBR{int(upper)}_EL{el}"],
        mmu_on=bool(sctlr.M) and not (regime is Regime.EL10 and (hcr.DC or hcr.TGE)),
        tbi=bool(half("TBI")),
        tbid=bool(f.pauth and half("TBID")),
        epd=bool(has_el0 and half("EPD")),
        e0pd=bool(f.e0pd and has_el0 and half("E0PD")),
        table_permissions=not ((f.hpds and half("HPD")) or pie or aie or overlays),
        ha=bool(f.hafdbs and tcr.HA),
        hd=bool(f.hafdbs >= 2 and tcr.HA and tcr.HD),
        haft=bool(f.haft and tcr.HA and second.HAFT),
        pie=pie,
        big_endian=bool(sctlr.EE),
        cmow=bool(has_el0 and sctlr.CMOW),
        pan=bool(f.pan and has_el0 and regs.PAN),
        uao=bool(f.uao and regs.UAO),
        el0_is_host=bool(hcr.E2H and hcr.TGE),
        data_cacheable=bool(sctlr.C),
        fetch_cacheable=bool(sctlr.I),
        default_cacheable=bool(regime is Regime.EL10 and hcr.DC),
        through_stage2=regime is Regime.EL10 and stage2_on(regs),
        secure=not SCR_EL3["NS"].get(regs.SCR_EL3) if space is None else space is PASpace.SECURE,
        asid=_asid(regs, el, tcr, int(upper) if f.asid2 and second.A2 else None) if has_el0 else None,
        cnp=bool(TTBR["CnP"].get(regs[f"TTBR{int(upper)}_EL{el}"])),
        sh=int(tcr.SH1 if upper else tcr.SH0),
        mair=_mair(regs, el, aie),
        rules=overlaid(rules, overlay_levels) if overlays else rules,
        overlays=overlays,
        space=space,
        force_ng=bool(has_el0 and f.asid2 and (second.FNG1 if upper else second.FNG0)),
        amec_faults=amec_refused(regs, regime, upper),
    )
