"""Where a judge is wrong, or the architecture lets both be right: which judge, when, and the rule.

Each row has a name (the traps of QEMU are numbered as in docs/judges.md), the rule in a sentence with its source, and a
test that is true only for the situation: it sees the case, the model's walk and both answers. A disagreement that no
row explains is unexplained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

from emu.judge import known_stage2 as stage2
from emu.judge.corpus import BASE_RAM, EXC, Answer, Case
from pgtable import AccessType, FaultType, Granule, NestedWalk, Translation, Walk
from pgtable.attributes import MemoryAttributes, forced_outer, is_device
from pgtable.descriptors import LAST_LEVEL
from pgtable.faults import fault_code
from pgtable.registers import PAR_FAULT, PAR_OK


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


def _high_bits_64k(c: Context) -> bool:
    p = c.walk.params
    ignored = c.address_size and not c.judge_faults(FaultType.ADDRESS_SIZE)
    return ignored and p.fmt.granule is Granule.K64 and p.ps_bits < 52 and bool(c.last & 0xF << 12)


def _high_bits_ds(c: Context) -> bool:
    p = c.walk.params
    ignored = c.address_size and not c.judge_faults(FaultType.ADDRESS_SIZE)
    return ignored and p.fmt.lpa2 and p.ps_bits < 52 and bool(c.last & 3 << 8)


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
    taken = fault.level == -1 or (not p.fmt.ds and (p.fmt.granule, fault.level) in TAKEN_BY_OLD)
    return taken and not c.judge_faults(FaultType.TRANSLATION, level=fault.level)


def _raw_sharing(c: Context) -> bool:
    return c.case.reference == stage2.OLD and c.only("SH") and isinstance(c.model, int) and forced_outer(c.model >> 56)


TAKEN_BY_OLD = {(Granule.K4, 0), (Granule.K16, 1), (Granule.K16, 0)}  # without DS there are no blocks here
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
        "a block is legal only at the levels of BlockDescSupported (4K: 0 only with DS = 1, 16K: 1 only with DS = 1): "
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


def explain_update(walks: Iterable[Walk | None], pa: int, judge: int | None, model: int | None) -> str:
    """The same for the word at `pa` after a whole case: None is a word that did not change."""
    nested = (walk for walk in walks if isinstance(walk, NestedWalk))
    return "T9" if model is None and any(stage2.ptw_access_flag(walk, pa, judge) for walk in nested) else ""


def explain(case: Case, walk: Walk | None, judge: Answer, model: Answer) -> str:
    """The name of the first row that explains a disagreement, "" if none does."""
    if walk is None:
        return ""
    if isinstance(walk, NestedWalk):
        nested = stage2.Context(case, walk, judge, model)
        return next((row.name for row in KNOWN_NESTED if row.applies(nested)), "")
    context = Context(case, walk, judge, model)
    return next((row.name for row in KNOWN if row.applies(context)), "")
