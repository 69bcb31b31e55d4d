"""The granule protection check (FEAT_RME): may an access to a physical address in some space be made.

    found = granule_protection_check(memory.fetch, Gpt.of(regs), pa, PASpace.NONSECURE)
    found.ok, found.fault; print(found)

Rules of this file:
- The only effect is `fetch`; every entry read is kept. A fault is returned.
- The order of checks is the pseudocode's GranuleProtectionCheck: off, registers, spaces switched off, address above
  PPS, table base above PPS, the walk, the GPI.
- The table is read in the Root space, little-endian; its own reads are not checked.
Sources: pseudocode GranuleProtectionCheck, GPCRegistersConsistent, GPTWalk, GPIValid, GPICheck; Arm ARM D9.
Left out: FEAT_RME_GPC3's bypass window, FEAT_RME_GDI, 56-bit addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple

from pgtable.gpt_format import (
    BLOCK,
    CONTIGUOUS,
    GPCCR_EL3,
    GPI,
    GPTBR_EL3,
    GRANULES,
    L0_BLOCK,
    L0_SHIFT,
    L0_TABLE,
    L1_CONTIGUOUS,
    L1_GRANULES,
    PGS_SHIFT,
    PPS_BITS,
    SORT,
    TABLE,
)
from pgtable.memory import NoMemory
from pgtable.registers import Registers
from pgtable.spaces import PASpace

NO_ACCESS, NONSECURE_ONLY, EVERY_SPACE = 0b0000, 0b1101, 0b1111
OF_SPACE = {space: 0b1000 | space.value for space in PASpace}
BASE_SHIFT = 12  # GPTBR_EL3.BADDR counts pages of 4 KiB


class GpcFault(Enum):
    """Why a check refuses; the value is its name in messages."""

    ADDRESS_SIZE = "GPT address size"
    WALK = "GPT walk"
    FAIL = "granule protection"
    EABT = "external abort on a GPT read"


_GPCSC = {GpcFault.ADDRESS_SIZE: 0b000000, GpcFault.WALK: 0b000100, GpcFault.FAIL: 0b001100, GpcFault.EABT: 0b010100}


@dataclass(frozen=True)
class Gpt:
    """What the checks take from GPCCR_EL3, GPTBR_EL3 and the CPU.

    `pps`: protected address size in bits, None if reserved. `granule`, `l0`: log2 of the granule, and of what an entry
    of level 0 covers; None if reserved. `base`: what GPTBR_EL3 says. `secure`: the CPU has a Secure state.
    `inconsistent`: the field that makes every check fault, "" for none.
    """

    on: bool
    pps: int | None
    granule: int | None
    l0: int | None
    base: int
    secure: bool
    inconsistent: str
    off: frozenset[PASpace] = frozenset()  # FEAT_RME_GPC2: spaces that nothing may access
    all_above: bool = False  # FEAT_RME_GPC2: addresses above PPS pass in every space
    ns_only: bool = False  # FEAT_RME_GPC2: GPI 0b1101 means something

    @classmethod
    def of(cls, regs: Registers) -> Gpt:
        """As the registers say; kept with `regs`. Off on a CPU without FEAT_RME."""
        known: Gpt | None = regs._params.get("gpt")
        if known is None:
            known = regs._params["gpt"] = cls._read(regs)
        return known

    @classmethod
    def _read(cls, regs: Registers) -> Gpt:
        f, gpccr = regs.features, GPCCR_EL3.view(regs.GPCCR_EL3)
        pads = {PASpace.SECURE: gpccr.SPAD, PASpace.NONSECURE: gpccr.NSPAD, PASpace.REALM: gpccr.RLPAD}
        return cls(
            on=bool(f.rme and gpccr.GPC),
            pps=PPS_BITS.get(gpccr.PPS),
            granule=PGS_SHIFT.get(gpccr.PGS),
            l0=L0_SHIFT.get(gpccr.L0GPTSZ),
            base=GPTBR_EL3["BADDR"].get(regs.GPTBR_EL3) << BASE_SHIFT,
            secure=f.rme_secure,
            inconsistent=_inconsistent(regs.GPCCR_EL3, f.pa_bits),
            off=frozenset(space for space, pad in pads.items() if pad and f.gpc2),
            all_above=bool(gpccr.APPSAA and f.gpc2),
            ns_only=bool(gpccr.NSO and f.gpc2),
        )

    @property
    def size(self) -> int:
        """log2 of the protected address size; raises ValueError where it is reserved."""
        if self.pps is None:
            raise ValueError("GPCCR_EL3.PPS is reserved")
        return self.pps

    @cached_property
    def shifts(self) -> tuple[int, int]:
        """log2 of what an entry of level 0 covers, and of a granule; raises ValueError where one is reserved."""
        if self.l0 is None or self.granule is None:
            raise ValueError(f"GPCCR_EL3.{'L0GPTSZ' if self.l0 is None else 'PGS'} is reserved")
        return self.l0, self.granule

    @property
    def table(self) -> int:
        """The level 0 table's PA: GPTBR_EL3's, aligned down to the table's size, at least a page."""
        return self.base & -(1 << max(self.size - self.shifts[0] + 3, BASE_SHIFT))

    def valid(self, gpi: int) -> bool:
        """The GPI means something (pseudocode GPIValid)."""
        if gpi == NONSECURE_ONLY:
            return self.ns_only
        return gpi in (NO_ACCESS, EVERY_SPACE, *(OF_SPACE[s] for s in PASpace if self.secure or s != PASpace.SECURE))


def _inconsistent(gpccr: int, pa_bits: int) -> str:
    """The field that is reserved or too large (pseudocode GPCRegistersConsistent); L0GPTSZ is not looked at."""
    view = GPCCR_EL3.view(gpccr)
    if PPS_BITS.get(view.PPS, 1 << 6) > pa_bits:
        return "PPS"
    if view.PGS not in PGS_SHIFT:
        return "PGS"
    if view.SH == 0b01 or (view.SH != 0b10 and not view.IRGN and not view.ORGN):
        return "SH"
    return ""


class GptStep(NamedTuple):
    """One entry read: of `level`, at `pa`."""

    level: int
    pa: int
    word: int


class GptWalk(NamedTuple):
    """One check with its evidence: what was asked, the entries read, the GPI found, and the fault.

    `state`: the own space of the security state that asks. `gpi`: None where the walk did not get to one. `fault`: None
    where the access may be made; `level`: the GPT level that a fault reports; `cause`: what decided.
    """

    gpt: Gpt
    pa: int
    space: PASpace
    state: PASpace
    steps: tuple[GptStep, ...] = ()
    gpi: int | None = None
    fault: GpcFault | None = None
    level: int = 0
    cause: str = ""

    @property
    def ok(self) -> bool:
        """The access may be made."""
        return self.fault is None

    @property
    def gpcsc(self) -> int:
        """ESR_EL3.GPCSC of a fault: its kind and level; raises ValueError where there is none."""
        if self.fault is None:
            raise ValueError(f"PA {self.pa:#x}: the check passes, it has no syndrome")
        return _GPCSC[self.fault] | self.level

    def __str__(self) -> str:
        return "\n".join(_lines(self))


Fetch = Callable[[int], int]


def granule_protection_check(fetch: Fetch, gpt: Gpt, pa: int, space: PASpace, state: PASpace | None = None) -> GptWalk:
    """May `pa` be accessed in `space`: a GptWalk, which passes or has a fault (pseudocode GranuleProtectionCheck).

    `fetch(pa)`: the word at `pa` of the Root space, or NoMemory, which is a fault EABT. `state`: who asks, by the own
    space of its security state (default: `space`); only Non-secure Only granules tell states apart.
    """
    asked = GptWalk(gpt, pa, space, state or space)
    if not gpt.on:
        return asked._replace(cause="GPC")
    if gpt.inconsistent:
        return asked._replace(fault=GpcFault.WALK, cause=gpt.inconsistent)
    if space in gpt.off:
        return asked._replace(fault=GpcFault.FAIL, cause="PAD")
    if pa >> gpt.size:
        passes = space is PASpace.NONSECURE or gpt.all_above
        return asked._replace(fault=None if passes else GpcFault.FAIL, cause="above PPS")
    if gpt.base >> gpt.size:
        return asked._replace(fault=GpcFault.ADDRESS_SIZE, cause="GPTBR")
    walked = _walk(fetch, asked)
    if not walked.ok or _permits(walked):
        return walked
    return walked._replace(fault=GpcFault.FAIL, cause="GPI")


def _permits(found: GptWalk) -> bool:
    """The GPI lets the space in (pseudocode GPICheck)."""
    if found.gpi == NONSECURE_ONLY:
        return found.space is PASpace.NONSECURE and found.state in (PASpace.NONSECURE, PASpace.ROOT)
    return found.gpi in (EVERY_SPACE, OF_SPACE[found.space])


def _walk(fetch: Fetch, asked: GptWalk) -> GptWalk:
    """The GPI of the address, found by one or two entries (pseudocode GPTWalk)."""
    gpt = asked.gpt
    l0, granule = gpt.shifts
    found = _read(fetch, asked, 0, gpt.table + 8 * (asked.pa >> l0))
    if not found.ok:
        return found
    word = found.steps[-1].word
    if SORT.get(word) == BLOCK:
        gpi = L0_BLOCK["GPI"].get(word)
        return _found(found, gpi, 0, [gpi], "" if not L0_BLOCK.misuse(word) else "RES0")
    if SORT.get(word) != TABLE:
        return found._replace(fault=GpcFault.WALK, cause="entry")
    table = L0_TABLE["TA"].get(word)
    unaligned = table & (1 << max(l0 - granule - 1, BASE_SHIFT)) - 1
    if L0_TABLE.misuse(word) or unaligned:
        return found._replace(fault=GpcFault.WALK, cause="RES0")
    if table >> gpt.size:
        return found._replace(fault=GpcFault.ADDRESS_SIZE, cause="table")
    index = asked.pa >> granule + 4 & (1 << l0 - granule - 4) - 1
    found = _read(fetch, found, 1, table + 8 * index)
    return _level1(found, granule) if found.ok else found


def _level1(found: GptWalk, granule: int) -> GptWalk:
    word = found.steps[-1].word
    if SORT.get(word) == CONTIGUOUS:
        gpi = L1_CONTIGUOUS["GPI"].get(word)
        reserved = bool(L1_CONTIGUOUS.misuse(word)) or not L1_CONTIGUOUS["Contig"].get(word)
        return _found(found, gpi, 1, [gpi], "RES0" if reserved else "")
    every = [L1_GRANULES[f"GPI{i}"].get(word) for i in range(GRANULES)]
    return _found(found, every[found.pa >> granule & GRANULES - 1], 1, every, "")


def _found(found: GptWalk, gpi: int, level: int, every: list[int], reserved: str) -> GptWalk:
    """The entry's GPI, unless a reserved field or any of its GPIs makes the entry invalid."""
    cause = reserved or ("" if all(map(found.gpt.valid, every)) else "GPI")
    if cause:
        return found._replace(fault=GpcFault.WALK, level=level, cause=cause)
    return found._replace(gpi=gpi, level=level)


def _read(fetch: Fetch, found: GptWalk, level: int, pa: int) -> GptWalk:
    try:
        step = GptStep(level, pa, fetch(pa))
    except NoMemory:
        return found._replace(fault=GpcFault.EABT, level=level, cause=f"no memory at {pa:#x}")
    return found._replace(steps=(*found.steps, step))


# text

_SAID = {
    "GPC": "checks are off (GPCCR_EL3.GPC is 0)",
    "PPS": "GPCCR_EL3.PPS is reserved, or beyond the CPU's addresses",
    "PGS": "GPCCR_EL3.PGS is reserved",
    "SH": "GPCCR_EL3.SH is reserved, or does not go with IRGN and ORGN",
    "PAD": "GPCCR_EL3 switches the whole space off",
    "GPTBR": "GPTBR_EL3's address is above PPS",
    "entry": "neither a block nor a table",
    "RES0": "a reserved field is not 0",
    "table": "the table's address is above PPS",
}


def _lines(found: GptWalk) -> Iterator[str]:
    yield f"granule of PA {found.pa:#018x}, {found.space} space"
    for level, pa, word in found.steps:
        yield f"  GPT L{level} {pa:#018x} {word:#018x} {entry_text(level, word)}"
    if found.gpi is not None:
        yield f"  GPI {found.gpi:#06b}: {GPI[found.gpi]}"
    elif found.cause == "above PPS":
        yield f"  the address is above {found.gpt.pps} bits (GPCCR_EL3.PPS)"
    elif found.cause == "GPI":
        yield "  a GPI of the entry is reserved"
    elif found.cause:
        yield f"  {_SAID.get(found.cause, found.cause)}"
    yield f"  = {'access' if found.fault is None else f'{found.fault.value} fault, GPT level {found.level}'}"


def entry_text(level: int, word: int) -> str:
    """What an entry of a GPT is, in a few words."""
    sort = SORT.get(word)
    if level == 0:
        return {BLOCK: "block", TABLE: "table"}.get(sort, "invalid")
    return "contiguous" if sort == CONTIGUOUS else "granules"
