"""Broken rules of 128-bit descriptors: each is seen by the test that is named beside it, and put back afterwards.

No emulator judges these rules: the tests are typed from Arm's tables, and this shows that they look.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.mutation import Change, Edit, Set, broken
from tests.pgtable import test_d128 as first
from tests.pgtable import test_d128_stage2 as second

PACKAGES = ("pgtable", "tests.pgtable.test_d128")
Check = Callable[[], None]
MUTANTS: dict[str, tuple[Change, Check]] = {
    # Descriptors and geometry (d128.py, DecodeDescriptorType, TranslationSize, ContiguousSize, NextTableBase).
    "16K and 64K may skip three levels": (
        Set("d128:MOST_SKIPPED", lambda old: dict.fromkeys(old, 3)),
        first.test_what_a_descriptor_is_by_granule_level_skl_and_the_valid_bit,
    ),
    "level + SKL may exceed 3": (
        Edit("d128:Format128.kind", ("end > LAST_LEVEL", "end > LAST_LEVEL + 1")),
        first.test_what_a_descriptor_is_by_granule_level_skl_and_the_valid_bit,
    ),
    "a level resolves as many bits as with 64-bit descriptors": (
        Edit("d128:Format128.stride", ("page_shift - 4", "page_shift - 3")),
        first.test_an_output_address_has_the_bits_down_to_the_size_of_the_leaf,
    ),
    "runs as with 64-bit descriptors": (
        Set("params128:CONTIGUOUS_RUN_128", lambda old: {granule: {1: 16, 2: 32, 3: 128} for granule in old}),
        first.test_the_size_of_a_contiguous_run,
    ),
    "a table is aligned to the granule only": (  # v9.4
        Edit("d128:Format128.table_base", ("& -(WORD << self.index_bits(word))", "& -1")),
        first.test_a_skipping_table_descriptor_leads_further_down_and_to_a_larger_table,
    ),
    "a skipping descriptor leads one level down": (
        Edit("d128:Format128.next_level", ("+ self.skipped(word) + 1", "+ 1")),
        first.test_the_level_below_a_table_at_minus_two,
    ),
    "a table below a skip has one level's size": (
        Edit("d128:Format128.index_bits", ("* (self.skipped(word) + 1)", "")),
        first.test_a_walk_of_five_tables_and_one_that_skips_three,
    ),
    "AMEC is bit 103": (  # v9.4
        Edit("params128:WalkParams128.amec", ('self.page["AMEC"].mask', "1 << 103")),
        first.test_amec_faults_in_realm_state_only,
    ),
    # Registers (params128.py).
    "TTBR.SKL is not looked at": (
        Edit("params128:Tables128.start_level", ("+ self.skl", "")),
        first.test_the_first_level_by_txsz_granule_and_ttbr_skl,
    ),
    "56 bits of VA without LVA3": (
        Edit("params128:least_txsz", ("if f.lva3:", "if True:")),
        first.test_txsz_limits,
    ),
    "EL3 has a half of 55 bits": (
        Edit("params128:least_txsz", ("9 if regime.has_el0 else 8", "9")),
        first.test_txsz_limits,
    ),
    "the first table has its own size as alignment only": (
        Edit("params128:Tables128.base", ("max(WORD << self.start_bits, 32)", "WORD")),
        first.test_ttbr_is_aligned_to_the_size_of_the_first_table,
    ),
    "TTBR[87:80] are no address": (
        Edit("params128:Tables128.base", ("& -size", "& -size & (1 << 48) - 1")),
        first.test_ttbr_holds_56_address_bits,
    ),
    "PS = 7 is 52 bits": (
        Edit("params128:output_bits128", ("56 if field", "52 if field")),
        first.test_an_address_beyond_the_output_size_is_a_fault_at_its_level,
    ),
    "permissions are direct without TCR2.PIE": (
        Edit("params:_read", ("d128 or bool(f.pie and second.PIE)", "bool(f.pie and second.PIE)")),
        first.test_every_pi_index_takes_its_own_nibble,
    ),
    "TCR.DS counts": (
        Edit("params128:_read128", ("Format128(p.fmt.granule, ", "Format128(p.fmt.granule, tcr.DS, ")),
        first.test_a_leaf_has_its_own_shareability_and_flags,
    ),
    "the IPA has as many bits as the PA": (  # v9.4
        Edit("params128:most_ipa_bits", ("if f.pa_bits == 52:", "if False:")),
        second.test_t0sz_limits,
    ),
    # The walk (walk128.py).
    "a start level below 3 is not refused": (
        Edit("walk128:descend", ("if p.start_level > LAST_LEVEL:", "if p.start_level > LAST_LEVEL + 1:")),
        first.test_the_first_level_by_txsz_granule_and_ttbr_skl,
    ),
    "nT of a skipping table is not looked at": (
        Edit("walk128:descend", ("if fmt.skipped(word) and nt_faults(p)", "if False and nt_faults(p)")),
        first.test_the_order_of_checks,
    ),
    "nT of every table is looked at": (
        Edit("walk128:descend", ("if fmt.skipped(word) and nt_faults(p)", "if nt_faults(p)")),
        first.test_a_table_that_is_refused_is_not_marked,
    ),
    "the next address is refused at its own level": (
        Edit("walk128:descend", ("ADDRESS_SIZE, level, cause", "ADDRESS_SIZE, below, cause")),
        first.test_an_address_beyond_the_output_size_is_a_fault_at_its_level,
    ),
    "the output size before AMEC": (
        Edit("walk128:_output", ("if p.amec_faults and", "if not oa & p.over and p.amec_faults and")),
        first.test_the_order_of_checks,
    ),
    "HAFT is off": (
        Edit("walk128:descend", ("word | p.table_af if p.haft else word", "word")),
        first.test_the_access_flags_of_tables_and_leaf_and_the_dirty_state,
    ),
    "DisCH adds up": (
        Edit("walk128:contiguous_off", ("bool(tables[-1] & p", "bool((tables[-1] | tables[0]) & p")),
        first.test_disch_is_of_the_descriptor_that_led_to_the_table_of_the_leaf_alone,
    ),
    "TCR2.DisCH0 is for every table": (
        Edit("walk128:contiguous_off", ("if tables else p.disch", "or p.disch if tables else p.disch")),
        first.test_disch_is_of_the_descriptor_that_led_to_the_table_of_the_leaf_alone,
    ),
    "a changed descriptor is not read again": (
        Edit("walk128:Run.change", ("raise Changed", "pass")),
        first.test_a_descriptor_that_somebody_else_changes_is_read_again,
    ),
    "halves of a big-endian descriptor swap alone": (
        Edit(
            "walk128:swapped",
            ('word.to_bytes(WORD, "big"), "little"', 'word.to_bytes(WORD, "big")[8:] + bytes(8), "little"'),
        ),
        first.test_big_endian_tables_swap_all_sixteen_bytes,
    ),
    # Stage 2 (stage2_rules.py, stage2_128.py) and both (nested128.py).
    "MRO pages are not updated by walks": (
        Set("stage2_rules:BY_S2PIR", lambda old: tuple(row & ~32 if not row & 2 else row for row in old)),
        second.test_every_nibble_of_s2pir,
    ),
    "write only may be read": (
        Set("stage2_rules:BY_S2PIR", lambda old: (*old[:4], old[4] | 1, *old[5:])),
        second.test_every_nibble_of_s2pir,
    ),
    "the base is asked before the overlay": (
        Edit("stage2_rules:refused", ("((g.overlay, True), (g.base, False))", "((g.base, False), (g.overlay, True))")),
        second.test_an_overlay_is_asked_before_the_base_and_a_read_before_a_write,
    ),
    "PTW before the overlay": (  # v9.4
        Edit("stage2_rules:refused_walk", ("if needs & ~g.overlay:", "if needs & ~g.overlay and not ptw_device:")),
        second.test_the_order_of_checks,
    ),
    "tables need no assured walk": (  # v9.4
        Edit("stage2_rules:refused_walk", ("if q.assured_only and not q.assured:", "if False:")),
        second.test_an_assured_only_page_may_hold_tables_of_assured_walks_alone,
    ),
    "TL1 does not look at the lower half": (
        Edit("stage2_rules:top_refused", ("(theirs and", "(False and")),
        second.test_top_level_checks_of_the_first_table,
    ),
    "every table is a first one": (
        Edit("nested128:_Guest._read", ("first=not self.raw", "first=True")),
        second.test_only_the_first_table_is_checked,
    ),
    "an update is checked as a first table": (
        Edit("nested128:_Guest._write", ("WRITE_TABLE, first=False", "WRITE_TABLE, first=True")),
        second.test_top_level_of_an_update,
    ),
    "Protected is not needed": (
        Edit("nested128:_Side.passed", ("and protected and", "and")),
        second.test_assured_translations,
    ),
    "Dirty is not looked at": (
        Edit("stage2_rules:refused", ("access.asks_write and not q.hd and not q.dirty", "False")),
        second.test_the_dirty_state_is_set_for_any_write_that_is_let_through,
    ),
    "WnR of a walk is its own": (
        Edit("nested128:_Side.reach", ("fault._replace(write=write) if", "fault if")),
        second.test_levels_and_stage_of_faults,
    ),
    "stage 2's faults are stage 1's": (
        Edit("stage2_128:_of_stage2", ("stage=2, ", "")),
        second.test_levels_and_stage_of_faults,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_seen(name: str) -> None:
    change, check = MUTANTS[name]
    check()
    with broken([change], PACKAGES, prefix="pgtable."), pytest.raises((AssertionError, ValueError, KeyError)):
        check()
    check()
