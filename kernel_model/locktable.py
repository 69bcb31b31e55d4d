"""The lock rules printed: what every entry point does for each walk_lock, mm and lock held, by asking the model.

Each cell is the outcome of a call of the model's entry point on an empty tree, so that the table and the walk cannot
say different things. What a silent success is worth is judged by the rules that Linux documents
(Documentation/mm/process_addrs.rst): `REQUIRED`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from kernel_model import walkers
from kernel_model.levels import Levels
from kernel_model.locks import Check, Config, WalkLock
from kernel_model.mm import Bug, Kernel, Mm, Rwsem, Vma, Warn
from kernel_model.names import Bits
from kernel_model.pagewalk import MmWalkOps
from kernel_model.variants import Variant
from pgtable.descriptors import Format
from pgtable.memory import PhysicalMemory

READER, WRITER = 0x100, 1
START, PAGE = 0x10_0000, 4096
LEVELS = Levels(12, 4, 48, 48)
VMALLOC = (0xFFFF_8000_0000_0000, 0xFFFF_FC00_0000_0000)
LINEAR = 0xFFFF_0000_0800_0000
INIT, INIT_LINEAR, USER = "init_mm", "init_mm, linear map", "user"

PROCEEDS, EINVAL, WARNS, BUG = "proceeds", "-EINVAL", "WARN, proceeds", "assertion fails"
OWNER, UNSAFE = "owner only", "UNSAFE, silent"

# What must be held for the walk to be safe, by what is walked.
REQUIRED = {
    "kernel": "init_mm's lock, or nothing for the one that owns the range",
    "tables": "the mm's lock for writing: munmap() frees tables under the read lock",
    "vma": "the mm's or the vma's lock",
    "mapping": "i_mmap_rwsem",
}


def freed_by(variant: Variant) -> dict[str, str]:
    """Who frees kernel page tables beside a walk, and what keeps him out (mm/memory_hotplug.c, mm/vmalloc.c)."""
    read_trylock = "a read trylock of init_mm's lock: kept out by the write lock, not by the read lock"
    return {
        "memory hot-unplug": "no mmap lock at all: kept out by get_online_mems(), or by owning the memory",
        "huge vmap": read_trylock if variant.locks.vmap_trylock else "no lock: kept out by owning the range",
    }


@dataclass(frozen=True)
class Held:
    """What the caller (or, `mine` False, somebody else) holds."""

    name: str
    mm: int = 0
    init_mm: int = 0
    vma: str = ""
    i_mmap: int = 0
    mine: bool = True


HELD_KERNEL = (
    Held("nothing"),
    Held("init_mm read", init_mm=READER),
    Held("init_mm write", init_mm=WRITER),
)
HELD_USER = (Held("nothing"), Held("mm read", mm=READER), Held("mm write", mm=WRITER))
HELD_BOTH = (*HELD_USER, Held("init_mm write", init_mm=WRITER), Held("both write", mm=WRITER, init_mm=WRITER))
HELD_VMA = (*HELD_USER, Held("vma read", vma="read"), Held("vma write, mm write", mm=WRITER, vma="write"))
HELD_MAPPING = (Held("nothing"), Held("i_mmap_rwsem read", i_mmap=READER))
OTHERS = {
    "kernel": Held("init_mm write, by another", init_mm=WRITER, mine=False),
    "tables": Held("mm write, by another", mm=WRITER, mine=False),
    "vma": Held("mm write, by another", mm=WRITER, mine=False),
}


@dataclass(frozen=True)
class Cell:
    """One row of the printed table."""

    entry: str
    walk_lock: str
    mm: str
    held: str
    outcome: str
    warnings: int

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "entry": self.entry,
            "walk_lock": self.walk_lock,
            "mm": self.mm,
            "held": self.held,
            "outcome": self.outcome,
            "warnings": self.warnings,
        }


def lock_names(variant: Variant) -> dict[int, str]:
    """Names of the values of walk_lock that mean something in this variant; one "-" where there is no walk_lock."""
    if not variant.locks.has_walk_lock:
        return {0: "-"}
    names = {int(lock): lock.name for lock in WalkLock if lock is not WalkLock.THIRD}
    return {**names, int(WalkLock.THIRD): variant.locks.third or "3 (unknown)"}


def cells(variant: Variant, config: Config = Config.SHIPPED) -> Iterator[Cell]:
    """Every cell of a variant's table."""
    for entry in variant.locks.entries:
        names = lock_names(variant)
        # These look at no walk_lock: one row says it, unless the thread's mode is one of the values.
        if entry in ("walk_page_range_debug", "walk_kernel_page_table_range_lockless") or (
            entry in ("walk_kernel_page_table_range", "walk_page_range_novma", "walk_page_mapping")
            and variant.locks.third != "NOLOCK"
        ):
            names = {0: "any"}
        for mm, (value, name) in product(_mms(variant, entry), names.items()):
            yield from (_cell(variant, config, entry, value, name, mm, held) for held in _held(entry, mm, config))


def _mms(variant: Variant, entry: str) -> tuple[str, ...]:
    """What is walked: of init_mm a vmalloc address, and one of the linear map where that is asked for."""
    if Check.NOT_VMALLOC in variant.locks.entries[entry]:
        return (INIT, INIT_LINEAR, USER)
    if entry in ("walk_page_range_novma", "walk_page_range_debug"):
        return (INIT, USER)
    return (INIT,) if entry.startswith("walk_kernel") else (USER,)


def walked(entry: str, mm: str) -> str:
    """What a call walks: a key of REQUIRED."""
    if entry == "walk_page_mapping":
        return "mapping"
    if mm != USER:
        return "kernel"
    return "tables" if entry in ("walk_page_range_novma", "walk_page_range_debug") else "vma"


def _held(entry: str, mm: str, config: Config) -> Iterator[Held]:
    what = walked(entry, mm)
    if entry == "walk_page_range_debug" and mm == USER:
        yield from HELD_BOTH
    else:
        yield from {"kernel": HELD_KERNEL, "tables": HELD_USER, "vma": HELD_VMA, "mapping": HELD_MAPPING}[what]
    if config is Config.DEBUG and what in OTHERS:
        yield OTHERS[what]


def _cell(variant: Variant, config: Config, entry: str, lock: int, name: str, mm: str, held: Held) -> Cell:
    kernel = _kernel(variant, config, held)
    try:
        value = _call(kernel, entry, mm, lock, held)
    except Bug:
        return Cell(entry, name, mm, held.name, BUG, 0)
    warnings = sum(isinstance(event, Warn) for event in kernel.events)
    if value:
        return Cell(entry, name, mm, held.name, EINVAL, warnings)
    silent = PROCEEDS if _is_safe(entry, mm, held) else OWNER if walked(entry, mm) == "kernel" else UNSAFE
    return Cell(entry, name, mm, held.name, WARNS if warnings else silent, warnings)


def _is_safe(entry: str, mm: str, held: Held) -> bool:
    """What REQUIRED says of it; a lock that another holds protects nobody but him."""
    if not held.mine:
        return False
    return {
        "kernel": held.init_mm != 0,
        "tables": held.mm == WRITER,
        "vma": bool(held.mm or held.vma),
        "mapping": bool(held.i_mmap),
    }[walked(entry, mm)]


def _kernel(variant: Variant, config: Config, held: Held) -> Kernel:
    """A kernel over an empty tree, with the locks held."""
    bits = Bits.of(Format(), variant)
    kernel = Kernel(PhysicalMemory((0x4000_0000, PAGE)), 0x4000_0000, LEVELS, bits, config=config)
    kernel.init_mm.mmap_lock = Rwsem(held.init_mm, held.mine)
    kernel.i_mmap_rwsem = Rwsem(held.i_mmap, held.mine)
    kernel.vmalloc_or_module = VMALLOC
    return kernel


def _call(kernel: Kernel, entry: str, mm: str, lock: int, held: Held) -> int:
    """Calls the entry point on one page; where a vma is needed, one that holds it."""
    user = Mm(kernel.pgd, Rwsem(held.mm, held.mine))
    vma = Vma(user, START, START + PAGE, locked=held.vma)
    user.vmas = [vma]
    ops = MmWalkOps(walk_lock=lock)
    function = getattr(walkers, entry)
    space = user if mm == USER else kernel.init_mm
    start = {INIT: VMALLOC[0], INIT_LINEAR: LINEAR, USER: START}[mm]
    if entry in ("walk_page_vma", "walk_page_range_vma", "walk_page_range_vma_unsafe"):
        span = () if entry == "walk_page_vma" else (start, start + PAGE)
        return int(function(kernel, vma, *span, ops))
    if entry == "walk_page_mapping":
        return int(function(kernel, [vma], 0, 1, ops))
    first = () if entry.startswith("walk_kernel") else (space,)
    return int(function(kernel, *first, start, start + PAGE, ops))
