"""Audit of a Linux kernel's tables: what its symbols, its variables in RAM and its BTF say must hold.

Rules of this file:
- Everything is asked of the kernel that runs: by a symbol, a member in its BTF. What it does not have is skipped, and
  the verdict says so.
- `EXCUSED` are the findings of the plain rules that Linux makes on purpose; each has its reason.
Sources: arch/arm64/mm/pageattr.c, mmu.c (mark_rodata_ro, map_entry_trampoline), kernel/dma/remap.c, mm/kfence/core.c,
mm/vmalloc.c, include/linux/vmalloc.h, page-flags.h (PageBuddy), mm/internal.h (buddy_order).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from emu.image import KernelImage
from emu.linux_state import VM_DMA_COHERENT, VM_NO_GUARD, Kernel, Unknown
from pgtable.audit import RULES, Excuse, Rule, Status, Verdict, judged
from pgtable.audit_places import Cover, Places, Subject, Sweep, nothing, places
from pgtable.audit_rules import Found
from pgtable.bits import Flags, Words
from pgtable.listing import Listing, Runs
from pgtable.memory import TableMemory
from pgtable.params import Regime
from pgtable.permissions import PW, PX, UW, UX
from pgtable.why import rights

MOST_PAGES = 1 << 24  # struct pages that are looked at: 64 GiB of 4K pages
_ORDERS = 20  # no free block is larger than 2^20 pages
_U64 = (1 << 64) - 1

# page_type of a free page before it was an enumerator (include/linux/page-flags.h)
_TYPE_BASE, _PG_BUDDY = 0xF000_0000, 0x80


# the kernel image


def _protected(kernel: Kernel) -> tuple[int, int]:
    """The VAs of text and read-only data: from _text to what is freed after boot."""
    symbols = kernel.image.symbols
    end = symbols.get("__inittext_begin") or symbols.get("__init_begin")
    if "_text" not in symbols or end is None:
        raise Unknown("this kernel has no symbols _text and __init_begin")
    return symbols["_text"], end


def _clipped(rows: Runs, start: int, end: int) -> Runs:
    """The parts of rows that are in VAs [start, end)."""
    low, high = np.uint64(start), np.uint64(end)
    rows = rows.pick((rows.va < high) & (rows.va + rows.size > low))
    va = np.maximum(rows.va, low)
    pa = np.asarray(rows.pa + (va - rows.va), np.uint64)
    return rows._replace(va=va, size=np.minimum(rows.va + rows.size, high) - va, pa=pa)


def kernel_text(kernel: Kernel) -> Found:
    """The image's own mapping of its text and read-only data."""
    rows = _clipped(kernel.rows, *_protected(kernel))
    if not len(rows.va):
        raise Unknown("the kernel's text is not mapped")
    return Found(_writable(kernel, rows.pick((rows.perms & np.uint16(PW | UW)) != 0)))


def kernel_text_alias(kernel: Kernel) -> Found:
    """Every other mapping of the image's text and read-only data: the linear map first of all."""
    start, end = _protected(kernel)
    outside = (kernel.rows.va < np.uint64(start)) | (kernel.rows.va >= np.uint64(end))
    others = kernel.rows.pick(outside & kernel.subject.having_any(PW | UW))
    return Found(_same_memory(kernel, others, _clipped(kernel.rows, start, end)))


def read_only_alias(kernel: Kernel) -> Found:
    """The linear map of what is read-only or executable in the modules' and vmalloc's space (rodata=full)."""
    if "rodata_full" in kernel.image.symbols and not kernel.value("rodata_full", 1):
        return Found(nothing(), skip="rodata_full is off: the linear map stays writable")
    areas = kernel.within("modules", "vmalloc")
    fixed = kernel.rows.pick(areas & (~kernel.subject.having_any(PW) | kernel.subject.having_any(PX | UX)))
    linear = kernel.rows.pick(kernel.within("linear map") & kernel.subject.having_any(PW | UW))
    return Found(_same_memory(kernel, linear, fixed))


def _writable(kernel: Kernel, rows: Runs) -> Places:
    return places(rows.va, rows.size, rows.perms, lambda perms: rights(perms, kernel.listing.regime), pa=rows.pa)


def _same_memory(kernel: Kernel, writable: Runs, fixed: Runs) -> Places:
    """The PAs that rows of both lists map, as VAs of `writable`; the alias is that of `fixed`."""
    if not len(writable.va) or not len(fixed.va):
        return nothing()
    both: list[tuple[Any, Any]] = list(zip(writable, fixed, strict=True))
    rows = Runs(*(np.concatenate(column) for column in both))
    first = np.arange(len(rows.va)) < len(writable.va)
    sweep = Sweep(rows)
    bad = (sweep.total(first) > 0) & (sweep.total(~first) > 0)
    at = sweep.bounds[:-1][bad]
    w, f = Cover(rows, first).row(at), Cover(rows, ~first).row(at)

    def text(pair: int) -> str:
        regime = kernel.listing.regime
        return f"{rights(pair >> 16, regime)}, and {rights(pair & 0xFFFF, regime)} at the alias"

    return sweep.pairs(bad, w, f, rows.perms[w].astype(np.int64) << 16 | rows.perms[f], text)


# guard pages


def kfence_guards(kernel: Kernel) -> Found:
    """Page 0 of KFENCE's pool and every odd one are not mapped."""
    if not kernel.pool:
        return Found(nothing(), skip="KFENCE has not started")
    page, (start, end) = kernel.image.layout.page_size, kernel.regions.kfence
    guards = [start, *range(start + page, end, 2 * page)]
    return Found(_mapped_guards(kernel, np.array(guards, np.uint64), "a guard page of KFENCE's pool is mapped"))


def vmalloc_guards(kernel: Kernel) -> Found:
    """The last page of every vmalloc area that has a guard page is not mapped."""
    page = kernel.image.layout.page_size
    ends = [area.addr + area.size - page & _U64 for area in kernel.areas if not area.flags & VM_NO_GUARD]
    text = "the guard page behind a vmalloc area is mapped"
    return Found(_mapped_guards(kernel, np.array(sorted(ends), np.uint64), text))


def _mapped_guards(kernel: Kernel, guards: Words, text: str) -> Places:
    bad = guards[kernel.mapped(guards)]
    size = np.full(len(bad), kernel.image.layout.page_size, np.uint64)
    return places(bad, size, np.zeros(len(bad), np.int64), lambda _: text)


# free pages


def free_pages(kernel: Kernel) -> Found:
    """What the page allocator gives out next can be written through the linear map."""
    if _debug_pagealloc(kernel):
        return Found(nothing(), skip="debug_pagealloc unmaps free pages on purpose")
    page = np.uint64(kernel.image.layout.page_size)
    va, size = _free_blocks(kernel)
    if not len(va):
        return Found(nothing(), skip="no struct page says that its page is free")
    rows = kernel.rows.pick(kernel.subject.having_any(PW))
    first = np.flatnonzero(np.concatenate(([True], rows.va[1:] != rows.va[:-1] + rows.size[:-1])))
    start, length = rows.va[first], np.add.reduceat(rows.size, first) if len(first) else rows.size
    bad = ~_inside(va, size, start, length)
    blocks = zip(va[bad].tolist(), (size[bad] // page).tolist(), strict=True)
    pages = np.concatenate(
        [np.zeros(0, np.uint64), *(np.uint64(at) + np.arange(n, dtype=np.uint64) * page for at, n in blocks)]
    )
    pages = pages[~_inside(pages, np.full(len(pages), page), start, length)]
    there = kernel.mapped(pages).astype(np.int64)
    return Found(places(pages, np.full(len(pages), page), there, _FREE.__getitem__))


_FREE = ("free, and not in the linear map", "free, and read-only in the linear map")


def _debug_pagealloc(kernel: Kernel) -> bool:
    name = "_debug_pagealloc_enabled_early"
    return name in kernel.image.symbols and bool(kernel.value(name, 1))


def _inside(va: Words, size: Words, start: Words, length: Words) -> Flags:
    """Whether each range is inside one of some ranges in ascending order."""
    if not len(start):
        return np.zeros(len(va), bool)
    at = np.maximum(np.searchsorted(start, va, side="right") - 1, 0)
    return (va >= start[at]) & (va + size <= start[at] + length[at])


def _free_blocks(kernel: Kernel) -> tuple[Words, Words]:
    """The VA in the linear map and the bytes of each block of free pages, by struct page."""
    areas = kernel.regions
    rows = kernel.rows.pick(kernel.within("vmemmap"))
    struct = areas.struct_page
    if int(rows.size.sum()) // struct > MOST_PAGES:
        raise Unknown(f"more than {MOST_PAGES} struct pages are mapped")
    parts = []
    for va, size, pa in zip(rows.va.tolist(), rows.size.tolist(), rows.pa.tolist(), strict=True):
        steps = np.arange(0, size - struct + 1, struct, dtype=np.uint64)
        free, order = _buddies(kernel, np.uint64(pa) + steps)
        number = (np.uint64(va - areas.vmemmap & _U64) + steps[free]) // np.uint64(struct)
        at = np.uint64(areas.linear) + number * np.uint64(areas.page_size)
        parts.append((at, np.uint64(areas.page_size) << order))
    vas, sizes = ([np.zeros(0, np.uint64), *(part[i] for part in parts)] for i in range(2))
    return np.concatenate(vas), np.concatenate(sizes)


def _buddies(kernel: Kernel, struct_pages: Words) -> tuple[Flags, Words]:
    """Which struct pages (PAs) head a free block, and log2 of the pages in each of those."""
    at = kernel.offset("page", "page_type")
    words, there = kernel.memory.gather(struct_pages + np.uint64(at & -8))
    kind = words >> np.uint64(8 * (at & 7)) & np.uint64(0xFFFF_FFFF)
    btf = kernel.image.btf
    known = btf.enum("pagetype") if btf.has("pagetype") else {}
    if "PGTY_buddy" in known:
        free = kind >> np.uint64(24) == np.uint64(known["PGTY_buddy"])
    else:
        free = (kind & np.uint64(_TYPE_BASE | _PG_BUDDY)) == np.uint64(_TYPE_BASE)
    free &= there
    order = kernel.memory.gather(struct_pages[free] + np.uint64(kernel.offset("page", "private")))[0]
    free[free] = order <= _ORDERS
    return free, order[order <= _ORDERS]


# what Linux does on purpose


def _trampoline(kernel: Kernel) -> Iterator[Excuse]:
    """The code of the image that is mapped above vmalloc: entry code that EL0's tables (KPTI) have too."""
    image = _clipped(kernel.rows, *_protected(kernel))
    above = kernel.rows.pick(
        ~kernel.within("linear map", "modules", "vmalloc", "user") & (kernel.rows.va >> np.uint64(63) == 1)
    )
    code = above.pick((above.perms & np.uint16(PX) != 0) & (above.perms & np.uint16(PW | UX) == 0))
    inside = Cover(image, np.ones(len(image.va), bool)).row(code.pa) >= 0
    reason = "the entry trampoline of KPTI: mapped for EL0 at the same VA, so it stays in the TLB on purpose"
    for va, size in zip(code.va[inside].tolist(), code.size[inside].tolist(), strict=True):
        yield Excuse("global", va, size, reason)


def _coherent(kernel: Kernel) -> Iterator[Excuse]:
    """Areas of coherent DMA memory, which is remapped non-cacheable while the linear map stays as it is."""
    reason = "coherent DMA memory: remapped non-cacheable, while the linear map stays cacheable"
    for area in kernel.areas:
        if area.flags & VM_DMA_COHERENT:
            yield Excuse("alias-attributes", area.addr, area.size, reason)


EXCUSED = (_trampoline, _coherent)


class KernelRule(NamedTuple):
    """A rule that asks the kernel; `title`: what holds where it passes."""

    name: str
    title: str
    check: Callable[[Kernel], Found]


LINUX_RULES = (
    KernelRule("kernel-text", "the kernel's text and read-only data are not writable", kernel_text),
    KernelRule("kernel-text-alias", "nor are they through any other VA", kernel_text_alias),
    KernelRule("read-only-alias", "what is read-only or code in vmalloc is so in the linear map", read_only_alias),
    KernelRule("kfence-guards", "the guard pages of KFENCE's pool are not mapped", kfence_guards),
    KernelRule("vmalloc-guards", "behind every vmalloc area is an unmapped page", vmalloc_guards),
    KernelRule("free-pages", "free pages are writable in the linear map", free_pages),
)


def audit(listing: Listing, memory: TableMemory, image: KernelImage, names: Collection[str] = ()) -> list[Verdict]:
    """The verdict of every rule, plain ones first, or of those with the given names, about a Linux kernel's tables.

    `image`: the kernel, its symbols at run-time addresses.
    """
    kernel = Kernel(image, memory, Subject(listing, memory))
    if listing.regime not in (Regime.EL10, Regime.EL20):
        return [*_plain(kernel, names, []), *not_asked(f"{listing.regime.value} is not a kernel's regime", names)]
    return [*_plain(kernel, names, _excuses(kernel)), *_linux(kernel, names)]


def not_asked(reason: str, names: Collection[str] = ()) -> list[Verdict]:
    """The verdicts of the rules for Linux where there is no kernel to ask."""
    wanted = [rule for rule in LINUX_RULES if not names or rule.name in names]
    return [Verdict(rule.name, rule.title, Status.SKIP, reason) for rule in wanted]


def _plain(kernel: Kernel, names: Collection[str], excuses: list[Excuse]) -> list[Verdict]:
    return [judged(rule, kernel.subject, excuses) for rule in RULES if not names or rule.name in names]


def _linux(kernel: Kernel, names: Collection[str]) -> list[Verdict]:
    wanted = [rule for rule in LINUX_RULES if not names or rule.name in names]
    rules = [Rule(rule.name, rule.title, partial(_asked, kernel, rule.check)) for rule in wanted]
    return [judged(rule, kernel.subject) for rule in rules]


def _asked(kernel: Kernel, check: Callable[[Kernel], Found], subject: Subject) -> Found:
    try:
        return check(kernel)
    except Unknown as unknown:
        return Found(nothing(), skip=str(unknown))


def _excuses(kernel: Kernel) -> list[Excuse]:
    found: list[Excuse] = []
    for excuse in EXCUSED:
        try:
            found += excuse(kernel)
        except Unknown:
            continue
    return found
