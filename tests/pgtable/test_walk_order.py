"""Which fault wins when several conditions hold: every pair, in the order of Arm's pseudocode.

Judge: S1Translate, S1Walk and S1CheckPermissions (Arm ARM J1.1), whose order is the order of the rows below. Each row
says how to bring its condition about by hand and what the fault must be; the earlier row of any two must win.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

import pytest

from pgtable import Access, AccessType, Fault, translate
from pgtable.features import CPUS
from tests.pgtable.hand import ROOT, Tree, Words, leaf, tcr2, tree


@dataclass
class Spec:
    """A map in the making."""

    leaf: dict[str, int] = field(default_factory=dict)
    tcr_flags: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    va_flip: int = 0
    t0sz: int | None = None
    aligned: bool = True
    gone: set[int] = field(default_factory=set)  # levels whose table is not in memory
    flips: dict[int, int] = field(default_factory=dict)  # bits of the descriptor at a level

    def flip(self, level: int, bit: int) -> None:
        self.flips[level] = self.flips.get(level, 0) ^ 1 << bit


class Row(NamedTuple):
    """One condition: how to bring it about, and the fault."""

    name: str
    make: Callable[[Spec], None]
    type: str
    level: int
    cause: str
    reads: int  # descriptors read by then


def _set(**values: object) -> Callable[[Spec], None]:
    """Sets attributes of the spec; a dict is merged."""

    def make(spec: Spec) -> None:
        for name, value in values.items():
            old = getattr(spec, name)
            setattr(spec, name, old | value if isinstance(old, dict | set) else value)

    return make


def _flip(level: int, bit: int) -> Callable[[Spec], None]:
    return lambda spec: spec.flip(level, bit)


# 4K, 48 bits, 44-bit output addresses, a page: an EL0 store.
PAGE_ROWS = [
    Row("TxSZ", _set(t0sz=15), "translation", 0, "TxSZ", 0),
    Row("VA range", _set(va_flip=1 << 50), "translation", 0, "range", 0),
    Row("E0PD", _set(tcr_flags={"E0PD0": 1}), "translation", 0, "E0PD", 0),
    Row("EPD", _set(tcr_flags={"EPD0": 1}), "translation", 0, "EPD", 0),
    Row("TTBR size", _set(registers={"TTBR0_EL1": ROOT | 1 << 45}), "address size", 0, "TTBR", 0),
    Row("no RAM, L0", _set(gone={0}), "external abort on the walk", 0, "", 0),
    Row("invalid, L0", _flip(0, 0), "translation", 0, "descriptor", 1),
    Row("table size, L0", _flip(0, 45), "address size", 0, "table", 1),
    Row("no RAM, L1", _set(gone={1}), "external abort on the walk", 1, "", 1),
    Row("invalid, L1", _flip(1, 0), "translation", 1, "descriptor", 2),
    Row("table size, L1", _flip(1, 45), "address size", 1, "table", 2),
    Row("no RAM, L2", _set(gone={2}), "external abort on the walk", 2, "", 2),
    Row("invalid, L2", _flip(2, 0), "translation", 2, "descriptor", 3),
    Row("table size, L2", _flip(2, 45), "address size", 2, "table", 3),
    Row("no RAM, L3", _set(gone={3}), "external abort on the walk", 3, "", 3),
    Row("reserved, L3", _flip(3, 1), "translation", 3, "descriptor", 4),
    Row("OA size", _flip(3, 45), "address size", 3, "OA", 4),
    Row("AF", _set(leaf={"AF": 0}), "access flag", 3, "AF", 4),
    Row("alignment", _set(leaf={"AttrIndx": 1}, aligned=False), "alignment", 3, "", 4),
    Row("permission", _set(leaf={"AP": 3}), "permission", 3, "permission", 4),
]

# 4K, 24 bits, 44-bit output addresses, a block in the root table (level 2), indirect permissions with overlays.
BLOCK_ROWS = [
    Row("TTBR size", _set(registers={"TTBR0_EL1": ROOT | 1 << 45}), "address size", 0, "TTBR", 0),
    Row("no RAM, L2", _set(gone={2}), "external abort on the walk", 2, "", 0),
    Row("invalid, L2", _flip(2, 0), "translation", 2, "descriptor", 1),
    Row("contiguous", _set(leaf={"Contiguous": 1}), "translation", 2, "Contiguous", 1),
    Row("nT", _set(leaf={"nT": 1}), "translation", 2, "nT", 1),
    Row("OA size", _flip(2, 45), "address size", 2, "OA", 1),
    Row("AF", _set(leaf={"AF": 0}), "access flag", 2, "AF", 1),
    Row("alignment", _set(leaf={"AttrIndx": 1}, aligned=False), "alignment", 2, "", 1),
    Row("overlay", _set(leaf={"POIndex": 1}), "permission", 2, "permission", 1),
    Row("base", _set(leaf={"PXN": 1}), "permission", 2, "permission", 1),
    Row("dirty", _set(leaf={"AP": 2}), "permission", 2, "dirty", 1),
]
PIE_REGISTERS = {
    "TCR2_EL1": tcr2(PIE=1, POE=1, E0POE=1),
    "PIRE0_EL1": 0x1_0005,  # PIIndex 0: read/write; 4 (PXN's bit): read
    "POR_EL0": 0x07,  # POIndex 0: everything; 1: nothing
}
CPU = CPUS["max"].replace(contiguous_faults=True, nt_faults=True)


def built(spec: Spec, *, block: bool) -> Tree:
    if block:
        word = leaf(low=1, **spec.leaf)
        made = tree(word, va=0x0056_7890, ia=24, level=2, ps=4, cpu=CPU, tcr_flags=spec.tcr_flags, **PIE_REGISTERS)
    else:
        made = tree(leaf(**{"AP": 1} | spec.leaf), ps=4, cpu=CPU, tcr_flags=spec.tcr_flags)
    made = made.with_regs(**spec.registers)
    if spec.t0sz is not None:
        made = made.with_regs(TCR_EL1=made.regs.TCR_EL1 & ~63 | spec.t0sz)
    for level, mask in spec.flips.items():
        made = made.with_flipped(level, mask)
    kept = {pa: made.memory[pa] for level, pa in made.slots.items() if level not in spec.gone}
    return made._replace(memory=Words(kept), va=made.va ^ spec.va_flip)


def faults(rows: tuple[Row, ...], *, block: bool) -> tuple[Fault | None, list[int], Tree]:
    spec = Spec()
    for row in reversed(rows):
        row.make(spec)
    made = built(spec, block=block)
    found = translate(made.memory, made.regs, made.va, Access(AccessType.WRITE, 0, aligned=spec.aligned))
    return found.fault, [pa for _, pa, _ in found.raw], made


def check(rows: tuple[Row, ...], *, block: bool) -> None:
    fault, read, made = faults(rows, block=block)
    want = rows[0]
    assert fault is not None
    assert (fault.type.value, fault.level, fault.cause) == (want.type, want.level, want.cause)
    assert read == list(made.slots.values())[: want.reads]


def test_without_any_condition_the_access_passes() -> None:
    assert faults((), block=False)[0] is None
    assert faults((), block=True)[0] is None


@pytest.mark.parametrize("row", PAGE_ROWS, ids=lambda r: r.name)
def test_each_condition_alone_gives_its_fault_for_a_page(row: Row) -> None:
    check((row,), block=False)


@pytest.mark.parametrize("row", BLOCK_ROWS, ids=lambda r: r.name)
def test_each_condition_alone_gives_its_fault_for_a_block(row: Row) -> None:
    check((row,), block=True)


@pytest.mark.parametrize("first", PAGE_ROWS[:-1], ids=lambda r: r.name)
def test_the_earlier_of_any_two_conditions_wins_for_a_page(first: Row) -> None:
    for second in PAGE_ROWS[PAGE_ROWS.index(first) + 1 :]:
        check((first, second), block=False)


@pytest.mark.parametrize("first", BLOCK_ROWS[:-1], ids=lambda r: r.name)
def test_the_earlier_of_any_two_conditions_wins_for_a_block(first: Row) -> None:
    for second in BLOCK_ROWS[BLOCK_ROWS.index(first) + 1 :]:
        check((first, second), block=True)


def test_the_first_of_all_conditions_at_once_wins_down_the_list() -> None:
    for rows, block in ((PAGE_ROWS, False), (BLOCK_ROWS, True)):
        for i in range(len(rows)):
            check(tuple(rows[i:]), block=block)


def test_all_pairs_were_asked() -> None:
    assert len(list(combinations(PAGE_ROWS, 2))) + len(list(combinations(BLOCK_ROWS, 2))) == 190 + 55


# Within the permission check: overlay read, overlay write, base read, base write, dirty state.

PERMISSION = {
    # POR nibble, PIR nibble, nDirty: overlay flag, WnR, dirty flag of an atomic's fault
    (0, 0, 1): (True, False, False),
    (4, 0, 1): (True, False, False),
    (1, 0, 1): (True, True, False),
    (1, 5, 0): (True, True, False),
    (5, 0, 1): (False, False, False),
    (5, 1, 1): (False, True, False),
    (5, 5, 1): (False, True, True),
    (5, 5, 0): None,
}


@pytest.mark.parametrize(("por", "pir", "ndirty"), PERMISSION)
def test_an_atomic_reports_overlay_read_overlay_write_base_read_base_write_dirty_in_this_order(
    por: int, pir: int, ndirty: int
) -> None:
    made = tree(leaf(AP=2 * ndirty), TCR2_EL1=tcr2(PIE=1, POE=1), PIR_EL1=pir, POR_EL1=por)
    fault = translate(made.memory, made.regs, made.va, Access.atomic()).fault
    found = fault and (fault.overlay, fault.write, fault.dirty_bit)
    assert found == PERMISSION[por, pir, ndirty]


# The MMU off: address size before alignment, both at level 0.


def test_with_the_mmu_off_address_size_comes_before_alignment() -> None:
    made = tree(va=0x8000_0001, sctlr_flags={"M": 0})
    unaligned = Access(AccessType.READ, 1, aligned=False)
    fault = translate(made.memory, made.regs, made.va, unaligned).fault
    assert fault is not None
    assert (fault.type.value, fault.level) == ("alignment", 0)
    fault = translate(made.memory, made.regs, made.va | 1 << 52, unaligned).fault
    assert fault is not None
    assert (fault.type.value, fault.level) == ("address size", 0)
    assert made.memory.reads == []


# Levels.


def test_a_fault_before_the_walk_is_at_level_0_wherever_the_walk_would_begin() -> None:
    for granule, ia in (("4K", 52), ("4K", 39), ("4K", 25), ("16K", 36), ("64K", 29)):
        flags = {"DS": 1} if ia == 52 else {}
        good = tree(leaf(0x8000_0000, SH=0), granule=granule, ia=ia, va=0, tcr_flags=flags, ps=6)
        made = good.with_regs(TCR_EL1=good.regs.TCR_EL1 | 1 << 7)
        fault = translate(made.memory, made.regs, made.va).fault
        assert fault is not None
        assert (fault.cause, fault.level) == ("EPD", 0), (granule, ia)
        out = good.va | 1 << 53
        fault = translate(good.memory, good.regs, out).fault
        assert fault is not None
        assert (fault.cause, fault.level) == ("range", 0), (granule, ia)


@pytest.mark.parametrize(
    ("bit", "gone", "code"),
    [(0, set(), 0x2B), (47, set(), 0x29), (None, {-1}, 0x13)],
    ids=["translation", "address size", "external abort"],
)
def test_level_minus_one_faults_have_their_own_codes(bit: int | None, gone: set[int], code: int) -> None:
    made = tree(leaf(SH=0), ia=52, tcr_flags={"DS": 1}, ps=4)
    if bit is not None:
        made = made.with_flipped(-1, 1 << bit)
    made = made._replace(memory=Words({pa: made.memory[pa] for at, pa in made.slots.items() if at not in gone}))
    fault = translate(made.memory, made.regs, made.va).fault
    assert fault is not None
    assert (fault.level, fault.code) == (-1, code)


def test_a_ttbr_beyond_the_output_size_is_at_level_0_also_where_the_walk_begins_at_minus_one() -> None:
    made = tree(leaf(SH=0), ia=52, tcr_flags={"DS": 1}, ps=4, TTBR0_EL1=ROOT | 1 << 44)
    fault = translate(made.memory, made.regs, made.va).fault
    assert fault is not None
    assert (fault.type.value, fault.level, fault.code, fault.cause) == ("address size", 0, 0x00, "TTBR")
