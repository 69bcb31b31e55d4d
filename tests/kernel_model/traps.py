"""Which test holds which known trap and which golden vector: tables only, checked by test_traps.py.

A row is a name, a colon and for a trap one sentence; its tests follow, as file::test below tests/. Rows of a
parametrized test are in brackets, with " / " between them.
"""

from __future__ import annotations

WALK = "kernel_model/test_pagewalk.py::test"
USER = "kernel_model/test_user_walks.py::test"
LOCKS = "kernel_model/test_locks.py::test"
ATTR = "kernel_model/test_pageattr.py::test"
SPLIT = "kernel_model/test_split.py::test"
DUMP = "kernel_model/test_ptdump.py::test"
KFENCE = "kernel_model/test_kfence.py::test"
MACHINE = "emu/test_machine.py::test"
SCENARIO = "emu/test_scenarios_vmalloc.py::test"
POOL = "emu/test_scenarios_kfence.py::test"
REAL_LOCKS = "emu/test_locks_real.py::test"
HERE = "kernel_model/test_traps.py::test"
VALID = "kernel_model/test_goldens.py::test_the_model_does_what_was_measured"
AREA = f"{ATTR}_permissions_of_an_area_are_as_measured"
SPLITS = f"{SPLIT}_splits_are_as_measured"

# Where a mirror of the kernel in Python goes wrong, and what notices.
TRAPS = f"""
1: The depth of a hole is counted by the levels that the build has, its entries by those of the run.
    {WALK}_b_empty_top_slots_are_counted_by_the_size_that_the_build_has
    {WALK}_16k_with_47_bits_folds_the_pud_at_run_time
    {WALK}_with_52_bits_an_empty_top_entry_is_a_hole_of_depth_0_and_pgd_is_not_called
2: Above a folded top pgd_entry is called for empty slots, with the entry of some other address.
    {WALK}_b_empty_top_slots_are_counted_by_the_size_that_the_build_has
    {HERE}_a_folded_top_gives_the_pgd_callback_an_entry_of_another_address
3: An empty PTE is no hole, and a walk without deep callbacks meets no deep holes.
    {WALK}_none_ptes_are_no_holes
    {WALK}_u_to_z_callbacks_that_are_not_set
4: What is neither none nor present is shown to its own level only.
    {WALK}_k_entries_at_level_2_that_are_no_tables
    {WALK}_l_entries_at_level_1_that_are_no_tables
5: A walk that only reads clears a bad entry at the top, and none below.
    {WALK}_i_j_a_bad_top_entry_is_cleared_or_kept_or_passes
    {WALK}_with_52_bits_a_bad_top_entry_is_cleared
    {HERE}_the_pud_and_pmd_loops_clear_nothing
6: The action means nothing to the upper two loops, and outlives an empty entry in 6.x.
    {WALK}_m_to_p_continue_counts_in_pmd_and_pud_only
    {WALK}_q3_a_pmd_that_the_callback_zeroes_and_asks_for_again
    {HERE}_again_from_the_upper_callbacks_means_nothing
7: AGAIN from a PTE callback repeats the whole PMD, but in 6.1; asked for always, it has no end.
    {WALK}_q2_again_from_a_pte_repeats_the_pmd_where_the_kernel_looks
    {WALK}_a_walk_without_end_is_ended_by_the_step_limit
8: Entries are read again after their callback.
    {HERE}_an_entry_is_read_again_after_its_callback
    {USER}_a_huge_pmd_is_split_and_a_huge_pud_never
9: Any value but 0 ends a walk and is its value, unless test_walk said it.
    {WALK}_r_s_t_what_a_callback_returns_ends_the_walk
    {USER}_a_positive_test_walk_skips_one_vma_of_a_range_but_all_of_a_mapping
    {USER}_a_pfnmap_vma_is_one_hole_unless_test_walk_decides
10: PTEs go on by whole pages past an unaligned end, and without end where it lies in the first page.
    {WALK}_g_an_unaligned_range_keeps_its_offset
    {WALK}_an_end_below_one_page_runs_away
11: The last slot ends at 2**64, which is 0.
    {WALK}_h_the_end_of_the_address_space
    {HERE}_a_walk_to_the_last_byte_visits_the_last_page
12: Which comes first, the WARN or -EINVAL, is a matter of the kernel.
    {LOCKS}_checks_are_made_in_the_order_of_the_row
    {HERE}_the_debug_walk_warns_once_for_each_lock_also_for_an_empty_range
    {HERE}_warns_of_a_kernel_walk_that_is_refused
13: A missing lock is a WARN, in 6.1 not even that, and never an error.
    {LOCKS}_releases
    {REAL_LOCKS}_every_cell_of_the_table_walks_is_what_the_kernel_does
14: post_vma follows a failed walk but no failed pre_vma; walk_page_vma tests the vma in 6.1 only.
    {USER}_post_vma_follows_an_error_but_no_refusal_of_pre_vma
    {USER}_only_6_1_tests_in_walk_page_vma
15: Without deeper callbacks a leaf looks like a table in every kernel.
    {HERE}_without_deeper_callbacks_a_leaf_is_like_a_table
16: Bits are cleared first: nG and the invalid mark are one.
    {ATTR}_clear_comes_before_set
    {VALID}[valid 1, nG 0 / valid 1, nG 1]
17: set_memory_valid makes something of nothing, and all that look later see it.
    {VALID}[valid on a none PTE, nG 1]
    {HERE}_what_set_memory_valid_leaves_in_an_empty_pte_is_an_entry
18: In a hole 6.x makes tables, 7.x does nothing and says 0.
    {VALID}[hole at pmd, enable 1]
    {ATTR}_6_x_makes_tables_in_a_hole_and_bits_in_none_ptes
19: 6.x flushes always, 7.x always but for making valid; noflush calls do not, with one exception.
    {VALID}[n = 0, enable 1 / valid 1, nG 0]
    {ATTR}_the_noflush_calls_do_not_flush_and_do_nothing_without_leave
    {ATTR}_set_direct_map_valid_noflush_flushes_what_it_makes_invalid
20: One table's worth of pages is flushed singly by 6.x, as a whole by 7.x; 16K pages count by 4.
    {ATTR}_rounding_and_the_limit_are_the_kernels_own
    {VALID}[unaligned, invalid 1 / 512 pages of PTEs / 2047 pages of 16K / 2048 pages of 16K]
21: Nothing is rolled back.
    {VALID}[last PTE and first page of a block]
22: The number of pages is signed: -1 page ends below its start.
    {VALID}[n = -1, enable 0]
    kernel_model/test_vmalloc.py::test_the_checks_and_their_order
23: WARN for the address, then the area, then its flags, then no pages at all.
    kernel_model/test_vmalloc.py::test_the_checks_and_their_order
    {HERE}_the_area_is_asked_about_the_address_as_given
    {HERE}_the_flags_are_looked_at_before_the_number_of_pages
24: The linear alias: of the whole area with errors forgotten, or of the range with errors returned.
    {AREA}[ro / x / ro, rodata_full=0]
    {HERE}_an_alias_that_cannot_change_is_forgotten_by_6_x_and_returned_by_7_x
25: rodata=on is not the same word everywhere, and full is not known everywhere.
    {ATTR}_rodata_on_means_full_in_7_x_where_full_is_no_word
26: With KFENCE built in and not started the direct map can be set even with rodata=off.
    {ATTR}_stock_kfence_lets_the_direct_map_be_set_with_rodata_off
27: A block is refused by 6.x, and by 7.x only in part.
    {VALID}[2M block, invalid / part of a block]
    {SPLITS}[a page of a block]
28: A contiguous run may be left mixed: what it translates to is up to the CPU.
    {SPLITS}[no splitting]
    pgtable/test_walk.py::test_a_cpu_may_take_the_address_within_a_contiguous_run_from_the_va
29: One page is split out at one end only, and an aligned end needs no split.
    {SPLIT}_one_page_is_split_out_at_its_less_aligned_end_only
    {SPLITS}[the last page of a block / a whole run]
30: Splitting on demand leaves contiguous runs, splitting a range into pages does not.
    {SPLITS}[a page of a block]
    {SPLIT}_range_split_to_ptes_leaves_pages_without_runs
31: Barriers are for valid PTEs that nobody at EL0 has and executes; how many is a matter of laziness.
    {ATTR}_only_valid_ptes_that_el0_cannot_reach_are_ordered
    {ATTR}_in_an_interrupt_every_pte_has_its_barriers
    {VALID}[valid 3, nG 0]
32: With TCR.DS bits 9:8 are address, and Linux names them shareability all the same.
    {DUMP}_with_lpa2_the_address_bits_51_and_50_read_as_shd
    pgtable/test_bits.py::test_an_lpa2_output_address_has_its_top_bits_in_9_8
    emu/test_mmu.py::test_a_kernel_with_lpa2_does_what_the_model_predicted
    emu/test_mmu.py::test_a_kernel_with_lpa2_has_five_levels_and_descriptors_without_shareability
33: Bits 49:48 are address to every kernel but 6.1.
    {HERE}_bits_49_and_48_are_address_but_in_6_1
34: 6.1 marks an entry present by other bits than later kernels.
    {WALK}_bit_58_makes_a_leaf_of_6_1
    {ATTR}_a_block_marked_present_invalid_is_bad_to_6_1_and_a_leaf_later
35: Type 2 in a PMD is absent without the invalid mark and a leaf with it.
    {HERE}_type_2_is_absent_or_a_leaf
36: A build for 52 bits that runs with 48 counts its linear map from where 52 bits would begin.
    {HERE}_memstart_addr_is_lowered_where_fewer_bits_run_than_were_built
37: A PTE of type 1 is valid to Linux and a fault to the CPU.
    {DUMP}_trap_37_a_page_of_type_1_is_valid_and_a_block
    pgtable/test_thirteen_tables.py::test_the_walk_gives_the_architectures_answer
38: The last line ends at 0, and markers at one address print both.
    {DUMP}_trap_38_the_last_line_ends_at_zero
    {DUMP}_trap_38_two_markers_at_one_address_both_print_and_a_third_waits
    {DUMP}_the_markers_of_a_build
39: BLK asks one bit in 6.x, two in 7.x.
    {DUMP}_trap_39_blk_of_an_invalid_page
40: Bits that have no word split no line.
    {DUMP}_trap_40_address_dbm_dirty_and_special_do_not_split_a_line
    {DUMP}_trap_40_a_page_with_none_of_the_bits_shown_prints_like_a_hole
41: The check of W and X takes invalid pages too; a size is divided while nothing is lost.
    {DUMP}_trap_41_the_check_does_not_ask_whether_a_page_is_valid
    {DUMP}_a_size_is_divided_while_that_is_exact
42: A folded level is called PGD only with an mm.
    {DUMP}_trap_42_a_folded_level_is_called_pgd_only_with_an_mm
43: KFENCE never hears that a page was not changed, and leaves one open after a report.
    {KFENCE}_nobody_hears_that_a_page_could_not_be_protected
    {KFENCE}_after_a_report_the_page_is_accessible
    {KFENCE}_a_guard_that_was_opened_is_emptied_and_closed_when_the_object_is_freed
    {POOL}_only_the_last_of_two_opened_guards_is_closed_when_the_object_is_freed
44: KFENCE is asked about translation faults only; the first pages of its pool have no object.
    {HERE}_kfence_is_asked_about_translation_faults_only
    {KFENCE}_the_first_page_has_no_metadata
    {KFENCE}_the_first_guard_has_a_right_neighbour_only_and_the_last_a_left_one
45: An image needs its relocations and its true address, and a task with a canary.
    emu/test_image.py::test_every_entry_of_the_system_call_table_is_a_system_call_after_relocation
    emu/test_image.py::test_an_elf_with_a_wrong_address_is_put_right_by_the_image_in_it
    {MACHINE}_every_kernel_boots_cold_and_runs_its_own_functions
46: Without a stub a hole leads 6.x into the page allocator.
    {VALID}[hole at pmd, enable 0]
    emu/test_golden.py::test_the_compiled_function_does_what_was_measured
47: A WARN is an instruction to be passed over, and init_mm's lock a word to be set.
    {MACHINE}_a_warn_is_recorded_with_its_line_and_the_call_goes_on
    {REAL_LOCKS}_the_warning_of_the_kernel_walk
48: The guard page's PTE gets the read-only bit, of which freeing warns.
    {AREA}[ro with the guard]
    {HERE}_unmapping_warns_of_what_was_left_in_a_guard_page
    {SCENARIO}_the_guard_page_can_be_asked_for_and_vfree_warns_of_what_that_left
49: Zeros are enough of a task.
    {MACHINE}_every_kernel_boots_cold_and_runs_its_own_functions
    emu/test_ptdump_real.py::test_the_measured_table_gives_the_measured_text_for_real
50: Before ptdump_init() all entries print as holes.
    {HERE}_without_ptdump_init_every_entry_prints_like_a_hole
51: 6.1 leaves the start of its text unmapped when it boots, 6.12 maps it read-only and without execution.
    {SCENARIO}_the_head_of_the_image_is_unmapped_in_6_1_and_read_only_later
52: What is bad in a PMD is replaced by 6.x with a WARN and passed over by 7.x.
    {ATTR}_what_is_bad_at_the_pmd_level_is_replaced_by_6_x_and_skipped_by_7_x
    {ATTR}_a_block_marked_present_invalid_is_bad_to_6_1_and_a_leaf_later
53: Tables for a hole need struct pages and stubs for what counts them.
    {HERE}_6_x_makes_every_level_that_is_missing
54: RELR or RELA goes by the toolchain.
    {HERE}_relocations_are_of_the_form_that_the_toolchain_chose
55: A machine that has panicked prints no more.
    {SCENARIO}_after_a_panic_the_kernel_prints_no_more_and_the_machine_still_does
56: KFENCE takes every fault in its pool; what it thought of it is in the report.
    emu/test_checks_kfence.py::test_real_kfence_does_what_the_model_predicted
    {POOL}_many_faults_in_a_used_pool_are_judged_as_the_model_predicted
57: An area freed while read-only leaves read-only pages for the next one.
    {SCENARIO}_pages_freed_read_only_come_back_with_a_read_only_alias_and_the_next_vzalloc_dies
58: Two pages made read-only are six aliases in 6.x.
    {AREA}[ro]
    {SCENARIO}_ro_and_rw_of_two_pages_change_six_aliases_in_6_x_and_two_in_7_x_and_nothing_else
59: walk_page_range_novma of 6.12.95 wants init_mm held somehow, another mm for writing.
    {REAL_LOCKS}_mail_base_is_what_debian_6_12_95_has
60: Nearly all that is made invalid is in the linear map.
    emu/test_callers.py::test_who_calls_set_memory_valid
    emu/test_census.py::test_nearly_all_calls_of_set_memory_valid_are_for_kfence
    {LOCKS}_the_range_condition_refuses_the_linear_map
61: No read lock keeps kernel tables from being freed.
    {HERE}_no_read_lock_keeps_tables_from_being_freed
"""

# What was measured once on real kernels: walks by letter, then pageattr.c by case.
GOLDENS = f"""
A:
    {WALK}_a_two_pages
    {HERE}_a_folded_top_gives_the_pgd_callback_an_entry_of_another_address
B:
    {WALK}_b_empty_top_slots_are_counted_by_the_size_that_the_build_has
C, D:
    {WALK}_c_d_holes_at_level_1_and_2
E:
    {WALK}_e_an_empty_range
    {HERE}_warns_of_a_kernel_walk_that_is_refused
F:
    {HERE}_without_an_mm_nothing_is_walked
    {HERE}_without_an_mm_the_compiled_walks_refuse
G:
    {WALK}_g_an_unaligned_range_keeps_its_offset
H:
    {WALK}_h_the_end_of_the_address_space
I, J:
    {WALK}_i_j_a_bad_top_entry_is_cleared_or_kept_or_passes
K:
    {WALK}_k_entries_at_level_2_that_are_no_tables
L:
    {WALK}_l_entries_at_level_1_that_are_no_tables
M, N, O, P:
    {WALK}_m_to_p_continue_counts_in_pmd_and_pud_only
Q:
    {WALK}_q_again_calls_the_pmd_again
Q2:
    {WALK}_q2_again_from_a_pte_repeats_the_pmd_where_the_kernel_looks
Q3:
    {WALK}_q3_a_pmd_that_the_callback_zeroes_and_asks_for_again
R, S, T:
    {WALK}_r_s_t_what_a_callback_returns_ends_the_walk
U, V, W, X, Z:
    {WALK}_u_to_z_callbacks_that_are_not_set
Y:
    {WALK}_y_pages_then_a_block
pte-none:
    {WALK}_none_ptes_are_no_holes
bit58:
    {WALK}_bit_58_makes_a_leaf_of_6_1
lock0:
    {HERE}_a_walk_without_the_lock_goes_on_after_its_warn
    {REAL_LOCKS}_the_warning_of_the_kernel_walk
inst:
    {WALK}_install_pte_is_refused_by_the_kernel_walk_of_7_x
low:
    {WALK}_an_end_below_one_page_runs_away
9.1 locks:
    {HERE}_the_debug_walk_warns_once_for_each_lock_also_for_an_empty_range
    {HERE}_warns_of_a_kernel_walk_that_is_refused
9.2 with 47 bits:
    {WALK}_16k_with_47_bits_folds_the_pud_at_run_time
    {HERE}_with_16k_pages_the_entries_of_the_callbacks
9.2 with 52 bits:
    {WALK}_16k_with_52_bits_has_its_pgd_for_p4d
    {HERE}_with_16k_pages_the_entries_of_the_callbacks
9.3 invalid 1:
    {VALID}[invalid 1 / invalid 1, nG 0 / invalid 1, nG 1]
9.3 invalid again:
    {VALID}[invalid again / invalid again, nG 0 / invalid again, nG 1]
9.3 valid 1:
    {VALID}[valid 1 / valid 1, nG 0 / valid 1, nG 1]
9.3 valid 3:
    {VALID}[valid 3 / valid 3, nG 0 / valid 3, nG 1]
9.3 valid on none:
    {VALID}[valid on a none PTE / valid on a none PTE, nG 0 / valid on a none PTE, nG 1]
9.3 invalid on none:
    {VALID}[invalid on a none PTE / invalid on a none PTE, nG 0 / invalid on a none PTE, nG 1]
9.3 n = 0:
    {VALID}[n = 0, enable 0 / n = 0, enable 1]
9.3 n = -1:
    {VALID}[n = -1, enable 0 / n = -1, enable 1]
9.3 unaligned:
    {VALID}[unaligned, invalid 1]
9.3 2M block:
    {VALID}[2M block, invalid / 2M block, invalid, nG 0 / 2M block, invalid, nG 1]
    {VALID}[2M block, valid / 2M block, valid, nG 0 / 2M block, valid, nG 1]
9.3 part of a block:
    {VALID}[part of a block]
9.3 PTE and block:
    {VALID}[last PTE and first page of a block]
9.3 512 pages:
    {VALID}[512 pages of PTEs]
9.3 hole:
    {VALID}[hole at pmd, enable 0 / hole at pmd, enable 1]
9.3 16K:
    {VALID}[2047 pages of 16K / 2048 pages of 16K]
9.4 ro:
    {AREA}[ro]
9.4 rw:
    {AREA}[rw of what is]
9.4 nx and x:
    {AREA}[nx of what is / x]
9.4 rodata_full=0:
    {AREA}[ro, rodata_full=0]
9.4 no page:
    {AREA}[ro of no page]
9.4 guard:
    {AREA}[ro with the guard]
9.4 behind the guard:
    {AREA}[ro behind the guard]
9.4 VM_MAP and no area:
    {AREA}[ro of VM_MAP / ro of no area]
9.4 unaligned:
    {AREA}[ro unaligned]
9.4 huge vmap:
    {ATTR}_huge_vmap_is_refused_by_7_x_only
9.5 run:
    {SPLITS}[one page of a run / parts of two runs / a run and both neighbours / a whole run]
9.5 run of blocks:
    {SPLITS}[a whole run of blocks / a block of a run]
9.5 not required:
    {SPLITS}[no splitting / unaligned]
9.5 block:
    {SPLITS}[a page of a block]
    {SPLIT}_a_split_orders_the_new_table_before_the_entry
9.5 block of a run:
    {SPLITS}[a page of a block of a run]
9.5 last page:
    {SPLITS}[the last page of a block]
9.5 block of a PUD:
    {SPLITS}[a page of a block of a PUD / a PMD of a block of a PUD]
9.5 invalid block:
    {SPLITS}[a page of an invalid block, made valid]
9.5 two blocks:
    {SPLITS}[pages of two blocks]
"""
