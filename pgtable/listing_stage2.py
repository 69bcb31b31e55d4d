"""What stage 2 maps, and what a VA reaches through both stages, as merged rows.

    found = stage2_listing(memory, regs)        # a Listing whose `va` are IPAs
    both = nested_listing(memory, regs)         # VA -> IPA -> PA

Rules of this file:
- The tables and runs are listing.py's; what is decided about a leaf is stage2.py's and combine.py's.
- Permissions of stage 2 are given as those of EL1 and EL0 (permissions.py), its memory attributes as what it makes of
  write-back memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pgtable.access import Access, AccessType
from pgtable.attributes import NORMAL_WB
from pgtable.bits import Words
from pgtable.combine import combined, combined_sh
from pgtable.listing import NO_RUNS, Found, Listing, Runs, changes, concatenated, half_runs, joined, listing
from pgtable.memory import TableMemory
from pgtable.nested_many import GuestMemory
from pgtable.params import Regime, WalkParams
from pgtable.permissions import PR, PW, PX, TO_UNPRIVILEGED
from pgtable.registers import Registers
from pgtable.stage2 import Stage2Params, stage2_walk
from pgtable.stage2_permissions import EL0_EXECUTE, EL1_EXECUTE, READ, WRITE, permissions
from pgtable.table_params import TableParams
from pgtable.tree import Finding, grow

_U64 = (1 << 64) - 1


def stage2_listing(memory: TableMemory, regs: Registers, *, ns: bool = False) -> Listing:
    """Everything that stage 2 of EL1&0 maps, in IPA order. `ns`: Secure state's Non-secure IPA space."""
    p = Stage2Params.of(regs, ns=ns)
    if p.why_off:
        return Listing(regs, Regime.EL10, NO_RUNS, [], [Finding("off", 0, 1 << p.ia_bits, -2, 0, p.why_off)], stage=2)
    tree = grow(memory, p)
    findings = list(tree.findings)
    parts = [_decided(memory, p, level, found) for level, found in half_runs(memory, tree, findings)]
    return Listing(regs, Regime.EL10, joined(concatenated([NO_RUNS, *parts])), [tree], findings, stage=2)


def stage1_permissions(perms: int) -> int:
    """Stage 2's permissions in the bits of permissions.py."""
    data = (PR if perms & READ else 0) | (PW if perms & WRITE else 0)
    el0 = data | (PX if perms & EL0_EXECUTE else 0)
    return data | (PX if perms & EL1_EXECUTE else 0) | el0 << TO_UNPRIVILEGED


def _decided(memory: TableMemory, p: Stage2Params, level: int, found: Found) -> Runs:
    """Rows with what is the same in a whole row, decided once for each combination of attributes."""
    attributes = found.word & np.uint64(_U64 ^ p.fmt.leaf(level)["OA"].mask)
    too_large = (found.pa & np.uint64(p.over)) != 0
    starts, which = changes(attributes, too_large)
    rows = [_facts(memory, p, int(found.va[i]), int(found.word[i])) for i in starts.tolist()]
    perms, fault, attr, sh = np.array(rows, np.uint16).reshape(-1, 4).T
    return Runs(
        va=found.va,
        size=found.leaves.astype(np.uint64) * np.uint64(p.fmt.granule.level_size(level)),
        pa=found.pa,
        level=np.full(len(found.va), level, np.int8),
        word=found.word,
        slot=found.slot,
        inherited=found.inherited,
        perms=perms[which],
        leaves=found.leaves,
        fault=fault.astype(np.uint8)[which],
        attributes=attributes,
        attr=attr.astype(np.uint8)[which],
        sh=sh.astype(np.uint8)[which],
    )


def _facts(memory: TableMemory, p: Stage2Params, ipa: int, word: int) -> tuple[int, int, int, int]:
    """Permissions, fault code of an access that no permission refuses, memory attributes, shareability."""
    fault = stage2_walk(memory.fetch, p, ipa, Access(AccessType.AT_ANY)).result
    attr = combined(NORMAL_WB, p.page["MemAttr"].get(word), fwb=p.fwb, off=p.data_off)
    sh = combined_sh(0, p.sh if p.fmt.lpa2 else p.page["SH"].get(word), attr)
    return stage1_permissions(permissions(p, word)), getattr(fault, "code", 0), attr, sh


class NestedListing(NamedTuple):
    """What VAs reach through both stages. `rows`: `pa` is the PA, `perms`, `attr`, `sh` are of both stages.

    `ipa` uint64, `level2` int8, `word2` uint64: of stage 2, in the order of the rows. `stage1`: VA to IPA. `stage2`:
    IPA to PA. `findings`: of both, and the ranges that stage 1 maps and stage 2 does not.
    """

    rows: Runs
    ipa: Words
    level2: npt.NDArray[np.int8]
    word2: Words
    stage1: Listing
    stage2: Listing
    findings: list[Finding]

    @property
    def both(self) -> Listing:
        """The rows as a listing: its tables are stage 1's."""
        return replace(self.stage1, runs=self.rows, findings=self.findings, ipa=(self.rows.va, self.ipa))


def nested_listing(memory: TableMemory, regs: Registers) -> NestedListing:
    """Everything that EL1&0 maps through both stages, in VA order, a row for each run that both stages have whole."""
    second = stage2_listing(memory, regs)
    p2 = Stage2Params.of(regs)
    first = listing(GuestMemory(memory, p2), regs, regime=Regime.EL10)
    row, low, high, other = _overlaps(first.runs, second.runs)
    skip = low - first.runs.pa[row]
    runs, below = first.runs.pick(row), second.runs.pick(other)
    rows = runs._replace(
        va=runs.va + skip,
        size=high - low + np.uint64(1),
        pa=below.pa + (low - below.va),
        perms=runs.perms & below.perms,
        fault=np.where(runs.fault != 0, runs.fault, below.fault),
    )
    own = (_own_sh(first.params(va), word) for va, word in zip(runs.va.tolist(), runs.word.tolist(), strict=True))
    pairs = zip(runs.attr.tolist(), own, below.word.tolist(), strict=True)
    memory_of = [_both(p2, *pair) for pair in pairs]
    attr, sh = np.array(memory_of, np.uint8).reshape(-1, 2).T
    findings = [*first.findings, *second.findings, *_unmapped(first.runs, row, low, high)]
    return NestedListing(rows._replace(attr=attr, sh=sh), low, below.level, below.word, first, second, findings)


def _own_sh(p: TableParams, word: int) -> int:
    """The shareability that stage 1's leaf asks for, before its type is looked at."""
    assert isinstance(p, WalkParams)
    return p.sh if p.fmt.lpa2 else p.page["SH"].get(word)


def _both(p2: Stage2Params, attr: int, sh: int, word: int) -> tuple[int, int]:
    found = combined(attr, p2.page["MemAttr"].get(word), fwb=p2.fwb, off=p2.data_off)
    return found, combined_sh(sh, p2.sh if p2.fmt.lpa2 else p2.page["SH"].get(word), found)


def _overlaps(first: Runs, second: Runs) -> tuple[npt.NDArray[np.int64], Words, Words, npt.NDArray[np.int64]]:
    """For each piece of a row of `first` whose IPAs a row of `second` maps: row, first and last IPA, the other row."""
    last = first.pa + (first.size - np.uint64(1))
    ends = second.va + (second.size - np.uint64(1))
    start = np.searchsorted(ends, first.pa)
    count = np.searchsorted(second.va, last, side="right") - start
    count = np.maximum(count, 0)
    row = np.repeat(np.arange(len(first.va)), count)
    other = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count) + start[row]
    low = np.maximum(first.pa[row], second.va[other])
    high = np.minimum(last[row], ends[other])
    return row, low, high, other


def _unmapped(first: Runs, row: npt.NDArray[np.int64], low: Words, high: Words) -> list[Finding]:
    """The parts of stage 1's rows that stage 2 does not map."""
    found = []
    by_row: dict[int, list[tuple[int, int]]] = {}
    for i, piece in zip(row.tolist(), zip(low.tolist(), high.tolist(), strict=True), strict=True):
        by_row.setdefault(i, []).append(piece)
    for i, (va, size, ipa) in enumerate(zip(first.va.tolist(), first.size.tolist(), first.pa.tolist(), strict=True)):
        at = ipa
        for begin, end in [*by_row.get(i, []), (ipa + size, 0)]:
            if begin > at:
                text = f"stage 2 does not map IPA {at:#x}-{begin:#x}"
                found.append(Finding("not in stage 2", va + at - ipa, begin - at, -2, 0, text))
            at = end + 1
    return found
