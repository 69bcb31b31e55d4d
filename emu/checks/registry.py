"""The functions that `pgtable check` knows, with what checks each.

Most are one compiled function with a harness (campaign.py). ptdump and KFENCE are checked as a whole, by text and by
classification; they report in the same terms.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from emu.checks.harness import Harness
from emu.image import KernelImage

# Function: module and class of its harness, which takes the function's name.
_WALKS = ("emu.checks.walks", "KernelWalk")
_PAGEATTR = ("emu.checks.pageattr", "PageattrHarness")
_APPLY = ("emu.checks.apply", "ApplyHarness")
_USER = ("emu.checks.user_walks", "UserWalk")
HARNESSES: dict[str, tuple[str, str]] = {
    "walk_page_range_novma": _WALKS,
    "walk_kernel_page_table_range": _WALKS,
    "walk_kernel_page_table_range_lockless": _WALKS,
    "walk_page_range_debug": _WALKS,
    "walk_page_range": _USER,
    "walk_page_range_mm_unsafe": _USER,
    "walk_page_range_vma": _USER,
    "walk_page_range_vma_unsafe": _USER,
    "walk_page_vma": _USER,
    "walk_page_mapping": _USER,
    "folio_walk_start": ("emu.checks.folio_walk", "FolioWalkStart"),
    "huge_pte_offset": ("emu.checks.folio_walk", "HugePteOffset"),
    "set_memory_ro": _PAGEATTR,
    "set_memory_rw": _PAGEATTR,
    "set_memory_nx": _PAGEATTR,
    "set_memory_x": _PAGEATTR,
    "set_memory_valid": _PAGEATTR,
    "set_memory_encrypted": _PAGEATTR,
    "set_memory_decrypted": _PAGEATTR,
    "realm_set_memory_encrypted": _PAGEATTR,
    "realm_set_memory_decrypted": _PAGEATTR,
    "set_direct_map_invalid_noflush": _PAGEATTR,
    "set_direct_map_default_noflush": _PAGEATTR,
    "set_direct_map_valid_noflush": _PAGEATTR,
    "kernel_page_present": _PAGEATTR,
    "can_set_direct_map": _PAGEATTR,
    "change_memory_common": _PAGEATTR,
    "__change_memory_common": _PAGEATTR,
    "update_range_prot": _PAGEATTR,
    "split_kernel_leaf_mapping": _PAGEATTR,
    "range_split_to_ptes": _PAGEATTR,
    "apply_to_page_range": _APPLY,
    "apply_to_existing_page_range": _APPLY,
}
# Checked as a whole: name, module with run(image, cases, seed), a symbol that must be there.
WHOLES: dict[str, tuple[str, str]] = {
    "ptdump": ("emu.checks.ptdump", "ptdump_walk"),
    "kfence": ("emu.checks.kfence", "kfence_handle_page_fault"),
}

# Functions whose compiled code is to be reached, basic block by basic block, if the kernel has them. (A walk_pud_range
# that is a symbol is mm/vmscan.c's: that of pagewalk.c is inlined.)
COVERED = (
    "walk_page_range",
    "walk_page_range_mm_unsafe",
    "walk_page_range_novma",
    "walk_kernel_page_table_range",
    "walk_kernel_page_table_range_lockless",
    "walk_page_range_debug",
    "walk_page_range_vma",
    "walk_page_range_vma_unsafe",
    "walk_page_vma",
    "walk_page_mapping",
    "walk_page_test",
    "__walk_page_range",
    "walk_pgd_range",
    "walk_pte_range_inner",
    "folio_walk_start",
    "set_memory_ro",
    "set_memory_rw",
    "set_memory_nx",
    "set_memory_x",
    "set_memory_valid",
    "set_memory_encrypted",
    "set_memory_decrypted",
    "set_direct_map_invalid_noflush",
    "set_direct_map_default_noflush",
    "set_direct_map_valid_noflush",
    "kernel_page_present",
    "can_set_direct_map",
    "change_memory_common",
    "__change_memory_common",
    "change_page_range",
    "update_range_prot",
    "pageattr_pud_entry",
    "pageattr_pmd_entry",
    "pageattr_pte_entry",
    "__apply_to_page_range",
    "apply_to_page_range",
    "apply_to_existing_page_range",
)


def harness(function: str) -> Harness:
    """The harness of a function; raises KeyError for one that has none."""
    module, name = HARNESSES[function]
    made: Harness = getattr(importlib.import_module(module), name)(function)
    return made


def names(image: KernelImage) -> list[str]:
    """What can be checked in this image, in the order of the tables above."""
    found = [name for name in HARNESSES if name in image.symbols]
    return found + [name for name, (_, symbol) in WHOLES.items() if symbol in image.symbols]


def whole(name: str) -> Callable[[KernelImage, int, int], Any]:
    """The run(image, cases, seed) of something that is checked as a whole."""
    run: Callable[[KernelImage, int, int], Any] = importlib.import_module(WHOLES[name][0]).run
    return run


def covered(image: KernelImage, function: str = "all") -> Iterator[str]:
    """The functions whose code is watched when `function` is checked."""
    return (name for name in COVERED if name in image.symbols and function in ("all", name))
