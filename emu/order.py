"""Barriers and table writes in order (`record="order"`), without a hook on the whole kernel text.

How: the CPU tells when a block has been translated, before it first runs. A block with a DSB, DMB or ISB that has no
hook yet stops the run; the barrier gets one, translated code is dropped, and the run goes on from there. So only the
barriers that really run are hooked (a hook on all of them costs 100 times the call), in kernel text, patched
alternatives, modules and snippets alike.

Hooking drops translated code, which costs milliseconds a run. `keep` leaves the hooks where they are, for many calls
of code that nobody changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from emu.engine import PC, Cpu, End, Ended
from emu.trace import Barrier, Event, TableWrite, barrier_name
from pgtable import NoMemory

Ranges = list[tuple[int, int]]  # (PA, bytes)


class OrderRecorder:
    """Records into `events` while `run` lasts. Barrier sites once seen are kept for the next run."""

    def __init__(self, cpu: Cpu, read: Callable[[int, int], bytes]) -> None:
        self._cpu = cpu
        self._read = read
        self._sites: dict[int, str] = {}
        self._new: dict[int, str] = {}
        self._running = False
        self._kept: list[int] | None = None
        self._hooked: list[int] = []  # of the run in progress
        self.events: list[Event] = []
        self.on_event: Callable[[object], None] | None = None

    def keep(self, tables: Ranges) -> None:
        """From now on the hooks stay between runs, for writes to `tables` whatever `run` is given.

        For code that does not change meanwhile.
        """
        self._kept = self._hooks(tables)
        self._cpu.flush_code()

    def run(self, pc: int, until: int, timeout: float | None, tables: Ranges) -> Ended:
        """Runs like `Cpu.run`; writes to PA ranges `tables` (PA, bytes) are table writes."""
        self.events, self._running = [], True
        if self._kept is not None:
            try:
                return self._run(pc, until, timeout, self._kept)
            finally:
                self._running = False
        self._sites = {site: name for site in self._sites if (name := self._name_at(site))}
        hooks = self._hooked = self._hooks(tables)
        self._cpu.flush_code()
        try:
            return self._run(pc, until, timeout, hooks)
        finally:
            self._running = False
            for hook in hooks:
                self._cpu.remove(hook)
            self._cpu.flush_code()

    def follow(self, base: int, size: int) -> None:
        """From a hook: stores to this range are table writes too, until the run ends."""
        self._hooked.append(self._cpu.on_write(self._on_write, base, base + size - 1))

    def _hooks(self, tables: Ranges) -> list[int]:
        cpu = self._cpu
        hooks = [cpu.on_write(self._on_write, base, base + size - 1) for base, size in tables if size]
        hooks += [cpu.on_code(self._on_barrier, site, site) for site in self._sites]
        return [*hooks, cpu.on_new_block(self._on_new_block)]

    def _run(self, pc: int, until: int, timeout: float | None, hooks: list[int]) -> Ended:
        """Runs on through the stops at barriers that have no hook yet; theirs are added to `hooks`."""
        cpu, deadline = self._cpu, None if timeout is None else time.thread_time() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.thread_time())
            ended = cpu.run(pc, until, left)
            if not self._new or ended.end is not End.STOPPED:
                return ended
            hooks += [cpu.on_code(self._on_barrier, site, site) for site in self._new]
            self._sites |= self._new
            self._new = {}
            cpu.flush_code()
            pc = cpu.read(PC)

    def note(self, event: Event) -> None:
        """Adds an event that another hook saw, while `run` lasts."""
        if self._running:
            self._add(event)

    def _add(self, event: Event) -> None:
        self.events.append(event)
        if self.on_event:
            self.on_event(event)

    def _name_at(self, site: int) -> str | None:
        """The barrier there now: code may have changed since the last run, as snippets do."""
        try:
            return barrier_name(int.from_bytes(self._read(site, 4), "little"))
        except (ValueError, NoMemory):
            return None

    def _on_new_block(self, pc: int, size: int) -> bool:
        words = np.frombuffer(self._read(pc, size // 4 * 4), "<u4")
        for i in np.flatnonzero(words & np.uint32(0xFFFFF01F) == np.uint32(0xD503301F)):
            name = barrier_name(int(words[i]))
            if name and pc + 4 * int(i) not in self._sites:
                self._new[pc + 4 * int(i)] = name
        return not self._new

    def _on_barrier(self, pc: int) -> bool:
        self._add(Barrier(self._sites[pc], pc))
        return True

    def _on_write(self, pa: int, size: int, value: int) -> bool:
        self._add(TableWrite(pa, value & (1 << 8 * size) - 1, self._cpu.read(PC), size))
        return True
