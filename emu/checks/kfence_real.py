"""KFENCE in a real kernel's memory: a pool, its metadata and the variables of core.c, and what its functions did.

Rules of this file:
- The metadata is written and read by the offsets that BTF gives. It lies in RAM, as the pool does.
- What is no page table and no decision is a stub that leaves a `Called` event: the report, the panic, the trace of who
  freed, canaries, emptying a page.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from emu import trace
from emu.check import observed_warning, stub_allocator
from emu.checks.kfence_cases import Pool
from emu.image import KernelImage
from emu.machine import Machine
from emu.machine import Warn as RealWarn
from kernel_model import kfence
from kernel_model.kfence import ErrorType, Fault, Metadata
from kernel_model.mm import Barrier, Called, Event, Tlbi, Write
from pgtable.descriptors import LAST_LEVEL

POOL_AT = 128 << 20  # from the start of RAM, and the metadata behind it
METADATA_AT = POOL_AT + (16 << 20)
REGS = 0x1234_5678  # a struct pt_regs that nobody looks into
COUNTER = "KFENCE_COUNTER_"
MEMBERS = {"state": 4, "lock": 4, "addr": 8, "size": 8, "unprotected_page": 8}  # bytes
LINKS = 16  # bytes of a struct list_head


class Real:
    """The machine's side. `pool`: where it is. `fault`: what kfence_report_error returns.

    `events`: what the last call did, in the model's terms. `wrong`: what no model has to say to be wrong.
    Raises SymbolError or BtfError for a kernel without KFENCE.
    """

    def __init__(self, image: KernelImage) -> None:
        self.image = image
        self.machine = Machine.boot(image)
        plan = self.machine.plan
        self.pool = Pool(plan.linear_va(plan.ram[0] + POOL_AT), plan.page_size, kfence.NUM_OBJECTS)
        self.metadata_pa = plan.ram[0] + METADATA_AT
        self.metadata = plan.linear_va(self.metadata_pa)
        self.size = image.btf.size("kfence_metadata")
        self.offsets = {m: image.btf.offset("kfence_metadata", m) for m in ("list", *MEMBERS)}
        self._counters = {n.removeprefix(COUNTER): at for n, at in image.btf.enum("kfence_counter_id").items()}
        self.events: list[Event] = []
        self.wrong: list[str] = []
        self.fault = Fault.REPORT
        self._stub()
        self.machine.watch([self.machine.tables.used, plan.pages], self._on_event)
        self.place(placed=True)
        for i in range(self.pool.objects):
            self.put(i, Metadata(addr=self.pool.object_page(i)))

    def call(self, function: str | int, *args: int) -> tuple[int, str]:
        """The real function: X0, and why it did not return ("" if it did)."""
        self.events, self.wrong = [], []
        result = self.machine.call(function, *args, record="events")
        panicked = Called("panic") in self.events
        return result.value, "panic" if panicked else result.stop.kind if result.stop else ""

    def path(self, va: int) -> tuple[int, int]:
        """PAs of the PTE of `va` and of the entry above it."""
        above, leaf = self.machine.translate(va).steps[-2:]
        assert leaf.level == LAST_LEVEL
        return leaf.pa, above.pa

    # variables

    def poke(self, symbol: str, value: int, size: int = 8) -> None:
        """Writes a variable of the kernel."""
        self._store(self.image.symbols[symbol], value, size)

    def peek(self, symbol: str, size: int = 8) -> int:
        """Reads a variable of the kernel."""
        return self._load(self.image.symbols[symbol], size)

    def place(self, *, placed: bool, metadata: bool = True, enabled: bool = True) -> None:
        """Sets the variables that say where pool and metadata are, and whether KFENCE is on."""
        self.poke("__kfence_pool", self.pool.va if placed else 0)
        self.poke("kfence_metadata", self.metadata if metadata else 0)
        self.poke("kfence_metadata_init", self.metadata)
        self.poke("kfence_enabled", int(enabled), 1)

    def counters(self) -> Counter[str]:
        """All counters. `counters` is a name that others have too, whose do not move."""
        tables = self.image.symbols.all("counters")
        return Counter({n: sum(self._load(at + 8 * i) for at in tables) for n, i in self._counters.items()})

    def _store(self, va: int, value: int, size: int = 8) -> None:
        """Past the machine, as data of the image is no code: nothing is translated again."""
        self.machine.memory.write(self._pa(va), value.to_bytes(size, "little"))

    def _load(self, va: int, size: int = 8) -> int:
        return int.from_bytes(self.machine.memory.read(self._pa(va), size), "little")

    def _pa(self, va: int) -> int:
        return va - self.image.base + self.machine.plan.image_pa

    # metadata

    def words(self) -> np.ndarray:
        """All of the metadata (uint64, a view)."""
        return self.machine.memory.words(self.metadata_pa, -(-self.size * self.pool.objects // 8))

    def put(self, index: int, meta: Metadata) -> None:
        """Writes an object's metadata; its lock is free."""
        for member, size in MEMBERS.items():
            value = int(getattr(meta, member)) if member != "lock" else 0
            self.machine.memory.write(self.field(index, member), value.to_bytes(size, "little"))

    def get(self, index: int, member: str) -> int:
        """A member of an object's metadata."""
        return int.from_bytes(self.machine.memory.read(self.field(index, member), MEMBERS[member]), "little")

    def field(self, index: int, member: str) -> int:
        """PA of a member of an object's metadata."""
        return self.metadata_pa + index * self.size + self.offsets[member]

    def index(self, meta: int) -> int:
        """The object whose metadata is at VA `meta`; -1 for none."""
        return (meta - self.metadata) // self.size if meta else -1

    # the list of free objects

    def empty_freelist(self) -> None:
        """Nothing is free."""
        head = self.image.symbols["kfence_freelist"]
        self._store(head, head)
        self._store(head + 8, head)

    def unlink(self, index: int) -> None:
        """The object is in no list."""
        at = self.metadata + index * self.size + self.offsets["list"]
        self.machine.memory.write(self.field(index, "list"), 2 * at.to_bytes(8, "little"))

    def freelist(self) -> list[int]:
        """The indexes of the free objects, the next one first."""
        head = self.image.symbols["kfence_freelist"]
        found: list[int] = []
        at = self._load(head)
        while at != head and len(found) <= self.pool.objects:
            found.append(self.index(at - self.offsets["list"]))
            at = int.from_bytes(self.machine.memory.read(self.machine.plan.linear_pa(at), 8), "little")
        return found

    # events

    def _on_event(self, event: object) -> None:
        if isinstance(event, trace.Maintenance):
            self.events.append(Tlbi(event.operation, event.operand))
        elif isinstance(event, trace.Barrier):
            if not event.name.startswith("dmb"):
                self.events.append(Barrier(event.name))
        elif isinstance(event, trace.TableWrite):
            self.events.append(Write(event.pa, event.value))
        elif isinstance(event, RealWarn):
            self.events.append(observed_warning(event))

    def called(self, name: str, *args: int) -> None:
        """A function that is a stub was called."""
        self.events.append(Called(name, args))

    def _stub(self) -> None:
        stub = self.machine.stub
        stub_allocator(self.machine)
        if "lruvec_stat_mod_folio" in self.image.symbols:
            stub("lruvec_stat_mod_folio", lambda _: 0)  # statistics of page tables
        stub("kfence_report_error", self._report_error)
        stub("panic", self._panic)
        stub("metadata_update_state", self._update_state)
        stub("check_canary", lambda machine: self.called("check_canary", self.index(machine.argument(0))))
        stub("alloc_covered_add", lambda _: 0)
        stub("__memset", self._memset)

    def _report_error(self, machine: Machine) -> int:
        """kfence_report_error(address, is_write, regs, meta, type)."""
        addr, is_write, regs, meta, error = (machine.argument(n) for n in range(5))
        expected = 0 if error == ErrorType.INVALID_FREE else REGS
        if regs != expected:
            self.wrong.append(f"kfence_report_error got regs {regs:#x}, not {expected:#x}")
        if meta and not self.get(self.index(meta), "lock"):
            self.wrong.append("kfence_report_error was called without the lock of the object")
        self.called("kfence_report_error", addr, is_write & 0xFF, self.index(meta), error & 0xFFFF_FFFF)
        return int(self.fault)

    def _panic(self, machine: Machine) -> None:
        self.called("panic")
        machine.cpu.stop()

    def _update_state(self, machine: Machine) -> int:
        """metadata_update_state(meta, next, ...)."""
        index, state = self.index(machine.argument(0)), machine.argument(1) & 0xFFFF_FFFF
        self.called("metadata_update_state", index, state)
        machine.memory.write(self.field(index, "state"), state.to_bytes(4, "little"))
        return 0

    def _memset(self, machine: Machine) -> int:
        """memzero_explicit(): a memset with 0."""
        if machine.argument(1):
            self.wrong.append(f"memset with {machine.argument(1):#x}, not 0")
        self.called("memzero_explicit", machine.argument(0), machine.argument(2))
        return machine.argument(0)
