"""`explain`: one descriptor or one register value, bit by bit, with what it allows and what looks wrong.

    from pgtable import explain
    print(explain(0x00E8000040000F03))

Rules of this file:
- Meanings come from the layouts; permissions and memory types from the rules that the walk uses (`leaf_permissions`,
  MAIR). What is not known from one word is assumed, and every assumption is said.
- Stage 2 is explained by its layout: the hardware model has stage 1 only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import NamedTuple

from pgtable.attributes import FORCED_OUTER, MemoryAttributes
from pgtable.bits import Field, Layout
from pgtable.descriptors import LAST_LEVEL, Format, Granule, Kind
from pgtable.figure import text
from pgtable.findings import Finding, check_level, descriptor_findings, guess_level, size_text
from pgtable.params import RANGE_BIT, Regime, WalkParams
from pgtable.permissions import ALL, PR, PW, PX, UR, UW, UX, letters
from pgtable.registers import SH, TCR_EL1, TCR_EL2, TCR_EL3, VTCR_EL2, Registers
from pgtable.walk import leaf_permissions

LINUX_MAIR = 0x0000_0004_0044_FFFF  # what arm64 Linux writes at boot; with MTE index 1 becomes 0xf0
REGIMES = {Regime.EL10: "EL1&0", Regime.EL20: "EL2&0", Regime.EL2: "EL2", Regime.EL3: "EL3"}


class FieldText(NamedTuple):
    """One field of a word: its value and what that means; `linux`: names that Linux has for it."""

    field: Field
    value: int
    meaning: str
    linux: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where a descriptor was taken to be, and what it maps. `reason`: why this level, "" where it was given.

    `address`: OA or next table (None where invalid); `size`: bytes that one entry covers; `rights`: by exception level.
    """

    kind: Kind
    level: int
    reason: str
    granule: Granule
    ds: bool
    stage: int
    regime: Regime
    address: int | None
    size: int
    rights: Mapping[str, str]


@dataclass(frozen=True)
class Explanation:
    """A word explained. `print` shows all of it; `text(self, width)` of figure.py for another width.

    `name`: of a register, "" for a descriptor, which has a `place`. `facts`: what follows from several fields, by
    label. `assumptions`: what was not known and taken to be so.
    """

    word: int
    layout: Layout
    title: str
    fields: tuple[FieldText, ...]
    facts: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    assumptions: tuple[str, ...] = ()
    name: str = ""
    place: Place | None = None

    def __getitem__(self, name: str) -> FieldText:
        """A field by its name; raises KeyError."""
        wanted = self.layout[name]
        return next(row for row in self.fields if row.field is wanted)

    def __str__(self) -> str:
        return text(self)


def meaning(row: Field, value: int) -> str:
    """What a value means: from the field's table, else its sentence, negated where one bit is 0."""
    said = row.meaning(value) or row.doc
    if row.value_mask == 1 and not value and not row.values and not row.reserved and said:
        return f"not: {said}"
    return said


def explain(
    word: int,
    level: int | None = None,
    *,
    granule: Granule | str | None = None,
    ds: bool | None = None,
    stage: int = 1,
    fwb: bool = False,
    regime: Regime | str = Regime.EL10,
    va: int | None = None,
    tables: Sequence[int] = (),
    **registers: int,
) -> Explanation:
    """Explains a descriptor of 64 bits.

    `level`: Arm's (-1 to 3); None guesses. `granule`: 4K, 16K or 64K; default that of TCR, else 4K. `ds`: 52-bit
    addresses (LPA2); default that of TCR, else no. `fwb`: HCR_EL2.FWB, for stage 2. `va`: an address that the word
    translates; without one the upper half is taken where there are two. `tables`: the table descriptors above, whose
    attributes limit what a leaf allows. `registers`: TCR_EL1=..., MAIR_EL1=..., SCTLR_EL1=..., as in `Registers`
    (VTCR_EL2 for stage 2). Raises ValueError for a word, level, granule, regime or register that cannot be.
    """
    if not 0 <= word < 1 << 64:
        raise ValueError(f"word {word:#x}: must be 64 bits")
    if stage not in (1, 2):
        raise ValueError(f"stage {stage}: must be 1 or 2")
    granule = Granule.named(granule) if isinstance(granule, str) else granule
    regime = _regime(regime)
    if stage == 2 and "VTCR_EL2" in registers:
        granule, ds = _of_stage2(registers["VTCR_EL2"], granule, ds)
    p = _params(regime, granule, ds, va, registers)
    fmt = Format(p.fmt.granule, p.fmt.ds, lpa=p.fmt.lpa, stage2=True, fwb=fwb) if stage == 2 else p.fmt
    reason = ""
    if level is None:
        level, reason = guess_level(word, fmt)
    check_level(level, fmt)
    inherited = reduce(or_, tables, 0) & p.inherited_mask
    place = _place(word, level, reason, fmt, p, inherited)
    return Explanation(
        word,
        fmt.layout(word, level),
        _title(place),
        tuple(FieldText(f, f.get(word), _meaning(f, word, p, fmt)) for f in fmt.layout(word, level)),
        _facts(word, place, p, fmt, va, inherited),
        tuple(descriptor_findings(word, level, p, fmt, va, inherited)),
        tuple(_assumptions(place, p, fmt, registers, granule, ds, bool(tables))),
        place=place,
    )


def _of_stage2(vtcr: int, granule: Granule | None, ds: bool | None) -> tuple[Granule, bool]:
    """Granule and DS of stage 2: as given, else what VTCR_EL2 says (a reserved granule as 4K)."""
    label = VTCR_EL2["TG0"].meaning(VTCR_EL2["TG0"].get(vtcr))
    chosen = granule or next((g for g in Granule if g.label == label), Granule.K4)
    return chosen, bool(VTCR_EL2["DS"].get(vtcr)) if ds is None else ds


def _regime(regime: Regime | str) -> Regime:
    try:
        return Regime(regime)
    except ValueError:
        raise ValueError(f"regime {regime}: must be {', '.join(r.value for r in Regime)}") from None


def _params(
    regime: Regime, granule: Granule | None, ds: bool | None, va: int | None, given: Mapping[str, int]
) -> WalkParams:
    """The walk parameters of the half that `va` is in, with what was not given chosen."""
    layout = TCR_EL1 if regime.has_el0 else TCR_EL2 if regime is Regime.EL2 else TCR_EL3
    name, tcr_given = f"TCR_EL{regime.el}", f"TCR_EL{regime.el}" in given
    tcr = given.get(name, layout.pack(T0SZ=16, SH0=3, **({"T1SZ": 16, "SH1": 3} if regime.has_el0 else {})))
    if granule or not tcr_given:
        codes = _granule_codes(granule or Granule.K4)
        tcr = layout.pack(tcr, **(codes if regime.has_el0 else {"TG0": codes["TG0"]}))
    if ds is not None:
        tcr = layout.pack(tcr, DS=int(ds))
    if not tcr_given:
        wide = ds or granule is Granule.K64
        tcr = layout.pack(tcr, **{"IPS" if regime.has_el0 else "PS": 6 if wide else 5})
    values = {f"MAIR_EL{regime.el}": LINUX_MAIR} | dict(given) | {name: tcr}
    return WalkParams.of(Registers(None, **values), regime, RANGE_BIT if va is None else va)


def _granule_codes(granule: Granule) -> dict[str, int]:
    """TG0 and TG1 of a granule, by their tables of meanings."""
    fields = (TCR_EL1["TG0"], TCR_EL1["TG1"])
    return {f.name: next(value for value, name in f.values.items() if name == granule.label) for f in fields}


def _place(word: int, level: int, reason: str, fmt: Format, p: WalkParams, inherited: int) -> Place:
    kind, layout = fmt.kind(word, level), fmt.layout(word, level)
    address = None if kind is Kind.INVALID else layout["TA" if kind is Kind.TABLE else "OA"].get(word)
    stage = 2 if fmt.stage2 else 1
    rights = (
        {}
        if kind in (Kind.INVALID, Kind.TABLE)
        else _stage2_rights(word, fmt)
        if fmt.stage2
        else _rights(word, p, inherited)
    )
    size = fmt.granule.level_size(level)
    return Place(kind, level, reason, fmt.granule, fmt.ds, stage, p.regime, address, size, rights)


def _rights(word: int, p: WalkParams, inherited: int) -> dict[str, str]:
    """`rwx` by exception level, as the walk would grant them under tables with the attributes `inherited`."""
    base, overlay, _ = leaf_permissions(p, word, inherited)
    return _by_level(base & overlay, p.regime)


def _by_level(perms: int, regime: Regime) -> dict[str, str]:
    shown = letters(perms)
    return {f"EL{regime.el}": shown[:3]} | ({"EL0": shown[3:]} if regime.has_el0 else {})


_S2_EXECUTE = {0: "xx", 1: "-x", 2: "--", 3: "x-"}  # XN[1:0]: EL1, EL0


def _stage2_rights(word: int, fmt: Format) -> dict[str, str]:
    """What stage 2 lets through (pseudocode AArch64.S2DirectBasePermissions)."""
    leaf = fmt.leaf(LAST_LEVEL)
    access, execute = leaf["S2AP"].get(word), _S2_EXECUTE[leaf["XN"].get(word)]
    data = ("r" if access & 1 else "-") + ("w" if access & 2 else "-")
    return {"EL1": data + execute[0], "EL0": data + execute[1]}


def _title(place: Place) -> str:
    kind = {Kind.INVALID: "invalid", Kind.TABLE: "table", Kind.BLOCK: "block", Kind.PAGE: "page"}[place.kind]
    ds = ", DS=1" if place.ds else ""
    regime = "stage 2 of EL1&0" if place.stage == 2 else f"stage 1 of {REGIMES[place.regime]}"
    level = f"level {place.level}{' (guessed)' if place.reason else ''}"
    return f"{kind}, {level}, {place.granule.label} granule{ds}, {regime}"


def _meaning(row: Field, word: int, p: WalkParams, fmt: Format) -> str:
    """A field's meaning in this word, with what the registers add."""
    value = row.get(word)
    if row.name == "AttrIndx":
        value = p.attr_index(word)
        return f"Attr{value} of MAIR_EL{p.regime.el}: {MemoryAttributes.of(p.mair[value])}"
    if row.name == "NS" and not fmt.stage2 and not p.secure:
        return "no effect outside Secure state"
    said = meaning(row, value)
    return said.replace("EL1", "EL2") if p.regime is Regime.EL20 and not fmt.stage2 else said


def _facts(word: int, place: Place, p: WalkParams, fmt: Format, va: int | None, inherited: int) -> dict[str, str]:
    facts = {"level": f"{place.level}, guessed: {place.reason}; --level decides"} if place.reason else {}
    if place.kind is Kind.INVALID:
        return facts | {"access": f"none: translation fault, level {place.level}"}
    size, address = size_text(place.size), place.address or 0
    if place.kind is Kind.TABLE:
        below = size_text(place.size // place.granule.entries)
        facts["points to"] = (
            f"the table at PA {address:#018x}: {place.granule.entries} entries of {below}, {size} in all"
        )
        return facts | ({} if fmt.stage2 else {"below": _limits(word, p)})
    facts["maps"] = f"{size} at PA {address:#018x}" + (
        f", VA {va:#018x} to PA {address & -place.size | va & place.size - 1:#018x}" if va is not None else ""
    )
    facts["access"] = "  ".join(f"{level} {rights}" for level, rights in place.rights.items())
    if fmt.stage2:
        facts["access"] += "  at most: stage 1 may allow less"
        facts["memory"] = _meaning(fmt.leaf(LAST_LEVEL)["MemAttr"], word, p, fmt)
        return facts
    facts["access"] += "".join(_if(word, p, inherited))
    facts["memory"] = _memory(word, p)
    return facts


def _if(word: int, p: WalkParams, inherited: int) -> list[str]:
    """What would change the rights: hardware's dirty state, WXN, PAN."""
    base, overlay, pan = leaf_permissions(p, word, inherited)
    now, said = base & overlay, []
    if not p.pie and not p.hd:
        with_hd, _, _ = leaf_permissions(replace(p, ha=True, hd=True), word, inherited)
        if with_hd != now:
            said.append(f"; with HD=1 {_spoken(with_hd, p.regime)}")
    if pan:
        said.append(f"; with PSTATE.PAN=1 no loads and stores by EL{p.regime.el}")
    return said


def _spoken(perms: int, regime: Regime) -> str:
    return " ".join(f"{level} {rights}" for level, rights in _by_level(perms, regime).items())


def _memory(word: int, p: WalkParams) -> str:
    attr = p.mair[p.attr_index(word)]
    if FORCED_OUTER[attr]:
        return f"{MemoryAttributes.of(attr)}, outer shareable whatever SH says"
    sh = SH[p.sh] + f" (TCR.SH{int(p.upper)})" if p.fmt.lpa2 else SH[p.page["SH"].get(word)]
    return f"{MemoryAttributes.of(attr)}, {sh}"


def _limits(word: int, p: WalkParams) -> str:
    """What a table's attributes leave of the permissions below it."""
    if not p.table_permissions:
        return "no limits: TCR.HPD, PIE or POE switch table permissions off"
    left = 0
    leaf = p.page
    for value in range(leaf["AP"].value_mask + 1):  # the most that any leaf below can be granted
        base, _, _ = leaf_permissions(p, leaf["AP"].put(0, value), word & p.inherited_mask)
        left |= base
    whole = ALL & (PR | PW | PX | (UR | UW | UX if p.regime.has_el0 else 0))
    return f"at most {_spoken(left, p.regime)}" if left & whole != whole else "no limits on permissions"


def _assumptions(
    place: Place,
    p: WalkParams,
    fmt: Format,
    given: Mapping[str, int],
    granule: Granule | None,
    ds: bool | None,
    tables: bool,
) -> list[str]:
    """What was not said and matters to this word."""
    el = p.regime.el
    tcr = f"TCR_EL{el}" in given
    said = [] if tcr or granule else [f"{fmt.granule.label} granule"]
    said += [] if tcr or ds is not None or fmt.granule is Granule.K64 else ["DS=0 (48-bit addresses)"]
    if fmt.granule is Granule.K64 and fmt.lpa:
        said.append("FEAT_LPA: OA[51:48] in bits 15:12")
    if place.kind in (Kind.INVALID, Kind.TABLE) or fmt.stage2:
        return said
    said += [] if f"MAIR_EL{el}" in given else [f"MAIR_EL{el} is Linux's, {LINUX_MAIR:#018x}"]
    said += ["no limits from tables above"] if p.table_permissions and not tables else []
    said += [] if f"SCTLR_EL{el}" in given else ["WXN=0"]
    said += [] if tcr else ["TCR.HA=0, HD=0"]
    return said + (["TCR.SH is inner shareable"] if fmt.lpa2 and not tcr else [])
