"""A machine as its code sees it: registers, memory by address, symbols. Running is emu.machine's.

Rules of this file:
- What is read or written here goes through the tables as they are now, whatever a TLB holds.
"""

from __future__ import annotations

from emu import coldboot, engine
from emu.engine import Cpu
from emu.image import KernelImage
from emu.mmu import LATER, ModelMmu
from emu.types import Types
from pgtable import CPUS, Access, Features, NoMemory, PhysicalMemory, Registers, Walk, translate


class View:
    """One CPU, physical memory and the kernel's tables.

    `memory`: PhysicalMemory. `tables`: the TableBuilder of the kernel's half. `plan`: where things are.
    """

    def __init__(
        self, made: coldboot.SetUp, image: KernelImage | None, features: Features | None, vectors: bool | None
    ) -> None:
        self.memory: PhysicalMemory = made.memory
        self.plan = made.plan
        self.image = image
        self.tables = made.tables
        self.user = made.user
        self.cpu = Cpu(self.memory, page_size=self.plan.page_size)
        self.mmu = ModelMmu(self.cpu, features, vectors=vectors) if features else None
        self.first: View = self  # of the CPUs on this memory, the one whose page pool is theirs
        self._pages_given = 0
        self._struct_pages = made.struct_pages

    def registers(self) -> Registers:
        """The registers of the translation regime as they are now, for `pgtable.translate`."""
        if self.mmu:
            return self.mmu.registers()
        names = ("TCR_EL1", "TTBR0_EL1", "TTBR1_EL1", "MAIR_EL1", "SCTLR_EL1")
        return Registers(CPUS["unicorn"], **{name: self.cpu[name] for name in names})

    def set_register(self, name: str, value: int) -> None:
        """Sets a system register by its name, as MSR and an ISB would; what the TLB holds is dropped.

        Raises ValueError for one that this machine has not.
        """
        if name in engine.SYSTEM:
            self.cpu[name] = value
        elif self.mmu and name in LATER:
            self.mmu[name] = value
        else:
            names = sorted({*engine.SYSTEM, *(LATER if self.mmu else ())})
            raise ValueError(f"register {name}: this machine has {', '.join(names)}")
        self.cpu.flush_tlb()

    def translate(self, va: int, access: Access | None = None) -> Walk:
        """What an access to `va` does with the tables and registers as they are now."""
        return translate(self.memory, self.registers(), va, access)

    def read(self, va: int, n: int) -> bytes:
        """`n` bytes at kernel address `va`, through the tables. Raises ValueError with the walk where it faults."""
        return b"".join(self.memory.read(pa, size) for pa, size in self._spans(va, n))

    def write(self, va: int, data: bytes) -> None:
        """Writes bytes at kernel address `va`, through the tables, whatever their permissions; also instructions."""
        done = 0
        if self.translate(va, Access.fetch(el=1)).ok:
            self.cpu.flush_code()
        for pa, size in list(self._spans(va, len(data))):
            self.memory.write(pa, data[done : done + size])
            done += size

    def word_at(self, va: int, size: int = 4) -> int:
        """The little-endian word at kernel address `va`."""
        return int.from_bytes(self.read(va, size), "little")

    def _spans(self, va: int, n: int) -> list[tuple[int, int]]:
        spans, end, page = [], va + n, self.plan.page_size
        while va < end:
            size = min(end - va, page - va % page)
            spans.append((self.translate(va, Access.read(el=1, pan=False)).pa, size))
            va += size
        return spans

    def symbol(self, name: str | int) -> int:
        """The address of a symbol, or of an address itself; raises SymbolError."""
        if isinstance(name, int):
            return name
        if self.image is None:
            raise ValueError(f"{name}: a machine without a kernel has no symbols")
        return self.image.symbols[name]

    @property
    def types(self) -> Types:
        """The kernel's C types, to read memory by: `types["vm_struct"].at(va)`. Raises BtfError without BTF."""
        if self.image is None:
            raise ValueError("a machine without a kernel has no types")
        return Types(self.image.btf, self.read, self.describe)

    def describe(self, pc: int) -> str:
        """`symbol+0x12`, or the address in hex."""
        if self.image is None or not self.image.base <= pc < self.image.base + self.image.size:
            return f"{pc:#x}"
        return self.image.symbols.describe(pc)

    def argument(self, n: int) -> int:
        """The value of Xn now: in a stub, argument n."""
        return self.cpu.read(engine.X[n])

    def address_register(self, n: int) -> int:
        """Xn, or SP for 31, as where an instruction takes an address."""
        return self.cpu.read(engine.SP if n == 31 else engine.X[n])

    def instruction(self, va: int) -> int:
        """The instruction at `va`, 0 where it cannot be read."""
        try:
            return self.word_at(va)
        except (ValueError, NoMemory):
            return 0

    # pages for stubs

    def give_page(self) -> int:
        """The PA of a zeroed page of RAM from the page pool, for stubs of the page allocator.

        Raises MemoryError when the pool is empty.
        """
        pa = self.plan.pages[0] + self.first._pages_given * self.plan.page_size
        if pa + self.plan.page_size > sum(self.plan.pages):
            raise MemoryError(f"page pool of {self.plan.pages[1]:#x} bytes is empty")
        self.first._pages_given += 1
        self.memory.words(pa, self.plan.page_size // 8)[:] = 0
        return pa

    def take_back(self) -> None:
        """The page pool is whole again: what give_page gave is forgotten."""
        self.first._pages_given = 0

    def struct_page(self, pa: int) -> int:
        """The kernel's struct page of a page of RAM, as its own vmalloc_to_page says. Raises ValueError without it."""
        if self._struct_pages is None:
            raise ValueError("this machine has no struct pages mapped")
        return self._struct_pages + (pa - self.plan.ram[0]) // self.plan.page_size * coldboot.STRUCT_PAGE
