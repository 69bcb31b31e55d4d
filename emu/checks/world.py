"""One kernel image twice: a cold machine that runs its code, and a second memory that the model works on.

Both see the same tree of random tables in an arena of RAM. init_mm.pgd, a variable of the kernel, points at the tree:
the kernel's software walks it while the CPU keeps the true tables, so that no tree can hurt the machine.

Rules of this file:
- `load` makes both memories equal in the arena and in the page pool; `outcome` compares what became of them.
- Everything that happens is in one list of events, in order, in the model's terms (kernel_model.mm): callbacks (which
  the guest's recorder writes down itself, see snippets/recorder.S), stubs, table writes, TLBI, barriers and WARNs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from emu import coldboot, snippets, trace
from emu.check import ALLOCATORS, STATISTICS, KernelSubject, observed_warning
from emu.checks.trees import Space, Tree
from emu.image import KernelImage
from emu.machine import TIMEOUT, CallResult, Machine
from emu.machine import Warn as RealWarn
from kernel_model.compare import RUNAWAY, Outcome, Word
from kernel_model.huge import NullCall
from kernel_model.mm import Barrier, Bug, Callback, Called, Event, Kernel, Runaway, Rwsem, Tlbi, Warn, Write
from kernel_model.names import Bits
from kernel_model.variants import Variant
from pgtable import CPUS, NoMemory, PhysicalMemory

U64 = (1 << 64) - 1
ARENA = 1 << 20  # bytes at the end of the page pool
STEP_LIMIT = 20_000
BLOCKS = 400_000  # basic blocks a call may run before it counts as endless
CALLBACKS = (
    "pgd_entry",
    "p4d_entry",
    "pud_entry",
    "pmd_entry",
    "pte_entry",
    "pte_hole",
    "hugetlb_entry",
    "test_walk",
    "pre_vma",
    "post_vma",
    "install_pte",
    "fn",
)
ARGUMENTS = {"pte_hole": 3, "hugetlb_entry": 4, "test_walk": 2, "pre_vma": 2, "post_vma": 0, "install_pte": 2, "fn": 2}
WITH_ENTRY = frozenset({*CALLBACKS[:5], "hugetlb_entry", "fn"})
LIMIT = 1200  # callbacks of one call
# What is outside every check: messages, and page-table locks of PREEMPT_RT, which sleep and are objects of their own.
SILENT = ("_printk", "__warn_printk", "rt_spin_lock", "rt_spin_unlock")
STATE_WORDS = 8


class Reaction(NamedTuple):
    """What a callback does: its return value, the action it sets, the word it stores to its entry."""

    value: int = 0
    action: int | None = None
    store: int | None = None


def shown(reaction: Reaction) -> str:
    """A reaction in a few words."""
    parts = [f"return {reaction.value}"] if reaction.value else []
    parts += [f"action {reaction.action}"] if reaction.action is not None else []
    parts += [f"store {reaction.store:#x}"] if reaction.store is not None else []
    return ", ".join(parts) or "nothing"


Script = dict[int, Reaction]  # by the number of the call, from 0


class World:
    """See the module. `machine`: for the real code. `space`: for trees. `model_memory`: the model's.

    `own`: the row that the image asks for; `variant`: the one that the model follows, the same unless told otherwise.
    `ng`: arm64_use_ng_mappings is 1. `wide`: with all the VA bits of the build (52), on the model MMU.
    """

    def __init__(
        self, image: KernelImage, *, ng: bool = False, wide: bool = False, variant: Variant | None = None
    ) -> None:
        subject = KernelSubject(image)
        self.image, self.ng = image, ng
        self.own = subject.variant()
        self.variant = variant or self.own
        bits, mmu = (image.layout.va_bits, "model") if wide else (None, "cpu")
        features = CPUS["max"] if wide else coldboot.UNICORN
        self.made = coldboot.template(image, ng=ng, va_bits=bits, features=features).thaw()
        self.machine = Machine.boot(image, ng=ng, va_bits=bits, mmu=mmu)
        self.model_memory = self.made.memory
        self.plan = self.machine.plan
        pool = self.plan.pages
        self.arena = (sum(pool) - ARENA, ARENA)
        self.levels = subject.levels(self.plan)
        self.space = Space(self.levels, self.made.tables.fmt, self.arena)
        self.bits = Bits.of(self.made.tables.fmt, self.variant, ng_mappings=ng)
        self.linear_offset = self.plan.linear - self.plan.ram[0] & U64
        self._physical: dict[int, int] = {}
        self._offsets: dict[tuple[str, str], int] = {}
        self._plain_rwsem = image.btf.has("rw_semaphore", "count")
        self._ops_size = image.btf.size("mm_walk_ops")
        self._events: list[tuple[int, Event]] = []
        self.root = self.arena[0]
        self._tree: Tree | None = None
        self._spoiled = False
        self._dirty = 0  # bytes of the pool in use
        self._before = np.zeros(0, np.uint64)
        self._lay_out()
        self.machine.watch([self.arena, (pool[0], pool[1] - ARENA)], self._on_event)
        self._set_up_stubs()
        self.poke("init_mm", self.linear(self.root), member="mm_struct.pgd")
        if self.own.locks.has_walk_lock and not self.own.install_pte:
            self.own = replace(self.own, reset_before_none=self._resets_before_none())
        if variant is None:
            self.variant, self.bits = self.own, replace(self.bits, variant=self.own)
        self._fresh = self.machine.save(), self.model_memory.written()

    # ---- the machine's variables

    def linear(self, pa: int) -> int:
        """The linear map's VA of a PA."""
        return pa + self.linear_offset & U64

    def physical(self, va: int) -> int:
        """The PA of a linear map VA."""
        return va - self.linear_offset & U64

    def poke(self, symbol: str, value: int, *, member: str = "", size: int = 8) -> None:
        """Writes a variable of the real kernel; `member`: "struct.path" of a field of it."""
        at = self.image.symbols[symbol] + (self.offset(*member.split(".", 1)) if member else 0)
        self.store(at, value, size)

    def store(self, at: int, value: int, size: int = 8) -> None:
        """Writes a variable at a VA of the image or the window, which is no code: nothing is translated again."""
        pa = self._physical.get(at)
        if pa is None:
            pa = self._physical[at] = self.machine.translate(at).pa
        self.machine.memory.write(pa, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

    def offset(self, struct: str, path: str) -> int:
        """Where a member is in a structure of this kernel, in bytes."""
        key = struct, path
        if key not in self._offsets:
            self._offsets[key] = self.image.btf.offset(struct, path)
        return self._offsets[key]

    def set_lock(self, at: int, lock: Rwsem) -> None:
        """Writes a struct rw_semaphore at a VA of the real kernel so that `lock` describes it."""
        if self._plain_rwsem:
            self.store(at + self.offset("rw_semaphore", "count"), lock.count)
            return
        # PREEMPT_RT: a count of readers below a bias, another bias for a writer (kernel/locking/rwbase_rt.c).
        readers = 1 << 30 if lock.is_write_locked else (1 << 31) + (lock.count >> 8)
        self.store(at + self.offset("rw_semaphore", "rwbase.readers"), readers, 4)

    @property
    def init_mm_lock(self) -> int:
        """VA of init_mm.mmap_lock."""
        return self.image.symbols["init_mm"] + self.offset("mm_struct", "mmap_lock")

    # ---- events

    def _on_event(self, event: object) -> None:
        """A hook of the machine saw something."""
        if isinstance(event, trace.Maintenance):
            self.note(Tlbi(event.operation, event.operand))
        elif isinstance(event, trace.Barrier):
            if not event.name.startswith("dmb"):  # says nothing to the walker
                self.note(Barrier(event.name))
        elif isinstance(event, trace.TableWrite):
            self.note(Write(event.pa, event.value))
        elif isinstance(event, RealWarn):
            self.note(observed_warning(event))

    def note(self, event: Event) -> None:
        """Adds an event of the real run, after the callbacks so far."""
        self._events.append((int(self._state[0]), event))

    def stub(self, function: str, action: Callable[[Machine], int | None]) -> None:
        """Replaces a function of the real kernel, if it is there."""
        if function in self.image.symbols:
            self.machine.stub(function, action)

    def _set_up_stubs(self) -> None:
        for name in ALLOCATORS:
            self.stub(name, self.give)
        for name in (*STATISTICS, *SILENT):
            self.stub(name, lambda _: 0)

    def give(self, machine: Machine) -> int:
        """A page of the pool for the real kernel's allocator: its struct page."""
        pa = machine.give_page()
        self._dirty = max(self._dirty, pa + self.plan.page_size - self.plan.pages[0])
        return machine.struct_page(pa)

    # ---- the guest's recorder

    def _lay_out(self) -> None:
        """Puts the recorder into the code page and its state, script and log into the window's spare pages."""
        plan, memory = self.plan, self.machine.memory
        code = np.frombuffer(bytes(snippets.load("recorder")), np.uint8).copy()
        state_pa = plan.window_pa + (plan.spare - plan.window)
        code[-8:] = np.frombuffer(plan.spare.to_bytes(8, "little"), np.uint8)
        memory.write(plan.code_pa, code.tobytes())
        self._state = memory.words(state_pa, STATE_WORDS)
        self._script = memory.words(state_pa + 8 * STATE_WORDS, 4 * LIMIT).reshape(LIMIT, 4)
        self._log = memory.words(state_pa + 8 * (STATE_WORDS + 4 * LIMIT), 8 * LIMIT).reshape(LIMIT, 8)
        script_va = plan.spare + 8 * STATE_WORDS
        action = self.image.btf.offset("mm_walk", "action") if self.image.btf.has("mm_walk", "action") else 0
        log_va = script_va + 32 * LIMIT
        self._state[:7] = (0, LIMIT, action, log_va, script_va, self.linear(self.arena[0]), ARENA)
        self.scratch = plan.spare + 8 * (STATE_WORDS + 12 * LIMIT) + 0xFF & ~0xFF  # the rest of the spare pages

    def callback(self, name: str) -> int:
        """The VA of the recorder's entry for a callback."""
        return self.plan.code + 8 * CALLBACKS.index(name)

    def ops_table(self, at: int, names: Sequence[str], walk_lock: int = 0) -> int:
        """Writes a struct mm_walk_ops at VA `at` whose callbacks are recorded; returns `at`."""
        table = bytearray(self._ops_size)
        for name in names:
            offset = self.offset("mm_walk_ops", name)
            table[offset : offset + 8] = self.callback(name).to_bytes(8, "little")
        if self.own.locks.has_walk_lock:
            offset = self.offset("mm_walk_ops", "walk_lock")
            table[offset : offset + 4] = walk_lock.to_bytes(4, "little")
        self.store(at, int.from_bytes(table, "little"), len(table))
        return at

    def _resets_before_none(self) -> bool:
        """Whether the compiled loops reset the action before the none test.

        6.12's stable updates moved that line without a name that tells: the function itself is asked what a hole
        sees behind an entry whose callback said CONTINUE.
        """
        tables = self.space.tables
        pmd = tables.index(self.levels.pmd)
        size = self.plan.page_size
        words = {}
        for i, level in enumerate(tables[:pmd]):
            entry = self.arena[0] + i * size + 8 * self.space.index(level, 0)
            below = self.arena[0] + (i + 1) * size
            words[entry] = self.made.tables.fmt.table(2).pack(VALID=1, TYPE=1, TA=below)
        words[self.arena[0] + pmd * size] = self.made.tables.fmt.leaf(2).pack(VALID=1)
        self.load(Tree(self.root, words, pmd + 1), {0: Reaction(action=1)})
        ops = self.ops_table(self.scratch, ("pmd_entry", "pte_hole"))
        self.set_lock(self.init_mm_lock, Rwsem(1))
        novma = "walk_page_range_novma" in self.image.symbols
        function = "walk_page_range_novma" if novma else "walk_kernel_page_table_range"
        mm = (self.image.symbols["init_mm"],) if novma else ()
        self.call(function, *mm, 0, 2 * self.levels.pmd.size, ops, self.linear(self.root), 0)
        if int(self._state[0]) != 2:
            raise ValueError(f"{self.image.name}: {function} made {int(self._state[0])} calls of callbacks, not 2")
        return not int(self._log[1][7])

    # ---- a case

    def load(self, tree: Tree, script: Script | None = None) -> None:
        """Puts a tree into both memories; what an earlier case left is gone."""
        if self._spoiled:
            self._reset()
        for memory in (self.model_memory, self.machine.memory):
            memory.words(self.plan.pages[0], self._dirty // 8)[:] = 0
            memory.words(self.arena[0], self._arena_words())[:] = 0
        self._tree, self._dirty = tree, 0
        size = self._arena_words()
        fresh = np.zeros(size, np.uint64)
        index = np.fromiter((pa - self.arena[0] >> 3 for pa in tree.words), np.int64, len(tree.words))
        fresh[index] = np.fromiter(tree.words.values(), np.uint64, len(tree.words))
        for memory in (self.model_memory, self.machine.memory):
            memory.words(self.arena[0], size)[:] = fresh
        self._before = fresh
        self.machine.take_back()
        self._write_script(script or {})

    def _reset(self) -> None:
        """Both memories as they were at first: a call did not end, or wrote outside the arena."""
        self.machine.restore(self._fresh[0])
        self.model_memory.rewind(self._fresh[1])
        self._spoiled, self._tree, self._dirty = False, None, 0

    def is_inside(self, pa: int) -> bool:
        """`pa` is in the page pool, of which the arena is the end."""
        return 0 <= pa - self.plan.pages[0] < self.plan.pages[1]

    def _arena_words(self) -> int:
        return self._tree.pages * self.plan.page_size // 8 if self._tree else 0

    def _write_script(self, script: Script) -> None:
        self._script[:] = 0
        for i, reaction in script.items():
            flags = (reaction.store is not None) | (reaction.action is not None) << 1
            row = (flags, reaction.value & U64, reaction.action or 0, (reaction.store or 0) & U64)
            self._script[i] = np.array(row, np.uint64)

    def kernel(self) -> Kernel:
        """The model's kernel over the model's memory, with the tree as init_mm's tables."""
        pages = iter(range(self.plan.pages[0], self.arena[0], self.plan.page_size))

        def allocate() -> int | None:
            page = next(pages, None)
            if page is not None:
                self.model_memory.words(page, self.plan.page_size // 8)[:] = 0
                self._dirty = max(self._dirty, page + self.plan.page_size - self.plan.pages[0])
            return page

        return Kernel(
            self.model_memory,
            self.root,
            self.levels,
            self.bits,
            allocate=allocate,
            table_flags=self.made.tables.fmt.table(2).pack(UXNTable=1, AF=int(self.variant.walks)),
            step_limit=STEP_LIMIT,
            linear_offset=self.linear_offset,
        )

    def call(self, function: str, *args: int, blocks: int | None = None, timeout: float | None = TIMEOUT) -> CallResult:
        """Calls the real function; its events are collected for `real`. `timeout`: seconds of CPU time."""
        self._state[0] = 0
        self._events = []
        return self.machine.call(function, *args, record="events", blocks=blocks, timeout=timeout)

    def real(self, result: CallResult, *, value: int | None = None, keeps: bool = False) -> Outcome:
        """What the real call did; `value`: what it returned, where X0 is not it.

        `keeps`: one that did not return left nothing behind (no lock, no variable), so that no reset is due.
        """
        kind = result.stop.kind if result.stop else ""
        value = result.signed if value is None else value
        self._spoiled |= bool(kind) and not keeps
        events, stop = tuple(self._merged()), RUNAWAY if kind in ENDLESS else kind
        return Outcome(value, self._words(self.machine.memory), events, stop, cut=kind in CUT)

    def predicted(self, kernel: Kernel, run: Callable[[], int]) -> Outcome:
        """What the model says: `run` calls its function and returns the value."""
        stop, value, cut = "", 0, False
        try:
            value = run()
        except (Runaway, NoMemory, NullCall, ScriptOver) as error:
            stop, cut = RUNAWAY, isinstance(error, Runaway)
        except Bug:
            stop = "bug"
        events = [e for e in kernel.events if not isinstance(e, Write) or self.is_inside(e.pa)]
        self._spoiled |= len(events) != len(kernel.events)
        return Outcome(value, self._words(self.model_memory), tuple(events), stop, cut)

    def _words(self, memory: PhysicalMemory) -> dict[int, Word]:
        """Words of the arena that are not what `load` put there, and words of pages given since."""
        now = memory.words(self.arena[0], len(self._before))
        found = {}
        for i in np.flatnonzero(now != self._before).tolist():
            pa = self.arena[0] + 8 * i
            found[pa] = Word(None, None, pa, int(self._before[i]), int(now[i]))
        given = memory.words(self.plan.pages[0], self._dirty // 8)
        for i in np.flatnonzero(given).tolist():
            pa = self.plan.pages[0] + 8 * i
            found[pa] = Word(None, None, pa, 0, int(given[i]))
        return found

    def _merged(self) -> list[Event]:
        """Callbacks of the log and what hooks saw, in order."""
        rows = self._log[: int(self._state[0])].tolist()
        merged: list[Event] = []
        done = 0
        for at, event in self._events:
            merged += [self._callback(row) for row in rows[done:at]]
            merged.append(event)
            done = at
        return merged + [self._callback(row) for row in rows[done:]]

    def _callback(self, row: list[int]) -> Callback:
        kind, *x, value, action = row
        name = CALLBACKS[kind]
        args = x[: ARGUMENTS.get(name, 3)]
        if name in WITH_ENTRY:
            args[0] = self.physical(args[0])
        if name == "pte_hole":
            args[2] &= (1 << 32) - 1  # a C int
        if name == "install_pte":
            args = args[:2]
        return Callback(name, tuple(args), value if name in WITH_ENTRY else None, action)


CUT = ("budget", "timeout")  # stops of a call that would have gone on
ENDLESS = (*CUT, "fault", "exception")  # stops of a loop that has no end, or that left the tables


class ScriptOver(Exception):  # noqa: N818
    """More callbacks than the recorder can hold."""


__all__ = ["CALLBACKS", "Called", "Reaction", "Script", "ScriptOver", "Warn", "World"]
