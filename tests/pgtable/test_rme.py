"""Granule protection around walks, and the spaces that walks read and lead to; typed from Arm's pseudocode.

What QEMU says to the same rules is in tests/judged/test_rme.py. The tables of granules here have a block for each GiB,
open to every space, and one GiB by granules where a test shuts some.
"""

from __future__ import annotations

import pytest

from pgtable import CPUS, Access, FaultType, NestedWalk, Registers, Translation, at_walk, translate
from pgtable.gpc import abort_el, gpc_esr, is_gpc_exception, mfar
from pgtable.gpt import GpcFault
from pgtable.spaces import PASpace
from tests.pgtable import hand

CPU = CPUS["max,x-rme=on"]
SECURE, NONSECURE, ROOT, REALM = PASpace.SECURE, PASpace.NONSECURE, PASpace.ROOT, PASpace.REALM
L0, L1 = 0x1_0000_0000, 0x1_0010_0000
GPCCR = 1 << 16 | 2 << 12 | 1  # on, outer shareable, 36 bits, granules of 4K
SCR_RW, SCR_EEL2, TCR2EN, SCTLR2EN, SCR_GPF, HCR_GPF = 1 << 10, 1 << 18, 1 << 43, 1 << 44, 1 << 48, 1 << 48
SCR = {NONSECURE: 1, SECURE: SCR_EEL2, REALM: 1 << 62 | 1}
READ, WRITE, FETCH = Access.read(el=1), Access.write(el=1), Access.fetch(el=1)


def scr(state: PASpace, more: int = 0) -> int:
    return SCR_RW | SCR[state] | TCR2EN | more


def protect(words: hand.Words, shut: dict[int, int], open_pages: tuple[int, ...] = ()) -> hand.Words:
    """`words` with a granule protection table: the pages `shut` have these GPIs, all else is open."""
    table = dict(words)
    for gib in range(64):
        table[L0 + 8 * gib] = 1 | 0xF << 4
    for pa in (*shut, *open_pages, *words):
        if pa >> 30 in {at >> 30 for at in shut}:
            level1 = L1 + (pa >> 30) * (1 << 17)
            table[L0 + 8 * (pa >> 30)] = level1 | 3
            table.setdefault(level1 + 8 * (pa >> 16 & 0x3FFF), (1 << 64) - 1)
    for pa, gpi in shut.items():
        slot = L1 + (pa >> 30) * (1 << 17) + 8 * (pa >> 16 & 0x3FFF)
        table[slot] ^= (0xF ^ gpi) << 4 * (pa >> 12 & 15)
    return hand.Words(table)


def protected(tree: hand.Tree, shut: dict[int, int]) -> hand.Tree:
    made = tree.with_regs(GPCCR_EL3=GPCCR, GPTBR_EL3=L0 >> 12)
    return made._replace(memory=protect(tree.memory, shut, (hand.OUT,)))


def page(state: PASpace = NONSECURE, **more: int) -> hand.Tree:
    return hand.tree(cpu=CPU, SCR_EL3=scr(state, more.pop("scr", 0)), **more)


# A check of every read, and of where the access goes.


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_a_table_in_a_granule_that_is_shut_faults_at_its_level(level: int) -> None:
    tree = page()
    made = protected(tree, {tree.slots[level] & -0x1000: 0})
    walk = translate(made.memory, made.regs, made.va, WRITE)
    assert walk.fault
    assert (walk.fault.type, walk.fault.level) == (FaultType.GPC_ON_WALK, level)
    assert walk.fault.gpc
    assert walk.fault.gpc.pa == tree.slots[level]
    assert [step.level for step in walk.steps] == list(range(level))
    assert len(walk.granules) == level + 1
    assert translate(tree.memory, made.regs.replace(GPCCR_EL3=0), made.va).ok


def test_where_an_access_goes_is_checked_last() -> None:
    made = protected(page(), {hand.OUT: 0})
    walk = translate(made.memory, made.regs, made.va)
    assert walk.fault
    assert (walk.fault.type, walk.fault.level) == (FaultType.GPC_ON_OUTPUT, 0)
    assert [check.ok for check in walk.granules] == [True] * 4 + [False]
    # a fault of the walk itself comes first
    clean = made.with_flipped(3, 1 << 10)
    first = translate(clean.memory, clean.regs, clean.va)
    assert first.fault
    assert first.fault.type is FaultType.ACCESS_FLAG


def test_at_checks_the_tables_and_not_where_they_lead() -> None:
    tree = page()
    leads = protected(tree, {hand.OUT: 0})
    walk = at_walk(leads.memory, leads.regs, "S1E1R", leads.va)
    assert walk.ok
    assert len(walk.granules) == 4
    tables = protected(tree, {tree.slots[2] & -0x1000: 0})
    refused = at_walk(tables.memory, tables.regs, "S1E1R", tables.va)
    assert refused.fault
    assert refused.fault.type is FaultType.GPC_ON_WALK


# Which exception it is, and what its registers say.


def test_which_faults_go_to_el3() -> None:
    """A GPI that refuses only with SCR_EL3.GPF and not from EL3; every other fault of the check always."""
    made = protected(page(), {hand.OUT: 0})
    refused = translate(made.memory, made.regs, made.va).fault
    broken = made._replace(memory=hand.Words({**made.memory, L0 + 8 * (hand.OUT >> 30): 0}))
    walk_fault = translate(broken.memory, broken.regs, broken.va).fault
    assert refused
    assert walk_fault
    assert walk_fault.gpc
    assert walk_fault.gpc.fault is GpcFault.WALK
    gpf = made.regs.replace(SCR_EL3=scr(NONSECURE, SCR_GPF))
    assert [is_gpc_exception(refused, made.regs, el) for el in (0, 1, 2, 3)] == [False] * 4
    assert [is_gpc_exception(refused, gpf, el) for el in (0, 1, 2, 3)] == [True, True, True, False]
    assert all(is_gpc_exception(walk_fault, made.regs, el) for el in (0, 1, 2, 3))
    plain = hand.tree(leaf := hand.leaf(AF=0), cpu=CPU)
    other = translate(plain.memory, plain.regs, plain.va).fault
    assert leaf
    assert other
    assert not is_gpc_exception(other, gpf, 1)
    for call in (lambda: gpc_esr(other, READ), lambda: mfar(other)):
        with pytest.raises(ValueError, match="no granule protection check has failed"):
            call()


def test_who_takes_the_abort() -> None:
    made = protected(page(), {hand.OUT: 0})
    fault = translate(made.memory, made.regs, made.va).fault
    assert fault
    rows = [
        ({}, 1, 1),
        ({}, 0, 1),
        ({}, 2, 2),
        ({}, 3, 3),
        ({"SCR_EL3": scr(NONSECURE, SCR_GPF)}, 1, 3),
        ({"HCR_EL2": hand.hcr() | HCR_GPF}, 1, 2),
        ({"HCR_EL2": hand.hcr() | HCR_GPF}, 0, 2),
        ({"HCR_EL2": hand.hcr() | HCR_GPF, "SCR_EL3": scr(NONSECURE, SCR_GPF)}, 1, 3),
        ({"HCR_EL2": hand.hcr(TGE=1)}, 0, 2),
        ({"HCR_EL2": hand.hcr(TGE=1)}, 1, 1),
        ({"HCR_EL2": hand.hcr() | HCR_GPF, "SCR_EL3": SCR_RW}, 1, 1),  # Secure state without EL2
    ]
    for values, el, taken_to in rows:
        assert abort_el(fault, made.regs.replace(**values), el) == taken_to, (values, el)


def test_the_syndrome_of_an_exception_to_el3() -> None:
    """EC 0x1E in [31:26], IL 25, S2PTW 21, InD 20, GPCSC [19:14], CM 8, S1PTW 7, WnR 6, xFSC [5:0]."""
    made = protected(page(state=REALM), {hand.OUT: 0b1001})
    base = 0x1E << 26 | 1 << 25 | 0b001101 << 14 | 0b101000
    for access, more in ((READ, 0), (WRITE, 1 << 6), (FETCH, 1 << 20)):
        walk = translate(made.memory, made.regs, made.va, access)
        assert walk.fault
        assert walk.fault.gpc
        assert gpc_esr(walk.fault, access) == base | more
        assert mfar(walk.fault) == 0b11 << 62 | hand.OUT + 0x0  # FPA is a page; NSE and NS of the Realm space
    tree = page(state=SECURE)
    tables = protected(tree, {tree.slots[2] & -0x1000: 0})
    on_walk = translate(tables.memory, tables.regs, tables.va, WRITE).fault
    assert on_walk
    assert gpc_esr(on_walk, WRITE) & 0x3F == 0b100110
    assert mfar(on_walk) >> 62 == 0


# Which space a stage 1 leaf is in, and where code may run.


@pytest.mark.parametrize(("nse", "ns", "space"), [(0, 0, SECURE), (0, 1, NONSECURE), (1, 0, ROOT), (1, 1, REALM)])
def test_el3_chooses_among_four_spaces_and_executes_in_its_own(nse: int, ns: int, space: PASpace) -> None:
    tree = hand.tree(hand.leaf(nG=nse, NS=ns, AP=1), regime="EL3", cpu=CPU)
    found = translate(tree.memory, tree.regs, tree.va, Access.read(el=3)).result
    assert isinstance(found, Translation)
    assert found.space is space
    assert (found.par() >> 9 & 1, found.par() >> 11 & 1) == (ns, nse)
    fetch = translate(tree.memory, tree.regs, tree.va, Access.fetch(el=3))
    assert fetch.ok == (space is ROOT)
    if fetch.fault:
        assert (fetch.fault.type, fetch.fault.level) == (FaultType.PERMISSION, 3)


@pytest.mark.parametrize("regime", ["EL2", "EL20"])
def test_a_realms_el2_executes_in_its_own_space_only(regime: str) -> None:
    for ns in (0, 1):
        tree = hand.tree(hand.leaf(NS=ns), regime=regime, cpu=CPU, SCR_EL3=scr(REALM))
        found = translate(tree.memory, tree.regs, tree.va, Access.read(el=2)).result
        assert isinstance(found, Translation)
        assert found.space is (NONSECURE if ns else REALM)
        assert found.par() >> 9 & 1 == ns  # not NS of {NSE, NS}, which is 1 for both
        assert translate(tree.memory, tree.regs, tree.va, Access.fetch(el=2)).ok == (not ns)


def test_el1_of_a_realm_and_non_secure_states_have_one_space() -> None:
    for state in (REALM, NONSECURE):
        for ns in (0, 1):
            tree = page(state=state, word=hand.leaf(NS=ns))
            found = translate(tree.memory, tree.regs, tree.va, FETCH).result
            assert isinstance(found, Translation)
            assert found.space is state


# Both stages: a block of stage 1 at GiB 1, its root in GiB 1; stage 2 maps GiB 1 to itself.

S1, S2, VS2, VA = 0x4000_0000, 0x4001_0000, 0x4002_0000, 0x4080_1008
S2_TCR = 25 | 1 << 6 | 3 << 12  # 39 bits, from level 1
SW, SA = 1 << 29, 1 << 30
S2_BLOCK = 0x7FD | 0x4000_0000


def both(
    state: PASpace,
    *,
    ns: int = 0,
    leaf2: int = S2_BLOCK,
    shut: dict[int, int] | None = None,
    vtcr: int = 0,
    vstcr: int = 0,
) -> tuple[hand.Words, Registers]:
    words = {S1 + 8: hand.leaf(0x4000_0000, low=1, NS=ns), S2 + 8: leaf2, VS2 + 8: leaf2}
    regs = Registers(
        CPU,
        SCR_EL3=scr(state),
        HCR_EL2=hand.hcr(VM=1),
        TCR_EL1=25 | 16 << 16 | 3 << 12 | 2 << 30 | 5 << 32,
        SCTLR_EL1=hand.sctlr(),
        MAIR_EL1=hand.MAIR,
        TTBR0_EL1=S1,
        VTCR_EL2=S2_TCR | 5 << 16 | vtcr,
        VSTCR_EL2=S2_TCR | vstcr,
        VTTBR_EL2=S2,
        VSTTBR_EL2=VS2,
        GPCCR_EL3=GPCCR,
        GPTBR_EL3=L0 >> 12,
    )
    return protect(hand.Words(words), shut or {}, (VA,)), regs


def checks(words: hand.Words, regs: Registers, access: Access = READ) -> list[tuple[int, PASpace]]:
    """PA and space of every access of a translation, in order: stage 2's table, stage 1's, stage 2's, the result."""
    walk = translate(words, regs, VA, access)
    assert isinstance(walk, NestedWalk)
    assert walk.ok, str(walk)
    return [(check.pa, check.space) for check in walk.granules]


# By VSTCR_EL2.{SW, SA} and VTCR_EL2.{NSW, NSA}: where tables of the Secure IPA space, what it leads to, tables of the
# Non-secure IPA space, and what that leads to, are. (pseudocode SS2InitialTTWState, SS2OutputPASpace)
SECURE_ROWS = [
    (0, 0, (SECURE, SECURE, SECURE, SECURE)),
    (0, SW, (SECURE, SECURE, NONSECURE, NONSECURE)),
    (0, SA, (SECURE, SECURE, SECURE, NONSECURE)),
    (0, SW | SA, (SECURE, SECURE, NONSECURE, NONSECURE)),
    (SA, 0, (SECURE, NONSECURE, SECURE, NONSECURE)),
    (SW, 0, (NONSECURE, NONSECURE, SECURE, NONSECURE)),
    (SW | SA, SW | SA, (NONSECURE, NONSECURE, NONSECURE, NONSECURE)),
]


@pytest.mark.parametrize(("vstcr", "vtcr", "spaces"), SECURE_ROWS)
def test_spaces_of_secure_states_two_ipa_spaces(vstcr: int, vtcr: int, spaces: tuple[PASpace, ...]) -> None:
    tables, output, ns_tables, ns_output = spaces
    of_tables = [(VS2 + 8, tables), (S1 + 8, output)]
    for ns, last in ((0, [(VS2 + 8, tables), (VA, output)]), (1, [(S2 + 8, ns_tables), (VA, ns_output)])):
        words, regs = both(SECURE, ns=ns, vstcr=vstcr, vtcr=vtcr)
        assert checks(words, regs) == of_tables + last


def test_non_secure_state_has_one_space_and_a_realm_two() -> None:
    words, regs = both(NONSECURE, vstcr=SW | SA, vtcr=SW | SA)
    assert {space for _, space in checks(words, regs)} == {NONSECURE}
    words, regs = both(REALM, vstcr=SW | SA, vtcr=SW | SA)
    assert {space for _, space in checks(words, regs)} == {REALM}


def test_a_realms_stage_2_leaf_has_ns_in_bit_55() -> None:
    """Data may be Non-secure; code and tables of stage 1 may not (pseudocode S2CheckPermissions)."""
    words, regs = both(REALM)
    words[S2 + 8] = 0x4000_0000 | 1 | 1 << 10 | 3 << 8 | 3 << 6 | 0xF << 2  # GiB 1: the tables
    beyond = both(REALM)[0]
    beyond[S1 + 8] = hand.leaf(0x8000_0000, low=1)  # GiB 2: the result
    beyond[S2 + 16] = 0x8000_0000 | 0x7FD | 1 << 55
    out = VA + 0x4000_0000
    walk = translate(beyond, regs, VA, READ)
    assert isinstance(walk.result, Translation)
    assert walk.result.space is NONSECURE
    assert (walk.granules[-1].pa, walk.granules[-1].space) == (out, NONSECURE)
    fetch = translate(beyond, regs, VA, FETCH).fault
    assert fetch
    assert (fetch.type, fetch.stage, fetch.level, fetch.s1ptw) == (FaultType.PERMISSION, 2, 1, False)
    words[S2 + 8] |= 1 << 55
    table = translate(words, regs, VA, READ).fault
    assert table
    assert (table.type, table.stage, table.s1ptw) == (FaultType.PERMISSION, 2, True)
    # outside a Realm the bit is ignored
    words, regs = both(NONSECURE, leaf2=S2_BLOCK | 1 << 55)
    assert checks(words, regs, FETCH)


def test_a_granule_that_stops_each_read_of_both_stages() -> None:
    """By the page that is shut to the Realm: stage 2's table is read first, on the walk of stage 1's."""
    for pa, kind, stage, s1ptw in (
        (S2, FaultType.GPC_ON_WALK, 2, True),
        (S1, FaultType.GPC_ON_WALK, 1, False),
        (VA & -0x1000, FaultType.GPC_ON_OUTPUT, 1, False),
    ):
        words, regs = both(REALM, shut={pa: 0b1001})
        fault = translate(words, regs, VA, READ).fault
        assert fault
        assert (fault.type, fault.stage, fault.s1ptw) == (kind, stage, s1ptw), hex(pa)
        assert fault.gpc
        assert fault.gpc.space is REALM
        assert gpc_esr(fault, READ) >> 21 & 1 == (stage == 2)  # S2PTW
        assert gpc_esr(fault, READ) >> 7 & 1 == s1ptw


def test_hpfar_has_the_ipa_of_a_stage_2_fault_in_the_own_space() -> None:
    for ns in (0, 1):
        words, regs = both(SECURE, ns=ns)
        words[(S2 if ns else VS2) + 8 * 2] = 0
        words[S1 + 8] = hand.leaf(0x8000_0000, low=1, NS=ns)
        walk = translate(words, regs, VA, READ)
        assert isinstance(walk, NestedWalk)
        assert walk.fault
        assert walk.hpfar == (0x8080_1000 >> 12) << 4 | ns << 63


# ASIDs of both halves, global entries, encryption contexts.

A2, FNG0, FNG1, AMEC0, AMEC1 = 1 << 16, 1 << 17, 1 << 18, 1 << 12, 1 << 13


@pytest.mark.parametrize("upper", [False, True])
def test_with_a2_each_half_has_the_asid_of_its_ttbr(upper: bool) -> None:
    tree = page(upper=upper, tcr_flags={"AS": 1})
    regs = tree.regs.replace(TTBR0_EL1=tree.regs.TTBR0_EL1 | 0x1234 << 48, TTBR1_EL1=tree.regs.TTBR1_EL1 | 0x5678 << 48)
    for a1 in (0, 1):
        one = regs.replace(TCR_EL1=regs.TCR_EL1 | a1 << 22)
        assert translate(tree.memory, one, tree.va).params.asid == (0x5678 if a1 else 0x1234)
        both_ttbrs = one.replace(TCR2_EL1=A2)
        assert translate(tree.memory, both_ttbrs, tree.va).params.asid == (0x5678 if upper else 0x1234)
        off = Registers(CPU.replace(asid2=False), **dict(both_ttbrs.as_dict()))
        assert translate(tree.memory, off, tree.va).params.asid == (0x5678 if a1 else 0x1234)


@pytest.mark.parametrize("upper", [False, True])
def test_fng_makes_the_entries_of_a_half_non_global(upper: bool) -> None:
    for bit, half in ((FNG0, False), (FNG1, True)):
        tree = page(upper=upper, TCR2_EL1=bit)
        found = translate(tree.memory, tree.regs, tree.va).result
        assert isinstance(found, Translation)
        assert found.nG == (half == upper)


def refuses_amec(tree: hand.Tree, el: int = 2) -> bool:
    fault = translate(tree.memory, tree.regs, tree.va, Access.read(el=el)).fault
    if fault:
        assert (fault.type, fault.level, fault.cause) == (FaultType.TRANSLATION, 3, "AMEC")
    return fault is not None


@pytest.mark.parametrize("regime", ["EL2", "EL20"])
def test_an_alternate_context_wants_leave(regime: str) -> None:
    """AMEC, bit 63 of a leaf in Realm memory, faults with EMEC = 1 and no AMEC0 or AMEC1 of its half."""
    for upper in (False, True) if regime == "EL20" else (False,):
        tree = hand.tree(
            hand.leaf() | 1 << 63,
            regime=regime,
            upper=upper,
            cpu=CPU.replace(mec=True),
            SCR_EL3=scr(REALM, SCTLR2EN),
            SCTLR2_EL2=2,
        )
        assert refuses_amec(tree)
        assert refuses_amec(tree.with_regs(TCR2_EL2=AMEC0 if upper else AMEC1))
        assert not refuses_amec(tree.with_regs(TCR2_EL2=AMEC1 if upper else AMEC0))
        assert not refuses_amec(tree.with_regs(SCTLR2_EL2=0))
        assert not refuses_amec(tree.with_regs(SCR_EL3=scr(REALM)))
        assert not refuses_amec(tree.with_regs(SCR_EL3=scr(NONSECURE, SCTLR2EN)))
        assert not refuses_amec(tree.with_features(mec=False))
        assert not refuses_amec(tree.with_word(3, hand.leaf(NS=1) | 1 << 63))
        assert not refuses_amec(tree.with_word(3, hand.leaf()))
        # before the access flag
        assert refuses_amec(tree.with_word(3, hand.leaf(AF=0) | 1 << 63))
    assert not refuses_amec(page(state=REALM, word=hand.leaf() | 1 << 63, SCTLR2_EL2=2, scr=SCTLR2EN), el=1)
