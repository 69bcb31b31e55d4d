"""TLBI operations: every encoding by name, what an operand means, and which TLB entries an operation must remove.

Rules of this file:
- An operation is a row: its encoding, its type and exception level as in its name, and what its suffixes say.
- `decode` reads an operand into an `Invalidation`. What the architecture leaves without effect is said in `void`.
- `misses` is the one place that decides whether an entry is in an operation's scope; tlb.py and bbm.py both ask it.
- One Security state. TLBIP (128-bit operands, FEAT_D128) is not here. Operations on granule protection tables are
  decoded, and touch no entry of a translation table.
Sources: Arm ARM C5.5 (encodings, operands), D8.17.5 (scope), tables D8-122 to D8-124 (TG, TTL).
"""

from __future__ import annotations

from enum import Enum, IntEnum
from functools import lru_cache
from typing import NamedTuple

from pgtable.bits import Layout, bits, res0
from pgtable.descriptors import Granule
from pgtable.params import Regime

_U64 = (1 << 64) - 1
UNIT = 12  # an operand that names one address counts in 4 KiB whatever the granule
WIDE_UNIT = 16  # with 52-bit addresses a range's BaseADDR counts in 64 KiB


class Type(Enum):
    """The <type> in an operation's name, without L."""

    ALL = "ALL"
    VMALL = "VMALL"
    VMALLS12 = "VMALLS12"
    VMALLWS2 = "VMALLWS2"  # removes dirty state only: no entry has to go
    ASID = "ASID"
    VA = "VA"
    VAA = "VAA"
    IPAS2 = "IPAS2"
    PA = "PA"  # granule protection tables (FEAT_RME)


class Domain(IntEnum):
    """Whose TLBs an operation reaches, and whom a barrier waits for; in order of reach."""

    LOCAL = 0
    INNER = 1
    OUTER = 2


class Operation(NamedTuple):
    """One TLBI instruction: `name` without "TLBI", its SYS encoding, and what the name says.

    `last`: the last level of lookup only (L). `ranged`: a range of addresses (R). `nxs`: need not wait for accesses to
    memory with XS = 1.
    """

    name: str
    op1: int
    crn: int
    crm: int
    op2: int
    type: Type
    el: int
    last: bool
    ranged: bool
    domain: Domain
    nxs: bool

    @property
    def takes_operand(self) -> bool:
        """Has an Xt; the assembler refuses one for the others."""
        return self.type in (Type.ASID, Type.VA, Type.VAA, Type.IPAS2) or (self.type is Type.PA and self.ranged)

    @property
    def encoding(self) -> tuple[int, int, int, int]:
        """(op1, CRn, CRm, op2)."""
        return self.op1, self.crn, self.crm, self.op2


# CRm for the CPU itself, Inner Shareable, Outer Shareable.
_ONE, _RANGE = (7, 3, 1), (6, 2, 5)
_SUFFIX = {Domain.LOCAL: "", Domain.INNER: "IS", Domain.OUTER: "OS"}

# Type, EL, op1, op2, CRm of the three domains; `L` and `R` forms are rows of their own.
_ROWS: tuple[tuple[str, Type, int, int, int, tuple[int, int, int]], ...] = (
    ("VMALLE1", Type.VMALL, 1, 0, 0, _ONE),
    ("VAE1", Type.VA, 1, 0, 1, _ONE),
    ("ASIDE1", Type.ASID, 1, 0, 2, _ONE),
    ("VAAE1", Type.VAA, 1, 0, 3, _ONE),
    ("VALE1", Type.VA, 1, 0, 5, _ONE),
    ("VAALE1", Type.VAA, 1, 0, 7, _ONE),
    ("RVAE1", Type.VA, 1, 0, 1, _RANGE),
    ("RVAAE1", Type.VAA, 1, 0, 3, _RANGE),
    ("RVALE1", Type.VA, 1, 0, 5, _RANGE),
    ("RVAALE1", Type.VAA, 1, 0, 7, _RANGE),
    ("ALLE2", Type.ALL, 2, 4, 0, _ONE),
    ("VAE2", Type.VA, 2, 4, 1, _ONE),
    ("ALLE1", Type.ALL, 1, 4, 4, _ONE),
    ("VALE2", Type.VA, 2, 4, 5, _ONE),
    ("VMALLS12E1", Type.VMALLS12, 1, 4, 6, _ONE),
    ("RVAE2", Type.VA, 2, 4, 1, _RANGE),
    ("VMALLWS2E1", Type.VMALLWS2, 1, 4, 2, _RANGE),
    ("RVALE2", Type.VA, 2, 4, 5, _RANGE),
    ("ALLE3", Type.ALL, 3, 6, 0, _ONE),
    ("VAE3", Type.VA, 3, 6, 1, _ONE),
    ("VALE3", Type.VA, 3, 6, 5, _ONE),
    ("RVAE3", Type.VA, 3, 6, 1, _RANGE),
    ("RVALE3", Type.VA, 3, 6, 5, _RANGE),
)

# Rows of stage 2, whose op2 depends on the domain too: (CRm, op2) of the three.
_STAGE2: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "IPAS2E1": ((4, 1), (0, 1), (4, 0)),
    "IPAS2LE1": ((4, 5), (0, 5), (4, 4)),
    "RIPAS2E1": ((4, 2), (0, 2), (4, 3)),
    "RIPAS2LE1": ((4, 6), (0, 6), (4, 7)),
}

# Granule protection tables: no nXS forms, not every domain.
_GPT = (
    Operation("PAALL", 6, 8, 7, 4, Type.PA, 3, False, False, Domain.LOCAL, False),
    Operation("PAALLOS", 6, 8, 1, 4, Type.PA, 3, False, False, Domain.OUTER, False),
    Operation("RPAOS", 6, 8, 4, 3, Type.PA, 3, False, True, Domain.OUTER, False),
    Operation("RPALOS", 6, 8, 4, 7, Type.PA, 3, True, True, Domain.OUTER, False),
)
_CRN, _CRN_NXS = 8, 9


def _operations() -> dict[str, Operation]:
    rows = [(name, type, el, op1, tuple((m, op2) for m in crms)) for name, type, el, op1, op2, crms in _ROWS] + [
        (name, Type.IPAS2, 1, 4, places) for name, places in _STAGE2.items()
    ]
    made = [
        Operation(
            f"{name}{_SUFFIX[domain]}{'NXS' if nxs else ''}",
            *(op1, _CRN_NXS if nxs else _CRN, *place),
            type,
            el,
            last=name.endswith(f"LE{el}") and "ALL" not in name,
            ranged=name.startswith("R"),
            domain=domain,
            nxs=nxs,
        )
        for name, type, el, op1, places in rows
        for domain, place in zip(Domain, places, strict=True)
        for nxs in (False, True)
    ]
    return {operation.name: operation for operation in (*made, *_GPT)}


OPERATIONS: dict[str, Operation] = _operations()
BY_ENCODING: dict[tuple[int, int, int, int], Operation] = {op.encoding: op for op in OPERATIONS.values()}

# Operands.
_ASID = bits("ASID", 63, 48, "address space identifier")
_TTL = bits("TTL", 47, 44, "granule and level of the leaf entry")


BY_VA = Layout("TLBI by VA", (_ASID, _TTL, bits("VA", 43, 0, "VA[55:12]")))
BY_IPA = Layout("TLBI by IPA", (bits("NS", 63), res0(62, 48), _TTL, res0(43, 40), bits("IPA", 39, 0, "IPA[51:12]")))
BY_RANGE = Layout(
    "TLBI by range of addresses",
    (
        _ASID,
        bits("TG", 47, 46, "granule", {0: "reserved", 1: "4K", 2: "16K", 3: "64K"}),
        bits("SCALE", 45, 44, "exponent of the size"),
        bits("NUM", 43, 39, "multiplier of the size"),
        bits("TTL", 38, 37, "level of the leaf entries, 0 for any"),
        bits("BaseADDR", 36, 0, "first address, in granules (64 KiB with 52-bit addresses)"),
    ),
)
_TG = {1: Granule.K4, 2: Granule.K16, 3: Granule.K64}
TG_OF = {granule: tg for tg, granule in _TG.items()}


class Invalidation(NamedTuple):
    """One executed TLBI: what it applies to.

    `start`, `end`: the addresses [start, end), VAs as 64-bit canonical addresses, IPAs of stage 2; 0, 0 for operations
    without an address. `asid`, `vmid`: None where the operation does not look at them. `level`: of the leaf entries,
    as TTL says, None for any. `granule`: None for any. `void`: why the architecture requires no effect, "" if it does.
    """

    operation: Operation
    operand: int
    regime: Regime
    vmid: int | None
    asid: int | None
    start: int
    end: int
    level: int | None
    granule: Granule | None
    void: str

    @property
    def name(self) -> str:
        """The operation's name, `VAALE1IS`."""
        return self.operation.name

    @property
    def domain(self) -> Domain:
        """Whose TLBs it reaches."""
        return self.operation.domain

    def __str__(self) -> str:
        where = ""
        if self.end:
            one = not self.operation.ranged
            where = f" {self.start:#x}" if one else f" {self.start:#x}-{self.end:#x}"
        asid = "" if self.asid is None else f" asid {self.asid:#x}"
        return f"tlbi {self.name.lower()}{where}{asid}"


def canonical(va: int) -> int:
    """A VA with bits [63:56] made copies of bit 55, as a TLBI takes it."""
    return va | 0xFF << 56 if va >> 55 & 1 else va & (1 << 56) - 1


@lru_cache(maxsize=1 << 12)
def decode(
    operation: Operation | str,
    operand: int = 0,
    *,
    e2h: bool = False,
    tge: bool = False,
    ds: bool = False,
    lpa2: bool = True,
    vmid: int = 0,
) -> Invalidation:
    """What `operation` (or its name) with Xt = `operand` does.

    `e2h`, `tge`: HCR_EL2's bits, which choose between EL1&0, EL2 and EL2&0. `ds`: 52-bit addresses (TCR.DS of the
    regime; VTCR_EL2.DS for IPAs). `lpa2`: FEAT_LPA2, for two TTL values. `vmid`: the current one.
    Raises ValueError for a name that no operation has.
    """
    row = operation if isinstance(operation, Operation) else _named(operation)
    regime = _regime(row.el, e2h, tge)
    type = row.type
    id = vmid if regime is Regime.EL10 and type not in (Type.ALL, Type.PA) else None
    asid = operand >> 48 if regime.has_el0 and type in (Type.VA, Type.ASID) else None
    if type not in (Type.VA, Type.VAA, Type.IPAS2):
        return Invalidation(row, operand, regime, id, asid, 0, 0, None, None, "")
    read = _range if row.ranged else _single
    start, end, level, granule, void = read(type is Type.IPAS2, operand, ds, lpa2)
    return Invalidation(row, operand, regime, id, asid, start, end, level, granule, void)


def _named(name: str) -> Operation:
    row = OPERATIONS.get(name.upper())
    if row is None:
        raise ValueError(f"no TLBI operation is called {name}")
    return row


def _regime(el: int, e2h: bool, tge: bool) -> Regime:
    if el == 3:
        return Regime.EL3
    if el == 2:
        return Regime.EL20 if e2h else Regime.EL2
    return Regime.EL20 if e2h and tge else Regime.EL10


_Extent = tuple[int, int, int | None, Granule | None, str]


def _single(ipa: bool, operand: int, ds: bool, lpa2: bool) -> _Extent:
    field = BY_IPA["IPA"] if ipa else BY_VA["VA"]
    start = field.get(operand) << UNIT
    start = start if ipa else canonical(start)
    ttl = _TTL.get(operand)
    granule, level = _TG.get(ttl >> 2), ttl & 3
    if granule is None or _reserved_level(granule, level, lpa2):
        return start, start + (1 << UNIT), None, None, ""
    start &= -granule.page_size
    return start, start + granule.page_size, level, granule, ""


def _reserved_level(granule: Granule, level: int, lpa2: bool) -> bool:
    """A TTL that names no level with leaves, and counts as no hint (table D8-123)."""
    least = {Granule.K4: 0 if lpa2 else 1, Granule.K16: 1 if lpa2 else 2, Granule.K64: 1}[granule]
    return level < least


def _range(ipa: bool, operand: int, ds: bool, lpa2: bool) -> _Extent:
    f = BY_RANGE
    granule, ttl = _TG.get(f["TG"].get(operand)), f["TTL"].get(operand)
    if granule is None:
        return 0, 0, None, None, "TG = 0 is reserved"
    unit = WIDE_UNIT if ds and granule is not Granule.K64 else granule.page_shift
    base = f["BaseADDR"].get(operand)
    if not ipa and base >> 36:
        base |= -1 << 37  # the upper half of the VA space
    start = base << unit & _U64
    pages = f["NUM"].get(operand) + 1 << 5 * f["SCALE"].get(operand) + 1
    top = 1 << 64 if start >> 63 else 1 << 63  # it does not wrap into the other half
    end = min(start + pages * granule.page_size, top)
    level = None if not ttl or _reserved_level(granule, ttl, lpa2) else ttl
    unaligned = level is not None and start % granule.level_size(level)
    return start, end, level, granule, f"BaseADDR is no multiple of a level {level} entry" if unaligned else ""


class Target(NamedTuple):
    """What a TLB holds, as far as a TLBI's scope asks.

    `start`, `size`: VAs (canonical), IPAs for an entry of stage 2 alone. `asid`: None for a global leaf, or where the
    regime has none; a table entry is never global. `stage`: 1, 2, or 3 for both combined.
    """

    regime: Regime
    vmid: int
    asid: int | None
    start: int
    size: int
    level: int
    leaf: bool
    granule: Granule
    stage: int = 1


# Why an entry is out of an operation's scope.
REGIME, VMID, STAGE, KIND = "another regime", "another VMID", "another stage", "no translation entry"
ADDRESS, ASID, GRANULE = "another address", "another ASID", "another granule"
LEVEL, LAST, VOID = "another level than TTL says", "last level only", "no effect required"
ELSEWHERE = frozenset({REGIME, STAGE, KIND, ADDRESS})  # the operation was about something else


def misses(op: Invalidation, entry: Target) -> str:
    """Why `op` need not remove `entry` from a TLB that it reaches; "" if it must (Arm ARM D8.17.5.4)."""
    row = op.operation
    type = row.type
    if type is Type.PA or type is Type.VMALLWS2:
        return KIND
    if op.regime is not entry.regime:
        return REGIME
    if op.vmid is not None and op.vmid != entry.vmid:
        return VMID
    if type in (Type.ALL, Type.VMALLS12):
        return ""
    if (entry.stage == 2) != (type is Type.IPAS2) or (type is Type.IPAS2 and entry.stage != 2):
        return STAGE
    if type is Type.VMALL:
        return ""
    if type is Type.ASID:
        return "" if entry.asid == op.asid else ASID
    if op.void:
        return VOID
    if not (op.start < entry.start + entry.size and entry.start < op.end):
        return ADDRESS
    if op.granule is not None and op.granule is not entry.granule:
        return GRANULE
    if not entry.leaf and row.last:
        return LAST
    if op.level is not None and not (entry.level == op.level if entry.leaf else entry.level < op.level):
        return LEVEL
    return ASID if op.asid is not None and entry.asid not in (None, op.asid) else ""


def operand_for(name: str, address: int = 0, *, asid: int = 0, ttl: int = 0) -> int:
    """The Xt of an operation that takes one address or an ASID: `address` is a VA, or an IPA for IPAS2."""
    row = _named(name)
    if row.type is Type.IPAS2:
        return BY_IPA.pack(TTL=ttl, IPA=address >> UNIT)
    return BY_VA.pack(ASID=asid, TTL=ttl, VA=address >> UNIT & BY_VA["VA"].value_mask)


def range_operand(
    address: int, pages: int, granule: Granule = Granule.K4, *, asid: int = 0, ttl: int = 0, ds: bool = False
) -> int:
    """The Xt of a range operation on exactly `pages` pages from `address` on; raises ValueError if it takes more."""
    for scale in range(4):
        count, rest = divmod(pages, 1 << 5 * scale + 1)
        if not rest and 1 <= count <= 32:
            unit = WIDE_UNIT if ds else granule.page_shift
            base = address >> unit & BY_RANGE["BaseADDR"].value_mask
            return BY_RANGE.pack(ASID=asid, TG=TG_OF[granule], SCALE=scale, NUM=count - 1, TTL=ttl, BaseADDR=base)
    raise ValueError(f"{pages} pages: no range operation has exactly this size")
