"""Broken rules of kernel_model, and the check of the compiled kernel that tells.

    python -m tests.kernel_model.mutants [NAME...]      prints the table

Rules of this file:
- A mutant is one mask, depth, comparison or order changed at run time (tests/mutation.py).
- It is dead when `pgtable check all --cases 200` of its kernel fails. The functions that a mutant is about run first,
  the others only if those do not tell.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from emu.checks import registry
from emu.checks.campaign import FunctionReport, Worlds, run_function, run_whole
from emu.image import KernelImage
from kernel_model.locks import Check, Need
from tests.mutation import Change, Edit, Set, broken

PACKAGES = ("kernel_model", "emu.checks", "emu.check")
CASES, WHOLE, SEED = 200, 20, 7  # WHOLE: random cases of ptdump and KFENCE, which begin with those made on purpose


class Mutant(NamedTuple):
    """One broken rule. `first`: the functions whose checks ought to tell, in `kernel`."""

    name: str
    change: Change
    first: tuple[str, ...]
    kernel: str = "debian:7.3"


WALK = ("walk_kernel_page_table_range",)
NOVMA = ("walk_page_range_novma",)
VALID = ("set_memory_valid",)
PTDUMP = ("ptdump",)
KFENCE = ("kfence",)

MUTANTS = (
    # mm/pagewalk.c
    Mutant(
        "the end of an entry is compared without the -1 that makes 0 the last",
        Edit("kernel_model.levels:Level.addr_end", ("(boundary - 1 & U64) < (end - 1 & U64)", "boundary < end")),
        WALK,
    ),
    Mutant(
        "a hole in a PUD table has the depth of a PMD's",
        Edit("kernel_model.pagewalk:_none", ('2 if name == "PUD" else 3', "3")),
        WALK,
    ),
    Mutant(
        "folded levels take from the depth at run time too",
        Edit("kernel_model.levels:Levels.real_depth", ("level.ptrs == 1", "level.fold is not Fold.NO")),
        WALK,
        "debian:6.12",
    ),
    Mutant(
        "a bad top entry is kept",
        Edit("kernel_model.stores:clear_bad", ("is not Fold.COMPILE", "is None")),
        WALK,
    ),
    Mutant(
        "bad at the top is bit 1 alone, as in 6.x",
        Edit("kernel_model.names:Bits.upper_bad", ("if self.variant.bad_is_type", "if not self.variant.bad_is_type")),
        WALK,
    ),
    Mutant(
        "the action is reset after the none test",
        Edit(
            "kernel_model.pagewalk:_tested",
            ("    if kernel.variant.reset_before_none:\n        walk.action = Action.SUBTREE\n", ""),
        ),
        WALK,
    ),
    Mutant(
        "walk_pmd_range() finds no table and lets the pud loop go on",
        Edit("kernel_model.pagewalk:walk_pmd_range", ("walk.action = Action.AGAIN", "pass")),
        ("walk_page_range",),
    ),
    Mutant(
        "CONTINUE does not skip the subtree",
        Edit("kernel_model.pagewalk:_tested", ("_action(walk) is not Action.SUBTREE", "_action(walk) is Action.AGAIN")),
        WALK,
    ),
    Mutant(
        "AGAIN of a PTE callback is forgotten",
        Edit(
            "kernel_model.pagewalk:_pmd",
            ("kernel.variant.again_after_pte and _action(walk) is Action.AGAIN", "False"),
        ),
        WALK,
    ),
    Mutant(
        "the PTE loop ends where the range does",
        Edit("kernel_model.pagewalk:walk_pte_range_inner", ("addr >= (end - page & U64)", "addr + page >= end")),
        WALK,
    ),
    Mutant(
        "a PMD entry that is not present is descended into",
        Edit("kernel_model.pagewalk:_pmd", (" or not bits.pmd_present(kernel.read(pmd))", "")),
        WALK,
    ),
    Mutant(
        "a table folded at run time is looked up from the entry, not from its page",
        Edit("kernel_model.pagewalk:_offset", ("(entry & -kernel.levels.page_size)", "entry")),
        WALK,
        "debian:6.12",
    ),
    Mutant(
        "bit 58 without VALID is not present in 6.1",
        Edit("kernel_model.names:Bits.pte_present", (" or bool(val & self.PROT_NONE)", "")),
        NOVMA,
        "debian:6.1",
    ),
    Mutant(
        "bits 49:48 are no address bits",
        Edit("kernel_model.names:Bits._address", ("not self.variant.addr_high", "True")),
        WALK,
    ),
    # locks
    Mutant(
        "the kernel walk refuses an empty range before it asserts",
        Set(
            "kernel_model.variants:V7",
            lambda v: replace(
                v,
                locks=replace(
                    v.locks,
                    entries={**v.locks.entries, WALK[0]: (Check.EMPTY, Check.INIT_READ, Check.INSTALL)},
                ),
            ),
        ),
        WALK,
    ),
    Mutant(
        "a reader is enough for walk_page_range_debug()",
        Edit(
            "kernel_model.walkers:_asserted",
            ("Check.INIT_WRITE: (init, Need.WRITE)", "Check.INIT_WRITE: (init, Need.READ)"),
        ),
        ("walk_page_range_debug",),
    ),
    Mutant(
        "a reader is enough for another mm in walk_page_range_novma()",
        Edit(
            "kernel_model.walkers:_asserted",
            ("Check.NOVMA: (own, Need.READ if of_kernel else Need.WRITE)", "Check.NOVMA: (own, Need.READ)"),
        ),
        NOVMA,
        "debian:6.12.95",
    ),
    # pageattr.c
    Mutant(
        "bits are set first and cleared after",
        Edit(
            "kernel_model.pageattr:masked",
            ("value & ~masks.clear & U64 | masks.set", "(value | masks.set) & ~masks.clear & U64"),
        ),
        VALID,
    ),
    Mutant(
        "an invalid page keeps its nG bit clear in 7.x",
        Edit(
            "kernel_model.pageattr:valid_masks",
            ("Masks(bits.NG, bits.PRESENT_VALID_KERNEL)", "Masks(0, bits.PRESENT_VALID_KERNEL)"),
        ),
        VALID,
    ),
    Mutant(
        "the TLB is flushed for invalid to valid too",
        Edit("kernel_model.pageattr:__change_memory_common", ("kernel.variant.flush_always or ", "True or ")),
        VALID,
    ),
    Mutant(
        "PTRS_PER_PTE pages are flushed one by one",
        Edit(
            "kernel_model.tlbflush:_limit_excess", (" or (size == limit and kernel.variant.flush_limit_inclusive)", "")
        ),
        VALID,
    ),
    Mutant(
        "a flush does not round to pages",
        Edit("kernel_model.tlbflush:flush_tlb_kernel_range", ("end + page - 1 & -page & U64", "end & -page & U64")),
        VALID,
    ),
    Mutant(
        "part of a block is changed as if it were the whole",
        Edit("kernel_model.pageattr:_change_leaf", ("size != level.size", "False")),
        VALID,
    ),
    Mutant(
        "barriers are put off in softirq too",
        Edit("kernel_model.stores:_lazy", (" and not kernel.context.in_interrupt", "")),
        VALID,
    ),
    Mutant(
        "a PTE without UXN is ordered for the walker",
        Edit("kernel_model.names:Bits.valid_kernel", ("== self.VALID | self.UXN", "& self.VALID != 0")),
        VALID,
    ),
    Mutant(
        "the linear alias of the whole area is changed, as in 6.x",
        Edit("kernel_model.pageattr:_change_alias", ("if whole else range(first, first + count)", "if True else ()")),
        ("set_memory_ro",),
    ),
    Mutant(
        "rw leaves the linear alias alone",
        Edit(
            "kernel_model.pageattr:change_memory_common",
            ("kernel.bits.RDONLY in masks", "kernel.bits.RDONLY == masks.set"),
        ),
        ("set_memory_rw",),
    ),
    Mutant(
        "the guard page is outside the area",
        Edit("kernel_model.pageattr:change_memory_common", ("> area.end", "> area.end - page")),
        ("set_memory_ro",),
        "debian:6.12",
    ),
    Mutant(
        "a huge vmalloc area may be changed",
        Edit("kernel_model.pageattr:_may_change", ("if kernel.variant.refuses_huge_vmap else 0", "if False else 0")),
        ("set_memory_nx",),
    ),
    Mutant(
        "a page is split out at the more aligned of its ends",
        Edit("kernel_model.split:_split_ends", ("_ffs(start) < _ffs(end)", "_ffs(start) > _ffs(end)")),
        VALID,
    ),
    Mutant(
        "a split block becomes a table without runs",
        Edit("kernel_model.split:_cont", ("if to_cont else", "if False else")),
        VALID,
    ),
    Mutant(
        "a split run keeps CONT in its last entry",
        Edit("kernel_model.split:split_contpte", ("(pte & -size) + size, 8)", "(pte & -size) + size - 8, 8)")),
        VALID,
    ),
    Mutant(
        "an invalidated block is not present to kernel_page_present() of 6.x",
        Edit("kernel_model.pageattr:_is_block", ("return", "return True or")),
        ("kernel_page_present",),
    ),
    # mm/memory.c
    Mutant(
        "a leaf is refused after the bad entry was cleared",
        Edit("kernel_model.apply:_entry", ("if not none and _leaf(kernel, name, entry):", "if False:")),
        ("apply_to_page_range",),
        "debian:6.12",
    ),
    Mutant(
        "the PTE loop of apply_to_page_range() ends behind the range",
        Edit("kernel_model.apply:_each_pte", ("addr == end", "addr >= end")),
        VALID,
        "debian:6.1",
    ),
    Mutant(
        "apply_to_existing_page_range() calls for none PTEs",
        Edit("kernel_model.apply:_each_pte", ("if create or kernel.read(pte) else 0", "if True else 0")),
        ("apply_to_existing_page_range",),
    ),
    # mm/ptdump.c
    Mutant(
        "a group does not end at a change of level",
        Edit(
            "kernel_model.ptdump:note_page",
            ("prot != st.current_prot or level != st.level or", "prot != st.current_prot or"),
        ),
        PTDUMP,
    ),
    Mutant(
        "only one of two markers at an address is printed",
        Edit("kernel_model.ptdump:_end_group", ("    _pass_marker(st, addr)\n", "")),
        PTDUMP,
    ),
    Mutant(
        "sizes are rounded up to the next unit",
        Edit("kernel_model.ptdump_text:size", ("delta % 1024 == 0", "delta >= 1024")),
        PTDUMP,
    ),
    Mutant(
        "a page that is not valid cannot be writable and executable",
        Edit(
            "kernel_model.ptdump:note_prot_wx",
            ("if st.check_wx and not", "if st.check_wx and st.current_prot & bits.VALID and not"),
        ),
        PTDUMP,
    ),
    # KFENCE
    Mutant(
        "the right neighbour is blamed where both are as near",
        Edit("kernel_model.kfence:_neighbour", ("right if distance > ", "right if distance >= ")),
        KFENCE,
    ),
    Mutant(
        "the page stays protected after the report",
        Edit(
            "kernel_model.kfence:kfence_handle_page_fault",
            ("kfence_handle_fault(kfence)\n    return kfence_unprotect(kfence, addr)", "return True"),
        ),
        KFENCE,
    ),
    # vmas
    Mutant(
        "post_vma is not called after a walk that failed",
        Edit(
            "kernel_model.pagewalk:__walk_page_range",
            ("if vma and ops.post_vma:", "if vma and ops.post_vma and not err:"),
        ),
        ("walk_page_range",),
    ),
    Mutant(
        "a positive answer of test_walk ends walk_page_range()",
        Edit("kernel_model.walkers:_walk_vma_of_range", ("return min(err, 0)", "return err")),
        ("walk_page_range",),
    ),
    Mutant(
        "VM_PFNMAP is looked at although there is a test_walk",
        Edit(
            "kernel_model.pagewalk:walk_page_test",
            (
                "        return ops.test_walk(start, end, walk)",
                "        return ops.test_walk(start, end, walk) or int(vma.pfnmap)",
            ),
        ),
        ("walk_page_range",),
    ),
)


class Verdict(NamedTuple):
    """What told on a mutant: the function, its failed cases and the first difference; "" for a survivor."""

    function: str
    failed: int
    cases: int
    difference: str


def reports(image: KernelImage, first: Sequence[str]) -> Iterator[FunctionReport]:
    """Reports of the check, function by function, those of `first` before the others."""
    worlds = Worlds(image)
    known = registry.names(image)
    for name in [*first, *(name for name in known if name not in first)]:
        if name in registry.WHOLES:
            yield run_whole(image, name, WHOLE, SEED)
        else:
            yield run_function(worlds, registry.harness(name), CASES, SEED, stop_at_first=True)


def verdict(mutant: Mutant, image: KernelImage) -> Verdict:
    """Runs the check with the rule broken."""
    with broken([mutant.change], PACKAGES):
        for report in reports(image, mutant.first):
            if report.failed:
                return Verdict(report.function, report.failed, report.cases, str(report.failures[0].differences[0]))
    return Verdict("", 0, 0, "")


def main(names: Sequence[str]) -> int:
    """Prints the table; the number of survivors."""
    alive = 0
    for mutant in MUTANTS:
        if names and not any(name in mutant.name for name in names):
            continue
        start = time.monotonic()
        found = verdict(mutant, KernelImage.load(mutant.kernel))
        alive += not found.function
        told = f"{found.function}, case {found.cases}" if found.function else "ALIVE"
        print(
            f"{mutant.name:75} {mutant.kernel:15} {told:50} {time.monotonic() - start:6.1f}s  {found.difference[:120]}"
        )
    print(f"{len(MUTANTS)} mutants, {alive} alive")
    return alive


__all__ = ["MUTANTS", "Mutant", "Need", "main", "verdict"]

if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
