"""128-bit descriptors of stage 1. Judges: nobody. Every expected value is typed from Arm's tables, none is computed.

The mutants at the end are broken rules: each must make one of these tests fail.
"""

from __future__ import annotations

from typing import Any

import pytest

from pgtable import CPUS, Access, AccessType, Fault, FaultType, Granule, Kind, PhysicalMemory, Registers, translate
from pgtable.at import at
from pgtable.d128 import NOT_JUDGED, Format128
from pgtable.leaves import leaves
from pgtable.mmu import branch_target, translate128, translate_many
from pgtable.params import Regime
from pgtable.params128 import WalkParams128
from pgtable.walk128 import Walk128, walk128
from tests.pgtable import hand
from tests.pgtable.hand128 import CPU, OUT, ROOT, STEP, Ram, Tree, leaf, table, tree, ttbr

T = FaultType
GRANULES = {"4K": Granule.K4, "16K": Granule.K16, "64K": Granule.K64}
SHIFTS = {"4K": {3: 12, 2: 20, 1: 28, 0: 36}, "16K": {3: 14, 2: 24, 1: 34}, "64K": {3: 16, 2: 28, 1: 40}}
PATHS = {3: 0, 2: 1, 1: 2, 0: 3}  # SKL of a leaf, by its level


def asked(made: Tree, access: Access | None = None, **keywords: Any) -> Walk128:
    """The walk, by the registers."""
    found = translate128(made.memory, made.regs, made.va, access or Access.read(_el(made)), **keywords)
    assert isinstance(found, Walk128)
    return found


def _el(made: Tree) -> int:
    return 3 if made.regs.TCR_EL3 else 2 if made.regs.TCR_EL2 else 1


def refused(made: Tree, access: Access | None = None, **keywords: Any) -> tuple[FaultType, int, str]:
    """Type, level and cause of the fault."""
    fault = asked(made, access, **keywords).fault
    assert fault, "it translates"
    return fault.type, fault.level, fault.cause


# What a descriptor is.

KINDS = {  # by granule and level: SKL 0 to 3; T table, B block, P page, - invalid
    "4K": {-2: "TTTT", -1: "TTTT", 0: "TTTB", 1: "TTB-", 2: "TB--", 3: "P---"},
    "16K": {-1: "TTT-", 0: "TTT-", 1: "TTB-", 2: "TB--", 3: "P---"},
    "64K": {0: "TTT-", 1: "TTB-", 2: "TB--", 3: "P---"},
}
LETTERS = {"T": Kind.TABLE, "B": Kind.BLOCK, "P": Kind.PAGE, "-": Kind.INVALID}


def test_what_a_descriptor_is_by_granule_level_skl_and_the_valid_bit() -> None:
    for granule, rows in KINDS.items():
        for stage2 in (False, True):
            fmt = Format128(GRANULES[granule], stage2=stage2)
            for level, row in rows.items():
                for skl, letter in enumerate(row):
                    for bit_1 in (0, 2):
                        word = skl << 109 | bit_1
                        assert fmt.kind(word | 1, level) is LETTERS[letter], (granule, level, skl)
                        assert fmt.kind(word, level) is Kind.INVALID


# Where a walk starts.

# By granule: level of the first table, TxSZ from, to (TTBR.SKL = 0).
STARTS = {
    "4K": [(-2, 8, 11), (-1, 12, 19), (0, 20, 27), (1, 28, 35), (2, 36, 43), (3, 44, 48)],
    "16K": [(-1, 8, 9), (0, 10, 19), (1, 20, 29), (2, 30, 39), (3, 40, 48)],
    "64K": [(0, 8, 11), (1, 12, 23), (2, 24, 35), (3, 36, 47)],
}


def test_the_first_level_by_txsz_granule_and_ttbr_skl() -> None:
    for granule, rows in STARTS.items():
        for start, least, most in rows:
            for txsz in range(least, most + 1):
                for skl in range(4):
                    made = tree([], granule=granule, ia=64 - txsz, regime="EL3", skl=skl)
                    found = asked(made, Access.read(3)).result
                    wanted = (T.EXTERNAL_ON_WALK, start + skl) if start + skl <= 3 else (T.TRANSLATION, 0)
                    assert isinstance(found, Fault)
                    assert (found.type, found.level) == wanted, (granule, txsz, skl)


def test_txsz_limits() -> None:
    """LVA3: 9, in EL3 8; without it 12 with LVA, whatever the granule (M.a.a), else 16. At most 48, 64K 47."""
    for regime, changes, least in (
        ("EL10", {}, 9),
        ("EL20", {}, 9),
        ("EL3", {}, 8),
        ("EL10", {"lva3": False}, 12),
        ("EL3", {"lva3": False}, 12),
        ("EL10", {"lva3": False, "lva": False}, 16),
    ):
        for granule, most in (("4K", 48), ("16K", 48), ("64K", 47)):
            for txsz, ok in ((least - 1, False), (least, True), (most, True), (most + 1, False)):
                made = tree([], granule=granule, ia=64 - txsz, regime=regime, cpu=CPU.replace(**changes))
                assert (refused(made)[2] != "TxSZ") == ok, (regime, changes, granule, txsz)


def test_va_range_of_56_bits() -> None:
    """EL3 has bit 55 as an address bit; a half of EL1&0 has 55 bits, bit 55 chooses it."""
    for va, tbi, ok in ((1 << 55, 0, 1), (1 << 56, 0, 0), (1 << 56, 1, 1), (0xFF80 << 48, 1, 1)):
        made = tree([], ia=56, regime="EL3", tcr={"TBI": tbi})._replace(va=va)
        assert (refused(made)[2] == "memory") == ok, hex(va)
    for va, tbi, ok in ((1 << 54, 0, 1), (1 << 56, 0, 0), (1 << 56, 1, 1), (0xFF80 << 48, 0, 1), (0x80 << 48, 0, 0)):
        made = tree([], ia=55, upper=bool(va >> 55 & 1), tcr={"TBI0": tbi, "TBI1": tbi})._replace(va=va)
        assert (refused(made)[2] == "memory") == ok, hex(va)


def test_with_the_mmu_off_56_bits_go_through() -> None:
    """The VA is the PA, up to the CPU's size; a lower half has 55 bits below the one that chooses it."""
    for regime, va, ok in (("EL3", 0xFF_FFFF_FFFF_F123, 1), ("EL3", 1 << 56, 0), ("EL10", 0x7F_FFFF_FFFF_F123, 1)):
        made = tree([], regime=regime, sctlr={"M": 0})._replace(va=va)
        if ok:
            assert (asked(made).pa, asked(made).result.level, asked(made).steps) == (va, None, ())
            assert str(asked(made)).endswith(NOT_JUDGED)
        else:
            assert refused(made) == (T.ADDRESS_SIZE, 0, "VA")


# The first table's address.


def first_read(made: Tree) -> int:
    asked(made)
    return made.memory.reads[0]


def test_ttbr_is_aligned_to_the_size_of_the_first_table() -> None:
    """4K, 36 bits: 256 entries, 4 KiB. SKL = 1: 2^16 entries, 1 MiB. One bit resolved: at least 32 bytes."""
    for ia, skl, kept in ((36, 0, 0xFFFF_F000), (36, 1, 0xFFF0_0000), (29, 0, 0xFFFF_FFE0), (21, 0, 0xFFFF_FFE0)):
        made = tree([], ia=ia, skl=skl, root=0xFFFF_FFE0)
        assert first_read(made) == kept, (ia, skl)


def test_ttbr_holds_56_address_bits() -> None:
    for bit in range(12, 56):
        assert first_read(tree([], ia=36, root=1 << bit)) == 1 << bit
        assert first_read(tree([], ia=36, root=1 << bit, regime="EL3")) == 1 << bit
        assert first_read(tree([], ia=36, root=1 << bit, upper=True)) == 1 << bit


def test_the_first_table_may_be_larger_than_a_page() -> None:
    made = tree([], ia=36, skl=2, va=0xF_FFFF_F123)  # level 3, 24 bits
    assert first_read(made) == ROOT + 0xFF_FFFF * 16


# Leaves.


def test_the_size_of_a_leaf_by_granule_and_level() -> None:
    for granule, rows in SHIFTS.items():
        for level, shift in rows.items():
            va = (1 << shift) - 1
            skl = level - {"4K": 0, "16K": 1, "64K": 1}[granule]
            made = tree([leaf(1 << 55, PATHS[level])], granule=granule, va=va, start=level, skl=skl)
            found = asked(made)
            assert (found.pa, found.steps[-1].level) == (1 << 55 | va, level), (granule, level)


def test_an_output_address_has_the_bits_down_to_the_size_of_the_leaf() -> None:
    for granule, rows in SHIFTS.items():
        for level, shift in rows.items():
            skl = level - {"4K": 0, "16K": 1, "64K": 1}[granule]
            for bit in range(12, 56):
                made = tree([leaf(1 << bit, PATHS[level])], granule=granule, start=level, skl=skl)
                assert asked(made).pa == (1 << bit if bit >= shift else 0), (granule, level, bit)


RUNS = {  # log2 of the bytes of a contiguous run
    "4K": {0: 36, 1: 30, 2: 24, 3: 16},
    "16K": {1: 36, 2: 28, 3: 20},
    "64K": {1: 40, 2: 34, 3: 20},
}


def test_the_size_of_a_contiguous_run() -> None:
    cpu = CPU.replace(contiguous_output=True)
    for granule, rows in RUNS.items():
        for level, size in rows.items():
            va = (1 << 44) - 1
            skl = level - {"4K": 0, "16K": 1, "64K": 1}[granule]
            word = leaf(1 << 54, PATHS[level], Contiguous=1)
            made = tree([word], granule=granule, va=va, start=level, skl=skl, cpu=cpu)
            assert asked(made).pa == 1 << 54 | (1 << size) - 1, (granule, level)


def test_disch_is_of_the_descriptor_that_led_to_the_table_of_the_leaf_alone() -> None:
    """TCR2.DisCH0 for the first table; each table descriptor replaces it."""
    cpu, va = CPU.replace(contiguous_output=True), 0xF000
    run, alone = 0x80_0000_F000, 0x80_0000_0000
    page = leaf(OUT, Contiguous=1)
    for top, first, second, pa in ((0, 0, 0, run), (0, 0, 1, alone), (0, 1, 0, run), (1, 0, 0, run), (1, 1, 0, run)):
        words = [table(ROOT + STEP, DisCH=first), table(ROOT + 2 * STEP, DisCH=second), page]
        made = tree(words, ia=36, start=1, va=va, cpu=cpu, tcr2={"DisCH0": top})
        assert asked(made).pa == pa, (top, first, second)
    for top, pa in ((0, run), (1, alone)):
        assert asked(tree([page], ia=20, start=3, va=va, cpu=cpu, tcr2={"DisCH0": top})).pa == pa
        made = tree([page], ia=20, start=3, va=va, cpu=cpu, regime="EL3", tcr2={"DisCH0": top})
        assert asked(made).pa == pa


# Tables.


def test_a_skipping_table_descriptor_leads_further_down_and_to_a_larger_table() -> None:
    """4K: SKL levels are skipped, and the address is aligned to 4 KiB, 1 MiB, 256 MiB."""
    ones = 0xFF_FFFF_FFFF_F000
    for skl, below, kept, index in (
        (0, 1, 0xFF_FFFF_FFFF_F000, 0xAB),
        (1, 2, 0xFF_FFFF_FFF0_0000, 0xABCD),
        (2, 3, 0xFF_FFFF_F000_0000, 0xABCDEF),
    ):
        made = tree([table(ones, skl)], ia=44, va=0xA_BCDE_F123)
        assert refused(made) == (T.EXTERNAL_ON_WALK, below, "memory")
        assert made.memory.reads == [ROOT, kept + index * 16]


def test_the_level_below_a_table_at_minus_two() -> None:
    for skl, below in ((0, -1), (1, 0), (2, 1), (3, 2)):
        made = tree([table(1 << 50, skl)], ia=55, start=-2)
        assert refused(made) == (T.EXTERNAL_ON_WALK, below, "memory")


def test_a_table_address_has_56_bits() -> None:
    for granule, low, start in (("4K", 12, 0), ("16K", 14, 1), ("64K", 16, 1)):
        for bit in range(12, 56):
            made = tree([table(1 << bit)], granule=granule, start=start)
            refused(made)
            assert made.memory.reads[1] == (1 << bit if bit >= low else 0), (granule, bit)


def test_a_walk_of_five_tables_and_one_that_skips_three() -> None:
    va = 0x12_3456_789A_BCDE
    long = tree([table(ROOT + STEP * n) for n in range(1, 6)] + [leaf()], ia=55, start=-2, va=va)
    found = asked(long)
    assert [step.level for step in found.steps] == [-2, -1, 0, 1, 2, 3]
    assert [step.entry for step in found.steps] == [0x1, 0x23, 0x45, 0x67, 0x89, 0xAB]
    assert found.pa == OUT + 0xCDE
    short = tree([table(1 << 52, 3), leaf(skl=1)], ia=55, start=-2, va=va)
    found = asked(short)
    assert [step.level for step in found.steps] == [-2, 2]
    assert [step.entry for step in found.steps] == [0x1, 0x2345_6789]
    assert found.pa == OUT + 0xABCDE
    assert NOT_JUDGED in str(found)
    assert "L2 0x10000000000000[591751049]" in str(found)


# Permissions and attributes.


def test_every_pi_index_takes_its_own_nibble() -> None:
    """PIR and PIRE0 with one nibble that allows reads."""
    for index in range(16):
        for other in range(16):
            made = tree([leaf(PIIndex=other)], ia=20, start=3, PIR_EL1=0x1 << 4 * index, PIRE0_EL1=0x8 << 4 * index)
            for el in (0, 1):
                assert asked(made, Access.read(el)).ok == (index == other), (index, other, el)


# What a nibble allows, of PIR_EL1 (letters) and of PIRE0_EL1; from the table of S1IndirectBasePermissions.
PIR_ROWS = ["---", "r--", "--x", "r-x", "---", "rw-", "rwx", "rwx"]
PIR_ROWS += ["r--", "r--", "r-x", "---", "rw-", "---", "rwx", "---"]


def test_every_nibble_means_what_it_means_in_64_bit_descriptors() -> None:
    for nibble, letters in enumerate(PIR_ROWS):
        if nibble == 6:  # its X goes while it may be written
            letters = "rw-"
        for el in (0, 1):
            made = tree([leaf()], ia=20, start=3, PIR_EL1=0 if el == 0 else nibble, PIRE0_EL1=nibble if el == 0 else 0)
            kinds = (Access.read(el), Access.write(el), Access.fetch(el))
            found = "".join(n if asked(made, a).ok else "-" for n, a in zip("rwx", kinds, strict=True))
            assert found == letters, (nibble, el)


def test_permissions_are_indirect_without_tcr2_pie_and_tables_do_not_limit_them() -> None:
    limits = 7 << 59 | 3 << 125 | 1 << 124 | 1 << 123  # where 64-bit descriptors, and 128-bit ones once, had them
    made = tree([table(ROOT + STEP) | limits & ~((1 << 64) - 1), leaf()], ia=28, start=2)
    assert asked(made, Access.write()).ok
    for skl_free in (1 << 51, 1 << 53, 1 << 54):  # DBM, PXN and UXN of 64-bit words: address bits
        assert asked(tree([leaf(skl_free)], ia=20, start=3), Access.write()).pa == skl_free


def test_overlays_have_sixteen_entries() -> None:
    for index in range(16):
        for other in range(16):
            made = tree(
                [leaf(POIndex=other)],
                ia=20,
                start=3,
                tcr2={"POE": 1, "E0POE": 1},
                POR_EL1=0x1 << 4 * index,
                POR_EL0=0x1 << 4 * index,
                PIRE0_EL1=1,
            )
            for el in (0, 1):
                fault = asked(made, Access.read(el)).fault
                assert (fault is None) == (index == other), (index, other, el)
                assert fault is None or fault.overlay
    assert asked(tree([leaf(POIndex=15)], ia=20, start=3)).ok, "without POE it is reserved"


def test_attr_index_has_four_bits_with_aie() -> None:
    mair, mair2 = 0x0706_0504_0302_0100 * 16 + 0x4444_4444_4444_4444, 0xFFEE_DDCC_BBAA_9988
    for index in range(16):
        for aie in (0, 1):
            made = tree([leaf(AttrIndx=index)], ia=20, start=3, tcr2={"AIE": aie}, MAIR_EL1=mair, MAIR2_EL1=mair2)
            row = ["44", "54", "64", "74", "84", "94", "a4", "b4", "88", "99", "aa", "bb", "cc", "dd", "ee", "ff"]
            found = asked(made).result
            assert found.attr == int(row[index if aie else index & 7], 16), (index, aie)


def test_a_leaf_has_its_own_shareability_and_flags() -> None:
    """SH is the descriptor's even with TCR.DS = 1; nG is bit 11; GP is bit 113; NS, in Secure state, bit 127."""
    for sh in (0, 2, 3):
        assert asked(tree([leaf(SH=sh)], ia=20, start=3, tcr={"DS": 1})).result.sh == sh
    for ng in (0, 1):
        assert asked(tree([leaf(nG=ng)], ia=20, start=3)).result.nG == bool(ng)
        assert not asked(tree([leaf(nG=ng)], ia=20, start=3, regime="EL3")).result.nG
        assert asked(tree([leaf(GP=ng)], ia=20, start=3)).result.guarded == bool(ng)
        assert asked(tree([leaf(NS=ng)], ia=20, start=3, SCR_EL3=1 << 43)).result.ns == bool(ng)
        words = [table(ROOT + STEP, NSTable=ng), leaf()]
        found = asked(tree(words, ia=28, start=2, SCR_EL3=1 << 43)).result
        assert (found.ns, found.nG) == (bool(ng), bool(ng))


# The output size.

PS = {0: 32, 1: 36, 2: 40, 3: 42, 4: 44, 5: 48, 6: 52, 7: 56}


def test_an_address_beyond_the_output_size_is_a_fault_at_its_level() -> None:
    for ps, size in PS.items():
        for bit in range(30, 56):
            made = tree([], ia=36, ps=ps, root=1 << bit)
            assert refused(made)[:2] == ((T.ADDRESS_SIZE, 0) if bit >= size else (T.EXTERNAL_ON_WALK, 1))
            made = tree([leaf(1 << bit)], ia=20, start=3, ps=ps, root=0x10_0000)
            assert asked(made).ok == (bit < size)
            assert asked(made).ok or refused(made) == (T.ADDRESS_SIZE, 3, "OA")
            words = [table(0x20_0000), table(1 << bit), leaf(0)]
            made = tree(words, ia=36, start=1, ps=ps, root=0x10_0000)
            assert asked(made).ok == (bit < size)
            assert asked(made).ok or refused(made) == (T.ADDRESS_SIZE, 2, "table")


def test_the_output_size_is_that_of_the_cpu_at_most() -> None:
    for pa_bits in (40, 48, 52, 56):
        made = tree([leaf(1 << pa_bits - 1)], ia=20, start=3, cpu=CPU.replace(pa_bits=pa_bits), root=0x10_0000)
        assert asked(made).ok
        if pa_bits < 56:
            made = tree([leaf(1 << pa_bits)], ia=20, start=3, cpu=CPU.replace(pa_bits=pa_bits), root=0x10_0000)
            assert refused(made) == (T.ADDRESS_SIZE, 3, "OA")


# Hardware updates.


def test_the_access_flags_of_tables_and_leaf_and_the_dirty_state() -> None:
    words = [table(ROOT + STEP), table(ROOT + 2 * STEP, AF=1), leaf(AF=0, nDirty=1)]
    for access, new_leaf in ((Access.read(), leaf(nDirty=1)), (Access.write(), leaf())):
        made = tree(words, ia=36, start=1, tcr={"HA": 1, "HD": 1}, tcr2={"HAFT": 1})
        found = asked(made, access, swap=made.memory.swap)
        assert found.ok
        assert [made.memory[pa] for pa in made.at] == [table(ROOT + STEP, AF=1), words[1], new_leaf]
        assert [update.pa for update in found.updates] == [made.at[0], made.at[2]]


def test_what_controls_the_updates() -> None:
    words = [table(ROOT + STEP), leaf(AF=0, nDirty=1)]
    for ha, hd, haft, changed in ((0, 1, 1, None), (1, 0, 0, [1]), (1, 1, 0, [1]), (1, 0, 1, [0, 1])):
        made = tree(words, ia=28, start=2, tcr={"HA": ha, "HD": hd}, tcr2={"HAFT": haft})
        found = asked(made)
        if changed is None:
            assert refused(made) == (T.ACCESS_FLAG, 3, "AF")
            assert not found.updates
        else:
            assert [update.pa for update in found.updates] == [made.at[i] for i in changed]
    made = tree([leaf(nDirty=1)], ia=20, start=3)
    fault = asked(made, Access.write()).fault
    assert fault
    assert (fault.type, fault.dirty_bit, fault.write) == (T.PERMISSION, True, True)


def test_a_table_is_marked_though_nothing_below_it_is_there() -> None:
    made = tree([table(ROOT + STEP)], ia=28, start=2, tcr={"HA": 1}, tcr2={"HAFT": 1})
    assert refused(made, swap=made.memory.swap) == (T.EXTERNAL_ON_WALK, 3, "memory")
    assert made.memory[made.at[0]] == table(ROOT + STEP, AF=1)


def test_a_descriptor_that_somebody_else_changes_is_read_again() -> None:
    made = tree([leaf(AF=0)], ia=20, start=3, tcr={"HA": 1})
    other = leaf(OUT + 0x1000, AF=0)

    def swap(pa: int, old: int, new: int) -> bool:
        if old == leaf(AF=0):
            made.memory[pa] = other
            return False
        return made.memory.swap(pa, old, new)

    found = asked(made, swap=swap)
    assert found.pa == OUT + 0x1000
    assert len(found.raw) == len(found.updates) == 1
    assert made.memory[made.at[0]] == leaf(OUT + 0x1000)


def test_big_endian_tables_swap_all_sixteen_bytes() -> None:
    word = leaf(AF=0)
    made = tree([int.from_bytes(word.to_bytes(16, "big"), "little")], ia=20, start=3, tcr={"HA": 1}, sctlr={"EE": 1})
    found = asked(made, swap=made.memory.swap)
    assert found.pa == OUT
    assert found.raw[0][2] == word
    assert made.memory[made.at[0]].to_bytes(16, "big") == leaf().to_bytes(16, "little")


# The order of checks: of two neighbours that both fail, the first is reported.

EARLY = ["TxSZ", "range", "E0PD", "EPD", "SKL", "TTBR", "descriptor", "table", "nT", "memory"]
LATE = ["Contiguous", "nT", "AMEC", "OA", "AF", "ALIGNMENT", "permission"]


def early(*wrong: str) -> str:
    """What is reported of a walk of two tables in which some things are wrong."""
    top = table(ROOT + STEP if "table" not in wrong else 1 << 54, 1, nT=int("nT" in wrong))
    words = [top & ~int("descriptor" in wrong)] + ([] if "memory" in wrong else [leaf()])
    flags = {"E0PD0": int("E0PD" in wrong), "EPD0": int("EPD" in wrong)}
    cpu, root = CPU.replace(nt_faults=True), 1 << 54 if "TTBR" in wrong else ROOT
    made = tree(words, cpu=cpu, ps=5, tcr=flags, root=root, ia=36, start=1, skl=3 if "SKL" in wrong else 0, PIRE0_EL1=1)
    if "range" in wrong:
        made = made._replace(va=1 << 50)
    if "TxSZ" in wrong:
        made = made._replace(regs=made.regs.replace(TCR_EL1=made.regs.TCR_EL1 & ~63 | 5))
    fault = asked(made, Access.read(0)).fault
    return fault.cause if fault else ""


def late(*wrong: str) -> str:
    """What is reported of a block in which some things are wrong: Realm state, EL2&0."""
    word = leaf(
        (1 << 50 if "OA" in wrong else OUT),
        2,
        Contiguous=int("Contiguous" in wrong),
        nT=int("nT" in wrong),
        AMEC=int("AMEC" in wrong),
        AF=int("AF" not in wrong),
        AttrIndx=int("ALIGNMENT" in wrong),  # Device
        PIIndex=3 if "permission" in wrong else 0,
    )
    cpu = CPU.replace(nt_faults=True, contiguous_faults=True)
    realm = {"SCR_EL3": 1 << 62 | 1 << 44 | 1 << 43 | 1, "SCTLR2_EL2": 2}
    made = tree([word], ia=29, start=1, ps=5, cpu=cpu, regime="EL20", **realm)
    fault = asked(made, Access(AccessType.READ, 2, aligned="ALIGNMENT" not in wrong)).fault
    return fault.cause or fault.type.name if fault else ""


def test_the_order_of_checks() -> None:
    for ask, causes in ((early, EARLY), (late, LATE)):
        assert ask() == ""
        for first, second in zip(causes, [*causes[1:], causes[-1]], strict=True):
            assert ask(first, second) == first, (first, second)
            assert ask(second) == second
    assert early("nT", "memory") == "nT"


def test_a_table_that_is_refused_is_not_marked() -> None:
    """Its next address and nT come before the write of its access flag."""
    for word in (table(1 << 54, 1), table(ROOT + STEP, 1, nT=1)):
        made = tree([word], ps=5, cpu=CPU.replace(nt_faults=True), tcr={"HA": 1}, tcr2={"HAFT": 1})
        assert not asked(made).ok
        assert not asked(made).updates
    word = table(ROOT + STEP, 0, nT=1)  # reserved, 0, with SKL = 0: no fault
    made = tree([word], cpu=CPU.replace(nt_faults=True))
    assert refused(made)[0] is T.EXTERNAL_ON_WALK


def test_amec_faults_in_realm_state_only() -> None:
    realm = {"SCR_EL3": 1 << 62 | 1 << 44 | 1 << 43 | 1, "SCTLR2_EL2": 2}
    for regime, amec, ns, upper, flag, changes, faults in (
        ("EL20", 1, 0, False, {}, {}, True),
        ("EL20", 0, 0, False, {}, {}, False),
        ("EL20", 1, 1, False, {}, {}, False),  # not Realm memory
        ("EL20", 1, 0, False, {"AMEC0": 1}, {}, False),
        ("EL20", 1, 0, True, {"AMEC0": 1}, {}, True),
        ("EL20", 1, 0, True, {"AMEC1": 1}, {}, False),
        ("EL20", 1, 0, False, {}, {"SCTLR2_EL2": 0}, False),
        ("EL20", 1, 0, False, {}, {"SCR_EL3": 1 << 44 | 1 << 43 | 1}, False),
        ("EL10", 1, 0, False, {}, {}, False),
    ):
        word = leaf(AMEC=amec, NS=ns)
        made = tree([word], ia=20, start=3, regime=regime, upper=upper, tcr2=flag, **(realm | changes))
        assert (asked(made).fault is not None) == faults, (regime, amec, ns, upper, flag, changes)
    assert asked(tree([leaf() | 1 << 103], ia=20, start=3, regime="EL20", **realm)).ok, "v9.4 has it at bit 103"


# Dispatch, registers, and what is not there.


def test_who_has_128_bit_descriptors() -> None:
    """D128 of the regime's own register, TCR2 enabled, and a CPU with FEAT_D128; never EL2 alone."""
    for regime in ("EL10", "EL20", "EL3"):
        made = tree([leaf()], ia=20, start=3, regime=regime)
        assert asked(made).pa == OUT
        assert isinstance(translate(made.memory, made.regs, 0, Access.read(_el(made))), Walk128)
    made = tree([leaf()], ia=20, start=3, SCR_EL3=0x501)  # TCR2En = 0
    with pytest.raises(ValueError, match=r"^EL10: 128-bit descriptors are off"):
        translate128(made.memory, made.regs, 0)
    old = Registers(CPUS["max"], **{**made.regs.as_dict(), "TTBR0_EL1": ROOT, "SCR_EL3": 1 << 43 | 0x501})
    with pytest.raises(ValueError, match=r"^EL10: 128-bit descriptors are off"):
        translate128(made.memory, old, 0)
    with pytest.raises(ValueError, match=r"^EL10 has 64-bit descriptors"):
        WalkParams128.of(old, Regime.EL10, 0)
    alone = Registers(CPU, TCR2_EL2=1 << 5, TCR_EL2=16)
    assert not isinstance(translate(Ram(), alone, 0, Access.read(2)), Walk128)


def test_one_walk_by_parameters_and_a_fetch() -> None:
    made = tree([leaf()], ia=20, start=3)
    params = WalkParams128.of(made.regs, Regime.EL10, 0)
    found = walk128(made.memory.fetch16, params, 0x123, Access())
    assert found.pa == OUT + 0x123
    assert str(found).endswith(NOT_JUDGED)


def test_what_is_64_bit_only_says_so() -> None:
    made = tree([leaf()], ia=20, start=3)
    said = r"TCR2_EL1\.D128 is 1: 128-bit descriptors are for translate and pgtable\.walk128 only"
    with pytest.raises(ValueError, match=said):
        translate_many(made.memory, made.regs, [0])
    with pytest.raises(ValueError, match=said):
        list(leaves(PhysicalMemory((ROOT, 4096)), made.regs))
    assert branch_target(made.regs, 0x1234, 1) == 0x1234


def test_wide_registers_need_the_feature() -> None:
    for name in ("TTBR0_EL1", "TTBR1_EL1", "TTBR0_EL2", "TTBR1_EL2", "VTTBR_EL2"):
        assert Registers(CPU, **{name: (1 << 128) - 1})[name] == (1 << 128) - 1
        with pytest.raises(ValueError, match="must be an integer of 128 bits"):
            Registers(CPU, **{name: 1 << 128})
        with pytest.raises(ValueError, match="must be an integer of 64 bits"):
            Registers(**{name: 1 << 64})
    with pytest.raises(ValueError, match=r"TTBR0_EL3=.*: must be an integer of 64 bits"):
        Registers(CPU, TTBR0_EL3=1 << 64)


def test_a_cpu_with_56_bit_addresses_has_52_or_48_in_64_bit_descriptors() -> None:
    for granule, ds, most in (("4K", 0, 48), ("4K", 1, 52), ("16K", 1, 52), ("64K", 0, 52)):
        made = hand.tree(hand.leaf(SH=0), granule=granule, ps=7, cpu=CPU, tcr_flags={"DS": ds})
        assert translate(made.memory, made.regs, made.va).ok
        low, width = {"64K": (12, 4), "16K": (8, 2), "4K": (8, 2)}[granule] if most == 52 else (48, 2)
        high = made.with_flipped(3, ((1 << width) - 1) << low)
        wanted = {("4K", 0): 0, ("4K", 1): 3 << 50, ("16K", 1): 3 << 50, ("64K", 0): 15 << 48}[granule, ds]
        assert translate(high.memory, high.regs, high.va).pa >> 48 << 48 == wanted


def test_par_has_128_bits() -> None:
    made = tree([leaf(0xAB_CDEF_0123_4000)], ia=20, start=3)
    par = at(made.memory, made.regs, "S1E1R", 0x567)
    assert par >> 76 == 0xAB_CDEF_0123_4
    assert par >> 64 & 0xFFF == 1
    assert par >> 12 & 0xFFF_FFFF_FFFF == 0
    assert (par & 1, par >> 7 & 3, par >> 56 & 0xFF) == (0, 3, 0xFF)
    made = tree([0], ia=20, start=3)
    assert at(made.memory, made.regs, "S1E1R", 0) == 1 << 64 | 1 << 11 | 0b000111 << 1 | 1


def test_level_minus_two_is_reported() -> None:
    made = tree([0], ia=55, start=-2)
    found = asked(made)
    assert found.fault
    assert found.fault.code == 0x2A
    assert "translation fault, level -2, by descriptor" in str(found)
    assert asked(tree([], ia=55)).result.code == 0x12
    made = tree([table(1 << 54)], ia=55, start=-2, ps=5)
    assert asked(made).result.code == 0x2C


def test_everything_is_said_not_to_be_judged() -> None:
    import pgtable.d128
    import pgtable.nested128
    import pgtable.params128
    import pgtable.stage2_128
    import pgtable.stage2_rules

    for module in (pgtable.d128, pgtable.nested128, pgtable.params128, pgtable.stage2_128, pgtable.stage2_rules):
        assert "not judged" in (module.__doc__ or "").lower()
    assert ttbr(1 << 55) == 1 << 87
