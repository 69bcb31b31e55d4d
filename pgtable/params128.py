"""The registers of a translation with 128-bit descriptors, read once (FEAT_D128, FEAT_LVA3). **Not judged**.

Rules of this file:
- What does not depend on the descriptors' size comes from `WalkParams` and `Stage2Params`; the rest is overridden.
- M.a.a is followed where it and the v9.4 model differ: TCR.DS is 0 at stage 1 (S1TTWParamsEL10; v9.4 leaves it); TxSZ
  may be 12 with FEAT_LVA alone (S1MinTxSZ; v9.4 asks for 64K or DS); at stage 2 with PA sizes up to 52 the IPA has no
  more bits than with 64-bit descriptors (S2MinTxSZ; v9.4: as many as the PA); a TTBR.SKL that skips past level 3 is a
  translation fault (S1Walk, S2Walk R_RFYTMS; v9.4 has no check).
- VTCR_EL2.DS stays in force: stage 2 then takes the shareability from VTCR_EL2.SH0 (S2NextWalkStateLeaf, both).
Sources: pseudocode S1TTWParamsEL10/EL20/EL3, NSS2TTWParams, S1StartLevel, S2StartLevel, S1TTBaseAddress,
S2TTBaseAddress, S1MinTxSZ, S2MinTxSZ, PhysicalAddressSize, S1AMECFault.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

from pgtable.bits import Layout
from pgtable.d128 import CONTIGUOUS_RUN_128, WORD, Format128
from pgtable.descriptors import LAST_LEVEL, Granule
from pgtable.features import Features
from pgtable.params import _TCR, RANGE_BIT, Regime, WalkParams, _read, _second, d128_on, most_txsz
from pgtable.permissions import RuleTable
from pgtable.registers import HCR_EL2, PA_BITS, SCR_EL3, VTCR_EL2, Registers
from pgtable.registers128 import TTBR0_EL3_D128, TTBR_128
from pgtable.stage2 import Stage2Params, vtcr_d128
from pgtable.stage2_rules import indirect_table
from pgtable.table_params import TableParams

MOST_PS = 7  # PS and IPS: 56 bits


class Tables128(TableParams):
    """The geometry of a tree of 128-bit descriptors: overrides what TableParams has for 64-bit ones. Not judged."""

    fmt: Format128
    skl: int  # TTBR.SKL: levels that the first table skips

    @property
    def ttbr_layout(self) -> Layout:
        """The layout of the register that says where the first table is."""
        return TTBR_128

    @cached_property
    def start_level(self) -> int:
        """The level of the first table, TTBR.SKL levels further down (pseudocode S1StartLevel, S2StartLevel).

        Above 3 where SKL skips too much: every access is then a translation fault.
        """
        fmt = self.fmt
        return LAST_LEVEL - (self.ia_bits - 1 - fmt.granule.page_shift) // fmt.stride + self.skl

    @cached_property
    def start_bits(self) -> int:
        """Address bits that the first table resolves."""
        return self.ia_bits - self.fmt.level_shift(self.start_level)

    @cached_property
    def base(self) -> int:
        """The first table's PA: BADDR aligned down to its size, at least 32 bytes (pseudocode S1TTBaseAddress)."""
        size = max(WORD << self.start_bits, 32)
        return int(self.ttbr_layout["BADDR"].get(self.root)) & -size

    @cached_property
    def levels(self) -> tuple[tuple[int, int, int], ...]:
        """(level, shift, index mask) of tables that no descriptor skips, from the first one down."""
        shift = self.fmt.level_shift
        full = (1 << self.fmt.stride) - 1
        below = ((level, shift(level), full) for level in range(self.start_level + 1, LAST_LEVEL + 1))
        return ((self.start_level, shift(self.start_level), (1 << self.start_bits) - 1), *below)

    def run_length(self, level: int) -> int:
        """Entries in a contiguous run at `level`; 1 where there is none."""
        return CONTIGUOUS_RUN_128[self.fmt.granule].get(level, 1)

    def run_too_large(self, level: int) -> bool:
        """A contiguous run at `level` is larger than the input range (pseudocode ContiguousBitFaults)."""
        return self.fmt.level_size(level) * self.run_length(level) > 1 << self.ia_bits

    def offset_mask(self, level: int, word: int) -> int:
        """The PA bits that come from the input address (pseudocode StageOA)."""
        run = self.features.contiguous_output and word & self.contiguous
        return self.fmt.level_size(level) * (self.run_length(level) if run else 1) - 1


@dataclass(frozen=True)
class WalkParams128(Tables128, WalkParams):
    """WalkParams of a regime with 128-bit descriptors. Not judged.

    `skl`: TTBR.SKL. `disch`: TCR2.DisCHn, for the leaves of the first table. `amec_faults`: a leaf in Realm memory
    with AMEC = 1 faults.
    """

    fmt: Format128
    skl: int
    disch: bool
    d128: ClassVar[bool] = True

    @classmethod
    def of(cls, regs: Registers, regime: Regime, va: int) -> WalkParams128:
        """The parameters for the half of `regime` that `va` is in, kept with `regs`; ValueError if D128 is off."""
        upper = bool(va & RANGE_BIT) and regime.has_el0
        params = regs._params.get((regime, upper))
        if params is None:
            if not d128_on(regs, regime):
                raise ValueError(f"{regime.value} has 64-bit descriptors: D128 is 0, or the CPU has no FEAT_D128")
            params = regs._params[regime, upper] = _read128(regs, regime, upper)
        found: WalkParams128 = params
        return found

    @property
    def ttbr_layout(self) -> Layout:
        """TTBR's layout: EL3's has 64 bits."""
        return TTBR0_EL3_D128 if self.regime is Regime.EL3 else TTBR_128

    def attr_index(self, word: int) -> int:
        """The number of a leaf's byte in `mair`: bits [5:2], or [4:2] without AIE (pseudocode S1NextWalkStateLeaf)."""
        return int(self.page["AttrIndx"].get(word))

    @cached_property
    def amec(self) -> int:
        """The leaf's AMEC bit."""
        return self.page["AMEC"].mask

    @cached_property
    def disable_contiguous(self) -> int:
        """A table's DisCH bit."""
        return self.fmt.table(LAST_LEVEL - 1)["DisCH"].mask


def stage1_params(regs: Registers, regime: Regime, va: int) -> WalkParams:
    """The parameters for the half of `regime` that `va` is in: a WalkParams128 where D128 is on."""
    return WalkParams128.of(regs, regime, va) if d128_on(regs, regime) else WalkParams.of(regs, regime, va)


def least_txsz(regime: Regime, f: Features) -> int:
    """The smallest TxSZ of stage 1 with 128-bit descriptors (pseudocode S1MinTxSZ)."""
    if f.lva3:
        return 9 if regime.has_el0 else 8
    return 12 if f.lva else 16


def output_bits128(field: int, f: Features) -> int:
    """Output address size in bits: PS = 7 is 56, and no granule limits it (pseudocode PhysicalAddressSize)."""
    return min(56 if field == MOST_PS else PA_BITS[field], f.pa_bits)


def _read128(regs: Registers, regime: Regime, upper: bool) -> WalkParams128:
    f, p, second = regs.features, _read(regs, regime, upper), _second(regs, regime)
    name, layout = _TCR[regime]
    tcr = layout.view(regs[name])
    txsz, least, most = int(tcr.T1SZ if upper else tcr.T0SZ), least_txsz(regime, f), most_txsz(p.fmt.granule, f)
    faults = f.txsz_faults or (f.lva and txsz < least)
    ttbr = TTBR0_EL3_D128 if regime is Regime.EL3 else TTBR_128
    own: dict[str, Any] = {
        "fmt": Format128(p.fmt.granule, el0=p.fmt.el0, pie=True, poe=p.fmt.poe, aie=p.fmt.aie),
        "txsz": min(max(txsz, least), most),
        "txsz_ok": least <= txsz <= most or not faults,
        "ps_bits": output_bits128(int(tcr.IPS if regime.has_el0 else tcr.PS), f),
        "wide_ttbr": False,
        "skl": int(ttbr["SKL"].get(p.ttbr)),
        "disch": bool(second.DisCH1 if upper else second.DisCH0),
    }
    return WalkParams128(**{field.name: getattr(p, field.name) for field in fields(WalkParams)} | own)


@dataclass(frozen=True, kw_only=True)
class Stage2Params128(Tables128, Stage2Params):
    """Stage2Params with 128-bit descriptors, whose permissions are indirect always (S2PIR_EL2). Not judged.

    `skl`: VTTBR_EL2.SKL. `base_rules`, `overlay_rules`: by PIIndex and POIndex (stage2_rules.py), the latter None
    without VTCR_EL2.S2POE. `vm`: HCR_EL2.VM. `tl0`, `tl1`, `gcsh`: VTCR_EL2's (FEAT_THE).
    """

    fmt: Format128
    skl: int
    base_rules: RuleTable
    overlay_rules: RuleTable | None
    vm: bool
    tl0: bool
    tl1: bool
    gcsh: bool
    d128: ClassVar[bool] = True

    @classmethod
    def of(cls, regs: Registers, *, ns: bool = False) -> Stage2Params128:
        """The parameters, kept with `regs`; ValueError if VTCR_EL2.D128 is off, and in Secure state."""
        known: Stage2Params128 | None = regs._params.get("stage 2")
        if known is None:
            if not vtcr_d128(regs):
                raise ValueError("stage 2 has 64-bit descriptors: VTCR_EL2.D128 is 0, or the CPU has no FEAT_D128")
            known = regs._params["stage 2"] = _read_stage2(regs)
        return known

    @cached_property
    def consistent(self) -> bool:
        """SL0 and SL2 do not count: VTTBR_EL2.SKL says where the walk starts; up to level 3 (S2Walk, M.a.a)."""
        return self.start_level <= LAST_LEVEL

    @cached_property
    def assured_only(self) -> int:
        """The leaf's AssuredOnly bit."""
        return self.page["AssuredOnly"].mask

    @cached_property
    def dirty(self) -> int:
        """The leaf's Dirty bit."""
        return self.page["Dirty"].mask

    @cached_property
    def root_tables(self) -> int:
        """One: the first table has as many entries as it needs."""
        return 1


def stage2_params(regs: Registers) -> Stage2Params:
    """The parameters of stage 2: a Stage2Params128 where VTCR_EL2.D128 is on."""
    return Stage2Params128.of(regs) if vtcr_d128(regs) else Stage2Params.of(regs)


def most_ipa_bits(granule: Granule, ds: bool, f: Features) -> int:
    """The largest IPA size with 128-bit descriptors (pseudocode S2MinTxSZ)."""
    if f.pa_bits == 52:
        return 52 if granule is Granule.K64 or ds else 48
    return f.pa_bits


def _read_stage2(regs: Registers) -> Stage2Params128:
    f, p, vtcr, scr = (
        regs.features,
        Stage2Params._read(regs, False),
        VTCR_EL2.view(regs.VTCR_EL2),
        SCR_EL3.view(regs.SCR_EL3),
    )
    if p.on and not scr.NS:
        raise ValueError("VTCR_EL2.D128 is 1 in Secure state: its stage 2 (VSTTBR_EL2) is not built")
    granule, ds, overlay = p.fmt.granule, p.fmt.ds, bool(f.s2poe and vtcr.S2POE)
    own: dict[str, Any] = {
        "fmt": Format128(granule, ds, stage2=True, fwb=p.fwb, pie=True, poe=overlay),
        "sl_ok": True,
        "txsz_ok": 64 - most_ipa_bits(granule, ds, f) <= p.t0sz <= most_txsz(granule, f),
        "ps_bits": output_bits128(int(vtcr.PS), f),
        "wide": False,
        "skl": int(TTBR_128["SKL"].get(regs.VTTBR_EL2)),
        "base_rules": indirect_table(regs.S2PIR_EL2),
        "overlay_rules": indirect_table(regs.S2POR_EL1) if overlay else None,
        "vm": bool(HCR_EL2["VM"].get(regs.HCR_EL2)),
        "tl0": bool(f.the and vtcr.TL0),
        "tl1": bool(f.the and vtcr.TL1),
        "gcsh": bool(f.the and vtcr.GCSH),
    }
    return Stage2Params128(**{field.name: getattr(p, field.name) for field in fields(Stage2Params)} | own)
