"""What TLBs hold: entries made of descriptors, one store for each CPU and one for what CPUs share (CnP).

Rules of this file:
- An entry is evidence: the descriptors that a walk read, by PA. Entries are not changed once they are in a store.
- Lookup is by size and first VA; context (regime, VMID, ASID) is compared then.
Sources: Arm ARM D8.16 (what distinguishes entries), D8.16.3 (ASIDs, global entries, common entries).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pgtable.access import Access
from pgtable.params import WalkParams
from pgtable.tlbi import Target
from pgtable.walk import Walk

SHARED = -1  # the store of entries that are common, not private
_U64 = (1 << 64) - 1


@dataclass(frozen=True)
class Policy:
    """What hardware does where it may do one thing or another.

    `late`: an invalidation happens when the DSB that completes it does (False: at once). `isb`: for the CPU's own
    accesses only at the next ISB. `speculative`: what could be translated is held when it is changed, by every CPU
    (False: only what was accessed). `forget`: the chance, at each access, that an entry is dropped. `seed`: of it.
    `tables`: table descriptors are held too. `contiguous`: a contiguous run is one entry.
    """

    late: bool = True
    isb: bool = True
    speculative: bool = True
    forget: float = 0.0
    seed: int = 0
    tables: bool = True
    contiguous: bool = False


Steps = tuple[tuple[int, int, int], ...]  # level, PA, word: as Walk.raw


class Entry:
    """What a TLB holds: `target` (regime, VMID, ASID, VAs, level ...), and the descriptors it was made of, `steps`.

    `params`: the registers' part of it. `va`: an address it was filled for. `serial`: when it was filled. `words`: the
    steps' descriptors by PA. `key`: equal for entries that say the same.
    """

    __slots__ = ("key", "known", "params", "serial", "steps", "target", "va", "words")

    def __init__(self, target: Target, steps: Steps, params: WalkParams, va: int, serial: int = 0) -> None:
        self.target, self.steps, self.params, self.va, self.serial = target, steps, params, va, serial
        self.words = {pa: word for _, pa, word in steps}
        self.known: dict[tuple[int, Access], Walk] = {}  # what accesses came to
        self.key = (target.regime.value, *target[1:7], target.stage, steps)

    def __repr__(self) -> str:
        t = self.target
        asid = "global" if t.asid is None else f"asid {t.asid:#x}"
        return f"<{'leaf' if t.leaf else 'table'} L{t.level} {t.start:#x}+{t.size:#x} {asid} {self.steps[-1][2]:#x}>"


Store = dict[int, dict[int, tuple[Entry, ...]]]  # size -> first VA -> entries


class Stores:
    """The TLBs of CPUs 0 to `cpus` - 1, and the shared one."""

    def __init__(self, cpus: int, seed: int = 0) -> None:
        self._stores: dict[int, Store] = {cpu: {} for cpu in (SHARED, *range(cpus))}
        self._random = seed

    def hits(self, cpu: int, p: WalkParams, vmid: int, va: int) -> list[Entry]:
        """The entries that translate `va` (canonical) for a CPU with these parameters, stage 2 alone left out."""
        found: list[Entry] = []
        for name in (cpu, SHARED) if p.cnp else (cpu,):
            for size, by_va in self._stores[name].items():
                for entry in by_va.get(va & -size, ()):
                    t = entry.target
                    if t.regime is p.regime and t.vmid == vmid and t.asid in (None, p.asid) and t.stage != 2:
                        found.append(entry)
        return found

    def insert(self, cpu: int, entry: Entry, *, again: bool = False) -> bool:
        """Puts an entry into a store; False if it has an equal one. `again`: in place of that one."""
        by_va = self._stores[cpu].setdefault(entry.target.size, {})
        there = by_va.get(entry.target.start, ())
        others = tuple(one for one in there if one.key != entry.key)
        if len(others) < len(there) and not again:
            return False
        by_va[entry.target.start] = (*others, entry)
        return True

    def entries(self, cpu: int) -> Iterator[Entry]:
        """What a CPU may use: its store, and the shared one."""
        for name in (cpu, SHARED):
            for by_va in self._stores[name].values():
                for many in by_va.values():
                    yield from many

    def remove(
        self, cpu: int, gone: Callable[[Entry], bool], sizes: Callable[[int], Iterable[int]] | None = None
    ) -> None:
        """Drops entries of a CPU and shared ones. `sizes(size)`: the first VAs worth asking about, default all."""
        for name in (cpu, SHARED):
            store = self._stores[name]
            for size, by_va in list(store.items()):
                for va in list(by_va) if sizes is None else sizes(size):
                    many = by_va.get(va)
                    left = many and tuple(entry for entry in many if not gone(entry))
                    if left:
                        by_va[va] = left
                    elif many:
                        del by_va[va]
                if not by_va:
                    del store[size]

    def forget(self, cpu: int, chance: float) -> None:
        """Drops each entry with a chance, as the seed has it."""

        def gone(_: Entry) -> bool:
            self._random, drawn = _draw(self._random)
            return drawn < chance

        self.remove(cpu, gone)

    def snapshot(self) -> tuple[Any, ...]:
        """The state, for `restore`."""
        return _copy(self._stores), self._random

    def restore(self, state: tuple[Any, ...]) -> None:
        """Back to a state."""
        stores, self._random = state
        self._stores = _copy(stores)

    def key(self) -> tuple[Any, ...]:
        """Hashable, equal for stores that hold the same."""
        held = tuple(
            (name, frozenset(e.key for by_va in store.values() for many in by_va.values() for e in many))
            for name, store in self._stores.items()
        )
        return held, self._random


def _copy(stores: dict[int, Store]) -> dict[int, Store]:
    return {name: {size: dict(by_va) for size, by_va in store.items()} for name, store in stores.items()}


def _draw(state: int) -> tuple[int, float]:
    """The next state, and a number in [0, 1) (splitmix64)."""
    state = state + 0x9E3779B97F4A7C15 & _U64
    mixed = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _U64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _U64
    return state, (mixed ^ mixed >> 31) / (1 << 64)
