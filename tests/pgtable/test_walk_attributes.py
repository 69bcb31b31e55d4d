"""What memory an address is, walked end to end: MAIR, shareability, caches off, the MMU off, Secure state.

Judge: Arm ARM D8.6 and the end of the pseudocode's S1Translate, S1DisabledOutput, as values typed here.
"""

from __future__ import annotations

import pytest

from pgtable import Access, AccessType, PhysicalMemory, Registers, Translation, translate
from pgtable.build import TableBuilder
from pgtable.features import CPUS
from pgtable.params import Regime, WalkParams
from pgtable.registers import TCR_EL1
from pgtable.walk import walk
from tests.pgtable.hand import NAMES, OUT, REGIME_EL, Tree, hcr, leaf, tcr, tcr2, tree

ATTRIBUTES = 0x0102_0304_AABB_44FF
NSH, OSH, ISH = 0, 2, 3
SECURE = 0x500 | 1 << 43  # SCR_EL3 with NS = 0


def ask(made: Tree, access: Access | None = None) -> Translation:
    found = translate(made.memory, made.regs, made.va, access)
    assert isinstance(found.result, Translation), found
    return found.result


@pytest.mark.parametrize("index", range(8))
def test_attrindx_picks_a_byte_of_mair(index: int) -> None:
    made = tree(leaf(AttrIndx=index), MAIR_EL1=0x8899_AABB_CCDD_EEFF)
    assert ask(made).attr == (0xFF, 0xEE, 0xDD, 0xCC, 0xBB, 0xAA, 0x99, 0x88)[index]


@pytest.mark.parametrize("regime", ["EL20", "EL2", "EL3"])
def test_each_regime_has_its_own_mair(regime: str) -> None:
    made = tree(leaf(AttrIndx=5), regime=regime, **{NAMES[regime][3]: 0xBB << 40, "MAIR_EL1": 0})
    assert ask(made, Access.read(REGIME_EL[regime])).attr == 0xBB


def test_aie_adds_eight_attributes_by_bit_59() -> None:
    made = tree(leaf(AttrIndx=2, AttrIndx3=1), TCR2_EL1=tcr2(AIE=1), MAIR2_EL1=0xBB << 16)
    assert ask(made).attr == 0xBB
    assert ask(made.with_features(aie=False)).attr == 0x44, "no FEAT_AIE: MAIR_EL1's byte 2"
    monitor = tree(leaf(AttrIndx=2, AttrIndx3=1), regime="EL3", tcr_flags={"AIE": 1}, MAIR2_EL3=0xBB << 16)
    assert ask(monitor, Access.read(3)).attr == 0xBB


@pytest.mark.parametrize(("sh", "shown"), [(0, NSH), (1, 1), (2, OSH), (3, ISH)])
def test_shareability_is_the_leafs_for_cacheable_normal_memory(sh: int, shown: int) -> None:
    assert ask(tree(leaf(SH=sh))).sh == shown
    assert ask(tree(leaf(SH=sh, AttrIndx=1))).sh == OSH, "Device"
    assert ask(tree(leaf(SH=sh, AttrIndx=2))).sh == OSH, "Normal non-cacheable"


@pytest.mark.parametrize(("granule", "from_tcr"), [("4K", True), ("16K", True), ("64K", False)])
def test_with_ds_shareability_comes_from_tcr(granule: str, from_tcr: bool) -> None:
    for n, upper in ((0, False), (1, True)):
        for sh in range(4):
            word = leaf(SH=0 if from_tcr else 2)
            made = tree(word, granule=granule, upper=upper, tcr_flags={"DS": 1}, ps=6)
            field = 12 + 16 * n
            made = made.with_regs(TCR_EL1=made.regs.TCR_EL1 & ~(3 << field) | sh << field)
            assert ask(made).sh == (sh if from_tcr else OSH), (granule, n, sh)


def test_data_caches_off_make_normal_memory_non_cacheable_for_all_but_fetches() -> None:
    made = tree(leaf(AP=2), sctlr_flags={"C": 0})
    for kind in (AccessType.READ, AccessType.AT_READ, AccessType.CLEAN):
        found = ask(made, Access(kind, 1))
        assert (found.attr, found.sh) == (0x44, OSH), kind
    assert ask(made, Access.fetch()).attr == 0xFF
    device = tree(leaf(AttrIndx=3), sctlr_flags={"C": 0})
    assert ask(device).attr == 0x0C


def test_instruction_caches_off_make_fetches_non_cacheable_and_nothing_else() -> None:
    made = tree(leaf(AP=2), sctlr_flags={"I": 0})
    assert ask(made).attr == 0xFF
    found = ask(made, Access.fetch())
    assert (found.attr, found.sh) == (0x44, OSH)


def test_a_fetch_from_device_memory_is_treated_as_non_cacheable() -> None:
    assert ask(tree(leaf(AP=2, AttrIndx=1)), Access.fetch()).attr == 0x44


@pytest.mark.parametrize(("index", "faults"), [(0, False), (1, True), (2, False), (3, True), (4, False)])
def test_an_unaligned_access_faults_on_every_device_type_only(index: int, faults: bool) -> None:
    made = tree(leaf(AttrIndx=index, AP=0))
    for kind in (AccessType.READ, AccessType.WRITE, AccessType.ATOMIC):
        found = translate(made.memory, made.regs, made.va, Access(kind, 1, aligned=False))
        assert found.ok is not faults, kind
    assert translate(made.memory, made.regs, made.va, Access(AccessType.FETCH, 1, aligned=False)).ok


# nG, ASID, the output address space.


@pytest.mark.parametrize(("regime", "shown"), [("EL10", True), ("EL20", True), ("EL2", False), ("EL3", False)])
def test_not_global_means_something_only_where_there_are_asids(regime: str, shown: bool) -> None:
    el = REGIME_EL[regime]
    assert ask(tree(leaf(nG=1), regime=regime), Access.read(el)).nG is shown
    assert ask(tree(leaf(nG=0), regime=regime), Access.read(el)).nG is False


@pytest.mark.parametrize(("a1", "wide", "asid"), [(0, 0, 0x34), (0, 1, 0x1234), (1, 0, 0x78), (1, 1, 0x5678)], ids=str)
def test_the_asid_is_that_of_the_ttbr_that_a1_names(a1: int, wide: int, asid: int) -> None:
    made = tree(tcr_flags={"A1": a1, "AS": wide}, TTBR0_EL1=0x1234 << 48 | 1, TTBR1_EL1=0x5678 << 48)
    lower = WalkParams.of(made.regs, Regime.EL10, 0)
    upper = WalkParams.of(made.regs, Regime.EL10, 1 << 55)
    assert (lower.asid, upper.asid) == (asid, asid)
    assert (lower.cnp, upper.cnp) == (True, False)
    assert WalkParams.of(tree(regime="EL2").regs, Regime.EL2, 0).asid is None


def test_non_secure_state_has_non_secure_outputs() -> None:
    assert ask(tree(leaf(NS=0))).ns
    assert ask(tree(leaf(NS=1))).ns


@pytest.mark.parametrize("level", [None, 0, 2])
@pytest.mark.parametrize("ns", [0, 1])
def test_secure_state_leaves_secure_memory_through_ns_or_nstable(ns: int, level: int | None) -> None:
    tables = {} if level is None else {level: {"NSTable": 1}}
    found = ask(tree(leaf(NS=ns), tables=tables, SCR_EL3=SECURE))
    assert found.ns is (ns == 1 or level is not None)
    assert found.nG is (level is not None), "an entry reached through a Non-secure table is not global"


def test_nstable_means_nothing_in_non_secure_state_and_forces_no_ng_at_el3() -> None:
    assert not ask(tree(tables={1: {"NSTable": 1}})).nG
    found = ask(tree(regime="EL3", tables={1: {"NSTable": 1}}, SCR_EL3=SECURE), Access.read(3))
    assert (found.ns, found.nG) == (True, False)


# The MMU off.


@pytest.mark.parametrize(
    ("access", "instruction_cache", "attr", "sh"),
    [
        (Access.read(), 1, 0x00, OSH),
        (Access.write(), 0, 0x00, OSH),
        (Access(AccessType.AT_READ, 1), 1, 0x00, OSH),
        (Access.fetch(), 1, 0xAA, OSH),
        (Access.fetch(), 0, 0x44, OSH),
    ],
)
def test_with_the_mmu_off_data_is_device_and_code_is_normal(
    access: Access, instruction_cache: int, attr: int, sh: int
) -> None:
    made = tree(va=OUT | 0x123, sctlr_flags={"M": 0, "I": instruction_cache})
    found = ask(made, access)
    assert (found.pa, found.attr, found.sh, found.level, found.nG) == (OUT | 0x123, attr, sh, None, False)
    assert made.memory.reads == []


def test_default_cacheable_switches_stage_1_of_el1_off_and_makes_everything_write_back() -> None:
    made = tree(va=OUT).with_regs(HCR_EL2=hcr(DC=1))
    for access in (Access.read(), Access.fetch(), Access.write(0)):
        found = walk(made.memory.fetch, WalkParams.of(made.regs, Regime.EL10, OUT), OUT, access).result
        assert isinstance(found, Translation)
        assert (found.pa, found.attr, found.sh) == (OUT, 0xFF, NSH)
    host = tree(regime="EL20")
    assert ask(host.with_regs(HCR_EL2=host.regs.HCR_EL2 | 1 << 12), Access.read(2)).level == 3, "EL2 is not touched"


def test_tge_without_e2h_switches_stage_1_of_el1_off() -> None:
    assert ask(tree(va=OUT).with_regs(HCR_EL2=hcr(TGE=1))).level is None


@pytest.mark.parametrize(
    ("flags", "access", "va", "ok"),
    [
        ({}, Access.read(), 1 << 48, False),
        ({}, Access.read(), 1 << 47, True),
        ({}, Access.read(), 0x5A << 56, False),
        ({"TBI0": 1}, Access.read(), 0x5A << 56, True),
        ({"TBI0": 1}, Access.read(), 0x5A << 56 | 1 << 54, False),
        ({"TBI0": 1, "TBID0": 1}, Access.read(), 0x5A << 56, True),
        ({"TBI0": 1, "TBID0": 1}, Access.fetch(), 0x5A << 56, False),
        ({"TBI0": 1}, Access.read(), 1 << 55, False),
    ],
)
def test_with_the_mmu_off_the_address_must_fit_the_cpu(
    flags: dict[str, int], access: Access, va: int, ok: bool
) -> None:
    made = tree(va=0, sctlr_flags={"M": 0}, tcr_flags=flags, cpu=CPUS["max"].replace(pa_bits=48))
    found = translate(made.memory, made.regs, va, access)
    assert found.ok is ok
    if found.fault:
        assert (found.fault.type.value, found.fault.level, found.fault.cause) == ("address size", 0, "VA")
    else:
        assert found.pa == va & (1 << 48) - 1


def test_with_the_mmu_off_tcr_ps_limits_nothing() -> None:
    made = tree(va=0, ps=0, sctlr_flags={"M": 0})
    assert translate(made.memory, made.regs, 1 << 47).ok
    assert tcr(ps=0) >> 32 & 7 == 0


@pytest.mark.parametrize(("regime", "el"), [("EL20", 2), ("EL2", 2), ("EL3", 3)])
def test_each_regime_has_its_own_mmu_switch(regime: str, el: int) -> None:
    made = tree(va=OUT, regime=regime, sctlr_flags={"M": 0})
    assert ask(made, Access.read(el)).level is None
    assert ask(tree(regime=regime, SCTLR_EL1=0), Access.read(el)).level == 3


def test_a_translation_tells_its_attributes_and_whether_the_page_is_guarded() -> None:
    memory = PhysicalMemory((0x4000_0000, 0x10_0000))
    tables = TableBuilder(memory, (0x4000_0000, 0x10_0000))
    tables.map(0, 0x8000_0000, 0x1000, GP=1, AttrIndx=1)
    tables.map(0x1000, 0x8000_1000, 0x1000)
    regs = Registers(TTBR0_EL1=tables.root, TCR_EL1=TCR_EL1.pack(T0SZ=16, IPS=5), MAIR_EL1=0xF0FF)
    guarded, plain = (translate(memory, regs, va).result for va in (0, 0x1000))
    assert isinstance(guarded, Translation)
    assert isinstance(plain, Translation)
    assert (guarded.guarded, plain.guarded) == (True, False)
    assert (guarded.attributes.tagged, plain.attributes.tagged) == (True, False)
    assert (guarded.attributes.type, plain.attributes.inner) == ("Normal", "write-back read/write-allocate")
