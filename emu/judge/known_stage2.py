"""Where a judge is wrong, or the architecture lets both be right, with stage 2 on: the rows that `known.py` adds.

The traps of QEMU are numbered as in docs/judges.md; those that stage 1 has too keep their numbers.
"""

from __future__ import annotations

from typing import NamedTuple

from emu.judge.corpus import BASE_RAM, EXC, Answer, Case
from pgtable import Fault, FaultType, NestedWalk, Stage2Params, Translation
from pgtable.attributes import MemoryAttributes, forced_outer, is_device
from pgtable.descriptors import LAST_LEVEL, Granule
from pgtable.faults import fault_code
from pgtable.registers import PAR_FAULT, PAR_OK
from pgtable.stage2_permissions import WRITE
from pgtable.walk import Update, in_memory

OLD = "7.2"  # Debian 12's QEMU
UPDATING = ("7.2", "10.0")  # those whose AT instructions update descriptors
_PERMISSION = 0x0C  # fault status code of a permission fault at level 0
_RESERVED_MEMATTR = {False: (4, 8, 12), True: (4, *range(8, 16))}  # by FWB
_WRITE_THROUGH = 2


class Context(NamedTuple):
    """What a row's test sees: the case, the model's walk and both answers."""

    case: Case
    walk: NestedWalk
    judge: Answer
    model: Answer

    @property
    def p2(self) -> Stage2Params:
        """Stage 2's parameters."""
        assert self.walk.last_stage2
        return self.walk.last_stage2.params

    @property
    def par(self) -> int:
        """The judge's PAR_EL1; of an exception or an access, one of no meaning."""
        return self.judge if isinstance(self.judge, int) and not self.judge & EXC else 0

    @property
    def translated(self) -> bool:
        """The judge translates."""
        return isinstance(self.judge, int) and not self.judge & (EXC | 1)

    @property
    def only_attributes(self) -> bool:
        """Both translate to the same PA."""
        if not isinstance(self.judge, int) or not isinstance(self.model, int) or not self.translated:
            return False
        return not self.model & (EXC | 1) and not (self.judge ^ self.model) & PAR_OK["PA"].mask

    @property
    def stage1_attr(self) -> int:
        """Stage 1's MAIR byte, before the caches are asked."""
        s1 = self.walk.stage1_result
        assert not isinstance(s1, Fault)
        p = self.walk.params
        return s1.attr if s1.level is None else p.mair[p.attr_index(s1.word)]

    @property
    def memattr(self) -> int | None:
        """MemAttr of stage 2's leaf of the result; None where there is none."""
        if self.walk.stage2 is None:
            return None
        return self.p2.page["MemAttr"].get(self.walk.stage2.raw[-1][2])


def clean_page_write(c: Context) -> bool:
    """T1: AT's write to a page of stage 2 that hardware would make dirty."""
    second = c.walk.stage2
    if second is None or not c.walk.ok or c.par & 1 == 0 or not PAR_FAULT["S"].get(c.par):
        return False
    leaf, word = c.p2.page, second.raw[-1][2]
    refused = PAR_FAULT["FST"].get(c.par) & ~3 == _PERMISSION
    return bool(refused and c.p2.hd and leaf["DBM"].get(word) and not leaf["S2AP"].get(word) & WRITE)


def high_bits(c: Context) -> bool:
    """T5 and T6: address bits that QEMU ignores where PS is below 52 bits."""
    fault, second = c.walk.fault, c.walk.last_stage2
    if fault is None or fault.stage != 2 or fault.type is not FaultType.ADDRESS_SIZE or not c.translated:
        return False
    reserved = 0xF << 12 if c.p2.fmt.granule is Granule.K64 else 3 << 8
    return bool(second and second.raw and c.p2.ps_bits < 52 and second.raw[-1][2] & reserved)


def ptw_level(c: Context) -> bool:
    """T9: the fault of HCR_EL2.PTW is at the level of the leaf; QEMU says 0."""
    fault = c.walk.fault
    return fault is not None and fault.cause == "PTW" and bool(c.par & 1) and PAR_FAULT["FST"].get(c.par) == _PERMISSION


def walk_level(c: Context) -> bool:
    """T9 of 7.2: the fault of a stage 1 table access has stage 1's level, or 0."""
    fault = c.walk.fault
    if c.case.reference != OLD or fault is None or not fault.s1ptw or not c.par & 1:
        return False
    same = not (c.par ^ fault.par()) & PAR_FAULT.mask("S", "PTW", "F")
    first = -1 if fault.type in (FaultType.TRANSLATION, FaultType.ADDRESS_SIZE) else 0
    at = {fault_code(fault.type, level) for level in range(first, LAST_LEVEL + 1)}
    return same and PAR_FAULT["FST"].get(c.par) in at


def at_updates(c: Context) -> bool:
    """T3: the AT would set the access flag, or make the page dirty, in a stage 1 table that stage 2 has read-only."""
    p, raw = c.walk.params, c.walk.raw
    refused = c.par & 1 and PAR_FAULT["S"].get(c.par) and PAR_FAULT["PTW"].get(c.par)
    if c.case.reference not in UPDATING or not refused or not c.walk.access.is_at or not p.ha or not raw:
        return False
    changes = not raw[-1][2] & p.af or (p.hd and bool(raw[-1][2] & p.dbm))
    return changes and PAR_FAULT["FST"].get(c.par) & ~3 == _PERMISSION


def low_memory(c: Context) -> bool:
    """Secure state of the virt machine has flash below RAM: a walk that lands there reads it."""
    fault, last = c.walk.fault, c.walk.last_stage2
    if fault is None or fault.type is not FaultType.EXTERNAL_ON_WALK or not c.walk.params.secure or last is None:
        return False
    if fault.stage == 2:
        missing = last.params.table_address(last.raw[-1][2]) if last.raw else last.params.base
    else:
        assert not isinstance(last.result, Fault)
        missing = last.result.pa
    return missing < BASE_RAM[0]


def ptw_access_flag(walk: NestedWalk, pa: int, word: int | None) -> bool:
    """T9: QEMU has set the access flag of the leaf at `pa` (to `word`) before it looks at HCR_EL2.PTW."""
    fault, second = walk.fault, walk.last_stage2
    if fault is None or fault.cause != "PTW" or second is None:
        return False
    _, at, old = second.raw[-1]
    made = in_memory(Update(at, old, old | second.params.af), second.params.big_endian)
    return (made.pa, made.new) == (pa, word)


def raw_sharing(c: Context) -> bool:
    """T20: 7.2 reports the shareability of Device and non-cacheable memory as it is in the descriptors."""
    if c.case.reference != OLD or not c.only_attributes:
        return False
    assert isinstance(c.model, int)
    s1 = c.walk.stage1_result
    outer = forced_outer(PAR_OK["ATTR"].get(c.model)) or (isinstance(s1, Translation) and forced_outer(s1.attr))
    return not (c.par ^ c.model) & PAR_OK["ATTR"].mask and outer


def dirty_state(c: Context) -> bool:
    """T15: with FEAT_S2PIE, QEMU's AT of a write does not ask whether the page is dirty."""
    fault = c.walk.fault
    return fault is not None and fault.stage == 2 and fault.dirty_bit and c.translated


def cache_off(c: Context) -> bool:
    """T7: SCTLR_EL1.C = 0."""
    s1 = c.walk.stage1_result
    if not c.only_attributes or isinstance(s1, Fault) or s1.level is None:
        return False
    return not c.walk.params.data_cacheable and not is_device(c.stage1_attr)


def reserved(c: Context) -> bool:
    """T8: a reserved MAIR byte, MemAttr, or shareability 01, of either stage."""
    s1 = c.walk.stage1_result
    if not c.only_attributes or isinstance(s1, Fault):
        return False
    if MemoryAttributes.of(c.stage1_attr).type == "reserved" or s1.sh == 1:
        return True
    if c.walk.stage2 is None:
        return False
    sh = c.p2.sh if c.p2.fmt.lpa2 else c.p2.page["SH"].get(c.walk.stage2.raw[-1][2])
    return sh == 1 or c.memattr in _RESERVED_MEMATTR[c.p2.fwb]


def two_devices(c: Context) -> bool:
    """T10: with FWB the stricter of two Device types; QEMU takes stage 2's."""
    if not c.only_attributes or c.memattr is None:
        return False
    return c.p2.fwb and is_device(c.stage1_attr) and c.memattr < 4


def mixed(c: Context) -> bool:
    """T11: one stage is Device, the other Normal."""
    if not c.only_attributes or c.memattr is None:
        return False
    return not c.p2.fwb and is_device(c.stage1_attr) != (c.memattr < 4)


def transient(c: Context) -> bool:
    """T12: a transient type of stage 1 limited to write-through."""
    if not c.only_attributes or c.memattr is None:
        return False
    nibbles = (c.stage1_attr >> 4, c.stage1_attr & 15)
    hint = any(nibble and not nibble & 8 and nibble != 4 for nibble in nibbles)
    return not c.p2.fwb and hint and _WRITE_THROUGH in (c.memattr >> 2, c.memattr & 3)
