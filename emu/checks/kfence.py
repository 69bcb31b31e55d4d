"""KFENCE for real, against kernel_model.kfence: kfence_handle_page_fault, kfence_guarded_free, kfence_init_pool,
arch_kfence_init_pool.

Rules of this file:
- Model and machine have a memory each. After every case all of it is compared that a case may change: events in
  order, every byte of the metadata, the free list, the variables.
- A report is where a decision shows: see kfence_real.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from random import Random
from typing import NamedTuple

import numpy as np

from emu.check import KernelSubject, kernel_of
from emu.checks.coverage import Coverage, FunctionCoverage
from emu.checks.kfence_cases import FREES, Case, Free, Pool, kinds, some, some_frees
from emu.checks.kfence_real import LINKS, MEMBERS, REGS, Real
from emu.image import KernelImage
from emu.machine import Machine
from kernel_model import kfence
from kernel_model.kfence import Fault, Kfence, Metadata, Panic
from kernel_model.mm import Bug, Settings

FUNCTIONS = ("kfence_handle_page_fault", "kfence_guarded_free")
SHOWN = 20  # differences that are kept
PREPARED = 150  # cases before those asked for: enough for every kind


class Report(NamedTuple):
    """A finished campaign: cases run, events compared, differences (the first of them), the kinds of case that none
    was of, and the coverage of the compiled functions."""

    cases: int
    events: int
    differences: list[str]
    unreached: list[str]
    coverage: list[FunctionCoverage]


def run(image: KernelImage, cases: int, seed: int) -> Report:
    """PREPARED and `cases` faults and frees, one of three a free, and the set-up of a pool.

    Raises SymbolError or BtfError for a kernel without KFENCE.
    """
    world = World(image)
    wanted = dict.fromkeys([*kinds(fault=world.has_fault), *FREES])
    with Coverage(world.real.machine, FUNCTIONS) as coverage:
        for case in world.cases(PREPARED + cases, seed):
            world.judge(case)
            wanted.pop(case.kind, None)
    world.init_pool(Random(seed))
    world.arch_init_pool()
    found = world.differences[:SHOWN]
    return Report(PREPARED + cases, world.compared, found, list(wanted), coverage.report())


class World:
    """One kernel, for real and as the model has it, with a pool in its RAM.

    `real`, `kernel`: the two sides. `differences`, `compared`: what all cases so far found, and how many events.
    """

    def __init__(self, image: KernelImage) -> None:
        subject = KernelSubject(image)
        self.real = Real(image)
        self.kernel = kernel_of(subject.levels(self.real.machine.plan), subject.thaw(ng=False), subject.variant())
        self.pool: Pool = self.real.pool
        self.differences: list[str] = []
        self.compared = 0
        self._changed: set[int] = set()  # objects that are not as after boot
        self._ptes = {
            va: self.real.path(va)[0] for va in range(self.pool.va, self.pool.va + self.pool.size, self.pool.page)
        }
        self._memories = (self.real.machine.memory, self.kernel.memory)

    @property
    def has_fault(self) -> bool:
        """The kernel has kfence.fault=."""
        return self.kernel.variant.kfence_fault

    def cases(self, count: int, seed: int) -> Iterator[Case | Free]:
        """`count` cases, one of three a free."""
        yield from some(count - count // 3, seed, self.pool, fault=self.has_fault)
        yield from some_frees(count // 3, seed, self.pool)

    def judge(self, case: Case | Free) -> None:
        """One case on both sides."""
        texts = self._fault(case) if isinstance(case, Case) else self._free(case)
        self._found(f"{case.kind} at {case.addr:#x}", texts)

    def _found(self, what: str, texts: Iterable[str]) -> None:
        self.differences += [f"{what}: {text}" for text in texts]
        self.compared += len(self.kernel.events)

    # ---- a fault, a free

    def _fault(self, case: Case) -> list[str]:
        self._prepare(case)
        model = self._model(case)

        def predict() -> int:
            return int(kfence.kfence_handle_page_fault(model, case.addr, is_write=case.is_write))

        return self._both(model, predict, FUNCTIONS[0], case.addr, int(case.is_write), REGS)

    def _free(self, case: Free) -> list[str]:
        """The guard that is closed again is open beforehand, as a report leaves it."""
        about = case.meta.unprotected_page or case.addr
        before = Case(case.kind, about, False, {case.index: case.meta}, valid=True, fault=case.fault)
        self._prepare(before)
        self.real.empty_freelist()
        self.real.unlink(case.index)
        model = self._model(before)

        def predict() -> int:
            kfence.kfence_guarded_free(model, case.addr, case.index, zombie=case.zombie)
            return 0

        at = self.real.metadata + case.index * self.real.size
        texts = self._both(model, predict, FUNCTIONS[1], case.addr, at, int(case.zombie), void=True)
        return [*texts, *_differs("free list", model.freelist, self.real.freelist())]

    def _prepare(self, case: Case) -> None:
        for i in self._changed - case.objects.keys():
            self.real.put(i, Metadata(addr=self.pool.object_page(i)))
        for i, meta in case.objects.items():
            self.real.put(i, meta)
        self._changed = set(case.objects)
        self.real.place(placed=case.placed, metadata=case.metadata, enabled=case.enabled)
        self.real.fault = case.fault if self.has_fault else Fault.NONE
        page = case.addr & -self.pool.page
        if page in self._ptes:
            self._set_pte(page, valid=case.valid)

    def _set_pte(self, page: int, *, valid: bool) -> None:
        """The PTE of a page as the kernel has it when it is accessible, or protected."""
        bits, pte = self.kernel.bits, self._ptes[page]
        word = self.kernel.memory.fetch(pte) & ~bits.NG | bits.VALID
        if not valid:
            word = word & ~bits.VALID | (bits.NG if self.kernel.variant.invalid_keeps_present else 0)
        for memory in self._memories:
            memory.store(pte, word)

    def _model(self, case: Case) -> Kfence:
        self.kernel.settings = Settings(kfence_pool=(self.pool.va, self.pool.size) if case.placed else None)
        objects = [Metadata(addr=self.pool.object_page(i)) for i in range(self.pool.objects)] if case.metadata else []
        for i, meta in case.objects.items():
            objects[i] = Metadata(meta.state, meta.addr, meta.size, meta.unprotected_page)
        return Kfence(self.kernel, objects=objects, enabled=case.enabled, fault=self.real.fault)

    # ---- setting up

    def init_pool(self, rng: Random) -> None:
        """kfence_init_pool on a pool that is all accessible; `rng` stands for the kernel's random numbers."""
        self._fresh_pool()
        drawn: list[int] = []

        def below(limit: int) -> int:
            self.kernel.called("get_random_u32_below", limit)
            drawn.append(rng.randrange(limit))
            return drawn[-1]

        def draw(machine: Machine) -> int:
            self.real.called("get_random_u32_below", machine.argument(0) & 0xFFFF_FFFF)
            return drawn.pop(0) if drawn else 0

        model = Kfence(self.kernel, enabled=False)
        predicted = self._predict(lambda: kfence.kfence_init_pool(model, below))
        self.real.machine.stub("__get_random_u32_below", draw)
        names = self.real.image.symbols.variants("kfence_init_pool") or ["kfence_init_pool"]
        value, stop = self.real.call(self.real.image.symbols[names[0]])
        returned = predicted[0] if names[0].endswith(".isra.0") else value  # as .isra.0 it returns nothing
        texts = [*self._compare(predicted, (returned, stop)), *self._pool_differences(model)]
        self._found("kfence_init_pool", texts)

    def _fresh_pool(self) -> None:
        self.real.place(placed=True, metadata=False, enabled=False)
        self.real.words()[:] = 0
        self.real.empty_freelist()
        self.kernel.settings = Settings(kfence_pool=(self.pool.va, self.pool.size))
        for va in self._ptes:
            self._set_pte(va, valid=True)

    def _pool_differences(self, model: Kfence) -> Iterator[str]:
        """The metadata of all objects, the list of free ones, and where the metadata is said to be."""
        for i, meta in enumerate(model.objects):
            for member in ("state", "addr", "unprotected_page"):
                yield from _differs(f"metadata {i}.{member}", int(getattr(meta, member)), self.real.get(i, member))
        yield from _differs("free list", model.freelist, self.real.freelist())
        yield from _differs("kfence_metadata", self.real.metadata, self.real.peek("kfence_metadata"))

    def arch_init_pool(self) -> None:
        """arch_kfence_init_pool, where there is one, on a pool inside a block, for each way in which the linear map may
        have been made. Nothing can be run after it: the pool is then mapped by other tables."""
        if "arch_kfence_init_pool" not in self.real.image.symbols:
            return
        self._fresh_pool()
        stub = self.real.machine.stub
        stub("mutex_lock", lambda _: self.real.called("mutex_lock"))
        stub("mutex_unlock", lambda _: self.real.called("mutex_unlock"))
        (asked,) = (name for name in self.real.image.symbols if name.startswith("cpu_supports_bbml"))
        stub(asked, lambda _: int(self.kernel.settings.supports_bbml))
        behind = self.pool.va + self.kernel.levels.pmd.size
        leaves = [self.real.path(va) for va in (self.pool.va, behind)]
        for bbml, full, early in product((False, True), repeat=3):
            place = (self.pool.va, self.pool.size)
            self.kernel.settings = Settings(rodata_full=full, kfence_early=early, supports_bbml=bbml, kfence_pool=place)
            self._map_blocks(leaves)
            self._arch_init_pool(f"arch_kfence_init_pool, bbml {bbml}, rodata_full {full}, early {early}")

    def _arch_init_pool(self, what: str) -> None:
        settings, model = self.kernel.settings, Kfence(self.kernel)
        self.real.poke("rodata_full", int(settings.rodata_full), 1)
        self.real.poke("kfence_early_init", int(settings.kfence_early), 1)
        predicted = self._predict(lambda: int(kfence.arch_kfence_init_pool(model)))
        value, stop = self.real.call("arch_kfence_init_pool")
        self._found(what, self._compare(predicted, (value & 0xFF, stop)))

    def _map_blocks(self, leaves: list[tuple[int, int]]) -> None:
        """Maps the pool by a block, and what is behind that by another: by PAs of a PTE and of the entry above it."""
        for memory in self._memories:
            for page, entry in leaves:
                memory.store(entry, memory.fetch(page) & ~self.kernel.bits.TYPE)

    # ---- comparing

    def _both(
        self, model: Kfence, predict: Callable[[], int], function: str, *args: int, void: bool = False
    ) -> list[str]:
        """Predicts, runs, compares all that may have changed. `void`: the function returns nothing."""
        before, counters = self.real.words().copy(), self.real.counters()
        predicted = self._predict(predict)
        value, stop = self.real.call(function, *args)
        moved = Counter({n: _signed(v - counters[n]) for n, v in self.real.counters().items()})
        return [
            *self._compare(predicted, (0 if void else value, stop)),
            *self.real.wrong,
            *_differs("kfence_enabled", int(model.enabled), self.real.peek("kfence_enabled", 1)),
            *_differs("counters", model.counters, moved),
            *self._metadata_differences(before, model),
        ]

    def _predict(self, call: Callable[[], int]) -> tuple[int, str]:
        """What the model returns, and why it does not; its events are left in the kernel."""
        self.kernel.events.clear()
        try:
            return call(), ""
        except Bug:
            return 0, "bug"
        except Panic:
            self.kernel.called("panic")
            return 0, "panic"

    def _compare(self, predicted: tuple[int, str], real: tuple[int, str]) -> Iterator[str]:
        """Values and ends of a call, and the first event that is not as predicted."""
        yield from _differs("stop", predicted[1] or "returned", real[1] or "returned")
        if not predicted[1] and not real[1]:
            yield from _differs("return value", predicted[0], real[0])
        mine, theirs = self.kernel.events, self.real.events
        for i in range(max(len(mine), len(theirs))):
            a, b = (str(side[i]) if i < len(side) else "nothing more" for side in (mine, theirs))
            if a != b:
                yield f"event {i}: predicted {a} (of {len(mine)}), real {b} (of {len(theirs)})"
                return

    def _metadata_differences(self, before: np.ndarray, model: Kfence) -> Iterator[str]:
        """Every word of the metadata that is not what the model left there, but for the links of the free list."""
        words = self.real.words()
        expected, now = before.view(np.uint8), words.view(np.uint8)
        for i in self._changed:
            for member in ("state", "unprotected_page"):
                at, size = self.real.field(i, member) - self.real.metadata_pa, MEMBERS[member]
                value = int(getattr(model.objects[i], member)).to_bytes(size, "little")
                expected[at : at + size] = np.frombuffer(value, np.uint8)
            links = self.real.field(i, "list") - self.real.metadata_pa
            expected[links : links + LINKS] = now[links : links + LINKS]
        for word in np.flatnonzero(before != words).tolist():
            index, offset = divmod(8 * word, self.real.size)
            yield f"metadata {index} at +{offset:#x}: predicted {int(before[word]):#x}, real {int(words[word]):#x}"


def _differs(what: str, predicted: object, real: object) -> Iterator[str]:
    if predicted != real:
        yield f"{what}: predicted {predicted}, real {real}"


def _signed(value: int) -> int:
    """A 64-bit number as a signed one."""
    value &= (1 << 64) - 1
    return value - (value >> 63 << 64)
