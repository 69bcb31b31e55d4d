"""Control registers that do more than translation, as layouts: SCTLR_ELx, HCR_EL2, SCR_EL3.

Rules of this file:
- Every bit has the Arm ARM's name (D24.2) and says what it does when it is 1.
- One layout of SCTLR serves EL1 and EL2 as a host; a level on its own (EL2, EL3) has fewer fields.
"""

from __future__ import annotations

from pgtable.bits import Field, Layout, bits, res0, res1


def flags(*rows: tuple[int, str, str]) -> list[Field]:
    """One-bit fields from (bit, name, what 1 means)."""
    return [bits(name, bit, doc=doc) for bit, name, doc in rows]


TCF = {0: "ignored", 1: "synchronous exception", 2: "asynchronous", 3: "reads synchronous, writes asynchronous"}

SCTLR_EL1 = Layout(
    "SCTLR_EL1",
    (
        *flags(
            (0, "M", "MMU on"),
            (1, "A", "alignment checks"),
            (2, "C", "data cacheable"),
            (3, "SA", "SP alignment check"),
            (4, "SA0", "SP alignment check at EL0"),
            (5, "CP15BEN", "AArch32 barriers by CP15 at EL0"),
            (6, "nAA", "fewer alignment faults (FEAT_LSE2)"),
            (7, "ITD", "AArch32 IT blocks are restricted at EL0"),
            (8, "SED", "AArch32 SETEND is disabled at EL0"),
            (9, "UMA", "EL0 may change DAIF"),
            (10, "EnRCTX", "EL0 may restrict prediction (CFP, DVP, CPP)"),
            (11, "EOS", "exception return synchronises context"),
            (12, "I", "instructions cacheable"),
            (13, "EnDB", "pointer authentication, key DB"),
            (14, "DZE", "EL0 may DC ZVA"),
            (15, "UCT", "EL0 may read CTR_EL0"),
            (16, "nTWI", "EL0's WFI is not trapped"),
        ),
        res0(17),
        *flags(
            (18, "nTWE", "EL0's WFE is not trapped"),
            (19, "WXN", "writable implies execute-never"),
            (20, "TSCXT", "EL0's SCXTNUM is trapped"),
            (21, "IESB", "implicit error synchronisation at exceptions"),
            (22, "EIS", "exception entry synchronises context"),
            (23, "SPAN", "PAN is left alone on exception entry"),
            (24, "E0E", "EL0 data big-endian"),
            (25, "EE", "data and table walks big-endian"),
            (26, "UCI", "EL0 may do cache maintenance"),
            (27, "EnDA", "pointer authentication, key DA"),
            (28, "nTLSMD", "AArch32 multiple accesses to Device memory are not trapped"),
            (29, "LSMAOE", "AArch32 multiple accesses are ordered and atomic as before v8.2"),
            (30, "EnIB", "pointer authentication, key IB"),
            (31, "EnIA", "pointer authentication, key IA"),
            (32, "CMOW", "EL0 cache maintenance needs write permission"),
            (33, "MSCEn", "EL0 may use memory copy and set (FEAT_MOPS)"),
        ),
        res0(34),
        *flags(
            (35, "BT0", "PACIxSP is no landing pad at EL0 (FEAT_BTI)"),
            (36, "BT1", "PACIxSP is no landing pad at this level (FEAT_BTI)"),
            (37, "ITFSB", "asynchronous tag faults are collected at exception entry"),
        ),
        bits("TCF0", 39, 38, "tag check faults at EL0", TCF),
        bits("TCF", 41, 40, "tag check faults at EL1", TCF),
        *flags(
            (42, "ATA0", "EL0 tag access"),
            (43, "ATA", "EL1 tag access"),
            (44, "DSSBS", "PSTATE.SSBS after exception entry"),
            (45, "TWEDEn", "delay before WFE traps"),
        ),
        bits("TWEDEL", 49, 46, "delay before WFE traps, power of two"),
        *flags(
            (50, "TMT0", "transactions at EL0 fail (FEAT_TME)"),
            (51, "TMT", "transactions at EL1 fail (FEAT_TME)"),
            (52, "TME0", "transactions at EL0 are not trapped"),
            (53, "TME", "transactions at EL1 are not trapped"),
            (54, "EnASR", "EL0 may ST64BV"),
            (55, "EnAS0", "EL0 may ST64BV0"),
            (56, "EnALS", "EL0 may LD64B and ST64B"),
            (57, "EPAN", "PAN also for EL0-executable pages"),
            (58, "TCSO0", "EL0's stores do not check tags"),
            (59, "TCSO", "this level's stores do not check tags"),
            (60, "EnTP2", "EL0 may use TPIDR2_EL0"),
            (61, "NMI", "non-maskable interrupts"),
            (62, "SPINTMASK", "the choice of SP masks interrupts"),
            (63, "TIDCP", "EL0's IMPLEMENTATION DEFINED instructions are trapped"),
        ),
    ),
)

_ALONE = (
    *("M", "A", "C", "SA", "nAA", "EOS", "I", "EnDB", "WXN", "IESB", "EIS", "EE", "EnDA", "EnIB", "EnIA", "BT1"),
    *("ITFSB", "TCF", "ATA", "DSSBS", "TMT", "TME", "TCSO", "NMI", "SPINTMASK"),
)
_ALONE_RES1 = (4, 5, 16, 18, 23, 28, 29)
# SCTLR_EL3, and SCTLR_EL2 when HCR_EL2.E2H is 0.
SCTLR_ALONE = Layout(
    "SCTLR_EL2",
    tuple(
        [f for f in SCTLR_EL1 if f.name in _ALONE]
        + [
            res1(bit) if bit in _ALONE_RES1 else res0(bit)
            for bit in range(64)
            if not SCTLR_EL1.mask(*_ALONE) >> bit & 1
        ]
    ),
)

HCR_EL2 = Layout(
    "HCR_EL2",
    (
        *flags(
            (0, "VM", "stage 2 on"),
            (1, "SWIO", "DC ISW cleans too"),
            (2, "PTW", "stage 1 walks may not read Device memory"),
            (3, "FMO", "FIQ goes to EL2"),
            (4, "IMO", "IRQ goes to EL2"),
            (5, "AMO", "SError goes to EL2"),
            (6, "VF", "virtual FIQ pending"),
            (7, "VI", "virtual IRQ pending"),
            (8, "VSE", "virtual SError pending"),
            (9, "FB", "EL1's TLB and I-cache maintenance is broadcast"),
        ),
        bits("BSU", 11, 10, "EL1's barriers reach at least", {0: "as they say", 1: "inner", 2: "outer", 3: "system"}),
        *flags(
            (12, "DC", "default cacheable: EL1&0 stage 1 off, stage 2 on"),
            (13, "TWI", "WFI is trapped"),
            (14, "TWE", "WFE is trapped"),
            (15, "TID0", "ID group 0 reads are trapped"),
            (16, "TID1", "ID group 1 reads are trapped"),
            (17, "TID2", "ID group 2 reads are trapped"),
            (18, "TID3", "ID group 3 reads are trapped"),
            (19, "TSC", "SMC is trapped"),
            (20, "TIDCP", "IMPLEMENTATION DEFINED instructions are trapped"),
            (21, "TACR", "ACTLR accesses are trapped"),
            (22, "TSW", "cache maintenance by set/way is trapped"),
            (23, "TPCP", "cache maintenance to coherency or persistence is trapped"),
            (24, "TPU", "cache maintenance to unification is trapped"),
            (25, "TTLB", "TLB maintenance is trapped"),
            (26, "TVM", "writes of EL1's translation registers are trapped"),
            (27, "TGE", "EL0 is EL2's"),
            (28, "TDZ", "DC ZVA is trapped"),
            (29, "HCD", "HVC is disabled"),
            (30, "TRVM", "reads of EL1's translation registers are trapped"),
            (31, "RW", "EL1 is AArch64"),
            (32, "CD", "stage 2 data non-cacheable"),
            (33, "ID", "stage 2 instructions non-cacheable"),
            (34, "E2H", "EL2 is a host (VHE)"),
            (35, "TLOR", "LOR registers are trapped"),
            (36, "TERR", "error record registers are trapped"),
            (37, "TEA", "synchronous external aborts go to EL2"),
            (38, "MIOCNCE", "mismatched attributes may lose coherency"),
            (39, "TME", "transactions at EL1 and EL0 are not trapped"),
            (40, "APK", "pointer authentication keys are not trapped"),
            (41, "API", "pointer authentication instructions are not trapped"),
            (42, "NV", "nested virtualisation"),
            (43, "NV1", "nested virtualisation of a guest hypervisor without VHE"),
            (44, "AT", "AT instructions are trapped"),
            (45, "NV2", "nested virtualisation by memory"),
            (46, "FWB", "stage 2 forces write-back"),
            (47, "FIEN", "fault injection registers are not trapped"),
            (48, "GPF", "granule protection faults go to EL2"),
            (49, "TID4", "ID group 4 reads are trapped"),
            (50, "TICAB", "IC IALLUIS is trapped"),
            (51, "AMVOFFEN", "activity monitors are virtualised"),
            (52, "TOCU", "cache maintenance to unification is trapped"),
            (53, "EnSCXT", "SCXTNUM is not trapped"),
            (54, "TTLBIS", "inner shareable TLB maintenance is trapped"),
            (55, "TTLBOS", "outer shareable TLB maintenance is trapped"),
            (56, "ATA", "EL1 and EL0 tag access"),
            (57, "DCT", "default cacheable is tagged"),
            (58, "TID5", "ID group 5 reads are trapped"),
            (59, "TWEDEn", "delay before WFE traps"),
        ),
        bits("TWEDEL", 63, 60, "delay before WFE traps, power of two"),
    ),
)

SCR_EL3 = Layout(
    "SCR_EL3",
    (
        *flags(
            (0, "NS", "lower ELs are Non-secure"),
            (1, "IRQ", "IRQ goes to EL3"),
            (2, "FIQ", "FIQ goes to EL3"),
            (3, "EA", "external aborts go to EL3"),
        ),
        res1(5, 4),
        res0(6),
        *flags(
            (7, "SMD", "SMC is disabled"),
            (8, "HCE", "HVC is enabled"),
            (9, "SIF", "Secure state does not fetch from Non-secure memory"),
            (10, "RW", "EL2 is AArch64"),
            (11, "ST", "Secure EL1 may use the secure timer"),
            (12, "TWI", "WFI is trapped"),
            (13, "TWE", "WFE is trapped"),
            (14, "TLOR", "LOR registers are trapped"),
            (15, "TERR", "error record registers are trapped"),
            (16, "APK", "pointer authentication keys are not trapped"),
            (17, "API", "pointer authentication instructions are not trapped"),
            (18, "EEL2", "Secure EL2 on"),
            (19, "EASE", "synchronous external aborts go to the SError vector"),
            (20, "NMEA", "non-maskable external aborts"),
            (21, "FIEN", "fault injection registers are not trapped"),
        ),
        res0(24, 22),
        *flags(
            (25, "EnSCXT", "SCXTNUM is not trapped"),
            (26, "ATA", "lower levels' tag access"),
            (27, "FGTEn", "fine-grained traps are not trapped"),
            (28, "ECVEn", "CNTPOFF_EL2 is not trapped"),
            (29, "TWEDEn", "delay before WFE traps"),
        ),
        bits("TWEDEL", 33, 30, "delay before WFE traps, power of two"),
        *flags(
            (34, "TME", "transactions are not trapped"),
            (35, "AMVOFFEN", "activity monitors are virtualised"),
            (36, "EnAS0", "ACCDATA_EL1 is not trapped"),
            (37, "ADEn", "ACCDATA_EL1 accesses and ST64BV0 are not trapped"),
            (38, "HXEn", "HCRX_EL2 may be used"),
            (39, "GCSEn", "guarded control stacks may be used"),
            (40, "TRNDR", "RNDR is trapped"),
            (41, "EnTP2", "TPIDR2_EL0 may be used"),
            (42, "RCWMASKEn", "RCWMASK may be used"),
            (43, "TCR2En", "TCR2 may be used"),
            (44, "SCTLR2En", "SCTLR2 may be used"),
            (45, "PIEn", "permission indirection may be used"),
            (46, "AIEn", "MAIR2 and AMAIR2 may be used"),
            (47, "D128En", "128-bit descriptors may be used"),
            (48, "GPF", "granule protection faults go to EL3"),
            (49, "MECEn", "memory encryption contexts may be used"),
            (50, "EnFPM", "FPMR may be used"),
            (51, "TMEA", "masked external aborts go to EL3"),
            (52, "TWERR", "writes of error records are trapped"),
            (53, "PFAREn", "PFAR may be used"),
        ),
        res0(54),
        *flags((55, "EnIDCP128", "128-bit IMPLEMENTATION DEFINED registers may be used")),
        res0(58, 56),
        *flags((59, "FGTEn2", "second set of fine-grained traps is not trapped")),
        res0(61, 60),
        *flags((62, "NSE", "with NS, the security state of lower levels (FEAT_RME)")),
        res0(63),
    ),
)
