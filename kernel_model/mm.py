"""What the kernel functions act on: memory, address spaces with their locks, a context, and the events they cause.

Rules of this file:
- Entry pointers are PAs of descriptors. Every read goes to memory again, as the kernel's does.
- What a processor would see is recorded in `Kernel.events`, in the kernel's order; memory is written in place. So are
  the calls of callbacks, and of functions that are outside the model (`Called`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from kernel_model.levels import U64, Levels
from kernel_model.locks import Config, Locks
from kernel_model.names import Bits
from kernel_model.variants import Variant
from kernel_model.vmalloc import VmStruct

EINVAL, ENOMEM, EBUSY = 22, 12, 16


class Tlbi(NamedTuple):
    """A TLBI: its name and operand (0 for none)."""

    operation: str
    operand: int = 0

    def __str__(self) -> str:
        return f"tlbi {self.operation.lower()}" + (f", {self.operand:#x}" if self.operand else "")


class Barrier(NamedTuple):
    """A DSB or ISB, by name."""

    name: str

    def __str__(self) -> str:
        return self.name


class Write(NamedTuple):
    """A store of a descriptor."""

    pa: int
    value: int

    def __str__(self) -> str:
        return f"[{self.pa:#x}] = {self.value:#018x}"


class Warn(NamedTuple):
    """A WARN, by the function that has it."""

    function: str

    def __str__(self) -> str:
        return f"WARN in {self.function}"


class Callback(NamedTuple):
    """A callback that was called: its name, its integer arguments but the walk, the entry it saw and the action then.

    `value`: the word behind the first argument where that is an entry pointer, else None.
    """

    name: str
    args: tuple[int, ...]
    value: int | None = None
    action: int = 0

    def __str__(self) -> str:
        value = "" if self.value is None else f" {self.value:#018x}"
        return f"{self.name}({', '.join(f'{a:#x}' for a in self.args)}){value} action {self.action}"


class Called(NamedTuple):
    """A call of a function that the model stops at, and its judged arguments."""

    name: str
    args: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{a:#x}' for a in self.args)})"


Event = Tlbi | Barrier | Write | Warn | Callback | Called


class Context(Enum):
    """What the CPU is doing; lazy MMU mode and sleeping locks depend on it (include/linux/preempt.h)."""

    TASK = "task"
    SOFTIRQ = "softirq"
    HARDIRQ = "hardirq"

    @property
    def in_interrupt(self) -> bool:
        """in_interrupt()."""
        return self is not Context.TASK


WRITER_LOCKED, READER_BIAS = 1, 0x100  # kernel/locking/rwsem.c


@dataclass
class Rwsem:
    """A struct rw_semaphore by its count: 0 free, bit 0 a writer, 0x100 for each reader.

    `mine`: the holder is the caller; only lockdep can tell.
    """

    count: int = 0
    mine: bool = True

    def held(self, write: bool, *, by_me: bool) -> bool:
        """Somebody (or, `by_me`, the caller) holds it, for writing if `write`."""
        held = self.is_write_locked if write else self.is_locked
        return held and (self.mine or not by_me)

    @property
    def is_locked(self) -> bool:
        """Anybody holds it (rwsem_is_locked)."""
        return self.count != 0

    @property
    def is_write_locked(self) -> bool:
        """A writer holds it (RWSEM_WRITER_LOCKED)."""
        return bool(self.count & WRITER_LOCKED)


@dataclass
class Vma:
    """A struct vm_area_struct: [start, end) of `mm`. `huge_size`: bytes of its hugetlb pages, 0 for none.

    `pfnmap`: VM_PFNMAP. `pgoff`: vm_pgoff, in pages. `locked`: its own lock is held: "", "read" or "write".
    """

    mm: Mm | None
    start: int
    end: int
    huge_size: int = 0
    pfnmap: bool = False
    pgoff: int = 0
    locked: str = ""

    def start_write(self, kernel: Kernel, name: str) -> None:
        """vma_start_write() in the function `name`: asserts the mm's write lock, then takes this one if it is free."""
        if self.mm and not self.mm.mmap_lock.held(True, by_me=kernel.lockdep):
            kernel.warn(name)
        if self.locked != "write":
            kernel.called("__vma_start_write")
            self.locked = "write"


@dataclass(eq=False)
class Mm:
    """A struct mm_struct: PA of its root, its mmap lock, its vmas in address order."""

    pgd: int
    mmap_lock: Rwsem = field(default_factory=Rwsem)
    vmas: list[Vma] = field(default_factory=list)

    def find_vma(self, addr: int) -> Vma | None:
        """find_vma(): the first vma that ends above `addr`."""
        return next((vma for vma in self.vmas if addr < vma.end), None)


@dataclass
class Settings:
    """What boot parameters, hardware and the time since boot decided, for pageattr.c, mmu.c and KFENCE.

    `requires_bbml`: linear_map_requires_bbml3 (7.2: bbml2_noabort). `supports_bbml`: the CPU may change block sizes
    without break-before-make. `caps_finalized`: system_capabilities_finalized(). `tlb_range`: FEAT_TLBIRANGE.
    `kfence_pool`: VA and bytes. `kfence`: CONFIG_KFENCE. `ns_shared`: PROT_NS_SHARED of a realm, 0 outside.
    `crypt_ops`: somebody else than a realm has registered memory encryption (guests of pKVM).
    """

    rodata_full: bool = True
    debug_pagealloc: bool = False
    kfence: bool = True
    kfence_early: bool = False  # kfence_early_init
    kfence_pool: tuple[int, int] | None = None
    realm: bool = False
    ns_shared: int = 0
    crypt_ops: bool = False
    requires_bbml: bool = False
    supports_bbml: bool = False
    caps_finalized: bool = True
    page_alloc_available: bool = True
    online_cpus: int = 1
    tlb_range: bool = False
    bti_kernel: bool = False
    zero_page: int | None = None  # PA of the page of zeros that anonymous memory is mapped to before it is written
    huge_zero_page: int | None = None  # PA of that for a PMD


@dataclass
class LazyMmu:
    """current->lazy_mmu_state, and TIF_LAZY_MMU_PENDING."""

    enable_count: int = 0
    pause_count: int = 0
    pending: bool = False


class RsiReply(NamedTuple):
    """What the realm's monitor answers to RSI_IPA_STATE_SET: status, the PA it came to, 0 for accepted."""

    status: int
    top: int
    response: int = 0


def _rsi_grants(start: int, end: int, state: int, flags: int) -> RsiReply:
    return RsiReply(0, end)


class Bug(Exception):  # noqa: N818  the kernel's name: BUG() does not go on
    """The kernel would have hit BUG()."""


class Runaway(Exception):  # noqa: N818  what the loop does
    """A loop that the kernel would not have ended; says where."""


class WordMemory(Protocol):
    """Physical memory by 8-byte words; both raise NoMemory."""

    def fetch(self, pa: int) -> int:
        """The word at `pa`."""
        ...

    def store(self, pa: int, word: int) -> None:
        """Writes the word at `pa`."""
        ...


@dataclass
class Kernel:
    """One kernel at one moment: its variant, levels, bits, memory, `init_mm`'s root, and what it has done.

    `allocate()` gives the PA of a zeroed page for a table, None when there is none (-ENOMEM).
    `linear_offset`: what the linear map adds to a PA. `vm_areas`: what find_vm_area finds. `lazy`: the task's lazy MMU
    mode. `rsi(start, end, state, flags)` answers for the monitor of a realm.
    """

    memory: WordMemory
    pgd: int  # PA of init_mm.pgd
    levels: Levels
    bits: Bits
    allocate: Callable[[], int | None] = lambda: None
    table_flags: int = 0  # what a kernel table descriptor has besides VALID and TYPE
    events: list[Event] = field(default_factory=list)
    steps: int = 0
    step_limit: int = 10_000_000
    settings: Settings = field(default_factory=Settings)
    context: Context = Context.TASK
    linear_offset: int = 0
    vm_areas: list[VmStruct] = field(default_factory=list)
    lazy: LazyMmu = field(default_factory=LazyMmu)
    rsi: Callable[[int, int, int, int], RsiReply] = _rsi_grants
    config: Config = Config.SHIPPED
    i_mmap_rwsem: Rwsem = field(default_factory=Rwsem)
    outside: dict[str, Callable[..., int]] = field(default_factory=dict)  # what stands for functions not modelled
    vmalloc_or_module: tuple[int, int] = (0, 0)  # VAs from the modules' start to the end of the vmalloc area

    def __post_init__(self) -> None:
        self.init_mm = Mm(self.pgd)

    @property
    def locks(self) -> Locks:
        """The lock rules that apply."""
        return self.variant.locks

    @property
    def lockdep(self) -> bool:
        """Assertions ask whether the caller holds the lock."""
        return self.config is Config.DEBUG

    @property
    def task_size(self) -> int:
        """TASK_SIZE: where user addresses end."""
        return 1 << self.levels.va_bits

    def is_vmalloc_or_module(self, addr: int) -> bool:
        """is_vmalloc_or_module_addr()."""
        start, end = self.vmalloc_or_module
        return start <= addr < end

    @property
    def variant(self) -> Variant:
        """The variant whose rules apply."""
        return self.bits.variant

    def read(self, pa: int) -> int:
        """READ_ONCE of a descriptor."""
        return self.memory.fetch(pa)

    def write(self, pa: int, value: int) -> None:
        """WRITE_ONCE of a descriptor."""
        self.memory.store(pa, value & U64)
        self.events.append(Write(pa, value & U64))

    def barrier(self, *names: str) -> None:
        """DSB or ISB, in order."""
        self.events.extend(Barrier(name) for name in names)

    def warn(self, function: str) -> None:
        """WARN_ON that fired."""
        self.events.append(Warn(function))

    def called(self, name: str, *args: int) -> None:
        """A function outside the model was called."""
        self.events.append(Called(name, args))

    def page_address(self, page: int) -> int:
        """page_address(): the linear map's VA of the page at PA `page`, which stands for its struct page."""
        return page + self.linear_offset & U64

    def virt_to_phys(self, va: int) -> int:
        """__virt_to_phys() of an address in the linear map."""
        return va - self.linear_offset & U64

    def call_out(self, name: str, *args: int) -> int:
        """Calls what stands for a function outside the model, 0 if nothing does; an event."""
        self.called(name, *args)
        stand_in = self.outside.get(name)
        return stand_in(*args) if stand_in else 0

    def new_table(self, entry: int, flags: int) -> bool:
        """Puts a new empty table into the entry at PA `entry`, with `flags` in its descriptor; False without a page.

        set_pud() and set_pmd() order a valid entry for the walker at once (arch/arm64/include/asm/pgtable.h).
        """
        page = self.allocate()
        if page is None:
            return False
        self.write(entry, self.bits.table.pack(flags, VALID=1, TYPE=1, TA=page))
        self.barrier("dsb ishst", "isb")
        return True

    def step(self, where: str) -> None:
        """Counts a loop iteration; raises Runaway when a loop has no end."""
        self.steps += 1
        if self.steps > self.step_limit:
            raise Runaway(f"{where}: no end after {self.step_limit} steps")
