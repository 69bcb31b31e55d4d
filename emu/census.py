"""Who changes permissions of kernel memory while a kernel boots: breakpoints, and a count of who stopped there.

How: emu.guest boots the kernel up to its first process; the gdb stub stops at the first instruction of each function,
where the arguments, the return address and PSTATE are as the caller left them. Nothing is written to memory.

Rules of this file:
- A caller is the instruction before the return address: what branched there for good (a tail call) is not seen.
- init_mm's lock counts as held whoever holds it.
- QEMU throws its translated code away at every stop; a stop costs some 10 ms with that, so a function has a limit.
Sources: include/linux/rwsem.h, arch/arm64/mm/pageattr.c, arch/arm64/mm/mmu.c.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from emu.context import Context, Regions, context, hardirq_shift, regions
from emu.gdbstub import GdbStub
from emu.guest import SYSTEM_CALL, Guest, Options, Progress, started
from emu.image import KernelImage

LIMIT = 1000  # calls of a function
EVERY = 500  # calls between two words about them

_NOP = 0xD503_201F
_MOV_X9_LR = 0xAA1E_03E9  # what ftrace makes of the first NOP
_TSZ = 0x3F  # of TCR_EL1.T1SZ, shifted
_T1SZ = 16
_HELD = 0xFFFF_FF01  # of a rwsem's count: a writer, readers; not that somebody waits
_U64 = (1 << 64) - 1


class Unit(Enum):
    """What an argument counts."""

    PAGES = "pages"
    BYTES = "bytes"
    END = "the address behind"


class Arguments(NamedTuple):
    """Where a function has its range: the register of the address, the register of the size (None: a page) and its
    unit, and whether the address is that of a struct page."""

    address: int
    size: int | None = 1
    unit: Unit = Unit.PAGES
    page: bool = False


# What changes permissions of kernel memory; those that a kernel has are counted.
PERMISSIONS = {
    **{
        f"set_memory_{what}": Arguments(0) for what in ("ro", "rw", "nx", "x", "rox", "valid", "encrypted", "decrypted")
    },
    "set_direct_map_invalid_noflush": Arguments(0, None, page=True),
    "set_direct_map_default_noflush": Arguments(0, None, page=True),
    "set_direct_map_valid_noflush": Arguments(0, page=True),
    "__kernel_map_pages": Arguments(0, page=True),
    "update_mapping_prot": Arguments(1, 2, Unit.BYTES),
}

# What is counted when it is asked for.
OTHERS = {
    "__change_memory_common": Arguments(0, 1, Unit.BYTES),
    "change_memory_common": Arguments(0),
    "update_range_prot": Arguments(0, 1, Unit.BYTES),
    "split_kernel_leaf_mapping": Arguments(0, 1, Unit.END),
    "apply_to_page_range": Arguments(1, 2, Unit.BYTES),
    "apply_to_existing_page_range": Arguments(1, 2, Unit.BYTES),
    "walk_kernel_page_table_range": Arguments(0, 1, Unit.END),
    "walk_kernel_page_table_range_lockless": Arguments(0, 1, Unit.END),
    "walk_page_range_novma": Arguments(1, 2, Unit.END),
    "walk_page_range_debug": Arguments(1, 2, Unit.END),
    "flush_tlb_kernel_range": Arguments(0, 1, Unit.END),
}


# calls


class Call(NamedTuple):
    """One call: of what, the link-time address that it came from, x0 to x3, and whether init_mm's lock was held
    (None: the kernel's locks are others)."""

    function: str
    site: int
    arguments: tuple[int, ...]
    context: Context
    locked: bool | None


class Row(NamedTuple):
    """Calls of a function from one place, for a region, in a context; `pages`: in all, None where the arguments are
    not known; `locked`: how many of them with init_mm's lock held by anybody."""

    function: str
    site: int
    region: str
    context: Context
    calls: int
    pages: int | None
    locked: int | None


@dataclass(frozen=True)
class Census:
    """What a boot has shown. `limited`: functions whose calls were counted up to the limit only; `seconds`: how long
    the boot took."""

    image: KernelImage
    options: Options
    cpu: str
    command_line: str
    qemu: str
    offset: int
    functions: tuple[str, ...]
    limited: frozenset[str]
    rows: tuple[Row, ...]
    seconds: float

    @property
    def calls(self) -> int:
        """All of them."""
        return sum(row.calls for row in self.rows)


def tally(calls: Iterable[Call], where: Regions) -> tuple[Row, ...]:
    """A row for each function, place, region and context, by function and place."""
    count: Counter[tuple[str, int, str, Context]] = Counter()
    pages: Counter[tuple[str, int, str, Context]] = Counter()
    locked: dict[tuple[str, int, str, Context], int | None] = {}
    known = PERMISSIONS | OTHERS
    for call in calls:
        region, size = _range(call.arguments, known.get(call.function), where)
        key = (call.function, call.site, region, call.context)
        count[key] += 1
        pages[key] += size
        locked[key] = None if call.locked is None else (locked.get(key) or 0) + call.locked
    rows = [Row(*key, n, pages[key] if key[0] in known else None, locked[key]) for key, n in count.items()]
    return tuple(sorted(rows, key=lambda row: (row.function, row.site, row.region, row.context.value)))


def _range(arguments: tuple[int, ...], known: Arguments | None, where: Regions) -> tuple[str, int]:
    """The region of what was asked for, and how many pages."""
    if known is None:
        return "unknown", 0
    va = arguments[known.address]
    if known.size is None:
        size = 1
    elif known.unit is Unit.PAGES:
        size = arguments[known.size] & 0xFFFF_FFFF
    else:
        last = arguments[known.size] - (va if known.unit is Unit.END else 0) & _U64
        size = -(-last // where.page_size)
    return where.of(where.address(va) if known.page else va), size


# the boot


def functions_of(image: KernelImage, names: Iterable[str] = ()) -> dict[str, int]:
    """Link-time addresses: of `names`, or of those that change permissions. Raises SymbolError."""
    chosen = tuple(names) or [name for name in PERMISSIONS if image.symbols.all(name)]
    return {name: image.symbols.find(name) for name in chosen}


def count(
    options: Options,
    functions: Iterable[str] = (),
    *,
    limit: int = LIMIT,
    after: float = 0.0,
    progress: Progress = lambda _: None,
) -> Census:
    """Boots until the first process runs and `after` seconds more; stops at the functions, each `limit` times at most.

    Raises BootFailed, ImageError for a kernel that cannot be read, BtfError for one without types, SymbolError for a
    function that it has not.
    """
    image = KernelImage.load(options.kernel)
    targets = functions_of(image, functions)
    with started(options, image) as guest, guest.debugger() as stub:
        progress(f"booting {image.release} in QEMU {guest.version} ({guest.cpu}), stopping at {len(targets)} functions")
        desk = Desk(guest, stub, image, targets, limit)
        begun = time.monotonic()
        desk.open()
        desk.run(after, progress)
        taken = time.monotonic() - begun
        progress(f"{len(desk.calls)} calls in {taken:.1f} s")
        return Census(
            image=image,
            options=options,
            cpu=guest.cpu,
            command_line=guest.command_line,
            qemu=guest.version,
            offset=desk.offset,
            functions=tuple(targets),
            limited=frozenset(desk.limited),
            rows=tally(desk.calls, desk.regions()),
            seconds=taken,
        )


@dataclass
class Desk:
    """Where calls are stopped and written down: the breakpoints of one boot, by run-time address in `stops`."""

    guest: Guest
    stub: GdbStub
    image: KernelImage
    targets: Mapping[str, int]
    limit: int
    calls: list[Call] = field(default_factory=list)
    limited: set[str] = field(default_factory=set)
    stops: dict[int, str] = field(default_factory=dict)
    booting: bool = True
    offset: int = 0

    def __post_init__(self) -> None:
        btf = self.image.btf
        self.seen: Counter[str] = Counter()
        self.preempt_count = btf.offset("task_struct", "thread_info.preempt.count")
        self.hardirq = hardirq_shift(self.image.symbols)
        # With PREEMPT_RT softirqs are counted apart, and init_mm's lock is of another kind.
        rt = btf.has("task_struct", "softirq_disable_cnt")
        self.softirq_count = btf.offset("task_struct", "softirq_disable_cnt") if rt else None
        lock = btf.has("mm_struct", "mmap_lock.count") and "init_mm" in self.image.symbols
        self.lock = self.image.symbols["init_mm"] + btf.offset("mm_struct", "mmap_lock.count") if lock else None

    def open(self) -> None:
        """Runs to where the kernel's place is known; its breakpoints are set then."""
        expected = self.guest.expected_offset(self.image)
        self._place(expected)
        self.offset = self.guest.offset(self.stub, self.image, self.stops, expected)
        if self.offset != expected:
            self._place(self.offset)

    def _place(self, offset: int) -> None:
        for va in self.stops:
            self.stub.clear_breakpoint(va)
        self.stops = {va + offset: name for name, va in self.targets.items()}
        for va in self.stops:
            self.stub.set_breakpoint(va)

    def run(self, after: float, progress: Progress) -> None:
        """Until the first process has printed its mark, and so many seconds more; the guest stands still then."""
        end = None
        self._go_on()
        while end is None or time.monotonic() < end:
            if self.stub.wait(0.05):
                self._go_on()
                if len(self.calls) % EVERY == 0:
                    progress(f"{len(self.calls)} calls")
            self.guest.listen(0.0)
            self.guest.show(progress)
            if end is None and self.guest.marked:
                end = time.monotonic() + after
        self._finish(progress)

    def _finish(self, progress: Progress) -> None:
        """To a system call: in user space the kernel may be unmapped."""
        self.stub.interrupt()
        for va in self.stops:
            self.stub.clear_breakpoint(va)
        self.guest.run_to(self.stub, self.image.symbols[SYSTEM_CALL] + self.offset, progress)

    def _go_on(self) -> None:
        """The guest runs from where it stands, which is written down if it is a call."""
        registers = self.stub.read_general()
        if registers["pc"] in self.stops:
            self._write_down(registers)
            self._pass(registers)
        self.stub.go()

    def _write_down(self, registers: Mapping[str, int]) -> None:
        name = self.stops[registers["pc"]]
        task = self.stub.read("SP_EL0")
        preempt_count = self._word(task + self.preempt_count)
        if self.softirq_count is not None:
            preempt_count |= self._word(task + self.softirq_count)
        self.booting = self.booting and self._variable("system_state") == 0
        self.calls.append(
            Call(
                function=name,
                site=registers["x30"] - 4 - self.offset,
                arguments=tuple(registers[f"x{i}"] for i in range(4)),
                context=context(preempt_count, registers["cpsr"], hardirq=self.hardirq, booting=self.booting),
                locked=None if self.lock is None else bool(self._word(self.lock + self.offset) & _HELD),
            )
        )
        self.seen[name] += 1
        if self.seen[name] == self.limit:
            self.stub.clear_breakpoint(registers["pc"])
            del self.stops[registers["pc"]]
            self.limited.add(name)

    def _pass(self, registers: Mapping[str, int]) -> None:
        """The instruction at the breakpoint; those that functions begin with are done here, as a step takes as long
        as a stop."""
        instruction = self._word(registers["pc"])
        if instruction == _MOV_X9_LR:
            self.stub.write("x9", registers["x30"])
        if instruction in (_NOP, _MOV_X9_LR):
            self.stub.write("pc", registers["pc"] + 4)
        else:
            self.stub.step()

    def _word(self, va: int, size: int = 4) -> int:
        return int.from_bytes(self.stub.memory(va, size), "little")

    def _variable(self, name: str, size: int = 4) -> int:
        """A variable of the kernel; 0 for one that it has not."""
        va = self.image.symbols.get(name)
        return 0 if va is None else self._word(va + self.offset, size)

    def regions(self) -> Regions:
        """Where addresses are, once the kernel has its tables."""
        va_bits = 64 - (self.stub.read("TCR_EL1") >> _T1SZ & _TSZ)
        return regions(self.image, self.offset, va_bits, self._variable("__kfence_pool", 8))
