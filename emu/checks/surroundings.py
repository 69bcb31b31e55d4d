"""What a kernel function finds around it besides tables: settings, the context, a vmalloc area, a realm's monitor.

Rules of this file:
- `arrange` puts a `Surroundings` into the real kernel's variables; `apply_to` into the model's kernel. Neither sees the
  other.
- Functions of the kernel that would need more than tables are stubs that leave a `Called` event: find_vm_area (none),
  vm_unmap_aliases, mutex_lock and mutex_unlock, the SMC to the monitor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from weakref import WeakKeyDictionary

from emu import engine
from emu.check import ALLOCATORS
from emu.checks.patches import Patch, alternatives, capability, ensure, find_words, static_key
from emu.checks.world import World
from emu.image import KernelImage
from emu.machine import Machine
from kernel_model.mm import Called, Context, Kernel, RsiReply, Settings, Tlbi
from kernel_model.vmalloc import VmStruct

# A hard interrupt counts from bit 16 on, in 7.3 from bit 24 on: both are set (include/linux/preempt.h).
PREEMPT_COUNT = {Context.TASK: 0, Context.SOFTIRQ: 0x100, Context.HARDIRQ: 0x1010000}


# Features that the code asks for by alternatives: field of Settings, how the kernel describes it.
CAPABILITIES = {
    "tlb_range": "TLB range maintenance instructions",
    "supports_bbml": "BBM Level",
    "caps_finalized": "has_always",
}
RVAALE1IS = 0xD50882E0  # of X0
REALM = (
    "can_set_direct_map",
    "set_direct_map_invalid_noflush",
    "set_direct_map_default_noflush",
    "set_direct_map_valid_noflush",
    "realm_set_memory_encrypted",
    "realm_set_memory_decrypted",
    "__set_memory_enc_dec",
)
PATCHED = ("flush_tlb_kernel_range", "split_kernel_leaf_mapping")


class Monitor(Enum):
    """How a realm's monitor answers a request to change the state of a range."""

    GRANTS = "all at once"
    IN_PARTS = "a page at a time"
    REJECTS = "rejected by the host"
    FAILS = "an error"
    TOO_FAR = "more than was asked for"
    BACKWARDS = "less than nothing"

    def reply(self, start: int, end: int, page: int) -> RsiReply:
        """The answer to one call."""
        return {
            Monitor.GRANTS: RsiReply(0, end),
            Monitor.IN_PARTS: RsiReply(0, start + page),
            Monitor.REJECTS: RsiReply(0, end, 1),
            Monitor.FAILS: RsiReply(1, end),
            Monitor.TOO_FAR: RsiReply(0, end + page),
            Monitor.BACKWARDS: RsiReply(0, start - page),
        }[self]


@dataclass(frozen=True)
class Surroundings:
    """One case's. `area`: the only vmalloc area, or none. `pages`: how many the page allocator has, None for enough."""

    settings: Settings = field(default_factory=Settings)
    context: Context = Context.TASK
    area: VmStruct | None = None
    monitor: Monitor = Monitor.GRANTS
    pages: int | None = None

    def apply_to(self, kernel: Kernel) -> Kernel:
        """The model's kernel with all of this."""
        kernel.settings, kernel.context = self.settings, self.context
        kernel.vm_areas = [self.area] if self.area else []
        page = kernel.levels.page_size
        kernel.rsi = lambda start, end, state, flags: self.monitor.reply(start, end, page)
        if self.pages is not None:
            kernel.allocate = _at_most(self.pages, kernel.allocate)
        return kernel


def _at_most(count: int, allocate: Callable[[], int | None]) -> Callable[[], int | None]:
    left = iter(range(count))
    return lambda: None if next(left, None) is None else allocate()


def settings_of(image: KernelImage, **changed: object) -> Settings:
    """What a cold image has: no alternatives applied, KFENCE if it is built in; then `changed`."""
    made = Settings(caps_finalized=False, kfence="kfence_early_init" in image.symbols)
    for name, value in changed.items():
        setattr(made, name, value)
    return made


@lru_cache(maxsize=8)
def requires_bbml(image: KernelImage) -> str | None:
    """The variable that says that the linear map must be split: linear_map_requires_bbml3 or an older name of it."""
    return next((name for name in image.symbols if name.startswith("linear_map_requires_bbml")), None)


class Arranger:
    """Puts surroundings into one world's real kernel."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.now = Surroundings()
        self._patches: dict[str, list[Patch]] | None = None
        self._pages_left = -1
        self._stubs()
        self._crypt_ops = self._register_crypt_ops()
        btf = world.image.btf
        self._preempt_at = world.plan.task + btf.offset("task_struct", "thread_info.preempt_count")
        self._vm_struct = {
            name: btf.member("vm_struct", name) for name in ("addr", "size", "flags", "pages", "nr_pages")
        }
        self._vm_size = btf.size("vm_struct")

    @classmethod
    def of(cls, world: World) -> Arranger:
        """The world's one."""
        if world not in _ARRANGERS:
            _ARRANGERS[world] = cls(world)
        return _ARRANGERS[world]

    def arrange(self, around: Surroundings) -> None:
        """Writes the variables, the area and the static key of a realm."""
        self.now, settings = around, around.settings
        self._pages_left = -1 if around.pages is None else around.pages
        self._poke("rodata_full", settings.rodata_full, 1)
        self._poke("kfence_early_init", settings.kfence_early, 1)
        self._poke("page_alloc_available", settings.page_alloc_available, 1)
        self._poke("__num_online_cpus", settings.online_cpus, 4)
        self._poke("__kfence_pool", settings.kfence_pool[0] if settings.kfence_pool else 0, 8)
        self._poke("prot_ns_shared", settings.ns_shared, 8)
        self._poke(requires_bbml(self.world.image) or "", settings.requires_bbml, 1)
        self._preempt_count(around.context)
        if around.area:
            self._write_area(around.area)
        if settings.crypt_ops:  # again for each: a world that was reset has forgotten it
            self.world.machine.memory.write(self.world.plan.code_pa + 0x800, self._crypt_table)
        realm = self.world.image.symbols.get("realm_crypt_ops", 0) if settings.realm else 0
        self._poke("crypt_ops", realm or (self._crypt_ops if settings.crypt_ops else 0), 8)
        self._patch(settings)

    def _register_crypt_ops(self) -> int:
        """VA of a struct arm64_mem_crypt_ops, whose functions are stubs in the rest of the code page."""
        world, at = self.world, self.world.plan.code + 0x800
        for i, name in enumerate(("encrypted", "decrypted")):
            world.machine.stub(at + 64 + 8 * i, lambda machine, name=name: self._crypts(machine, name))  # type: ignore[misc]
        self._crypt_table = b"".join((at + 64 + 8 * i).to_bytes(8, "little") for i in range(2))
        return at

    def _crypts(self, machine: Machine, name: str) -> int:
        numpages = machine.argument(1) & (1 << 32) - 1
        self.world.note(Called(f"crypt_ops.{name}", (machine.argument(0), numpages)))
        return 0

    def _poke(self, name: str, value: int, size: int) -> None:
        """Straight into RAM: a write by VA drops translated code, and variables are no code."""
        image, plan = self.world.image, self.world.plan
        if name in image.symbols:
            self.world.machine.memory.write(
                image.symbols[name] - image.base + plan.image_pa, value.to_bytes(size, "little")
            )

    def _preempt_count(self, context: Context) -> None:
        self.world.machine.write(self._preempt_at, PREEMPT_COUNT[context].to_bytes(4, "little"))

    # the area

    def _write_area(self, area: VmStruct) -> None:
        """A struct vm_struct at the scratch address, its pages[] behind it."""
        world, pages = self.world, self.world.scratch + 0x100
        values = {**vars(area), "pages": pages}
        struct = bytearray(self._vm_size)
        for name, member in self._vm_struct.items():
            struct[member.offset : member.offset + member.size] = int(values[name]).to_bytes(member.size, "little")
        world.machine.write(world.scratch, bytes(struct))
        pointers = b"".join(world.machine.struct_page(pa).to_bytes(8, "little") for pa in area.pages)
        world.machine.write(pages, pointers)

    def _find_vm_area(self, machine: Machine) -> int:
        area, addr = self.now.area, machine.argument(0)
        return self.world.scratch if area and area.addr <= addr < area.end else 0

    # stubs

    def _stubs(self) -> None:
        world = self.world
        world.stub("find_vm_area", self._find_vm_area)
        for name in ("vm_unmap_aliases", "mutex_lock", "mutex_unlock"):
            world.stub(name, self._called(name))
        world.stub("lruvec_stat_mod_folio", lambda _: 0)
        for name in ALLOCATORS:
            if name in world.image.symbols:
                world.stub(name, self._limited(world.machine.stubs[world.image.symbols[name]]))
        world.stub("__arm_smccc_smc", self._smc)

    def _limited(self, allocate: Callable[[Machine], int | None]) -> Callable[[Machine], int | None]:
        """The page allocator, which has no page left after so many."""

        def stub(machine: Machine) -> int | None:
            if not self._pages_left:
                return 0
            self._pages_left -= 1
            return allocate(machine)

        return stub

    def _called(self, name: str) -> Callable[[Machine], int]:
        def stub(machine: Machine) -> int:
            self.world.note(Called(name))
            return 0

        return stub

    def _smc(self, machine: Machine) -> None:
        """RSI_IPA_STATE_SET: function, start, end, state, flags in X0 to X4; the stack has where the answer goes."""
        start, end, state, flags = (machine.argument(n) for n in range(1, 5))
        self.world.note(Called("rsi_set_addr_range_state", (start, end, state, flags)))
        reply = self.now.monitor.reply(start, end, self.world.plan.page_size)
        result = machine.word_at(machine.cpu.read(engine.SP), 8)
        machine.write(result, b"".join((word & (1 << 64) - 1).to_bytes(8, "little") for word in reply))

    # code that a booted kernel has patched

    def _skip_range_tlbi(self) -> None:
        """Unicorn's CPU has no FEAT_TLBIRANGE: the instruction is noted and stepped over."""
        machine = self.world.machine
        for at in find_words(self.world.image, RVAALE1IS, 31, PATCHED):
            machine.cpu.on_code(self._range_tlbi, at, at)
        machine.cpu.flush_code()

    def _range_tlbi(self, pc: int) -> bool:
        machine = self.world.machine
        self.world.note(Tlbi("RVAALE1IS", machine.argument(machine.word_at(pc) & 31)))
        machine.cpu.write(engine.PC, pc + 4)
        return True

    def _patch(self, settings: Settings) -> None:
        """A world that was reset has cold code again, so every call looks."""
        if self._patches is None:
            self._patches = _patches(self.world.image)
            self._skip_range_tlbi()
        for name, patches in self._patches.items():
            ensure(self.world.machine, patches, bool(getattr(settings, name)))


def _patches(image: KernelImage) -> dict[str, list[Patch]]:
    """What to patch for each field of Settings that is code."""
    has = (
        {name: alternatives(image, capability(image, text), PATCHED) for name, text in CAPABILITIES.items()}
        if "arm64_features" in image.symbols
        else {}
    )
    realm = static_key(image, "rsi_present", REALM) if "realm_crypt_ops" in image.symbols else []
    return {**has, "realm": realm}


_ARRANGERS: WeakKeyDictionary[World, Arranger] = WeakKeyDictionary()
