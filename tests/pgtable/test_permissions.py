"""Permission tables, exhaustively. Judge: the Arm ARM's rules (D8.4) restated here as sentences on names and sets."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest

from pgtable.params import Regime, WalkParams
from pgtable.permissions import (
    ALL,
    PG,
    PR,
    PRIVILEGED,
    PW,
    PX,
    UG,
    UNPRIVILEGED,
    UR,
    UW,
    UX,
    RuleTable,
    direct_index,
    direct_rules,
    indirect_rules,
    overlay_rules,
    with_overlay,
)
from pgtable.walk import leaf_permissions
from tests.pgtable.hand import tcr2, tree

BITS = {"r": PR, "w": PW, "x": PX, "g": PG}
EL0_BITS = {"r": UR, "w": UW, "x": UX, "g": UG}
Rights = tuple[set[str], set[str]]  # of the privileged level, of EL0


def as_bits(rights: Rights) -> int:
    return sum(BITS[c] for c in rights[0]) | sum(EL0_BITS[c] for c in rights[1])


def test_the_permission_bits_are_eight_different_ones() -> None:
    assert sorted((PR, PW, PX, UR, UW, UX, PG, UG)) == [1 << i for i in range(8)]
    assert PRIVILEGED ^ UNPRIVILEGED == ALL == 0xFF


# Direct permissions.


def direct_two_levels(read_only: bool, el0: bool, no_el0: bool, no_write: bool, uxn: bool, pxn: bool) -> Rights:
    """AP[2], AP[1], APTable[0], APTable[1], UXN or UXNTable, PXN or PXNTable, said in sentences."""
    privileged, unprivileged = {"r"}, set()
    if not read_only and not no_write:
        privileged.add("w")
    if el0 and not no_el0:
        unprivileged.add("r")
        if "w" in privileged:
            unprivileged.add("w")
    if not uxn:
        unprivileged.add("x")
    if pxn:
        pass
    elif "w" in unprivileged:
        pass  # privileged code may not execute what EL0 may write
    else:
        privileged.add("x")
    return privileged, unprivileged


def direct_one_level(read_only: bool, no_write: bool, xn: bool) -> Rights:
    privileged = {"r"}
    if not (read_only or no_write):
        privileged.add("w")
    if not xn:
        privileged.add("x")
    return privileged, set()


def without_wxn(rights: Rights) -> Rights:
    """WXN: what a level may write it may not execute."""
    return tuple(level - {"x"} if "w" in level else level for level in rights)


def pan_bites(unprivileged: set[str], epan: bool) -> bool:
    if unprivileged & {"r", "w"}:
        return True
    return epan and "x" in unprivileged


@pytest.mark.parametrize("epan", [False, True])
@pytest.mark.parametrize("wxn", [False, True])
def test_direct_rules_of_two_levels_equal_the_sentences_for_all_64_indexes(wxn: bool, epan: bool) -> None:
    rules = direct_rules(True, wxn, epan)
    for ap2, ap1, t1, t0, uxn, pxn in product((0, 1), repeat=6):
        index = direct_index(ap2 << 1 | ap1, t1 << 1 | t0, uxn, pxn)
        base = direct_two_levels(bool(ap2), bool(ap1), bool(t0), bool(t1), bool(uxn), bool(pxn))
        final = without_wxn(base) if wxn else base
        assert rules.base.at(index) == as_bits(base), (base, index)
        assert rules.final.at(index) == as_bits(final), (base, index)
        assert rules.wxn.at(index) == as_bits(base) - as_bits(final), (base, index)
        assert rules.pan.at(index) == pan_bites(base[1], epan), (base, index)
        assert rules.overlayable.at(index) == ALL


@pytest.mark.parametrize("wxn", [False, True])
def test_direct_rules_of_one_level_equal_the_sentences_for_all_64_indexes(wxn: bool) -> None:
    rules = direct_rules(False, wxn, False)
    for ap2, ap1, t1, t0, xn, pxn in product((0, 1), repeat=6):  # AP[1], APTable[0] and PXN say nothing here
        index = direct_index(ap2 << 1 | ap1, t1 << 1 | t0, xn, pxn)
        base = direct_one_level(bool(ap2), bool(t1), bool(xn))
        assert rules.base.at(index) == as_bits(base), index
        assert rules.final.at(index) == as_bits(without_wxn(base) if wxn else base), index
        assert rules.pan.at(index) == 0


def test_the_64_direct_indexes_are_all_different() -> None:
    parts = product(range(4), range(4), range(2), range(2))
    assert sorted(direct_index(*part) for part in parts) == list(range(64))


@pytest.mark.parametrize("name", ["base", "wxn", "final", "overlayable", "pan"])
def test_a_rule_table_says_the_same_for_an_array(name: str) -> None:
    rules = [direct_rules(*flags) for flags in product((False, True), repeat=3)]
    rules += [indirect_rules(0x0123_4567_89AB_CDEF, pire0) for pire0 in (None, 0xFEDC_BA98_7654_3210)]
    for rule in rules:
        table = getattr(rule, name)
        index = np.arange(len(table.rows), dtype=np.uint64)
        assert table.at(index).tolist() == [table.at(i) for i in range(len(table.rows))]
        assert table.at(index.reshape(2, -1)).shape == (2, len(table.rows) // 2)
        assert {type(table.at(i)) for i in range(len(table.rows))} == {int}


# Indirect permissions (FEAT_S1PIE): the encodings, one character a right.

PIR = {
    **{0b0000: "", 0b0001: "r", 0b0010: "x", 0b0011: "rx", 0b0100: "", 0b0101: "rw", 0b0110: "rwx", 0b0111: "rwx"},
    **{0b1000: "r", 0b1001: "rg", 0b1010: "rx", 0b1011: "", 0b1100: "rw", 0b1101: "", 0b1110: "rwx", 0b1111: ""},
}
NO_OVERLAY = {0b1000, 0b1001, 0b1010, 0b1011, 0b1100, 0b1101, 0b1110, 0b1111}


def indirect(privileged: int, unprivileged: int) -> Rights:
    p, u = set(PIR[privileged]), set(PIR[unprivileged])
    runs_or_returns_there = "x" in p or "g" in p
    el0_writes = "w" in u or "g" in u
    if runs_or_returns_there and el0_writes:
        return set(), set()
    return p, u


def sixteen(nibbles: list[int]) -> int:
    return int("".join(f"{n:x}" for n in reversed(nibbles)), 16)


@pytest.mark.parametrize("privileged", range(16), ids="{:04b}".format)
def test_indirect_rules_equal_the_encodings_for_all_256_pairs(privileged: int) -> None:
    rules = indirect_rules(sixteen([privileged] * 16), sixteen(list(range(16))))
    for unprivileged in range(16):
        p, u = indirect(privileged, unprivileged)
        final = (
            p - {"x"} if privileged == 0b0110 else p,
            u - {"x"} if unprivileged == 0b0110 else u,
        )
        where = f"PIR {privileged:04b}, PIRE0 {unprivileged:04b}"
        assert rules.base.at(unprivileged) == as_bits((p, u)), where
        assert rules.final.at(unprivileged) == as_bits(final), where
        # The flag of encoding 0110 stays where the conflict rule has taken the permissions: an overlay sees it.
        wxn = {"x"} if privileged == 0b0110 else set(), {"x"} if unprivileged == 0b0110 else set()
        assert rules.wxn.at(unprivileged) == as_bits(wxn), where
        overlaid = (0 if privileged in NO_OVERLAY else PRIVILEGED) | (0 if unprivileged in NO_OVERLAY else UNPRIVILEGED)
        assert rules.overlayable.at(unprivileged) == overlaid, where
        # A reserved encoding and PAN: IMPLEMENTATION DEFINED (R_TBKKB), here it does not count.
        assert rules.pan.at(unprivileged) == (PIR[unprivileged] != ""), where


def test_the_conflict_rule_takes_everything_from_both_levels() -> None:
    rules = indirect_rules(0x0A, 0x05)  # EL1 RX where EL0 has RW
    assert rules.base.at(0) == rules.final.at(0) == 0
    assert rules.pan.at(0) == 1, "PIRE0 still counts for PAN"


@pytest.mark.parametrize("nibble", range(16), ids="{:04b}".format)
def test_indirect_rules_without_el0_have_no_conflict_and_no_pan(nibble: int) -> None:
    rules = indirect_rules(nibble, None)
    assert rules.base.at(0) == as_bits((set(PIR[nibble]), set()))
    assert rules.pan.at(0) == 0
    assert rules.overlayable.at(0) == (0 if nibble in NO_OVERLAY else PRIVILEGED)


def test_each_piindex_reads_its_own_nibble() -> None:
    order = random.Random(5).sample(range(16), 16)
    rules = indirect_rules(sixteen(order), None)
    assert [rules.base.at(i) for i in range(16)] == [as_bits((set(PIR[n]), set())) for n in order]


# Overlays (FEAT_S1POE).

POR = {n: {c for c, bit in (("r", 1), ("x", 2), ("w", 4)) if n & bit} if n < 8 else set() for n in range(16)}


@pytest.mark.parametrize("privileged", range(16), ids="{:04b}".format)
def test_overlay_rules_equal_the_encodings_for_all_256_pairs(privileged: int) -> None:
    for unprivileged in range(16):
        for index in range(8):
            rest = random.Random(f"{privileged} {unprivileged} {index}").getrandbits(64) & ~(0xF << 4 * index)
            rules = overlay_rules(rest | privileged << 4 * index, rest | unprivileged << 4 * index)
            want = as_bits((POR[privileged], POR[unprivileged]))
            assert rules.at(index) & ~(PG | UG) == want, (privileged, unprivileged, index)


def test_a_level_without_overlays_keeps_everything() -> None:
    assert overlay_rules(None, 0).at(3) & ~(PG | UG) == PR | PW | PX
    assert overlay_rules(0, None).at(3) & ~(PG | UG) == UR | UW | UX
    assert overlay_rules(0, 0).at(3) == PG | UG, "overlays say nothing of guarded control stacks"
    assert len(overlay_rules(0, 0).rows) == 16, "POIndex has three bits, in 128-bit descriptors four"


def combined(base: set[str], overlay: set[str], *, wxn: bool, applies: bool) -> tuple[set[str], set[str]]:
    """Base and overlay rights of one level after S1ComputePermissions."""
    base, overlay = set(base), set(overlay) if applies else {"r", "w", "x"}
    if wxn and applies and "x" in overlay:
        overlay.discard("w")
    elif wxn:
        base.discard("x")
    return base, overlay


def test_with_overlay_equals_the_sentences_for_every_base_overlay_and_wxn() -> None:
    sets = [{c for c, bit in zip("rwx", (1, 2, 4), strict=True) if n & bit} for n in range(8)]
    cases = []
    for p, u, op, ou, applies_p, applies_u in product(sets, sets, sets, sets, (False, True), (False, True)):
        for wxn_p, wxn_u in product((False, True), repeat=2):
            if (wxn_p and not {"w", "x"} <= p) or (wxn_u and not {"w", "x"} <= u):
                continue
            lost = as_bits(({"x"} if wxn_p else set(), {"x"} if wxn_u else set()))
            overlayable = (PRIVILEGED if applies_p else 0) | (UNPRIVILEGED if applies_u else 0)
            want_p, want_op = combined(p, op, wxn=wxn_p, applies=applies_p)
            want_u, want_ou = combined(u, ou, wxn=wxn_u, applies=applies_u)
            inputs = (as_bits((p, u)), lost, overlayable, as_bits((op, ou)))
            cases.append((*inputs, as_bits((want_p, want_u)), as_bits((want_op, want_ou))))
    table = np.array(cases, np.uint16)
    base, overlay = with_overlay(*(table[:, i] for i in range(4)))
    assert len(table) > 20_000
    assert np.array_equal(base, table[:, 4])
    assert np.array_equal(overlay & ~np.uint16(PG | UG), table[:, 5])
    for case in cases[::97]:
        scalar = with_overlay(*case[:4])
        assert (scalar[0], scalar[1] & ~(PG | UG)) == case[4:], case


# One descriptor against an array of descriptors.


@pytest.mark.parametrize(
    "registers",
    [
        {},
        {"TCR2_EL1": tcr2(POE=1, E0POE=1)},
        {"TCR2_EL1": tcr2(PIE=1)},
        {"TCR2_EL1": tcr2(PIE=1, POE=1, E0POE=1)},
    ],
    ids=["direct", "direct+POE", "PIE", "PIE+POE"],
)
def test_leaf_permissions_say_the_same_for_one_word_and_for_an_array(
    registers: dict[str, int], rng: random.Random
) -> None:
    values = {n: rng.getrandbits(64) for n in ("PIR_EL1", "PIRE0_EL1", "POR_EL1", "POR_EL0")}
    regs = tree(tcr_flags={"HA": 1, "HD": 1}, sctlr_flags={"WXN": 1, "EPAN": 1}, **values, **registers).regs
    p = WalkParams.of(regs, Regime.EL10, 0)
    words = np.frombuffer(rng.randbytes(8 * 300), np.uint64)
    inherited = np.frombuffer(rng.randbytes(8 * 300), np.uint64) & np.uint64(p.inherited_mask)
    arrays = leaf_permissions(p, words, inherited)
    for i, (word, limit) in enumerate(zip(words.tolist(), inherited.tolist(), strict=True)):
        assert leaf_permissions(p, word, limit) == tuple(int(a[i]) for a in arrays), hex(word)


def test_a_rule_table_is_indexed_by_any_integer_type() -> None:
    table = RuleTable([3, 5, 9])
    for dtype in (np.uint8, np.int64, np.uint64):
        assert table.at(np.array([2, 0], dtype)).tolist() == [9, 3]
    assert table.at(np.array([1], np.uint64)).dtype == np.uint16
