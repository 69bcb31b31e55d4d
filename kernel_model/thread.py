"""The linux-mm thread "mm: Allow pagewalk without locks" as variants: what was posted, asked for, and merged.

None of them but mail-base and v3 is a kernel that anybody shipped. Each has the sentence that it stands for.

- mail-base: walk_page_range_novma() before the thread, as debian:6.12.95 has it.
- mail-v1: the patch of 30 May 2025. PGWALK_NOLOCK, a `default: break`, assertions skipped whatever the mm.
- mail-review: what the reply of 6 June agrees to, in two readings, because "assert we're in the appropriate context"
  can be read as a warning or as a refusal.
- v2: the patch of 10 June 2025, on top of the split of walk_page_range_novma().
- v3: the mode is gone; walk_kernel_page_table_range_lockless() instead, as merged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from kernel_model.locks import (
    E_NOVMA,
    E_SPLIT,
    L_7,
    L_NOVMA,
    L_SPLIT,
    MM_6_12,
    VMA_6_12,
    Check,
    Locks,
    Need,
    WalkLock,
)
from kernel_model.variants import V6_12, V6_12_NOVMA, V7, Variant

C = Check
_THIRD = WalkLock.THIRD

# -EINVAL where the mode is set, for every entry point but walk_page_range_novma(); after the checks that were there.
_REFUSING = {
    "walk_page_range": (C.EMPTY, C.NO_MM, C.NOLOCK_REFUSED, C.MM_LOCK),
    "walk_page_range_vma": (C.EMPTY, C.NO_MM, C.OUTSIDE_VMA, C.NOLOCK_REFUSED, C.MM_LOCK, C.VMA_LOCK),
    "walk_page_vma": (C.NO_MM, C.NOLOCK_REFUSED, C.MM_LOCK, C.VMA_LOCK),
    "walk_page_mapping": (C.NOLOCK_REFUSED, C.I_MMAP),
}

L_V1 = replace(L_NOVMA, entries={**E_NOVMA, "walk_page_range_novma": (C.EMPTY, C.NO_MM, C.NOVMA_UNLESS_NOLOCK)})
L_V1 = replace(L_V1, third="NOLOCK")

L_REVIEW: Locks = replace(
    L_V1,
    entries={**_REFUSING, "walk_page_range_novma": (C.EMPTY, C.NO_MM, C.NOVMA_REVIEWED)},
    vma_lock={**VMA_6_12, _THIRD: Need.WARN},
    no_vma_asserts=True,
)
L_REVIEW_REFUSE = replace(
    L_REVIEW,
    entries={**_REFUSING, "walk_page_range_novma": (C.EMPTY, C.NO_MM, C.NOT_INIT_MM, C.NOVMA_REVIEWED)},
)

# 6.17's walk_page_range_debug() hands init_mm to walk_kernel_page_table_range() and looks at one lock only.
_E_V2 = {
    **E_SPLIT,
    "walk_kernel_page_table_range": (C.EMPTY, C.INIT_UNLESS_NOLOCK),
    "walk_page_range_debug": (C.EMPTY, C.NO_MM, C.MM_WRITE),
}
L_V2 = replace(
    L_SPLIT,
    entries=_E_V2,
    mm_lock={**MM_6_12, _THIRD: Need.REFUSE},
    third="NOLOCK",
    debug_walks_kernel=True,
    vmap_trylock=False,
)

# What was merged, before the fixes of 2026 gave ptdump's walk init_mm's write lock and huge vmap() its trylock.
L_V3 = replace(
    L_7,
    entries={**L_7.entries, "walk_page_range_debug": (C.EMPTY, C.NO_MM, C.INSTALL, C.MM_WRITE)},
    debug_walks_kernel=True,
    vmap_trylock=False,
)

MAIL_BASE = replace(V6_12_NOVMA, name="mail-base")
MAIL_V1 = replace(MAIL_BASE, name="mail-v1", locks=L_V1)
MAIL_REVIEW_ASSERT = replace(MAIL_BASE, name="mail-review/assert", locks=L_REVIEW)
MAIL_REVIEW_REFUSE = replace(MAIL_BASE, name="mail-review/refuse", locks=L_REVIEW_REFUSE)
V2 = replace(V6_12, name="v2", locks=L_V2)
V3 = replace(V7, name="v3", locks=L_V3)


class Reading(NamedTuple):
    """A variant of the thread and the sentence that it stands for."""

    variant: Variant
    sentence: str


THREAD: dict[str, Reading] = {
    reading.variant.name: reading
    for reading in (
        Reading(MAIL_BASE, "before the thread: init_mm needs its lock held, another mm its lock held for writing"),
        Reading(MAIL_V1, "as posted on 30 May 2025: with NOLOCK no assertion at all, for any mm"),
        Reading(
            MAIL_REVIEW_ASSERT,
            "the reply of 6 June read as an assertion: NOLOCK drops init_mm's assertion only; another mm without its"
            " write lock WARNs and is walked; every other entry point refuses the mode",
        ),
        Reading(
            MAIL_REVIEW_REFUSE,
            "the reply of 6 June read as a refusal: NOLOCK on any mm but init_mm is -EINVAL, and so is the mode in"
            " every other entry point",
        ),
        Reading(V2, "as posted on 10 June 2025: walks of vmas refuse NOLOCK; kernel walks skip the assertion"),
        Reading(V3, "as merged: no mode; walk_kernel_page_table_range_lockless() asserts nothing, its caller owns all"),
    )
}


def with_range_check(variant: Variant) -> Variant:
    """The review's second condition, withdrawn eleven minutes later: NOLOCK only from a vmalloc or module address on.

    It refuses with -EINVAL. Every kernel calls set_memory_valid() on the linear map, which it would have refused.
    """
    checks = variant.locks.entries["walk_page_range_novma"]
    with_range = (*checks[:2], C.NOT_VMALLOC, *checks[2:])
    entries = {**variant.locks.entries, "walk_page_range_novma": with_range}
    return replace(variant, name=f"{variant.name}+range", locks=replace(variant.locks, entries=entries))
