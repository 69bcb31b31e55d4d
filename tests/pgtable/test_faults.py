"""Fault status codes, ESR_ELx and PAR_EL1 of faults.

Judges: the Arm ARM's tables of DFSC/IFSC (D24.2.40) and of ISS, ISS2 (pseudocode EncodeLDFSC, AArch64.FaultSyndrome),
typed here; a golden ESR that QEMU 11.1 gave for a real store.
"""

from __future__ import annotations

import pytest

from pgtable import Access, AccessType, Fault, FaultType, translate
from pgtable.faults import fault_code
from tests.pgtable.hand import Words, leaf, tcr2, tree

T = FaultType
# Levels -2 (FEAT_D128), -1, 0, 1, 2, 3; a dash where there is no such fault.
ROWS = {
    T.ADDRESS_SIZE: "101100 101001 000000 000001 000010 000011",
    T.TRANSLATION: "101010 101011 000100 000101 000110 000111",
    T.ACCESS_FLAG: "- - 001000 001001 001010 001011",
    T.PERMISSION: "- - 001100 001101 001110 001111",
    T.EXTERNAL_ON_WALK: "010010 010011 010100 010101 010110 010111",
    T.ALIGNMENT: "100001 100001 100001 100001 100001 100001",
    T.TLB_CONFLICT: "110000 110000 110000 110000 110000 110000",
    T.UNSUPPORTED_UPDATE: "110001 110001 110001 110001 110001 110001",
}
CODES = {(t, n - 2): int(c, 2) for t, row in ROWS.items() for n, c in enumerate(row.split()) if c != "-"}


def test_fault_status_codes_are_those_of_the_table() -> None:
    for (type, level), code in CODES.items():
        assert fault_code(type, level) == Fault(type, level).code == code, (type, level)


def test_no_two_faults_share_a_code() -> None:
    leveled = [
        code for (type, _), code in CODES.items() if type not in (T.ALIGNMENT, T.TLB_CONFLICT, T.UNSUPPORTED_UPDATE)
    ]
    assert len(set(leveled)) == len(leveled)
    assert not {0b100001, 0b110000, 0b110001} & set(leveled)


@pytest.mark.parametrize("type", [T.ACCESS_FLAG, T.PERMISSION])
def test_a_fault_that_needs_a_leaf_cannot_be_at_level_minus_one(type: FaultType) -> None:
    with pytest.raises(ValueError, match=f"^a {type.value} fault cannot be at level -1$"):
        fault_code(type, -1)


@pytest.mark.parametrize("type", [T.ADDRESS_SIZE, T.TRANSLATION, T.ACCESS_FLAG, T.PERMISSION, T.EXTERNAL_ON_WALK])
@pytest.mark.parametrize("level", [-3, 4])
def test_there_are_no_other_levels(type: FaultType, level: int) -> None:
    with pytest.raises(ValueError, match=f"{type.value} fault cannot be at level {level}$"):
        fault_code(type, level)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault(T.PERMISSION, 3), "permission fault, level 3"),
        (Fault(T.TRANSLATION, -1), "translation fault, level -1"),
        (Fault(T.EXTERNAL_ON_WALK, 2), "external abort on the walk, level 2"),
        (Fault(T.ALIGNMENT, 3), "alignment fault"),
        (Fault(T.TRANSLATION, 1, stage=2), "translation fault, level 1 (stage 2)"),
    ],
)
def test_a_fault_as_text(fault: Fault, text: str) -> None:
    assert str(fault) == text


# ESR.

IL, CM, WNR, S1PTW = 1 << 25, 1 << 8, 1 << 6, 1 << 7
DIRTY, OVERLAY, GCS = 1 << 37, 1 << 38, 1 << 40
FETCH_LOWER, FETCH_SAME, DATA_LOWER, DATA_SAME = (ec << 26 for ec in (0x20, 0x21, 0x24, 0x25))


@pytest.mark.parametrize(
    ("el", "target", "fetch", "data"),
    [
        (0, None, FETCH_LOWER, DATA_LOWER),
        (1, None, FETCH_SAME, DATA_SAME),
        (2, None, FETCH_SAME, DATA_SAME),
        (3, None, FETCH_SAME, DATA_SAME),
        (0, 2, FETCH_LOWER, DATA_LOWER),
        (1, 2, FETCH_LOWER, DATA_LOWER),
        (2, 2, FETCH_SAME, DATA_SAME),
    ],
)
def test_the_exception_class_says_fetch_or_data_and_from_where(
    el: int, target: int | None, fetch: int, data: int
) -> None:
    fault = Fault(T.TRANSLATION, 2)
    assert fault.esr(Access.fetch(el), target_el=target) == fetch | IL | 0b000110
    assert fault.esr(Access.read(el), target_el=target) == data | IL | 0b000110


def test_an_unprivileged_access_is_from_the_el_that_makes_it() -> None:
    access = Access.write(1, unprivileged=True)
    assert Fault(T.TRANSLATION, 3).esr(access) == DATA_SAME | IL | WNR | 0b000111


@pytest.mark.parametrize(
    ("kind", "before", "permission_read", "permission_write"),
    [
        (AccessType.READ, 0, 0, None),
        (AccessType.WRITE, 1, None, 1),
        (AccessType.ATOMIC, 0, 0, 1),
        (AccessType.AT_READ, 1, 1, None),
        (AccessType.AT_WRITE, 1, None, 1),
        (AccessType.CLEAN, 1, 1, None),
        (AccessType.CLEAN_INVALIDATE, 1, 1, 1),
        (AccessType.INVALIDATE, 1, None, 1),
        (AccessType.GCS_READ, 0, 0, None),
        (AccessType.GCS_WRITE, 1, 0, 1),
    ],
)
def test_wnr(kind: AccessType, before: int, permission_read: int | None, permission_write: int | None) -> None:
    """Before the permission check an atomic counts as a read; maintenance is always reported as a write."""
    access = Access(kind, 1)
    for type in (T.TRANSLATION, T.ADDRESS_SIZE, T.ACCESS_FLAG, T.ALIGNMENT, T.EXTERNAL_ON_WALK):
        assert Fault(type, 3).esr(access) >> 6 & 1 == before, type
    for write, want in ((False, permission_read), (True, permission_write)):
        if want is not None:
            assert Fault(T.PERMISSION, 3, write=write).esr(access) >> 6 & 1 == want


@pytest.mark.parametrize("kind", list(AccessType))
def test_cm_is_set_for_maintenance_and_at_only(kind: AccessType) -> None:
    maintenance = kind.name.startswith("AT_") or kind in (
        AccessType.CLEAN,
        AccessType.CLEAN_INVALIDATE,
        AccessType.INVALIDATE,
    )
    assert bool(Fault(T.TRANSLATION, 3).esr(Access(kind, 1)) & CM) is maintenance
    assert bool(Fault(T.TRANSLATION, 3).esr(Access(kind, 1)) & GCS) is kind.name.startswith("GCS_")


def test_esr_of_a_stage_2_fault_on_a_stage_1_table_has_s1ptw() -> None:
    fault = Fault(T.TRANSLATION, 2, stage=2, s1ptw=True)
    assert fault.esr(Access.read(1), target_el=2) == DATA_LOWER | IL | S1PTW | 0b000110


def test_iss2_says_overlay_and_dirty_state() -> None:
    assert Fault(T.PERMISSION, 3, write=True, overlay=True).esr(Access.write()) == DATA_SAME | IL | WNR | OVERLAY | 0xF
    assert Fault(T.PERMISSION, 3, overlay=True).esr(Access.fetch()) == FETCH_SAME | IL | OVERLAY | 0xF
    assert Fault(T.PERMISSION, 3, write=True, dirty_bit=True).esr(Access.write()) == DATA_SAME | IL | WNR | DIRTY | 0xF


def test_a_store_to_a_clean_indirect_page_gives_the_esr_that_qemu_gave() -> None:
    """QEMU 11.1, a real STR at EL1: permission fault, level 3, WnR, DirtyBit."""
    made = tree(leaf(AP=2), TCR2_EL1=tcr2(PIE=1), PIR_EL1=5)
    found = translate(made.memory, made.regs, made.va, Access.write())
    assert found.fault is not None
    assert found.fault.esr(found.access) == 0x20_9600_004F


@pytest.mark.parametrize(
    ("made", "access", "esr"),
    [
        (tree(0), Access.read(), 0x9600_0007),
        (tree(0), Access.write(), 0x9600_0047),
        (tree(0), Access.read(0), 0x9200_0007),
        (tree(0), Access.fetch(), 0x8600_0007),
        (tree(0), Access.fetch(0), 0x8200_0007),
        (tree(leaf(AF=0)), Access.read(), 0x9600_000B),
        (tree(leaf(AP=2)), Access.write(), 0x9600_004F),
        (tree(leaf(AP=2)), Access.atomic(), 0x9600_004F),
        (tree(leaf(AP=0)), Access.atomic(0), 0x9200_000F),
        (tree(leaf(AP=3)), Access.atomic(0), 0x9200_004F),
        (tree(leaf(AF=0)), Access.atomic(), 0x9600_000B),
        (tree(leaf(UXN=1, AP=1)), Access.fetch(0), 0x8200_000F),
        (tree(leaf(), tables={1: {"APTable": 2}}), Access.write(), 0x9600_004F),
        (tree(leaf(low=1), level=2).with_flipped(1, 1), Access.read(), 0x9600_0005),
        (tree(leaf() | 1 << 45, ps=4), Access.write(), 0x9600_0043),
        (tree(leaf(AttrIndx=1)), Access(AccessType.READ, 1, aligned=False), 0x9600_0021),
        (tree(regime="EL2")._replace(memory=Words()), Access.read(2), 0x9600_0014),
        (tree(0), Access(AccessType.CLEAN, 1), 0x9600_0147),
        (tree(0), Access(AccessType.AT_READ, 1), 0x9600_0147),
    ],
)
def test_esr_of_whole_walks(made, access: Access, esr: int) -> None:
    found = translate(made.memory, made.regs, made.va, access)
    assert found.fault is not None
    assert hex(found.fault.esr(access)) == hex(esr)


# PAR.


@pytest.mark.parametrize(
    ("fault", "par"),
    [
        (Fault(T.TRANSLATION, 3), 0x80F),
        (Fault(T.TRANSLATION, -1), 0x857),
        (Fault(T.PERMISSION, 3), 0x81F),
        (Fault(T.ACCESS_FLAG, 2), 0x815),
        (Fault(T.ADDRESS_SIZE, 0), 0x801),
        (Fault(T.PERMISSION, 3, overlay=True), 0x481F),
        (Fault(T.PERMISSION, 3, dirty_bit=True, write=True), 0x881F),
        (Fault(T.TRANSLATION, 1, stage=2), 0xA0B),
        (Fault(T.TRANSLATION, 1, stage=2, s1ptw=True), 0xB0B),
    ],
)
def test_par_of_a_fault(fault: Fault, par: int) -> None:
    """F, FST in 6:1, PTW 8, S 9, bit 11 is 1, Overlay 14, DirtyBit 15."""
    assert hex(fault.par()) == hex(par)


def test_an_access_has_an_exception_level_of_0_to_3() -> None:
    with pytest.raises(ValueError, match=r"^exception level 4: must be 0, 1, 2 or 3$"):
        Access.read(4)


@pytest.mark.parametrize(
    ("access", "text"),
    [
        (Access.read(), "EL1 read"),
        (Access.write(0), "EL0 write"),
        (Access.read(1, unprivileged=True), "EL1 unprivileged read"),
        (Access.fetch(2), "EL2 fetch"),
        (Access(AccessType.CLEAN_INVALIDATE, 0), "EL0 cache clean and invalidate"),
    ],
)
def test_an_access_as_text(access: Access, text: str) -> None:
    assert str(access) == text
