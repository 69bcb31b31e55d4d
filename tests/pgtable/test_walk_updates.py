"""What hardware writes to descriptors: access flag, dirty state, the access flag of tables.

Judge: Arm ARM D8.5 and the pseudocode S1Translate, S1Walk, as conditions typed here.
"""

from __future__ import annotations

from itertools import product

import pytest

from pgtable import Access, AccessType, translate
from pgtable.features import CPUS
from pgtable.walk import Update, Walk
from tests.pgtable.hand import Tree, Words, leaf, tcr2, tree

AF, RDONLY, DBM = 1 << 10, 1 << 7, 1 << 51
HA, HD = {"HA": 1}, {"HA": 1, "HD": 1}
PIE = {"TCR2_EL1": tcr2(PIE=1), "PIR_EL1": 5, "PIRE0_EL1": 0}  # PIIndex 0: EL1 has read/write


def ask(made: Tree, access: Access | None = None, *, write: bool = False) -> Walk:
    return translate(made.memory, made.regs, made.va, access, swap=made.memory.swap if write else None)


def leaf_update(made: Tree, new: int) -> tuple[Update, ...]:
    pa = made.slots[max(made.slots)]
    return (Update(pa, made.memory[pa], new),)


# The access flag.


@pytest.mark.parametrize("kind", [t for t in AccessType if "AT" not in t.value and "stack" not in t.value])
def test_with_ha_every_access_sets_the_access_flag_and_does_not_fault(kind: AccessType) -> None:
    made = tree(leaf(AF=0), tcr_flags=HA)
    found = ask(made, Access(kind, 1))
    assert found.ok
    assert found.updates == leaf_update(made, leaf(AF=1))


@pytest.mark.parametrize("kind", [AccessType.AT_READ, AccessType.AT_WRITE, AccessType.AT_ANY])
def test_at_reports_success_and_writes_nothing_unless_the_cpu_chooses_to_set_the_flag(kind: AccessType) -> None:
    made = tree(leaf(AF=0, AP=2, DBM=1), tcr_flags=HD)
    found = ask(made, Access(kind, 1))
    assert found.ok
    assert found.updates == ()
    sets = made.with_features(at_updates=True)
    assert ask(sets, Access(kind, 1)).updates == leaf_update(sets, leaf(AF=1, AP=2, DBM=1)), "never the dirty state"


def test_a_page_whose_flag_is_set_is_not_written() -> None:
    assert ask(tree(tcr_flags=HD), Access.write()).updates == ()


def test_the_flag_of_a_block_and_of_each_regime_is_set() -> None:
    block = tree(leaf(low=1, AF=0), level=2, tcr_flags=HA)
    assert ask(block).updates == leaf_update(block, leaf(low=1, AF=1))
    for regime, el in (("EL20", 2), ("EL2", 2), ("EL3", 3)):
        made = tree(leaf(AF=0), regime=regime, tcr_flags=HA)
        assert ask(made, Access.read(el)).updates == leaf_update(made, leaf(AF=1)), regime


@pytest.mark.parametrize(("hafdbs", "ok", "writes"), [(0, False, False), (1, True, False), (2, True, True)])
def test_feat_hafdbs_has_three_values(hafdbs: int, ok: bool, writes: bool) -> None:
    cpu = CPUS["max"].replace(hafdbs=hafdbs)
    assert ask(tree(leaf(AF=0), tcr_flags=HA, cpu=cpu)).ok is ok
    assert ask(tree(leaf(AP=2, DBM=1), tcr_flags=HD, cpu=cpu), Access.write()).ok is writes


@pytest.mark.parametrize(
    ("word", "access"),
    [
        (leaf(AF=0, AP=2), Access.write()),
        (leaf(AF=0, AP=0), Access.read(0)),
        (leaf(AF=0, PXN=1), Access.fetch()),
        (leaf(AF=0, AttrIndx=1), Access(AccessType.READ, 1, aligned=False)),
        (leaf(AF=0) | 1 << 45, Access.read()),
        (leaf(AF=0) & ~1, Access.read()),
    ],
    ids=["write", "EL0", "fetch", "alignment", "address size", "invalid"],
)
def test_an_access_that_faults_changes_no_leaf(word: int, access: Access) -> None:
    made = tree(word, tcr_flags=HD, ps=4)
    before = dict(made.memory)
    found = ask(made, access, write=True)
    assert not found.ok
    assert found.updates == ()
    assert made.memory == before


# The dirty state.


@pytest.mark.parametrize(
    "kind", [AccessType.READ, AccessType.WRITE, AccessType.ATOMIC, AccessType.FETCH, AccessType.CLEAN]
)
def test_only_writes_and_atomics_make_a_clean_page_dirty(kind: AccessType) -> None:
    made = tree(leaf(AP=2, DBM=1, PXN=0), tcr_flags=HD)
    if kind is AccessType.FETCH:
        made = made.with_word(3, leaf(AP=2, DBM=1))
    found = ask(made, Access(kind, 1))
    assert found.ok
    writes = kind in (AccessType.WRITE, AccessType.ATOMIC)
    assert found.updates == (leaf_update(made, leaf(AP=0, DBM=1)) if writes else ())


def test_one_swap_carries_access_flag_and_dirty_state() -> None:
    made = tree(leaf(AF=0, AP=2, DBM=1), tcr_flags=HD)
    found = ask(made, Access.write(), write=True)
    assert found.updates == (Update(made.slots[3], leaf(AF=0, AP=2, DBM=1), leaf(AF=1, AP=0, DBM=1)),)
    assert made.memory[made.slots[3]] == leaf(AF=1, AP=0, DBM=1)


@pytest.mark.parametrize(("ha", "hd", "dbm"), list(product((0, 1), repeat=3)))
def test_a_clean_page_is_writable_only_with_ha_hd_and_dbm(ha: int, hd: int, dbm: int) -> None:
    made = tree(leaf(AP=2, DBM=dbm), tcr_flags={"HA": ha, "HD": hd})
    assert ask(made, Access.write()).ok is (ha == hd == dbm == 1)
    assert ask(made, Access(AccessType.AT_WRITE, 1)).ok is (ha == hd == dbm == 1)


def test_a_clean_page_counts_as_writable_for_execution_too() -> None:
    """AP[2] is taken as 0 before the implicit PXN and WXN are worked out (S1ApplyOutputPerms)."""
    user = tree(leaf(AP=3, DBM=1), tcr_flags=HD)
    assert not ask(user, Access.fetch()).ok
    assert ask(tree(leaf(AP=3, DBM=0), tcr_flags=HD), Access.fetch()).ok
    kernel = tree(leaf(AP=2, DBM=1), tcr_flags=HD, sctlr_flags={"WXN": 1})
    assert not ask(kernel, Access.fetch()).ok
    assert ask(tree(leaf(AP=2, DBM=1), tcr_flags=HA, sctlr_flags={"WXN": 1}), Access.fetch()).ok


def test_a_table_that_forbids_writes_keeps_a_clean_page_clean() -> None:
    made = tree(leaf(AP=2, DBM=1), tcr_flags=HD, tables={1: {"APTable": 2}})
    found = ask(made, Access.write())
    assert not found.ok
    assert found.updates == ()


def test_indirect_permissions_need_no_dbm() -> None:
    made = tree(leaf(AP=2), tcr_flags=HD, **PIE)  # nDirty
    assert ask(made, Access.write()).updates == leaf_update(made, leaf(AP=0))
    assert ask(made, Access.read()).updates == ()
    assert ask(tree(leaf(AP=0), tcr_flags=HD, **PIE), Access.write()).updates == ()


# The swap.


def test_without_a_swap_updates_are_only_listed() -> None:
    made = tree(leaf(AF=0), tcr_flags=HA)
    before = dict(made.memory)
    assert ask(made).updates
    assert made.memory == before


def test_a_swap_that_fails_makes_the_walk_begin_again() -> None:
    made = tree(leaf(AF=0, AP=2, DBM=1), tcr_flags=HD)
    asked = []

    def swap(pa: int, old: int, new: int) -> bool:
        asked.append((pa, old, new))
        if len(asked) == 1:
            made.memory[pa] = leaf(AF=1, AP=2, DBM=1)  # another observer sets the access flag first
            return False
        return made.memory.swap(pa, old, new)

    found = translate(made.memory, made.regs, made.va, Access.write(), swap=swap)
    assert [(old, new) for _, old, new in asked] == [
        (leaf(AF=0, AP=2, DBM=1), leaf(AF=1, AP=0, DBM=1)),
        (leaf(AF=1, AP=2, DBM=1), leaf(AF=1, AP=0, DBM=1)),
    ]
    assert found.updates == leaf_update(made._replace(memory=Words({made.slots[3]: asked[1][1]})), asked[1][2])
    assert made.memory[made.slots[3]] == leaf(AF=1, AP=0, DBM=1)


def test_a_walk_that_begins_again_may_find_a_fault() -> None:
    made = tree(leaf(AF=0), tcr_flags=HA)

    def swap(pa: int, old: int, new: int) -> bool:
        made.memory[pa] = 0  # another observer unmaps the page
        return False

    found = translate(made.memory, made.regs, made.va, swap=swap)
    assert found.fault is not None
    assert (found.fault.type.value, found.fault.level, found.updates) == ("translation", 3, ())


def test_a_big_endian_update_shows_words_as_the_cpu_reads_them() -> None:
    made = tree(leaf(AF=0), tcr_flags=HA, sctlr_flags={"EE": 1})
    swapped = Words({pa: int.from_bytes(word.to_bytes(8, "big"), "little") for pa, word in made.memory.items()})
    found = translate(swapped, made.regs, made.va)
    assert found.updates == (Update(made.slots[3], leaf(AF=0), leaf(AF=1)),)


# The access flag of tables (FEAT_HAFT).

HAFT = {"TCR2_EL1": tcr2(HAFT=1), "tcr_flags": HA}


@pytest.mark.parametrize("kind", [AccessType.READ, AccessType.FETCH, AccessType.CLEAN, AccessType.AT_READ])
def test_with_haft_every_access_also_at_sets_the_flag_of_every_table_it_passes(kind: AccessType) -> None:
    """R_CGKWB, and for AT R_FBZPR."""
    made = tree(leaf(AP=2), tables={1: {"AF": 1}}, **HAFT)
    found = ask(made, Access(kind, 1), write=True)
    assert [(u.pa, u.new ^ u.old) for u in found.updates] == [(made.slots[0], AF), (made.slots[2], AF)]
    assert all(made.memory[made.slots[level]] & AF for level in (0, 1, 2))


def test_a_walk_that_ends_in_a_hole_has_used_its_tables() -> None:
    made = tree(0, **HAFT)
    found = ask(made)
    assert not found.ok
    assert [u.pa for u in found.updates] == [made.slots[level] for level in (0, 1, 2)]


def test_a_table_whose_own_address_is_refused_is_not_used() -> None:
    """S1Walk: the next entry's address is checked before the table's access flag is set."""
    made = tree(ps=4, **HAFT).with_flipped(1, 1 << 45)
    found = ask(made)
    assert found.fault is not None
    assert (found.fault.type.value, found.fault.level) == ("address size", 1)
    assert [u.pa for u in found.updates] == [made.slots[0]]


@pytest.mark.parametrize(
    "registers",
    [{"TCR2_EL1": tcr2(HAFT=1)}, {"tcr_flags": HA}, {**HAFT, "cpu": CPUS["max"].replace(haft=False)}],
    ids=["HA=0", "HAFT=0", "no FEAT_HAFT"],
)
def test_haft_needs_the_feature_its_bit_and_ha(registers: dict[str, object]) -> None:
    assert ask(tree(**registers)).updates == ()


def test_el3_has_its_haft_bit_in_tcr_el3() -> None:
    made = tree(regime="EL3", tcr_flags={"HA": 1, "HAFT": 1})
    assert len(ask(made, Access.read(3)).updates) == 3


def test_table_flags_and_the_leaf_come_in_the_order_of_the_walk() -> None:
    made = tree(leaf(AF=0), **HAFT)
    assert [u.pa for u in ask(made).updates] == list(made.slots.values())


def test_updates_name_only_bits_10_and_7() -> None:
    for flags, word in product((HA, HD), (leaf(AF=0, AP=2, DBM=1), leaf(AF=0, AP=3, DBM=1), leaf(AF=0))):
        for kind in (AccessType.READ, AccessType.WRITE):
            for update in ask(tree(word, tcr_flags=flags), Access(kind, 1)).updates:
                assert not (update.old ^ update.new) & ~(AF | RDONLY)
                assert update.new & DBM == update.old & DBM
