"""Random calls of pageattr.c's functions: where, how many pages, in which surroundings, over which tree.

Rules of this file:
- Ranges lie along the borders of tables, runs and the address space, where rules change.
- Everything comes from one random.Random.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from emu.checks.surroundings import Monitor, Surroundings, requires_bbml, settings_of
from emu.checks.trees import TARGET_PA, Grower, Kind, Tree, random_tree
from emu.checks.world import World
from kernel_model.mm import Context, Settings
from kernel_model.vmalloc import VmFlags, VmStruct

U64 = (1 << 64) - 1
KFENCE_POOL_PAGES = 512  # of Debian's configuration (CONFIG_KFENCE_NUM_OBJECTS=255)
Call = tuple[tuple[int, ...], VmStruct | None, list[int]]  # arguments, area, addresses that the tree grows around
FEW = (0, 1, 1, 1, 2, 3, 5, 9, 16, 17, 33)
LARGE = (1 << 17 | 3, 1 << 21, (1 << 21) + 1)  # for TLBI by range; 6.x would fill them with tables
ODD = (-1, -3, 0x7FFFFFFF, -0x80000000)


def around_of(world: World, rng: random.Random, realm: float) -> Surroundings:
    """Settings, context and monitor. `realm`: how many cases are in one, where there are any."""
    image, bits = world.image, world.bits
    settings = settings_of(
        image,
        rodata_full=rng.random() < 0.7,
        kfence_early=rng.random() < 0.5,
        requires_bbml=requires_bbml(image) is not None and rng.random() < 0.6,
        page_alloc_available=rng.random() < 0.95,
        online_cpus=rng.choice((0, 1, 1, 1, 1, 1, 1, 2)),
        realm=world.own.knows_realms and rng.random() < realm,
        ns_shared=bits.leaf["OA"].put(0, 1 << 40),
    )
    booted = world.own.walks and rng.random() < 0.3  # seldom: patched code is translated anew
    settings.tlb_range, settings.supports_bbml, settings.caps_finalized = (
        booted and rng.random() < 0.6 for _ in range(3)
    )
    if "crypt_ops" in image.symbols and not world.own.knows_realms:
        settings.crypt_ops = rng.random() < realm
    context = rng.choice((Context.TASK,) * 4 + (Context.SOFTIRQ, Context.HARDIRQ))
    pages = rng.choice((0, 1, 2)) if rng.random() < 0.1 else None
    return Surroundings(settings, context, monitor=rng.choice((Monitor.GRANTS, *Monitor)), pages=pages)


class Maker:
    """Makes one case of a kind (pageattr.Function.kind) in a world."""

    def __init__(self, world: World, rng: random.Random, kind: str) -> None:
        self.world, self.rng, self.kind = world, rng, kind
        self.page = world.plan.page_size

    def call(self, settings: Settings) -> Call:
        """Arguments, the area that goes with them, and the addresses that matter."""
        if self.kind == "nothing":
            return (), None, []
        if self.kind.startswith("area"):
            return self._area()
        if self.kind.startswith("page"):
            return self._struct_page()
        addr, numpages = self._va(), self._numpages()
        if numpages * self.page == self.world.levels.pud.size and self.rng.random() < 0.8:
            addr &= -self.world.levels.pud.size & U64
        self._pool(settings, addr)
        end = addr + numpages * self.page & U64
        if self.kind == "ends" and self.rng.random() < 0.1:
            end = end + 8 & U64
        focus = [addr, end]
        args = {
            "range enable": (addr, numpages, self.rng.randrange(2)),
            "linear": (addr, numpages),
            "ends": (addr, end),
        }.get(self.kind) or (addr, end - addr & U64, *self._masks())
        return args, None, focus

    def tree(self, focus: Sequence[int]) -> Tree:
        """A random tree around the addresses; sometimes with plain pages or blocks under all of them."""
        rng, space = self.rng, self.world.space
        if rng.random() < 0.5 or not focus:
            return random_tree(space, rng, focus, ng=self.world.ng)
        grower = Grower(space, rng, ng=self.world.ng)
        for va in focus:
            self._plain(grower, va)
            if rng.random() < 0.4:
                grower.around(va, share=0.3)
        return grower.done()

    def _plain(self, grower: Grower, va: int) -> None:
        """Leaves of one kind around `va`, at one level."""
        tables = self.world.space.tables
        depth = self.rng.choice([i for i, level in enumerate(tables) if level.name in ("PTE", "PTE", "PMD", "PUD")])
        table, level = grower.path(va, depth=depth), tables[depth]
        kind = self.rng.choice((Kind.LEAF, Kind.LEAF, Kind.RUN, Kind.PRESENT_INVALID))
        here, word = self.world.space.index(level, va), grower.word(level, kind)
        layout = self.world.space.fmt.leaf(self.world.space.hardware_level(level))
        if kind is Kind.RUN:
            word |= layout["Contiguous"].mask
        size = min(self.page // 8, 1 << self.world.levels.va_bits - level.shift)
        for index in range(max(0, here - 40), min(size, here + 40)):
            pa = TARGET_PA + (index << level.shift) & (1 << 40) - level.size
            grower.words.setdefault(table + 8 * index, layout.pack(word, OA=pa))

    def on_a_block(self, numpages: int) -> tuple[tuple[int, ...], VmStruct | None, Tree]:
        """A call for the first pages of a block of the PMD level."""
        levels, space = self.world.levels, self.world.space
        va, grower = self.world.plan.linear + levels.pmd.size, Grower(space, random.Random(0), ng=self.world.ng)
        depth = next(i for i, level in enumerate(space.tables) if level.name == "PMD")
        entry = grower.path(va, depth=depth) + 8 * space.index(space.tables[depth], va)
        grower.words[entry] = grower.word(space.tables[depth], Kind.LEAF)
        size, page = numpages * self.page, self.world.physical(va)
        area = VmStruct(va, size + self.page, VmFlags.VM_ALLOC, tuple(page + i * self.page for i in range(numpages)))
        bits = self.world.bits
        args: dict[str, tuple[int, ...]] = {
            "nothing": (),
            "area": (va, numpages),
            "area masks": (va, numpages, bits.RDONLY, bits.WRITE),
            "range enable": (va, numpages, 0),
            "bytes masks": (va, size, bits.RDONLY, bits.WRITE),
            "page": (page,),
            "page range": (page, numpages, 0),
            "linear": (va, numpages),
            "ends": (va, va + size),
        }
        return args[self.kind], area if self.kind.startswith("area") else None, grower.done()

    # addresses

    def _va(self) -> int:
        """A VA, mostly page-aligned, near a border."""
        rng, levels = self.rng, self.world.levels
        if rng.random() < 0.02:
            return rng.getrandbits(64) & rng.choice((U64, -self.page & U64))
        if self.kind == "linear" and rng.random() < 0.85:
            base = self.world.plan.linear
        else:
            base = rng.choice((self.world.plan.linear, -(1 << levels.va_bits_min - 1), -(1 << 34)))
        step = rng.choice((levels.pmd.size, levels.pmd.size, levels.pud.size if levels.pud.shift < 40 else 1 << 36))
        near = rng.choice((0, 0, 1, 2, 3, 15, 16, 17, 31, 127, 128, 255, -1, -2, -3, -16, -17))
        va = base + step * rng.randrange(4) + near * self.page
        if rng.random() < 0.04:
            va = -self.page * rng.randrange(1, 4)  # the end of the address space
        if rng.random() < 0.06:
            va += rng.choice((0x123, 8, self.page - 1))
        return va & U64

    def _numpages(self) -> int:
        rng, entries = self.rng, self.page // 8
        if rng.random() < 0.05:
            return rng.choice(ODD if self.kind != "ends" else ODD[:2])  # a split needs a page for each block
        if self.world.own.walks and self.kind != "ends" and rng.random() < 0.08:
            pud: int = self.world.levels.pud.size // self.page
            return rng.choice((*LARGE, pud, pud, pud))
        if rng.random() < 0.12:
            return rng.choice((entries - 1, entries, entries + 1, 2 * entries, 16 * entries))
        return rng.choice(FEW)

    def _masks(self) -> tuple[int, int]:
        bits, rng = self.world.bits, self.rng
        some = (0, bits.VALID, bits.NG, bits.RDONLY, bits.WRITE, bits.PXN, bits.PRESENT_VALID_KERNEL)
        return rng.choice(some) | rng.choice(some), rng.choice(some) | rng.choice(some)

    def _pool(self, settings: Settings, addr: int) -> None:
        """Sometimes KFENCE's pool is where the range is."""
        if self.rng.random() < 0.15 and settings.kfence:
            size = KFENCE_POOL_PAGES * self.page
            settings.kfence_pool = (addr - self.rng.choice((0, self.page, size)) & -self.page & U64, size)

    # the other kinds

    def _area(self) -> Call:
        """A call in, across or beside an area of up to twelve pages."""
        rng, page = self.rng, self.page
        count = rng.choice((1, 2, 6, 6, 12))
        addr = self._va() & -page
        flags = rng.choice((VmFlags.VM_ALLOC,) * 6 + (VmFlags.VM_MAP, VmFlags.VM_ALLOC | VmFlags.VM_ALLOW_HUGE_VMAP, 0))
        extra = VmFlags.VM_FLUSH_RESET_PERMS if rng.random() < 0.3 else 0
        guard = 0 if rng.random() < 0.1 else 1
        flags |= extra | (0 if guard else VmFlags.VM_NO_GUARD)
        first = TARGET_PA + page * rng.randrange(0, 1 << 12)
        scattered = [first + page * (3 * i if rng.random() < 0.3 else i) for i in range(count + 20)]
        size = (count + guard) * page
        area = VmStruct(addr, size, flags, tuple(scattered), count) if rng.random() < 0.95 else None
        start = addr + page * rng.randrange(0, count + 1)
        numpages = rng.choice((0, 1, 1, 2, count, count, count + 1, count + 2))
        numpages = numpages if rng.random() < 0.9 else rng.randrange(0, 4)
        if rng.random() < 0.06:
            start += 0x123
        focus = [start, start + numpages * page & U64, self.world.linear(first)]
        masks = self._common_masks() if self.kind == "area masks" else ()
        return (start & U64, numpages, *masks), area, focus

    def _common_masks(self) -> tuple[int, int]:
        bits = self.world.bits
        known = (
            (0, bits.RDONLY),
            (bits.PRESENT_VALID_KERNEL, bits.RDONLY),
            (bits.PRESENT_VALID_KERNEL, bits.NG),
            (bits.RDONLY, bits.WRITE),
            (bits.WRITE, bits.RDONLY),
            (bits.PXN, 0),
            (0, bits.PXN),
        )
        return self.rng.choice((*known, self._masks()))

    def _struct_page(self) -> Call:
        """A page of the linear map near a border."""
        addr = self._va() & -self.page
        if not self.world.plan.linear <= addr < (self.world.plan.linear + (1 << 40)):
            addr = self.world.plan.linear + (addr & (1 << 36) - self.page)
        numpages = self.rng.choice(FEW)
        page = self.world.physical(addr)
        more = (numpages, self.rng.randrange(2)) if self.kind == "page range" else ()
        return (page, *more), None, [addr, addr + numpages * self.page & U64]
