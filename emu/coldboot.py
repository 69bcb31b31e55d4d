"""Cold boot: a kernel image in RAM, with the tables and variables that its page-table code needs, and nothing run.

What is there afterwards (all of it data in this file's `Plan`):
- the image at the start of RAM, mapped at its link address, read/write and executable at EL1;
- the linear map of all RAM, by pages, with the kernel's own attributes (PAGE_KERNEL, tagged);
- a window in the vmalloc area: a stack, the task that SP_EL0 points at, a page to return to;
- room for the struct pages of RAM (machine.py maps it where the kernel's own vmalloc_to_page says they are);
- memstart_addr, init_mm.pgd, and the registers.
Sources: arch/arm64/include/asm/memory.h, mm/mmu.c map_mem, kernel/head.S; facts measured on Debian's kernels.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from emu.image import BtfError, KernelImage, SymbolError
from pgtable import CPUS, Features, Format, Granule, PhysicalMemory, Registers
from pgtable.build import TableBuilder
from pgtable.registers import MAIR, PA_BITS, SCTLR_EL1, TCR_EL1, TTBR

RAM_BASE = 0x4000_0000
RAM_SIZE = 256 << 20
TABLE_POOL = 16 << 20  # at the end of RAM: enough for 8 GiB of pages
USER_POOL = 1 << 20
WINDOW_PAGES = 64
BLOCK = 2 << 20

# The attributes of MAIR_EL1 that arm64 Linux uses: Normal, Normal (tagged once MTE is on), NC, nGnRnE, nGnRE.
LINUX_MAIR = MAIR.pack(Attr0=0xFF, Attr1=0xFF, Attr2=0x44, Attr3=0x00, Attr4=0x04)
STRUCT_PAGE = 64


UNICORN = CPUS["unicorn"]


class BootError(ValueError):
    """A kernel that cannot be set up; says what is missing."""


@dataclass(frozen=True)
class Plan:
    """Where everything is. `pool` and `user_pool`: tables of the upper and lower half, (PA, bytes); `pages`: what
    stubs of the page allocator give out. `window`, `linear` and the properties without `_pa` are VAs."""

    page_size: int
    va_bits: int
    ram: tuple[int, int]
    image_pa: int
    pool: tuple[int, int]
    user_pool: tuple[int, int]
    pages: tuple[int, int]
    struct_pool: tuple[int, int]  # tables that map struct pages
    window: int  # VA of the vmalloc window
    window_pa: int
    linear: int  # VA of the start of RAM in the linear map
    memstart: int  # memstart_addr, signed
    vmemmap_pa: int  # zeroed struct pages for all of RAM

    @property
    def stack(self) -> int:
        """The initial stack pointer: the top of 16 pages, above an unmapped one."""
        return self.window + 20 * self.page_size

    @property
    def task(self) -> int:
        """The task that SP_EL0 points at: two pages of zeros."""
        return self.window + 24 * self.page_size

    @property
    def landing(self) -> int:
        """Where a called function returns to. Not the start of a page: see docs/engines.md."""
        return self.window + 32 * self.page_size + 64

    @property
    def code(self) -> int:
        """The page that snippets run from at EL1."""
        return self.window + 28 * self.page_size

    @property
    def code_pa(self) -> int:
        """Where that page is."""
        return self.window_pa + 28 * self.page_size

    @property
    def user_code(self) -> int:
        """The page that snippets run from at EL0: executable and read-only there."""
        return 0x400000

    @property
    def user_code_pa(self) -> int:
        """Where that page is."""
        return self.window_pa - 32 * self.page_size

    @property
    def user_data(self) -> int:
        """Sixteen pages that EL0 may read and write; its stack grows down from their end."""
        return 0x800000

    @property
    def user_data_pa(self) -> int:
        """Where those pages are."""
        return self.window_pa - 16 * self.page_size

    @property
    def user_stack(self) -> int:
        """EL0's initial stack pointer."""
        return self.user_data + 16 * self.page_size

    @property
    def spare(self) -> int:
        """Pages of the window that are left to the user: half of them."""
        return self.window + WINDOW_PAGES // 2 * self.page_size + self.page_size

    def linear_va(self, pa: int) -> int:
        """The linear map's address of `pa`."""
        return pa - self.ram[0] + self.linear

    def linear_pa(self, va: int) -> int:
        """The PA of a linear map address."""
        return va - self.linear + self.ram[0]


@dataclass(frozen=True)
class PlacedPlan(Plan):
    """A plan whose stack ends at `top` and whose task is `current`: of a booted kernel, or of a further CPU."""

    top: int = 0
    current: int = 0

    @property
    def stack(self) -> int:
        """The initial stack pointer: below it the stack is free."""
        return self.top

    @property
    def task(self) -> int:
        """The task that SP_EL0 points at."""
        return self.current


@dataclass(frozen=True)
class Protections:
    """Linux's leaf attributes for kernel memory, as templates (arch/arm64/include/asm/pgtable-prot.h)."""

    kernel: int
    linear: int
    execute: int
    device: int


def protections(fmt: Format, *, ng: bool = False) -> Protections:
    """The templates in `fmt`; `ng`: arm64_use_ng_mappings, the kernel is not global."""
    leaf = fmt.leaf(3)
    software_dirty = leaf["IGNORED_58_55"].put(0, 1)
    base = leaf.pack(software_dirty, AF=1, UXN=1, DBM=1, nG=int(ng), **_shareable(fmt))
    return Protections(
        kernel=leaf.pack(base, PXN=1),
        linear=leaf.pack(base, PXN=1, AttrIndx=1),
        execute=base,
        device=leaf.pack(base & ~software_dirty, PXN=1, AttrIndx=3),
    )


def _shareable(fmt: Format) -> dict[str, int]:
    """Inner shareable; with LPA2 it is TCR_EL1 that says so."""
    return {} if fmt.lpa2 else {"SH": 3}


def make_plan(
    image: KernelImage, *, ram: int = RAM_SIZE, va_bits: int | None = None, features: Features = UNICORN
) -> Plan:
    """Where things go for `image`; `va_bits`: 64 - T1SZ (default: the smallest that the build can run with)."""
    layout = image.layout
    page = 1 << layout.page_shift
    bits = va_bits or layout.va_bits_min
    if bits not in (layout.va_bits, layout.va_bits_min):
        raise BootError(f"{image.name}: runs with {layout.va_bits_min} or {layout.va_bits} VA bits, not {bits}")
    _check_bits(bits, Granule(layout.page_shift), features)
    needed = _up(image.size, BLOCK) + 2 * TABLE_POOL + ram // page * STRUCT_PAGE
    if ram % BLOCK or ram < needed:
        raise BootError(f"ram {ram:#x}: must be a multiple of {BLOCK:#x} and at least {_up(needed, BLOCK):#x}")
    # A build for more VA bits than it runs with places its linear map at the upper end of the configured one, and
    # lowers memstart_addr by the difference (arch/arm64/mm/init.c, arm64_memblock_init).
    lowered = (1 << layout.va_bits) - (1 << bits)
    window = image.base + _up(image.size, BLOCK) + (1 << 28)
    return _plan(page, bits, ram, window, RAM_BASE - lowered, TABLE_POOL)


def _check_bits(va_bits: int, granule: Granule, features: Features) -> None:
    if va_bits > 48 and not (features.lva if granule is Granule.K64 else features.lpa2):
        whose = "Unicorn's CPU has neither" if features is UNICORN else f"{features.name} has not"
        raise BootError(f'{va_bits} VA bits need FEAT_LPA2 or FEAT_LVA, and {whose}: at most 48 (see mmu="model")')


def _plan(page: int, va_bits: int, ram: int, window: int, memstart: int, table_pool: int) -> Plan:
    """Pools at the end of RAM, the rest below them; the image, if there is one, at the start."""
    pool = (RAM_BASE + ram - table_pool, table_pool)
    user_pool = (pool[0] - USER_POOL, USER_POOL)
    pages = (user_pool[0] - table_pool // 4, table_pool // 4)
    struct_pool = (pages[0] - USER_POOL, USER_POOL)
    vmemmap_pa = (struct_pool[0] - ram // page * STRUCT_PAGE) & -page
    return Plan(
        page_size=page,
        va_bits=va_bits,
        ram=(RAM_BASE, ram),
        image_pa=RAM_BASE,
        pool=pool,
        user_pool=user_pool,
        pages=pages,
        struct_pool=struct_pool,
        window=window,
        window_pa=vmemmap_pa - WINDOW_PAGES * page,
        linear=(1 << 64) - (1 << va_bits),
        memstart=memstart,
        vmemmap_pa=vmemmap_pa,
    )


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class SetUp:
    """What a plan became: memory, the builders of the upper and the lower half, the registers.

    `struct_pages`: VA of the struct page of the first page of RAM, once they are mapped.
    """

    plan: Plan
    memory: PhysicalMemory
    tables: TableBuilder
    user: TableBuilder
    registers: Registers
    struct_pages: int | None = None

    def on(self, memory: PhysicalMemory) -> SetUp:
        """The same over a copy of its memory."""
        return replace(self, memory=memory, tables=self.tables.on(memory), user=self.user.on(memory))


class Template:
    """A set-up that any number of machines start from; each gets its memory copy on write."""

    def __init__(self, made: SetUp) -> None:
        self._made = made
        self._frozen = made.memory.freeze()
        weakref.finalize(self, self._frozen.close)

    def thaw(self) -> SetUp:
        """A fresh copy."""
        return self._made.on(self._frozen.thaw())


# Of each image, for as long as it is there, by RAM, VA bits and nG.
_TEMPLATES: weakref.WeakKeyDictionary[KernelImage, dict[tuple[int, int, bool], Template]] = weakref.WeakKeyDictionary()


def template(
    image: KernelImage,
    *,
    ram: int = RAM_SIZE,
    va_bits: int | None = None,
    ng: bool = False,
    features: Features = UNICORN,
) -> Template:
    """The cold boot of `image` on a CPU with `features`, made once for an image."""
    plan = make_plan(image, ram=ram, va_bits=va_bits, features=features)
    made, key = _TEMPLATES.setdefault(image, {}), (ram, plan.va_bits, ng)
    if key not in made:
        made[key] = Template(set_up(image, plan, ng=ng))
    return made[key]


def set_up(image: KernelImage, plan: Plan, *, ng: bool = False) -> SetUp:
    """RAM with the image and its tables."""
    memory = PhysicalMemory.staged(plan.ram)
    padded = np.zeros(_up(len(image.data), 8), np.uint8)
    padded[: len(image.data)] = image.data
    memory.words(plan.image_pa, len(padded) // 8)[:] = padded.view(np.uint64)
    made = _trees(memory, plan, Granule(image.layout.page_shift))
    prot = protections(made.tables.fmt, ng=ng)
    made.tables.map(image.base, plan.image_pa, _up(image.size, BLOCK), template=prot.execute)
    _map(plan, made.tables, prot)
    _set_variables(image, plan, memory, made.tables, ng)
    return made


def _trees(memory: PhysicalMemory, plan: Plan, granule: Granule) -> SetUp:
    fmt = Format(granule, ds=_is_lpa2(plan, granule))
    user = TableBuilder(memory, plan.user_pool, fmt=fmt, va_bits=plan.va_bits)
    tables = TableBuilder(memory, plan.pool, fmt=fmt, va_bits=plan.va_bits, upper=True, UXNTable=1)
    own = fmt.leaf(3).pack(AF=1, nG=1, PXN=1, **_shareable(fmt))
    user.map(plan.user_code, plan.user_code_pa, plan.page_size, level=3, template=own, AP=3)
    user.map(plan.user_data, plan.user_data_pa, 16 * plan.page_size, level=3, template=own, AP=1, UXN=1)
    return SetUp(plan, memory, tables, user, registers(plan, granule, tables.root, user.root))


def _is_lpa2(plan: Plan, granule: Granule) -> bool:
    """52-bit addresses in 4K and 16K descriptors (TCR_EL1.DS); 64K pages have them without (FEAT_LVA)."""
    return plan.va_bits > 48 and granule is not Granule.K64


def map_struct_pages(made: SetUp, first: int) -> SetUp:
    """Maps the struct pages of RAM, the first of which is at VA `first`, with tables from a pool of their own."""
    plan = made.plan
    size = _up(plan.ram[1] // plan.page_size * STRUCT_PAGE, plan.page_size)
    builder = made.tables.on(made.memory)
    builder.pool, builder.next_free = plan.struct_pool, plan.struct_pool[0]
    builder.map(first, plan.vmemmap_pa, size, level=3, template=protections(made.tables.fmt).kernel)
    return replace(made, struct_pages=first)


@cache
def bare_template(
    ram: int = 16 << 20, granule: Granule = Granule.K4, va_bits: int = 48, features: Features = UNICORN
) -> Template:
    """A machine without a kernel, made once in a process."""
    return Template(bare_set_up(bare_plan(ram=ram, granule=granule, va_bits=va_bits, features=features), granule))


BARE_RAM = 16 << 20


def bare_plan(
    *, ram: int = BARE_RAM, granule: Granule = Granule.K4, va_bits: int = 48, features: Features = UNICORN
) -> Plan:
    """Where things go on a machine without a kernel."""
    if ram % BLOCK or ram < BARE_RAM:
        raise BootError(f"ram {ram:#x}: must be a multiple of {BLOCK:#x} and at least {BARE_RAM:#x}")
    _check_bits(va_bits, granule, features)
    linear = (1 << 64) - (1 << va_bits)
    return _plan(granule.page_size, va_bits, ram, linear + (1 << va_bits - 1), RAM_BASE, BARE_RAM // 4)


def bare_set_up(plan: Plan, granule: Granule) -> SetUp:
    """RAM and tables for a machine without a kernel."""
    made = _trees(PhysicalMemory.staged(plan.ram), plan, granule)
    _map(plan, made.tables, protections(made.tables.fmt))
    return made


def _map(plan: Plan, tables: TableBuilder, prot: Protections) -> None:
    """The linear map and the window."""
    page = plan.page_size
    tables.map(plan.linear, plan.ram[0], plan.ram[1], level=3, template=prot.linear)
    tables.map(plan.window, plan.window_pa, WINDOW_PAGES * page, level=3, template=prot.kernel)
    tables.protect(plan.landing & -page, page, PXN=0)
    tables.protect(plan.code, page, PXN=0)
    tables.unmap(plan.stack - 17 * page, page)


def _set_variables(image: KernelImage, plan: Plan, memory: PhysicalMemory, tables: TableBuilder, ng: bool) -> None:
    def store(symbol: str, value: int, offset: int = 0) -> None:
        memory.store(image.symbols[symbol] + offset - image.base + plan.image_pa, value & (1 << 64) - 1)

    try:
        store("memstart_addr", plan.memstart)
        store("kimage_voffset", image.base - plan.image_pa)
        store("init_mm", plan.linear_va(tables.root), image.btf.offset("mm_struct", "pgd"))
        if ng:
            where = image.symbols["arm64_use_ng_mappings"] - image.base + plan.image_pa
            memory.write(where, b"\1")
    except (SymbolError, BtfError) as error:
        raise BootError(f"{image.name}: {error}; pass --symbols FILE (ELF, System.map or kallsyms text)") from None


def registers(plan: Plan, granule: Granule, root: int, user_root: int) -> Registers:
    """The registers of a kernel that runs on these tables."""
    tg = {Granule.K4: (0, 2), Granule.K16: (2, 1), Granule.K64: (1, 3)}[granule]
    ips = PA_BITS.index(52 if plan.va_bits > 48 else 48)
    size = 64 - plan.va_bits
    tcr = TCR_EL1.pack(
        T0SZ=size, T1SZ=size, TG0=tg[0], TG1=tg[1], IPS=ips, SH0=3, SH1=3, IRGN0=1, ORGN0=1, IRGN1=1, ORGN1=1
    )
    tcr = TCR_EL1.pack(tcr, DS=int(_is_lpa2(plan, granule)))
    return Registers(
        TCR_EL1=tcr,
        TTBR0_EL1=TTBR.pack(BADDR=user_root),
        TTBR1_EL1=TTBR.pack(BADDR=root),
        SCTLR_EL1=SCTLR_EL1.pack(M=1, C=1, I=1, EIS=1, EOS=1, SPAN=1, nTLSMD=1, LSMAOE=1),
        MAIR_EL1=LINUX_MAIR,
    )
