"""The granule protection check against tables typed from Arm's pseudocode (GranuleProtectionCheck, GPTWalk, GPICheck).

The table here is for 36 protected bits: level 0 is one page at L0, an entry for each GiB, and L1 is the table of GiB 3.
QEMU's answers to the same rules are in tests/judged/test_rme.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from pgtable import CPUS, Registers
from pgtable.gpt import GpcFault, Gpt, GptWalk, granule_protection_check
from pgtable.memory import NoMemory
from pgtable.spaces import PASpace

CPU = CPUS["max,x-rme=on"]
SECURE, NONSECURE, ROOT, REALM = PASpace.SECURE, PASpace.NONSECURE, PASpace.ROOT, PASpace.REALM
SPACES = (SECURE, NONSECURE, ROOT, REALM)
L0, L1, PA = 0x4100_0000, 0x4200_0000, 0xC123_4567
GPC, OUTER, PPS_36 = 1 << 16, 2 << 12, 1
RLPAD, NSPAD, SPAD, NSO, APPSAA = 1 << 5, 1 << 6, 1 << 7, 1 << 19, 1 << 24
PGS_4K, PGS_64K, PGS_16K, PGS_RESERVED = 0, 1 << 14, 2 << 14, 3 << 14
PLAIN = GPC | OUTER | PPS_36
EVERY = 0xFFFF_FFFF_FFFF_FFFF  # sixteen granules open to all
SLOT0, SLOT1 = L0 + 8 * 3, L1 + 8 * 0x123  # of PA with granules of 4K: 64 KiB an entry


def gpt(gpccr: int = PLAIN, base: int = L0, **features: Any) -> Gpt:
    return Gpt.of(Registers(CPU.replace(**features), GPCCR_EL3=gpccr, GPTBR_EL3=base >> 12))


def check(
    words: dict[int, int] | None = None,
    gpccr: int = PLAIN,
    *,
    pa: int = PA,
    space: PASpace = NONSECURE,
    state: PASpace | None = None,
    base: int = L0,
    **features: Any,
) -> GptWalk:
    """The check on a memory that has nothing but `words`."""

    def fetch(at: int) -> int:
        if at not in (words or {}):
            raise NoMemory(at)
        return (words or {})[at]

    return granule_protection_check(fetch, gpt(gpccr, base, **features), pa, space, state)


def seen(found: GptWalk) -> tuple[GpcFault | None, int, str]:
    return found.fault, found.level, found.cause


WALK, SIZE, FAIL = GpcFault.WALK, GpcFault.ADDRESS_SIZE, GpcFault.FAIL


# The order: what comes first decides, and reads nothing.


def test_with_the_checks_off_everything_passes() -> None:
    everything_wrong = 7 | PGS_RESERVED | SPAD | NSPAD | RLPAD
    for found in (check(gpccr=everything_wrong), check(gpccr=everything_wrong | GPC, rme=False)):
        assert found.ok
        assert found.steps == ()
    with pytest.raises(ValueError, match="the check passes"):
        _ = check(gpccr=0).gpcsc


@pytest.mark.parametrize(
    ("gpccr", "cause"),
    [
        (GPC | OUTER | 7, "PPS"),
        (GPC | OUTER | PPS_36 | PGS_RESERVED, "PGS"),
        (GPC | PPS_36 | 1 << 12, "SH"),
        (GPC | PPS_36 | 1 << 12 | 1 << 8, "SH"),
        (GPC | PPS_36, "SH"),
        (GPC | PPS_36 | 3 << 12, "SH"),
    ],
)
def test_inconsistent_registers_fault_before_all_else(gpccr: int, cause: str) -> None:
    for space in SPACES:
        for pa in (PA, 1 << 40):
            found = check({SLOT0: 1 | 0xF0}, gpccr | SPAD | NSPAD | RLPAD | APPSAA, pa=pa, space=space, base=1 << 40)
            assert seen(found) == (WALK, 0, cause)
            assert found.gpcsc == 0b000100


@pytest.mark.parametrize("sharing", [2 << 12, 1 << 8, 1 << 10, 3 << 12 | 1 << 8, 3 << 12 | 2 << 10])
def test_cacheable_or_outer_shareable_tables_are_consistent(sharing: int) -> None:
    assert check({SLOT0: 1 | 0xF0}, GPC | PPS_36 | sharing).ok


def test_pps_may_not_exceed_what_the_cpu_has() -> None:
    assert check({L0 + 8 * 3: 1 | 0xF0}, GPC | OUTER | 2, pa_bits=40).ok
    assert seen(check({SLOT0: 1 | 0xF0}, GPC | OUTER | 3, pa_bits=40)) == (WALK, 0, "PPS")


@pytest.mark.parametrize(("pad", "space"), [(SPAD, SECURE), (NSPAD, NONSECURE), (RLPAD, REALM)])
def test_a_space_that_is_switched_off(pad: int, space: PASpace) -> None:
    for other in SPACES:
        found = check({SLOT0: 1 | 0xF0}, PLAIN | pad, space=other)
        assert seen(found) == ((FAIL, 0, "PAD") if other is space else (None, 0, ""))
    above = check(gpccr=PLAIN | pad | APPSAA, pa=1 << 36, space=space)
    assert seen(above) == (FAIL, 0, "PAD")  # before the address is looked at
    assert above.gpcsc == 0b001100
    assert check({SLOT0: 1 | 0xF0}, PLAIN | pad, space=space, gpc2=False).ok


def test_above_pps_the_table_says_nothing() -> None:
    for space in SPACES:
        above = check(pa=1 << 36, space=space)
        assert seen(above) == (None if space is NONSECURE else FAIL, 0, "above PPS")
        assert check(gpccr=PLAIN | APPSAA, pa=1 << 36, space=space).ok
        assert seen(check(gpccr=PLAIN | APPSAA, pa=1 << 36, space=space, gpc2=False)) == seen(above)
        # before the table's own base
        assert seen(check(pa=1 << 36, space=space, base=1 << 36)) == seen(above)
    assert check({L0 + 8 * 63: 1 | 0xF0}, pa=(1 << 36) - 1).ok


def test_a_table_base_above_pps() -> None:
    found = check({1 << 36: 0}, base=1 << 36)
    assert seen(found) == (SIZE, 0, "GPTBR")
    assert found.gpcsc == 0b000000
    assert found.steps == ()


def test_the_base_is_aligned_to_its_table() -> None:
    """48 bits: 2 MiB of level 0. What GPTBR_EL3 has below that does not count."""
    assert gpt(GPC | OUTER | 5, 0x4130_5000).table == 0x4120_0000
    assert gpt(PLAIN, 0x4130_5000).table == 0x4130_5000


# Level 0.


@pytest.mark.parametrize("word", [0, 2, 4, 5, 0xF0, 0xF2, 0xFD, 0xF7, 0xFF])
def test_a_level_0_entry_that_is_neither_block_nor_table(word: int) -> None:
    assert seen(check({SLOT0: word})) == (WALK, 0, "entry")


@pytest.mark.parametrize("bit", range(8, 64))
def test_a_block_has_nothing_above_its_gpi(bit: int) -> None:
    assert seen(check({SLOT0: 1 | 0xF0 | 1 << bit})) == (WALK, 0, "RES0")


@pytest.mark.parametrize("bit", [*range(4, 12), 12, 16, *range(52, 64)])
def test_a_table_entry_has_nothing_but_an_aligned_address(bit: int) -> None:
    """16 384 entries of 64 KiB each for a GiB: 128 KiB, so that bits [16:12] of the address are 0."""
    assert seen(check({SLOT0: L1 | 3 | 1 << bit, SLOT1: EVERY})) == (WALK, 0, "RES0")


def test_a_table_is_below_pps() -> None:
    found = check({SLOT0: 1 << 36 | 3})
    assert seen(found) == (SIZE, 0, "table")
    assert found.gpcsc == 0b000000
    assert check({SLOT0: 1 << 35 | 3, (1 << 35) + 8 * 0x123: EVERY}).ok


@pytest.mark.parametrize(("pgs", "index", "nibble"), [(PGS_4K, 0x123, 4), (PGS_16K, 0x48, 13), (PGS_64K, 0x12, 3)])
def test_where_the_entries_are(pgs: int, index: int, nibble: int) -> None:
    """An entry of level 1 has sixteen granules: 64 KiB, 256 KiB, 1 MiB; PA is 0x123_4567 in its GiB."""
    slot = L1 + 8 * index
    shut = EVERY ^ 0xF << 4 * nibble
    found = check({SLOT0: L1 | 3, slot: EVERY}, PLAIN | pgs)
    assert found.ok
    assert [step.pa for step in found.steps] == [SLOT0, slot]
    refused = check({SLOT0: L1 | 3, slot: shut}, PLAIN | pgs)
    assert seen(refused) == (FAIL, 1, "GPI")
    assert refused.gpcsc == 0b001101
    assert check({SLOT0: L1 | 3, slot: 0xF << 4 * nibble}, PLAIN | pgs).ok


# Level 1.


def test_a_contiguous_entry() -> None:
    for run in (1, 2, 3):
        assert check({SLOT0: L1 | 3, SLOT1: 0x1 | 0xF0 | run << 8}).ok
        assert seen(check({SLOT0: L1 | 3, SLOT1: 0x1 | run << 8})) == (FAIL, 1, "GPI")
    none = check({SLOT0: L1 | 3, SLOT1: 0x1 | 0xF0})
    assert seen(none) == (WALK, 1, "RES0")
    assert none.gpcsc == 0b000101


@pytest.mark.parametrize("bit", range(10, 64))
def test_a_contiguous_entry_has_nothing_above(bit: int) -> None:
    assert seen(check({SLOT0: L1 | 3, SLOT1: 0x1F1 | 1 << bit})) == (WALK, 1, "RES0")


@pytest.mark.parametrize("granule", range(16))
@pytest.mark.parametrize("gpi", [1, 2, 3, 4, 5, 6, 7, 12, 14])
def test_a_reserved_gpi_spoils_all_sixteen_granules(granule: int, gpi: int) -> None:
    word = EVERY ^ (0xF ^ gpi) << 4 * granule
    if granule == 0 and gpi == 1:  # a contiguous entry
        assert seen(check({SLOT0: L1 | 3, SLOT1: word})) == (WALK, 1, "RES0")
    else:
        assert seen(check({SLOT0: L1 | 3, SLOT1: word})) == (WALK, 1, "GPI")


# GPIs.

OWN = {0b1000: SECURE, 0b1001: NONSECURE, 0b1010: ROOT, 0b1011: REALM}


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("gpi", range(16))
def test_who_may_access_by_gpi(gpi: int, space: PASpace) -> None:
    """Every GPI, space and state that asks, as a block and as a granule."""
    for state in SPACES:
        for words, level in (({SLOT0: 1 | gpi << 4}, 0), ({SLOT0: L1 | 3, SLOT1: EVERY ^ (0xF ^ gpi) << 16}, 1)):
            for nso in (0, NSO):
                found = check(words, PLAIN | nso, space=space, state=state)
                if gpi in OWN or gpi in (0, 15):
                    passes = gpi == 15 or OWN.get(gpi) is space
                    assert seen(found) == ((None, level, "") if passes else (FAIL, level, "GPI"))
                    assert found.gpi == gpi
                elif gpi == 0b1101 and nso:
                    passes = space is NONSECURE and state in (NONSECURE, ROOT)
                    assert seen(found) == ((None, level, "") if passes else (FAIL, level, "GPI"))
                else:
                    assert seen(found) == (WALK, level, "GPI")


def test_without_a_secure_state_its_gpi_is_reserved() -> None:
    assert seen(check({SLOT0: 1 | 8 << 4}, space=SECURE, rme_secure=False)) == (WALK, 0, "GPI")


def test_non_secure_only_wants_gpc2() -> None:
    assert seen(check({SLOT0: 1 | 13 << 4}, PLAIN | NSO, gpc2=False)) == (WALK, 0, "GPI")


# A table that is not there.


def test_no_memory_under_the_table_is_an_external_abort() -> None:
    first, second = check({}), check({SLOT0: L1 | 3})
    assert (first.fault, first.level, first.gpcsc) == (GpcFault.EABT, 0, 0b010100)
    assert (second.fault, second.level, second.gpcsc) == (GpcFault.EABT, 1, 0b010101)
    assert "no memory at 0x42000918" in str(second)


def test_a_check_says_what_it_read() -> None:
    assert str(check({SLOT0: L1 | 3, SLOT1: 0x181})).splitlines() == [
        "granule of PA 0x00000000c1234567, Non-secure space",
        "  GPT L0 0x0000000041000018 0x0000000042000003 table",
        "  GPT L1 0x0000000042000918 0x0000000000000181 contiguous",
        "  GPI 0b1000: Secure",
        "  = granule protection fault, GPT level 1",
    ]
