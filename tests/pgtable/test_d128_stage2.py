"""128-bit descriptors of stage 2, and both stages. Judges: nobody. Expected values are typed from Arm's tables."""

from __future__ import annotations

from typing import Any

import pytest

from pgtable import CPUS, Access, AccessType, Fault, FaultType, translate, translate_many, translate_nested
from pgtable.at import at
from pgtable.d128 import NOT_JUDGED
from pgtable.mmu import translate128
from pgtable.nested128 import NestedWalk128
from pgtable.params128 import Stage2Params128
from pgtable.stage2_128 import Of, stage2_walk128
from pgtable.stage2_permissions import EL0_EXECUTE, EL1_EXECUTE, READ, WRITE
from tests.pgtable import hand
from tests.pgtable.hand128 import (
    CPU,
    GUEST,
    GUEST_OUT,
    GUEST_PA,
    HOST,
    OUT_PA,
    Ram,
    Tree,
    leaf,
    nested,
    s2leaf,
    table,
    ttbr,
)

T = FaultType


def asked(made: Tree, access: Access | None = None, **keywords: Any) -> NestedWalk128:
    found = translate_nested(made.memory, made.regs, made.va, access or Access.read(), **keywords)
    assert isinstance(found, NestedWalk128)
    return found


def fault(made: Tree, access: Access | None = None) -> Fault:
    found = asked(made, access).fault
    assert found, "it translates"
    assert found.stage == 2
    return found


# Both stages.


def test_both_stages() -> None:
    made = nested()
    made = made._replace(va=0x123_4567)
    found = asked(made, Access.write())
    assert (found.pa, found.ipa, found.hpfar) == (OUT_PA + 0x123_4567, GUEST_OUT + 0x123_4567, 0)
    assert [step.level for step in found.steps] == [1]
    assert [table.ipa for table in found.tables] == [GUEST]
    assert str(found).endswith(NOT_JUDGED)
    assert isinstance(translate(made.memory, made.regs, made.va), NestedWalk128)
    assert translate128(made.memory, made.regs, made.va).pa == found.pa
    with pytest.raises(ValueError, match=r"128-bit descriptors are for translate"):
        translate_many(made.memory, made.regs, [0])


def test_a_stage_1_of_64_bits_under_a_stage_2_of_128() -> None:
    plain = hand.tree(hand.leaf(GUEST_OUT, low=1), va=0, ia=31, level=1, root=GUEST, cpu=CPU)  # a block of 1 GiB
    made = nested()
    words = {**made.memory, GUEST_PA: plain.memory[GUEST]}
    regs = made.regs.replace(**{**plain.regs.as_dict(), **{n: made.regs[n] for n in STAGE2}})
    found = translate_nested(Ram(words), regs, 0x123_4567)
    assert isinstance(found, NestedWalk128)
    assert found.pa == OUT_PA + 0x123_4567
    assert str(found).endswith(NOT_JUDGED)
    assert at(Ram(words), regs, "S12E1R", 0x123_4567) >> 64 & 1 == 1
    assert at(Ram(words), regs, "S1E1R", 0x123_4567) >> 64 == 0


STAGE2 = ("HCR_EL2", "VTCR_EL2", "VTTBR_EL2", "S2PIR_EL2")


def test_a_stage_1_of_128_bits_under_a_stage_2_of_64() -> None:
    made = nested(vtcr={"D128": 0, "T0SZ": 33, "PS": 5})  # 31 bits: level 1, SL0 = 1
    regs = made.regs.replace(VTCR_EL2=made.regs.VTCR_EL2 | 1 << 6)
    low = {HOST: (0x4000_0000 | 0x7FD) << 64 | 0, GUEST: leaf(GUEST_OUT - 0x4000_0000, 2)}  # entry 1: 1 GiB
    low[HOST + 16] = 0
    found = translate_nested(Ram(low), regs, 0x123_4567)
    assert isinstance(found, NestedWalk128)
    assert found.stage1_result.pa == 0x4123_4567
    assert found.pa == 0x4123_4567
    assert at(Ram(low), regs, "S12E1R", 0) >> 64 == 0
    assert at(Ram(low), regs, "S1E1R", 0) >> 64 & 1 == 1


def test_par_of_both_stages() -> None:
    made = nested()
    par = at(made.memory, made.regs, "S12E1R", 0x123_4567)
    assert (par >> 76, par >> 64 & 1) == ((OUT_PA + 0x123_4567) >> 12, 1)
    par = at(made.memory, made.regs, "S1E1R", 0x123_4567)
    assert (par >> 76, par >> 64 & 1) == ((GUEST_OUT + 0x123_4567) >> 12, 1)
    made = nested(of_result=0)
    assert at(made.memory, made.regs, "S12E1R", 0) == 1 << 64 | 1 << 11 | 1 << 9 | 0b000101 << 1 | 1
    made = nested(of_table=0)
    assert at(made.memory, made.regs, "S12E1R", 0) == 1 << 64 | 1 << 11 | 3 << 8 | 0b000101 << 1 | 1


def test_stage_2_off_and_secure_state() -> None:
    made = nested(hcr={"VM": 0})
    found = asked(made._replace(memory=Ram({GUEST: leaf(GUEST_OUT, 2)})))
    assert (found.pa, found.stage2) == (GUEST_OUT, None)
    made = nested(SCR_EL3=1 << 43 | 1 << 18)
    with pytest.raises(ValueError, match=r"^VTCR_EL2\.D128 is 1 in Secure state: its stage 2 .* is not built$"):
        asked(made)


# What a nibble of S2PIR_EL2 grants: read, write, execute at EL1 and EL0; read and update of a stage 1 table.
S2 = {
    **{0: "---- --", 1: "---- --", 2: "r--- ru", 3: "r--- ru", 4: "-w-- --", 5: "---- --", 6: "r--- ru", 7: "r--- ru"},
    **{8: "r--- r-", 9: "r--0 r-", 10: "r-1- r-", 11: "r-10 r-"},
    **{12: "rw-- ru", 13: "rw-0 ru", 14: "rw1- ru", 15: "rw10 ru"},
}
KINDS = [Access.read(), Access.write(), Access.fetch(1), Access.fetch(0)]


def granted(**registers: Any) -> str:
    """What a leaf with PIIndex 5, POIndex 9 lets through, as in `S2`."""
    word = s2leaf(OUT_PA, PIIndex=5, POIndex=9)
    overlay = {"vtcr": {"S2POE": 1}} if "S2POR_EL1" in registers else {}
    p = Stage2Params128.of(nested(**registers, **overlay).regs)
    memory = Ram({HOST + 8 * 16: word})
    shown = ""
    for letter, access in zip("rw10", KINDS, strict=True):
        found = stage2_walk128(memory.fetch16, p, GUEST_OUT, access).result
        shown += "-" if isinstance(found, Fault) else letter
    shown += " "
    for letter, access in (("r", Access.read()), ("u", Access.write())):
        found = stage2_walk128(memory.fetch16, p, GUEST_OUT, access, Of(s1ptw=True)).result
        shown += "-" if isinstance(found, Fault) else letter
    return shown


def test_every_nibble_of_s2pir() -> None:
    for nibble, letters in S2.items():
        assert granted(S2PIR_EL2=nibble << 20) == letters, nibble
    assert granted(S2PIR_EL2=0xFFFF_FFFF_FF0F_FFFF) == "---- --"


def test_every_nibble_of_s2por_limits_what_s2pir_grants() -> None:
    for base, allowed in S2.items():
        for overlay, limit in S2.items():
            both = "".join(a if a == b else "-" for a, b in zip(allowed, limit, strict=True))
            assert granted(S2PIR_EL2=base << 20, S2POR_EL1=overlay << 36) == both, (base, overlay)


def test_an_overlay_is_asked_before_the_base_and_a_read_before_a_write() -> None:
    for base, overlay, access, reported in (
        (0, 0, Access.read(), (True, False)),
        (0, 12, Access.read(), (False, False)),
        (12, 8, Access.atomic(), (True, True)),
        (12, 4, Access.atomic(), (True, False)),
        (0, 8, Access.atomic(), (True, True)),  # the overlay's write before the base's read
        (8, 12, Access.atomic(), (False, True)),
        (8, 12, Access.write(), (False, True)),
    ):
        word = s2leaf(OUT_PA, PIIndex=5, POIndex=9)
        made = nested(of_result=word, vtcr={"S2POE": 1}, S2PIR_EL2=0xC0 | base << 20, S2POR_EL1=0xC | overlay << 36)
        found = fault(made, access)
        assert (found.type, found.overlay, found.write) == (T.PERMISSION, *reported), (base, overlay, access)


def test_cache_maintenance() -> None:
    for kind, el, base, ok in (
        (AccessType.CLEAN, 1, 0, True),
        (AccessType.CLEAN, 0, 0, False),
        (AccessType.CLEAN, 0, 8, True),
        (AccessType.CLEAN_INVALIDATE, 0, 8, True),
        (AccessType.INVALIDATE, 1, 8, False),
        (AccessType.INVALIDATE, 1, 12, True),
        (AccessType.AT_WRITE, 1, 8, False),
        (AccessType.AT_READ, 1, 8, True),
        (AccessType.AT_ANY, 1, 0, True),
    ):
        made = nested(of_result=s2leaf(OUT_PA, PIIndex=5), S2PIR_EL2=0xC0 | base << 20, PIRE0_EL1=5)
        assert asked(made, Access(kind, el)).ok == ok, (kind, el, base)


# The order of checks: of two neighbours that both fail, the first is reported.

ORDER = ["T0SZ", "range", "SKL", "VTTBR"]
LEAF = ["Contiguous", "nT", "OA", "AF", "MemAttr", "AssuredOnly", "overlay", "permission", "dirty"]
WALK = ["TopLevel", "AssuredOnly", "overlay", "PTW", "permission"]


def start(*wrong: str) -> str:
    made = nested(vtcr={"T0SZ": 60 if "T0SZ" in wrong else 28, "PS": 5}, skl=3 if "SKL" in wrong else 0)
    if "VTTBR" in wrong:
        made = made._replace(regs=made.regs.replace(VTTBR_EL2=made.regs.VTTBR_EL2 | 1 << 80))
    p = Stage2Params128.of(made.regs)
    ipa = 1 << 40 if "range" in wrong else GUEST_OUT
    found = stage2_walk128(made.memory.fetch16, p, ipa, Access.read()).result
    return found.cause if isinstance(found, Fault) else ""


def of_leaf(*wrong: str, s1ptw: bool = False) -> str:
    fields = {
        "Contiguous": int("Contiguous" in wrong),
        "nT": int("nT" in wrong),
        "AF": int("AF" not in wrong),
        "MemAttr": 0 if "MemAttr" in wrong or "PTW" in wrong else 15,
        "AssuredOnly": int("AssuredOnly" in wrong),
        "POIndex": int("overlay" in wrong),
        "PIIndex": 3 if "permission" in wrong else 1,
        "Dirty": int("dirty" not in wrong),
    }
    word = s2leaf(1 << 50 if "OA" in wrong else OUT_PA, **fields)
    # 29 bits of IPA, one table at level 1 of two entries; a run of four is too large.
    vtcr = {"T0SZ": 35, "PS": 5, "S2POE": 1, "TL0": int("TopLevel" in wrong)}
    cpu = CPU.replace(nt_faults=True, contiguous_faults=True)
    made = nested(vtcr=vtcr, cpu=cpu, S2POR_EL1=0xF, hcr={}, S2PIR_EL2=0x80C2)
    if "PTW" in wrong:
        made = made._replace(regs=made.regs.replace(HCR_EL2=made.regs.HCR_EL2 | 4))
    p = Stage2Params128.of(made.regs)
    access = Access(AccessType.WRITE, aligned="MemAttr" not in wrong)
    found = stage2_walk128(Ram({HOST: word}).fetch16, p, 0, access, Of(s1ptw, first=s1ptw)).result
    if isinstance(found, Fault):
        return "overlay" if found.overlay else found.cause
    return ""


def test_the_order_of_checks() -> None:
    rows: list[tuple[Any, list[str]]] = [(start, ORDER), (of_leaf, LEAF)]
    rows.append((lambda *wrong: of_leaf(*wrong, s1ptw=True), [*WALK, "dirty"]))
    for ask, causes in rows:
        assert ask() == ""
        for first, second in zip(causes, [*causes[1:], causes[-1]], strict=True):
            assert ask(first, second) == first, (first, second)
            assert ask(second) == second


def test_levels_and_stage_of_faults() -> None:
    made = nested(of_table=0)
    found = fault(made)
    assert (found.type, found.level, found.s1ptw, found.cause) == (T.TRANSLATION, 1, True, "descriptor")
    assert asked(made).hpfar == GUEST >> 12 << 4
    made = nested(of_result=s2leaf(1 << 50), vtcr={"PS": 5})
    found = fault(made)
    assert (found.type, found.level, found.s1ptw, found.cause) == (T.ADDRESS_SIZE, 1, False, "OA")
    made = nested(of_result=table(1 << 50), vtcr={"PS": 5})
    assert fault(made)[:2] == (T.ADDRESS_SIZE, 1)
    made = nested(of_result=table(1 << 50))
    assert fault(made)[:2] == (T.EXTERNAL_ON_WALK, 2)
    made = nested(of_table=s2leaf(GUEST_PA, PIIndex=7))
    assert [fault(made, a).write for a in (Access.write(), Access.read(), Access.atomic())] == [True, False, False]


# Sizes.


def test_t0sz_limits() -> None:
    """56 bits of PA: 56 of IPA; 52: 52 with 64K or DS, else 48 (M.a.a); below: as many as the PA has."""
    for pa_bits, granule, ds, least in (
        *((56, 0, 0, 8), (56, 1, 0, 8), (56, 2, 0, 8)),
        *((52, 0, 0, 16), (52, 0, 1, 12), (52, 1, 0, 12), (52, 2, 0, 16), (52, 2, 1, 12)),
        *((48, 0, 1, 16), (48, 1, 0, 16), (44, 0, 0, 20), (40, 1, 0, 24)),
    ):
        for t0sz in (least - 1, least):
            made = nested(vtcr={"T0SZ": t0sz, "TG0": granule, "DS": ds}, cpu=CPU.replace(pa_bits=pa_bits))
            assert Stage2Params128.of(made.regs).txsz_ok == (t0sz == least), (pa_bits, granule, ds, t0sz)


# By granule (TG0): level of the first table, T0SZ from, to (VTTBR.SKL = 0).
STARTS = {
    0: [(-2, 8, 11), (-1, 12, 19), (0, 20, 27), (1, 28, 35), (2, 36, 43), (3, 44, 48)],
    2: [(-1, 8, 9), (0, 10, 19), (1, 20, 29), (2, 30, 39), (3, 40, 48)],
    1: [(0, 8, 11), (1, 12, 23), (2, 24, 35), (3, 36, 47)],
}


def test_the_first_level_whatever_sl0_says() -> None:
    for granule, rows in STARTS.items():
        for level, least, most in rows:
            for t0sz in range(least, most + 1):
                for skl in range(4):
                    made = nested(vtcr={"T0SZ": t0sz, "TG0": granule}, skl=skl)
                    for sl0 in (0, 1 << 6, 2 << 6, 3 << 6, 1 << 33):
                        p = Stage2Params128.of(made.regs.replace(VTCR_EL2=made.regs.VTCR_EL2 | sl0))
                        found = stage2_walk128(Ram().fetch16, p, 0, Access.read()).result
                        wanted = (T.EXTERNAL_ON_WALK, level + skl) if level + skl <= 3 else (T.TRANSLATION, 0)
                        assert isinstance(found, Fault)
                        assert (found.type, found.level) == wanted, (granule, t0sz, skl)


def test_the_output_size_and_the_root() -> None:
    for ps, size in ((0, 32), (4, 44), (5, 48), (6, 52), (7, 56)):
        for bit in range(31, 56):
            made = nested(of_result=s2leaf(1 << bit), vtcr={"PS": ps}, VTTBR_EL2=ttbr(0x10_0000))
            p = Stage2Params128.of(made.regs)
            memory = Ram({0x10_0000 + 8 * 16: s2leaf(1 << bit)})
            found = stage2_walk128(memory.fetch16, p, GUEST_OUT, Access.read()).result
            assert isinstance(found, Fault) == (bit >= size)
            p = Stage2Params128.of(made.regs.replace(VTTBR_EL2=ttbr(1 << bit)))
            found = stage2_walk128(Ram().fetch16, p, 0, Access.read()).result
            assert isinstance(found, Fault)
            assert found[:2] == ((T.ADDRESS_SIZE, 0) if bit >= size else (T.EXTERNAL_ON_WALK, 1))


# Attributes.


def test_memory_type_and_shareability() -> None:
    made = nested(of_result=s2leaf(OUT_PA, MemAttr=5))
    assert asked(made).result.attr == 0x44
    for ds, sh in ((0, 3), (1, 2)):  # with DS it is VTCR_EL2.SH0, though descriptors have the field
        made = nested(leaf(GUEST_OUT, 2, SH=0), of_result=s2leaf(OUT_PA, SH=3), vtcr={"DS": ds, "SH0": 2})
        assert asked(made).result.sh == sh


# Hardware updates.


def test_the_dirty_state_is_set_for_any_write_that_is_let_through() -> None:
    clean = s2leaf(OUT_PA, Dirty=0, AF=0)
    for access, dirty in ((Access.write(), 1), (Access.read(), 0), (Access.atomic(), 1)):
        made = nested(of_result=clean, vtcr={"HA": 1, "HD": 1})
        assert asked(made, access, swap=made.memory.swap).ok
        assert made.memory[HOST + 8 * 16] == s2leaf(OUT_PA, Dirty=dirty)
    found = fault(nested(of_result=s2leaf(OUT_PA, Dirty=0)), Access.write())
    assert (found.type, found.dirty_bit, found.write) == (T.PERMISSION, True, True)
    assert asked(nested(of_result=s2leaf(OUT_PA, Dirty=0)), Access.read()).ok
    assert fault(nested(of_result=clean)).type is T.ACCESS_FLAG


def test_updates_of_stage_1_are_writes_at_stage_2() -> None:
    """Also to a page that is MRO; without HD its Dirty must be 1 already."""
    first = leaf(GUEST_OUT, 2, AF=0)
    for index, dirty, hd, ok in ((4, 0, 1, 1), (4, 1, 0, 1), (4, 0, 0, 0), (3, 1, 1, 0), (1, 0, 1, 1)):
        page = s2leaf(GUEST_PA, PIIndex=index, Dirty=dirty)
        made = nested(first, page, tcr={"HA": 1}, vtcr={"HA": 1, "HD": hd})
        found = asked(made, swap=made.memory.swap)
        assert found.ok == bool(ok), (index, dirty, hd)
        assert made.memory[GUEST_PA] == (leaf(GUEST_OUT, 2) if ok else first)
        if ok:
            assert made.memory[HOST + 4 * 16] == s2leaf(GUEST_PA, PIIndex=index, Dirty=1)
        else:
            assert (found.fault.s1ptw, found.fault.dirty_bit) == (True, index == 4)


def test_the_access_flag_of_stage_2_tables() -> None:
    top = table(0x1_1000_0000)
    made = nested(of_result=top, vtcr={"HA": 1, "HAFT": 1})
    made.memory[0x1_1000_0000] = leaf(OUT_PA, 1, MemAttr=15, PIIndex=1)
    found = asked(made, swap=made.memory.swap)
    assert found.pa == OUT_PA
    assert made.memory[HOST + 8 * 16] == table(0x1_1000_0000, AF=1)


# FEAT_THE.

# By VTCR_EL2.(TL0, TL1) and the page's TopLevel attributes (none, TL1, TL0, both): x refuses the first table.
TOP_LOWER = {(0, 0): "....", (1, 0): "xx..", (0, 1): ".x..", (1, 1): "xx.."}
TOP_UPPER = {(0, 0): "....", (0, 1): "x.x.", (1, 0): "..x.", (1, 1): "x.x."}


def test_top_level_checks_of_the_first_table() -> None:
    for upper, rows in ((False, TOP_LOWER), (True, TOP_UPPER)):
        for (tl0, tl1), row in rows.items():
            for nibble, letter in zip((2, 3, 6, 7), row, strict=True):
                page = s2leaf(GUEST_PA, PIIndex=9)
                made = nested(None, page, upper=upper, vtcr={"TL0": tl0, "TL1": tl1}, S2PIR_EL2=0xC0 | nibble << 36)
                # the upper half of 36 bits has the same entry
                found = asked(made).fault
                assert (found is not None) == (letter == "x"), (upper, tl0, tl1, nibble)
                if found:
                    assert (found.cause, found.type, found.s1ptw) == ("TopLevel", T.PERMISSION, True)
                    assert found.esr(Access.read()) >> 21 & 1 == 1
                    assert found.par() >> 13 & 1 == 1
    made = nested(None, s2leaf(GUEST_PA), vtcr={"TL0": 1}, cpu=CPU.replace(the=False))
    assert asked(made).ok


def test_only_the_first_table_is_checked() -> None:
    page = s2leaf(GUEST_PA, PIIndex=0)  # MRO-TL0
    first = table(0x5000_0000, 0)
    made = nested(first, page, vtcr={"TL0": 1})
    made.memory[HOST + 5 * 16] = s2leaf(0x2_5000_0000)  # no TopLevel
    made.memory[0x2_5000_0000] = leaf(GUEST_OUT, 1)
    assert asked(made).ok


def test_top_level_of_an_update() -> None:
    """Hardware's write of a stage 1 descriptor is not checked: here of the second table."""
    made = nested(table(0x5000_0000, 0), s2leaf(GUEST_PA, PIIndex=0), vtcr={"TL0": 1, "HA": 1, "HD": 1}, tcr={"HA": 1})
    made.memory[HOST + 5 * 16] = s2leaf(0x2_5000_0000)
    made.memory[0x2_5000_0000] = leaf(GUEST_OUT, 1, AF=0)
    assert asked(made, swap=made.memory.swap).ok
    assert made.memory[0x2_5000_0000] == leaf(GUEST_OUT, 1)


def test_assured_translations() -> None:
    """VTCR_EL2.TL0, Protected in the descriptor of stage 1, and its table in an MRO page: all three."""
    for tl0, protected, index, ok in ((1, 1, 0, 1), (0, 1, 0, 0), (1, 0, 0, 0), (0, 1, 1, 0)):
        first = leaf(GUEST_OUT, 2, Protected=protected)
        made = nested(first, s2leaf(GUEST_PA, PIIndex=index), s2leaf(OUT_PA, AssuredOnly=1), vtcr={"TL0": tl0})
        for access in (Access.read(), Access.write(), Access(AccessType.AT_READ)):
            assert asked(made, access).ok == bool(ok), (tl0, protected, index)
        if not ok:
            assert fault(made).cause == "AssuredOnly"
            assert fault(made).esr(Access.read()) >> 39 & 1 == 1
            assert fault(made).par() >> 12 & 1 == 1


def test_an_assured_only_page_may_hold_tables_of_assured_walks_alone() -> None:
    for tl0, ok in ((1, True), (0, False)):
        page = s2leaf(GUEST_PA, PIIndex=0, AssuredOnly=1)
        assert asked(nested(None, page, vtcr={"TL0": tl0})).ok == ok


def test_guarded_control_stacks_need_assured_only() -> None:
    first = leaf(GUEST_OUT, 2, Protected=1)
    for only, gcsh, el, ok in ((0, 1, 1, 0), (1, 1, 1, 1), (0, 0, 1, 1), (0, 1, 0, 1)):
        made = nested(
            first,
            s2leaf(GUEST_PA, PIIndex=0),
            s2leaf(OUT_PA, AssuredOnly=only),
            vtcr={"TL0": 1, "GCSH": gcsh},
            PIR_EL1=9 if el else 0,
            PIRE0_EL1=0 if el else 9,
        )
        assert asked(made, Access(AccessType.GCS_READ, el)).ok == bool(ok), (only, gcsh, el)


def test_parameters_need_the_feature() -> None:
    made = nested()
    old = made.regs.as_dict() | {"VTTBR_EL2": HOST, "TTBR0_EL1": GUEST}
    from pgtable import Registers

    with pytest.raises(ValueError, match=r"^stage 2 has 64-bit descriptors: VTCR_EL2\.D128 is 0"):
        Stage2Params128.of(Registers(CPUS["max"], **old))
    p = Stage2Params128.of(made.regs)
    found = stage2_walk128(made.memory.fetch16, p, GUEST_OUT, Access.read())
    assert str(found).endswith(NOT_JUDGED)
    assert found.result.perms == READ | WRITE
    assert not found.mro
    assert EL1_EXECUTE != EL0_EXECUTE
