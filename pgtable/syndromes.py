"""What an exception or an AT instruction leaves behind, as layouts: ESR_ELx with the ISS of each class, PAR_EL1.

Rules of this file:
- `ESR` is the form that a data abort has, and that faults are encoded in; `esr_layout` gives the form of any class.
Sources: Arm ARM D24.2 (ESR_EL1, PAR_EL1), pseudocode AArch64.ExceptionClass, AArch64.FaultSyndrome, EncodeLDFSC.
"""

from __future__ import annotations

from functools import cache

from pgtable.bits import Field, Layout, Span, address, bits, ignored, res0, res1

EC_GPC = 0x1E
EC_FETCH, EC_DATA = 0x20, 0x24  # aborts from a lower EL; from the same EL it is one more
EC = {
    0x00: "unknown reason: an undefined instruction, or a trap without a class",
    0x01: "trapped WFI or WFE",
    0x03: "trapped AArch32 MCR or MRC, coprocessor 15",
    0x04: "trapped AArch32 MCRR or MRRC, coprocessor 15",
    0x05: "trapped AArch32 MCR or MRC, coprocessor 14",
    0x06: "trapped AArch32 LDC or STC",
    0x07: "trapped SIMD, floating-point or SVE access",
    0x08: "trapped AArch32 floating-point ID read",
    0x09: "trapped pointer authentication instruction",
    0x0A: "trapped 64-byte load or store",
    0x0C: "trapped AArch32 MRRC, coprocessor 14",
    0x0D: "branch target exception: no BTI where the branch landed",
    0x0E: "illegal execution state",
    0x11: "SVC from AArch32",
    0x12: "HVC from AArch32",
    0x13: "SMC from AArch32",
    0x14: "trapped 128-bit system register access",
    0x15: "SVC",
    0x16: "HVC",
    0x17: "SMC",
    0x18: "trapped system register access or system instruction",
    0x19: "trapped SVE access",
    0x1A: "trapped ERET",
    0x1B: "trapped TSTART",
    0x1C: "pointer authentication failure",
    0x1D: "trapped SME access",
    EC_GPC: "granule protection check",
    EC_FETCH: "instruction abort from a lower EL",
    EC_FETCH + 1: "instruction abort from the same EL",
    0x22: "PC alignment fault",
    EC_DATA: "data abort from a lower EL",
    EC_DATA + 1: "data abort from the same EL",
    0x26: "SP alignment fault",
    0x27: "memory copy or set exception",
    0x28: "AArch32 floating-point exception",
    0x2C: "floating-point exception",
    0x2D: "guarded control stack exception",
    0x2F: "SError",
    0x30: "hardware breakpoint from a lower EL",
    0x31: "hardware breakpoint from the same EL",
    0x32: "software step from a lower EL",
    0x33: "software step from the same EL",
    0x34: "watchpoint from a lower EL",
    0x35: "watchpoint from the same EL",
    0x38: "BKPT from AArch32",
    0x3A: "AArch32 vector catch",
    0x3C: "BRK",
    0x3D: "profiling exception",
}
FETCHES = frozenset({EC_FETCH, EC_FETCH + 1})
ABORTS = FETCHES | {EC_DATA, EC_DATA + 1}
WITH_FAR = ABORTS | {EC_GPC, 0x22, 0x34, 0x35}  # classes that write FAR_ELx


def _fsc() -> dict[int, str]:
    """Fault status codes of an abort (Arm ARM, ISS encoding for a data abort, DFSC)."""
    codes = {}
    for level in range(-1, 4):
        codes[0x29 if level < 0 else 0x00 | level] = f"address size fault, level {level}"
        codes[0x2B if level < 0 else 0x04 | level] = f"translation fault, level {level}"
        codes[0x13 if level < 0 else 0x14 | level] = f"external abort on the walk, level {level}"
        codes[0x1B if level < 0 else 0x1C | level] = f"parity or ECC error on the walk, level {level}"
        codes[0x23 if level < 0 else 0x24 | level] = f"granule protection fault on the walk, level {level}"
        if level >= 0:
            codes[0x08 | level] = f"access flag fault, level {level}"
            codes[0x0C | level] = f"permission fault, level {level}"
    return codes | {
        0x2C: "address size fault, level -2",
        0x2A: "translation fault, level -2",
        0x12: "external abort on the walk, level -2",
        0x1A: "parity or ECC error on the walk, level -2",
        0x22: "granule protection fault on the walk, level -2",
        0x10: "external abort, not on a walk",
        0x11: "tag check fault",
        0x18: "parity or ECC error, not on a walk",
        0x21: "alignment fault",
        0x28: "granule protection fault, not on a walk",
        0x30: "TLB conflict abort",
        0x31: "unsupported atomic hardware update",
        0x34: "lockdown",
        0x35: "unsupported exclusive or atomic access",
    }


FSC = _fsc()
# Granule protection check status codes (Arm ARM, ISS encoding for a GPC exception).
GPCSC = {
    code | level: f"{what}, GPT level {level}"
    for code, what in (
        (0x00, "GPT address size fault"),
        (0x04, "GPT walk fault"),
        (0x0C, "granule protection fault"),
        (0x14, "external abort on a GPT read"),
    )
    for level in (0, 1)
}
_ALWAYS = (
    bits("IL", 25, doc="32-bit instruction", values={0: "16-bit instruction", 1: "32-bit instruction, or not known"}),
    bits("EC", 31, 26, "exception class", EC),
)
_SET = {0: "recoverable, or restartable", 2: "uncontainable", 3: "restartable"}
_EA = {0: "external abort type 0 (IMPLEMENTATION DEFINED)", 1: "external abort type 1 (IMPLEMENTATION DEFINED)"}
_SAS = {0: "byte", 1: "halfword", 2: "word", 3: "doubleword"}

ESR = Layout(
    "ESR_ELx (abort)",
    (
        bits("FSC", 5, 0, "fault status code", FSC),
        bits("WnR", 6, doc="write, not read", values={0: "read", 1: "write"}),
        bits("S1PTW", 7, doc="stage 2 fault on a stage 1 walk"),
        bits("CM", 8, doc="cache maintenance or AT"),
        bits("EA", 9, doc="external abort type", values=_EA),
        bits("FnV", 10, doc="FAR is not valid", values={0: "FAR is valid", 1: "FAR is not valid"}),
        bits("SET", 12, 11, "synchronous error type", _SET),
        bits("VNCR", 13, doc="by VNCR_EL2"),
        bits("AR", 14, doc="acquire/release"),
        bits("SF", 15, doc="64-bit register"),
        bits("SRT", 20, 16, "register transferred"),
        bits("SSE", 21, doc="sign extend"),
        bits("SAS", 23, 22, "access size", _SAS),
        bits("ISV", 24, doc="bits 23:14 are valid", values={0: "bits 23:14 say nothing", 1: "bits 23:14 are valid"}),
        *_ALWAYS,
        bits("Xs", 36, 32, "register of a 64-byte store"),
        bits("DirtyBit", 37, doc="permission fault because of the dirty state"),
        bits("Overlay", 38, doc="permission fault because of a permission overlay"),
        bits("AssuredOnly", 39, doc="stage 2 AssuredOnly"),
        bits("GCS", 40, doc="guarded control stack access"),
        bits("TagAccess", 41, doc="NoTagAccess fault"),
        bits("TnD", 42, doc="tag, not data"),
        bits("HDBSSF", 43, doc="hardware dirty state tracking structure fault"),
        res0(63, 44),
    ),
)

_TRAPPED = {0: "WFI", 1: "WFE", 2: "WFIT", 3: "WFET"}
_DIRECTION = {0: "write (MSR)", 1: "read (MRS)"}
_IMMEDIATE = (bits("imm16", 15, 0, "the instruction's number"), res0(24, 16))
_STEP = (bits("IFSC", 5, 0, "0b100010, debug"), bits("EX", 6, doc="an exclusive was stepped"), res0(23, 7))
# ISS[24:0] by exception class; a class that is not here keeps it whole.
_ISS: dict[int, tuple[Field, ...]] = {
    0x01: (
        bits("TI", 1, 0, "trapped instruction", _TRAPPED),
        bits("RV", 2, doc="RN is valid"),
        res0(4, 3),
        bits("RN", 9, 5, "register with the timeout"),
        res0(19, 10),
        bits("COND", 23, 20, "AArch32 condition"),
        bits("CV", 24, doc="COND is valid"),
    ),
    0x0D: (bits("BTYPE", 1, 0, "PSTATE.BTYPE: how the branch came"), res0(24, 2)),
    0x15: _IMMEDIATE,
    0x16: _IMMEDIATE,
    0x17: _IMMEDIATE,
    0x18: (
        bits("Direction", 0, doc="read, not write", values=_DIRECTION),
        bits("CRm", 4, 1, "of the register's encoding"),
        bits("Rt", 9, 5, "register transferred"),
        bits("CRn", 13, 10, "of the register's encoding"),
        bits("Op1", 16, 14, "of the register's encoding"),
        bits("Op2", 19, 17, "of the register's encoding"),
        bits("Op0", 21, 20, "of the register's encoding"),
        res0(24, 22),
    ),
    0x1C: (bits("Key", 1, 0, "key", {0: "IA", 1: "IB", 2: "DA", 3: "DB"}), res0(24, 2)),
    EC_GPC: (
        bits("xFSC", 5, 0, "fault status code", FSC),
        bits("WnR", 6, doc="write, not read", values={0: "read", 1: "write"}),
        bits("S1PTW", 7, doc="on a stage 1 walk, by stage 2's tables"),
        bits("CM", 8, doc="cache maintenance or AT"),
        res0(12, 9),
        bits("VNCR", 13, doc="by VNCR_EL2"),
        bits("GPCSC", 19, 14, "granule protection check status code", GPCSC),
        bits("InD", 20, doc="fetch, not data", values={0: "data access", 1: "instruction fetch"}),
        bits("S2PTW", 21, doc="the access was to a table of stage 2"),
        res0(24, 22),
    ),
    0x2F: (
        bits("DFSC", 5, 0, "data fault status code", {0: "uncategorised", 0x11: "asynchronous SError"}),
        res0(8, 6),
        bits("EA", 9, doc="external abort type", values=_EA),
        bits("AET", 12, 10, "asynchronous error type"),
        bits("IESB", 13, doc="synchronised by an implicit barrier"),
        res0(23, 14),
        bits("IDS", 24, doc="the rest is IMPLEMENTATION DEFINED"),
    ),
    0x32: (*_STEP, bits("ISV", 24, doc="EX is valid")),
    0x33: (*_STEP, bits("ISV", 24, doc="EX is valid")),
    0x3C: (bits("Comment", 15, 0, "the instruction's number"), res0(24, 16)),
    **dict.fromkeys((0x0E, 0x22, 0x26), (res0(24, 0),)),
}
_FETCH = (
    bits("IFSC", 5, 0, "fault status code", FSC),
    res0(6),
    bits("S1PTW", 7, doc="stage 2 fault on a stage 1 walk"),
    res0(8),
    bits("EA", 9, doc="external abort type", values=_EA),
    bits("FnV", 10, doc="FAR is not valid", values={0: "FAR is valid", 1: "FAR is not valid"}),
    bits("SET", 12, 11, "synchronous error type", _SET),
    res0(20, 13),
    bits("TopLevel", 21, doc="stage 2 TopLevel"),
    res0(24, 22),
)


@cache
def esr_layout(exception_class: int) -> Layout:
    """The layout of an ESR_ELx of an exception class (EC); a class without one of its own keeps ISS[24:0] whole."""
    if exception_class in ABORTS - FETCHES:
        return ESR
    rows = _FETCH if exception_class in FETCHES else _ISS.get(exception_class, (bits("ISS", 24, 0, "syndrome"),))
    return Layout(
        f"ESR_ELx ({EC.get(exception_class, 'reserved class')})",
        (*rows, *_ALWAYS, bits("ISS2", 63, 32, "more syndrome")),
    )


SH = {0: "non-shareable", 1: "reserved", 2: "outer shareable", 3: "inner shareable"}
_F = bits("F", 0, doc="fault", values={0: "translated", 1: "fault"})

PAR_OK = Layout(
    "PAR_EL1 (F=0)",
    (
        _F,
        res0(6, 1),
        bits("SH", 8, 7, "shareability", SH),
        bits("NS", 9, doc="Non-secure output address space", values={0: "Secure", 1: "Non-secure"}),
        bits("IMPDEF", 10, doc="IMPLEMENTATION DEFINED", values=dict.fromkeys((0, 1), "IMPLEMENTATION DEFINED")),
        bits("NSE", 11, doc="with NS, the output address space; RES1 without FEAT_RME"),
        address("PA", (51, 12), doc="output address"),
        res0(55, 52),
        bits("ATTR", 63, 56, "memory attributes, as in MAIR_ELx"),
    ),
)
HPFAR_EL2 = Layout(
    "HPFAR_EL2",
    (
        res0(3, 0),
        Field("FIPA", (Span(4, 40, 12),), "the IPA that stage 2 refused, at 4K resolution"),
        res0(62, 44),
        bits("NS", 63, doc="of the Non-secure IPA space (Secure state)", values={0: "Secure", 1: "Non-secure"}),
    ),
)

PAR_FAULT = Layout(
    "PAR_EL1 (F=1)",
    (
        _F,
        bits("FST", 6, 1, "fault status code", FSC),
        res0(7),
        bits("PTW", 8, doc="stage 2 fault on a stage 1 walk"),
        bits("S", 9, doc="stage of the fault", values={0: "stage 1", 1: "stage 2"}),
        res0(10),
        res1(11),
        bits("AssuredOnly", 12, doc="stage 2 AssuredOnly"),
        bits("TopLevel", 13, doc="stage 2 TopLevel"),
        bits("Overlay", 14, doc="because of a permission overlay"),
        bits("DirtyBit", 15, doc="because of the dirty state"),
        res0(47, 16),
        ignored(63, 48, "IMPLEMENTATION DEFINED"),
    ),
)
