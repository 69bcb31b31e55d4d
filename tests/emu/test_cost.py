"""What recording costs: 1 GiB of pages, record="changes" against the bare call, taken in turns in one process."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import pytest

from emu.coldboot import protections
from emu.machine import Machine
from pgtable.descriptors import LAST_LEVEL

PAGES = 262_144  # 1 GiB
ROUNDS = 9
LIMIT = 1.3


class Cost(NamedTuple):
    """Seconds, medians: the bare call, one with record="changes", and to make arrays of its changes afterwards.

    `ratio`: the median over pairs of neighbouring calls.
    """

    bare: float
    changes: float
    arrays: float
    ratio: float


def timed(m: Machine, va: int, enable: int, record: str) -> tuple[float, float]:
    """Seconds of one call, and of making arrays of its changes; the pages are in the other state beforehand."""
    m.call("set_memory_valid", va, PAGES, 1 - enable, record="nothing", timeout=60).ok()
    began = time.process_time()
    result = m.call("set_memory_valid", va, PAGES, enable, record=record, timeout=120).ok()
    called = time.process_time()
    assert len(result.changes) == (0 if record == "nothing" else PAGES)
    return called - began, time.process_time() - called


def measured(m: Machine, va: int, enable: int) -> Cost:
    bare, changes, arrays = [], [], []
    for _ in range(ROUNDS):
        bare.append(timed(m, va, enable, "nothing")[0])
        seconds, made = timed(m, va, enable, "changes")
        changes.append(seconds)
        arrays.append(made)
    pairs = [b / a for a, b in zip(bare, changes, strict=True)]
    return Cost(*(statistics.median(column) for column in (bare, changes, arrays, pairs)))


@pytest.mark.full
@pytest.mark.parametrize("enable", [0, 1])
def test_recording_changes_costs_at_most_three_tenths_of_the_call(
    machine: Machine, enable: int, capsys: pytest.CaptureFixture[str]
) -> None:
    m = machine
    va = m.plan.linear + (1 << m.plan.va_bits - 4)
    template = protections(m.tables.fmt).kernel
    m.tables.map(va, 0x8000_0000, PAGES * m.plan.page_size, level=LAST_LEVEL, template=template)
    cost = measured(m, va, enable)
    if cost.ratio > LIMIT:  # another process may have had the CPU
        cost = min(cost, measured(m, va, enable), key=lambda c: c.ratio)
    order, _ = timed(m, va, enable, "order")
    with capsys.disabled():
        print(
            f"\n{m.image.release if m.image else ''} enable={enable}, {PAGES} pages: bare {cost.bare * 1e3:.1f} ms, "
            f"changes {cost.changes * 1e3:.1f} ms ({cost.ratio:.2f}x; arrays of them {cost.arrays * 1e3:.1f} ms more), "
            f"order {order * 1e3:.0f} ms ({order / cost.bare:.0f}x)"
        )
    assert cost.ratio <= LIMIT
