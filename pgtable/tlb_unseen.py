"""Descriptors that became valid, until it is certain that walks see them.

Rules of this file:
- Other CPUs see such a descriptor after a DSB of the writer, the writer itself after an ISB that follows it. Before, an
  access may still fault.
- Another CPU that gets there before the writer returns takes its chance: no finding.
Sources: Arm ARM D8.17 (I_WZCBG), D8.17.1 (R_DDMVT, step 6).
"""

from __future__ import annotations

from typing import NamedTuple

from pgtable.tlb_events import Write
from pgtable.tlb_stale import Judge
from pgtable.walk import Walk


class _Made(NamedTuple):
    event: Write
    serial: int
    visible: bool  # there was a DSB


class Unseen:
    """The descriptors that became valid and are not certain to be seen. `isb`: the writer needs one."""

    def __init__(self, *, isb: bool) -> None:
        self._isb = isb
        self._made: dict[int, _Made] = {}

    def __len__(self) -> int:
        return len(self._made)

    def write(self, event: Write, serial: int) -> None:
        """A store to a descriptor."""
        if event.old & 1:
            self._made.pop(event.pa, None)
        elif event.new & 1:
            self._made[event.pa] = _Made(event, serial, False)

    def dsb(self, cpu: int) -> None:
        """A DSB that waits for stores."""
        self._made = {pa: one._replace(visible=True) if one.event.cpu == cpu else one for pa, one in self._made.items()}
        if not self._isb:
            self.isb(cpu)

    def isb(self, cpu: int) -> None:
        """A context synchronization event."""
        self._made = {pa: one for pa, one in self._made.items() if one.event.cpu != cpu or not one.visible}

    def check(self, cpu: int, va: int, pc: int, found: Walk, judge: Judge) -> None:
        """A walk that translated: through a descriptor that the CPU may not see?"""
        for _, pa, _ in found.raw:
            made = self._made.get(pa)
            if made is None:
                continue
            writer = made.event.cpu
            if writer == cpu or (not made.visible and judge.has_returned(writer, made.serial)):
                judge.unseen(cpu, va, pc, found, made.event, "no ISB" if made.visible else "no DSB")
                return

    def snapshot(self) -> dict[int, _Made]:
        """The state, for `restore`."""
        return dict(self._made)

    def restore(self, state: dict[int, _Made]) -> None:
        """Back to a state."""
        self._made = dict(state)

    def key(self) -> frozenset[tuple[int, int, bool]]:
        """Hashable, equal for states that will judge alike."""
        return frozenset((pa, one.event.cpu, one.visible) for pa, one in self._made.items())
