"""AT instructions and PAR_EL1. Judge: Arm ARM C5.4 and the pseudocode AArch64.AT, EncodePAR, as values typed here."""

from __future__ import annotations

import pytest

from pgtable import Access, ExternalAbort, Registers, at, at_walk, translate
from pgtable.at import OPERATIONS
from pgtable.registers import PAR_FAULT
from tests.pgtable.hand import MAIR, Tree, Words, hcr, leaf, tcr2, tree

FAULT_L3 = 0x81F  # permission fault, level 3
NSE, NS = 1 << 11, 1 << 9


def par(made: Tree, operation: str) -> int:
    return at(made.memory, made.regs, operation, made.va)


@pytest.mark.parametrize(
    ("word", "attr", "sh"),
    [
        (leaf(0x8765_4000), 0xFF, 3),
        (leaf(0x8765_4000, SH=2), 0xFF, 2),
        (leaf(0x8765_4000, SH=0), 0xFF, 0),
        (leaf(0x8765_4000, AttrIndx=1), 0x00, 2),
        (leaf(0x8765_4000, AttrIndx=2), 0x44, 2),
        (leaf(0x8765_4000, AttrIndx=3), 0x0C, 2),
        (leaf(0x8765_4000, AttrIndx=4), 0xBB, 3),
    ],
)
def test_par_of_a_translation_has_address_attributes_and_shareability(word: int, attr: int, sh: int) -> None:
    assert MAIR == 0xBB_0C44_00FF
    assert par(tree(word), "S1E1R") == attr << 56 | 0x8765_4000 | NSE | NS | sh << 7


def test_par_has_the_address_at_4k_resolution_whatever_the_page_size() -> None:
    block = tree(leaf(0x4020_0000, low=1), level=2, va=0x1234_5678)
    assert par(block, "S1E1R") & 0x000F_FFFF_FFFF_F000 == 0x4034_5000
    big = tree(leaf(0x8000_0000) | 0xA000, granule="64K", ps=6, va=0x1234_5678)
    assert par(big, "S1E1R") & 0x000F_FFFF_FFFF_F000 == 0x000A_0000_8000_5000


def test_par_of_secure_state_says_ns() -> None:
    secure = {"SCR_EL3": 0x500 | 1 << 43}
    assert not par(tree(leaf(NS=0), **secure), "S1E1R") & NS
    assert par(tree(leaf(NS=1), **secure), "S1E1R") & NS


# Who asks, for what.

USER_RW, KERNEL_RO, USER_RO = leaf(AP=1), leaf(AP=2), leaf(AP=3)


@pytest.mark.parametrize(
    ("operation", "word", "pan", "ok"),
    [
        ("S1E1R", KERNEL_RO, 0, True),
        ("S1E1W", KERNEL_RO, 0, False),
        ("S1E0R", KERNEL_RO, 0, False),
        ("S1E0R", USER_RO, 0, True),
        ("S1E0W", USER_RO, 0, False),
        ("S1E0W", USER_RW, 1, True),
        ("S1E1R", USER_RW, 1, True),
        ("S1E1W", USER_RW, 1, True),
        ("S1E1RP", USER_RW, 0, True),
        ("S1E1RP", USER_RW, 1, False),
        ("S1E1WP", USER_RW, 0, True),
        ("S1E1WP", USER_RW, 1, False),
        ("S1E1WP", leaf(AP=0), 1, True),
        ("S1E1RP", leaf(AP=0), 1, True),
        ("S1E1A", leaf(AP=2, PXN=1), 1, True),
        ("S12E1R", KERNEL_RO, 0, True),
        ("S12E1W", KERNEL_RO, 0, False),
        ("S12E0R", KERNEL_RO, 0, False),
        ("S12E0W", USER_RW, 0, True),
    ],
)
def test_each_operation_checks_its_own_permission(operation: str, word: int, pan: int, ok: bool) -> None:
    found = par(tree(word, PAN=pan), operation)
    assert found & 1 == (not ok)
    if not ok:
        assert found == FAULT_L3


def test_uao_and_execution_rights_are_nothing_to_at() -> None:
    made = tree(leaf(AP=0, UXN=1, PXN=1), UAO=1, sctlr_flags={"WXN": 1})
    assert par(made, "S1E0R") == FAULT_L3
    assert not par(made, "S1E1R") & 1


def test_s1e1a_meets_every_fault_but_permission() -> None:
    assert not par(tree(leaf(AP=0), TCR2_EL1=tcr2(PIE=1), PIR_EL1=0), "S1E1A") & 1
    assert par(tree(leaf(AF=0)), "S1E1A") == 0x817
    assert par(tree(0), "S1E1A") == 0x80F
    assert par(tree(leaf(1 << 45), ps=4), "S1E1A") == 0x807


def test_at_sees_epd_e0pd_and_range_at_level_0() -> None:
    level_0 = 0x809
    assert par(tree(USER_RW, tcr_flags={"E0PD0": 1}), "S1E0R") == level_0
    assert not par(tree(USER_RW, tcr_flags={"E0PD0": 1}), "S1E1R") & 1
    assert par(tree(tcr_flags={"EPD0": 1}), "S1E1R") == level_0
    made = tree()
    assert par(made._replace(va=made.va | 1 << 50), "S1E1R") == level_0


def test_par_says_overlay_and_dirty_state() -> None:
    overlaid = tree(leaf(POIndex=1), TCR2_EL1=tcr2(POE=1), POR_EL1=7)
    assert par(overlaid, "S1E1R") == FAULT_L3 | 1 << 14
    clean = tree(leaf(AP=2), TCR2_EL1=tcr2(PIE=1), PIR_EL1=5)
    assert par(clean, "S1E1W") == FAULT_L3 | 1 << 15
    assert not par(clean, "S1E1R") & 1


# Regimes.


@pytest.mark.parametrize(
    ("operation", "flags", "regime"),
    [
        ("S1E1R", {}, "EL10"),
        ("S1E0R", {}, "EL10"),
        ("S1E1R", {"E2H": 1}, "EL10"),
        ("S1E0R", {"E2H": 1}, "EL10"),
        ("S1E1R", {"E2H": 1, "TGE": 1}, "EL20"),
        ("S1E1WP", {"E2H": 1, "TGE": 1}, "EL20"),
        ("S1E1A", {"E2H": 1, "TGE": 1}, "EL20"),
        ("S1E0R", {"E2H": 1, "TGE": 1}, "EL20"),
        ("S1E2R", {}, "EL2"),
        ("S1E2W", {"E2H": 1}, "EL20"),
        ("S1E2A", {"E2H": 1, "TGE": 1}, "EL20"),
        ("S1E3R", {"E2H": 1, "TGE": 1}, "EL3"),
        ("S1E3A", {}, "EL3"),
        ("S12E1R", {}, "EL10"),
        ("S12E1R", {"E2H": 1, "TGE": 1}, "EL20"),
    ],
)
def test_the_regime_that_an_operation_asks(operation: str, flags: dict[str, int], regime: str) -> None:
    made = tree(USER_RW, regime=regime)
    found = at_walk(made.memory, made.regs.replace(HCR_EL2=hcr(**flags)), operation, made.va)
    assert found.ok
    assert found.params.regime.value == regime


@pytest.mark.parametrize("flags", [{"VM": 1}, {"DC": 1}, {"VM": 1, "E2H": 1}])
def test_s12_operations_with_stage_2_on_ask_stage_2(flags: dict[str, int]) -> None:
    made = tree().with_regs(HCR_EL2=hcr(**flags))
    found = PAR_FAULT.view(par(made, "S12E1R"))  # VTCR_EL2.T0SZ = 0 is out of range
    assert (1, 1, 4, "DC" not in flags) == (found.F, found.S, found.FST, found.PTW)
    host = tree(regime="EL20").with_regs(HCR_EL2=hcr(VM=1, E2H=1, TGE=1))
    assert not par(host, "S12E1R") & 1, "the host has no stage 2"


def test_there_are_seventeen_operations_and_no_other() -> None:
    assert set(OPERATIONS) == (
        {f"S1E{el}{x}" for el in (1, 2, 3) for x in "RWA"} | {"S1E0R", "S1E0W", "S1E1RP", "S1E1WP"}
    ) | {f"S12E{el}{x}" for el in (0, 1) for x in "RW"}
    for name in ("S1E0A", "S1E4R", "s1e1r", ""):
        with pytest.raises(ValueError, match=f"^AT {name}: must be one of S1E0R, "):
            par(tree(), name)


# Exceptions, memory.


def test_an_external_abort_on_the_walk_is_an_exception_with_its_syndrome() -> None:
    made = tree()
    made = made._replace(memory=Words({pa: made.memory[pa] for level, pa in made.slots.items() if level != 2}))
    with pytest.raises(
        ExternalAbort, match=r"^AT of 0x[0-9a-f]+ takes an exception: external abort .*, level 2$"
    ) as found:
        par(made, "S1E1R")
    assert found.value.esr == 0x9600_0156  # CM and WnR, whichever the operation
    assert found.value.walk.raw[-1][0] == 1


def test_at_reads_descriptors_and_writes_nothing() -> None:
    made = tree(leaf(AF=0, AP=2, DBM=1), tcr_flags={"HA": 1, "HD": 1})
    before = dict(made.memory)
    for operation in ("S1E1R", "S1E1W"):
        assert not at(made.memory, made.regs, operation, made.va, made.memory.swap) & 1
    assert made.memory == before


def test_at_with_the_mmu_off_gives_the_address_as_device_memory() -> None:
    made = tree(va=0x8765_4321, sctlr_flags={"M": 0})
    assert par(made, "S1E1R") == 0x8765_4000 | NSE | NS | 2 << 7


def test_at_reports_data_caches_off() -> None:
    assert par(tree(leaf(0x8765_4000), sctlr_flags={"C": 0}), "S1E1R") >> 56 == 0x44


def test_at_ignores_the_tag_that_data_accesses_ignore() -> None:
    made = tree(tcr_flags={"TBI0": 1, "TBID0": 1})
    assert not par(made._replace(va=made.va | 0x5A << 56), "S1E1R") & 1


def test_at_and_a_load_meet_the_same_fault() -> None:
    for made in (tree(0), tree(leaf(AF=0)), tree(leaf(AP=1), PAN=1)):
        load = translate(made.memory, made.regs, made.va, Access.read())
        assert load.fault is not None
        if load.fault.type.value == "permission":
            assert par(made, "S1E1RP") == load.fault.par()
        else:
            assert par(made, "S1E1R") == load.fault.par()


def test_an_empty_register_file_with_no_memory_is_an_external_abort() -> None:
    with pytest.raises(ExternalAbort):
        at(Words(), Registers(TCR_EL1=16), "S1E1R", 0)
