"""Broken rules: the scalar model with one rule replaced at run time, and the judged query that tells.

    python -m tests.judged.mutants          prints the table: which query of the extract kills which mutant
    python -m tests.judged.mutants --make   chooses the extract anew from the corpora (the same one every time)

Rules of this file:
- A mutant is a row: the rule, its source, and what is changed: a piece of a function's text (`Edit`, which insists that
  the text is there once) or a table (`Set`). Nothing on disk changes; `broken` puts everything back.
- A mutant is killed by an answer, or a changed table word, that differs from the judge's in `emu.judge.verdict.same`.
- Overlays (POE) are judged by no emulator, and no corpus asks about nDirty: their killers are `OVERLAID` and `DIRTY`,
  typed from the pseudocode in the Sail model.
"""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from emu.judge import model
from emu.judge.corpus import Answer, Case, load, save
from emu.judge.verdict import UPDATES_OF, cell_of, same, shown
from pgtable import Access, AccessType, FaultType, Granule, PhysicalMemory, Registers, translate
from pgtable.attributes import is_device
from pgtable.bits import Span
from pgtable.descriptors import LAST_LEVEL, Format
from pgtable.permissions import ALL, PR, PW, UR, UW
from pgtable.registers import ESR, TCR2, TCR_EL1
from tests import mutation
from tests.mutation import Change, Edit, Set

HERE = Path(__file__).parent
STAGE2_KINDS = ("s2-only", "s1s2", "s2")  # their mutants are in test_stage2.py
EXTRACT = HERE / "extract.jsonl.xz"
CORPORA = tuple(HERE / "corpus" / f"{name}.jsonl.xz" for name in ("at_clean", "access"))
EDGE = HERE / "corpus" / "at_edge.jsonl.xz"  # random bits: only the queries where judge and model agree are taken
OF_MODEL = ("pgtable", "emu.judge")  # packages in which a replaced object may be bound

# ---- replacing a rule


@contextmanager
def broken(changes: Iterable[Change]) -> Iterator[None]:
    """The model with `changes` made. Registers and their parameters are made anew for each case."""
    with mutation.broken(changes, OF_MODEL, prefix="pgtable.", keep=(model.ram,)):
        yield


# ---- the mutants


class Mutant(NamedTuple):
    """One broken rule: what the rule says, where it stands in Arm's pseudocode, and how it is broken."""

    name: str
    rule: str
    source: str
    changes: tuple[Change, ...]
    judged: bool = True  # by an emulator


def _mutant(name: str, rule: str, source: str, *changes: Change) -> Mutant:
    return Mutant(name, rule, source, changes)


def _read(*pieces: tuple[str, str]) -> Edit:
    return Edit("params:_read", *pieces)


def _feature(name: str, value: object) -> Edit:
    """A choice of the implementation, made otherwise on every CPU."""
    return _read(("f = regs.features\n", f"f = regs.features.replace({name}={value!r})\n"))


def _item(target: str, changes: Mapping[Any, Any]) -> Set:
    """Some entries of a table: by key, or by position."""
    return Set(target, lambda old: {**old, **changes} if isinstance(old, dict) else _placed(old, changes))


def _placed(old: Sequence[Any], changes: Mapping[int, Any]) -> tuple[Any, ...]:
    return tuple(changes.get(i, value) for i, value in enumerate(old))


def _at(pan: bool) -> Set:
    """Whether PSTATE.PAN counts for every AT instruction."""
    return Set("at:OPERATIONS", lambda old: {op: (kind, el, pan) for op, (kind, el, _) in old.items()})


_TOO_LARGE = 'return Fault(FaultType.ADDRESS_SIZE, above, cause="table" if raw else "TTBR")'
_NOT_SET = 'return Fault(FaultType.ACCESS_FLAG, level, cause="AF")'
_OUTPUT = "    return _leaf_output("

MUTANTS: tuple[Mutant, ...] = (
    # Which translation, and the checks before the walk.
    _mutant("bit 55", "VA bit 55 alone chooses the half", "GetVARange", Set("params:RANGE_BIT", lambda _: 1 << 63)),
    _mutant(
        "regime of S1E1",
        "S1E0* and S1E1* ask EL2&0 with E2H = TGE = 1",
        "AArch64.AT",
        Edit("at:_regime", ("Regime.EL20 if host and tge else ", "")),
    ),
    _mutant(
        "regime of S1E2",
        "S1E2* ask EL2&0 with E2H = 1",
        "AArch64.AT",
        Edit("at:_regime", ("EL20 if host else Regime.EL2", "EL2")),
    ),
    _mutant("TG1", "TG1 has its own encoding", "S1DecodeTG1", Set("params:_TG", lambda old: (old[0], old[0]))),
    _mutant(
        "T1SZ",
        "the upper half has its own size",
        "S1TTWParamsEL10",
        _read(("tcr.T1SZ if upper else tcr.T0SZ", "tcr.T0SZ")),
    ),
    _mutant(
        "TxSZ limits",
        "TxSZ out of its limits faults",
        "S1TxSZFaults",
        Edit("walk:_before_the_walk", ("if not p.txsz_ok:", "if False:")),
    ),
    _mutant(
        "TxSZ minimum",
        "TxSZ below 16 needs DS = 1, or 64K with LVA",
        "S1MinTxSZ",
        Edit("params:_txsz", ("least = 12 if ds or (f.lva and granule is Granule.K64) else 16", "least = 12")),
    ),
    _mutant("TxSZ maximum", "TxSZ may be up to 48 with TTST", "S1MaxTxSZ", _feature("ttst", False)),
    _mutant(
        "high VA bits",
        "the bits above the input size must be copies of bit 55",
        "VAIsOutOfRange",
        Edit("walk:_before_the_walk", ("in_range = va & mask == (mask if p.upper else 0)", "in_range = True")),
    ),
    _mutant("TBI", "TBI: the top byte is ignored", "AddrTop", _read(('tbi=bool(half("TBI"))', "tbi=False"))),
    _mutant(
        "TBID", "TBID: but not for fetches", "AddrTop", _read(('tbid=bool(f.pauth and half("TBID"))', "tbid=False"))
    ),
    _mutant(
        "TBID for data",
        "TBID is for fetches only",
        "AddrTop",
        Edit("params:WalkParams.data_range_mask", ("if self.tbi else", "if self.tbi and not self.tbid else")),
    ),
    _mutant(
        "branch target",
        "a branch cleans the tag that TBI ignores",
        "AArch64.BranchAddr",
        Edit("mmu:branch_target", ("if not p.tbi or p.tbid:", "if True:")),
    ),
    _mutant(
        "E0PD",
        "E0PD refuses EL0",
        "AArch64.S1Translate",
        Edit("walk:_before_the_walk", ("if p.e0pd and _as_el0(p, access):", "if False:")),
    ),
    _mutant(
        "E0PD at EL1",
        "E0PD refuses nobody else",
        "AArch64.S1Translate",
        Edit("walk:_before_the_walk", ("if p.e0pd and _as_el0(p, access):", "if p.e0pd:")),
    ),
    _mutant(
        "EPD", "EPD refuses every walk", "AArch64.S1EPD", Edit("walk:_before_the_walk", ("if p.epd:", "if False:"))
    ),
    # The root, and the walk down.
    _mutant(
        "start level",
        "start level = 3 - (IA - 1 - granule) / stride",
        "S1StartLevel",
        Edit("params:WalkParams.start_level", ("self.ia_bits - 1 - granule", "self.ia_bits - granule")),
    ),
    _mutant(
        "TTBR alignment",
        "BADDR is aligned down to the size of the table",
        "S1TTBaseAddress",
        Edit("params:WalkParams.base", ("& -size", "& -8")),
    ),
    _mutant(
        "TTBR[5:2]",
        "TTBR[5:2] are address bits with 52-bit addresses",
        "S1TTBaseAddress",
        _read(
            ("wide_ttbr=ds or (granule is Granule.K64 and f.pa_bits >= 52 and PA_BITS[ps] == 52)", "wide_ttbr=False")
        ),
    ),
    _mutant(
        "TTBR size",
        "a root table beyond PS is an address size fault",
        "AArch64.S1Walk",
        Edit("walk:_descend", ("if pa & over:", "if raw and pa & over:")),
    ),
    _mutant(
        "table size",
        "a table beyond PS is an address size fault",
        "AArch64.S1Walk",
        Edit("walk:_descend", ("if pa & over:", "if not raw and pa & over:")),
    ),
    _mutant(
        "level of table size",
        "a table's address size fault has the level of its descriptor",
        "AArch64.S1Walk",
        Edit("walk:_descend", ("Fault(FaultType.ADDRESS_SIZE, above,", "Fault(FaultType.ADDRESS_SIZE, level,")),
    ),
    _mutant(
        "external abort order",
        "the address size is checked before the table is read",
        "AArch64.S1Walk",
        Edit(
            "walk:_descend",
            (f"        if pa & over:\n            {_TOO_LARGE}\n", ""),
            ("        raw.append(", f"        if pa & over:\n            {_TOO_LARGE}\n        raw.append("),
        ),
    ),
    _mutant(
        "external abort level",
        "an external abort has the level of the read",
        "HandleExternalTTWAbort",
        Edit("walk:_descend", ("Fault(FaultType.EXTERNAL_ON_WALK, level)", "Fault(FaultType.EXTERNAL_ON_WALK, above)")),
    ),
    _mutant(
        "translation level",
        "a translation fault has the level of the descriptor",
        "AArch64.S1Walk",
        Edit("walk:_descend", ("Fault(FaultType.TRANSLATION, level,", "Fault(FaultType.TRANSLATION, above,")),
    ),
    _mutant(
        "PS",
        "output addresses are limited by PS",
        "PhysicalAddressSize",
        Edit("params:output_bits", ("PA_BITS[field]", "52")),
    ),
    _mutant(
        "PA size",
        "and by what the CPU implements",
        "PhysicalAddressSize",
        Edit("params:output_bits", ("return min(PA_BITS[field], limit)", "return min(PA_BITS[field], 52)")),
    ),
    _mutant(
        "64K table [51:48]",
        "64K: bits [15:12] of a table descriptor are address bits",
        "NextTableBase",
        Edit(
            "table_params:TableParams.table_address",
            ('["TA"].get(word)', '["TA"].get(word) & ((1 << 48) - 1 if self.fmt.granule is Granule.K64 else -1)'),
        ),
    ),
    _mutant(
        "64K OA[51:48]",
        "64K: bits [15:12] of a leaf are address bits",
        "LeafBase",
        Edit(
            "table_params:TableParams.output_address",
            ('["OA"].get(word)', '["OA"].get(word) & ((1 << 48) - 1 if self.fmt.granule is Granule.K64 else -1)'),
        ),
    ),
    _mutant(
        "LPA2 OA[51:50]",
        "DS = 1: bits [9:8] of a leaf are address bits",
        "LeafBase",
        Edit(
            "table_params:TableParams.output_address",
            ('["OA"].get(word)', '["OA"].get(word) & ((1 << 50) - 1 if self.fmt.lpa2 else -1)'),
        ),
    ),
    _mutant("DS", "DS is RES0 without LPA2", "S1TTWParamsEL10", _read(("f.lpa2 and granule", "granule"))),
    _mutant(
        "page 01",
        "at level 3 bits [1:0] = 01 is invalid",
        "DecodeDescriptorType",
        Edit("descriptors:Format.kind", ("Kind.PAGE if word & 2 else Kind.INVALID", "Kind.PAGE")),
    ),
    _mutant(
        "L0 block",
        "4K: no block at level 0 without DS",
        "BlockDescSupported",
        _item("descriptors:BLOCK_LEVELS", {Granule.K4: (frozenset({0, 1, 2}), frozenset())}),
    ),
    _mutant(
        "L0 block with DS",
        "4K: a block at level 0 with DS",
        "BlockDescSupported",
        _item("descriptors:BLOCK_LEVELS", {Granule.K4: (frozenset({1, 2}), frozenset())}),
    ),
    _mutant(
        "16K L1 block",
        "16K: no block at level 1 without DS",
        "BlockDescSupported",
        _item("descriptors:BLOCK_LEVELS", {Granule.K16: (frozenset({1, 2}), frozenset())}),
    ),
    _mutant(
        "64K L1 block",
        "64K: no block at level 1 without 52-bit PAs",
        "BlockDescSupported",
        _item("descriptors:BLOCK_LEVELS", {Granule.K64: (frozenset({1, 2}), frozenset())}),
    ),
    _mutant(
        "block offset",
        "a block's OA has no bits below its size",
        "LeafBase, StageOA",
        Edit("table_params:TableParams.output_address", ("leaf(level)", "leaf(LAST_LEVEL)")),
        Edit("table_params:TableParams.leaf_address", ("leaf(level)", "leaf(LAST_LEVEL)")),
        Edit("walk:_translate", ("oa & -offset | va & offset - 1", "oa | va & offset - 1")),
    ),
    _mutant(
        "contiguous",
        "contiguous is a hint: the OA is the descriptor's own (the judge's choice)",
        "StageOA",
        _feature("contiguous_output", True),
    ),
    _mutant(
        "nT",
        "nT = 1 does not fault (the judge's choice)",
        "BlocknTFaults",
        Edit("walk:_early_leaf_fault", ("p.features.nt_faults and level", "level")),
    ),
    _mutant(
        "big-endian",
        "SCTLR.EE: descriptors are big-endian",
        "FetchDescriptor",
        Edit("walk:_descend", ("if big_endian:", "if False:")),
    ),
    # The leaf: order of faults, hardware updates.
    _mutant(
        "AF before size",
        "address size comes before access flag",
        "AArch64.S1Walk",
        Edit("walk:_translate", ("if oa & p.over:", "if oa & p.over and (p.ha or word & p.af):")),
    ),
    _mutant(
        "permission before AF",
        "access flag comes before permission",
        "AArch64.S1Translate",
        Edit(
            "walk:_verdict",
            ("if not word & p.af and not p.ha:", "if False:"),
            (_OUTPUT, f"    if not word & p.af and not p.ha:\n        {_NOT_SET}\n{_OUTPUT}"),
        ),
    ),
    _mutant(
        "AF",
        "a leaf with AF = 0 faults",
        "AArch64.S1Walk",
        Edit("walk:_verdict", ("if not word & p.af and not p.ha:", "if False:")),
    ),
    _mutant(
        "HA",
        "HA: hardware manages AF",
        "SettingAccessFlagPermitted",
        _read(("ha=bool(f.hafdbs and tcr.HA)", "ha=False")),
    ),
    _mutant(
        "HA write",
        "and sets AF in memory",
        "AArch64.MemSwapTableDesc",
        Edit("walk:_updated", ("new = word | p.af", "new = word")),
    ),
    _mutant(
        "AT sets AF",
        "AT does not set AF (the judge's choice)",
        "SetAccessFlag",
        Edit("walk:_updated", ("(access.is_at and not p.features.at_updates)", "False")),
    ),
    _mutant(
        "HD",
        "HD: hardware manages the dirty state",
        "SettingDirtyStatePermitted",
        _read(("hd=bool(f.hafdbs >= 2 and tcr.HA and tcr.HD)", "hd=False")),
    ),
    _mutant(
        "DBM",
        "HD makes pages with DBM = 1 writable, no others",
        "S1ApplyOutputPerms",
        Edit("params:WalkParams.direct_index", ('page["DBM"].get(word) << 1', "1 << 1")),
    ),
    _mutant(
        "HD write",
        "a write clears AP[2] in memory",
        "SettingDirtyStatePermitted",
        Edit("walk:_updated", ("if p.hd and", "if False and")),
    ),
    _mutant(
        "HD on a read",
        "a read does not",
        "SettingDirtyStatePermitted",
        Edit("walk:_updated", ("p.hd and access.writes and", "p.hd and")),
    ),
    # Permissions.
    _mutant(
        "AP[1]", "AP[1] gives EL0 access", "S1DirectBasePermissions", _item("permissions:BY_AP", {1: PR | PW, 3: PR})
    ),
    _mutant(
        "AP[2]", "AP[2] takes write", "S1DirectBasePermissions", Set("permissions:BY_AP", lambda old: old[:2] + old[:2])
    ),
    _mutant(
        "AP[2] at EL2",
        "and in a regime with one level",
        "S1DirectBasePermissions",
        Set("permissions:BY_AP_ONE_LEVEL", lambda old: old[:2] * 2),
    ),
    _mutant(
        "APTable[0]",
        "APTable[0] takes EL0 access",
        "S1DirectBasePermissions",
        Set("permissions:BY_APTABLE", lambda _: (ALL, ALL, ALL & ~(PW | UW), ALL & ~(PW | UW))),
    ),
    _mutant(
        "APTable[1]",
        "APTable[1] takes write",
        "S1DirectBasePermissions",
        Set("permissions:BY_APTABLE", lambda _: (ALL, ALL & ~(UR | UW)) * 2),
    ),
    _mutant(
        "APTable at EL2",
        "and in a regime with one level",
        "S1DirectBasePermissions",
        Set("permissions:BY_APTABLE_ONE_LEVEL", lambda _: (ALL,) * 4),
    ),
    _mutant(
        "UXNTable",
        "UXNTable counts for everything below",
        "S1ApplyTablePerms",
        Edit("params:WalkParams.inherited_mask", ('("APTable", "UXNTable", "PXNTable")', '("APTable", "PXNTable")')),
    ),
    _mutant(
        "PXNTable",
        "PXNTable counts for everything below",
        "S1ApplyTablePerms",
        Edit("params:WalkParams.inherited_mask", ('("APTable", "UXNTable", "PXNTable")', '("APTable", "UXNTable")')),
    ),
    _mutant(
        "last table only",
        "table attributes add up over the levels",
        "S1ApplyTablePerms",
        Edit("walk:_descend", ("inherited |= word", "inherited = word")),
    ),
    _mutant(
        "UXN",
        "UXN: EL0 may not execute",
        "S1DirectBasePermissions",
        Edit("params:WalkParams.direct_index", ("uxn.get(word) | xn_limit", "xn_limit")),
    ),
    _mutant(
        "PXN",
        "PXN: privileged code may not execute",
        "S1DirectBasePermissions",
        Edit("params:WalkParams.direct_index", ("pxn.get(word) | px_limit", "px_limit")),
    ),
    _mutant(
        "implicit PXN",
        "what EL0 may write privileged code may not execute",
        "S1DirectBasePermissions",
        Edit("permissions:_two_levels", ("index >> 5 or data & UW", "index >> 5")),
    ),
    _mutant(
        "implicit PXN, APTable",
        "implicit PXN goes by what APTable leaves",
        "S1DirectBasePermissions",
        Edit("permissions:_two_levels", ("index >> 5 or data & UW", "index >> 5 or BY_AP[index & 3] & UW")),
    ),
    _mutant(
        "WXN",
        "WXN: what may be written may not be executed",
        "S1ComputePermissions",
        Edit("permissions:direct_rules", ("_written_and_executed(p) if wxn else 0", "0")),
    ),
    _mutant(
        "HPD",
        "HPD: table attributes do not count",
        "S1TTWParamsEL10",
        _read(('(f.hpds and half("HPD")) or pie', "pie")),
    ),
    _mutant(
        "PAN",
        "PAN refuses what EL0 may access",
        "S1DirectBasePermissions",
        _read(("f.pan and has_el0 and regs.PAN", "False")),
    ),
    _mutant(
        "PAN for EL0",
        "PAN does not bear on unprivileged accesses",
        "S1DirectBasePermissions",
        Edit(
            "walk:_permission_fault",
            ("access.pan_sensitive and not unprivileged and", "access.pan_sensitive and"),
            ("base & ~(PR | PW), ", "base & ~(PR | PW | (PR | PW) << TO_UNPRIVILEGED), "),
        ),
    ),
    _mutant(
        "EPAN",
        "EPAN: also what EL0 may execute",
        "S1DirectBasePermissions",
        _read(("f.pan >= 3 and has_el0 and sctlr.EPAN", "False")),
    ),
    _mutant("AT PAN forms", "AT S1E1RP and S1E1WP obey PAN", "AArch64.AT", _at(False)),
    _mutant("AT without P", "the other AT instructions do not", "AArch64.AT", _at(True)),
    _mutant(
        "AT write",
        "AT S1E1W asks for write",
        "AArch64.AT",
        _item("at:OPERATIONS", {"S1E1W": (AccessType.AT_READ, 1, False)}),
    ),
    _mutant(
        "AT EL0",
        "AT S1E0R asks for EL0",
        "AArch64.AT",
        _item("at:OPERATIONS", {"S1E0R": (AccessType.AT_READ, 1, False)}),
    ),
    _mutant(
        "LDTR",
        "LDTR and STTR are checked as EL0's",
        "AArch64.IsUnprivAccessPriv",
        Edit("walk:_as_el0", ("return not uao and", "return False and")),
    ),
    # Indirect permissions.
    _mutant("PIE", "PIE: PIR gives the permissions", "S1IndirectBasePermissions", _feature("pie", False)),
    _mutant(
        "PIRE0",
        "EL0's come from PIRE0",
        "S1IndirectBasePermissions",
        Edit("params:_rules", ('regs[f"PIRE0_EL{regime.el}"]', 'regs[f"PIR_EL{regime.el}"]')),
    ),
    _mutant(
        "PIIndex[1]",
        "PIIndex is bits 54, 53, 51 and 6",
        "S1IndirectBasePermissions",
        Set("descriptors:_PIINDEX", lambda old: (*old[:2], Span(7, 1, 1), old[3])),
        Edit("descriptors:_permission_rows", ('bits("nDirty", 7,', 'bits("nDirty", 51,')),
    ),
    _mutant(
        "PIE 0110",
        "encoding 0110 does not execute while writable",
        "S1IndirectBasePermissions",
        Set("permissions:PIR_WXN", lambda _: -1),
    ),
    _mutant(
        "PIE conflict",
        "privileged execute with EL0 write: no access at all",
        "S1IndirectBasePermissions",
        Edit("permissions:_indirect", ("p = u = 0", "p = p & ~PX")),
    ),
    _mutant(
        "PIE reserved",
        "reserved encodings grant nothing",
        "S1IndirectBasePermissions",
        Set("permissions:BY_PIR", lambda old: (*old[:4], PR, *old[5:])),
    ),
    _mutant(
        "PIE and PAN",
        "PAN goes by any permission of EL0, EPAN or not",
        "S1IndirectBasePermissions",
        Edit("permissions:_indirect", ("int(bool(unprivileged and BY_PIR[unprivileged]))", "int(bool(u & (UR | UW)))")),
    ),
    _mutant(
        "PIE and WXN",
        "SCTLR.WXN has no meaning with PIE",
        "S1ComputePermissions",
        Edit("params:_rules", ("if not pie:", "if not pie or wxn:")),
    ),
    # Memory attributes, security.
    _mutant(
        "MAIR byte",
        "AttrIndx chooses the byte of MAIR",
        "S1DecodeMemAttrs",
        Edit("params:WalkParams.attr_index", ('self.page["AttrIndx"].get(word)', "0")),
    ),
    _mutant(
        "AIE",
        "AIE: AttrIndx[3] chooses MAIR2",
        "S1DecodeMemAttrs",
        Edit(
            "params:WalkParams.attr_index", ('| self.page["AttrIndx3"].get(word) << 3 if self.fmt.aie else index', "")
        ),
    ),
    _mutant(
        "forced SH",
        "Device and non-cacheable memory is outer shareable",
        "EffectiveShareability",
        Set("attributes:FORCED_OUTER", lambda old: (False,) * len(old)),
    ),
    _mutant(
        "forced SH of NC",
        "so is Normal non-cacheable memory",
        "EffectiveShareability",
        Set("attributes:FORCED_OUTER", lambda old: tuple(is_device(byte) for byte in range(len(old)))),
    ),
    _mutant(
        "LPA2 SH",
        "DS = 1: SH is TCR.SH",
        "S1NextWalkStateLeaf",
        Edit("walk:_leaf_output", ("p.sh if p.fmt.lpa2 else", "word >> 8 & 3 if p.fmt.lpa2 else")),
    ),
    _mutant(
        "secure NS",
        "Secure: NS makes the output Non-secure",
        "S1NextWalkStateLeaf",
        Edit("walk:_leaf_output", ("not p.secure or bool(word & p.ns)", "not p.secure")),
    ),
    _mutant(
        "NSTable",
        "Secure: below NSTable everything is Non-secure",
        "S1NextWalkStateTable",
        Edit("walk:_translate", ("if p.secure and any(", "if False and any(")),
    ),
    # The MMU off.
    _mutant(
        "M",
        "SCTLR.M = 0: no translation",
        "AArch64.S1Enabled",
        Edit("walk:_translate", ("if not p.mmu_on:", "if False:")),
    ),
    _mutant(
        "MMU off size",
        "MMU off: a VA beyond the PA size is an address size fault",
        "AArch64.S1DisabledOutput",
        Edit("walk:_mmu_off", ("if va & (", "if False and (")),
    ),
    _mutant(
        "MMU off TBI",
        "MMU off: TBI still counts",
        "AArch64.S1DisabledOutput",
        Edit("walk:_mmu_off", ("top = 55 if p.tbi and not (p.tbid and fetch) else 63", "top = 63")),
    ),
    _mutant(
        "MMU off type",
        "MMU off: data is Device-nGnRnE",
        "AArch64.S1DisabledOutput",
        Edit("walk:_mmu_off", ("attr, sh = DEVICE_nGnRnE,", "attr, sh = NORMAL_NC,")),
    ),
    # What is reported.
    _mutant(
        "WnR",
        "WnR: the access was a write",
        "AArch64.FaultSyndrome",
        Edit("faults:Fault._wnr", ("return self.write or", "return")),
    ),
    _mutant(
        "WnR of AT",
        "AT counts as a write in WnR",
        "AArch64.FaultSyndrome",
        Edit(
            "faults:Fault._wnr",
            ("GCS_WRITE) or access.is_maintenance", "GCS_WRITE)"),
        ),
    ),
    _mutant(
        "CM",
        "CM: an AT instruction",
        "AArch64.FaultSyndrome",
        Edit("faults:Fault.esr", ("int(access.is_maintenance)", "0")),
    ),
    _mutant(
        "EC",
        "EC tells an abort from the same EL and one from a lower EL",
        "AArch64.ReportException",
        Edit("faults:Fault.esr", (" + int(access.el == target)", "")),
    ),
    _mutant(
        "EC of LDTR",
        "LDTR aborts come from the EL that executes it",
        "AArch64.ReportException",
        Edit("faults:Fault.esr", ("int(access.el == target)", "int(access.el == target and not access.unprivileged)")),
    ),
    _mutant(
        "level -1 code",
        "faults at level -1 have codes of their own",
        "EncodeLDFSC",
        _item("faults:_CODES", {FaultType.TRANSLATION: (0x04, {-1: 0x04, -2: 0x04})}),
    ),
    # What no emulator judges, or no stored answer.
    Mutant(
        "nDirty",
        "PIE: a write to a clean page faults when hardware does not manage the dirty state",
        "S1CheckPermissions",
        (Edit("walk:_permission_fault", ("if p.pie and ", "if False and ")),),
        judged=False,
    ),
    Mutant(
        "DirtyBit",
        "ISS2 says that the dirty state refused the write",
        "AArch64.FaultSyndrome",
        (Edit("faults:Fault.esr", ("int(self.dirty_bit and not fetch)", "0")),),
        judged=False,
    ),
    Mutant(
        "POE",
        "POR takes permissions away",
        "S1OverlayPermissions",
        (Edit("params:_overlays", ("if not levels:", "if True:")),),
        judged=False,
    ),
    Mutant(
        "POE write",
        "bit 2 of a POR nibble is write, bit 1 execute",
        "S1OverlayPermissions",
        (Set("permissions:BY_POR", lambda old: tuple(old[n & 9 | (n & 2) << 1 | (n & 4) >> 1] for n in range(16))),),
        judged=False,
    ),
    Mutant(
        "POE reserved",
        "POR nibbles 1xxx grant nothing",
        "S1OverlayPermissions",
        (Set("permissions:BY_POR", lambda old: old[:8] * 2),),
        judged=False,
    ),
    Mutant(
        "POE at EL0",
        "EL0's overlay is in POR_EL0",
        "S1OverlayPermissions",
        (Edit("params:_overlays", ("regs.POR_EL0 if", "por if")),),
        judged=False,
    ),
    Mutant(
        "POE index",
        "bits [62:60] of the leaf choose the nibble",
        "S1OverlayPermissions",
        (Edit("walk:leaf_permissions", ('p.page["POIndex"].get(word)', "0")),),
        judged=False,
    ),
    Mutant(
        "POE not for 1xxx",
        "PIR encodings 1xxx have no overlay",
        "S1IndirectBasePermissions",
        (Set("permissions:PIR_NO_OVERLAY", lambda _: 0),),
        judged=False,
    ),
    Mutant(
        "POE and WXN",
        "where the overlay grants execute, WXN takes its write instead",
        "S1ComputePermissions",
        (Edit("permissions:with_overlay", ("lost & overlayable & overlay", "0")),),
        judged=False,
    ),
)

# ---- the judge of overlays: the pseudocode's table, typed

_NIBBLES = ("---", "r--", "--x", "r-x", "-w-", "rw-", "-wx", "rwx", *["---"] * 8)  # POR: S1OverlayPermissions
_WITH_WXN = ("---", "r--", "--x", "r-x", "-w-", "rw-", "--x", "r-x", *["---"] * 8)  # and S1ComputePermissions
_PIR_OVERLAID = (*["---"] * 8, "r--", "r--", "r-x", "---", "rw-", "---", "rwx", "---")  # under a nibble 0000


class Overlaid(NamedTuple):
    """One row: base permissions, the overlay nibble, and what is left at the level that is asked ("rwx")."""

    base: str  # "direct": RWX by AP, UXN and PXN; else a PIR encoding
    el: int
    field: int  # POIndex: which nibble of POR
    nibble: int
    wanted: str


OVERLAID: tuple[Overlaid, ...] = (
    *(Overlaid("direct", 0, n % 8, n, wanted) for n, wanted in enumerate(_NIBBLES)),
    *(Overlaid("0111", 1, n % 8, n, wanted) for n, wanted in enumerate(_NIBBLES)),
    *(Overlaid("0110", 1, n % 8, n, wanted) for n, wanted in enumerate(_WITH_WXN)),
    *(Overlaid(f"{e:04b}", 1, 3, 0, wanted) for e, wanted in enumerate(_PIR_OVERLAID)),
)

_ROOT, _PAGE = 0x1000, 0x8000
_NOT_THIS = 0x0123_4567_0123_4567  # nibbles that the row does not use


class Dirty(NamedTuple):
    """A page of PIE encoding 0101 (RW): its nDirty, whether hardware manages the dirty state, and what is left."""

    not_dirty: int
    hd: int
    wanted: str


DIRTY = (Dirty(0, 0, "rw"), Dirty(1, 0, "r-, DirtyBit"), Dirty(0, 1, "rw"), Dirty(1, 1, "rw"))


def _mapped(attributes: int) -> PhysicalMemory:
    """Tables that map VA 0, with the 4K granule and 48 bits, with these attributes."""
    memory = PhysicalMemory((0, 1 << 16))
    for level in range(3):
        memory.store(_ROOT + 0x1000 * level, _ROOT + 0x1000 * (level + 1) | 3)
    memory.store(_ROOT + 0x3000, _PAGE | attributes | 3)
    return memory


def _tcr2(pie: bool, poe: bool) -> int:
    return TCR2.pack(PIE=int(pie), POE=int(poe), E0POE=int(poe))


def overlay_answer(row: Overlaid) -> str:
    """What the model says of a row: which of read, write and fetch it lets through."""
    direct = row.base == "direct"
    own = _NOT_THIS & ~(15 << 4 * row.field) | row.nibble << 4 * row.field
    other = _NOT_THIS ^ 0x7777_7777_7777_7777
    regs = Registers(
        TTBR0_EL1=_ROOT,
        TCR_EL1=TCR_EL1.pack(T0SZ=16, IPS=5),
        TCR2_EL1=_tcr2(pie=not direct, poe=True),
        PIR_EL1=0 if direct else int(row.base, 2),
        POR_EL1=own if row.el else other,
        POR_EL0=other if row.el else own,
    )
    page = Format(pie=not direct, poe=True).leaf(LAST_LEVEL)
    memory = _mapped(page.pack(POIndex=row.field, AF=1, **({"AP": 1, "PXN": 1} if direct else {})))
    asked = (("r", Access.read(row.el)), ("w", Access.write(row.el)), ("x", Access.fetch(row.el)))
    return "".join(letter if translate(memory, regs, 0, access).ok else "-" for letter, access in asked)


def dirty_answer(row: Dirty) -> str:
    """What the model says of a row: which of read and write it lets through, and ESR_ELx.DirtyBit of the write."""
    tcr = TCR_EL1.pack(T0SZ=16, IPS=5, HA=1, HD=row.hd)
    regs = Registers(TTBR0_EL1=_ROOT, TCR_EL1=tcr, TCR2_EL1=_tcr2(pie=True, poe=False), PIR_EL1=0b0101)
    memory = _mapped(Format(pie=True).leaf(LAST_LEVEL).pack(AF=1, nDirty=row.not_dirty))
    read, write = (translate(memory, regs, 0, access) for access in (Access.read(), Access.write()))
    said = write.fault and ESR["DirtyBit"].get(write.fault.esr(write.access))
    return ("r" if read.ok else "-") + ("w" if write.ok else "-") + (", DirtyBit" if said else "")


def stale() -> list[str]:
    """The mutants whose change no longer fits the code, and why."""
    found = []
    for mutant in MUTANTS:
        try:
            with broken(mutant.changes):
                pass
        except (ValueError, KeyError, AttributeError) as error:
            found.append(f"{mutant.name}: {error}")
    return found


# ---- killing


class Kill(NamedTuple):
    """A query whose answer gives a mutant away. `query` -1: a table word that hardware changed, at PA `va`."""

    case: str
    query: int
    op: str
    va: int
    judge: str
    mutant: str


class Result(NamedTuple):
    """What the judges say of a mutant."""

    mutant: Mutant
    kills: tuple[Kill, ...]

    @property
    def how(self) -> str:
        """The killing query, as a cell of the table."""
        if not self.kills:
            return "NOT KILLED"
        first = self.kills[0]
        where = "" if first.query < 0 else f" query {first.query}"
        return f"{first.case}{where}: {first.op} {first.va:#x}" if self.mutant.judged else f"{first.case}: {first.op}"


def kills_in(case: Case) -> Iterator[Kill]:
    """The queries of a case to which the model, as it is now, answers otherwise than the judge."""
    wanted = case.answers[case.reference or ""]
    mine = model.by_walk(case)
    for i, (want, have) in enumerate(zip(wanted, mine.answers, strict=True)):
        if want is not None and have is not None and not same(case, have, want, case.queries[i][1]):
            va, op = case.queries[i]
            yield Kill(case.id, i, op, va, shown(want), shown(have))
    if UPDATES_OF in case.answers:
        changed = case.changed(UPDATES_OF)
        for pa in sorted(changed.keys() | mine.after.keys()):
            if changed.get(pa) != mine.after.get(pa):
                judge, mutant = (_word(words.get(pa)) for words in (changed, mine.after))
                yield Kill(case.id, -1, "table word", pa, judge, mutant)


def _word(word: int | None) -> str:
    return "unchanged" if word is None else f"{word:#x}"


def typed_kills() -> Iterator[Kill]:
    """The rows of the typed tables of which the model, as it is now, says something else."""
    for overlaid in OVERLAID:
        op = f"EL{overlaid.el}, base {overlaid.base}, POR nibble {overlaid.nibble:04b}"
        yield from _typed(op, overlaid.wanted, overlay_answer(overlaid))
    for dirty in DIRTY:
        yield from _typed(f"PIE, nDirty {dirty.not_dirty}, HD {dirty.hd}", dirty.wanted, dirty_answer(dirty))


def _typed(op: str, wanted: str, answer: str) -> Iterator[Kill]:
    if answer != wanted:
        yield Kill("the table of the Sail model", -1, op, 0, wanted, answer)


def kill(mutant: Mutant, cases: Iterable[Case]) -> Result:
    """Everything in `cases`, or in the typed tables, that gives a mutant away."""
    with broken(mutant.changes):
        kills = [k for case in cases for k in kills_in(case)] if mutant.judged else list(typed_kills())
    return Result(mutant, tuple(kills))


def table(results: Iterable[Result]) -> str:
    """The results as text: one line a mutant."""
    head = ("mutant", "rule (source)", "killed by", "judge said", "mutant said", "killed")
    rows = [head]
    for r in results:
        first = r.kills[0] if r.kills else Kill("", -1, "", 0, "", "")
        rule = f"{r.mutant.rule} ({r.mutant.source})"
        judge = first.judge if r.mutant.judged else f"not judged by an emulator; the pseudocode: {first.judge}"
        rows.append((r.mutant.name, rule, r.how, judge, first.mutant, str(len(r.kills))))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(" | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


# ---- choosing the extract

LIMIT = 5000  # queries
SEED = 3
CASES_EACH, QUERIES_EACH = 4, 3  # for every mutant: killing cases, and killing queries of each
THINNED = 60  # queries of a case that are looked at
PER_CELL = 8  # queries of each outcome, for every kind of cases


def make() -> list[Case]:
    """The extract: queries that kill, and a sample of every outcome of every kind."""
    rng = random.Random(SEED)
    cases = [
        _thinned(case, rng, sure=path in CORPORA)
        for path in (*CORPORA, EDGE)
        for case in load(path)
        if case.kind not in STAGE2_KINDS and (path in CORPORA or not case.changed(UPDATES_OF))
    ]
    rng.shuffle(cases)
    chosen: dict[int, set[int]] = defaultdict(set)
    for mutant in MUTANTS:
        if mutant.judged:
            _choose_kills(mutant, cases, chosen, rng)
    _close(cases, chosen)
    _choose_cells(cases, chosen)
    return [_trimmed(cases[n], chosen[n]) for n in sorted(chosen, key=lambda n: cases[n].id)]


def _thinned(case: Case, rng: random.Random, sure: bool) -> Case:
    """Fewer queries to choose from, to be quick; all, where hardware updates make them depend on each other.

    `sure`: the corpus is one in which judge and model agree; else the queries in which they do not are left out.
    """
    if case.changed(UPDATES_OF):
        return case
    queries = sorted(rng.sample(range(len(case.queries)), min(THINNED, len(case.queries))))
    small = _trimmed(case, queries)
    if sure:
        return small
    wrong = {k.query for k in kills_in(small)}
    return _trimmed(small, [i for i in range(len(small.queries)) if i not in wrong])


def _choose_kills(mutant: Mutant, cases: list[Case], chosen: dict[int, set[int]], rng: random.Random) -> None:
    """A few killing queries from the first few cases that have them; cases that are in already come first."""
    found = 0
    order = sorted(range(len(cases)), key=lambda n: n not in chosen)
    with broken(mutant.changes):
        for n in order:
            kills = list(kills_in(cases[n]))
            queries = [k.query for k in kills if k.query >= 0]
            words = {k.va for k in kills if k.query < 0}
            if not kills:
                continue
            some = rng.sample(queries, min(QUERIES_EACH, len(queries)))
            chosen[n].update(some or _touching(cases[n], words))
            found += 1
            if found == CASES_EACH:
                break
    print(f"{mutant.name}: {found} cases", file=sys.stderr)


def _touching(case: Case, words: set[int]) -> set[int]:
    """A few queries that read the given table words."""
    walks = model.by_walk(case).walks
    return set([i for i, w in enumerate(walks) if w and words & {pa for _, pa, _ in w.raw}][:QUERIES_EACH])


def _close(cases: list[Case], chosen: dict[int, set[int]]) -> None:
    """Adds the queries without which a changed table word would not have the value that the judge reports."""
    for n, queries in chosen.items():
        case = cases[n]
        if UPDATES_OF not in case.answers or not case.changed(UPDATES_OF):
            continue
        last = {u.pa: i for i, w in enumerate(model.by_walk(case).walks) if w for u in w.updates if w.ok}
        while missing := {
            last[pa]
            for pa, word in model.by_walk(_trimmed(case, queries)).after.items()
            if word != case.changed(UPDATES_OF)[pa]
        }:
            queries |= missing


def _choose_cells(cases: list[Case], chosen: dict[int, set[int]]) -> None:
    """A sample of every outcome of every kind, from the cases that are in already where they have it."""
    room = LIMIT - sum(map(len, chosen.values()))
    have = Counter((cases[n].kind, cell_of(cases[n], _want(cases[n], i))) for n in chosen for i in chosen[n])
    for n in sorted(range(len(cases)), key=lambda n: n not in chosen):
        case = cases[n]
        if case.changed(UPDATES_OF):
            continue  # its queries depend on each other
        new = Counter[str]()
        for i, answer in _answered(case):
            cell = cell_of(case, answer)
            if room and have[case.kind, cell] < PER_CELL and new[cell] < QUERIES_EACH and i not in chosen.get(n, ()):
                chosen[n].add(i)
                have[case.kind, cell] += 1
                new[cell] += 1
                room -= 1


def _want(case: Case, query: int) -> Answer:
    return case.answers[case.reference or ""][query]


def _answered(case: Case) -> Iterator[tuple[int, Answer]]:
    regs = model.registers_of(case)
    for i, (_, op) in enumerate(case.queries):
        answer = _want(case, i)
        if answer is not None and model.in_model(case, op, regs):
            yield i, answer


def _trimmed(case: Case, queries: Iterable[int]) -> Case:
    """The case with some of its queries, and the changed words that those change."""
    order = sorted(queries)
    kept = {v: a for v, a in case.answers.items() if v in (case.reference, UPDATES_OF)}
    small = replace(
        case,
        queries=tuple(case.queries[i] for i in order),
        answers={v: tuple(answers[i] for i in order) for v, answers in kept.items()},
        after={},
    )
    touched = model.by_walk(small).after.keys() if case.changed(UPDATES_OF) else ()
    after = {pa: word for pa, word in case.changed(UPDATES_OF).items() if pa in touched}
    return replace(small, after={UPDATES_OF: after} if after else {})


def main(arguments: list[str]) -> int:
    """Prints the table, after making the extract where `--make` is given; 1 if a mutant is alive."""
    if wrong := stale():
        print("\n".join(wrong), file=sys.stderr)
        return 1
    if "--make" in arguments:
        save(EXTRACT, make())
    extract = list(load(EXTRACT))
    results = [kill(mutant, extract) for mutant in MUTANTS]
    print(table(results))
    alive = [r.mutant.name for r in results if not r.kills]
    print(f"{len(results)} mutants, alive: {', '.join(alive) or 'none'}")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
