"""The shape of a walk: golden walks of every granule and start level, TTBR, TxSZ, output sizes, what is kept.

Judge: VAs written as groups of binary digits (Arm ARM D8.2, "translation table lookup"), and the limits of D8.2 and
D8.3 typed as tables.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from pgtable import Access, Kind, PhysicalMemory, Registers, translate
from pgtable.features import CPUS
from pgtable.mmu import regime_of
from pgtable.params import Regime, WalkParams
from pgtable.walk import Step
from tests.pgtable.hand import OUT, ROOT, TABLE_STEP, U64, Words, hcr, leaf, start_level, table, tcr, tree

# Granule, DS, start level, digits of the VA resolved at each level and within the page.
SHAPES = [
    ("4K", 0, 3, (4, 12)),
    ("4K", 0, 3, (9, 12)),
    ("4K", 0, 2, (1, 9, 12)),
    ("4K", 0, 2, (4, 9, 12)),
    ("4K", 0, 2, (9, 9, 12)),
    ("4K", 0, 1, (1, 9, 9, 12)),
    ("4K", 0, 1, (9, 9, 9, 12)),
    ("4K", 0, 0, (1, 9, 9, 9, 12)),
    ("4K", 0, 0, (9, 9, 9, 9, 12)),
    ("4K", 1, 0, (9, 9, 9, 9, 12)),
    ("4K", 1, -1, (1, 9, 9, 9, 9, 12)),
    ("4K", 1, -1, (4, 9, 9, 9, 9, 12)),
    ("16K", 0, 3, (2, 14)),
    ("16K", 0, 3, (11, 14)),
    ("16K", 0, 2, (1, 11, 14)),
    ("16K", 0, 2, (11, 11, 14)),
    ("16K", 0, 1, (1, 11, 11, 14)),
    ("16K", 0, 1, (11, 11, 11, 14)),
    ("16K", 0, 0, (1, 11, 11, 11, 14)),
    ("16K", 1, 0, (5, 11, 11, 11, 14)),
    ("64K", 0, 3, (1, 16)),
    ("64K", 0, 3, (13, 16)),
    ("64K", 0, 2, (1, 13, 16)),
    ("64K", 0, 2, (13, 13, 16)),
    ("64K", 0, 1, (1, 13, 13, 16)),
    ("64K", 0, 1, (6, 13, 13, 16)),
    ("64K", 0, 1, (10, 13, 13, 16)),
]
BLOCK_LEVELS = {("4K", 0): {1, 2}, ("4K", 1): {0, 1, 2}, ("16K", 0): {2}, ("16K", 1): {1, 2}, ("64K", 0): {1, 2}}


def words_of(
    granule: str, ds: int, start: int, digits: list[str], level: int
) -> tuple[dict[int, int], list[Step], int]:
    """Memory, the steps to expect and the PA, from the VA's groups of digits."""
    count = level - start + 1
    offset = "".join(digits[count:])
    oa = 1 << max(len(offset), 20)
    words, steps = {}, []
    for number in range(count):
        at = ROOT + number * TABLE_STEP + 8 * int(digits[number], 2)
        last = number == count - 1
        low = 3 if level == 3 else 1
        words[at] = leaf(oa, low=low, SH=0) if last else table(ROOT + (number + 1) * TABLE_STEP)
        kind = (Kind.PAGE if level == 3 else Kind.BLOCK) if last else Kind.TABLE
        steps.append(Step(start + number, at, words[at], int(digits[number], 2), kind))
    return words, steps, oa | int(offset, 2)


@pytest.mark.parametrize("upper", [False, True], ids=["lower", "upper"])
@pytest.mark.parametrize(("granule", "ds", "start", "widths"), SHAPES)
def test_golden_walks_read_the_descriptors_that_the_digits_of_the_va_name(
    granule: str, ds: int, start: int, widths: tuple[int, ...], upper: bool, rng: random.Random
) -> None:
    ia = sum(widths)
    for level in range(start, 4):
        if level < 3 and level not in BLOCK_LEVELS[granule, ds]:
            continue
        for pick in (lambda w: "0" * w, lambda w: "1" * w, lambda w: f"{rng.getrandbits(w):0{w}b}"):
            digits = [pick(width) for width in widths]
            words, steps, pa = words_of(granule, ds, start, digits, level)
            va = int("".join(digits), 2) | (U64 ^ (1 << ia) - 1 if upper else 0)
            ttbr = {f"TTBR{int(upper)}_EL1": ROOT}
            regs = Registers(TCR_EL1=tcr(granule, ia, ps=6, upper=upper, DS=ds), MAIR_EL1=0xFF, **ttbr)
            found = translate(Words(words), regs, va)
            assert found.pa == pa, (digits, level)
            assert list(found.steps) == steps
            assert [(s.level, s.pa, s.word) for s in steps] == found.raw


def test_one_walk_written_out() -> None:
    memory = Words(
        {
            0x4000_0120: 0x4001_0003,  # 0 0010 0100: entry 36
            0x4001_0688: 0x4002_0003,  # 0 1101 0001: entry 209
            0x4002_0598: 0x4003_0003,  # 0 1011 0011: entry 179
            0x4003_0C48: 0x0060_0000_9ABC_D703,  # 1 1000 1001: entry 393
        }
    )
    regs = Registers(TTBR0_EL1=0x4000_0000, TCR_EL1=0x5_0000_0000 | 16 | 0x10 << 16 | 2 << 30, MAIR_EL1=0xFF)
    walk = translate(memory, regs, 0x0000_1234_5678_9ABC)
    assert walk.pa == 0x9ABC_DABC
    assert [s.entry for s in walk.steps] == [36, 209, 179, 393]
    assert memory.reads == [0x4000_0120, 0x4001_0688, 0x4002_0598, 0x4003_0C48]


# Start level and TxSZ.

STARTS = {
    "4K": {3: (16, 21), 2: (22, 30), 1: (31, 39), 0: (40, 48), -1: (49, 52)},
    "16K": {3: (16, 25), 2: (26, 36), 1: (37, 47), 0: (48, 52)},
    "64K": {3: (17, 29), 2: (30, 42), 1: (43, 52)},
}


@pytest.mark.parametrize("granule", STARTS)
def test_start_levels_are_those_of_the_table(granule: str) -> None:
    for level, (least, most) in STARTS[granule].items():
        for ia in range(least, most + 1):
            regs = Registers(TCR_EL1=tcr(granule, ia, DS=1, ps=6))
            p = WalkParams.of(regs, Regime.EL10, 0)
            assert (p.start_level, p.ia_bits, p.txsz_ok) == (level, ia, True), ia
            assert start_level(granule, ia) == level


def _limits(granule: str, ds: int, **changes: bool) -> tuple[int, int]:
    """The smallest and largest TxSZ that do not fault."""
    features = CPUS["max"].replace(**changes)
    fine = []
    for txsz in range(64):
        made = tree(granule=granule, cpu=features, tcr_flags={"DS": ds}, va=0, ps=6)
        made = made.with_regs(TCR_EL1=made.regs.TCR_EL1 & ~63 | txsz)
        fault = translate(made.memory, made.regs, 0).fault
        if not (fault and fault.cause == "TxSZ"):
            fine.append(txsz)
    assert fine == list(range(fine[0], fine[-1] + 1))
    return fine[0], fine[-1]


@pytest.mark.parametrize(
    ("granule", "ds", "changes", "limits"),
    [
        ("4K", 0, {}, (16, 48)),
        ("4K", 1, {}, (12, 48)),
        ("16K", 0, {}, (16, 48)),
        ("16K", 1, {}, (12, 48)),
        ("64K", 0, {}, (12, 47)),
        ("64K", 1, {}, (12, 47)),
        ("4K", 1, {"lpa2": False}, (16, 48)),
        ("64K", 0, {"lva": False}, (16, 47)),
        ("4K", 0, {"ttst": False}, (16, 39)),
        ("64K", 0, {"ttst": False}, (12, 39)),
    ],
)
def test_txsz_limits(granule: str, ds: int, changes: dict[str, bool], limits: tuple[int, int]) -> None:
    assert _limits(granule, ds, **changes) == limits


def test_a_cpu_that_clamps_uses_the_nearest_legal_txsz() -> None:
    cpu = CPUS["max"].replace(txsz_faults=False, ttst=False, lva=False)
    made = tree(ia=48, cpu=cpu)
    made = made.with_regs(TCR_EL1=made.regs.TCR_EL1 & ~63 | 7)
    assert translate(made.memory, made.regs, made.va).pa == OUT | made.va & 0xFFF
    made = tree(ia=25, cpu=cpu, va=0x0123_4567)
    made = made.with_regs(TCR_EL1=made.regs.TCR_EL1 & ~63 | 63)
    assert translate(made.memory, made.regs, made.va).ok


def test_a_txsz_below_the_minimum_faults_on_a_cpu_with_lva_though_it_clamps_above() -> None:
    """Pseudocode S1TxSZFaults: FEAT_LVA faults below the minimum whatever the implementation's choice is."""
    cpu = CPUS["max"].replace(txsz_faults=False)
    made = tree(cpu=cpu)
    low = made.with_regs(TCR_EL1=made.regs.TCR_EL1 & ~63 | 15)
    fault = translate(low.memory, low.regs, low.va).fault
    assert fault is not None
    assert fault.cause == "TxSZ"


@pytest.mark.parametrize(
    ("upper", "field", "granule"),
    [(False, 0, "4K"), (False, 1, "64K"), (False, 2, "16K"), (True, 1, "16K"), (True, 2, "4K"), (True, 3, "64K")],
)
def test_tg0_and_tg1_name_the_granules_differently(upper: bool, field: int, granule: str) -> None:
    shift = 30 if upper else 14
    regs = Registers(TCR_EL1=16 | 16 << 16 | field << shift)
    assert WalkParams.of(regs, Regime.EL10, 1 << 55 if upper else 0).fmt.granule.label == granule


@pytest.mark.parametrize(("upper", "field"), [(False, 3), (True, 0)])
def test_a_reserved_granule_acts_as_the_smallest_there_is(upper: bool, field: int) -> None:
    regs = Registers(TCR_EL1=16 | 16 << 16 | field << (30 if upper else 14))
    assert WalkParams.of(regs, Regime.EL10, 1 << 55 if upper else 0).fmt.granule.label == "4K"


def test_a_granule_that_the_cpu_lacks_acts_as_the_smallest_there_is() -> None:
    regs = Registers(CPUS["cortex-a57"], TCR_EL1=tcr("16K"))
    assert WalkParams.of(regs, Regime.EL10, 0).fmt.granule.label == "4K"


# TTBR.


@pytest.mark.parametrize(
    ("granule", "ia", "size"), [("4K", 48, 4096), ("4K", 40, 16), ("4K", 25, 128), ("16K", 48, 16), ("64K", 43, 16)]
)
def test_ttbr_bits_below_the_tables_size_are_ignored_and_the_next_one_counts(granule: str, ia: int, size: int) -> None:
    good = tree(granule=granule, ia=ia, va=0)
    for low in (0, 1, size - 1):
        regs = good.regs.replace(TTBR0_EL1=ROOT | low)
        assert translate(good.memory, regs, 0).ok, low
    moved = good.regs.replace(TTBR0_EL1=ROOT | size)
    found = translate(good.memory, moved, 0)
    assert found.raw[0][1] == ROOT + size


@pytest.mark.parametrize(
    ("granule", "ia", "ds", "ps", "wide"),
    [
        ("4K", 48, 0, 6, False),
        ("4K", 48, 1, 6, True),
        ("4K", 48, 1, 5, True),
        ("16K", 48, 1, 6, True),
        ("16K", 47, 0, 6, False),
        ("64K", 48, 0, 6, True),
        ("64K", 48, 0, 5, False),
    ],
)
def test_ttbr_5_2_are_address_bits_51_48_only_in_the_52_bit_forms(
    granule: str, ia: int, ds: int, ps: int, wide: bool
) -> None:
    made = tree(granule=granule, ia=ia, va=0, ps=ps, tcr_flags={"DS": ds}, TTBR0_EL1=ROOT | 0xA << 2)
    p = WalkParams.of(made.regs, Regime.EL10, 0)
    assert p.base == (ROOT | 0x000A_0000_0000_0000 if wide else ROOT)
    fault = translate(made.memory, made.regs, 0).fault
    if wide and ps == 5:
        assert fault is not None
        assert (fault.type.value, fault.level) == ("address size", 0)


def test_a_52_bit_ttbr_of_a_small_table_is_64_byte_aligned() -> None:
    made = tree(leaf(SH=0), granule="4K", ia=49, va=0, ps=6, tcr_flags={"DS": 1})  # two entries: 16 bytes
    assert WalkParams.of(made.regs.replace(TTBR0_EL1=ROOT | 0x40), Regime.EL10, 0).base == ROOT | 0x40
    assert translate(made.memory, made.regs.replace(TTBR0_EL1=ROOT | 0x3), 0).ok


# Output sizes.


@pytest.mark.parametrize(("ps", "bits"), [(0, 32), (1, 36), (2, 40), (3, 42), (4, 44), (5, 48)])
def test_ps_limits_the_output_address(ps: int, bits: int) -> None:
    good = tree(leaf(1 << bits - 1 & ~0xFFF), ps=ps)
    assert translate(good.memory, good.regs, good.va).pa >> bits - 1 == 1
    if bits < 48:
        bad = good.with_word(3, leaf(1 << bits))
        fault = translate(bad.memory, bad.regs, bad.va).fault
        assert fault is not None
        assert (fault.type.value, fault.level) == ("address size", 3)


def test_ps_beyond_the_cpu_is_clamped_to_what_it_has() -> None:
    cpu = CPUS["cortex-a76"]  # 40 bits
    good = tree(leaf(1 << 39), ps=5, cpu=cpu)
    assert translate(good.memory, good.regs, good.va).ok
    bad = good.with_word(3, leaf(1 << 40))
    assert not translate(bad.memory, bad.regs, bad.va).ok


@pytest.mark.parametrize(
    ("granule", "ds", "where", "pa"),
    [
        ("4K", 1, 3 << 8, 0x000C_0000_8000_0000),
        ("4K", 1, 1 << 49, 0x0002_0000_8000_0000),
        ("16K", 1, 1 << 9 | 1 << 48, 0x0009_0000_8000_0000),
        ("64K", 0, 0xF000, 0x000F_0000_8000_0000),
    ],
)
def test_52_bit_output_addresses_and_their_fault_with_a_smaller_ps(granule: str, ds: int, where: int, pa: int) -> None:
    good = tree(leaf(SH=0) | where, granule=granule, ps=6, tcr_flags={"DS": ds})
    assert translate(good.memory, good.regs, good.va).pa & ~0xFFFF == pa
    small = tree(leaf(SH=0) | where, granule=granule, ps=5, tcr_flags={"DS": ds})
    fault = translate(small.memory, small.regs, small.va).fault
    assert fault is not None
    assert (fault.type.value, fault.level, fault.cause) == ("address size", 3, "OA")


@pytest.mark.parametrize("granule", ["4K", "16K"])
def test_without_ds_bits_49_48_and_9_8_are_no_address(granule: str) -> None:
    good = tree(leaf() | 3 << 48, granule=granule, ps=6)
    assert translate(good.memory, good.regs, good.va).pa >> 16 == OUT >> 16


def test_a_64k_cpu_without_lpa_ignores_bits_15_12() -> None:
    good = tree(leaf(SH=0) | 0xF000, granule="64K", ps=6, cpu=CPUS["max"].replace(pa_bits=48))
    assert translate(good.memory, good.regs, good.va).pa >> 16 == OUT >> 16


@pytest.mark.parametrize(("granule", "ds", "where"), [("4K", 1, 1 << 8), ("16K", 1, 1 << 49), ("64K", 0, 1 << 12)])
def test_a_table_beyond_the_output_size_is_reported_at_the_level_of_its_descriptor(
    granule: str, ds: int, where: int
) -> None:
    good = tree(leaf(SH=0), granule=granule, ps=5, tcr_flags={"DS": ds})
    for level in list(good.slots)[:-1]:
        bad = good.with_flipped(level, where)
        fault = translate(bad.memory, bad.regs, bad.va).fault
        assert fault is not None
        assert (fault.type.value, fault.level, fault.cause) == ("address size", level, "table")


@pytest.mark.parametrize(
    ("granule", "ds", "cpu", "level", "ok"),
    [
        ("4K", 0, {}, 0, False),
        ("4K", 1, {}, 0, True),
        ("4K", 1, {"lpa2": False}, 0, False),
        ("16K", 0, {}, 1, False),
        ("16K", 1, {}, 1, True),
        ("64K", 0, {}, 1, True),
        ("64K", 0, {"pa_bits": 48}, 1, False),
        ("4K", 1, {}, -1, False),
        ("16K", 1, {}, 0, False),
    ],
)
def test_the_largest_blocks_are_legal_only_with_52_bit_addresses(
    granule: str, ds: int, cpu: dict[str, int], level: int, ok: bool
) -> None:
    ia = 52 if level == -1 else 48
    word = leaf(1 << 47, low=1, SH=0)
    made = tree(word, granule=granule, ia=ia, level=level, tcr_flags={"DS": ds}, cpu=CPUS["max"].replace(**cpu))
    found = translate(made.memory, made.regs, made.va)
    assert found.ok is ok
    if found.fault:
        assert (found.fault.type.value, found.fault.level) == ("translation", level)


# The address bits below a block's output address are no address; contiguous runs.


def test_bits_below_a_blocks_address_are_not_ored_into_the_pa() -> None:
    made = tree(leaf(0x4020_0000, low=1) | 0x0001_F000, level=2)
    assert translate(made.memory, made.regs, made.va).pa == 0x4020_0000 | made.va & 0x1F_FFFF


def test_a_cpu_may_take_the_address_within_a_contiguous_run_from_the_va() -> None:
    va = 0x0000_0012_3456_7ABC  # page 7 of its run of 16
    word = leaf(0x4000_2000, Contiguous=1)  # programmed as page 2 of the run
    for choice, pa in ((False, 0x4000_2ABC), (True, 0x4000_7ABC)):
        made = tree(word, va=va).with_features(contiguous_output=choice)
        assert translate(made.memory, made.regs, va).pa == pa
    block = tree(leaf(0x4060_0000, low=1, Contiguous=1), va=0x0BC5_6789, level=2)
    assert translate(block.memory, block.regs, block.va).pa == 0x4065_6789
    run = block.with_features(contiguous_output=True)
    assert translate(run.memory, run.regs, run.va).pa == 0x41C5_6789


@pytest.mark.parametrize(
    ("granule", "ia", "level", "faults"),
    [
        ("4K", 24, 2, True),
        ("4K", 25, 2, False),
        ("4K", 33, 1, True),
        ("4K", 34, 1, False),
        ("4K", 16, 3, False),
        ("16K", 29, 2, True),
        ("16K", 30, 2, False),
        ("16K", 20, 3, True),
        ("16K", 21, 3, False),
        ("64K", 33, 2, True),
        ("64K", 34, 2, False),
        ("64K", 20, 3, True),
    ],
)
def test_a_contiguous_run_larger_than_the_input_range_may_fault(
    granule: str, ia: int, level: int, faults: bool
) -> None:
    word = leaf(1 << 40, low=3 if level == 3 else 1, Contiguous=1)
    made = tree(word, granule=granule, ia=ia, level=level, va=0x1234)
    assert translate(made.memory, made.regs, made.va).ok, "by default it does not"
    made = made.with_features(contiguous_faults=True)
    fault = translate(made.memory, made.regs, made.va).fault
    assert (fault is not None) is faults
    if fault:
        assert (fault.type.value, fault.level, fault.cause) == ("translation", level, "Contiguous")


def test_nt_faults_only_for_a_block_on_a_cpu_that_chooses_so() -> None:
    block, page = tree(leaf(0x4000_0000, low=1, nT=1), level=2), tree(leaf(0x4001_0000))  # bit 16 of a page: OA
    assert translate(block.memory, block.regs, block.va).ok
    block = block.with_features(nt_faults=True)
    fault = translate(block.memory, block.regs, block.va).fault
    assert fault is not None
    assert (fault.type.value, fault.level, fault.cause) == ("translation", 2, "nT")
    page = page.with_features(nt_faults=True)
    assert translate(page.memory, page.regs, page.va).ok
    block = block.with_features(nt_faults=True, bbm=0)
    assert translate(block.memory, block.regs, block.va).ok, "nT is FEAT_BBM's"


# Byte order.


@pytest.mark.parametrize("regime", ["EL10", "EL2", "EL3"])
def test_a_big_endian_tree_is_read_byte_swapped(regime: str) -> None:
    made = tree(regime=regime, sctlr_flags={"EE": 1})
    swapped = Words({pa: int.from_bytes(word.to_bytes(8, "little"), "big") for pa, word in made.memory.items()})
    access = Access.read({"EL10": 1, "EL2": 2, "EL3": 3}[regime])
    found = translate(swapped, made.regs, made.va, access)
    assert found.pa == OUT | made.va & 0xFFF
    assert [s.word for s in found.steps] == list(made.memory.values()), "steps show the words as the CPU reads them"
    assert not translate(made.memory, made.regs, made.va, access).ok


# Regimes.


@pytest.mark.parametrize(
    ("el", "flags", "regime"),
    [
        (0, {}, "EL10"),
        (1, {}, "EL10"),
        (2, {}, "EL2"),
        (3, {}, "EL3"),
        (0, {"E2H": 1}, "EL10"),
        (1, {"E2H": 1}, "EL10"),
        (2, {"E2H": 1}, "EL20"),
        (0, {"E2H": 1, "TGE": 1}, "EL20"),
        (2, {"E2H": 1, "TGE": 1}, "EL20"),
        (0, {"TGE": 1}, "EL10"),
        (3, {"E2H": 1, "TGE": 1}, "EL3"),
    ],
)
def test_the_regime_of_an_exception_level(el: int, flags: dict[str, int], regime: str) -> None:
    assert regime_of(Registers(HCR_EL2=hcr(**flags)), el).value == regime


@pytest.mark.parametrize(
    ("regime", "upper"), [("EL10", 0), ("EL10", 1), ("EL20", 0), ("EL20", 1), ("EL2", 0), ("EL3", 0)]
)
def test_each_regime_walks_from_its_own_registers(regime: str, upper: int) -> None:
    made = tree(regime=regime, upper=bool(upper))
    access = Access.read({"EL10": 1, "EL20": 2, "EL2": 2, "EL3": 3}[regime])
    found = translate(made.memory, made.regs, made.va, access)
    assert found.pa == OUT | made.va & 0xFFF
    assert found.params.regime.value == regime
    if regime in ("EL2", "EL3"):  # no upper half: an address with bit 55 is out of range
        fault = translate(made.memory, made.regs, made.va | U64 ^ (1 << 48) - 1, access).fault
        assert fault is not None
        assert fault.cause == "range"


def test_a_regime_may_be_asked_for_by_name() -> None:
    made = tree(regime="EL3")
    assert translate(made.memory, made.regs, made.va, Access.read(), regime=Regime.EL3).ok
    assert not translate(made.memory, made.regs, made.va, Access.read()).ok


# The value that comes back.


def test_a_walk_keeps_its_question_and_its_evidence() -> None:
    made = tree(leaf(AP=2))
    found = translate(made.memory, made.regs, made.va, Access.write())
    assert (found.va, found.access, found.ok) == (made.va, Access.write(), False)
    assert [pa for _, pa, _ in found.raw] == list(made.slots.values())
    assert repr(found) == f"<Walk {made.va:#x} EL1 write: permission fault, level 3>"
    with pytest.raises(ValueError, match=f"^VA {made.va:#x}: permission fault, level 3$"):
        found.pa  # noqa: B018  the property is the test
    passed = translate(made.memory, made.regs, made.va)
    assert passed.fault is None
    assert passed.pa == OUT | made.va & 0xFFF


@pytest.mark.parametrize("va", [-1, 1 << 64])
def test_a_va_that_is_not_64_bits_is_refused(va: int) -> None:
    with pytest.raises(ValueError, match=r"VA .*: must be 64 bits"):
        translate(Words(), Registers(), va)


def test_memory_is_asked_for_nothing_but_the_descriptors() -> None:
    made = tree()
    translate(made.memory, made.regs, made.va)
    assert made.memory.reads == list(made.slots.values())


def test_physical_memory_gives_the_same_walk_as_a_dict_of_words() -> None:
    made = tree()
    memory = PhysicalMemory((ROOT, 4 * TABLE_STEP))
    for pa, word in made.memory.items():
        memory.store(pa, word)
    assert translate(memory, made.regs, made.va).steps == translate(made.memory, made.regs, made.va).steps
    assert isinstance(memory.words(ROOT, 1)[0], np.uint64)
    assert {type(s.word) for s in translate(memory, made.regs, made.va).steps} == {int}
