"""Register values explained: control registers, TTBRs, MAIR, PIR and POR, and the syndromes ESR, FAR, PAR.

    from pgtable.describe_registers import explain_register
    print(explain_register("ESR_EL1", 0x96000047, far=0xFFFF800012345678))

Rules of this file:
- A field's meaning is its layout's; `_DERIVED` has those that are computed from the value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pgtable.attributes import FORCED_OUTER, OUTER_SHAREABLE, MemoryAttributes
from pgtable.bits import Field, Layout, View, bits, res0
from pgtable.describe import Explanation, FieldText, meaning
from pgtable.descriptors import LAST_LEVEL, Granule
from pgtable.findings import LOWEST_LEVEL, Finding
from pgtable.gpt import BASE_SHIFT
from pgtable.params import RANGE_BIT
from pgtable.permissions import BY_PIR, BY_POR, PG, PIR_NO_OVERLAY, PIR_WXN, PR, PW, PX
from pgtable.registers import (
    EC,
    EC_DATA,
    FSC,
    GPCCR_EL3,
    GPTBR_EL3,
    LAYOUTS,
    MAIR,
    MFAR_EL3,
    PAR_FAULT,
    PAR_OK,
    SCTLR_EL1,
    SH,
    TCR_EL1,
    TTBR_52,
)
from pgtable.spaces import PASpace
from pgtable.syndromes import ABORTS, EC_GPC, FETCHES, GPCSC, WITH_FAR, esr_layout

FAR = Layout("FAR_ELx", (bits("VA", 63, 0, "faulting virtual address"),))
PSTATE = {
    "PAN": Layout("PSTATE.PAN", (bits("PAN", 0, doc="no privileged loads and stores to pages of EL0"), res0(63, 1))),
    "UAO": Layout("PSTATE.UAO", (bits("UAO", 0, doc="LDTR and STTR are checked as privileged"), res0(63, 1))),
}
SYNDROMES = tuple(f"{name}_EL{el}" for name in ("ESR", "FAR") for el in (1, 2, 3))
KNOWN = tuple(sorted((*LAYOUTS, *PSTATE, *SYNDROMES, "PAR_EL1")))


def explain_register(
    name: str,
    value: int,
    *,
    far: int | None = None,
    granule: Granule | None = None,
    e2h: bool = False,
    wide: bool = False,
) -> Explanation:
    """Explains a register's value of 64 bits.

    `far`: FAR_ELx that came with an ESR_ELx. `granule`: of the tables, for the entries that an address goes through;
    None: 4K. `e2h`: HCR_EL2.E2H, which gives TCR_EL2 and SCTLR_EL2 the form of EL1's. `wide`: a TTBR holds a 52-bit
    address. Raises ValueError for an unknown name or a value that is not 64 bits.
    """
    if name not in KNOWN:
        raise ValueError(f"register {name}: there is none, only {', '.join(KNOWN)}")
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{name}={value:#x}: must be 64 bits")
    layout = _layout(name, value, e2h, wide)
    facts = _facts(name, value, far, granule or Granule.K4)
    fields = tuple(FieldText(f, f.get(value), _meaning(name, f, value, layout)) for f in layout)
    return Explanation(
        value,
        layout,
        _TITLES[name.partition("_")[0].rstrip("0123456789")],
        fields,
        facts,
        tuple(_findings(name, value, layout)),
        name=name,
    )


_TITLES = {
    **{"ESR": "exception syndrome", "FAR": "fault address", "PAR": "result of an AT instruction"},
    **{"TCR": "translation control", "VTCR": "translation control of stage 2", "SCTLR": "system control"},
    **{"TTBR": "translation table base", "VTTBR": "translation table base of stage 2", "MAIR": "memory attributes"},
    **{"PIR": "permission indirection", "PIRE": "permission indirection of EL0", "POR": "permission overlays"},
    **{"HCR": "hypervisor configuration", "SCR": "secure configuration", "CONTEXTIDR": "context ID"},
    **{"VSTCR": "translation control of Secure stage 2", "VSTTBR": "translation table base of Secure stage 2"},
    **{"S2PIR": "permission indirection of stage 2", "S2POR": "permission overlays of stage 2"},
    **{"GPCCR": "granule protection check control", "GPTBR": "granule protection table base"},
    **{"MFAR": "physical fault address"},
    **{"PAN": "privileged access never (PSTATE)", "UAO": "user access override (PSTATE)"},
}


def _layout(name: str, value: int, e2h: bool, wide: bool) -> Layout:
    if name.startswith("ESR"):
        return esr_layout(esr_layout(EC_DATA)["EC"].get(value))
    if name == "PAR_EL1":
        return PAR_FAULT if PAR_FAULT["F"].get(value) else PAR_OK
    if name.startswith("FAR"):
        return FAR
    if e2h and name in ("TCR_EL2", "SCTLR_EL2"):
        return TCR_EL1 if name == "TCR_EL2" else SCTLR_EL1
    if wide and name.startswith("TTBR"):
        return TTBR_52
    return PSTATE.get(name) or LAYOUTS[name]


# Meanings that are computed.


def _lower(value: int) -> str:
    return f"{64 - value}-bit range: from 0 to {(1 << 64 - value) - 1:#018x}"


def _upper(value: int) -> str:
    return f"{64 - value}-bit range: from {(1 << 64) - (1 << 64 - value):#018x} up"


def _attribute(value: int) -> str:
    return str(MemoryAttributes.of(value))


def _indirect(value: int) -> str:
    """A PIR nibble: what is granted, its own WXN, and whether overlays count."""
    if value and not BY_PIR[value]:
        return "reserved: nothing"
    own = ", not executable while writable" if value == PIR_WXN else ""
    return f"{_granted(BY_PIR[value])}{own}{', overlays do not apply' if value & PIR_NO_OVERLAY else ''}"


def _granted(perms: int) -> str:
    said = "".join(letter if perms & bit else "-" for letter, bit in zip("rwx", (PR, PW, PX), strict=True))
    return said + (", guarded control stack" if perms & PG and not perms & PW and not perms & PX else "")


def _overlay(value: int) -> str:
    return "reserved: nothing" if value & 8 else f"{_granted(BY_POR[value] & ~PG)} remains"


_DERIVED: dict[str, Callable[[int], str]] = {
    "T0SZ": _lower,
    "T1SZ": _upper,
    "ATTR": _attribute,
    **{f.name: _attribute for f in MAIR},
}


def _meaning(name: str, row: Field, value: int, layout: Layout) -> str:
    of = row.get(value)
    if row.name.startswith("Perm"):
        return (_overlay if name.startswith("POR") else _indirect)(of)
    if name == "VTCR_EL2" and row.name == "T0SZ":
        return f"{64 - of}-bit IPA range"
    if row.name == "SRT" and "ISV" in layout:
        return f"x{of}" if layout["ISV"].get(value) else "says nothing: ISV is 0"
    if row.name in ("SAS", "SSE", "SF", "AR") and not layout["ISV"].get(value):
        return "says nothing: ISV is 0"
    if row.name == "EC" and of not in EC:
        return "reserved exception class"
    if row.name in ("FSC", "IFSC", "FST", "xFSC") and row.values and of not in row.values:
        return "reserved fault status code"
    if row.name in _DERIVED:
        return _DERIVED[row.name](of)
    return meaning(row, of)


# Facts: what several fields say together.


def _facts(name: str, value: int, far: int | None, granule: Granule) -> dict[str, str]:
    if name.startswith("ESR"):
        return _syndrome(name, value, far, granule)
    if name == "PAR_EL1":
        return _translation(value)
    if name.startswith("FAR"):
        return _address(value, granule)
    return _GRANULE_FACTS[name](value) if name in _GRANULE_FACTS else {}


def _table_base(value: int) -> dict[str, str]:
    base = GPTBR_EL3["BADDR"].get(value) << BASE_SHIFT
    return {"table": f"at {base:#x} of the Root space, aligned down to its size (by PPS and L0GPTSZ)"}


def _faulting_pa(value: int) -> dict[str, str]:
    view = MFAR_EL3.view(value)
    return {"what": f"PA {view.FPA:#x} in the {PASpace(view.NSE << 1 | view.NS)} space (bits 11:0 are the VA's)"}


_GRANULE_FACTS = {"GPTBR_EL3": _table_base, "MFAR_EL3": _faulting_pa}


def _syndrome(name: str, value: int, far: int | None, granule: Granule) -> dict[str, str]:
    layout = _layout(name, value, False, False)
    view = layout.view(value)
    facts = {"what": EC.get(view.EC, f"exception class {view.EC:#x}, which is reserved")}
    if view.EC in ABORTS:
        facts = _abort(name, value, layout)
    elif view.EC == EC_GPC:
        facts = _granule(view)
    elif view.EC == 0x18:
        register = f"S{view.Op0}_{view.Op1}_C{view.CRn}_C{view.CRm}_{view.Op2}"
        facts["access"] = f"MRS x{view.Rt}, {register}" if view.Direction else f"MSR {register}, x{view.Rt}"
    el = name[-1]
    facts[f"FAR_EL{el}"] = _far_meaning(view.EC, layout, value)
    return facts | (_address(far, granule) if far is not None else {})


def _abort(name: str, value: int, layout: Layout) -> dict[str, str]:
    """Who did what, and which fault it met."""
    view = layout.view(value)
    fetch = view.EC in FETCHES
    code = int(view.IFSC if fetch else view.FSC)
    said = "an instruction fetch" if fetch else _access(view.CM, view.WnR)
    who = f"EL{name[-1]}" if view.EC & 1 else f"a level below EL{name[-1]}"
    stage = " of stage 2, met while stage 1's tables were read" if view.S1PTW else ""
    facts = {"what": f"{said} by {who}: {FSC.get(code, f'reserved fault code {code:#x}')}{stage}"}
    if code in FSC and not view.S1PTW:
        facts |= {"why": _why(FSC[code], fetch)} if _why(FSC[code], fetch) else {}
    for flag, said in (("Overlay", "a permission overlay"), ("DirtyBit", "the dirty state")):
        if flag in layout and layout[flag].get(value):
            facts["why"] = f"refused because of {said}"
    return facts


def _granule(view: View) -> dict[str, str]:
    """A granule protection check exception: what was accessed, and why the check failed."""
    said = "an instruction fetch" if view.InD else _access(view.CM, view.WnR)
    fault = FSC.get(view.xFSC, f"reserved fault code {view.xFSC:#x}")
    facts = {"what": f"{said}: {fault}", "why": GPCSC.get(view.GPCSC, f"reserved GPCSC {view.GPCSC:#x}")}
    if view.S2PTW:
        facts["table"] = "a table of stage 2" + (", read for a table of stage 1" if view.S1PTW else "")
    return facts | {"MFAR_EL3": "has the physical address and its space"}


def _access(maintenance: int, write: int) -> str:
    if maintenance:
        return "a cache maintenance or AT instruction"
    return "a write" if write else "a read"


_REASONS = {
    "translation fault, level 0": "the VA is outside the range that TCR's TxSZ sets, its half is switched off (EPD,"
    " E0PD), or the level 0 descriptor is invalid",
    "translation fault": "the level {} descriptor is invalid (bit 0 is 0), or of a reserved form",
    "access flag fault": "AF is 0 in the level {} descriptor, and hardware does not set it (TCR.HA)",
    "permission fault": "the level {} descriptor, a table above it, or PSTATE.PAN refuses the access",
    "address size fault, level 0": "TTBR or the level 0 descriptor has an address beyond TCR's output size",
    "address size fault": "the level {} descriptor has an address beyond TCR's output size",
    "external abort on the walk": "there is no memory, or an error, where the level {} descriptor should be",
    "alignment fault": "an unaligned access to Device memory, or with SCTLR.A",
    "TLB conflict abort": "the TLB holds two entries for the address: break-before-make was not kept",
    "tag check fault": "the address's tag is not the memory's",
}


def _why(fault: str, fetch: bool) -> str:
    kind, _, level = fault.partition(", level ")
    if kind == "permission fault" and fetch:
        return f"the level {level} descriptor or a table above it is execute-never, or WXN makes it so"
    return _REASONS.get(fault, _REASONS.get(kind, "")).format(level)


def _far_meaning(ec: int, layout: Layout, value: int) -> str:
    if ec not in WITH_FAR:
        return "says nothing: this class of exception does not write it"
    if "FnV" in layout and layout["FnV"].get(value):
        return "is not valid (FnV is 1)"
    if ec == 0x22:
        return "is the misaligned PC"
    if ec in (0x34, 0x35):
        return "is an address of the access that hit the watchpoint"
    if "S1PTW" in layout and layout["S1PTW"].get(value):
        return "is the VA whose stage 1 walk faulted; HPFAR_EL2 has the IPA of the table that was read"
    return "is the VA of the fetch" if ec in FETCHES else "is the VA of the access"


def _address(va: int, granule: Granule) -> dict[str, str]:
    """The half of a VA, its tag, and the entries that a walk of it reads (48 bits, as most regimes have)."""
    upper = bool(va & RANGE_BIT)
    half = "upper half (TTBR1): kernel" if upper else "lower half (TTBR0): user"
    sign = va >> 48
    facts = {"address": f"{va:#018x}, {half}"}
    if sign not in (0, 0xFFFF):
        facts["address"] += f"; bits 63:48 are {sign:#06x}: a tag, or beyond 48 bits"
    levels = range(LOWEST_LEVEL[granule], LAST_LEVEL + 1)
    indexes = " ".join(f"L{level}[{_index(va, level, granule)}]" for level in levels)
    facts["entries"] = f"{indexes}, offset {va & granule.page_size - 1:#x} ({granule.label} granule, 48 bits)"
    return facts


def _index(va: int, level: int, granule: Granule) -> int:
    """The entry at `level` of a 48-bit VA: the first level resolves what bits are left."""
    shift = granule.level_shift(level)
    return (va & (1 << 48) - 1) >> shift & granule.entries - 1


def _translation(value: int) -> dict[str, str]:
    """PAR_EL1: where the address goes, or the fault."""
    if not PAR_FAULT["F"].get(value):
        view = PAR_OK.view(value)
        shared = "outer shareable" if FORCED_OUTER[view.ATTR] else SH[view.SH]
        facts = {"what": f"translated: PA {view.PA:#x} (bits 11:0 are the VA's)"}
        return facts | {"memory": f"{MemoryAttributes.of(view.ATTR)}, {shared}"}
    view = PAR_FAULT.view(value)
    fault = FSC.get(view.FST, f"reserved fault code {view.FST:#x}")
    where = " of stage 2" if view.S else ""
    where += ", met while stage 1's tables were read" if view.PTW else ""
    facts = {"what": f"no translation: {fault}{where}"}
    return facts | ({"why": _why(fault, False)} if _why(fault, False) else {})


# Findings.


def _findings(name: str, value: int, layout: Layout) -> Iterator[Finding]:
    for row in layout.misuse(value):
        yield Finding(
            "wrong", row.name, f"bits {row.bits} must be {row.reserved[-1]}, unless a newer extension uses them"
        )
    for row in layout:
        of = row.get(value)
        if row.meaning(of).startswith("reserved"):
            yield Finding("wrong", row.name, f"{row.name} = {of:#x} is reserved")
        if layout is MAIR and MemoryAttributes.of(of).type == "reserved":
            yield Finding("wrong", row.name, f"{row.name} = {of:#04x} is reserved")
        if row.name in ("T0SZ", "T1SZ") and name != "VTCR_EL2" and not 12 <= of <= 48:
            yield Finding("wrong", row.name, f"{row.name} = {of}: must be 16 to 39, or 12 to 48 with extensions")
    if layout is GPCCR_EL3 and layout["SH"].get(value) != OUTER_SHAREABLE and not layout.mask("IRGN", "ORGN") & value:
        yield Finding("wrong", "SH", "non-cacheable reads must be outer shareable (SH = 2): every check faults")
    if "HD" in layout and layout["HD"].get(value) and not layout["HA"].get(value):
        yield Finding("wrong", "HD", "HD=1 has no effect while HA=0")
    if name.startswith("ESR") and "EC" in layout and layout["EC"].get(value) not in EC:
        yield Finding("wrong", "EC", f"EC = {layout['EC'].get(value):#x} is reserved")
