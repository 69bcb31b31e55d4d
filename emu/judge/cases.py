"""Random cases: registers, tables and queries, the same for the same seed everywhere.

    random_case(random.Random(1), "s1-4k")                         # a Case without answers
    random_case(rng, "acc-hahd", avoid=TRAPS[oracle.version])      # clear of what that QEMU does wrong

- A kind is a row of KINDS. `kinds(oracle.registers | oracle.operations, avoid)` is what an oracle can be asked.
- Kinds that are not `edge` keep to what the architecture defines and every judge takes alike: addresses that a
  reserved descriptor bit would change, reserved shareability and memory attributes, SCTLR.C=0 and sizes out of range
  are left out. Kinds that are `edge` have all of it; a difference there needs looking at.
- The mistakes of one version are avoided by name: see TRAPS.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from random import Random

from emu.judge.corpus import RME_CPU, Case
from emu.judge.draw import ALL_GRANULES, NO_FETCH, Draw, Kind, granules_of
from emu.judge.draw_rme import RME_KINDS, protected
from emu.judge.draw_stage2 import STAGE2_KINDS, DrawStage2
from emu.judge.trees import Style

__all__ = ["GRANULES", "KINDS", "TRAPS", "Kind", "granule_names", "kinds", "random_case"]

GRANULES: Mapping[str, int] = {"4K": 12, "16K": 14, "64K": 16}
"""The granules by name: log2 of the page size."""

TRAPS: Mapping[str, frozenset[str]] = {
    "7.2": frozenset({"block level", "sharing", "PAN3", "small root", "root beyond 48 bits", "EL2 syndrome"})
    | {"stage 2 by PS", "Secure stage 2"},
    "10.0": frozenset({"small root", "root beyond 48 bits", "GPC2"}),
    "11.1": frozenset({"AT of a clean page"}),
}
"""Mistakes, or missing features, of a QEMU version that cases can keep clear of.

block level          takes a block descriptor at a level that has none (4K level 0 without DS, level -1), and dies
                     of an access flag or permission fault by one of level -1
sharing              reports SH as it is in the descriptor for Device and Non-cacheable memory and with the MMU off
PAN3                 has no SCTLR.EPAN
small root           lets TTBR[5:4] into the address of a root table smaller than 64 bytes, with 52-bit addresses
root beyond 48 bits  with DS=1 and PS < 6, leaves TTBR[5:2] out of the address, so that it never is too large
stage 2 by PS        has no IPAs beyond VTCR_EL2.PS, asks PS, not the CPU's PA size, for the root's level, and takes no
                     root at level -1 (4K) or 0 (16K)
Secure stage 2       looks for stage 1's Secure tables in the Non-secure IPA space
EL2 syndrome         sets ISV in the syndrome of an access at EL2
GPC2                 has no FEAT_RME_GPC2
AT of a clean page   reports a permission fault for an AT write to a page that hardware would make dirty

What cases cannot keep clear of: 7.2 and 10.0 let an AT instruction set the access flag and make a page dirty, 11.1
does not; so `after` of AT cases is to be compared with 11.1 only.
"""

# What arm64 Linux gives: kernel, its text, its read-only data, device, user data, text and read-only, execute-only.
LINUX = Style(
    leaves=(
        0x0068_0000_0000_0700, 0x0050_0000_0000_0780, 0x0060_0000_0000_0780, 0x0068_0000_0000_070C,
        0x00E8_0000_0000_0F40, 0x0020_0000_0000_0FC0, 0x0060_0000_0000_0FC0, 0x0020_0000_0000_0F80,
        0x0070_0000_0000_0700, 0x01E0_0000_0000_0FC0,
    ),
    af_clear=0.08,
    dbm=None,
)  # fmt: skip
ONE_EL = Style(single_el=True)
FUZZ = Style(raw=True)
TAMPERED = Style(guarded=True)
HA = Style(af_clear=0.5, ram=0.5)
HAHD = Style(af_clear=0.3, dbm=0.6, ap2=0.7, ram=0.5)
PIE_AT = Style(dbm=None, ap2=0.0)
PIE = Style(dbm=None, ram=0.7)
REAL = Style(ram=0.7)

KINDS: Mapping[str, Kind] = {
    "s1-4k": Kind(),
    "s1-16k": Kind((14,)),
    "s1-64k": Kind((16,), ps=(0, 1, 2, 3, 4, 5)),
    "s1-mixed": Kind(ALL_GRANULES),
    "s1-linux": Kind(ps=(5,), style=LINUX),
    "s1-lpa2": Kind((12, 14), ds=True, ps=(4, 5, 6, 6)),
    "s1-lpa64": Kind((16,), ps=(6,)),
    "s1-ha": Kind(ALL_GRANULES, hardware=("HA",), style=HA),
    "s1-hahd": Kind(ALL_GRANULES, hardware=("HA", "HD"), style=HAHD),
    "s1-off": Kind(ALL_GRANULES, off=True, traps=("sharing",)),
    "s1-secure": Kind(ALL_GRANULES, secure=True),
    "s1-pie": Kind(ALL_GRANULES, pie=True, style=PIE_AT, needs=("PIR_EL1",)),
    "s1-ats1a": Kind(ALL_GRANULES, more_ops=("S1E1A",) * 4, needs=("S1E1A",)),
    "el2": Kind(ALL_GRANULES, "EL2", style=ONE_EL),
    "el20": Kind(ALL_GRANULES, "EL20", needs=("TTBR1_EL2",)),
    "el3": Kind(ALL_GRANULES, "EL3", style=ONE_EL),
    "s1-raw": Kind(ALL_GRANULES, style=FUZZ, edge=True),
    "s1-wild": Kind(ALL_GRANULES, style=TAMPERED, tamper=True, edge=True),
    "acc-4k": Kind(access=True, style=REAL),
    "acc-16k": Kind((14,), access=True, style=REAL),
    "acc-64k": Kind((16,), access=True, style=REAL),
    "acc-linux": Kind(ps=(5,), access=True, style=replace(LINUX, ram=0.7)),
    "acc-lpa2": Kind((12, 14), ds=True, ps=(4, 5, 6, 6), access=True, style=REAL),
    "acc-lpa64": Kind((16,), ps=(6,), access=True, style=REAL),
    "acc-ha": Kind(ALL_GRANULES, hardware=("HA",), access=True, style=HA),
    "acc-hahd": Kind(ALL_GRANULES, hardware=("HA", "HD"), access=True, style=HAHD, no_ops=NO_FETCH),
    "acc-pie": Kind(ALL_GRANULES, pie=True, access=True, style=PIE, needs=("PIR_EL1",)),
    "acc-el20": Kind(ALL_GRANULES, "EL20", access=True, style=REAL, needs=("TTBR1_EL2",), traps=("EL2 syndrome",)),
    "acc-swp": Kind(ALL_GRANULES, access=True, style=REAL, more_ops=("SWP1", "SWP0"), needs=("SWP1",)),
    **STAGE2_KINDS,
    **RME_KINDS,
}  # fmt: skip


def kinds(have: Collection[str], avoid: Collection[str] = (), cpu: str = "max") -> list[str]:
    """The kinds that need nothing but these registers and operations, can keep clear of these traps, and suit a CPU."""
    return [
        name
        for name, kind in KINDS.items()
        if set(kind.needs) <= set(have) and set(kind.traps).isdisjoint(avoid) and granules_of(kind, cpu)
    ]


def granule_names(kind: str, among: Collection[str] = tuple(GRANULES)) -> list[str]:
    """The granules that a kind is about, by name."""
    return [name for name, shift in GRANULES.items() if name in among and shift in KINDS[kind].granules]


def random_case(
    rng: Random, kind: str, *, cpu: str | None = None, avoid: Collection[str] = (), granules: Collection[str] = ()
) -> Case:
    """A case of `kind` with about 200 queries or more, clear of the traps in `avoid`, for a CPU model that it suits.

    `granules`: only these ("4K"), in both halves; () for all that the kind is about.
    Raises ValueError if none of them is the CPU's and the kind's.
    """
    row = KINDS[kind]
    cpu = cpu or (RME_CPU if row.rme else "max")
    if granules:
        row = replace(row, granules=tuple(GRANULES[name] for name in granule_names(kind, granules)))
    if not granules_of(row, cpu):
        raise ValueError(f"{cpu} has none of the granules of {kind}")
    draw = DrawStage2 if row.stage2 else Draw
    case = draw(rng, kind, row, cpu, frozenset(avoid)).case()
    return protected(rng, case, row, extended="GPC2" not in avoid) if row.rme else case
