"""Who may do what with a page, walked end to end: tables, WXN, PAN, UAO, E0PD, TBI, indirect permissions, overlays.

Judge: the sentences of test_permissions.py (Arm ARM D8.4) on fields put into descriptors and registers by hand.
"""

from __future__ import annotations

import random
from itertools import product

import pytest

from pgtable import Access, AccessType, Fault, Translation, translate, translate_many
from pgtable.mmu import branch_target
from pgtable.permissions import ALL, PG, PR, PW, PX, UG, UR, UW, UX
from tests.pgtable.hand import OUT, U64, Tree, leaf, tcr2, tree
from tests.pgtable.test_permissions import (
    NO_OVERLAY,
    PIR,
    POR,
    combined,
    direct_one_level,
    direct_two_levels,
    indirect,
    pan_bites,
    without_wxn,
)

DATA = ALL & ~(PG | UG)
NEEDS = {AccessType.READ: "r", AccessType.WRITE: "w", AccessType.ATOMIC: "rw", AccessType.FETCH: "x"}

GCS = {AccessType.GCS_READ: "g", AccessType.GCS_WRITE: "g"}


def passes(made: Tree, access: Access) -> bool:
    return translate(made.memory, made.regs, made.va, access).ok


def fault_of(made: Tree, access: Access) -> Fault:
    found = translate(made.memory, made.regs, made.va, access)
    assert isinstance(found.result, Fault)
    return found.result


def result_of(made: Tree, access: Access | None = None) -> Translation:
    found = translate(made.memory, made.regs, made.va, access)
    assert isinstance(found.result, Translation), found
    return found.result


# Direct permissions, whole.


def test_direct_permissions_of_random_trees_equal_the_sentences(rng: random.Random) -> None:
    for _ in range(600):
        fields = {n: rng.getrandbits(w) for n, w in (("AP", 2), ("UXN", 1), ("PXN", 1), ("GP", 1), ("nG", 1))}
        tables = {
            at: {
                n: rng.choice((0, 0, rng.getrandbits(w))) for n, w in (("APTable", 2), ("UXNTable", 1), ("PXNTable", 1))
            }
            for at in (0, 1, 2)
        }
        wxn, epan, pan, hpd, upper = (rng.getrandbits(1) for _ in range(5))
        made = tree(
            leaf(**fields),
            **{"tables": tables, "upper": bool(upper), "tcr_flags": {f"HPD{upper}": hpd}},
            **{"sctlr_flags": {"WXN": wxn, "EPAN": epan}, "PAN": pan},
        )
        limits = {"APTable": 0, "UXNTable": 0, "PXNTable": 0}
        for at in (0, 1, 2) if not hpd else ():
            limits = {n: limits[n] | tables[at][n] for n in limits}
        base = direct_two_levels(
            bool(fields["AP"] & 2),
            bool(fields["AP"] & 1),
            bool(limits["APTable"] & 1),
            bool(limits["APTable"] & 2),
            bool(fields["UXN"] or limits["UXNTable"]),
            bool(fields["PXN"] or limits["PXNTable"]),
        )
        privileged, unprivileged = without_wxn(base) if wxn else base
        refused = pan and pan_bites(base[1], bool(epan))
        for kind, el in product(NEEDS, (0, 1)):
            granted = (
                unprivileged if el == 0 else privileged - ({"r", "w"} if refused and kind.value != "fetch" else set())
            )
            assert passes(made, Access(kind, el)) is (set(NEEDS[kind]) <= granted), (kind, el, fields, limits, wxn, pan)


@pytest.mark.parametrize(("regime", "el"), [("EL2", 2), ("EL3", 3)])
def test_direct_permissions_of_one_level_regimes_ignore_what_is_el0s(regime: str, el: int, rng: random.Random) -> None:
    for _ in range(200):
        fields = {n: rng.getrandbits(w) for n, w in (("AP", 2), ("XN", 1), ("PXN", 1))}
        table = {n: rng.getrandbits(w) for n, w in (("APTable", 2), ("XNTable", 1), ("PXNTable", 1))}
        wxn = rng.getrandbits(1)
        made = tree(
            leaf(**fields), regime=regime, tables={rng.choice((0, 1, 2)): table}, sctlr_flags={"WXN": wxn}, PAN=1
        )
        base = direct_one_level(
            bool(fields["AP"] & 2), bool(table["APTable"] & 2), bool(fields["XN"] | table["XNTable"])
        )
        granted, _ = without_wxn(base) if wxn else base
        for kind in NEEDS:
            assert passes(made, Access(kind, el)) is (set(NEEDS[kind]) <= granted), (kind, fields, table, wxn)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(
    ("fields", "word", "access"),
    [
        ({"APTable": 1}, leaf(AP=1), Access.read(0)),
        ({"APTable": 2}, leaf(AP=1), Access.write(0)),
        ({"APTable": 2}, leaf(AP=0), Access.write(1)),
        ({"UXNTable": 1}, leaf(AP=3), Access.fetch(0)),
        ({"PXNTable": 1}, leaf(AP=2), Access.fetch(1)),
    ],
    ids=["APTable[0]", "APTable[1] EL0", "APTable[1] EL1", "UXNTable", "PXNTable"],
)
def test_a_table_attribute_limits_what_is_below_at_every_level(
    level: int, fields: dict[str, int], word: int, access: Access
) -> None:
    assert passes(tree(word), access)
    limited = tree(word, tables={level: fields})
    fault = fault_of(limited, access)
    assert (fault.type.value, fault.level) == ("permission", 3)
    assert passes(limited.with_regs(TCR_EL1=limited.regs.TCR_EL1 | 1 << 41), access), "HPD0"
    assert not passes(limited.with_regs(TCR_EL1=limited.regs.TCR_EL1 | 1 << 42), access), "HPD1 is the other half's"
    old = limited.with_features(hpds=False)
    assert not passes(old.with_regs(TCR_EL1=old.regs.TCR_EL1 | 1 << 41), access), "no FEAT_HPDS"


def test_a_table_that_takes_el0_writes_away_gives_el1_execution_back() -> None:
    """The implicit PXN looks at what EL0 may write after APTable."""
    assert not passes(tree(leaf(AP=1)), Access.fetch(1))
    assert passes(tree(leaf(AP=1), tables={1: {"APTable": 1}}), Access.fetch(1))
    assert passes(tree(leaf(AP=1), tables={1: {"APTable": 2}}), Access.fetch(1))


def test_wxn_takes_execution_from_each_level_that_may_write() -> None:
    both, wxn = tree(leaf(AP=1)), tree(leaf(AP=1), sctlr_flags={"WXN": 1})
    assert passes(both, Access.fetch(0))
    assert not passes(wxn, Access.fetch(0))
    assert passes(tree(leaf(AP=3), sctlr_flags={"WXN": 1}), Access.fetch(0))
    assert passes(tree(leaf(AP=2), sctlr_flags={"WXN": 1}), Access.fetch(1))
    hyp = tree(regime="EL2", sctlr_flags={"WXN": 1})
    assert not passes(hyp, Access.fetch(2))
    assert passes(hyp, Access.write(2))


# PAN, EPAN, UAO, unprivileged accesses.


@pytest.mark.parametrize("kind", [AccessType.READ, AccessType.WRITE, AccessType.ATOMIC])
def test_pan_refuses_privileged_data_accesses_to_what_el0_can_reach(kind: AccessType) -> None:
    made = tree(leaf(AP=1), PAN=1)
    assert fault_of(made, Access(kind, 1)).type.value == "permission"
    assert passes(made, Access(kind, 0)), "EL0 itself"
    assert passes(made, Access(kind, 1, pan=False)), "the access says what PSTATE.PAN is"
    assert passes(tree(leaf(AP=0), PAN=1), Access(kind, 1)), "EL0 cannot reach it"
    assert passes(made.with_regs(PAN=0), Access(kind, 1))
    assert not passes(made.with_regs(PAN=0), Access(kind, 1, pan=True))
    assert passes(made.with_features(pan=0), Access(kind, 1)), "no FEAT_PAN"


def test_pan_does_not_touch_fetches_maintenance_or_plain_at() -> None:
    made = tree(leaf(AP=3, PXN=0), PAN=1)
    for kind in (AccessType.FETCH, AccessType.CLEAN, AccessType.AT_READ, AccessType.AT_ANY):
        assert passes(made, Access(kind, 1)), kind
    writable = tree(leaf(AP=1), PAN=1)
    assert passes(writable, Access(AccessType.INVALIDATE, 1))
    assert passes(writable, Access(AccessType.AT_WRITE, 1))


def test_epan_counts_pages_that_el0_may_only_execute() -> None:
    made = tree(leaf(AP=0, UXN=0), PAN=1, sctlr_flags={"EPAN": 1})
    assert not passes(made, Access.read())
    assert passes(made.with_regs(SCTLR_EL1=made.regs.SCTLR_EL1 ^ 1 << 57), Access.read()), "EPAN off"
    assert passes(made.with_features(pan=2), Access.read()), "no FEAT_PAN3"
    assert passes(tree(leaf(AP=0, UXN=1), PAN=1, sctlr_flags={"EPAN": 1}), Access.read())


def test_pan_of_el2_counts_only_in_its_host_regime() -> None:
    host = tree(leaf(AP=1), regime="EL20", PAN=1)
    assert not passes(host, Access.read(2))
    assert passes(tree(leaf(AP=1), regime="EL2", PAN=1), Access.read(2))


def test_unprivileged_accesses_are_checked_as_el0s() -> None:
    user, kernel = tree(leaf(AP=1), PAN=1), tree(leaf(AP=0))
    ldtr, sttr = Access.read(1, unprivileged=True), Access.write(1, unprivileged=True)
    assert passes(user, ldtr)
    assert passes(user, sttr)
    assert not passes(kernel, ldtr)
    assert passes(kernel, Access.read(1))
    assert passes(kernel, Access.read(1, unprivileged=True, uao=True)), "PSTATE.UAO"
    assert passes(kernel.with_regs(UAO=1), ldtr)
    assert not passes(kernel.with_regs(UAO=1), Access.read(1, unprivileged=True, uao=False))
    assert not passes(kernel.with_regs(UAO=1).with_features(uao=False), ldtr), "no FEAT_UAO"


@pytest.mark.parametrize(("regime", "el", "tge", "unprivileged"), [("EL20", 2, 1, True), ("EL20", 2, 0, False)])
def test_el2_has_unprivileged_accesses_only_as_the_host_of_el0(
    regime: str, el: int, tge: int, unprivileged: bool
) -> None:
    made = tree(leaf(AP=0), regime=regime)
    made = made.with_regs(HCR_EL2=made.regs.HCR_EL2 | tge << 27)
    assert passes(made, Access.read(el, unprivileged=True)) is not unprivileged


def test_el3_has_no_unprivileged_accesses() -> None:
    assert passes(tree(leaf(AP=0), regime="EL3"), Access.read(3, unprivileged=True))


def test_e0pd_keeps_el0_and_unprivileged_accesses_out_of_its_half() -> None:
    made = tree(leaf(AP=1), tcr_flags={"E0PD0": 1})
    for access in (Access.read(0), Access.fetch(0), Access.read(1, unprivileged=True), Access(AccessType.AT_READ, 0)):
        assert fault_of(made, access)[:2] == fault_of(tree(tcr_flags={"EPD0": 1}), Access.read())[:2]
        assert fault_of(made, access).cause == "E0PD"
    assert passes(made, Access.read(1))
    assert passes(made, Access.read(1, unprivileged=True, uao=True))
    assert passes(tree(leaf(AP=1), tcr_flags={"E0PD1": 1}), Access.read(0)), "the other half's"
    assert passes(made.with_features(e0pd=False), Access.read(0))
    upper = tree(leaf(AP=1), upper=True, tcr_flags={"E0PD1": 1})
    assert fault_of(upper, Access.read(0)).cause == "E0PD"


def test_epd_switches_one_half_off() -> None:
    lower, upper = tree(tcr_flags={"EPD1": 1}), tree(upper=True, tcr_flags={"EPD0": 1})
    assert passes(lower, Access.read())
    assert passes(upper, Access.read())
    assert fault_of(tree(upper=True, tcr_flags={"EPD1": 1}), Access.read()).cause == "EPD"
    assert fault_of(tree(regime="EL20", tcr_flags={"EPD0": 1}), Access.read(2)).cause == "EPD"


# Tags.


@pytest.mark.parametrize("upper", [False, True], ids=["lower", "upper"])
def test_tbi_ignores_the_top_byte_of_its_half_and_tbid_gives_it_back_to_fetches(upper: bool) -> None:
    n = int(upper)
    for tbi, tbid, other in product((0, 1), repeat=3):
        made = tree(upper=upper, tcr_flags={f"TBI{n}": tbi, f"TBID{n}": tbid, f"TBI{1 - n}": other})
        tagged = made._replace(va=made.va ^ 0x5A << 56)
        assert passes(tagged, Access.read()) is bool(tbi)
        assert passes(tagged, Access(AccessType.AT_READ, 1)) is bool(tbi)
        assert passes(tagged, Access(AccessType.CLEAN, 1)) is bool(tbi)
        assert passes(tagged, Access.fetch()) is bool(tbi and not tbid)
        no_pauth = tagged.with_features(pauth=False)
        assert passes(no_pauth, Access.fetch()) is bool(tbi), "TBID is FEAT_PAuth's"


def test_bit_55_chooses_the_half_under_a_tag() -> None:
    made = tree(tcr_flags={"TBI0": 1, "TBI1": 1})
    assert passes(made._replace(va=made.va | 0xFF << 56), Access.read())
    assert fault_of(made._replace(va=made.va | 1 << 55), Access.read()).cause == "range"


def test_one_level_regimes_have_one_tbi() -> None:
    made = tree(regime="EL2", tcr_flags={"TBI": 1, "TBID": 1})
    tagged = made._replace(va=made.va | 0x80 << 56)
    assert passes(tagged, Access.read(2))
    assert not passes(tagged, Access.fetch(2))


@pytest.mark.parametrize(
    ("regime", "el", "flags", "va", "target"),
    [
        ("EL10", 1, {}, 0x5A00_1234_5678_9ABC, 0x5A00_1234_5678_9ABC),
        ("EL10", 1, {"TBI0": 1}, 0x5A00_1234_5678_9ABC, 0x0000_1234_5678_9ABC),
        ("EL10", 1, {"TBI0": 1, "TBID0": 1}, 0x5A00_1234_5678_9ABC, 0x5A00_1234_5678_9ABC),
        ("EL10", 0, {"TBI1": 1}, 0x5AFF_1234_5678_9ABC, 0xFFFF_1234_5678_9ABC),
        ("EL10", 1, {"TBI0": 1}, 0x5AFF_1234_5678_9ABC, 0x5AFF_1234_5678_9ABC),
        ("EL20", 2, {"TBI1": 1}, 0x5AFF_1234_5678_9ABC, 0xFFFF_1234_5678_9ABC),
        ("EL2", 2, {"TBI": 1}, 0x5AFF_1234_5678_9ABC, 0x00FF_1234_5678_9ABC),
        ("EL3", 3, {"TBI": 1}, 0x5A00_1234_5678_9ABC, 0x0000_1234_5678_9ABC),
        ("EL3", 3, {"TBI": 1, "TBID": 1}, 0x5A00_1234_5678_9ABC, 0x5A00_1234_5678_9ABC),
    ],
)
def test_a_branch_replaces_an_ignored_tag(regime: str, el: int, flags: dict[str, int], va: int, target: int) -> None:
    """Pseudocode AArch64.BranchAddr: copies of bit 55 where there is an upper half, zeros elsewhere."""
    assert branch_target(tree(regime=regime, tcr_flags=flags).regs, va, el) == target


# Indirect permissions.


def indirect_tree(index: int, pir: int, pire0: int, *, ndirty: int = 0, **more: object) -> Tree:
    fields = {"AP": ndirty << 1 | index & 1, "DBM": index >> 1 & 1, "PXN": index >> 2 & 1, "UXN": index >> 3 & 1}
    return tree(leaf(**fields), TCR2_EL1=tcr2(PIE=1), PIR_EL1=pir, PIRE0_EL1=pire0, **more)


def test_indirect_permissions_of_random_pages_equal_the_encodings(rng: random.Random) -> None:
    for _ in range(400):
        index, pir, pire0 = rng.getrandbits(4), rng.getrandbits(64), rng.getrandbits(64)
        pan, wxn, epan, aptable = (rng.getrandbits(1) for _ in range(4))
        made = indirect_tree(
            *(index, pir, pire0),
            tables={1: {"APTable": 3 * aptable, "UXNTable": aptable, "PXNTable": aptable}},
            sctlr_flags={"WXN": wxn, "EPAN": epan},
            PAN=pan,
        )
        nibbles = pir >> 4 * index & 15, pire0 >> 4 * index & 15
        granted = list(indirect(*nibbles))
        for i, nibble in enumerate(nibbles):
            granted[i] = granted[i] - {"x"} if nibble == 0b0110 else granted[i]
        for kind, el in product((*NEEDS, *GCS), (0, 1)):
            rights = granted[1] if el == 0 else granted[0]
            if pan and el == 1 and kind is not AccessType.FETCH and PIR[nibbles[1]]:
                rights = rights - {"r", "w"}
            assert passes(made, Access(kind, el)) is (set((NEEDS | GCS)[kind]) <= rights), (kind, el, nibbles, pan)


def test_a_clean_page_refuses_writes_unless_hardware_manages_the_dirty_state() -> None:
    made = indirect_tree(0, 5, 0, ndirty=1)
    fault = fault_of(made, Access.write())
    assert (fault.type.value, fault.write, fault.dirty_bit, fault.overlay) == ("permission", True, True, False)
    assert passes(made, Access.read())
    assert passes(indirect_tree(0, 5, 0, ndirty=1, tcr_flags={"HA": 1, "HD": 1}), Access.write())
    assert not passes(indirect_tree(0, 5, 0, ndirty=1, tcr_flags={"HA": 1}), Access.write())
    assert not passes(made, Access(AccessType.AT_WRITE, 1)), "AT S1E1W too"
    assert passes(indirect_tree(0, 5, 0), Access.write())


@pytest.mark.parametrize(
    ("cpu", "registers"),
    [({"pie": False}, {}), ({"tcr2": False}, {}), ({}, {"SCR_EL3": 0x501})],
    ids=["no FEAT_S1PIE", "no FEAT_TCR2", "SCR_EL3.TCR2En=0"],
)
def test_without_tcr2_or_pie_permissions_are_direct(cpu: dict[str, bool], registers: dict[str, int]) -> None:
    made = indirect_tree(0, 0, 0)
    assert not passes(made, Access.read())
    assert passes(made.with_features(**cpu).with_regs(**registers), Access.read())


@pytest.mark.parametrize(
    ("regime", "el", "registers", "flags"),
    [
        ("EL2", 2, {"TCR2_EL2": tcr2(PIE=1), "PIR_EL2": 5}, {}),
        ("EL3", 3, {"PIR_EL3": 5}, {"PIE": 1}),
        ("EL20", 2, {"TCR2_EL2": tcr2(PIE=1), "PIR_EL2": 5, "PIRE0_EL2": 0}, {}),
    ],
)
def test_each_regime_has_its_own_pir(regime: str, el: int, registers: dict[str, int], flags: dict[str, int]) -> None:
    made = tree(regime=regime, tcr_flags=flags, **registers)
    assert passes(made, Access.write(el))
    assert not passes(made, Access.fetch(el))


@pytest.mark.parametrize("kind", GCS)
def test_only_indirect_permissions_make_guarded_control_stacks(kind: AccessType) -> None:
    for ap in range(4):
        assert fault_of(tree(leaf(AP=ap)), Access(kind, 1)).type.value == "permission"
    made = indirect_tree(0, 9, 0, PAN=1)
    assert passes(made, Access(kind, 1))
    assert not passes(made, Access.write())
    assert not passes(made, Access(kind, 0))


# Overlays.


def test_overlays_on_direct_and_indirect_pages_equal_the_sentences(rng: random.Random) -> None:
    for _ in range(600):
        pie, wxn, poe, e0poe = (rng.getrandbits(1) for _ in range(4))
        index, po = rng.getrandbits(4), rng.getrandbits(3)
        pir, pire0, por, por0 = (rng.getrandbits(64) for _ in range(4))
        fields = {"AP": index & 1, "DBM": index >> 1 & 1, "PXN": index >> 2 & 1, "UXN": index >> 3 & 1, "POIndex": po}
        made = tree(
            leaf(**fields),
            **{"TCR2_EL1": tcr2(PIE=pie, POE=poe, E0POE=e0poe), "PIR_EL1": pir, "PIRE0_EL1": pire0},
            **{"POR_EL1": por, "POR_EL0": por0, "sctlr_flags": {"WXN": wxn}},
        )
        nibbles = pir >> 4 * index & 15, pire0 >> 4 * index & 15
        if pie:
            base = indirect(*nibbles)
        else:
            base = direct_two_levels(False, bool(index & 1), False, False, bool(index >> 3), bool(index >> 2 & 1))
        for kind, el in product(NEEDS, (0, 1)):
            side = 1 if el == 0 else 0
            wxn_here = nibbles[side] == 0b0110 if pie else bool(wxn) and {"w", "x"} <= base[side]
            applies = bool((e0poe, poe)[el]) and not (pie and nibbles[side] in NO_OVERLAY)
            overlay = POR[(por0, por)[el] >> 4 * po & 15]
            granted, left = combined(base[side], overlay, wxn=wxn_here, applies=applies)
            found = translate(made.memory, made.regs, made.va, Access(kind, el))
            need = set(NEEDS[kind])
            where = (kind, el, pie, wxn, poe, e0poe, index, nibbles)
            assert found.ok is (need <= granted & left), where
            if found.fault:
                assert found.fault.overlay is not (need <= left), where


def test_an_overlay_switches_table_attributes_off() -> None:
    """HPD is RES1 with overlays (Arm ARM R_BVXDG)."""
    made = tree(leaf(), tables={0: {"APTable": 2}}, TCR2_EL1=tcr2(POE=1), POR_EL1=5)
    assert passes(made, Access.write())
    assert not passes(made.with_regs(TCR2_EL1=0), Access.write())


def test_pan_takes_the_write_that_wxn_looks_at_before_wxn_takes_the_overlays() -> None:
    """S1DirectBasePermissions: wxn is WXN AND w AND x after PAN, so with PAN the overlay keeps its write."""
    made = tree(leaf(AP=0, UXN=0), TCR2_EL1=tcr2(POE=1), POR_EL1=7, PAN=1, sctlr_flags={"WXN": 1, "EPAN": 1})
    fault = fault_of(made, Access.write())
    assert (fault.overlay, fault.write) == (False, True)
    assert fault_of(made.with_regs(POR_EL1=3), Access.write()).overlay, "an overlay that refuses by itself is named"
    many = translate_many(made.memory, made.regs, [made.va], Access.write())
    assert int(many.esr()[0]) == fault.esr(Access.write())


# Cache maintenance.


@pytest.mark.parametrize(
    ("kind", "el", "rights", "cmow", "ok"),
    [
        (AccessType.CLEAN, 0, "", 0, False),
        (AccessType.CLEAN, 0, "r", 1, True),
        (AccessType.CLEAN, 1, "", 0, True),
        (AccessType.CLEAN_INVALIDATE, 0, "r", 0, True),
        (AccessType.CLEAN_INVALIDATE, 0, "r", 1, False),
        (AccessType.CLEAN_INVALIDATE, 0, "rw", 1, True),
        (AccessType.CLEAN_INVALIDATE, 1, "", 1, True),
        (AccessType.INVALIDATE, 1, "r", 0, False),
        (AccessType.INVALIDATE, 1, "rw", 0, True),
    ],
)
def test_cache_maintenance_needs_what_the_pseudocode_says(
    kind: AccessType, el: int, rights: str, cmow: int, ok: bool
) -> None:
    nibble = {"": 0, "r": 1, "rw": 5}[rights]
    made = indirect_tree(0, nibble, nibble, sctlr_flags={"CMOW": cmow})
    assert passes(made, Access(kind, el)) is ok


# What a translation says of permissions.


def test_a_translation_tells_the_permissions_of_both_levels_before_pan() -> None:
    assert result_of(tree(leaf(AP=3, PXN=1))).perms & DATA == PR | UR | UX
    assert result_of(tree(leaf(AP=1)), Access.read(0)).perms & DATA == PR | PW | UR | UW | UX
    assert result_of(tree(leaf(AP=3), PAN=1), Access.fetch()).perms & DATA == PR | PX | UR | UX


def test_an_address_beside_the_page_is_another_page() -> None:
    made = tree()
    for va in (made.va ^ 0x1000, made.va ^ 1 << 21, made.va ^ 1 << 47):
        assert fault_of(made._replace(va=va), Access.read()).type.value == "translation"
    assert result_of(made._replace(va=made.va | 0xFFF)).pa == OUT | 0xFFF
    assert made.va | U64 == U64
