"""Where a judge is wrong, or the architecture lets both be right: which judge, when, and the rule.

Each row has a name (the traps of QEMU are numbered as in docs/judges.md), the rule in a sentence with its source, and a
test that is true only for the situation: it sees the case, the model's walk and both answers. A disagreement that no
row explains is unexplained.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

from emu.judge import known_rme as rme
from emu.judge import known_stage2 as stage2
from emu.judge.corpus import BASE_RAM, DONE, EXC, TO_EL2, Answer, Case
from pgtable import CPUS, AccessType, FaultType, Granule, NestedWalk, Translation, Walk
from pgtable.attributes import MemoryAttributes, forced_outer, is_device
from pgtable.descriptors import LAST_LEVEL
from pgtable.faults import fault_code
from pgtable.registers import ESR, PAR_FAULT, PAR_OK
from pgtable.walk import leaf_permissions, walk


class Context(NamedTuple):
    """What a row's test sees. `last`: the last descriptor read, 0 if none was."""

    case: Case
    walk: Walk
    judge: Answer
    model: Answer

    @property
    def last(self) -> int:
        """The last descriptor read."""
        return self.walk.raw[-1][2] if self.walk.raw else 0

    @property
    def address_size(self) -> bool:
        """The model reports an address size fault of a descriptor."""
        fault = self.walk.fault
        return fault is not None and fault.type is FaultType.ADDRESS_SIZE and bool(self.walk.raw)

    def judge_faults(self, *types: FaultType, level: int | None = None) -> bool:
        """The judge reports a fault of one of these types (at `level`) in PAR_EL1."""
        if not isinstance(self.judge, int) or self.judge & EXC or not self.judge & 1:
            return False
        levels = range(-1, LAST_LEVEL + 1) if level is None else (level,)
        return PAR_FAULT["FST"].get(self.judge) in {
            fault_code(t, at) for t in types for at in levels if at >= 0 or t is not FaultType.PERMISSION
        }

    def only(self, *fields: str) -> bool:
        """Both translate, and differ in the named fields of PAR_EL1 alone."""
        if not isinstance(self.judge, int) or not isinstance(self.model, int):
            return False
        translated = not (self.judge | self.model) & (EXC | 1)
        return translated and not (self.judge ^ self.model) & ~PAR_OK.mask(*fields, "NS", "IMPDEF")


C = TypeVar("C")


class Known(NamedTuple, Generic[C]):
    """One known fault or choice of a judge."""

    name: str
    judge: str
    rule: str
    applies: Callable[[C], bool]


def _went_on(c: Context) -> bool:
    """The judge did not see the model's address size fault of a descriptor; what it met further down may be one."""
    fault = c.walk.fault
    if fault is None or not c.address_size:
        return False
    return not any(c.judge_faults(FaultType.ADDRESS_SIZE, level=level) for level in range(-1, fault.level + 1))


def _high_bits_64k(c: Context) -> bool:
    p = c.walk.params
    return _went_on(c) and p.fmt.granule is Granule.K64 and p.ps_bits < 52 and bool(c.last & 0xF << 12)


def _high_bits_ds(c: Context) -> bool:
    p = c.walk.params
    return _went_on(c) and p.fmt.lpa2 and p.ps_bits < 52 and bool(c.last & 3 << 8)


def _clean_page_write(c: Context) -> bool:
    p = c.walk.params
    writable = c.walk.access.type is AccessType.AT_WRITE and p.hd and bool(c.last & p.not_dirty)
    result = c.walk.result
    return isinstance(result, Translation) and writable and c.judge_faults(FaultType.PERMISSION, level=result.level)


def _dirty_state(c: Context) -> bool:
    fault = c.walk.fault
    return fault is not None and fault.dirty_bit and isinstance(c.judge, int) and not c.judge & 1


def _cache_off(c: Context) -> bool:
    p = c.walk.params
    return not p.data_cacheable and c.only("ATTR", "SH") and not is_device(_page_attr(c))


def _reserved(c: Context) -> bool:
    """A reserved MAIR byte, or shareability 01."""
    if not c.only("ATTR", "SH") or not isinstance(c.walk.result, Translation):
        return False
    return MemoryAttributes.of(_page_attr(c)).type == "reserved" or c.walk.result.sh == 1


def _page_attr(c: Context) -> int:
    return c.walk.params.mair[c.walk.params.attr_index(c.last)]


def _low_memory(c: Context) -> bool:
    fault = c.walk.fault
    if fault is None or fault.type is not FaultType.EXTERNAL_ON_WALK:
        return False
    erased = c.judge_faults(FaultType.TRANSLATION, level=fault.level)
    return erased and c.walk.params.secure and c.walk.params.table_address(c.last) < BASE_RAM[0]


def _block_level(c: Context) -> bool:
    fault = c.walk.fault
    p = c.walk.params
    if c.case.reference != stage2.OLD or fault is None or fault.cause != "descriptor" or c.last & 3 != BLOCK:
        return False
    taken = (p.fmt.granule, fault.level) in TAKEN_BY_OLD
    return taken and not c.judge_faults(FaultType.TRANSLATION, level=fault.level)


def _pan_before_wxn(c: Context) -> bool:
    fault, p = c.walk.fault, c.walk.params
    if fault is None or fault.type is not FaultType.PERMISSION or c.walk.access.type is not AccessType.FETCH or p.pie:
        return False
    *tables, (_, _, leaf) = c.walk.raw
    inherited = functools.reduce(operator.or_, (word for _, _, word in tables), 0) & p.inherited_mask
    refused_by_pan = leaf_permissions(p, leaf, inherited)[2]
    without = replace(p, rules=p.rules._replace(final=p.rules.base))
    words = {pa: word for _, pa, word in c.walk.raw}
    by_wxn = walk(words.__getitem__, without, c.walk.va, c.walk.access).ok
    return _executed(c.judge) and by_wxn and p.pan and bool(refused_by_pan)


def _executed(judge: Answer) -> bool:
    """The judge let a fetch pass, whether or not something was there."""
    return judge == DONE or (isinstance(judge, tuple) and ESR["FSC"].get(judge[0] & ~TO_EL2) == NOT_ON_WALK)


def _raw_sharing(c: Context) -> bool:
    return c.case.reference == stage2.OLD and c.only("SH") and isinstance(c.model, int) and forced_outer(c.model >> 56)


# Where the model says that there are no blocks: at levels 0 of 4K and 1 of 16K only without DS.
TAKEN_BY_OLD = {(Granule.K4, -1), (Granule.K4, 0), (Granule.K16, 0), (Granule.K16, 1)}
NOT_ON_WALK = 0x10  # FSC of an external abort on the access itself: it was translated
BLOCK = 1  # bits [1:0] of a block descriptor

KNOWN: tuple[Known[Context], ...] = (
    Known(
        "T1",
        "QEMU 11.1",
        "AT of a write to a clean page with HA = HD = 1 and DBM = 1 succeeds without writing (AArch64.AT, "
        "SetDirtyStatePermitted); 11.1 reports a permission fault",
        _clean_page_write,
    ),
    Known(
        "T5",
        "every QEMU",
        "with the 64K granule bits [15:12] are address bits on a CPU with 52-bit PAs whatever PS is "
        "(NextTableBase, LeafBase): an address size fault; QEMU ignores them",
        _high_bits_64k,
    ),
    Known(
        "T6",
        "every QEMU",
        "with DS = 1 bits [9:8] are address bits whatever PS is (NextTableBase, LeafBase): an address size fault; "
        "QEMU ignores them",
        _high_bits_ds,
    ),
    Known(
        "T7",
        "every QEMU",
        "with SCTLR.C = 0 Normal memory is reported non-cacheable (end of AArch64.S1Translate), hence outer shareable; "
        "QEMU reports the MAIR byte",
        _cache_off,
    ),
    Known(
        "T8",
        "every QEMU",
        "reserved MAIR bytes and shareability 01 are CONSTRAINED UNPREDICTABLE (S1ConstrainUnpredictableRESMAIR, "
        "DecodeShareability): any attributes are right",
        _reserved,
    ),
    Known(
        "T15",
        "QEMU 11.1",
        "with PIE a write to a page with nDirty = 1 faults when hardware does not manage the dirty state "
        "(S1CheckPermissions), for AT too; QEMU's AT ignores nDirty",
        _dirty_state,
    ),
    Known(
        "T16",
        "QEMU 7.2",
        "a block is legal only at the levels of BlockDescSupported (4K: not -1, 0 only with DS = 1; 16K: not 0, 1 only "
        "with DS = 1): "
        "elsewhere a translation fault; 7.2 takes it",
        _block_level,
    ),
    Known(
        "T20",
        "QEMU 7.2",
        "Device and Normal non-cacheable memory is outer shareable (EffectiveShareability, PAREncodeShareability); "
        "7.2 reports the descriptor's SH",
        _raw_sharing,
    ),
    Known(
        "low memory",
        "QEMU's virt machine",
        "below RAM the Secure state of the machine has flash memory: a walk that lands there reads it",
        _low_memory,
    ),
    Known(
        "T27",
        "QEMU 10.0 and 11.1",
        "PSTATE.PAN does not concern fetches (CreateAccDescIFetch), and WXN looks at the write permission without it "
        "(S1DirectBasePermissions); QEMU lets PAN take it first, and then executes",
        _pan_before_wxn,
    ),
)


KNOWN_NESTED: tuple[Known[stage2.Context], ...] = (
    Known(
        "T1",
        "QEMU 11.1",
        "AT of a write to a clean page, HA = HD = 1 and DBM = 1 at stage 2, succeeds without writing; 11.1 reports a "
        "permission fault",
        stage2.clean_page_write,
    ),
    Known(
        "T5",
        "every QEMU",
        "bits [15:12] of 64K descriptors, and [9:8] with DS = 1, are address bits of stage 2 too whatever PS is",
        stage2.high_bits,
    ),
    Known("T7", "every QEMU", "SCTLR_EL1.C = 0 makes stage 1's Normal type non-cacheable", stage2.cache_off),
    Known(
        "T8",
        "every QEMU",
        "a reserved MAIR byte, MemAttr (S2DecodeMemAttrs) or shareability of either stage: any attributes are right",
        stage2.reserved,
    ),
    Known(
        "T9",
        "every QEMU",
        "the fault of HCR_EL2.PTW is a permission fault at the level of stage 2's leaf, and changes nothing "
        "(S2CheckPermissions); QEMU says level 0 and has set the access flag",
        stage2.ptw_level,
    ),
    Known(
        "T3",
        "QEMU 7.2 and 10.0",
        "whether AT sets the access flag is IMPLEMENTATION DEFINED; where it does, stage 2 must let it write to stage "
        "1's table",
        stage2.at_updates,
    ),
    Known(
        "T9",
        "QEMU 7.2",
        "a stage 2 fault on a stage 1 table access is at stage 2's level; 7.2 says stage 1's, or 0",
        stage2.walk_level,
    ),
    Known(
        "T10",
        "every QEMU",
        "with FWB and two Device types the stricter one counts (S2ApplyFWBMemAttrs); QEMU takes stage 2's",
        stage2.two_devices,
    ),
    Known(
        "T11",
        "every QEMU",
        "Device and Normal combine to the Device type (S2CombineS1MemAttrs); QEMU mixes their bits",
        stage2.mixed,
    ),
    Known(
        "T12",
        "every QEMU",
        "stage 1's hints and transience stay where stage 2 limits it to write-through (S2CombineS1AttrHints)",
        stage2.transient,
    ),
    Known(
        "T15",
        "QEMU 11.1",
        "with S2PIE a write to a page with Dirty = 0 faults when hardware does not manage the dirty state "
        "(S2CheckPermissions), for AT too; QEMU's AT does not look",
        stage2.dirty_state,
    ),
    Known(
        "T20",
        "QEMU 7.2",
        "Device and Normal non-cacheable memory is outer shareable (S2CombineS1Shareability, EffectiveShareability)",
        stage2.raw_sharing,
    ),
    Known(
        "low memory",
        "QEMU's virt machine",
        "below RAM the Secure state of the machine has flash memory: a walk that lands there reads it",
        stage2.low_memory,
    ),
)


KNOWN_RME: tuple[Known[rme.Context], ...] = (
    Known(
        "T28",
        "QEMU 10.0 and 11.1",
        "an AT instruction that meets a granule protection fault other than a refusal takes the exception to EL3 "
        "(AArch64.AT); QEMU reports it in PAR_EL1",
        rme.not_taken,
    ),
    Known(
        "T29",
        "QEMU 10.0 and 11.1",
        "a granule that refuses a descriptor of stage 1 is stage 1's fault, at the level of that descriptor (S1Walk, "
        "FetchDescriptor); QEMU reports one of stage 2 on the walk of stage 1, at some level",
        rme.of_stage2,
    ),
    Known(
        "T30",
        "QEMU 10.0 and 11.1",
        "MFAR_EL3 holds PA[55:12], bits [11:0] are RES0 (AArch64.FaultSyndrome); QEMU's has all of the PA",
        rme.mfar_offset,
    ),
    Known(
        "T31",
        "QEMU 10.0 and 11.1",
        "PAR_EL1.NS is 0 for a Realm's own space, and after an AT of EL3 NSE tells Root and Realm from Secure and "
        "Non-secure (EncodePAR); QEMU's NS is 1 for Non-secure and Realm, its NSE always",
        rme.par_space,
    ),
    Known(
        "T32",
        "QEMU 10.0 and 11.1",
        "a GPI that is reserved makes its whole entry of sixteen granules invalid (GPTWalk); QEMU looks at one of them",
        rme.unread_gpi,
    ),
    Known(
        "T33",
        "QEMU 10.0 and 11.1",
        "VSTCR_EL2.SA and VTCR_EL2.NSA make all that stage 2 outputs Non-secure, tables of stage 1 too "
        "(SS2OutputPASpace, S2Walk); QEMU reads those tables in the Secure space",
        rme.table_of_secure,
    ),
    Known(
        "T34",
        "QEMU 10.0 and 11.1",
        "GPCSC has the level of the granule protection table (AArch64.FaultSyndrome); for a fault on a walk QEMU's has "
        "that of the translation table, and QEMU ends with a failed assertion where it is above 1",
        rme.level_of_walk,
    ),
    Known(
        "T35",
        "QEMU 11.1",
        "with HCR_EL2.GPF a refusing granule goes to EL2 (RouteToEL2), Non-secure Only ones too; QEMU leaves it at EL1",
        rme.refused_nonsecure_only,
    ),
)


def explain_update(walks: Iterable[Walk | None], pa: int, judge: int | None, model: int | None) -> str:
    """The same for the word at `pa` after a whole case: None is a word that did not change."""
    nested = (walk for walk in walks if isinstance(walk, NestedWalk))
    return "T9" if model is None and any(stage2.ptw_access_flag(walk, pa, judge) for walk in nested) else ""


def explain(case: Case, walk: Walk | None, judge: Answer, model: Answer) -> str:
    """The name of the first row that explains a disagreement, "" if none does."""
    if walk is None:
        return ""
    if CPUS[case.cpu].rme:
        granules = rme.Context(case, walk, judge, model)
        found = next((row.name for row in KNOWN_RME if row.applies(granules)), "")
        if found:
            return found
    if isinstance(walk, NestedWalk):
        nested = stage2.Context(case, walk, judge, model)
        return next((row.name for row in KNOWN_NESTED if row.applies(nested)), "")
    context = Context(case, walk, judge, model)
    return next((row.name for row in KNOWN if row.applies(context)), "")
