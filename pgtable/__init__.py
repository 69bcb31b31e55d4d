"""What Arm says: descriptors, registers, the translation table walk, permissions, faults, tables built and listed.

Everything here is numpy and the standard library. `translate` answers for one address, `translate_many` for an
array; both return faults as values. `explain` says what one word means.
"""

from pgtable.access import Access, AccessType
from pgtable.at import ExternalAbort, at, at_many, at_walk
from pgtable.bulk import Many
from pgtable.describe import Explanation, explain
from pgtable.descriptors import Format, Granule, Kind
from pgtable.faults import Fault, FaultType
from pgtable.features import CPUS, Features
from pgtable.memory import Memory, NoMemory, PhysicalMemory
from pgtable.mmu import translate, translate_many
from pgtable.nested import NestedWalk, translate_nested
from pgtable.nested_many import NestedMany
from pgtable.params import Regime, WalkParams
from pgtable.registers import Registers
from pgtable.stage2 import Stage2Params, Stage2Walk, stage2_walk
from pgtable.walk import Step, Translation, Update, Walk

__all__ = [
    "CPUS",
    "Access",
    "AccessType",
    "Explanation",
    "ExternalAbort",
    "Fault",
    "FaultType",
    "Features",
    "Format",
    "Granule",
    "Kind",
    "Many",
    "Memory",
    "NestedMany",
    "NestedWalk",
    "NoMemory",
    "PhysicalMemory",
    "Regime",
    "Registers",
    "Stage2Params",
    "Stage2Walk",
    "Step",
    "Translation",
    "Update",
    "Walk",
    "WalkParams",
    "at",
    "at_many",
    "at_walk",
    "explain",
    "stage2_walk",
    "translate",
    "translate_many",
    "translate_nested",
]
